"""Sums of the tables' gradients: memory that one program alone reads and writes, added up in a fixed order.

Nothing is added atomically, so results are equal bit for bit, always.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..device import narrow, number_from_bits
from .tiles import VARYING, Columns, Heads, load_tile, matrix


class Block(NamedTuple):
    """A tile of rows: as loaded, the tensor, its first row, and which rows are kept."""

    rows: Any
    tensor: Heads
    first: Any
    keep: Any


@triton.jit
def add_to_columns(sums, row, columns, value, W, ROWS: tl.constexpr):
    """sums[row, column] += value for the rows of a table and the columns that are valid, each of them once."""
    at = sums + (row[:, None] * W + columns.index[None, :])
    inside = (row < ROWS)[:, None] & columns.valid[None, :]
    tl.debug_barrier()  # another thread of the program may have written them
    tl.store(at, tl.load(at, mask=inside, other=0.0) + value, mask=inside)


@triton.jit
def add_products(sums, block, weights, columns, W, ROWS: tl.constexpr, PIECE: tl.constexpr):
    """The same for the product of the transposed block with ``weights``, [rows of the block, columns]; PIECE rows of
    the table at a time, since those of wide ones do not all fit into registers."""
    DTYPE: tl.constexpr = sums.dtype.element_ty
    x = block.rows
    if PIECE >= x.shape[1]:
        found = matrix(tl.trans(x), weights, tl.zeros([x.shape[1], weights.shape[1]], DTYPE))
        add_to_columns(sums, tl.arange(0, x.shape[1]), columns, found, W, ROWS)
    else:
        for first_row in tl.range(0, x.shape[1], PIECE, disable_licm=True):
            row = first_row + tl.arange(0, PIECE)
            piece = load_tile(block.tensor, block.first, row, block.keep, ROWS, False)
            found = matrix(tl.trans(piece), weights, tl.zeros([PIECE, weights.shape[1]], DTYPE))
            add_to_columns(sums, row, columns, found, W, ROWS)


@triton.jit
def add_to_bias(sums, index, value, valid):
    """The same for a single row."""
    tl.debug_barrier()
    tl.store(sums + index, tl.load(sums + index, mask=valid, other=0.0) + value, mask=valid)


@triton.jit
def add_to_edge(sums, row, column, value, W, ROWS: tl.constexpr):
    """The same for a single column."""
    at = sums + (row * W + column)
    tl.debug_barrier()
    tl.store(at, tl.load(at, mask=row < ROWS, other=0.0) + value, mask=row < ROWS)


@triton.jit
def with_edges(sums, before, after, W):
    """Sums of the columns of a whole table, with what belongs to the outermost ones from beyond the window."""
    a = tl.arange(0, sums.shape[1])[None, :]
    return sums + tl.where(a == 0, before[:, None], 0.0) + tl.where(a == W - 1, after[:, None], 0.0)


@triton.jit
def mirrored(columns, W):
    """Columns as keys count them."""
    return Columns(columns.base, W - 1 - columns.index, columns.valid)


@triton.jit(do_not_specialize=[*VARYING, "size"])
def sum_partials(
    partials, result, rows, size, scale, DTYPE: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """result[n, e] = scale times the sum over rows of partials[n, row, e], in fixed order."""
    pieces = tl.cdiv(size, BC)
    pid = tl.program_id(0)
    e, n = pid % pieces * BC + tl.arange(0, BC), (pid // pieces).to(tl.int64)
    total = tl.zeros([BR, BC], DTYPE)
    for first in tl.range(0, rows, BR):
        row = first + tl.arange(0, BR)
        at = partials + (n * rows + row.to(tl.int64))[:, None] * size + e[None, :]
        total += tl.load(at, mask=(row < rows)[:, None] & (e < size)[None, :], other=0.0)
    total = tl.sum(total, 0) * number_from_bits(scale, DTYPE)
    tl.store(result + n * size + e, narrow(total, result.dtype.element_ty), mask=e < size)
