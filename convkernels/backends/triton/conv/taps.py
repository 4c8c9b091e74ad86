"""What the convolution kernels share: the index relation, finding sequences, tensors' rows, filters.

Shapes: a *column* is [rows, 1] (one value per position), a *row* is [1, channels]; they broadcast. Offsets are 64 bits
wide, positions 32. A record of a tensor holds a pointer and strides; functions whose names end in ``_at`` return it
with pointers to the elements of a tile, to which each load adds the positions.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..device import keeps, narrow, number_from_bits, sequence_bounds, widen


class Rows(NamedTuple):
    """A tensor [batch, time, channels]."""

    data: Any
    batch: Any
    time: Any
    channel: Any


class Filters(NamedTuple):
    """The weight; strides of 0 where it has no such dimension."""

    data: Any
    batch: Any
    time: Any
    head: Any
    tap: Any


class Dropout(NamedTuple):
    """Of filters. threshold, scale: integers with the bits of numbers."""

    seed: Any
    threshold: Any
    scale: Any


class Sizes(NamedTuple):
    """T positions, C channels, H heads of R channels."""

    T: Any
    C: Any
    H: Any
    R: Any


class Relation(NamedTuple):
    """Tap j of output t reads input t + dilation * j - left."""

    left: Any
    dilation: Any


class Sequences(NamedTuple):
    """Boundaries of packed sequences, how many, and the steps in which bisection finds one."""

    data: Any
    count: Any
    steps: Any


class Sequence(NamedTuple):
    """Number, begin and end of the sequence of each position."""

    number: Any
    begin: Any
    end: Any


class Place(NamedTuple):
    """Batch rows, positions and heads of filters."""

    b: Any
    t: Any
    h: Any


class Statistics(NamedTuple):
    """Of the softmax over taps: the largest logit, and the reciprocal sum of exponentials."""

    largest: Any
    inverse: Any


class FilterFlags(NamedTuple):
    """PER_BATCH, PER_TIME: whether the weight has these dimensions."""

    K: int
    SOFTMAX: bool
    RENORMALIZE: bool
    DROPOUT: bool
    PER_BATCH: bool
    PER_TIME: bool
    HAS_STATE: bool


class Needs(NamedTuple):
    """Which gradients are wanted."""

    X: bool
    GATE: bool
    FILTER: bool
    BIAS: bool
    STATE: bool


@triton.jit
def source(t, j, relation):
    """The input position that tap j of output t reads."""
    return t + relation.dilation * j - relation.left


@triton.jit
def target(s, j, relation):
    """The output position whose tap j reads input s."""
    return s - relation.dilation * j + relation.left


@triton.jit
def sequence_of(t, T, sequences, PACKED: tl.constexpr):
    """The sequence of each position: the last one that begins at or before it. Read on the device, by bisection;
    positions outside the row are taken for its first or last."""
    number = tl.zeros_like(t)
    if PACKED:
        inside = tl.minimum(tl.maximum(t, 0), T - 1)
        above = number + sequences.count
        for _ in range(sequences.steps):
            middle = (number + above) // 2
            right = tl.load(sequences.data + middle).to(tl.int32) <= inside
            # An interval of one is already decided; its middle is its lower end.
            number = tl.where(right, middle, number)
            above = tl.where(right, above, middle)
        begin, end = sequence_bounds(number, T, sequences.data)
    else:
        begin = tl.zeros_like(t)
        end = begin + T
    return Sequence(number, begin, end)


@triton.jit
def columns_at(x, b, c):
    """x from x[b, 0, c] on."""
    data = x.data + b.to(tl.int64) * x.batch + c.to(tl.int64) * x.channel
    return Rows(data, x.batch, x.time, x.channel)


@triton.jit
def states_at(state, b, c, sequence, count, C, span):
    """Rows of the state such that position s of the sequence is row s: those before its begin."""
    row = (b.to(tl.int64) * count + sequence.number) * span + (span - sequence.begin)
    return Rows(state + row * C + c, 0, C, 1)


@triton.jit
def rows_from(x, s):
    """x from x[s] on."""
    return Rows(x.data + tl.cast(s, tl.int64) * x.time, x.batch, x.time, x.channel)


@triton.jit
def load_row(x, keep, DTYPE: tl.constexpr):
    """The first row of x in the accumulation type; 0 where not ``keep``."""
    return widen(tl.load(x.data, mask=keep, other=0.0), DTYPE)


@triton.jit
def load_rows(x, s, keep, DTYPE: tl.constexpr):
    """x[s] in the accumulation type; 0 where not ``keep``."""
    return load_row(rows_from(x, s), keep, DTYPE)


@triton.jit
def store_row(x, value, keep):
    """The first row of x = value where ``keep``."""
    tl.store(x.data, narrow(value, x.data.dtype.element_ty), mask=keep)


@triton.jit
def store_rows(x, s, value, keep):
    """x[s] = value where ``keep``."""
    store_row(rows_from(x, s), value, keep)


@triton.jit
def filters_at(weight, place, FILTER: tl.constexpr):
    """``weight`` from tap 0 of the filters at ``place`` on."""
    at = weight.data + place.h.to(tl.int64) * weight.head
    if FILTER.PER_BATCH:
        at += place.b.to(tl.int64) * weight.batch
    if FILTER.PER_TIME:
        at = at + place.t.to(tl.int64) * weight.time
    return Filters(at, weight.batch, weight.time, weight.head, weight.tap)


@triton.jit
def tap_exists(t, j, sequence, relation, HAS_STATE: tl.constexpr):
    """Whether the row that tap j of output t reads exists; rows of the state do."""
    s = source(t, j, relation)
    return (s < sequence.end) if HAS_STATE else (s >= sequence.begin) & (s < sequence.end)


@triton.jit
def kept(dropout, place, j, FILTER: tl.constexpr):
    """Which elements of the weight dropout keeps: Philox4x32-10 of the coordinates, word j % 4 of block j // 4. A
    weight that serves all batch rows or positions has one mask for them."""
    b = place.b if FILTER.PER_BATCH else place.b * 0
    t = place.t if FILTER.PER_TIME else place.t * 0
    zero = t * 0 + place.h * 0 + j * 0
    seed = tl.load(dropout.seed)
    word0, word1, word2, word3 = tl.philox(seed, zero + t, zero + b, zero + place.h, zero + j // 4)
    which = zero + j % 4
    word = tl.where(which < 2, tl.where(which == 0, word0, word1), tl.where(which == 2, word2, word3))
    return keeps(word, dropout.threshold)


@triton.jit
def filter_rows(
    weight, place, j, rows, sequence, relation, dropout, FILTER: tl.constexpr, DTYPE: tl.constexpr
):  # fmt: skip
    """Whole filters, taps side by side (j a row): w' after softmax and dropout, p after softmax, and the multiplier of
    dropout, each [filters, taps]. ``rows`` (a column): positions that exist; the others have filters of 0."""
    taps = rows & (j < FILTER.K)
    # Triton 3.4 does not broadcast pointers to the shape of a mask.
    at = weight.data + j.to(tl.int64) * weight.tap + rows.to(tl.int64) * 0
    w = widen(tl.load(at, mask=taps, other=0.0), DTYPE)
    if FILTER.SOFTMAX:
        real = taps
        if FILTER.RENORMALIZE:
            real = taps & tap_exists(place.t, j, sequence, relation, FILTER.HAS_STATE)
        largest = tl.max(tl.where(real, w, float("-inf")), 1)[:, None]
        power = tl.where(real, tl.exp(w - largest), 0.0)
        total = tl.sum(power, 1)[:, None]
        if FILTER.RENORMALIZE:
            total = tl.where(total == 0.0, 1.0, total)  # no tap exists
        w = power / tl.where(rows, total, 1.0)
    p = w
    factor = tl.where(taps, 1.0, 0.0).to(DTYPE)
    if FILTER.DROPOUT:
        kept_taps = taps & kept(dropout, place, j, FILTER)
        factor = tl.where(kept_taps, number_from_bits(dropout.scale, DTYPE), 0.0)
        w = tl.where(taps, w * factor, 0.0)
    return w, p, factor


@triton.jit
def filter_statistics(weight, t, exists, sequence, relation, FILTER: tl.constexpr, DTYPE: tl.constexpr):
    """The statistics of the filters that exist (``exists`` has one entry per filter), tap by tap; (0, 1) without
    softmax."""
    largest, inverse = tl.zeros(exists.shape, DTYPE), tl.full(exists.shape, 1.0, DTYPE)
    if FILTER.SOFTMAX:
        largest = tl.full(exists.shape, float("-inf"), DTYPE)
        total = tl.zeros(exists.shape, DTYPE)
        for j in tl.range(0, FILTER.K):
            real = exists
            if FILTER.RENORMALIZE:
                real = real & tap_exists(t, j, sequence, relation, FILTER.HAS_STATE)
            logit = widen(tl.load(weight.data + j * weight.tap, mask=exists, other=0.0), DTYPE)
            largest = tl.maximum(largest, tl.where(real, logit, float("-inf")))
        for j in tl.range(0, FILTER.K):
            real = exists
            if FILTER.RENORMALIZE:
                real = real & tap_exists(t, j, sequence, relation, FILTER.HAS_STATE)
            logit = widen(tl.load(weight.data + j * weight.tap, mask=exists, other=0.0), DTYPE)
            total += tl.where(real, tl.exp(logit - largest), 0.0)
        inverse = 1.0 / tl.where(total == 0.0, 1.0, total)  # no tap exists
    return Statistics(largest, inverse)


@triton.jit
def filter_tap(
    weight, place, j, exists, statistics, sequence, relation, dropout, FILTER: tl.constexpr, DTYPE: tl.constexpr
):
    """Tap j of the filters at ``place``: w' after softmax and dropout, p after softmax, and the multiplier of dropout,
    each of the shape of ``exists``."""
    w = widen(tl.load(weight.data + j * weight.tap, mask=exists, other=0.0), DTYPE)
    if FILTER.SOFTMAX:
        w = tl.exp(w - statistics.largest) * statistics.inverse
        if FILTER.RENORMALIZE:
            w = tl.where(tap_exists(place.t, j, sequence, relation, FILTER.HAS_STATE), w, 0.0)
    p = w
    factor = tl.full(exists.shape, 1.0, DTYPE)
    if FILTER.DROPOUT:
        factor = tl.where(kept(dropout, place, j, FILTER), number_from_bits(dropout.scale, DTYPE), 0.0)
        w *= factor
    return w, p, factor
