"""ALiBi's biases, as the table that ``composite_attention`` takes."""

import math

import torch
from torch import Tensor

from .. import _validate
from .checks import reach


def alibi_bias(heads: int, window: int | tuple[int, int], *, device=None, dtype: torch.dtype = torch.float32) -> Tensor:
    """The biases of attention with linear biases, as a table for ``composite_attention(..., bias=...)``.

        bias[h, c] = -slope[h] * |c - left|,     c = 0..left+right

    heads: H. If it is a power of two, slope[h] = 2**(-8(h+1)/H); otherwise the slopes of the next smaller power of two,
        and then every second one of twice that many, as BLOOM, Falcon and MPT have them.
    window: (left, right), how far queries see; k stands for (k, k). A decoder of S keys has (S-1, 0).

    Returns [H, left+right+1]. The table is linear, so ``composite_attention`` must not meet offsets beyond it.
    Raises ValueError or TypeError naming the argument, what was expected and what was given.
    Source: Press et al. 2022, "Train short, test long: attention with linear biases enables input length
    extrapolation".
    """
    name = "alibi_bias"
    _validate.positive(name, "heads", heads)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        _validate.fail(name, "dtype", "a floating-point dtype", _validate.describe(dtype), TypeError)
    if window is None:
        _validate.fail(name, "window", "(left, right), two integers >= 0, or k for (k, k)", "None", TypeError)
    left, right = reach(name, window, "clip", {})
    whole = 2 ** math.floor(math.log2(heads))
    exponents = [8 * h / whole for h in range(1, whole + 1)]
    exponents += [4 * h / whole for h in range(1, 2 * (heads - whole), 2)]
    slopes = torch.tensor([2.0**-exponent for exponent in exponents], device=device, dtype=dtype)
    distance = torch.arange(-left, right + 1, device=device).abs().to(dtype)
    return slopes[:, None] * -distance
