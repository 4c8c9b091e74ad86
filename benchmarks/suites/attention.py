"""Composite attention against sequence length: time, FLOPs and memory beside what people use instead, and the targets
of docs/results.md.

Ours has a learnable bias and a learnable term of the query per head, window 8, repeated beyond it. SDPA knows no
positions; with a bias it reads a [heads, T, T] tensor that is looked up in the same learnable table at every call;
FlexAttention, compiled, is given both terms as a score_mod; "eager" is the published formulation, one [B, heads, T, T]
tensor per step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import convkernels
from benchmarks import timing
from benchmarks.peers import TOLERANCE, column_index, disagreement, published_attention
from benchmarks.suites import BACKWARD, BOTH, FORWARD
from benchmarks.suites.attention_tables import BANDED, COMPOSITE, EAGER, FLASH, FLEX, PAPER, PLAIN, SDPA, SDPA_BIAS
from convkernels.cli import environment
from convkernels.cli.console import progress, quantity
from convkernels.ops._dtypes import dtype_name


@dataclass(frozen=True)
class Settings:
    """`seconds`: for the timed repeats of one length, dtype and direction. A form whose call takes longer than
    `slow_call` is not repeated; one that would take longer than `stop_call` (with T squared) is not run."""

    lengths: tuple[int, ...] = (128, 512, 2048)
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    batch: int = 4
    heads: int = 12
    head_size: int = 64
    window: int = 8
    compiled: bool = True
    seconds: float = 6.0
    slow_call: float = 4.0
    stop_call: float = 20.0
    backend: str = "auto"


@dataclass
class Inputs:
    """q, k, v, grad [B, T, H, D]; bias [H, W]; query_rel [H, D, W]; index [T, T]: the column of each pair."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor
    query_rel: Tensor
    grad: Tensor
    index: Tensor
    window: int
    backend: str

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return self.q, self.k, self.v, self.bias, self.query_rel


def make_inputs(settings: Settings, length: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)
    columns = 2 * settings.window + 1

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    q, k, v, grad = (normal(settings.batch, length, settings.heads, settings.head_size) for _ in range(4))
    index = column_index(length, settings.window, device)
    tables = normal(settings.heads, columns), normal(settings.heads, settings.head_size, columns)
    return Inputs(q, k, v, *tables, grad, index, settings.window, settings.backend)


def _by_head(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.transpose(1, 2) for t in tensors)


def composite(n: Inputs, q, k, v, bias, query_rel) -> Tensor:
    return convkernels.composite_attention(
        q, k, v, bias=bias, query_rel=query_rel, window=(n.window, n.window), backend=n.backend
    )


def plain(n: Inputs, q, k, v, bias, query_rel) -> Tensor:
    return convkernels.composite_attention(q, k, v, backend=n.backend)


def sdpa(n: Inputs, q, k, v, bias, query_rel) -> Tensor:
    return F.scaled_dot_product_attention(*_by_head(q, k, v)).transpose(1, 2)


def flash(n: Inputs, q, k, v, bias, query_rel) -> Tensor:
    """Which of its implementations torch picks on a GPU depends on the GPU; targets name this one."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return sdpa(n, q, k, v, bias, query_rel)


def sdpa_bias(n: Inputs, q, k, v, bias, query_rel) -> Tensor:
    scores = F.embedding(n.index, bias.T).permute(2, 0, 1)[None]
    return F.scaled_dot_product_attention(*_by_head(q, k, v), attn_mask=scores).transpose(1, 2)


def eager(n: Inputs, *terms) -> Tensor:
    return published_attention(n.index, *terms)


def flex() -> Callable[..., Tensor]:
    """FlexAttention with the same terms, compiled for the shapes of its first call. What score_mod reads must be there
    before: inside the compiled region the CPU's code generator does not find it."""
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)

    def form(n: Inputs, q, k, v, bias, query_rel) -> Tensor:
        w = n.window
        q, k, v = _by_head(q, k, v)
        by_column = torch.einsum("bhtd,hdw->bhtw", q, query_rel) * q.shape[-1] ** -0.5 + bias[:, None]

        def score_mod(score, b, h, i, j):
            return score + by_column[b, h, i, (j - i).clamp(-w, w) + w]

        return compiled(q, k, v, score_mod=score_mod).transpose(1, 2)

    return form


FORMS: dict[str, Callable[..., Tensor]] = {
    COMPOSITE: composite, PLAIN: plain, SDPA: sdpa, SDPA_BIAS: sdpa_bias, EAGER: eager
}  # fmt: skip
OWN_LINES = (COMPOSITE, PLAIN, FORWARD, BACKWARD)  # the last two: the lines of the banded workload
# Forms that compute the same as another are compared with it before they are timed.
EQUALS = {EAGER: COMPOSITE, FLEX: COMPOSITE, SDPA: PLAIN, FLASH: PLAIN}


def banded(
    backend: str, device: torch.device, length: int = 8192, heads: int = 64
) -> tuple[Callable[..., Tensor], tuple[Tensor, ...], Tensor]:
    """Causal attention of 64 query and 8 key heads of 128 over 8192 positions, with a term of rank 16 within the last
    1024: the form, its leaves, a cotangent."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)

    groups = max(1, heads // 8)
    leaves = (normal(1, length, heads, 128), *(normal(1, length, groups, 128) for _ in range(2)),
              normal(1, length, heads, 16), normal(16, 1024) * 0.1)  # fmt: skip

    def form(q, k, v, rel_query, query_rel):
        return convkernels.composite_attention(
            q, k, v, rel_query=rel_query, query_rel=query_rel, window=(1023, 0), outside="zero", causal=True,
            backend=backend,
        )  # fmt: skip

    return form, leaves, normal(1, length, heads, 128)


def papers(heads: int, settings: Settings, device: torch.device) -> tuple[dict[str, Callable], Inputs]:
    """Training at the length of Chang et al. 2021: 32 rows of 128 positions, the last 15 % padding, dropout 0.1."""
    shaped = replace(settings, batch=32, heads=heads, head_size=64)
    inputs = make_inputs(shaped, 128, torch.bfloat16, device)
    mask = (torch.arange(128, device=device) < 109).expand(32, 128)
    hidden = torch.where(mask, 0.0, -math.inf).to(torch.bfloat16)[:, None, None]
    seed = torch.zeros(1, dtype=torch.int64, device=device)

    def ours(n, q, k, v, bias, query_rel):
        return convkernels.composite_attention(
            q, k, v, bias=bias, query_rel=query_rel, window=(n.window, n.window), key_mask=mask, dropout=0.1,
            training=True, seed=seed, backend=n.backend,
        )  # fmt: skip

    def materialised(n, q, k, v, bias, query_rel):
        scores = F.embedding(n.index, bias.T).permute(2, 0, 1)[None] + hidden
        return F.scaled_dot_product_attention(*_by_head(q, k, v), attn_mask=scores, dropout_p=0.1).transpose(1, 2)

    def published(n, q, k, v, bias, query_rel):
        return eager(n, q, k, v, bias, query_rel, lambda scores: F.dropout((scores + hidden).softmax(-1), 0.1))

    return {COMPOSITE: ours, SDPA_BIAS: materialised, EAGER: published}, inputs


class Suite:
    """Times every form. What fails is recorded: a peer in `notes`, ours in `errors`."""

    def __init__(self, settings: Settings, device: torch.device) -> None:
        self.settings, self.device = settings, device
        self.records: list[dict[str, Any]] = []
        self.workloads: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self.errors: list[str] = []
        self.seconds: dict[tuple[str, str, torch.dtype], tuple[int, float]] = {}  # of the last length that was measured

    def _failed(self, subject: str, name: str, error: Exception) -> None:
        failed = self.errors if name in OWN_LINES else self.notes
        failed.append(f"{name}, {subject}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}")

    def _too_slow(self, name: str, direction: str, dtype: torch.dtype, length: int) -> bool:
        before, seconds = self.seconds.get((name, direction, dtype), (length, 0.0))
        expected = seconds * (length / before) ** 2
        if expected > self.settings.stop_call:
            self.notes.append(
                f"{name}, {direction}, T={length} {dtype}: not run, it would take {quantity(expected, 's')}"
            )
        return expected > self.settings.stop_call

    def _directions(self, name: str) -> tuple[str, ...]:
        # On CPUs FlexAttention has no backward pass.
        return (FORWARD,) if name == FLEX and self.device.type == "cpu" else (FORWARD, BACKWARD, BOTH)

    def _bytes(self, name: str, length: int, dtype: torch.dtype) -> int:
        """What a form takes in the worst case, where that grows with the square of the length."""
        pairs = self.settings.heads * length * length * dtype.itemsize
        return {EAGER: 8 * self.settings.batch * pairs, SDPA_BIAS: 4 * self.settings.batch * pairs}.get(name, 0)

    def _forms(self, length: int, dtype: torch.dtype) -> dict[str, Callable[..., Tensor]]:
        forms = dict(FORMS)
        if self.device.type == "cuda":
            forms[FLASH] = flash
        if self.settings.compiled:
            forms[FLEX] = flex()
        for name in list(forms):
            if self._bytes(name, length, dtype) > timing.available_bytes(self.device) // 2:
                del forms[name]
                self.notes.append(
                    f"{name}, T={length}: would need {quantity(self._bytes(name, length, dtype), 'B')} of memory"
                )
        return forms

    def _agreeing(self, forms: dict[str, Callable[..., Tensor]], inputs: Inputs, subject: str) -> dict:
        """The forms that run, and that agree with what they should equal."""
        found: dict[str, Tensor] = {}
        with torch.no_grad():
            for name, form in forms.items():
                if self._too_slow(name, FORWARD, inputs.q.dtype, inputs.q.shape[1]):
                    continue
                try:
                    result = form(inputs, *inputs.leaves)[:1].clone()
                except Exception as error:
                    self._failed(subject, name, error)
                    continue
                other = EQUALS.get(name)
                off = disagreement((result,), (found[other],)) if other in found else 0.0
                if off <= TOLERANCE[result.dtype]:
                    found[name] = result
                else:
                    self.notes.append(f"{name}, {subject}: differs from {other} by {off:.1e}")
        return {name: forms[name] for name in found}

    def calls(self, forms: dict, inputs: Inputs, direction: str, subject: str) -> dict[str, Callable[[], object]]:
        leaves = tuple(t.detach().requires_grad_() for t in inputs.leaves)

        def forward(form):
            def call():
                with torch.no_grad():
                    return form(inputs, *inputs.leaves)

            return call

        def gradients(out):
            return torch.autograd.grad(out, leaves, inputs.grad, retain_graph=True, allow_unused=True)

        def backward(form):
            out = form(inputs, *leaves)
            return lambda: gradients(out)

        def both(form):
            return lambda: torch.autograd.grad(form(inputs, *leaves), leaves, inputs.grad, allow_unused=True)

        prepare = {FORWARD: forward, BACKWARD: backward, BOTH: both}[direction]
        makers = {name: partial(prepare, form) for name, form in forms.items() if direction in self._directions(name)}
        return timing.prepared(makers, partial(self._failed, subject))

    def _flops(self, name: str, form, inputs: Inputs, direction: str) -> int | None:
        """None for the backward pass, and for the compiled form, of which torch counts nothing."""
        if name == FLEX or direction == BACKWARD:
            return None

        def run(index, *leaves):
            out = form(replace(inputs, index=index), *leaves)
            if direction == FORWARD:
                return out
            return torch.autograd.grad(out, leaves, torch.ones_like(out), allow_unused=True)

        return timing.flops(run, inputs.index, *(t.detach().requires_grad_() for t in inputs.leaves))

    def measure(
        self,
        length: int,
        dtype: torch.dtype,
        clock: timing.Clock,
        step: Callable[[str, int], None],
        saved: Callable[[dict[str, Any]], None],
    ) -> None:
        settings = self.settings
        inputs = make_inputs(settings, length, dtype, self.device)
        subject = f"T={length} {dtype_name(dtype)}"
        step(f"compare forms, {subject}", 0)
        forms = self._agreeing(self._forms(length, dtype), inputs, subject)
        for direction in (FORWARD, BACKWARD, BOTH):
            step(f"{direction}, {subject}", 0)
            quick = {n: f for n, f in forms.items() if not self._too_slow(n, direction, dtype, length)}
            failed = partial(self._failed, f"{direction}, {subject}")
            calls = self.calls(quick, inputs, direction, f"{direction}, {subject}")
            memory: dict[str, int | None] = {}

            def first_call(name: str, calls=calls, memory=memory) -> None:
                calls[name]()
                memory[name] = timing.peak_extra_bytes(calls[name], self.device)

            times = timing.interleaved(
                calls, clock, settings.seconds, settings.slow_call, first_call=first_call, on_error=failed
            )
            for name, t in times.items():
                self.seconds[name, direction, dtype] = length, t.median
                shape = {"line": name, "direction": direction, "dtype": dtype_name(dtype), "length": length,
                         "batch": settings.batch}  # fmt: skip
                try:
                    count = self._flops(name, forms[name], inputs, direction)
                except Exception as error:
                    count = failed(name, error)
                self.records.append(
                    {
                        **shape,
                        "seconds": t.median,
                        "host_seconds": t.host,
                        "host_bound": t.host_bound,
                        "flops": count,
                        "peak_extra_bytes": memory[name],
                    }
                )
            saved(self.section())
            step(f"{direction}, {subject}", 1)

    def measure_workloads(self, clock: timing.Clock, saved: Callable[[dict[str, Any]], None]) -> None:
        """What targets for GPUs ask for beside the lengths: long banded attention, and the length of the paper."""

        def record(name: str, calls: dict[str, Callable]) -> None:
            failed = partial(self._failed, name)
            for line, t in timing.interleaved(calls, clock, self.settings.seconds, on_error=failed).items():
                self.workloads.append({"workload": name, "line": line, "seconds": t.median})
            saved(self.section())

        form, leaves, grad = banded(self.settings.backend, self.device)
        grads = tuple(t.detach().requires_grad_() for t in leaves)

        def forward():
            with torch.no_grad():
                return form(*leaves)

        def backward():
            out = form(*grads)
            return lambda: torch.autograd.grad(out, grads, grad, retain_graph=True)

        makers = {FORWARD: lambda: forward, BACKWARD: backward}
        record(BANDED, timing.prepared(makers, partial(self._failed, BANDED)))
        for heads in (4, 12):
            forms, inputs = papers(heads, self.settings, self.device)
            record(PAPER.format(heads), self.calls(forms, inputs, BOTH, PAPER.format(heads)))

    def run(self, saved: Callable[[dict[str, Any]], None] = lambda section: None) -> None:
        """Measure; `saved` is given the section whenever there is more in it."""
        import torch._functorch.config as functorch_config

        s, clock = self.settings, timing.clock_for(self.device)
        with functorch_config.patch(donated_buffer=False), progress(3 * len(s.lengths) * len(s.dtypes)) as step:
            for dtype in s.dtypes:
                for length in s.lengths:
                    self.measure(length, getattr(torch, dtype), clock, step, saved)
            if self.device.type == "cuda":
                self.measure_workloads(clock, saved)

    def section(self) -> dict[str, Any]:
        """What has been measured so far, as the results file holds it."""
        s = self.settings
        return {
            "environment": environment.describe(self.device),
            "settings": {"lengths": list(s.lengths), "dtypes": list(s.dtypes), "batch": s.batch, "heads": s.heads,
                         "head_size": s.head_size, "window": s.window, "backend": s.backend,
                         "device": self.device.type},
            "records": self.records,
            "workloads": self.workloads,
            "notes": self.notes,
            "errors": self.errors,
        }  # fmt: skip
