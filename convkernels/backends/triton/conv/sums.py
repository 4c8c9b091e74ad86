"""Sums of partial sums, in a fixed order.

Programs of the backward kernels leave partial sums in memory; these kernels add them up and carry them through the
softmax. Nothing is added atomically, so results are equal bit for bit, always.
"""

import triton
import triton.language as tl

from ..device import narrow
from .taps import Place, columns_at, filter_rows, filters_at, load_rows


@triton.jit
def reduce_filters(
    filters, weight, grad_weight, dropout, groups, H, pieces,
    FILTER: tl.constexpr, FINISHED: tl.constexpr, DTYPE: tl.constexpr, BR: tl.constexpr, KP: tl.constexpr,
):  # fmt: skip
    """grad_weight[owner, h] from partial sums [owner, group, h, piece, K]: their sum in fixed order, then dropout and
    softmax unless the rows have been through these already (FINISHED)."""
    K: tl.constexpr = FILTER.K
    pid = tl.program_id(0)
    h, owner = pid % H, pid // H
    j = tl.arange(0, KP)[None, :]
    total = tl.zeros([BR, KP], DTYPE)
    for first in tl.range(0, groups * pieces, BR):
        row = first + tl.arange(0, BR)[:, None]
        at = ((owner.to(tl.int64) * groups + row // pieces) * H + h) * pieces + row % pieces
        total += tl.load(filters + at * K + j, mask=(row < groups * pieces) & (j < K), other=0.0)
    d = tl.sum(total, 0)[None, :]  # [1, KP]
    if not FINISHED:
        place = Place(owner, owner, h)
        at = filters_at(weight, place, FILTER)
        w, p, factor = filter_rows(at, place, j, j >= 0, None, None, dropout, FILTER, DTYPE)
        d *= factor
        if FILTER.SOFTMAX:
            d = p * (d - tl.sum(p * d, 1)[:, None])
    at = grad_weight + (owner.to(tl.int64) * H + h) * K + j
    tl.store(at, narrow(d, grad_weight.dtype.element_ty), mask=j < K)


@triton.jit
def reduce_bias(
    biases, grad_bias, rows, C, DTYPE: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """grad_bias[c] = the sum of the rows of partial sums [rows, C] in fixed order."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)[None, :]
    total = tl.zeros([BR, BC], DTYPE)
    for first in tl.range(0, rows, BR):
        row = first + tl.arange(0, BR)[:, None]
        total += tl.load(biases + row.to(tl.int64) * C + c, mask=(row < rows) & (c < C), other=0.0)
    tl.store(grad_bias + c, narrow(tl.sum(total, 0)[None, :], grad_bias.dtype.element_ty), mask=c < C)


@triton.jit
def sum_rows(
    grad, biases, T, C, row_blocks, c_blocks, groups, DTYPE: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Partial sums over positions of d(y), where no tap reads its own position and ``grad_tile`` cannot add them up."""
    pid = tl.program_id(0)
    c = (pid % c_blocks) * BC + tl.arange(0, BC)[None, :]
    group = pid // c_blocks
    total = tl.zeros([BT, BC], DTYPE)
    for block in tl.range(group, row_blocks, groups):
        row_tiles = tl.cdiv(T, BT)
        t = (block % row_tiles) * BT + tl.arange(0, BT)[:, None]
        total += load_rows(columns_at(grad, block // row_tiles, c), t, (t < T) & (c < C), DTYPE)
    tl.store(biases + group.to(tl.int64) * C + c, tl.sum(total, 0)[None, :], mask=c < C)
