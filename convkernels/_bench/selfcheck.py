"""A quick numeric self-test of every usable backend, against float64 and the a-priori bounds of convkernels.testing."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

import convkernels
from convkernels import backends
from convkernels.ops._spec import overload
from convkernels.testing.bounds import Bounds, StepBounds
from convkernels.testing.inputs import Problem, StepProblem

# One problem per feature, and the shapes at which kernels change path: whole and broken vectors of channels, filters
# longer than the sequence, many taps, one tap.
PROBLEMS = (
    Problem(length=70, heads=2, head_size=64, taps=7, left=3),
    Problem(length=70, heads=2, head_size=64, taps=31, left=15, softmax=True),
    Problem(length=33, heads=3, head_size=13, taps=4, left=2, softmax=True, bias=True),
    Problem(length=40, heads=77, head_size=1, taps=15, left=14),
    Problem(length=5, heads=4, head_size=16, taps=31, left=15, softmax=True, renormalize=True),
    Problem(length=40, heads=2, head_size=32, taps=3, left=4, dilation=4, layout="swap_last"),
    Problem(length=40, heads=2, head_size=32, taps=1, left=0, layout="step2", grad_layout="expanded"),
    Problem(length=40, heads=2, head_size=24, taps=7, left=3, gate=True, padding_mask=1, softmax=True),
    Problem(length=40, heads=2, head_size=24, taps=7, left=3, dropout=0.3, softmax=True),
    Problem(batch=1, lengths=(11, 0, 29), heads=2, head_size=24, taps=7, left=6, state=True, gate=True),
    Problem(length=50, heads=2, head_size=64, taps=7, left=3, kind="dynamic", softmax=True),
    Problem(length=50, heads=4, head_size=24, taps=31, left=30, kind="dynamic", softmax=True, renormalize=True),
    Problem(length=30, heads=4, head_size=9, taps=5, left=2, kind="dynamic", dropout=0.3, padding_mask=2, bias=True),
)
STEPS = (
    StepProblem(heads=3, head_size=40, taps=7, softmax=True, indexed=True, bias=True),
    StepProblem(heads=3, head_size=13, taps=4, kind="dynamic", softmax=True, renormalize=True, gate=True, position=2),
)
RESULTS = ("x", "weight", "bias", "gate", "initial_state")


@dataclass
class Outcome:
    """Checks of one backend, device and dtype: how many, the largest error as a fraction of its bound, what failed."""

    backend: str
    device: str
    dtype: torch.dtype
    checks: int = 0
    worst: float = 0.0
    seconds: float = 0.0
    failures: list[str] = field(default_factory=list)

    def compare(self, expected, actual: torch.Tensor, name: str) -> None:
        self.checks += 1
        try:
            expected.check(actual, name)
            self.worst = max(self.worst, expected.worst(actual))
        except AssertionError as error:
            self.failures.append(str(error))


def _placed(arguments: tuple, device: str) -> tuple:
    return tuple(a.to(device) if isinstance(a, torch.Tensor) else a for a in arguments)


def _check_conv(outcome: Outcome, problem: Problem) -> None:
    tensors = problem.tensors()
    arguments = problem.op_arguments(tensors)
    bounds = Bounds(*arguments)
    y = overload("_tap_conv", outcome.backend)(*_placed(arguments, outcome.device))
    outcome.compare(bounds.output(), y, f"{problem}: y")
    expected = bounds.gradients(tensors["grad"])
    gradients = overload("_tap_grad", outcome.backend)(*_placed(problem.grad_arguments(tensors), outcome.device))
    for name, gradient in zip(RESULTS, gradients, strict=True):
        if gradient.numel() and name in expected:
            outcome.compare(expected[name], gradient, f"{problem}: gradient of {name}")


def _check_step(outcome: Outcome, problem: StepProblem) -> None:
    arguments = problem.op_arguments(problem.tensors())
    bounds = StepBounds(*(a.clone() if isinstance(a, torch.Tensor) else a for a in arguments))
    placed = _placed(arguments, outcome.device)
    y = overload("_tap_step", outcome.backend)(*placed)
    outcome.compare(bounds.output(), y, f"{problem}: y")
    outcome.compare(bounds.state(), placed[1], f"{problem}: state")


def run(device_types: tuple[str, ...]) -> Iterator[Outcome]:
    """One outcome per usable backend, device type and dtype."""
    for backend, entry in backends.BACKENDS.items():
        for device in device_types:
            for dtype in entry.dtypes:
                if convkernels.why_not(backend, device=device, dtype=dtype):
                    continue
                outcome, start = Outcome(backend, device, dtype), time.perf_counter()
                # Weights may have another dtype than x, except that float64 goes with float64 only.
                others = (dtype,) if dtype in (torch.float64, torch.float32) else (dtype, torch.float32)
                for weight_dtype in others:
                    for problem in PROBLEMS:
                        _check_conv(outcome, problem.with_(dtype=dtype, weight_dtype=weight_dtype))
                    for step in STEPS:
                        _check_step(outcome, step.with_(dtype=dtype, weight_dtype=weight_dtype))
                outcome.seconds = time.perf_counter() - start
                yield outcome
