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
from benchmarks.suites import BACKWARD, COPY, FORWARD, MODES, OURS, RECORDING
from benchmarks.suites.acceptance_tables import BATCH, CHANNELS, FRESH, LONG_LENGTH, RESIDENT
from convkernels.cli import environment
from convkernels.cli.console import progress, quantity
from convkernels.ops._dtypes import dtype_name

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
    return f"{problem.op} T={problem.length} H={problem.heads} K={problem.taps} {dtype_name(problem.dtype)}"


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


def call_overhead(
    recording: bool, device: torch.device, clock: timing.Clock, seconds: float
) -> dict[str, timing.Timing]:
    """Times of a call at B=1, T=4, C=64, K=7 in float32, without gradients or recording a graph."""
    x, weight, light = torch.randn(1, 4, 64), torch.randn(64, 7), torch.randn(4, 7)
    x, weight, light = (t.to(device) for t in (x, weight, light))
    x.requires_grad_(recording)
    calls = {
        "depthwise_conv1d": lambda: convkernels.depthwise_conv1d(x, weight),
        "lightweight_conv1d": lambda: convkernels.lightweight_conv1d(x, light),
        "F.conv1d": lambda: F.conv1d(x.transpose(1, 2), weight[:, None], padding=3, groups=64),
    }
    with torch.set_grad_enabled(recording):
        return timing.interleaved(calls, clock, seconds, calls=500)


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
                "dtype": dtype_name(problem.dtype),
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
            for mode in MODES:
                times = call_overhead(mode == RECORDING, self.device, self.clock, self.settings.seconds)
                self.overheads[mode] = {name: t.median for name, t in times.items()}
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
