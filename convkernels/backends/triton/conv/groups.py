"""Tiles whose threads own neighbouring positions: a row that a thread loads serves all taps that meet it.

A tile is [groups, vectors, channels of a vector]; a thread has one vector of a group's ROWS positions, each in a tile
of its own: tuples hold them. What the channels of a vector have in common is [groups, vectors, 1], so that each thread
finds it for itself.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..device import number_from_bits, widen
from .inputs import inputs_from, load_input_row
from .taps import Place, Statistics, filter_statistics, filter_tap, filters_at, kept, source, tap_exists


class Bank(NamedTuple):
    """The filters of a group of positions. weight: the tensor, or its elements at ``place``; place: of the first
    position; exists, columns: filters and channels that do."""

    weight: Any
    place: Any
    exists: Any
    columns: Any
    sequence: Any
    sizes: Any
    relation: Any
    dropout: Any


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
def filters_of_row(bank, i: tl.constexpr, FILTER: tl.constexpr):
    """Those of position i of a group; of filters that all positions share the only ones."""
    exists = bank.exists
    if FILTER.PER_TIME or FILTER.RENORMALIZE:
        t = bank.place.t + i * bank.relation.dilation
        exists = exists & (t < bank.sizes.T)
    else:
        t = bank.place.h * 0
    place = Place(bank.place.b, t, bank.place.h)
    weight = filters_at(bank.weight, place, FILTER)
    return Bank(weight, place, exists, bank.columns, bank.sequence, bank.sizes, bank.relation, bank.dropout)


@triton.jit
def load_taps(bank, FILTER: tl.constexpr, DTYPE: tl.constexpr):
    """The weight of every tap of one position, as it is: a tuple of tiles of the shape of ``exists``."""
    taps = ()
    for j in tl.static_range(FILTER.K):
        at = bank.weight.data + j * bank.weight.tap
        taps = taps + (widen(tl.load(at, mask=bank.exists, other=0.0), DTYPE),)
    return taps


@triton.jit
def soft_taps(taps, bank, FILTER: tl.constexpr, DTYPE: tl.constexpr):
    """``taps``, those of ``load_taps``, after softmax."""
    K: tl.constexpr = FILTER.K
    exists, t = bank.exists, bank.place.t
    if FILTER.SOFTMAX:
        logits, taps = taps, ()
        largest = tl.full(exists.shape, float("-inf"), DTYPE)
        for j in tl.static_range(K):
            logit = logits[j]
            if FILTER.RENORMALIZE:
                real = exists & tap_exists(t, j, bank.sequence, bank.relation, FILTER.HAS_STATE)
                logit = tl.where(real, logit, float("-inf"))
            largest = tl.maximum(largest, logit)
        total = tl.zeros(exists.shape, DTYPE)
        for j in tl.static_range(K):
            power = tl.exp(logits[j] - largest)
            if FILTER.RENORMALIZE:
                real = exists & tap_exists(t, j, bank.sequence, bank.relation, FILTER.HAS_STATE)
                power = tl.where(real, power, 0.0)
            taps = taps + (power,)
            total += power
        if FILTER.RENORMALIZE:
            total = tl.where(total == 0.0, 1.0, total)  # no tap exists
        inverse = 1.0 / total
        powers, taps = taps, ()
        for j in tl.static_range(K):
            taps = taps + (powers[j] * inverse,)
    return taps


@triton.jit
def dropout_factors(bank, FILTER: tl.constexpr, DTYPE: tl.constexpr):
    """By what dropout multiplies each tap of one position, if there is dropout."""
    factors = ()
    if FILTER.DROPOUT:
        for j in tl.static_range(FILTER.K):
            keep = kept(bank.dropout, bank.place, j, FILTER)
            factors = factors + (tl.where(keep, number_from_bits(bank.dropout.scale, DTYPE), 0.0),)
    return factors


@triton.jit
def whole_filters(bank, FILTER: tl.constexpr, DTYPE: tl.constexpr):
    """w' of every tap of one position, after softmax and dropout."""
    taps = soft_taps(load_taps(bank, FILTER, DTYPE), bank, FILTER, DTYPE)
    if FILTER.DROPOUT:
        factors, all_taps, taps = dropout_factors(bank, FILTER, DTYPE), taps, ()
        for j in tl.static_range(FILTER.K):
            taps = taps + (all_taps[j] * factors[j],)
    return taps


@triton.jit
def some_taps(bank, statistics, first, FILTER: tl.constexpr, DTYPE: tl.constexpr, TAPS: tl.constexpr):
    """w' of TAPS taps from ``first`` on, of one position. All taps at once are read once, and need no statistics."""
    if TAPS == FILTER.K:
        taps = whole_filters(bank, FILTER, DTYPE)
    else:
        taps = ()
        for n in tl.static_range(TAPS):
            w, p, factor = filter_tap(
                bank.weight, bank.place, first + n, bank.exists, statistics, bank.sequence, bank.relation, bank.dropout,
                FILTER, DTYPE,
            )  # fmt: skip
            taps = taps + (w,)
    return taps


@triton.jit
def statistics_of_rows(bank, FILTER: tl.constexpr, DTYPE: tl.constexpr, ROWS: tl.constexpr, TAPS: tl.constexpr):
    """A tuple, one entry a position, as far as ``some_taps`` needs them."""
    found = ()
    none = tl.zeros([1, 1, 1], DTYPE)
    one = Statistics(none, none)
    for i in tl.static_range(ROWS):
        if TAPS < FILTER.K and (i == 0 or FILTER.PER_TIME or FILTER.RENORMALIZE):
            own = filters_of_row(bank, i, FILTER)
            one = filter_statistics(own.weight, own.place.t, own.exists, own.sequence, own.relation, FILTER, DTYPE)
        found = found + (one,)
    return found


@triton.jit
def add_taps(
    totals, z, bank, statistics, first,
    FILTER: tl.constexpr, INPUT: tl.constexpr, DTYPE: tl.constexpr, ROWS: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    """``totals`` and what TAPS taps from ``first`` on add to them."""
    filters = ()
    for i in tl.static_range(ROWS):
        if i == 0 or FILTER.PER_TIME or FILTER.RENORMALIZE:
            w = some_taps(filters_of_row(bank, i, FILTER), statistics[i], first, FILTER, DTYPE, TAPS)
        filters = filters + (w,)
    # Row by row of the input, so that few of them have to be in registers.
    dilation = bank.relation.dilation
    s, span = source(bank.place.t, first, bank.relation), (FILTER.K - 1) * dilation
    z = inputs_from(z, s)
    for n in tl.static_range(ROWS + TAPS - 1):
        here = inputs_from(z, n * dilation)
        row = load_input_row(here, s + n * dilation, bank.columns, bank.sequence, span, INPUT, DTYPE)
        for i in tl.static_range(ROWS):
            if i <= n and n < i + TAPS:
                totals = replace(totals, i, totals[i] + filters[i][n - i] * row)
    return totals
