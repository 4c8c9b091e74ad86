"""The backward kernel for filters of one position in narrow heads: filters of a window of outputs in registers."""

import triton
import triton.language as tl

from ..device import narrow, take
from .inputs import gradients_at, gradients_from, inputs_at, inputs_from, load_input, store_input_gradient, unmasked
from .taps import Filters, Place, columns_at, filter_rows, filters_at, load_rows, sequence_of, source, target


@triton.jit
def grad_window(
    grad, inputs, weight, gradients, grad_weight, filters, biases, sizes, relation, sequences, dropout,
    phase_tiles, t_blocks, h_blocks,
    FILTER: tl.constexpr, INPUT: tl.constexpr, NEED: tl.constexpr, R: tl.constexpr, DENSE: tl.constexpr,
    DTYPE: tl.constexpr, BT: tl.constexpr, BH: tl.constexpr, RP: tl.constexpr, KP: tl.constexpr,
):  # fmt: skip
    """All gradients where filters differ by position and heads are narrow. The rows of a tile are a window of BT
    outputs, ``dilation`` apart, times BH heads (and their channels, padded to RP); its columns are the taps. A
    program owns the first BT - (K - 1) outputs q, with d(w'), and the inputs that these read with their last tap, whose
    d(z) needs the filters of the whole window:

        d(w')[q, j] = sum_r d(y)[q] z[source(q, j)]        d(z)[q] = sum_j w'[q + K - 1 - j, j] d(y)[q + K - 1 - j]

    DENSE: the taps of a head lie side by side, and heads K apart.
    """
    K: tl.constexpr = FILTER.K
    OWN: tl.constexpr = BT - (K - 1)
    T, C, H, dilation = sizes.T, sizes.C, sizes.H, relation.dilation
    pid = tl.program_id(0)
    hb, tile, b = pid % h_blocks, (pid // h_blocks) % t_blocks, pid // h_blocks // t_blocks
    # The first input is read by the last tap of an output that may lie before the row.
    start = target(0, K - 1, relation) + tile // phase_tiles + dilation * ((tile % phase_tiles) * OWN)
    j, column = tl.arange(0, KP)[None, :], tl.arange(0, BH * KP)[None, :]
    row = tl.arange(0, BT * BH)[:, None]
    t, h = start + dilation * (row // BH), hb * BH + row % BH
    exists = (t >= 0) & (t < T) & (h < H)  # [BT * BH, 1]
    sequence = sequence_of(t, T, sequences, INPUT.PACKED)
    # A stride of K that the compiler knows lets a thread load taps together.
    known = Filters(weight.data, weight.batch, weight.time, K if DENSE else weight.head, weight.tap)
    place = Place(b, t, h)
    # [BT * BH, KP]
    w, p, factor = filter_rows(
        filters_at(known, place, FILTER), place, j, exists, sequence, relation, dropout, FILTER, DTYPE
    )
    partial = b.to(tl.int64) * t_blocks + tile
    channel_row = tl.arange(0, BT * BH * RP)[:, None]
    q, head, r = channel_row // (BH * RP), hb * BH + channel_row // RP % BH, channel_row % RP
    c = head * R + r
    own = (q < OWN) & (head < H) & (r < R)
    out = start + dilation * q
    out_sequence = sequence_of(out, T, sequences, INPUT.PACKED)
    outputs = own & (out >= 0) & (out < T)  # [BT * BH * RP, 1]
    dy_at = columns_at(grad, b, c)
    z_at = inputs_at(inputs, b, c, columns_at(inputs.x, b, c))  # there is no state
    if NEED.X or NEED.GATE:
        s = source(out, K - 1, relation)
        s_sequence = sequence_of(s, T, sequences, INPUT.PACKED)
        existing = own & (s >= 0) & (s < T)
        there = target(s, j, relation)
        reached = existing & (j < K) & (there >= s_sequence.begin) & (there < s_sequence.end)
        # Seen as [BT, BH * KP], a filter's taps move along columns of a length that a warp can hold.
        below = tl.arange(0, BT)[:, None] + (K - 1 - column % KP)
        w_there = tl.reshape(take(tl.reshape(w, [BT, BH * KP]), below, below >= 0, 0), [BT * BH, 1, KP])
        w_there = tl.reshape(tl.broadcast_to(w_there, [BT * BH, RP, KP]), [BT * BH * RP, KP])
        dy = load_rows(dy_at, there, reached, DTYPE)
        dz = tl.sum(tl.where(reached, w_there * dy, 0.0), 1)[:, None]
        z_here, outputs_here = inputs_from(z_at, s), gradients_from(gradients_at(gradients, b, c), s)
        wanted = unmasked(z_here.mask, existing, INPUT.HAS_MASK)
        store_input_gradient(dz, z_here, outputs_here, existing, wanted, INPUT, NEED, DTYPE)
    dy = load_rows(dy_at, out, outputs, DTYPE)  # [BT * BH * RP, 1]
    if NEED.BIAS:
        inner = tl.arange(0, BH * RP)[None, :]
        at = biases + partial * C + (hb * BH + inner // RP) * R + inner % RP
        bias_sum = tl.sum(tl.reshape(dy, [BT, BH * RP]), 0)[None, :]
        tl.store(at, bias_sum, mask=(hb * BH + inner // RP < H) & (inner % RP < R))
    if NEED.FILTER:
        s = source(out, j, relation)
        z = load_input(z_at, s, outputs & (j < K), out_sequence, 0, INPUT, DTYPE)  # [BT * BH * RP, KP]
        d = factor * tl.sum(tl.reshape(dy * z, [BT * BH, RP, KP]), 1)
        if FILTER.SOFTMAX:
            d = p * (d - tl.sum(p * d, 1)[:, None])
        exists = exists & (row // BH < OWN)
        if FILTER.PER_TIME:
            at = grad_weight + ((b.to(tl.int64) * T + t) * H + h) * K + j
            tl.store(at, narrow(d, grad_weight.dtype.element_ty), mask=exists & (j < K))
        else:
            h, j = hb * BH + column // KP, column % KP
            d = tl.sum(tl.reshape(tl.where(exists, d, 0.0), [BT, BH * KP]), 0)[None, :]
            tl.store(filters + (partial * H + h) * K + j, d, mask=(h < H) & (j < K))
