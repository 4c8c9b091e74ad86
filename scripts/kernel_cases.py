"""Calls of the streaming and attention suites whose kernels are counted: by Nsight Compute on a GPU (gpu_counters.py)
and in the simulation (launch_counters.py). Each function gives make(settings, device), which gives the call."""

from collections.abc import Callable

import torch

import convkernels
from benchmarks.suites import attention, streaming


def convolution(op: str, taps: int, direction: str, gate: bool = False) -> Callable:
    def make(settings: streaming.Settings, device: str) -> Callable[[], object]:
        suite = streaming.Streaming(settings, torch.device(device))
        return dict(suite.calls(streaming.Case(op, taps, (0.0, 0.0), gate)))[direction][streaming.OURS]()

    return make


def time_layout(direction: str) -> Callable:
    """7 taps, positions side by side in memory."""

    def make(s: streaming.Settings, device: str) -> Callable[[], object]:
        x = torch.randn(s.batch, s.channels, s.length, device=device).to(s.dtype).transpose(1, 2).requires_grad_()
        weight = torch.randn(s.heads, 7, device=device).to(s.dtype).requires_grad_()
        if direction == "forward":
            return lambda: convkernels.lightweight_conv1d(x.detach(), weight.detach(), backend=s.backend)
        y = convkernels.lightweight_conv1d(x, weight, backend=s.backend)
        return lambda: torch.autograd.grad(y, (x, weight), torch.ones_like(x), retain_graph=True)

    return make


def decode(op: str, taps: int, reorder: bool) -> Callable:
    """A step of as many batch rows as the settings have; with reorder, each continues from another row's state."""

    def make(s: streaming.Settings, device: str) -> Callable[[], object]:
        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, device=device).to(s.dtype)

        step = convkernels.dynamic_conv1d_step if op == streaming.DYNAMIC else convkernels.lightweight_conv1d_step
        weight = normal(*((s.batch,) if op == streaming.DYNAMIC else ()), s.heads, taps)
        x, state = normal(s.batch, s.channels), normal(s.batch, taps - 1, s.channels)
        index = torch.arange(s.batch, device=device).flip(0) if reorder else None
        return lambda: step(x, state, weight, state_index=index, backend=s.backend)

    return make


def serve(taps: int, length: int, rows_first: bool, packed: bool = False) -> Callable:
    """A step of so many positions by slots of a pool [S,W,C], or of one [S,C,W]; packed: of sequences of a position,
    and one of so many."""

    def make(s: streaming.Settings, device: str) -> Callable[[], object]:
        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, device=device).to(s.dtype)

        extra = 0 if packed else length - 1
        pool = normal(s.batch + 8, taps - 1 + extra, s.channels)
        if not rows_first:
            pool = pool.mT.contiguous().mT
        slots = torch.arange(s.batch, device=device, dtype=torch.int32).flip(0) + 3
        lengths = torch.tensor([1] * (s.batch - 1) + [length])
        bounds = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(device, torch.int32)
        accepted = None if packed else torch.arange(s.batch, device=device, dtype=torch.int32) % length + 1
        x = normal(1, int(lengths.sum()), s.channels) if packed else normal(s.batch, length, s.channels)
        weight, options = normal(s.channels, taps), {"activation": "silu", "slots": slots, "backend": s.backend}
        cu_seqlens = bounds if packed else None
        step = convkernels.depthwise_conv1d_step
        return lambda: step(x, pool, weight, accepted=accepted, cu_seqlens=cu_seqlens, **options)

    return make


def banded(direction: str) -> Callable:
    """The banded workload over the first length in the settings."""

    def make(settings: attention.Settings, device: str) -> Callable[[], object]:
        form, leaves, grad = attention.banded(
            settings.backend, torch.device(device), settings.lengths[0], settings.heads
        )
        if direction == "forward":
            return lambda: form(*leaves)
        leaves = [leaf.requires_grad_() for leaf in leaves]
        out = form(*leaves)
        return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)

    return make


def attend(form: str, direction: str) -> Callable:
    """Attention over the first length in the settings."""

    def make(settings: attention.Settings, device: str) -> Callable[[], object]:
        suite = attention.Suite(settings, torch.device(device))
        inputs = attention.make_inputs(settings, settings.lengths[0], torch.bfloat16, suite.device)
        calls = suite.calls({form: attention.FORMS[form]}, inputs, direction, direction)
        if suite.errors:
            raise RuntimeError(suite.errors[0])
        return calls[form]

    return make
