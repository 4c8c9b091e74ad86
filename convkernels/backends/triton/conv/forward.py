"""Forward kernels. What they store of their sums is ``finish.py``'s.

``conv_tile`` adds up shifted tiles of the input, tap by tap; it serves every problem. ``conv_band`` multiplies a window
of the input, read once, by the banded matrix of a head's filters; it serves heads of 16 channels and more.
"""

import triton
import triton.language as tl

from ..device import finite, product_of_parts, split, take, widen
from .finish import finish_at, finish_from, store_finished
from .groups import Bank, add_taps, first_positions, statistics_of_rows, zeros
from .inputs import inputs_at, load_input
from .taps import (
    Place,
    Sequence,
    filter_rows,
    filters_at,
    sequence_of,
    source,
    states_at,
    tap_exists,
)


@triton.jit
def conv_tile(
    inputs, weight, bias, finish, sizes, relation, sequences, dropout, t_blocks, c_blocks,
    FILTER: tl.constexpr, INPUT: tl.constexpr, HAS_BIAS: tl.constexpr, FINISH: tl.constexpr, UNIFORM: tl.constexpr,
    DTYPE: tl.constexpr, ROWS: tl.constexpr, BG: tl.constexpr, BV: tl.constexpr, V: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    """The sums a[b, t, c], for BG groups of ROWS positions and BV vectors of V channels, those of a vector in one head
    if UNIFORM, and what becomes of them. TAPS taps at a time meet the rows that a group reads for them."""
    K: tl.constexpr = FILTER.K
    REST: tl.constexpr = K % TAPS
    pid = tl.program_id(0)
    block, b = (pid // c_blocks) % t_blocks, pid // c_blocks // t_blocks
    v = (pid % c_blocks) * BV + tl.arange(0, BV)[None, :, None]  # [1, BV, 1]
    c = v * V + tl.arange(0, V)[None, None, :]  # [1, BV, V]
    t = first_positions(block, t_blocks, relation, BG, ROWS) + v * 0  # [BG, BV, 1]
    columns, owner = c < sizes.C, v * V if UNIFORM else c
    sequence = sequence_of(t, sizes.T, sequences, INPUT.PACKED)
    place, exists = Place(b, t, owner // sizes.R), owner < sizes.C
    bank = Bank(weight, place, exists, columns, sequence, sizes, relation, dropout)
    statistics = statistics_of_rows(bank, FILTER, DTYPE, ROWS, TAPS)
    span = (K - 1) * relation.dilation
    z = inputs_at(inputs, b, c, states_at(inputs.state, b, c, sequence, sequences.count, sizes.C, span))
    totals = zeros([BG, BV, V], DTYPE, ROWS)
    for first in tl.range(0, K - REST, TAPS):
        totals = add_taps(totals, z, bank, statistics, first, FILTER, INPUT, DTYPE, ROWS, TAPS)
    if REST > 0:
        totals = add_taps(totals, z, bank, statistics, K - REST, FILTER, INPUT, DTYPE, ROWS, REST)
    results = finish_from(finish_at(finish, b, c), t)
    for i in tl.static_range(ROWS):
        total = totals[i]
        if HAS_BIAS:
            total += widen(tl.load(bias + c, mask=columns, other=0.0), DTYPE)
        inside = (t + i * relation.dilation < sizes.T) & columns
        store_finished(results, i * relation.dilation, total, inside, FINISH, DTYPE)


@triton.jit
def conv_band(
    inputs, weight, bias, finish, sizes, relation, sequences, dropout, t_blocks, c_blocks,
    FILTER: tl.constexpr, INPUT: tl.constexpr, HAS_BIAS: tl.constexpr, FINISH: tl.constexpr,
    BT: tl.constexpr, HALO: tl.constexpr, BC: tl.constexpr, KP: tl.constexpr, TILES: tl.constexpr,
    Z_PARTS: tl.constexpr,
):  # fmt: skip
    """a = W z for TILES tiles of BT positions that lie ``dilation`` apart and BC channels of one head. Row m of W holds
    the filter of position m from column m on; the window of z has BT + HALO >= BT + K - 1 rows. A tile with an infinite
    or NaN element, which the zeros of W would spread, is summed tap by tap instead."""
    K: tl.constexpr = FILTER.K
    PER_ROW: tl.constexpr = FILTER.PER_TIME or FILTER.RENORMALIZE
    PER_TILE: tl.constexpr = PER_ROW or INPUT.PACKED
    T, dilation = sizes.T, relation.dilation
    pid = tl.program_id(0)
    block, b = (pid // c_blocks) % t_blocks, pid // c_blocks // t_blocks
    pieces = c_blocks // sizes.H
    h = (pid % c_blocks) // pieces
    first_channel = (pid % pieces) * BC
    c = h * sizes.R + first_channel + tl.arange(0, BC)[None, :]
    columns = first_channel + tl.arange(0, BC)[None, :] < sizes.R
    phase_tiles = t_blocks // dilation
    phase = block // phase_tiles
    m = tl.arange(0, BT)[:, None]
    q, q_halo = tl.arange(0, BT)[None, :], BT + tl.arange(0, HALO)[None, :]
    rows, rows_halo = tl.arange(0, BT)[:, None], BT + tl.arange(0, HALO)[:, None]
    j = tl.arange(0, KP)[None, :]
    span = (K - 1) * dilation
    whole = Sequence(0, 0, T)
    z_at = inputs_at(inputs, b, c, states_at(inputs.state, b, c, whole, 1, sizes.C, span))
    finish_here = finish_at(finish, b, c)
    if not PER_ROW:
        place = Place(b, b, h)
        filters = filters_at(weight, place, FILTER)
        w, p, factor = filter_rows(filters, place, j, j >= 0, whole, relation, dropout, FILTER, tl.float32)
        w = tl.broadcast_to(w, [BT, KP])
    in_band, in_band_halo = (q - m >= 0) & (q - m < K), (q_halo - m >= 0) & (q_halo - m < K)  # [BT, BT], [BT, HALO]
    if not PER_TILE:
        band, band_halo = split(take(w, q - m, in_band)), split(take(w, q_halo - m, in_band_halo))
    for step in tl.range(0, TILES):
        start = phase + dilation * (((block % phase_tiles) * TILES + step) * BT)
        t = start + dilation * m
        sequence = sequence_of(t, T, sequences, INPUT.PACKED)
        if PER_ROW:
            place = Place(b, t, h)
            filters = filters_at(weight, place, FILTER)
            # [BT, KP]
            w, p, factor = filter_rows(filters, place, j, t < T, sequence, relation, dropout, FILTER, tl.float32)
        # [BT, BC] and [HALO, BC]
        z = load_input(z_at, source(start, rows, relation), columns, whole, span, INPUT, tl.float32)
        in_halo = columns & (rows_halo < BT + K - 1)
        z_halo = load_input(z_at, source(start, rows_halo, relation), in_halo, whole, span, INPUT, tl.float32)
        if PER_TILE:
            on, on_halo = in_band, in_band_halo
            if INPUT.PACKED:
                on = on & tap_exists(start, q, sequence, relation, False)
                on_halo = on_halo & tap_exists(start, q_halo, sequence, relation, False)
            band, band_halo = split(take(w, q - m, on)), split(take(w, q_halo - m, on_halo))
        total = product_of_parts(band_halo, z_halo, tl.zeros([BT, BC], tl.float32), 3, Z_PARTS)
        total = product_of_parts(band, z, total, 3, Z_PARTS)
        if not finite(total):
            total = tl.zeros([BT, BC], tl.float32)
            for tap in tl.range(0, K):
                value = tl.sum(tl.where(j == tap, w, 0.0), 1)[:, None]
                s = source(t, tap, relation)
                total += value * load_input(z_at, s, columns, sequence, span, INPUT, tl.float32)
        if HAS_BIAS:
            total += widen(tl.load(bias + c, mask=columns, other=0.0), tl.float32)
        store_finished(finish_here, t, total, (t < T) & columns, FINISH, tl.float32)
