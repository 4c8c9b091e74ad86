"""Tiles whose threads own neighbouring positions: a row that a thread loads serves all taps that meet it.

A tile is [groups, vectors, channels of a vector]; a thread has one vector of a group's ROWS positions, each in a tile
of its own: tuples hold them. What the channels of a vector have in common is [groups, vectors, 1], so that each thread
finds it for itself.
"""

import triton
import triton.language as tl

from ..device import number_from_bits, widen
from .taps import (
    Place,
    Statistics,
    filter_statistics,
    filter_tap,
    filters_at,
    inputs_from,
    kept,
    load_input_row,
    source,
    tap_exists,
)


@triton.jit
def zeros(shape: tl.constexpr, DTYPE: tl.constexpr, COUNT: tl.constexpr):
    tiles = ()
    for _ in tl.static_range(COUNT):
        tiles = tiles + (tl.zeros(shape, DTYPE),)
    return tiles


@triton.jit
def replace(tiles, n: tl.constexpr, tile):
    return tiles[:n] + (tile,) + tiles[n + 1 :]


@triton.jit
def first_positions(block, blocks, relation, BG: tl.constexpr, ROWS: tl.constexpr):
    """The first of each group's positions, [BG, 1, 1]. Those of a group lie ``dilation`` apart, so that they meet the
    same rows; groups of one position lie side by side."""
    step = relation.dilation if ROWS > 1 else 1
    blocks = blocks // step  # of a phase
    return block // blocks + step * ((block % blocks) * BG + tl.arange(0, BG)[:, None, None]) * ROWS


@triton.jit
def whole_filters(weight, place, exists, sequence, relation, dropout, FILTER: tl.constexpr, DTYPE: tl.constexpr):
    """w' of every tap, after softmax and dropout: a tuple of tiles of the shape of ``exists``."""
    K: tl.constexpr = FILTER.K
    taps = ()
    for j in tl.static_range(K):
        taps = taps + (widen(tl.load(weight.data + j * weight.tap, mask=exists, other=0.0), DTYPE),)
    if FILTER.SOFTMAX:
        logits, taps = taps, ()
        largest = tl.full(exists.shape, float("-inf"), DTYPE)
        for j in tl.static_range(K):
            real = exists
            if FILTER.RENORMALIZE:
                real = real & tap_exists(place.t, j, sequence, relation, FILTER.HAS_STATE)
            largest = tl.maximum(largest, tl.where(real, logits[j], float("-inf")))
        total = tl.zeros(exists.shape, DTYPE)
        for j in tl.static_range(K):
            power = tl.exp(logits[j] - largest)
            if FILTER.RENORMALIZE:
                real = exists & tap_exists(place.t, j, sequence, relation, FILTER.HAS_STATE)
                power = tl.where(real, power, 0.0)
            taps = taps + (power,)
            total += power
        inverse = 1.0 / tl.where(total == 0.0, 1.0, total)  # no tap exists
        powers, taps = taps, ()
        for j in tl.static_range(K):
            taps = taps + (powers[j] * inverse,)
    if FILTER.DROPOUT:
        all_taps, taps = taps, ()
        for j in tl.static_range(K):
            factor = tl.where(kept(dropout, place, j, FILTER), number_from_bits(dropout.scale, DTYPE), 0.0)
            taps = taps + (all_taps[j] * factor,)
    return taps


@triton.jit
def some_taps(
    weight, place, first, exists, statistics, sequence, relation, dropout,
    FILTER: tl.constexpr, DTYPE: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    """w' of TAPS taps from ``first`` on. All of a filter at once are read once, and need no statistics."""
    if TAPS == FILTER.K:
        taps = whole_filters(weight, place, exists, sequence, relation, dropout, FILTER, DTYPE)
    else:
        taps = ()
        for n in tl.static_range(TAPS):
            w, p, factor = filter_tap(
                weight, place, first + n, exists, statistics, sequence, relation, dropout, FILTER, DTYPE
            )
            taps = taps + (w,)
    return taps


@triton.jit
def add_taps(
    totals, z, weight, place, first, columns, exists, statistics, T, sequence, span, relation, dropout,
    FILTER: tl.constexpr, INPUT: tl.constexpr, DTYPE: tl.constexpr, ROWS: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    """``totals`` and what TAPS taps from ``first`` on add to them; place, statistics: of the filters of each row, or of
    all in one place."""
    filters = ()
    for i in tl.static_range(ROWS):
        if i == 0 or FILTER.PER_TIME or FILTER.RENORMALIZE:
            at, real = filter_place(place, exists, i, T, relation, FILTER)
            w = some_taps(
                filters_at(weight, at, FILTER), at, first, real, statistics[i], sequence, relation, dropout,
                FILTER, DTYPE, TAPS,
            )  # fmt: skip
        filters = filters + (w,)
    # Row by row of the input, so that few of them have to be in registers.
    s = source(place.t, first, relation)
    z = inputs_from(z, s)
    for n in tl.static_range(ROWS + TAPS - 1):
        here = inputs_from(z, n * relation.dilation)
        row = load_input_row(here, s + n * relation.dilation, columns, sequence, span, INPUT, DTYPE)
        for i in tl.static_range(ROWS):
            if i <= n and n < i + TAPS:
                totals = replace(totals, i, totals[i] + filters[i][n - i] * row)
    return totals


@triton.jit
def filter_place(place, exists, i: tl.constexpr, T, relation, FILTER: tl.constexpr):
    """Where the filters of row i are, and which exist: with one for all positions those of no row."""
    t = place.t * 0
    if FILTER.PER_TIME or FILTER.RENORMALIZE:
        t = place.t + i * relation.dilation
        exists = exists & (t < T)
    else:
        t = place.h * 0
    return Place(place.b, t, place.h), exists


@triton.jit
def statistics_of_rows(
    weight, place, exists, T, sequence, relation,
    FILTER: tl.constexpr, DTYPE: tl.constexpr, ROWS: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    """A tuple, one entry a row, as far as ``some_taps`` needs them."""
    found = ()
    none = tl.zeros([1, 1, 1], DTYPE)
    one = Statistics(none, none)
    for i in tl.static_range(ROWS):
        if TAPS < FILTER.K and (i == 0 or FILTER.PER_TIME or FILTER.RENORMALIZE):
            at, real = filter_place(place, exists, i, T, relation, FILTER)
            one = filter_statistics(filters_at(weight, at, FILTER), at.t, real, sequence, relation, FILTER, DTYPE)
        found = found + (one,)
    return found
