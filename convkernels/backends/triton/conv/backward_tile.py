"""The backward kernels that sum filters tap by tap; they serve every problem.

``grad_tile`` reads x and d(y) once and writes all gradients, except those of filters that differ by position:
``grad_filter_rows`` finds these. Sums over positions stay in the program's registers while it walks its tiles.
"""

import triton
import triton.language as tl

from ..device import narrow, sequence_bounds
from .taps import (
    Place,
    Sequence,
    Statistics,
    columns_at,
    filter_statistics,
    filter_tap,
    filters_at,
    gradients_at,
    inputs_at,
    load_input,
    load_rows,
    sequence_of,
    source,
    states_at,
    store_input_gradient,
    target,
    unmasked,
)


@triton.jit
def filter_sums(
    statistics, weight, sizes, relation, sequences, h_blocks,
    FILTER: tl.constexpr, PACKED: tl.constexpr, DTYPE: tl.constexpr, BT: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """statistics[b, t, h] = (maximum, reciprocal sum) of the softmax over the taps, where filters differ by position
    and ``grad_tile`` needs those of other positions."""
    T, H = sizes.T, sizes.H
    pid = tl.program_id(0)
    t_blocks = tl.cdiv(T, BT)
    block, b = (pid // h_blocks) % t_blocks, pid // h_blocks // t_blocks
    t = block * BT + tl.arange(0, BT)[:, None]
    h = (pid % h_blocks) * BH + tl.arange(0, BH)[None, :]
    inside = (t < T) & (h < H)  # [BT, BH]
    sequence = sequence_of(t, T, sequences, PACKED)
    filters = filters_at(weight, Place(b, t, h), FILTER)
    found = filter_statistics(filters, t, inside, sequence, relation, FILTER, DTYPE)
    at = statistics + ((b.to(tl.int64) * T + t) * H + h) * 2
    tl.store(at, found.largest, mask=inside)
    tl.store(at + 1, found.inverse, mask=inside)


@triton.jit
def grad_tile(
    grad, inputs, weight, statistics, gradients, grad_state, filters, biases, sizes, relation, sequences, dropout,
    t_blocks, c_blocks, groups,
    FILTER: tl.constexpr, INPUT: tl.constexpr, NEED: tl.constexpr, OF_STATE: tl.constexpr, DTYPE: tl.constexpr,
    BT: tl.constexpr, BC: tl.constexpr, KP: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """d(z) as the sum of shifted tiles of d(y), and with the same tiles the sums over positions for filters that all
    positions share, and for the bias. A program walks the tiles group, group + groups, ... of its channels; taps beyond
    KP are left to further programs along axis 1, which compute only their filter sums. OF_STATE: the rows are those of
    the initial state, which lie before the begin of each sequence."""
    K: tl.constexpr = FILTER.K
    PER_ROW: tl.constexpr = FILTER.PER_TIME or FILTER.RENORMALIZE
    T, C, H = sizes.T, sizes.C, sizes.H
    pid = tl.program_id(0)
    first_tap = tl.program_id(1) * KP
    cb, group, owner = pid % c_blocks, (pid // c_blocks) % groups, pid // c_blocks // groups
    c = cb * BC + tl.arange(0, BC)[None, :]
    h, columns = c // sizes.R, c < C
    span = (K - 1) * relation.dilation
    k = tl.arange(0, KP)[:, None]
    filter_sum = tl.zeros([KP, BC], DTYPE)
    bias_sum = tl.zeros([1, BC], DTYPE)
    zero = tl.zeros([1, 1], tl.int32)
    if not PER_ROW:
        place = Place(owner, zero, h)
        filters_here = filters_at(weight, place, FILTER)
        nowhere = Sequence(zero, zero, zero)
        shared = filter_statistics(filters_here, zero, columns, nowhere, relation, FILTER, DTYPE)
    for tile in tl.range(group, t_blocks, groups):
        # Filters of a batch row of their own: `owner` is that row. Otherwise it is 0, and the tiles are those of all.
        row_tiles = tl.cdiv(span if OF_STATE else T, BT)
        b = owner + tile // row_tiles
        r = (tile % row_tiles) * BT + tl.arange(0, BT)[:, None]
        if OF_STATE:
            number = (tile // row_tiles) % sequences.count
            dstate = grad_state + ((owner * sequences.count + tile // row_tiles).to(tl.int64) * span + r) * C + c
            b = owner + tile // row_tiles // sequences.count
            number += r * 0
            begin, end = r * 0, r * 0 + T
            if INPUT.PACKED:
                begin, end = sequence_bounds(number, T, sequences.data)
            sequence = Sequence(number, begin, end)
            s = begin - span + r
            inside = (r < span) & columns
        else:
            s = r
            sequence = sequence_of(s, T, sequences, INPUT.PACKED)
            inside = (s < T) & columns
        z_at = inputs_at(inputs, b, c, inputs.state)
        wanted = unmasked(z_at.mask, s, inside & (s >= sequence.begin), INPUT.HAS_MASK)
        dy_at = columns_at(grad, b, c)
        if NEED.FILTER:
            z = load_rows(z_at.x, s, wanted, DTYPE)  # [BT, BC]
            if INPUT.HAS_GATE:
                z *= tl.sigmoid(load_rows(z_at.gate, s, wanted, DTYPE))
        dz = tl.zeros([BT, BC], DTYPE)
        # Constant bounds where there are no further programs: they save registers.
        start = 0 if KP >= K else first_tap
        stop = K if KP >= K else tl.where(first_tap == 0, K, tl.minimum(first_tap + KP, K))
        for j in tl.range(start, stop, loop_unroll_factor=UNROLL):
            t = target(s, j, relation)
            reached = inside & (t >= sequence.begin) & (t < sequence.end)
            dy = load_rows(dy_at, t, reached, DTYPE)  # [BT, BC]
            if PER_ROW:
                largest, inverse = dy, dy  # without softmax not looked at
                if FILTER.SOFTMAX:
                    at = statistics + ((b.to(tl.int64) * T + t) * H + h) * 2
                    largest = tl.load(at, mask=reached, other=0.0)
                    inverse = tl.load(at + 1, mask=reached, other=0.0)
                there = Place(b, t, h)
                w, p, factor = filter_tap(
                    filters_at(weight, there, FILTER), there, j, reached, Statistics(largest, inverse), sequence,
                    relation, dropout, FILTER, DTYPE,
                )  # fmt: skip
                dz += tl.where(reached, w * dy, 0.0)
            else:
                w, p, factor = filter_tap(
                    filters_here, place, j, columns, shared, sequence, relation, dropout, FILTER, DTYPE
                )
                dz += w * dy
            if NEED.FILTER:
                filter_sum += tl.where(k == j - first_tap, tl.sum(dy * z, 0)[None, :], 0.0)
            if NEED.BIAS:
                # The tap that reads its own position meets every d(y) once.
                bias_sum += tl.where(j * relation.dilation == relation.left, tl.sum(dy, 0)[None, :], 0.0)
        if OF_STATE:
            tl.store(dstate, narrow(dz, grad_state.dtype.element_ty), mask=inside)
        elif first_tap == 0:
            outputs = gradients_at(gradients, b, c)
            store_input_gradient(dz, z_at, outputs, s, inside, wanted, INPUT, NEED, DTYPE)
    partial = owner.to(tl.int64) * groups + group
    if NEED.FILTER:
        taps = first_tap + k
        tl.store(filters + (partial * C + c) * K + taps, filter_sum, mask=columns & (taps < K))
    if NEED.BIAS and first_tap == 0:
        tl.store(biases + partial * C + c, bias_sum, mask=columns)


@triton.jit
def grad_filter_rows(
    grad, inputs, weight, grad_weight, filters, sizes, relation, sequences, dropout, t_blocks, h_blocks, r_blocks,
    FILTER: tl.constexpr, INPUT: tl.constexpr, DTYPE: tl.constexpr,
    BT: tl.constexpr, BH: tl.constexpr, RP: tl.constexpr,
):  # fmt: skip
    """d(filters) position by position, through the softmax: to grad_weight, or summed over the tile for filters that
    all positions share."""
    K: tl.constexpr = FILTER.K
    T, H, R = sizes.T, sizes.H, sizes.R
    pid = tl.program_id(0)
    block, b = (pid // h_blocks) % t_blocks, pid // h_blocks // t_blocks
    t = block * BT + tl.arange(0, BT)[:, None]
    heads = (pid % h_blocks) * BH + tl.arange(0, BH)[None, :]
    h = (pid % h_blocks) * BH + tl.arange(0, BH * RP)[None, :] // RP  # each head RP times
    inside, exists = (t < T) & (h < H), (t < T) & (heads < H)
    sequence = sequence_of(t, T, sequences, INPUT.PACKED)
    span = (K - 1) * relation.dilation
    place = Place(b, t, heads)
    filters_here = filters_at(weight, place, FILTER)
    statistics = filter_statistics(filters_here, t, exists, sequence, relation, FILTER, DTYPE)
    mean = tl.zeros([BT, BH], DTYPE)
    for final in tl.static_range(0 if FILTER.SOFTMAX else 1, 2):
        # With softmax the first round finds sum_j p_j d_j, the second computes the products d_j again.
        for j in tl.range(0, K):
            d = tl.zeros([BT, BH], DTYPE)
            for r_block in tl.range(0, r_blocks):
                r = r_block * RP + tl.arange(0, BH * RP)[None, :] % RP
                c, here = h * R + r, inside & (r < R)
                dy = load_rows(columns_at(grad, b, c), t, here, DTYPE)  # [BT, BH * RP]
                states = states_at(inputs.state, b, c, sequence, sequences.count, sizes.C, span)
                z_at = inputs_at(inputs, b, c, states)
                z = load_input(z_at, source(t, j, relation), here, sequence, span, INPUT, DTYPE)
                d += tl.sum(tl.reshape(dy * z, [BT, BH, RP]), 2)
            w, p, factor = filter_tap(
                filters_here, place, j, exists, statistics, sequence, relation, dropout, FILTER, DTYPE
            )
            d *= factor
            if final == 0:
                mean += p * d
            else:
                if FILTER.SOFTMAX:
                    d = p * (d - mean)
                if FILTER.PER_TIME:
                    at = grad_weight + ((b.to(tl.int64) * T + t) * H + heads) * K + j
                    tl.store(at, narrow(d, grad_weight.dtype.element_ty), mask=exists)
                else:
                    at = filters + ((b.to(tl.int64) * t_blocks + block) * H + heads) * K + j
                    tl.store(at, tl.sum(tl.where(exists, d, 0.0), 0)[None, :], mask=heads < H)
