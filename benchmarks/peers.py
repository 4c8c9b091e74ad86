"""The stock PyTorch ways to write the same convolutions, and attention of the same width.

Every form takes x [B, T, C] and the raw taps ([H, K] lightweight, [B, T, H, K] dynamic, [C, K] depthwise), applies the
softmax over taps where the problem asks for it, expands the taps as its formulation needs, and returns y [B, T, C]:

    y[b, t, c] = sum_j w[b, t, c // (C/H), j] * x[b, t + j - left, c]

Source: Wu et al. 2019; Tay et al. 2021, equations 2 and 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import convkernels

LIGHTWEIGHT, DYNAMIC, DEPTHWISE = "lightweight", "dynamic", "depthwise"


@dataclass(frozen=True)
class Problem:
    """One shape of one op. `heads` counts the distinct filters and equals `channels` for a depthwise convolution."""

    op: str
    batch: int
    length: int
    channels: int
    heads: int
    taps: int
    dtype: torch.dtype

    @property
    def softmax(self) -> bool:
        return self.op != DEPTHWISE

    @property
    def left(self) -> int:
        return self.taps // 2

    @property
    def weight_shape(self) -> tuple[int, ...]:
        head = (self.heads, self.taps)
        return (self.batch, self.length, *head) if self.op == DYNAMIC else head

    @property
    def x_bytes(self) -> int:
        return self.batch * self.length * self.channels * self.dtype.itemsize

    def minimum_bytes(self, backward: bool) -> int:
        """Every input read once, every output written once: of the forward pass, or of forward and backward pass."""
        # Forward: x and weight to y. Backward: d(y), x and weight to d(x) and d(weight).
        rows, weights = (5, 3) if backward else (2, 1)
        return rows * self.x_bytes + weights * math.prod(self.weight_shape) * self.dtype.itemsize


Form = Callable[[torch.Tensor, torch.Tensor, Problem], torch.Tensor]


def ours(x: torch.Tensor, weight: torch.Tensor, problem: Problem, mask: torch.Tensor | None = None) -> torch.Tensor:
    if problem.op == DYNAMIC:
        return convkernels.dynamic_conv1d(x, weight, mask=mask)
    if problem.op == LIGHTWEIGHT:
        return convkernels.lightweight_conv1d(x, weight, mask=mask)
    return convkernels.depthwise_conv1d(x, weight, mask=mask)


def _taps(weight: torch.Tensor, problem: Problem) -> torch.Tensor:
    return weight.softmax(-1) if problem.softmax else weight


def _channel_filters(weight: torch.Tensor, problem: Problem) -> torch.Tensor:
    return _taps(weight, problem).repeat_interleave(problem.channels // problem.heads, 0)


def conv1d(x: torch.Tensor, weight: torch.Tensor, problem: Problem) -> torch.Tensor:
    """F.conv1d with one group per channel, on the transposed view of whatever memory x has."""
    filters = _channel_filters(weight, problem)[:, None]
    y = F.conv1d(x.transpose(1, 2), filters, padding=problem.left, groups=problem.channels)
    return y[..., : problem.length].transpose(1, 2)


def conv2d_channels_last(x: torch.Tensor, weight: torch.Tensor, problem: Problem) -> torch.Tensor:
    """F.conv2d on [B, C, 1, T]: the channels-last form of that tensor is the memory of [B, T, C], so nothing is
    transposed.
    """
    filters = _channel_filters(weight, problem)[:, None, None]
    y = F.conv2d(x.transpose(1, 2).unsqueeze(2), filters, padding=(0, problem.left), groups=problem.channels)
    return y[..., : problem.length].squeeze(2).transpose(1, 2)


def shifted_sum(x: torch.Tensor, weight: torch.Tensor, problem: Problem) -> torch.Tensor:
    """One shifted product per tap, summed; meant for torch.compile, which fuses it into one loop."""
    taps = _taps(weight, problem)
    padded = F.pad(x, (0, 0, problem.left, problem.taps - 1 - problem.left)).unflatten(2, (problem.heads, -1))
    return sum(taps[..., j, None] * padded[:, j : j + x.shape[1]] for j in range(problem.taps)).flatten(2)


def unfold(x: torch.Tensor, weight: torch.Tensor, problem: Problem) -> torch.Tensor:
    """All windows of x side by side, times the filters, one small product per position and head (fairseq's `unfold`
    path).
    """
    padded = F.pad(x, (0, 0, problem.left, problem.taps - 1 - problem.left))
    windows = padded.unfold(1, problem.taps, 1).unflatten(2, (problem.heads, -1))
    taps = _taps(weight, problem).expand(problem.batch, problem.length, -1, -1)
    products = torch.bmm(windows.flatten(0, 2), taps.reshape(-1, problem.taps, 1))
    return products.view(problem.batch, problem.length, problem.channels)


def band_matrix(x: torch.Tensor, weight: torch.Tensor, problem: Problem) -> torch.Tensor:
    """The filters written into a band of a [T, T] matrix per batch row and head, times x (fairseq's `expanded`)."""
    batch, length, taps = problem.batch * problem.heads, problem.length, problem.taps
    width = length + taps - 1
    rows = _taps(weight, problem).expand(problem.batch, length, -1, -1).transpose(1, 2).reshape(batch, length, taps)
    band = rows.new_zeros(batch, length, width)
    band.as_strided((batch, length, taps), (length * width, width + 1, 1)).copy_(rows)
    heads = x.unflatten(2, (problem.heads, -1)).transpose(1, 2).reshape(batch, length, -1)
    y = torch.bmm(band[..., problem.left : problem.left + length], heads)
    return y.unflatten(0, (problem.batch, -1)).transpose(1, 2).flatten(2)


@dataclass(frozen=True)
class Peer:
    """A stock form: which ops it can compute, whether it wants x in [B, C, T] memory, whether torch.compile is
    applied, and about how many bytes it allocates besides its result, forward and backward.
    """

    form: Form
    ops: tuple[str, ...]
    channels_first: bool = False
    compiled: bool = False
    extra_bytes: Callable[[Problem], int] = lambda problem: 0

    def build(self, masked: bool = False) -> Callable[..., torch.Tensor]:
        """The callable form(x, weight, problem), or with `masked` form(x, weight, problem, mask) reading 0 where the
        mask is False.

        A compiled form is specialised to the shapes of its first call.
        """
        form = self.form

        def unmasked(x: torch.Tensor, weight: torch.Tensor, problem: Problem) -> torch.Tensor:
            return form(x, weight, problem)

        def with_mask(x: torch.Tensor, weight: torch.Tensor, problem: Problem, mask: torch.Tensor) -> torch.Tensor:
            return form(x.masked_fill(~mask.unsqueeze(-1), 0), weight, problem)

        function = with_mask if masked else unmasked
        if not self.compiled:
            return function
        # Dynamo keeps its specialisations with the code object and gives up after eight, so every build gets its own.
        function.__code__ = function.__code__.replace()
        return torch.compile(function, dynamic=False)


def _unfold_bytes(problem: Problem) -> int:
    return 3 * problem.taps * problem.x_bytes


def _band_bytes(problem: Problem) -> int:
    return 4 * problem.batch * problem.heads * problem.length * (problem.length + problem.taps) * problem.dtype.itemsize


_SHARED = (LIGHTWEIGHT, DEPTHWISE)
_ALL = (*_SHARED, DYNAMIC)
PEERS: dict[str, Peer] = {
    "conv1d": Peer(conv1d, _SHARED),
    "conv1d-BCT": Peer(conv1d, _SHARED, channels_first=True),
    "conv2d-CL": Peer(conv2d_channels_last, _SHARED),
    "compile": Peer(shifted_sum, _ALL, compiled=True),
    "unfold": Peer(unfold, _ALL, extra_bytes=_unfold_bytes),
    "band": Peer(band_matrix, _ALL, extra_bytes=_band_bytes),
}


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, mask: torch.Tensor | None) -> torch.Tensor:
    """softmax(q k' / sqrt(D)) v per head; q, k, v and the result [B, T, C]; keys where `mask` [B, T] is False are left
    out.
    """
    q, k, v = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    keys = None if mask is None else mask[:, None, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keys).transpose(1, 2).flatten(2)


def column_index(length: int, window: int, device: torch.device) -> torch.Tensor:
    """[length, length]: the column of each pair of positions in tables of relative terms that repeat their edge."""
    place = torch.arange(length, device=device)
    return (place - place[:, None]).clamp(-window, window) + window


def published_attention(
    index: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor,
    query_rel: torch.Tensor,
    weigh: Callable[[torch.Tensor], torch.Tensor] = lambda scores: scores.softmax(-1),
) -> torch.Tensor:
    """Composite attention as Chang et al. 2021 published it, one [B, H, T, T] tensor per step: q, k, v and the result
    [B, T, H, D], bias [H, W], query_rel [H, D, W], the `column_index`.
    """
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    scale = q.shape[-1] ** -0.5
    by_column = torch.einsum("bhtd,hdw->bhtw", q, query_rel) * scale + bias[:, None]
    scores = q @ k.transpose(2, 3) * scale + by_column.gather(3, index.expand(*q.shape[:2], -1, -1))
    return (weigh(scores) @ v).transpose(1, 2)


def channels_first(x: torch.Tensor) -> torch.Tensor:
    """The same [B, T, C] values in [B, C, T] memory."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def disagreement(results: Iterable[torch.Tensor], references: Iterable[torch.Tensor]) -> float:
    """Largest relative distance |a - r| / |r| (Euclidean norms) over pairs of tensors."""
    pairs = zip(results, references, strict=True)
    return max(float((a.double() - r.double()).norm() / r.double().norm().clamp_min(1e-30)) for a, r in pairs)


# What two correct forms of one dtype may differ by: the roundings of long sums of the taps' gradients, not a wrong tap.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}
