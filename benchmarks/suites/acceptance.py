"""The targets of docs/results.md: every one is a ratio of medians of interleaved repeats inside one process.

Forward passes run without gradients. The backward pass is torch.autograd.grad with respect to x and the taps on a
retained graph, so the softmax and the expansion of the taps are included, in every form. The yardstick is `y.copy_(x)`
into an existing tensor, for the backward pass 1.5 times that (read x and dy, write dx). "Best stock form" is the
fastest of `peers.PEERS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch._functorch.config as functorch_config
import torch.nn.functional as F

import convkernels
from benchmarks import timing
from benchmarks.peers import DYNAMIC, LIGHTWEIGHT, PEERS, TOLERANCE, Problem, channels_first, disagreement, ours
from convkernels.cli import environment
from convkernels.cli.console import progress, quantity, say, table

OURS, COPY = "convkernels", "copy"
FORWARD, BACKWARD = "forward", "backward"
FRESH, RESIDENT = "fresh", "resident"
BATCH, CHANNELS, TABLE_LENGTH, LONG_LENGTH = 8, 768, 512, 4096
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
HOPELESS = 10.0


@dataclass(frozen=True)
class Settings:
    """`seconds`: for the timed repeats of one group (one shape, dtype and direction). `slow_call`: a form is called
    only once if that takes longer.
    """

    lengths: tuple[int, ...] = (64, 512, 4096)
    taps: tuple[int, ...] = (3, 7, 15, 31)
    heads: tuple[int, ...] = (2, 12, 768)
    dynamic_heads: tuple[int, ...] = (12,)
    dynamic_taps: tuple[int, ...] = (7, 31)
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    compiled: bool = True
    seconds: float = 1.0
    slow_call: float = 0.1

    def problems(self) -> Iterator[Problem]:
        for length in self.lengths:
            for name in self.dtypes:
                for op, heads, taps in self._shapes():
                    yield Problem(op, BATCH, length, CHANNELS, heads, taps, DTYPES[name])

    def _shapes(self) -> Iterator[tuple[str, int, int]]:
        for op, all_heads, all_taps in (
            (LIGHTWEIGHT, self.heads, self.taps),
            (DYNAMIC, self.dynamic_heads, self.dynamic_taps),
        ):
            for heads in all_heads:
                for taps in all_taps:
                    yield op, heads, taps


def _name(problem: Problem) -> str:
    return f"{problem.op} T={problem.length} H={problem.heads} K={problem.taps} {str(problem.dtype)[6:]}"


class Group:
    """One shape and dtype: our op, its stock forms, and the copy."""

    def __init__(self, problem: Problem, device: torch.device, forms: dict[str, Callable]) -> None:
        generator = torch.Generator(device).manual_seed(0)
        shape = (problem.batch, problem.length, problem.channels)

        def normal(shape: tuple[int, ...]) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device=device).to(problem.dtype)

        self.problem, self.device, self.forms = problem, device, forms
        self.x, self.grad = normal(shape), normal(shape)
        self.weight = normal(problem.weight_shape)
        self.target = torch.empty_like(self.x)

    def copy(self) -> torch.Tensor:
        return self.target.copy_(self.x)

    def _layout(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        return channels_first(tensor) if name in PEERS and PEERS[name].channels_first else tensor

    def forward(self, name: str) -> Callable[[], torch.Tensor]:
        form, x = self.forms[name], self._layout(name, self.x)

        def call() -> torch.Tensor:
            with torch.no_grad():
                return form(x, self.weight, self.problem)

        return call

    def backward(self, name: str) -> Callable[[], tuple[torch.Tensor, ...]]:
        leaves = [t.detach().requires_grad_() for t in (self._layout(name, self.x), self.weight)]
        grad = self._layout(name, self.grad)
        y = self.forms[name](*leaves, self.problem)
        return lambda: torch.autograd.grad(y, leaves, grad, retain_graph=True)

    @staticmethod
    def _part(tensor: torch.Tensor) -> torch.Tensor:
        """What is compared of a result: one batch row of large ones, all of the taps' gradient."""
        return tensor[:1] if tensor.ndim > 2 else tensor

    def calls(self, direction: str, names: Sequence[str], failed: Callable[[str, str], None]) -> dict[str, Callable]:
        """Callables of the forms whose results agree with ours."""
        prepare = self.forward if direction == FORWARD else self.backward
        calls: dict[str, Callable] = {}
        expected = None
        for name in names:
            try:
                call = prepare(name)
                result = call()
            except Exception as error:
                if name == OURS:
                    raise
                failed(name, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
                continue
            result = result if isinstance(result, tuple) else (result,)
            expected = expected or result
            distance = disagreement(*((self._part(t) for t in tensors) for tensors in (result, expected)))
            if distance <= TOLERANCE[self.problem.dtype]:
                calls[name] = call
            else:
                failed(name, f"disagrees with ours by {distance:.1e}")
        return calls


class Acceptance:
    def __init__(self, settings: Settings, device: torch.device) -> None:
        self.settings, self.device = settings, device
        self.clock = timing.clock_for(device)
        self.records: list[dict[str, Any]] = []
        self.skipped: list[dict[str, str]] = []
        self.seconds: dict[tuple, float] = {}
        self.overheads: dict[str, dict[str, float]] = {}

    def _too_slow(self, problem: Problem, direction: str, name: str) -> str | None:
        """Reason not to run a form: too much memory, or hopeless at a shorter sequence and slow at this one."""
        if PEERS[name].extra_bytes(problem) > timing.available_bytes(self.device) // 2:
            return f"would need {quantity(PEERS[name].extra_bytes(problem), 'B')}"
        shorter = [n for n in self.settings.lengths if n < problem.length]
        if not shorter:
            return None
        key = (problem.op, problem.heads, problem.taps, problem.dtype, direction, shorter[-1])
        time = self.seconds.get((*key, name), 0.0)
        best = min((t for (*k, form), t in self.seconds.items() if tuple(k) == key and form in PEERS), default=math.inf)
        predicted = time * problem.length / shorter[-1]
        affordable = self.settings.slow_call if time > HOPELESS * best else 5 * self.settings.slow_call
        if name == "conv1d" or time < 2 * best or predicted < affordable:
            return None
        return f"{time / best:.0f} times slower than the best stock form at T={shorter[-1]}"

    def _forms(self, problem: Problem) -> dict[str, Callable]:
        forms: dict[str, Callable] = {OURS: ours}
        for name, peer in PEERS.items():
            if problem.op in peer.ops and (self.settings.compiled or not peer.compiled):
                forms[name] = peer.build()
        return forms

    def measure(self, problem: Problem) -> None:
        group = Group(problem, self.device, self._forms(problem))
        for direction in (FORWARD, BACKWARD):

            def skip(name: str, reason: str, direction: str = direction) -> None:
                self.skipped.append({"shape": _name(problem), "direction": direction, "form": name, "reason": reason})

            names = []
            for name in group.forms:
                reason = None if name == OURS else self._too_slow(problem, direction, name)
                names += [] if reason else [name]
                if reason:
                    skip(name, reason)
            calls = {COPY: group.copy, **group.calls(direction, names, skip)}
            # Preparing the calls has made the untimed first call of each already.
            options = {"first_call": lambda name: None}
            times = timing.interleaved(calls, self.clock, self.settings.seconds, self.settings.slow_call, **options)
            key = (problem.op, problem.heads, problem.taps, problem.dtype, direction, problem.length)
            self.seconds |= {(*key, name): t.median for name, t in times.items()}
            self._record(problem, direction, times, FRESH)

    def _record(self, problem: Problem, direction: str, times: dict[str, timing.Timing], memory: str) -> None:
        self.records.append(
            {
                "op": problem.op,
                "direction": direction,
                "dtype": str(problem.dtype)[6:],
                "length": problem.length,
                "heads": problem.heads,
                "taps": problem.taps,
                "memory": memory,
                "seconds": {form: t.median for form, t in times.items()},
            }
        )

    def measure_resident(self, problem: Problem) -> None:
        """The forward pass again while the C library keeps freed memory, so that the result lands in resident pages."""
        with timing.resident_heap() as switched, torch.no_grad():
            if not switched:
                return
            names = [OURS, "conv2d-CL"]
            group = Group(
                problem, self.device, {name: form for name, form in self._forms(problem).items() if name in names}
            )
            calls = {COPY: group.copy, **{name: group.forward(name) for name in names}}
            self._record(problem, FORWARD, timing.interleaved(calls, self.clock, self.settings.seconds), RESIDENT)

    def overhead(self) -> dict[str, dict[str, float]]:
        """Seconds per call at B=1, T=4, C=64, K=7 in float32: without gradients, and recording a graph."""
        x, weight, light = torch.randn(1, 4, 64), torch.randn(64, 7), torch.randn(4, 7)
        x, weight, light = (t.to(self.device) for t in (x, weight, light))
        leaf = x.clone().requires_grad_()
        forms = {
            "depthwise_conv1d": lambda x: convkernels.depthwise_conv1d(x, weight),
            "lightweight_conv1d": lambda x: convkernels.lightweight_conv1d(x, light),
            "F.conv1d": lambda x: F.conv1d(x.transpose(1, 2), weight[:, None], padding=3, groups=64),
        }

        def measure(x: torch.Tensor) -> dict[str, float]:
            calls = {name: (lambda form=form: form(x)) for name, form in forms.items()}
            times = timing.interleaved(calls, self.clock, self.settings.seconds, calls=500)
            return {name: t.median for name, t in times.items()}

        with torch.no_grad():
            plain = measure(x)
        return {"no-grad": plain, "recording": measure(leaf)}

    def run(self, saved: Callable[[dict[str, Any]], None] = lambda section: None) -> None:
        """Measure; `saved` is given the section whenever there is more in it."""
        problems = list(self.settings.problems())
        resident = []
        if self.device.type == "cpu" and LONG_LENGTH in self.settings.lengths:
            resident = [p for p in problems if p.op == LIGHTWEIGHT and p.length == LONG_LENGTH and p.taps <= 7]
        # Compiled graphs are walked more than once, so their buffers must outlive the first backward pass.
        with (
            functorch_config.patch(donated_buffer=False),
            progress(len(problems) + len(resident) + 1) as step,
        ):
            self.overheads = self.overhead()
            step("call overhead", 1)
            for problem in problems:
                self.measure(problem)
                saved(self.section())
                step(_name(problem), 1)
            for problem in resident:
                self.measure_resident(problem)
                saved(self.section())
                step(f"{_name(problem)}, resident output", 1)

    def section(self) -> dict[str, Any]:
        """What has been measured so far, as the results file holds it."""
        return {
            "environment": environment.describe(self.device),
            "shape": {
                "batch": BATCH,
                "channels": CHANNELS,
                "heads": self.settings.heads,
                "lengths": self.settings.lengths,
            },
            "records": self.records,
            "skipped": self.skipped,
            "overhead": self.overheads,
        }


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
OVERHEAD_TARGETS = {"no-grad": 3.5e-6, "recording": 9e-6}


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
            for dtype, bound in zip(DTYPES, least, strict=True):
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
    table(f"targets at T={TABLE_LENGTH} (values for H={heads}; dynamic: H=12)", TARGET_COLUMNS, target_rows(section))
    table("B=1 T=4 C=64 K=7 float32", OVERHEAD_COLUMNS, overhead_rows(section))
    reasons = {(s["form"], s["reason"]) for s in section["skipped"]}
    say(f"{len(section['skipped'])} measurements skipped ({len(reasons)} reasons, in the JSON file)")
