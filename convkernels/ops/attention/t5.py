"""T5's relative bias, expanded from buckets to the table that ``composite_attention`` takes."""

import math

import torch
from torch import Tensor

from .._validate import describe, fail, flag, floating, tensor


def buckets(offset: Tensor, bidirectional: bool, num_buckets: int, max_distance: int) -> Tensor:
    """The bucket of each offset (key position - query position).

    Half of the buckets (of each side, where there are two) hold one distance each, the others grow with the logarithm
    of the distance up to ``max_distance``; everything beyond falls into the last. The logarithm is taken in float32, as
    in the original, because the boundaries depend on its rounding.
    """
    first = torch.zeros_like(offset)
    if bidirectional:
        num_buckets //= 2
        first = torch.where(offset > 0, num_buckets, first)
        distance = offset.abs()
    else:
        distance = (-offset).clamp(min=0)
    exact = num_buckets // 2
    ratio = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    far = (exact + (ratio * (num_buckets - exact)).to(torch.int64)).clamp(max=num_buckets - 1)
    return first + torch.where(distance < exact, distance, far)


def t5_relative_bias(
    table: Tensor,
    window: int | tuple[int, int] | None = None,
    *,
    bidirectional: bool = True,
    max_distance: int = 128,
) -> Tensor:
    """T5's bucketed relative bias as a table for ``composite_attention(..., bias=..., outside="clip")``.

        bias[h, c] = table[bucket(c - left), h],   c = 0..left+right

    table: [num_buckets, H], the weight of T5's ``relative_attention_bias``; gradients flow back into it.
    window: (left, right), or T for (T-1, T-1). By default (max_distance, max_distance), and (max_distance, 0) if not
        bidirectional: all offsets beyond share the outermost bucket, so with ``outside="clip"`` the result is T5's at
        every length. Pass the same window on to ``composite_attention``.
    bidirectional: whether keys after the query have buckets of their own (an encoder); otherwise they share that of
        offset 0 (a decoder, where causality hides them).
    max_distance: from this distance on there is one bucket for all.

    Returns [H, left+right+1] in the dtype of the table. T5 does not scale its scores: ``scale=1.0``.
    Raises ValueError or TypeError naming the argument, what was expected and what was given.
    Source: Raffel et al. 2020, "Exploring the limits of transfer learning with a unified text-to-text transformer".
    """
    name = "t5_relative_bias"
    tensor(name, "table", table)
    floating(name, "table", table)
    flag(name, "bidirectional", bidirectional)
    least = 4 if bidirectional else 2
    if table.dim() != 2 or table.shape[0] < least or (bidirectional and table.shape[0] % 2):
        expected = f"shape [num_buckets,H] with {'an even number of ' if bidirectional else ''}buckets >= {least}"
        fail(name, "table", expected, table)
    if isinstance(max_distance, bool) or not isinstance(max_distance, int):
        fail(name, "max_distance", "an integer", describe(max_distance), TypeError)
    exact = table.shape[0] // least
    if max_distance <= exact:
        fail(name, "max_distance", f"more than the {exact} distances with buckets of their own", max_distance)
    if window is None:
        window = (max_distance, max_distance if bidirectional else 0)
    elif isinstance(window, int) and not isinstance(window, bool):
        window = (window - 1, window - 1)
    if not isinstance(window, tuple) or len(window) != 2 or any(type(side) is not int for side in window):
        fail(name, "window", "None, a length T >= 1, or (left, right)", describe(window), TypeError)
    if min(window) < 0:
        fail(name, "window", "None, a length T >= 1, or (left, right), two integers >= 0", window)
    offset = torch.arange(-window[0], window[1] + 1, device=table.device)
    return table[buckets(offset, bidirectional, table.shape[0], max_distance)].T
