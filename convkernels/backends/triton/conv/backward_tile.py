"""The backward kernels that sum filters tap by tap; they serve every problem.

``grad_tile`` finds all gradients, except those of filters that differ by position: ``grad_filter_rows`` finds these.
Sums over positions stay in the program's registers while it walks its tiles.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..device import narrow, sequence_bounds
from .groups import Bank, filters_of_row, first_positions, replace, some_taps, whole_filters, zeros
from .inputs import (
    gradients_at,
    gradients_from,
    inputs_at,
    inputs_from,
    load_gated,
    load_input,
    store_input_gradient,
    unmasked,
)
from .taps import (
    Place,
    Sequence,
    Statistics,
    columns_at,
    filter_statistics,
    filter_tap,
    filters_at,
    load_row,
    load_rows,
    rows_from,
    sequence_of,
    source,
    states_at,
    target,
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


class Met(NamedTuple):
    """What taps meet: z of each position of a group; d(y); of filters that all positions share every tap, if all are
    taken at once, and their statistics, or where those of each position are."""

    z: Any
    grad: Any
    whole: Any
    statistics: Any


@triton.jit
def tap_of_output(bank, statistics, t, reached, j, FILTER: tl.constexpr, DTYPE: tl.constexpr):
    """w' of tap j of the filters of outputs t; statistics: where those of each position are."""
    b, h = bank.place.b, bank.place.h
    real, there = reached & bank.exists, Place(b, t, h)
    found = Statistics(t, t)  # without softmax not looked at
    if FILTER.SOFTMAX:
        at = statistics + ((b.to(tl.int64) * bank.sizes.T + t) * bank.sizes.H + h) * 2
        found = Statistics(tl.load(at, mask=real, other=0.0), tl.load(at + 1, mask=real, other=0.0))
    weight = filters_at(bank.weight, there, FILTER)
    w, p, factor = filter_tap(
        weight, there, j, real, found, bank.sequence, bank.relation, bank.dropout, FILTER, DTYPE
    )  # fmt: skip
    return tl.where(real, w, 0.0)


@triton.jit
def add_gradients(
    gradients, sums, met, bank, first,
    FILTER: tl.constexpr, NEED: tl.constexpr, DTYPE: tl.constexpr, ROWS: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    """``gradients``, d(z) of each position of a group, and ``sums``, d(w') of each tap, with what TAPS taps from
    ``first`` on add to them."""
    PER_ROW: tl.constexpr = FILTER.PER_TIME or FILTER.RENORMALIZE
    INPUTS: tl.constexpr = NEED.X or NEED.GATE or NEED.STATE
    w = met.whole
    if INPUTS and not PER_ROW and TAPS < FILTER.K:
        w = some_taps(filters_of_row(bank, 0, FILTER), met.statistics, first, FILTER, DTYPE, TAPS)
    dilation, sequence = bank.relation.dilation, bank.sequence
    first_output = target(bank.place.t, first + (TAPS - 1), bank.relation)
    dy_at = rows_from(met.grad, first_output)
    for n in tl.static_range(ROWS + TAPS - 1):
        t = first_output + n * dilation
        reached = (t >= sequence.begin) & (t < sequence.end)
        dy = load_row(rows_from(dy_at, n * dilation), reached & bank.columns, DTYPE)
        for j in tl.static_range(TAPS):
            # By tap j this row is met by row n + j - (TAPS - 1) of the group, if there is such a row.
            if n + j >= TAPS - 1 and n + j < ROWS + TAPS - 1:
                if INPUTS:
                    if PER_ROW:
                        share = tap_of_output(bank, met.statistics, t, reached, first + j, FILTER, DTYPE) * dy
                    else:
                        share = w[j] * dy
                    gradients = replace(gradients, n + j - TAPS + 1, gradients[n + j - TAPS + 1] + share)
                if NEED.FILTER:
                    sums = replace(sums, j, sums[j] + dy * met.z[n + j - TAPS + 1])
    return gradients, sums


@triton.jit
def grad_tile(
    grad, inputs, weight, statistics, gradients, grad_state, filters, biases, sizes, relation, sequences, dropout,
    t_blocks, c_blocks, groups,
    FILTER: tl.constexpr, INPUT: tl.constexpr, NEED: tl.constexpr, OF_STATE: tl.constexpr, UNIFORM: tl.constexpr,
    DTYPE: tl.constexpr,
    ROWS: tl.constexpr, BG: tl.constexpr, BV: tl.constexpr, V: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    """d(z) from shifted tiles of d(y), and with the same tiles the sums over positions for filters that all positions
    share, and for the bias. Tiles and groups are those of ``conv_tile``; a program walks the tiles group, group +
    groups, ... of its channels. Filters of more than TAPS taps take a launch of their own, in which the programs along
    axis 1 have TAPS taps each. OF_STATE: the rows are those of the initial state, which lie before the begin of each
    sequence."""
    K: tl.constexpr = FILTER.K
    REST: tl.constexpr = K % TAPS
    PER_ROW: tl.constexpr = FILTER.PER_TIME or FILTER.RENORMALIZE
    INPUTS: tl.constexpr = NEED.X or NEED.GATE or NEED.STATE
    READ: tl.constexpr = ROWS if NEED.FILTER else 0
    T, C = sizes.T, sizes.C
    pid = tl.program_id(0)
    first_tap = tl.program_id(1) * TAPS
    cb, group, owner = pid % c_blocks, (pid // c_blocks) % groups, pid // c_blocks // groups
    v = cb * BV + tl.arange(0, BV)[None, :, None]  # [1, BV, 1]
    c = v * V + tl.arange(0, V)[None, None, :]  # [1, BV, V]
    columns, first_channel = c < C, v * V if UNIFORM else c
    h, exists = first_channel // sizes.R, first_channel < C
    span, dilation = (K - 1) * relation.dilation, relation.dilation
    step = dilation if ROWS > 1 else 1
    row_tiles = step * tl.cdiv(tl.cdiv(span if OF_STATE else T, step), BG * ROWS)  # of a batch row, or of a sequence
    whole = ()
    if INPUTS and not PER_ROW:
        nowhere, always = Place(owner, h * 0, h), Sequence(0, 0, T)
        shared = Bank(filters_at(weight, nowhere, FILTER), nowhere, exists, columns, always, sizes, relation, dropout)
        if TAPS == K:
            whole = whole_filters(shared, FILTER, DTYPE)
        else:
            statistics = filter_statistics(shared.weight, nowhere.t, exists, always, relation, FILTER, DTYPE)
    filter_sums = zeros([BG, BV, V], DTYPE, TAPS)
    bias_sum = tl.zeros([BG, BV, V], DTYPE)
    for tile in tl.range(group, t_blocks, groups):
        # Filters of a batch row of their own: `owner` is that row. Otherwise it is 0, and the tiles are those of all.
        b = owner + tile // row_tiles
        s = first_positions(tile % row_tiles, row_tiles, relation, BG, ROWS) + v * 0  # [BG, BV, 1]
        if OF_STATE:
            r = s
            number = (tile // row_tiles) % sequences.count
            dstate = grad_state + ((owner * sequences.count + tile // row_tiles).to(tl.int64) * span + r) * C + c
            b = owner + tile // row_tiles // sequences.count
            number += r * 0
            begin, end = r * 0, r * 0 + T
            if INPUT.PACKED:
                begin, end = sequence_bounds(number, T, sequences.data)
            sequence = Sequence(number, begin, end)
            s = begin - span + r
        else:
            sequence = sequence_of(s, T, sequences, INPUT.PACKED)
        no_state = columns_at(inputs.x, b, c)  # not looked at
        z_at = inputs_from(inputs_at(inputs, b, c, no_state), s)
        dy_at = columns_at(grad, b, c)
        z = ()
        for i in tl.static_range(READ):
            here = inputs_from(z_at, i * dilation)
            wanted = unmasked(here.mask, s + i * dilation < T, INPUT.HAS_MASK) & columns
            z = z + (load_gated(here.x, here.gate, wanted, INPUT, DTYPE),)
        dz = zeros([BG, BV, V], DTYPE, ROWS)
        place = Place(b if PER_ROW else owner, s, h)
        bank = Bank(weight, place, exists, columns, sequence, sizes, relation, dropout)
        met = Met(z, dy_at, whole, statistics)
        if NEED.FILTER:
            dz, filter_sums = add_gradients(dz, filter_sums, met, bank, first_tap, FILTER, NEED, DTYPE, ROWS, TAPS)
        elif INPUTS:
            for first in tl.range(0, K - REST, TAPS):
                dz, none = add_gradients(dz, (), met, bank, first, FILTER, NEED, DTYPE, ROWS, TAPS)
            if REST > 0:
                dz, none = add_gradients(dz, (), met, bank, K - REST, FILTER, NEED, DTYPE, ROWS, REST)
        if OF_STATE:
            tl.store(dstate, narrow(dz[0], grad_state.dtype.element_ty), mask=(r < span) & columns)
        else:
            outputs = gradients_from(gradients_at(gradients, b, c), s)
            own = rows_from(dy_at, s)
            for i in tl.static_range(ROWS):
                here, exist = inputs_from(z_at, i * dilation), s + i * dilation < T
                inside = exist & columns
                if INPUTS:
                    wanted = unmasked(here.mask, exist, INPUT.HAS_MASK) & columns
                    there = gradients_from(outputs, i * dilation)
                    store_input_gradient(dz[i], here, there, inside, wanted, INPUT, NEED, DTYPE)
                if NEED.BIAS:
                    bias_sum += load_row(rows_from(own, i * dilation), inside, DTYPE)
    partial = owner.to(tl.int64) * groups + group
    if NEED.FILTER:
        for j in tl.static_range(TAPS):
            tap = first_tap + j + v * 0
            total = tl.sum(filter_sums[j], 0)[None, :, :]
            tl.store(filters + (partial * C + c) * K + tap, total, mask=columns & (tap < K))
    if NEED.BIAS:
        tl.store(biases + partial * C + c, tl.sum(bias_sum, 0)[None, :, :], mask=columns)


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
