"""The main job: speed, FLOPs and memory of the convolutions and of their peers against the sequence length.

Batches hold about the same number of tokens at every length, cut from real text and padded; the ops get the padding
mask, and the peers do what people do instead: stock convolutions read an input with zeros written into the padding,
attention gets a key mask.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import text, timing
from benchmarks.peers import (
    DEPTHWISE,
    DYNAMIC,
    LIGHTWEIGHT,
    PEERS,
    TOLERANCE,
    Problem,
    attention,
    channels_first,
    disagreement,
    ours,
)
from benchmarks.suites import BOTH, FORWARD, OURS
from convkernels.cli import environment
from convkernels.cli.console import progress, quantity, say, table
from convkernels.ops._dtypes import dtype_name

ATTENTION, COMPILE = "attention", "compile"


@dataclass(frozen=True)
class Line:
    """One line of the plots: an op computed in one form."""

    label: str
    op: str
    form: str


LINES = (
    Line("lightweight", LIGHTWEIGHT, OURS),
    Line("dynamic", DYNAMIC, OURS),
    Line("depthwise", DEPTHWISE, OURS),
    Line("depthwise, F.conv1d", DEPTHWISE, "conv1d"),
    Line("lightweight, torch.compile", LIGHTWEIGHT, COMPILE),
    Line("attention, SDPA", ATTENTION, ATTENTION),
)
MORE_LINES = (
    Line("depthwise, F.conv2d channels-last", DEPTHWISE, "conv2d-CL"),
    Line("depthwise, F.conv1d on [B,C,T]", DEPTHWISE, "conv1d-BCT"),
    Line("lightweight, F.conv2d channels-last", LIGHTWEIGHT, "conv2d-CL"),
    Line("lightweight, unfold", LIGHTWEIGHT, "unfold"),
    Line("lightweight, band matrix", LIGHTWEIGHT, "band"),
    Line("dynamic, torch.compile", DYNAMIC, COMPILE),
    Line("dynamic, unfold", DYNAMIC, "unfold"),
    Line("dynamic, band matrix", DYNAMIC, "band"),
)


@dataclass(frozen=True)
class Settings:
    """`tokens`: positions per batch, so the batch is max(1, tokens // length). `seconds`: shared by all timed repeats.
    A form whose call takes longer than `slow_call` is not repeated, longer than `stop_call` not run at longer
    sequences. `compile_seconds`: no further shape is compiled once this is spent.
    """

    lengths: tuple[int, ...] = (64, 128, 256, 512, 1024, 2048, 4096)
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    channels: int = 768
    heads: int = 12
    taps: int = 7
    tokens: int = 2048
    seconds: float = 10.0
    slow_call: float = 0.25
    stop_call: float = 0.7
    compile_seconds: float = 20.0
    all_peers: bool = False

    @property
    def lines(self) -> tuple[Line, ...]:
        return LINES + MORE_LINES if self.all_peers else LINES

    def problem(self, op: str, length: int, dtype: torch.dtype) -> Problem:
        heads = self.channels if op == DEPTHWISE else self.heads
        return Problem(op, max(1, self.tokens // length), length, self.channels, heads, self.taps, dtype)


@dataclass
class Inputs:
    """Tensors of one length and dtype: embedded text, its padding mask, taps per op, projections for attention, a
    cotangent.
    """

    x: torch.Tensor
    mask: torch.Tensor
    weights: dict[str, torch.Tensor]
    attention: tuple[torch.Tensor, ...]
    grad: torch.Tensor
    padding: float


def make_inputs(settings: Settings, length: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    batch = text.batch(max(1, settings.tokens // length), length)
    x = text.embed(batch.tokens, settings.channels)
    torch.manual_seed(0)
    channels, heads, taps = settings.channels, settings.heads, settings.taps
    with torch.no_grad():
        # The taps of the dynamic convolution and attention's q, k, v are predicted from the text, as in a model.
        predicted = torch.nn.Linear(channels, heads * taps)(x).unflatten(2, (heads, taps))
        qkv = torch.nn.Linear(channels, 3 * channels)(x).chunk(3, dim=-1)
    weights = {LIGHTWEIGHT: torch.randn(heads, taps), DYNAMIC: predicted, DEPTHWISE: torch.randn(channels, taps)}

    def place(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(device, dtype).contiguous()

    return Inputs(
        place(x),
        batch.mask.to(device),
        {op: place(weight) for op, weight in weights.items()},
        tuple(place(t) for t in qkv),
        place(torch.randn_like(x)),
        batch.padding,
    )


class Case:
    """One line at one length and dtype, callable forward and forward+backward."""

    def __init__(self, line: Line, problem: Problem | None, inputs: Inputs, heads: int, form: Callable | None) -> None:
        self.line, self.problem, self.heads = line, problem, heads
        self.form = form or ours
        if line.form == ATTENTION:
            self.tensors = inputs.attention
            size = inputs.x.nbytes
            self.bytes = {FORWARD: 4 * size, BOTH: 11 * size}
        else:
            x = channels_first(inputs.x) if line.form in PEERS and PEERS[line.form].channels_first else inputs.x
            self.tensors = (x, inputs.weights[line.op])
            self.bytes = {FORWARD: problem.minimum_bytes(False), BOTH: problem.minimum_bytes(True)}
        self.leaves = tuple(t.detach().requires_grad_() for t in self.tensors)
        self.mask, self.grad = inputs.mask, inputs.grad

    def _apply(self, mask: torch.Tensor, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        if self.line.form == ATTENTION:
            return attention(*tensors, self.heads, mask)
        return self.form(*tensors, self.problem, mask)

    def _run(self, direction: str, mask: torch.Tensor, grad: torch.Tensor, *tensors: torch.Tensor) -> object:
        if direction == FORWARD:
            with torch.no_grad():
                return self._apply(mask, tensors)
        return torch.autograd.grad(self._apply(mask, tensors), tensors, grad)

    def call(self, direction: str) -> Callable[[], object]:
        tensors = self.tensors if direction == FORWARD else self.leaves
        return lambda: self._run(direction, self.mask, self.grad, *tensors)

    def flops(self, direction: str) -> int | None:
        """None for a compiled form: what is left of it is elementwise work."""
        if self.line.form == COMPILE:
            return None
        return timing.flops(lambda *tensors: self._run(direction, *tensors), self.mask, self.grad, *self.leaves)

    def check(self) -> str | None:
        """Why the form is wrong, or None: its result is compared with that of convkernels before it is timed."""
        if self.line.form in (OURS, ATTENTION):
            return None
        with torch.no_grad():
            expected = ours(*self.tensors, self.problem, self.mask)
        distance = disagreement((self.call(FORWARD)(),), (expected,))
        return None if distance <= TOLERANCE[expected.dtype] else f"result differs from ours by {distance:.1e}"


def spread(values: Sequence[int]) -> list[int]:
    """Last, first, then the middles: what to take first when only some can be taken."""
    order = [values[-1], values[0]] if len(values) > 1 else list(values)
    spans = [(0, len(values) - 1)]
    while spans:
        low, high = spans.pop(0)
        if high - low > 1:
            middle = (low + high) // 2
            order.append(values[middle])
            spans += [(low, middle), (middle, high)]
    return order


class Sweep:
    def __init__(self, settings: Settings, device: torch.device) -> None:
        self.settings, self.device = settings, device
        self.records: list[dict[str, Any]] = []
        self.work: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self.stopped: set[tuple[Line, torch.dtype, str]] = set()
        self.compiled: dict[tuple[Line, int, torch.dtype], tuple[Callable, set[str]]] = {}
        self.paddings: dict[int, float] = {}

    def note(self, subject: str, reason: str) -> None:
        """Printed under the tables and stored with the results."""
        self.notes.append(f"{subject}: {reason}")

    def compile_peers(self, step: Callable[[str, int], None]) -> None:
        """Compile ahead of all timing, most telling lengths first, until the time for it is spent."""
        settings, start = self.settings, time.perf_counter()
        lines = [line for line in settings.lines if line.form == COMPILE]
        lengths = spread(settings.lengths)
        pairs = [lengths[i : i + 2] for i in range(0, len(lengths), 2)]
        order = [
            (line, length, dtype, direction)
            for dtype, pair, line, direction in itertools.product(settings.dtypes, pairs, lines, (FORWARD, BOTH))
            for length in pair
        ]
        for line, length, dtype, direction in order:
            if time.perf_counter() - start >= settings.compile_seconds:
                if settings.compile_seconds == 0:
                    self.note(line.label, "left out (--compile-seconds 0)")
                    return
                spent = f"{settings.compile_seconds:g} s are spent (--compile-seconds)"
                self.note(line.label, f"not compiled for every length and dtype: {spent}")
                return
            step(f"compile {line.label}, T={length} {dtype_name(dtype)} {direction}", 0)
            form, ready = self.compiled.setdefault((line, length, dtype), (PEERS[COMPILE].build(masked=True), set()))
            inputs = make_inputs(settings, length, dtype, self.device)
            case = Case(line, settings.problem(line.op, length, dtype), inputs, settings.heads, form)
            try:
                case.call(direction)()
            except Exception as error:
                self.note(line.label, f"torch.compile failed: {_first_line(error)}")
                return
            ready.add(direction)

    def _cases(self, length: int, dtype: torch.dtype, inputs: Inputs) -> dict[Line, Case]:
        cases = {}
        for line in self.settings.lines:
            problem, form = None, None
            if line.op != ATTENTION:
                problem = self.settings.problem(line.op, length, dtype)
            if line.form == COMPILE:
                form, ready = self.compiled.get((line, length, dtype), (None, ()))
                if FORWARD not in ready:
                    continue
            elif line.form in PEERS:
                peer = PEERS[line.form]
                if peer.extra_bytes(problem) > timing.available_bytes(self.device) // 2:
                    self.note(
                        line.label, f"T={length}: would need {quantity(peer.extra_bytes(problem), 'B')} of memory"
                    )
                    continue
                form = peer.build(masked=True)
            case = Case(line, problem, inputs, self.settings.heads, form)
            if length == self.settings.lengths[0] or line.form == COMPILE:
                wrong = case.check()
                if wrong:
                    self.note(line.label, f"T={length} {dtype_name(dtype)}: {wrong}")
                    self.stopped |= {(line, dtype, direction) for direction in (FORWARD, BOTH)}
                    continue
            cases[line] = case
        return cases

    def measure(self, length: int, dtype: torch.dtype, clock: timing.Clock, seconds: float) -> None:
        settings = self.settings
        inputs = make_inputs(settings, length, dtype, self.device)
        self.paddings[length] = round(inputs.padding, 3)
        cases = self._cases(length, dtype, inputs)
        target = torch.empty_like(inputs.x)
        calls: dict[tuple[Line, str] | str, Callable[[], object]] = {"copy": lambda: target.copy_(inputs.x)}
        for line, case in cases.items():
            ready = self.compiled[line, length, dtype][1] if line.form == COMPILE else (FORWARD, BOTH)
            for direction in ready:
                if (line, dtype, direction) not in self.stopped:
                    calls[line, direction] = case.call(direction)

        def failed(key: object, error: Exception) -> None:
            self.note(key[0].label, f"T={length} {dtype_name(dtype)} {key[1]}: {_first_line(error)}")

        memory: dict[object, int | None] = {}

        def first_call(key: object) -> None:
            # Lazy initialisation is over after the shortest sequence's extra call; later first calls count exactly.
            if length == settings.lengths[0]:
                calls[key]()
            memory[key] = timing.peak_extra_bytes(calls[key], self.device)

        options = {"first_call": first_call, "on_error": failed}
        times = timing.interleaved(calls, clock, seconds, settings.slow_call, **options)
        copy = times.pop("copy")
        copy_speed = 2 * inputs.x.nbytes / copy.median
        batch = inputs.x.shape[0]
        work = {
            (line, direction): case.flops(direction) for line, case in cases.items() for direction in (FORWARD, BOTH)
        }
        for (line, direction), count in work.items():
            shape = {"dtype": dtype_name(dtype), "batch": batch, "length": length}
            self.work.append({"line": line.label, "direction": direction, **shape, "flops": count})
        for (line, direction), t in times.items():
            case = cases[line]
            if t.median > settings.stop_call and line.form != OURS and length < settings.lengths[-1]:
                self.stopped.add((line, dtype, direction))
                reason = f"stops at T={length}, where a call takes {quantity(t.median, 's')}"
                self.note(
                    line.label, f"{direction} in {dtype_name(dtype)} {reason} (--stop-call {settings.stop_call:g})"
                )
            self.records.append(
                {
                    "line": line.label,
                    "op": line.op,
                    "form": line.form,
                    "direction": direction,
                    "dtype": dtype_name(dtype),
                    "batch": batch,
                    "length": length,
                    "seconds": t.median,
                    "minimum_bytes": case.bytes[direction],
                    "copy_fraction": case.bytes[direction] / t.median / copy_speed,
                    "flops": work[line, direction],
                    "peak_extra_bytes": memory[line, direction],
                }
            )

    def run(self, saved: Callable[[dict[str, Any]], None] = lambda section: None) -> None:
        """Measure; `saved` is given the section whenever there is more in it."""
        settings, clock = self.settings, timing.clock_for(self.device)
        groups = [(length, dtype) for length in settings.lengths for dtype in settings.dtypes]
        with progress(len(groups)) as step:
            self.compile_peers(step)
            for length, dtype in groups:
                step(f"measure T={length} {dtype_name(dtype)}", 0)
                self.measure(length, dtype, clock, settings.seconds / len(groups))
                saved(self.section())
                step(f"measured T={length} {dtype_name(dtype)}", 1)

    def section(self) -> dict[str, Any]:
        """What has been measured so far, as the results file holds it."""
        settings = self.settings
        return {
            "environment": environment.describe(self.device),
            "settings": {
                "lengths": list(settings.lengths),
                "dtypes": [dtype_name(dtype) for dtype in settings.dtypes],
                "channels": settings.channels,
                "heads": settings.heads,
                "taps": settings.taps,
                "tokens": settings.tokens,
                "padding": self.paddings,
                "vocabulary": text.vocabulary_size(),
            },
            "records": self.records,
            "work": self.work,
            "notes": self.notes,
        }


def print_tables(section: dict[str, Any]) -> None:
    """One table per dtype and direction."""
    title = environment.title(section["environment"])
    columns = ("op", "T", "B", "time", "examples/s", "GB/s", "of a copy", "FLOPs", "memory")
    settings = section["settings"]
    shape = f"C={settings['channels']} H={settings['heads']} K={settings['taps']}"
    for dtype in settings["dtypes"]:
        for direction in (FORWARD, BOTH):
            chosen = [r for r in section["records"] if (r["dtype"], r["direction"]) == (dtype, direction)]
            lines = list(dict.fromkeys(r["line"] for r in chosen))
            rows = [
                (
                    r["line"],
                    str(r["length"]),
                    str(r["batch"]),
                    quantity(r["seconds"], "s"),
                    quantity(r["batch"] / r["seconds"]),
                    f"{r['minimum_bytes'] / r['seconds'] / 1e9:.1f}",
                    f"{r['copy_fraction']:.2f}",
                    quantity(r["flops"]),
                    quantity(r["peak_extra_bytes"], "B"),
                )
                for r in sorted(chosen, key=lambda r: (lines.index(r["line"]), r["length"]))
            ]
            table(f"{direction}, {dtype}, {shape}, {title}", columns, rows)
    for note in section["notes"]:
        say(f"note: {note}")


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
