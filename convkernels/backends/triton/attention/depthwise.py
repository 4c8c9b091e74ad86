"""The depthwise term of attention, and the gradients of its values and parameters."""

import triton
import triton.language as tl

from ..device import narrow, widen
from .tiles import VARYING, Depthwise, Mask, head_at, load_tile, real_keys, sequence_tile


@triton.jit
def head_depthwise(depthwise, h, W, D: tl.constexpr):
    """The parameters of head h."""
    return Depthwise(depthwise.taps + h.to(tl.int64) * D * W, depthwise.bias + h * D, depthwise.scale + h)


@triton.jit
def convolved(v, mask, depthwise, owner, rows, left, W, FLAGS: tl.constexpr, DTYPE: tl.constexpr):
    """scale * (bias + the taps of one head on the values around the ``rows`` of a tile of queries), [queries, DP]."""
    D: tl.constexpr = FLAGS.D
    DP: tl.constexpr = FLAGS.DP
    d = tl.arange(0, DP)
    first = owner.first + owner.other_end - owner.end
    total = tl.zeros([rows.shape[0], DP], DTYPE)
    for c in tl.range(0, left + 1 if FLAGS.CAUSAL else W):
        j_first = first + c - left
        j = j_first + tl.arange(0, rows.shape[0])
        keep = rows & real_keys(mask, j, owner.other_begin, owner.other_end, FLAGS.HAS_MASK)
        value = widen(load_tile(v, j_first, d, keep, D, False), DTYPE)
        total += widen(tl.load(depthwise.taps + d * W + c, mask=d < D, other=0.0), DTYPE)[None, :] * value
    if FLAGS.HAS_CONV_BIAS:
        total += widen(tl.load(depthwise.bias + d, mask=d < D, other=0.0), DTYPE)[None, :]
    if FLAGS.HAS_CONV_SCALE:
        total *= widen(tl.load(depthwise.scale), DTYPE)
    return total


@triton.jit
def convolved_back(total, grad, depthwise, b, g, owner, left, W, sharing, FLAGS: tl.constexpr):
    """``total``, [keys, DP], and the gradient that the values of a tile of keys get from the depthwise terms of all
    heads that share them."""
    D: tl.constexpr = FLAGS.D
    d = tl.arange(0, FLAGS.DP)
    first = owner.first - (owner.end - owner.other_end)
    DTYPE: tl.constexpr = total.dtype
    found = tl.zeros(total.shape, DTYPE)
    for head in tl.range(0, sharing, disable_licm=True):
        h = g * sharing + head
        taps = depthwise.taps + h.to(tl.int64) * D * W
        factor = widen(tl.load(depthwise.scale + h), DTYPE) if FLAGS.HAS_CONV_SCALE else 1.0
        for c in tl.range(0, left + 1 if FLAGS.CAUSAL else W):
            i_first = first - c + left
            i = i_first + tl.arange(0, total.shape[0])
            rows = (i >= owner.other_begin) & (i < owner.other_end)
            dy = load_tile(head_at(grad, b, h), i_first, d, rows, D, False)
            tap = widen(tl.load(taps + d * W + c, mask=d < D, other=0.0), DTYPE) * factor
            found += tap[None, :] * widen(dy, DTYPE)
    return total + found


@triton.jit(do_not_specialize=VARYING)
def sum_taps(
    grad, v, key_mask, boundaries, tap_sums, grad_sums,
    T, S, B, H, sharing, left, right, slots, groups, sequences, search_steps, mask_batch, mask_time,
    D: tl.constexpr, CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, PACKED: tl.constexpr, NEED_TAPS: tl.constexpr,
    DTYPE: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    """For each head, and TAPS taps of BD channels: tap_sums[h, group, D, W], the products of the output's gradient with
    the values that a tap reads, and grad_sums[h, group, D], that gradient, over every ``groups``-th tile of queries."""
    pid = tl.program_id(0)
    group, h, first_channel = pid % groups, pid // groups % H, pid // groups // H * BD
    first_tap = tl.program_id(1) * TAPS
    W = left + right + 1
    last_tap = tl.minimum(first_tap + TAPS, left + 1 if CAUSAL else W)
    d, tap = first_channel + tl.arange(0, BD), first_tap + tl.arange(0, TAPS)
    sums, taps = tl.zeros([BD], DTYPE), tl.zeros([BD, TAPS], DTYPE)
    for item in tl.range(group, B * slots, groups):
        slot, b = item % slots, item // slots
        owner = sequence_tile(slot, T, S, boundaries.queries, boundaries.keys, sequences, search_steps, PACKED, BM)
        i = owner.first + tl.arange(0, BM)
        rows = (i >= owner.begin) & (i < owner.end)
        dy = widen(load_tile(head_at(grad, b, h), owner.first, d, rows, D, False), DTYPE)  # [BM, BD]
        sums += tl.sum(dy, 0)
        if NEED_TAPS:
            v_at, mask = head_at(v, b, h // sharing), Mask(key_mask + b.to(tl.int64) * mask_batch, mask_time)
            for c in tl.range(first_tap, last_tap):
                j_first = owner.first + owner.other_end - owner.end + c - left
                j = j_first + tl.arange(0, BM)
                keep = rows & real_keys(mask, j, owner.other_begin, owner.other_end, HAS_MASK)
                value = widen(load_tile(v_at, j_first, d, keep, D, False), DTYPE)
                taps += tl.where(tap == c, 1.0, 0.0).to(DTYPE)[None, :] * tl.sum(dy * value, 0)[:, None]
    row = (h.to(tl.int64) * groups + group) * D + d
    tl.store(grad_sums + row, sums, mask=d < tl.where(first_tap == 0, D, 0))
    if NEED_TAPS:
        tl.store(tap_sums + row[:, None] * W + tap[None, :], taps, mask=(d < D)[:, None] & (tap < W)[None, :])


@triton.jit(do_not_specialize=VARYING)
def finish_taps(
    tap_sums, grad_sums, depthwise, gradients, left, right, groups,
    D: tl.constexpr, HAS_CONV_BIAS: tl.constexpr, HAS_CONV_SCALE: tl.constexpr, NEED_TAPS: tl.constexpr,
    NEED_BIAS: tl.constexpr, NEED_SCALE: tl.constexpr, DTYPE: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """Gradients of value_conv, value_conv_bias and value_conv_scale of one head from the sums of its groups."""
    h = tl.program_id(0).to(tl.int64)
    size = D * (left + right + 1)
    factor = widen(tl.load(depthwise.scale + h), DTYPE) if HAS_CONV_SCALE else 1.0
    # Each gradient, but for the factor, is a sum; the factor's own is their product with what it multiplies.
    scale = tl.zeros([BE], DTYPE)
    if NEED_TAPS or NEED_SCALE:
        for first in tl.range(0, size, BE):
            e = first + tl.arange(0, BE)
            total = tl.zeros([BE], DTYPE)
            for group in tl.range(0, groups):
                total += tl.load(tap_sums + (h * groups + group) * size + e, mask=e < size, other=0.0)
            scale += total * widen(tl.load(depthwise.taps + h * size + e, mask=e < size, other=0.0), DTYPE)
            if NEED_TAPS:
                value = narrow(total * factor, gradients.taps.dtype.element_ty)
                tl.store(gradients.taps + h * size + e, value, mask=e < size)
    if NEED_BIAS or (NEED_SCALE and HAS_CONV_BIAS):
        for first in tl.range(0, D, BE):
            e = first + tl.arange(0, BE)
            total = tl.zeros([BE], DTYPE)
            for group in tl.range(0, groups):
                total += tl.load(grad_sums + (h * groups + group) * D + e, mask=e < D, other=0.0)
            if HAS_CONV_BIAS:
                scale += total * widen(tl.load(depthwise.bias + h * D + e, mask=e < D, other=0.0), DTYPE)
            if NEED_BIAS:
                value = narrow(total * factor, gradients.bias.dtype.element_ty)
                tl.store(gradients.bias + h * D + e, value, mask=e < D)
    if NEED_SCALE:
        one = h + tl.arange(0, 1)
        value = narrow(tl.sum(scale, 0) + tl.zeros([1], DTYPE), gradients.scale.dtype.element_ty)
        tl.store(gradients.scale + one, value)
