"""The backward kernel that multiplies by banded matrices of filters; it serves heads of 16 channels and more."""

import triton
import triton.language as tl

from ..device import finite, narrow, product, product_of_parts, split, take
from .inputs import gradients_at, gradients_from, inputs_at, inputs_from, load_input, store_input_gradient, unmasked
from .taps import (
    Place,
    Sequence,
    columns_at,
    filter_rows,
    filters_at,
    load_rows,
    sequence_of,
    source,
    states_at,
    tap_exists,
    target,
)


@triton.jit
def grad_band(
    grad, inputs, weight, gradients, grad_state, grad_weight, filters, biases, sizes, relation, sequences, dropout,
    phase_tiles, t_blocks, groups, pieces,
    FILTER: tl.constexpr, INPUT: tl.constexpr, NEED: tl.constexpr,
    BT: tl.constexpr, HALO: tl.constexpr, BC: tl.constexpr, KP: tl.constexpr, PARTS: tl.constexpr,
    Z_PARTS: tl.constexpr,
):  # fmt: skip
    """All gradients of the channels of a head by matrix products; tiles as in ``conv_band``, but of inputs s, so that
    the window holds the rows of d(y) that s reaches: window row q is output t(q), which reads input i of the tile with
    tap i + K - 1 - q.

        d(z) = W^T d(y)                       W^T[i, q] = w'[t(q), i + K - 1 - q]
        d(w')[j] = sum_q (d(y) z^T)[q, q + j - (K - 1)]          filters that all positions share, summed over tiles
        d(w')[t, j] = (d(y) z^T)[t, t + j]                       filters of one position: the window is one of z

    Filters of one position need all channels of the head: the program takes its pieces one after the other."""
    K: tl.constexpr = FILTER.K
    PER_ROW: tl.constexpr = FILTER.PER_TIME or FILTER.RENORMALIZE
    PER_TIME: tl.constexpr = FILTER.PER_TIME
    PACKED: tl.constexpr = INPUT.PACKED
    PER_TILE: tl.constexpr = PER_ROW or PACKED
    T, C, H, R, dilation = sizes.T, sizes.C, sizes.H, sizes.R, relation.dilation
    pid = tl.program_id(0)
    units = H if PER_ROW else H * pieces
    unit, group, owner = pid % units, (pid // units) % groups, pid // units // groups
    h = unit if PER_ROW else unit // pieces
    first_piece = 0 if PER_ROW else unit % pieces
    last_piece = pieces if PER_ROW else first_piece + 1
    span = (K - 1) * dilation
    whole = Sequence(0, 0, T)
    i = tl.arange(0, BT)[None, :]
    q, q_halo = tl.arange(0, BT)[:, None], BT + tl.arange(0, HALO)[:, None]
    m = tl.arange(0, BT)[:, None]
    j = tl.arange(0, KP)[None, :]
    in_window = q_halo < BT + K - 1
    # i + K - 1 - q, the tap by which row q of the window reads input i.
    tap, tap_halo = i + (K - 1) - q, i + (K - 1) - q_halo  # [BT, BT], [HALO, BT]
    if not PER_ROW:
        place = Place(owner, owner, h)
        filter_at = filters_at(weight, place, FILTER)
        w, p, factor = filter_rows(filter_at, place, j, j >= 0, whole, relation, dropout, FILTER, tl.float32)
        w_halo = tl.broadcast_to(w, [HALO, KP])
        w = tl.broadcast_to(w, [BT, KP])
    in_band, in_band_halo = (tap >= 0) & (tap < K), (tap_halo >= 0) & (tap_halo < K)
    if not PER_TILE:
        band = split(tl.trans(take(w, tap, in_band)))
        band_halo = split(tl.trans(take(w_halo, tap_halo, in_band_halo)))
    pairs = tl.zeros([BT, BT], tl.float32)
    pairs_halo = tl.zeros([BT if PER_ROW else HALO, HALO if PER_ROW else BT], tl.float32)
    row_sum = tl.zeros([1, KP], tl.float32)
    bias_sum = tl.zeros([1, BC], tl.float32)
    # Tiles side by side, so that rows which two of them read come from the first cache.
    share = tl.cdiv(t_blocks, groups)
    for tile in tl.range(group * share, tl.minimum((group + 1) * share, t_blocks)):
        row_tiles = phase_tiles * dilation
        b = owner + tile // row_tiles
        phase = (tile % row_tiles) // phase_tiles
        # With a state the tiles begin with its rows, at position -span.
        start = phase + dilation * ((tile % phase_tiles) * BT)
        if INPUT.HAS_STATE:
            start -= span
        s = start + dilation * m
        sequence = sequence_of(s, T, sequences, PACKED)
        t = target(start, K - 1, relation) + dilation * q
        t_halo = target(start, K - 1, relation) + dilation * q_halo
        alive, alive_halo = (t >= 0) & (t < T), (t_halo >= 0) & (t_halo < T) & in_window
        t_sequence = sequence_of(t, T, sequences, PACKED)
        t_sequence_halo = sequence_of(t_halo, T, sequences, PACKED)
        on, on_halo = in_band, in_band_halo
        if PACKED:
            position = start + dilation * i
            on = on & (position >= t_sequence.begin) & (position < t_sequence.end)
            on_halo = on_halo & (position >= t_sequence_halo.begin) & (position < t_sequence_halo.end)
        if PER_ROW:
            # [BT, KP] and [HALO, KP]
            place = Place(b, t, h)
            filter_at = filters_at(weight, place, FILTER)
            w, p, factor = filter_rows(filter_at, place, j, alive, t_sequence, relation, dropout, FILTER, tl.float32)
            place = Place(b, t_halo, h)
            filter_at = filters_at(weight, place, FILTER)
            w_halo, p_halo, factor_halo = filter_rows(
                filter_at, place, j, alive_halo, t_sequence_halo, relation, dropout, FILTER, tl.float32
            )
            pairs = tl.zeros([BT, BT], tl.float32)
            pairs_halo = tl.zeros([BT, HALO], tl.float32)
        if PER_TILE:
            band, band_halo = split(tl.trans(take(w, tap, on))), split(tl.trans(take(w_halo, tap_halo, on_halo)))
        for piece in tl.range(first_piece, last_piece):
            inner = piece * BC + tl.arange(0, BC)[None, :]
            c, columns = h * R + inner, inner < R
            dy_at = columns_at(grad, b, c)
            z_at = inputs_at(inputs, b, c, states_at(inputs.state, b, c, whole, 1, C, span))
            dy = load_rows(dy_at, t, alive & columns, tl.float32)  # [BT, BC]
            dy_halo = load_rows(dy_at, t_halo, alive_halo & columns, tl.float32)  # [HALO, BC]
            inside = (s >= 0) & (s < T) & columns
            z_here = inputs_from(z_at, s)
            wanted = unmasked(z_here.mask, inside, INPUT.HAS_MASK)
            if NEED.X or NEED.GATE or NEED.STATE:
                dz = tl.zeros([BT, BC], tl.float32)
                dz = product_of_parts(band_halo, dy_halo, dz, 3, PARTS)
                dz = product_of_parts(band, dy, dz, 3, PARTS)
                if not finite(dz):
                    dz = tl.zeros([BT, BC], tl.float32)
                    for k in tl.range(0, K):
                        at = target(s, k, relation)
                        reached = (at >= sequence.begin) & (at < sequence.end) & (at >= 0) & (at < T)
                        there, at_sequence = Place(b, at, h), sequence_of(at, T, sequences, PACKED)
                        w_there, p_there, factor_there = filter_rows(
                            filters_at(weight, there, FILTER), there, j, reached, at_sequence, relation, dropout,
                            FILTER, tl.float32,
                        )  # fmt: skip
                        value = tl.sum(tl.where(j == k, w_there, 0.0), 1)[:, None]
                        dz += value * load_rows(dy_at, at, reached & columns, tl.float32)
                outputs = gradients_from(gradients_at(gradients, b, c), s)
                store_input_gradient(dz, z_here, outputs, inside, wanted, INPUT, NEED, tl.float32)
                if NEED.STATE:
                    at = grad_state + (b.to(tl.int64) * span + span + s) * C + c
                    tl.store(at, narrow(dz, grad_state.dtype.element_ty), mask=(s < 0) & (s >= -span) & columns)
            if NEED.BIAS:
                # Rows of d(y) at the tile's own positions.
                if PER_ROW:
                    own_grad = load_rows(dy_at, s, inside, tl.float32)
                    at = biases + (owner.to(tl.int64) * groups + tile) * C + c
                    tl.store(at, tl.sum(own_grad, 0)[None, :], mask=columns)
                else:
                    shift = K - 1 - relation.left // dilation
                    mine, mine_halo = (q >= shift) & (q < shift + BT), (q_halo >= shift) & (q_halo < shift + BT)
                    bias_sum += tl.sum(tl.where(mine, dy, 0.0), 0)[None, :]
                    bias_sum += tl.sum(tl.where(mine_halo, dy_halo, 0.0), 0)[None, :]
            if NEED.FILTER:
                if PER_ROW:
                    own_grad = load_rows(dy_at, s, inside, tl.float32)
                    first = source(start, 0, relation)
                    z = load_input(z_at, first + dilation * q, columns, whole, span, INPUT, tl.float32)
                    pairs = product(own_grad, tl.trans(z), pairs, PARTS, Z_PARTS)
                    z = load_input(z_at, first + dilation * q_halo, columns & in_window, whole, span, INPUT, tl.float32)
                    pairs_halo = product(own_grad, tl.trans(z), pairs_halo, PARTS, Z_PARTS)
                else:
                    z = load_input(z_at, s, columns, whole, span, INPUT, tl.float32)
                    if PACKED:
                        met = product(dy, tl.trans(z), tl.zeros([BT, BT], tl.float32), PARTS, Z_PARTS)
                        pairs += tl.where(on, met, 0.0)
                        met = product(dy_halo, tl.trans(z), tl.zeros([HALO, BT], tl.float32), PARTS, Z_PARTS)
                        pairs_halo += tl.where(on_halo, met, 0.0)
                    else:
                        pairs = product(dy, tl.trans(z), pairs, PARTS, Z_PARTS)
                        pairs_halo = product(dy_halo, tl.trans(z), pairs_halo, PARTS, Z_PARTS)
        if NEED.FILTER and PER_ROW:
            rows = (s >= 0) & (s < T)
            place = Place(b, s, h)
            filter_at = filters_at(weight, place, FILTER)
            w, p, factor = filter_rows(filter_at, place, j, rows, sequence, relation, dropout, FILTER, tl.float32)
            here = rows & (j < K)
            if PACKED:
                here = here & tap_exists(s, j, sequence, relation, False)
            d = take(pairs, m + j, here & (m + j < BT))
            d += take(pairs_halo, m + j - BT, here & (m + j >= BT))
            d *= factor
            if FILTER.SOFTMAX:
                d = p * (d - tl.sum(p * d, 1)[:, None])
            if PER_TIME:
                at = grad_weight + ((b.to(tl.int64) * T + s) * H + h) * K + j
                tl.store(at, narrow(d, grad_weight.dtype.element_ty), mask=rows & (j < K))
            else:
                row_sum += tl.sum(tl.where(rows & (j < K), d, 0.0), 0)[None, :]
    partial = owner.to(tl.int64) * groups + group
    if NEED.FILTER and not PER_TIME:
        if not PER_ROW:
            back = j - (K - 1)
            met = take(pairs, q + back, (j < K) & (q + back >= 0) & (q + back < BT))
            row_sum += tl.sum(met, 0)[None, :]
            met = take(pairs_halo, q_halo + back, (j < K) & (q_halo + back >= 0) & (q_halo + back < BT))
            row_sum += tl.sum(met, 0)[None, :]
        tl.store(filters + (partial * units + unit) * K + j, row_sum, mask=j < K)
    if NEED.BIAS and not PER_ROW:
        inner = first_piece * BC + tl.arange(0, BC)[None, :]
        tl.store(biases + partial * C + h * R + inner, bias_sum, mask=inner < R)
