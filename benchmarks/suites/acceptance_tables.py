"""The targets of convolutions on a CPU, and the tables that the suite acceptance prints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.peers import DYNAMIC, LIGHTWEIGHT, PEERS
from benchmarks.suites import BACKWARD, COPY, FORWARD, NO_GRAD, OURS, RECORDING
from convkernels.cli import environment
from convkernels.cli.console import say, table

FRESH, RESIDENT = "fresh", "resident"
BATCH, CHANNELS, TABLE_LENGTH, LONG_LENGTH = 8, 768, 512, 4096


class Results:
    """Look-ups in the records of a run; a missing measurement is None."""

    def __init__(self, section: dict[str, Any]) -> None:
        self.section = section
        fields = ("op", "direction", "dtype", "length", "heads", "taps", "memory")
        self.groups = {tuple(r[field] for field in fields): r["seconds"] for r in section["records"]}

    def times(self, op, direction, dtype, heads, taps, length=TABLE_LENGTH, memory=FRESH) -> dict[str, float]:
        return self.groups.get((op, direction, dtype, length, heads, taps, memory), {})

    def best_stock(self, times: dict[str, float]) -> tuple[str, float] | None:
        return min(((name, times[name]) for name in PEERS if name in times), key=lambda item: item[1], default=None)


Ratio = Callable[[Results, dict[str, float]], float]


def _of_copies(copies: float) -> Ratio:
    return lambda results, times: copies * times[COPY] / times[OURS]


def _against_best(results: Results, times: dict[str, float]) -> float:
    return results.best_stock(times)[1] / times[OURS]


def _against(name: str) -> Ratio:
    return lambda results, times: times[name] / times[OURS]


@dataclass(frozen=True)
class Target:
    """A line of the table: a ratio, the taps it holds for, and its least value in fp32 and bf16 for each."""

    text: str
    op: str
    direction: str
    ratio: Ratio
    least: dict[int, tuple[float, float]]
    length: int = TABLE_LENGTH
    memory: str = FRESH


TARGETS = (
    Target(
        "lightweight forward, fraction of a copy",
        LIGHTWEIGHT,
        FORWARD,
        _of_copies(1.0),
        {3: (0.87, 0.83), 7: (0.87, 0.83), 15: (0.75, 0.63), 31: (0.50, 0.50)},
    ),
    Target(
        "lightweight forward, times faster than the best stock form",
        LIGHTWEIGHT,
        FORWARD,
        _against_best,
        {3: (1.1, 1.3), 7: (1.15, 1.7), 15: (1.2, 2.5), 31: (1.25, 3.8)},
    ),
    Target(
        "lightweight backward, fraction of 1.5 copies",
        LIGHTWEIGHT,
        BACKWARD,
        _of_copies(1.5),
        {3: (0.75, 0.70), 7: (0.75, 0.70), 15: (0.60, 0.55), 31: (0.45, 0.40)},
    ),
    Target(
        "lightweight backward, times faster than the best stock form",
        LIGHTWEIGHT,
        BACKWARD,
        _against_best,
        {3: (1.5, 2.0), 7: (3.5, 3.5), 15: (4.5, 4.5), 31: (5.5, 7.0)},
    ),
    Target(
        "dynamic forward, times faster than the best stock form",
        DYNAMIC,
        FORWARD,
        _against_best,
        {7: (1.3, 1.9), 31: (3.0, 6.0)},
    ),
    Target(
        "dynamic backward, times faster than the best stock form",
        DYNAMIC,
        BACKWARD,
        _against_best,
        {7: (2.0, 2.4), 31: (4.8, 5.5)},
    ),
    Target(
        "lightweight forward at T=4096, resident output, fraction of a copy",
        LIGHTWEIGHT,
        FORWARD,
        _of_copies(1.0),
        {3: (1.2, 1.2), 7: (1.2, 1.2)},
        LONG_LENGTH,
        RESIDENT,
    ),
    Target(
        "F.conv1d on transposed [B,T,C], times slower than lightweight forward",
        LIGHTWEIGHT,
        FORWARD,
        _against("conv1d"),
        {3: (12, 17), 7: (12, 17), 15: (12, 17), 31: (12, 17)},
    ),
)
OVERHEAD_TARGETS = {NO_GRAD: 3.5e-6, RECORDING: 9e-6}


def _verdict(values: Sequence[float | None], least: float) -> str:
    if any(value is None for value in values):
        return "not measured"
    return "PASS" if all(value >= least for value in values) else "miss"


def target_rows(section: dict[str, Any]) -> list[tuple[str, ...]]:
    """(measure, K, then per dtype: target, values per H, verdict). A line passes when every H does."""
    results, rows = Results(section), []
    for target in TARGETS:
        for taps, least in target.least.items():
            row = [target.text, str(taps)]
            for dtype, bound in zip(("float32", "bfloat16"), least, strict=True):
                heads = section["shape"]["heads"] if target.op == LIGHTWEIGHT else (12,)
                values = []
                for h in heads:
                    times = results.times(target.op, target.direction, dtype, h, taps, target.length, target.memory)
                    try:
                        values.append(target.ratio(results, times))
                    except (KeyError, TypeError):
                        values.append(None)
                shown = " / ".join("-" if value is None else f"{value:.2f}" for value in values)
                row += [f">= {bound:g}", shown, _verdict(values, bound)]
            rows.append(tuple(row))
    return rows


def overhead_rows(section: dict[str, Any]) -> list[tuple[str, ...]]:
    rows = []
    for mode, times in section["overhead"].items():
        worst = max(times["depthwise_conv1d"], times["lightweight_conv1d"])
        most = OVERHEAD_TARGETS[mode]
        values = [f"{times[name] * 1e6:.2f}" for name in ("depthwise_conv1d", "lightweight_conv1d", "F.conv1d")]
        rows.append((mode, f"<= {most * 1e6:g}", *values, "PASS" if worst <= most else "miss"))
    return rows


TARGET_COLUMNS = ("measure", "K", "fp32 target", "fp32", "verdict", "bf16 target", "bf16", "verdict")
OVERHEAD_COLUMNS = ("call overhead [us]", "target", "depthwise_conv1d", "lightweight_conv1d", "F.conv1d", "verdict")


def time_rows(section: dict[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Columns and rows with the microseconds of every form at every shape."""
    forms = [COPY, OURS, *PEERS]
    columns = ("op", "direction", "dtype", "T", "H", "K", "output", *forms)
    rows = []
    for key, times in Results(section).groups.items():
        op, direction, dtype, length, heads, taps, memory = key
        values = [f"{times[form] * 1e6:.0f}" if form in times else "-" for form in forms]
        rows.append((op, direction, dtype, str(length), str(heads), str(taps), memory, *values))
    return columns, rows


def print_tables(section: dict[str, Any]) -> None:
    title = environment.title(section["environment"])
    heads = "/".join(str(h) for h in section["shape"]["heads"])
    table(f"microseconds, B={BATCH} C={CHANNELS}, {title}", *time_rows(section))
    targets = f"targets at T={TABLE_LENGTH} (values for H={heads}; dynamic: H=12), {title}"
    table(targets, TARGET_COLUMNS, target_rows(section))
    table(f"B=1 T=4 C=64 K=7 float32, {title}", OVERHEAD_COLUMNS, overhead_rows(section))
    reasons = {(s["form"], s["reason"]) for s in section["skipped"]}
    say(f"{len(section['skipped'])} measurements skipped ({len(reasons)} reasons, in the JSON file)")
