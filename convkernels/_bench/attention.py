"""Composite attention against sequence length: time, FLOPs and memory beside what people use instead, and the targets
of docs/performance.md.

Ours has a learnable bias and a learnable term of the query per head, window 8, repeated beyond it. SDPA knows no
positions; with a bias it reads a [heads, T, T] tensor that is looked up in the same learnable table at every call;
FlexAttention, compiled, is given both terms as a score_mod; "eager" is the published formulation, one [B, heads, T, T]
tensor per step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import convkernels

from . import environment, timing
from .console import markdown_table, progress, quantity, say, table
from .peers import TOLERANCE, disagreement

COMPOSITE, PLAIN, SDPA = "composite attention", "attention, no positions", "SDPA, no positions"
SDPA_BIAS, FLEX, EAGER = "SDPA, materialised bias", "FlexAttention, compiled", "eager formulation"
FORWARD, BACKWARD, BOTH = "forward", "backward", "forward+backward"


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
    place = torch.arange(length, device=device)
    index = (place - place[:, None]).clamp(-settings.window, settings.window) + settings.window
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


def sdpa_bias(n: Inputs, q, k, v, bias, query_rel) -> Tensor:
    scores = F.embedding(n.index, bias.T).permute(2, 0, 1)[None]
    return F.scaled_dot_product_attention(*_by_head(q, k, v), attn_mask=scores).transpose(1, 2)


def eager(n: Inputs, q, k, v, bias, query_rel) -> Tensor:
    q, k, v = _by_head(q, k, v)
    scale = q.shape[-1] ** -0.5
    by_column = torch.einsum("bhtd,hdw->bhtw", q, query_rel) * scale + bias[:, None]
    scores = q @ k.transpose(2, 3) * scale + by_column.gather(3, n.index.expand(*q.shape[:2], -1, -1))
    return (scores.softmax(-1) @ v).transpose(1, 2)


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
# Forms that compute the same as another are compared with it before they are timed.
EQUALS = {EAGER: COMPOSITE, FLEX: COMPOSITE, SDPA: PLAIN}


class Suite:
    def __init__(self, settings: Settings, device: torch.device) -> None:
        self.settings, self.device = settings, device
        self.records: list[dict[str, Any]] = []
        self.work: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self.seconds: dict[tuple[str, str, str], tuple[int, float]] = {}  # of the last length that was measured

    def _too_slow(self, name: str, direction: str, dtype: str, length: int) -> bool:
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
                if self._too_slow(name, FORWARD, str(inputs.q.dtype)[6:], inputs.q.shape[1]):
                    continue
                try:
                    result = form(inputs, *inputs.leaves)[:1].clone()
                except Exception as error:
                    if name in (COMPOSITE, PLAIN):
                        raise
                    self.notes.append(f"{name}, {subject}: {type(error).__name__}: {str(error).splitlines()[0]}")
                    continue
                other = EQUALS.get(name)
                off = disagreement((result,), (found[other],)) if other else 0.0
                if off <= TOLERANCE[result.dtype]:
                    found[name] = result
                else:
                    self.notes.append(f"{name}, {subject}: differs from {other} by {off:.1e}")
        return {name: forms[name] for name in found}

    def _calls(self, forms: dict, inputs: Inputs, direction: str) -> dict[str, Callable[[], object]]:
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
        return {name: prepare(form) for name, form in forms.items() if direction in self._directions(name)}

    def _flops(self, name: str, form, inputs: Inputs, direction: str) -> int | None:
        """None for the compiled form, of which torch counts nothing."""
        if name == FLEX:
            return None

        def run(index, *leaves):
            out = form(replace(inputs, index=index), *leaves)
            if direction == FORWARD:
                return out
            return torch.autograd.grad(out, leaves, torch.ones_like(out), allow_unused=True)

        return timing.flops(run, inputs.index, *(t.detach().requires_grad_() for t in inputs.leaves))

    def measure(self, length: int, dtype_name: str, clock: timing.Clock, step: Callable[[str, int], None]) -> None:
        settings, dtype = self.settings, getattr(torch, dtype_name)
        inputs = make_inputs(settings, length, dtype, self.device)
        subject = f"T={length} {dtype_name}"
        step(f"compare forms, {subject}", 0)
        forms = self._agreeing(self._forms(length, dtype), inputs, subject)
        for direction in (FORWARD, BACKWARD, BOTH):
            step(f"{direction}, {subject}", 0)
            quick = {n: f for n, f in forms.items() if not self._too_slow(n, direction, dtype_name, length)}
            calls = self._calls(quick, inputs, direction)
            memory: dict[str, int | None] = {}

            def first_call(name: str, calls=calls, memory=memory) -> None:
                calls[name]()
                memory[name] = timing.peak_extra_bytes(calls[name], self.device)

            times = timing.interleaved(calls, clock, settings.seconds, settings.slow_call, first_call=first_call)
            for name, t in times.items():
                self.seconds[name, direction, dtype_name] = length, t.median
                shape = {"line": name, "direction": direction, "dtype": dtype_name, "length": length,
                         "batch": settings.batch}  # fmt: skip
                count = None if direction == BACKWARD else self._flops(name, forms[name], inputs, direction)
                self.work.append({**shape, "flops": count})
                self.records.append(
                    {
                        **shape,
                        "seconds": t.median,
                        "quartiles": [t.low, t.high],
                        "repeats": t.repeats,
                        "examples_per_second": settings.batch / t.median,
                        "flops": count,
                        "peak_extra_bytes": memory[name],
                    }
                )
            step(f"{direction}, {subject}", 1)

    def run(self) -> dict[str, Any]:
        import torch._functorch.config as functorch_config

        s, clock = self.settings, timing.clock_for(self.device)
        with functorch_config.patch(donated_buffer=False), progress(3 * len(s.lengths) * len(s.dtypes)) as step:
            for dtype in s.dtypes:
                for length in s.lengths:
                    self.measure(length, dtype, clock, step)
        return {
            "environment": environment.describe(self.device),
            "settings": {"lengths": list(s.lengths), "dtypes": list(s.dtypes), "batch": s.batch, "heads": s.heads,
                         "head_size": s.head_size, "window": s.window, "backend": s.backend},
            "records": self.records,
            "work": self.work,
            "notes": self.notes,
        }  # fmt: skip


# ---- the table of targets


@dataclass(frozen=True)
class Target:
    """A ratio of two lines' times, and per length its bound in fp32 and bf16, from above or (`least`) from below."""

    text: str
    direction: str
    over: str
    under: str
    bounds: dict[int, tuple[float, float]]
    least: bool = False


TARGETS = (
    Target(
        "forward with relative terms / SDPA without positions", FORWARD, COMPOSITE, SDPA,
        {128: (0.85, 0.80), 512: (0.85, 0.72), 2048: (0.87, 0.75)},
    ),
    Target(
        "forward with relative terms / own forward without", FORWARD, COMPOSITE, PLAIN,
        {128: (1.10, 1.12), 512: (1.04, 1.06), 2048: (1.02, 1.04)},
    ),
    Target(
        "backward with all tables / SDPA's without positions", BACKWARD, COMPOSITE, SDPA,
        dict.fromkeys((128, 512, 2048), (0.95, 0.85)),
    ),
    Target(
        "FlexAttention with the same terms / ours, forward", FORWARD, FLEX, COMPOSITE,
        {512: (4.0, 5.5), 2048: (4.5, 6.5)}, least=True,
    ),
    Target(
        "SDPA with a materialised learnable bias / ours, training", BOTH, SDPA_BIAS, COMPOSITE, {2048: (2.5, 9.0)},
        least=True,
    ),
)  # fmt: skip
TARGET_COLUMNS = ("ratio", "T", "fp32 target", "fp32", "verdict", "bf16 target", "bf16", "verdict")


def target_rows(section: dict[str, Any]) -> list[tuple[str, ...]]:
    times = {(r["line"], r["direction"], r["dtype"], r["length"]): r["seconds"] for r in section["records"]}
    rows = []
    for target in TARGETS:
        for length, bounds in target.bounds.items():
            row = [target.text, str(length)]
            for dtype, bound in zip(("float32", "bfloat16"), bounds, strict=True):
                over, under = (
                    times.get((n, target.direction, dtype, length), math.nan) for n in (target.over, target.under)
                )
                value = over / under
                met = value >= bound if target.least else value <= bound
                verdict = "not measured" if math.isnan(value) else "PASS" if met else "miss"
                shown = "-" if math.isnan(value) else f"{value:.2f}"
                row += [f"{'>=' if target.least else '<='} {bound:.2f}", shown, verdict]
            rows.append(tuple(row))
    return rows


def shape(settings: dict[str, Any]) -> str:
    return f"B={settings['batch']}, H={settings['heads']}, D={settings['head_size']}, window {settings['window']}"


def _rows(section: dict[str, Any], dtype: str, direction: str) -> list[tuple[str, ...]]:
    chosen = [r for r in section["records"] if (r["dtype"], r["direction"]) == (dtype, direction)]
    lines = list(dict.fromkeys(r["line"] for r in chosen))
    return [
        (
            r["line"],
            str(r["length"]),
            quantity(r["seconds"], "s"),
            quantity(r["flops"]),
            "-" if r["flops"] is None else f"{r['flops'] / r['seconds'] / 1e9:.0f}",
            quantity(r["peak_extra_bytes"], "B"),
        )
        for r in sorted(chosen, key=lambda r: (lines.index(r["line"]), r["length"]))
    ]


COLUMNS = ("form", "T", "time", "FLOPs", "GFLOP/s", "memory")


def print_tables(section: dict[str, Any]) -> None:
    title = environment.title(section["environment"])
    for dtype in section["settings"]["dtypes"]:
        for direction in (FORWARD, BACKWARD, BOTH):
            table(
                f"{direction}, {dtype}, {shape(section['settings'])}, {title}",
                COLUMNS,
                _rows(section, dtype, direction),
            )
    table("targets", TARGET_COLUMNS, target_rows(section))
    for note in section["notes"]:
        say(f"note: {note}")


def markdown(section: dict[str, Any]) -> str:
    """The targets and the times, for docs/performance.md."""
    parts = [
        f"{environment.title(section['environment'])}; {shape(section['settings'])}.",
        markdown_table(TARGET_COLUMNS, target_rows(section)),
    ]
    for dtype in section["settings"]["dtypes"]:
        for direction in (FORWARD, BACKWARD, BOTH):
            parts += [f"{direction}, {dtype}:", markdown_table(COLUMNS, _rows(section, dtype, direction))]
    return "\n\n".join([*parts, *(f"Note: {note}." for note in section["notes"])])
