"""The goals of the CPU kernels, each of a set of kernels (an instruction set), and their table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from statistics import median
from typing import Any

from benchmarks.peers import DYNAMIC, LIGHTWEIGHT
from benchmarks.suites import BACKWARD, BOTH, COPY, FORWARD, NO_GRAD, OURS, RECORDING
from benchmarks.suites.attention_tables import SDPA
from convkernels.cli import environment
from convkernels.cli.console import quantity, say, table

ATTENTION, CALL, COMPILE, CONV1D = "attention", "call", "compile", "F.conv1d"
CAUSAL, WIDE = f"{ATTENTION}, causal", f"{ATTENTION}, D=128"
CALLS = ("depthwise_conv1d", "lightweight_conv1d")
# Goals for a set hold for the sets that add to it.
SERVES = {"amx": ("amx", "avx512"), "avx512": ("avx512",), "avx2": ("avx2",)}
ANY = ""


@dataclass(frozen=True)
class Key:
    """What is timed side by side."""

    case: str
    direction: str
    dtype: str
    length: int
    heads: int | None = 12
    taps: int | None = None

    @property
    def name(self) -> str:
        parts = [self.case, self.direction, self.dtype, f"T={self.length}"]
        if self.taps:
            parts += [*([f"H={self.heads}"] if self.heads else []), f"K={self.taps}"]
        return " ".join(parts)


@dataclass(frozen=True)
class Goal:
    """A bound, from below if `least`, of `times` times the time of `over` in units of the time of `under`."""

    kernels: str
    key: Key
    text: str
    over: str
    under: str
    bound: float
    least: bool = False
    times: float = 1.0


def _attention(kernels: str, case: str, direction: str, dtype: str, *bounds: float) -> Iterator[Goal]:
    for length, bound in zip((128, 512, 2048), bounds, strict=True):
        yield Goal(kernels, Key(case, direction, dtype, length), "of SDPA's time", OURS, SDPA, bound)


def _dynamic(direction: str, dtype: str, bounds: dict[int, float]) -> Iterator[Goal]:
    for taps, bound in bounds.items():
        key = Key(DYNAMIC, direction, dtype, 512, 12, taps)
        yield Goal("avx512", key, "times as fast as torch.compile", COMPILE, OURS, bound, least=True)


def _lightweight(direction: str, dtype: str, bounds: dict[int, tuple[str, float]], *heads: int) -> Iterator[Goal]:
    copies, text = (1.0, "of a copy's speed") if direction == FORWARD else (1.5, "of the speed of 1.5 copies")
    for taps, (kernels, bound) in bounds.items():
        for h in heads:
            yield Goal(kernels, Key(LIGHTWEIGHT, direction, dtype, 512, h, taps), text, COPY, OURS, bound, True, copies)


def _call(mode: str, bound: float) -> Iterator[Goal]:
    for name in CALLS:
        yield Goal(ANY, Key(CALL, mode, "float32", 4, None, 7), f"{name}, of F.conv1d's time", name, CONV1D, bound)


def _by_taps(kernels: str, *bounds: float, longer: str = "") -> dict[int, tuple[str, float]]:
    """`longer`: the set that the goals of 15 and 31 taps are for."""
    names = (kernels, kernels, longer or kernels, longer or kernels)
    return dict(zip((3, 7, 15, 31), zip(names, bounds, strict=True), strict=True))


GOALS = (
    *_attention("amx", ATTENTION, FORWARD, "bfloat16", 0.55, 0.52, 0.52),
    *_attention("amx", WIDE, FORWARD, "bfloat16", 0.65, 0.65, 0.65),
    *_attention("amx", CAUSAL, FORWARD, "bfloat16", 0.65, 0.65, 0.65),
    *_attention("amx", ATTENTION, BOTH, "bfloat16", 0.30, 0.30, 0.30),
    *_attention("avx512", ATTENTION, FORWARD, "float32", 0.86, 0.82, 0.83),
    *_attention("avx512", ATTENTION, BOTH, "float32", 0.90, 0.90, 0.90),
    *_attention("avx2", ATTENTION, FORWARD, "float32", 0.95, 0.95, 0.95),
    *_dynamic(FORWARD, "float32", {7: 2.1, 31: 2.9}),
    *_dynamic(FORWARD, "bfloat16", {7: 2.9, 31: 4.5}),
    *_dynamic(BACKWARD, "float32", {7: 2.5, 31: 2.8}),
    *_dynamic(BACKWARD, "bfloat16", {7: 3.1, 31: 5.0}),
    *_lightweight(FORWARD, "bfloat16", _by_taps("avx512", 0.82, 0.80, 0.65, 0.55, longer="amx"), 2, 12),
    *_lightweight(BACKWARD, "bfloat16", _by_taps("avx512", 0.69, 0.58, 0.51, 0.41, longer="amx"), 2, 12),
    *_lightweight(BACKWARD, "float32", _by_taps("avx512", 0.80, 0.78, 0.65, 0.48), 2, 12, 768),
    # 4 and 9 microseconds on a machine where F.conv1d takes 63.
    *_call(NO_GRAD, 4 / 63),
    *_call(RECORDING, 9 / 63),
)
DTYPES = tuple(dict.fromkeys(goal.key.dtype for goal in GOALS))
LENGTHS = tuple(dict.fromkeys(goal.key.length for goal in GOALS if goal.key.case == ATTENTION))
COLUMNS = ("what", "goal for", "goal", "result", "verdict", "ours", "against", "in each process", "repeats left out")


def served(kernels: str, active: str) -> bool:
    """Whether goals for these kernels are goals of the active ones."""
    return kernels == ANY or kernels in SERVES.get(active, ())


def key_of(record: dict[str, Any]) -> Key:
    return Key(**{field.name: record[field.name] for field in fields(Key)})


def rows(section: dict[str, Any]) -> list[tuple[str, ...]]:
    """A row for each goal of the set that was measured, and for each of sets that the processor lacks."""
    active, lacking = section["environment"]["isa"], section["settings"]["lacking"]
    found = {key_of(r): r for r in section["records"]}
    result = []
    for goal in GOALS:
        if served(goal.kernels, active):
            result.append(_row(goal, found.get(goal.key)))
        elif goal.kernels in lacking:
            emulated = goal.kernels == "amx"
            verdict = "by emulation: not timed" if emulated else f"not timed: no {goal.kernels} here"
            result.append(_untimed(goal, verdict))
    return result


def _head(goal: Goal) -> tuple[str, str, str]:
    bound = f"{'>=' if goal.least else '<='} {goal.bound:.2g}"
    return f"{goal.key.name}: {goal.text}", goal.kernels or "any", bound


def _untimed(goal: Goal, verdict: str) -> tuple[str, ...]:
    return (*_head(goal), "-", verdict, *"----")


def _row(goal: Goal, record: dict[str, Any] | None) -> tuple[str, ...]:
    """The median ratio and times of processes whose threads had their cores; where none had, of all and no verdict."""
    names = {goal.over, goal.under}
    runs = (
        [(r, bool(names & set(d))) for r, d in zip(record["runs"], record["disturbed"], strict=True)] if record else []
    )
    runs = [(run, disturbed) for run, disturbed in runs if names <= run.keys()]
    if not runs:
        return _untimed(goal, "not measured")
    alone = [run for run, disturbed in runs if not disturbed]
    taken = alone or [run for run, _ in runs]

    def ratio(run: dict[str, float]) -> float:
        return goal.times * run[goal.over] / run[goal.under]

    value = median(map(ratio, taken))
    met = value >= goal.bound if goal.least else value <= goal.bound
    over, under = (median(run[name] for run in taken) for name in (goal.over, goal.under))
    ours, other = (under, goal.times * over) if goal.least else (over, under)
    return (
        *_head(goal),
        f"{value:.3g}",
        "cores were shared" if not alone else "met" if met else "missed",
        quantity(ours, "s"),
        quantity(other, "s"),
        " / ".join(f"{ratio(run):.3g}{' !' if disturbed else ''}" for run, disturbed in runs),
        f"{record['left_out']} of {record['timed']}",
    )


def notes(section: dict[str, Any]) -> list[str]:
    facts = section["environment"]
    return [
        f"kernels: {facts['isa']}, chosen {facts['chosen']}; torch {facts['torch']} uses {facts['torch_isa']}",
        f"threads: {facts['threads']}, bound by {facts['binding']}; {facts['date']}",
        *section["notes"],
        *(f"failed: {error}" for error in section["errors"]),
    ]


def print_tables(section: dict[str, Any]) -> None:
    table(f"goals, {environment.title(section['environment'])}", COLUMNS, rows(section))
    for note in notes(section):
        say(note)
