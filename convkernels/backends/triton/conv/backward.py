"""Gradient kernels. Each counterpart of a forward kernel reads x and d(y) once and writes all gradients.

Sums over positions stay in the program's registers while it walks its tiles; programs leave partial sums in memory, and
``reduce_filters`` and ``reduce_bias`` add these in a fixed order and carry them through the softmax. Nothing is added
atomically, so results are equal bit for bit, always.
"""

import triton
import triton.language as tl

from .taps import (
    columns_at,
    filter_rows,
    filter_statistics,
    filter_tap,
    filters_at,
    load_input,
    load_rows,
    narrow,
    product,
    sequence_bounds,
    sequence_of,
    sigmoid,
    source,
    splittable,
    state_at,
    take,
    tap_exists,
    target,
    unmasked,
)


@triton.jit
def store_input_gradient(
    dz, x_at, gate_at, dx_at, dgate_at, s, inside, wanted, x_time, gate_time, dx_time, dgate_time,
    HAS_GATE: tl.constexpr, NEED_X: tl.constexpr, NEED_GATE: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """d(x) and d(gate) from d(z) at positions that exist; 0 where not ``wanted``, that is, where masked."""
    dx = dz
    if HAS_GATE:
        opened = sigmoid(load_rows(gate_at, s, wanted, gate_time, DTYPE))
        dx = dz * opened
        if NEED_GATE:
            dgate = dz * load_rows(x_at, s, wanted, x_time, DTYPE) * (opened * (1.0 - opened))
            dgate = narrow(tl.where(wanted, dgate, 0.0), dgate_at.dtype.element_ty)
            tl.store(dgate_at + s.to(tl.int64) * dgate_time, dgate, mask=inside)
    if NEED_X:
        dx = narrow(tl.where(wanted, dx, 0.0), dx_at.dtype.element_ty)
        tl.store(dx_at + s.to(tl.int64) * dx_time, dx, mask=inside)


@triton.jit
def filter_sums(
    statistics, weight, cu_seqlens, T, H, left, dilation, h_blocks, sequences, search_steps,
    weight_batch, weight_time, weight_head, weight_tap,
    K: tl.constexpr, RENORMALIZE: tl.constexpr, PACKED: tl.constexpr, HAS_STATE: tl.constexpr, PER_BATCH: tl.constexpr,
    PER_TIME: tl.constexpr, DTYPE: tl.constexpr, BT: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """statistics[b, t, h] = (maximum, reciprocal sum) of the softmax over the taps, where filters differ by position
    and ``grad_tile`` needs those of other positions."""
    pid = tl.program_id(0)
    t_blocks = tl.cdiv(T, BT)
    block, b = (pid // h_blocks) % t_blocks, pid // h_blocks // t_blocks
    t = block * BT + tl.arange(0, BT)[:, None]
    h = (pid % h_blocks) * BH + tl.arange(0, BH)[None, :]
    inside = (t < T) & (h < H)
    number, begin, end = sequence_of(t, T, cu_seqlens, sequences, search_steps, PACKED)
    at = filters_at(weight, b, t, h, weight_batch, weight_time, weight_head, PER_BATCH, PER_TIME)
    most, inverse = filter_statistics(
        at, t, inside, K, left, dilation, begin, end, weight_tap, True, RENORMALIZE, HAS_STATE, DTYPE
    )
    at = statistics + ((b.to(tl.int64) * T + t) * H + h) * 2
    tl.store(at, most, mask=inside)
    tl.store(at + 1, inverse, mask=inside)


@triton.jit
def grad_tile(
    grad, x, weight, seed, gate, mask, cu_seqlens, statistics, grad_x, grad_gate, grad_state, filters, biases,
    T, C, R, H, left, dilation, t_blocks, c_blocks, groups, sequences, search_steps, threshold, scale,
    dy_batch, dy_time, dy_channel, x_batch, x_time, x_channel, weight_batch, weight_time, weight_head, weight_tap,
    gate_batch, gate_time, gate_channel, mask_batch, mask_time,
    dx_batch, dx_time, dx_channel, dgate_batch, dgate_time, dgate_channel,
    K: tl.constexpr, SOFTMAX: tl.constexpr, RENORMALIZE: tl.constexpr, DROPOUT: tl.constexpr,
    HAS_GATE: tl.constexpr, HAS_MASK: tl.constexpr, PACKED: tl.constexpr, HAS_STATE: tl.constexpr,
    PER_BATCH: tl.constexpr, PER_TIME: tl.constexpr, NEED_X: tl.constexpr, NEED_GATE: tl.constexpr,
    NEED_FILTER: tl.constexpr, NEED_BIAS: tl.constexpr, OF_STATE: tl.constexpr, DTYPE: tl.constexpr,
    BT: tl.constexpr, BC: tl.constexpr, KP: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """d(z) as the sum of shifted tiles of d(y), and with the same tiles the sums over positions for filters that all
    positions share, and for the bias. A program walks the tiles group, group + groups, ... of its channels; taps beyond
    KP are left to further programs along axis 1, which compute only their filter sums. OF_STATE: the rows are those of
    the initial state, which lie before the begin of each sequence."""
    pid = tl.program_id(0)
    first_tap = tl.program_id(1) * KP
    cb, group, owner = pid % c_blocks, (pid // c_blocks) % groups, pid // c_blocks // groups
    c = cb * BC + tl.arange(0, BC)[None, :]
    h, columns = c // R, c < C
    span = (K - 1) * dilation
    PER_ROW: tl.constexpr = PER_TIME or RENORMALIZE
    k = tl.arange(0, KP)[:, None]
    filter_sum = tl.zeros([KP, BC], DTYPE)
    bias_sum = tl.zeros([1, BC], DTYPE)
    zero = tl.zeros([1, 1], tl.int32)
    if not PER_ROW:
        filter_at = filters_at(weight, owner, zero, h, weight_batch, weight_time, weight_head, PER_BATCH, False)
        most, inverse = filter_statistics(
            filter_at, zero, columns, K, left, dilation, zero, zero, weight_tap, SOFTMAX, False, HAS_STATE, DTYPE
        )
    for tile in tl.range(group, t_blocks, groups):
        # Filters of a batch row of their own: `owner` is that row. Otherwise it is 0, and the tiles are those of all.
        row_tiles = tl.cdiv(span if OF_STATE else T, BT)
        b = owner + tile // row_tiles
        r = (tile % row_tiles) * BT + tl.arange(0, BT)[:, None]
        if OF_STATE:
            number = (tile // row_tiles) % sequences
            dstate_at = grad_state + ((owner * sequences + tile // row_tiles).to(tl.int64) * span + r) * C + c
            b = owner + tile // row_tiles // sequences
            number += r * 0
            begin, end = r * 0, r * 0 + T
            if PACKED:
                begin, end = sequence_bounds(number, T, cu_seqlens)
            s = begin - span + r
            inside = (r < span) & columns
        else:
            s = r
            number, begin, end = sequence_of(s, T, cu_seqlens, sequences, search_steps, PACKED)
            inside = (s < T) & columns
        wanted = unmasked(mask + b.to(tl.int64) * mask_batch, s, inside & (s >= begin), mask_time, HAS_MASK)
        dy_at = columns_at(grad, b, c, dy_batch, dy_channel)
        x_at = columns_at(x, b, c, x_batch, x_channel)
        gate_at = columns_at(gate, b, c, gate_batch, gate_channel)
        if NEED_FILTER:
            z = load_rows(x_at, s, wanted, x_time, DTYPE)
            if HAS_GATE:
                z *= sigmoid(load_rows(gate_at, s, wanted, gate_time, DTYPE))
        dz = tl.zeros([BT, BC], DTYPE)
        # Constant bounds where there are no further programs: they save registers.
        start = 0 if KP >= K else first_tap
        stop = K if KP >= K else tl.where(first_tap == 0, K, tl.minimum(first_tap + KP, K))
        for j in tl.range(start, stop, loop_unroll_factor=UNROLL):
            t = target(s, j, left, dilation)
            reached = inside & (t >= begin) & (t < end)
            dy = load_rows(dy_at, t, reached, dy_time, DTYPE)
            if PER_ROW:
                most_there, inverse_there = dy, dy  # without softmax not looked at
                if SOFTMAX:
                    at = statistics + ((b.to(tl.int64) * T + t) * H + h) * 2
                    most_there = tl.load(at, mask=reached, other=0.0)
                    inverse_there = tl.load(at + 1, mask=reached, other=0.0)
                filter_there = filters_at(weight, b, t, h, weight_batch, weight_time, weight_head, PER_BATCH, PER_TIME)
                w, p, factor = filter_tap(
                    filter_there, seed, b, t, h, j, reached, most_there, inverse_there, left, dilation,
                    begin, end, threshold, scale, weight_tap,
                    SOFTMAX, RENORMALIZE, DROPOUT, HAS_STATE, PER_BATCH, PER_TIME, DTYPE,
                )  # fmt: skip
                dz += tl.where(reached, w * dy, 0.0)
            else:
                w, p, factor = filter_tap(
                    filter_at, seed, owner, zero, h, j, columns, most, inverse, left, dilation,
                    begin, end, threshold, scale, weight_tap,
                    SOFTMAX, RENORMALIZE, DROPOUT, HAS_STATE, PER_BATCH, PER_TIME, DTYPE,
                )  # fmt: skip
                dz += w * dy
            if NEED_FILTER:
                filter_sum += tl.where(k == j - first_tap, tl.sum(dy * z, 0)[None, :], 0.0)
            if NEED_BIAS:
                # The tap that reads its own position meets every d(y) once.
                bias_sum += tl.where(j * dilation == left, tl.sum(dy, 0)[None, :], 0.0)
        if OF_STATE:
            tl.store(dstate_at, narrow(dz, grad_state.dtype.element_ty), mask=inside)
        elif first_tap == 0:
            dx_at = columns_at(grad_x, b, c, dx_batch, dx_channel)
            dgate_at = columns_at(grad_gate, b, c, dgate_batch, dgate_channel)
            store_input_gradient(
                dz, x_at, gate_at, dx_at, dgate_at, s, inside, wanted, x_time, gate_time, dx_time, dgate_time,
                HAS_GATE, NEED_X, NEED_GATE, DTYPE,
            )  # fmt: skip
    partial = owner.to(tl.int64) * groups + group
    if NEED_FILTER:
        taps = first_tap + k
        tl.store(filters + (partial * C + c) * K + taps, filter_sum, mask=columns & (taps < K))
    if NEED_BIAS and first_tap == 0:
        tl.store(biases + partial * C + c, bias_sum, mask=columns)


@triton.jit
def row_filter_gradient(
    grad, x, gate, mask_at, state, b, t, h, j, r_blocks, inside, number, begin, end,
    C, R, left, dilation, span, sequences,
    dy_batch, dy_time, dy_channel, x_batch, x_time, x_channel, gate_batch, gate_time, gate_channel, mask_time,
    HAS_GATE: tl.constexpr, HAS_MASK: tl.constexpr, HAS_STATE: tl.constexpr, DTYPE: tl.constexpr,
    BT: tl.constexpr, BH: tl.constexpr, RP: tl.constexpr,
):  # fmt: skip
    """d(w') of tap j at positions t (a column) and heads h (a row [1, BH * RP], each head RP times): [BT, BH]."""
    total = tl.zeros([BT, BH], DTYPE)
    for block in tl.range(0, r_blocks):
        r = block * RP + tl.arange(0, BH * RP)[None, :] % RP
        c, here = h * R + r, inside & (r < R)
        dy = load_rows(columns_at(grad, b, c, dy_batch, dy_channel), t, here, dy_time, DTYPE)
        z = load_input(
            columns_at(x, b, c, x_batch, x_channel), columns_at(gate, b, c, gate_batch, gate_channel), mask_at,
            state_at(state, b, c, number, begin, C, span, sequences), source(t, j, left, dilation), here, begin, end,
            C, span, x_time, gate_time, mask_time, HAS_GATE, HAS_MASK, HAS_STATE, DTYPE,
        )  # fmt: skip
        total += tl.sum(tl.reshape(dy * z, [BT, BH, RP]), 2)
    return total


@triton.jit
def grad_filter_rows(
    grad, x, weight, seed, gate, mask, cu_seqlens, state, grad_weight, filters,
    T, C, R, H, left, dilation, t_blocks, h_blocks, r_blocks, sequences, search_steps, threshold, scale,
    dy_batch, dy_time, dy_channel, x_batch, x_time, x_channel, weight_batch, weight_time, weight_head, weight_tap,
    gate_batch, gate_time, gate_channel, mask_batch, mask_time,
    K: tl.constexpr, SOFTMAX: tl.constexpr, RENORMALIZE: tl.constexpr, DROPOUT: tl.constexpr,
    HAS_GATE: tl.constexpr, HAS_MASK: tl.constexpr, PACKED: tl.constexpr, HAS_STATE: tl.constexpr,
    PER_BATCH: tl.constexpr, PER_TIME: tl.constexpr, DTYPE: tl.constexpr,
    BT: tl.constexpr, BH: tl.constexpr, RP: tl.constexpr,
):  # fmt: skip
    """d(filters) position by position, through the softmax: to grad_weight, or summed over the tile for filters that
    all positions share."""
    pid = tl.program_id(0)
    block, b = (pid // h_blocks) % t_blocks, pid // h_blocks // t_blocks
    t = block * BT + tl.arange(0, BT)[:, None]
    heads = (pid % h_blocks) * BH + tl.arange(0, BH)[None, :]
    h = (pid % h_blocks) * BH + tl.arange(0, BH * RP)[None, :] // RP
    inside, exists = (t < T) & (h < H), (t < T) & (heads < H)
    number, begin, end = sequence_of(t, T, cu_seqlens, sequences, search_steps, PACKED)
    span = (K - 1) * dilation
    filter_at = filters_at(weight, b, t, heads, weight_batch, weight_time, weight_head, PER_BATCH, PER_TIME)
    most, inverse = filter_statistics(
        filter_at, t, exists, K, left, dilation, begin, end, weight_tap, SOFTMAX, RENORMALIZE, HAS_STATE, DTYPE
    )
    mask_at = mask + b.to(tl.int64) * mask_batch
    mean = tl.zeros([BT, BH], DTYPE)
    for final in tl.static_range(0 if SOFTMAX else 1, 2):
        # With softmax the first round finds sum_j p_j d_j, the second computes the products d_j again.
        for j in tl.range(0, K):
            d = row_filter_gradient(
                grad, x, gate, mask_at, state, b, t, h, j, r_blocks, inside, number, begin, end,
                C, R, left, dilation, span, sequences, dy_batch, dy_time, dy_channel, x_batch, x_time, x_channel,
                gate_batch, gate_time, gate_channel, mask_time,
                HAS_GATE, HAS_MASK, HAS_STATE, DTYPE, BT, BH, RP,
            )  # fmt: skip
            w, p, factor = filter_tap(
                filter_at, seed, b, t, heads, j, exists, most, inverse, left, dilation, begin, end, threshold, scale,
                weight_tap,
                SOFTMAX, RENORMALIZE, DROPOUT, HAS_STATE, PER_BATCH, PER_TIME, DTYPE,
            )  # fmt: skip
            d *= factor
            if final == 0:
                mean += p * d
            else:
                if SOFTMAX:
                    d = p * (d - mean)
                if PER_TIME:
                    at = grad_weight + ((b.to(tl.int64) * T + t) * H + heads) * K + j
                    tl.store(at, narrow(d, grad_weight.dtype.element_ty), mask=exists)
                else:
                    at = filters + ((b.to(tl.int64) * t_blocks + block) * H + heads) * K + j
                    tl.store(at, tl.sum(tl.where(exists, d, 0.0), 0)[None, :], mask=heads < H)


@triton.jit
def grad_window(
    grad, x, weight, seed, gate, mask, cu_seqlens, grad_x, grad_gate, grad_weight, filters, biases,
    T, C, H, left, dilation, phase_tiles, t_blocks, h_blocks, sequences, search_steps, threshold, scale,
    dy_batch, dy_time, dy_channel, x_batch, x_time, x_channel, weight_batch, weight_time, weight_head, weight_tap,
    gate_batch, gate_time, gate_channel, mask_batch, mask_time,
    dx_batch, dx_time, dx_channel, dgate_batch, dgate_time, dgate_channel,
    K: tl.constexpr, R: tl.constexpr, SOFTMAX: tl.constexpr, RENORMALIZE: tl.constexpr, DROPOUT: tl.constexpr,
    HAS_GATE: tl.constexpr, HAS_MASK: tl.constexpr, PACKED: tl.constexpr, HAS_STATE: tl.constexpr,
    PER_BATCH: tl.constexpr, PER_TIME: tl.constexpr, NEED_X: tl.constexpr, NEED_GATE: tl.constexpr,
    NEED_FILTER: tl.constexpr, NEED_BIAS: tl.constexpr, DENSE: tl.constexpr, DTYPE: tl.constexpr,
    BT: tl.constexpr, BH: tl.constexpr, RP: tl.constexpr, KP: tl.constexpr,
):  # fmt: skip
    """All gradients where filters differ by position and heads are narrow. The rows of a tile are a window of BT
    outputs, ``dilation`` apart, times BH heads (and their channels, padded to RP); its columns are the taps. A
    program owns the first BT - (K - 1) outputs q, with d(w'), and the inputs that these read with their last tap, whose
    d(z) needs the filters of the whole window:

        d(w')[q, j] = sum_r d(y)[q] z[source(q, j)]        d(z)[q] = sum_j w'[q + K - 1 - j, j] d(y)[q + K - 1 - j]
    """
    pid = tl.program_id(0)
    hb, tile, b = pid % h_blocks, (pid // h_blocks) % t_blocks, pid // h_blocks // t_blocks
    OWN: tl.constexpr = BT - (K - 1)
    # The first input is read by the last tap of an output that may lie before the row.
    start = target(0, K - 1, left, dilation) + tile // phase_tiles + dilation * ((tile % phase_tiles) * OWN)
    j, column = tl.arange(0, KP)[None, :], tl.arange(0, BH * KP)[None, :]
    row = tl.arange(0, BT * BH)[:, None]
    t, h = start + dilation * (row // BH), hb * BH + row % BH
    exists = (t >= 0) & (t < T) & (h < H)
    number, begin, end = sequence_of(t, T, cu_seqlens, sequences, search_steps, PACKED)
    # A stride of K that the compiler knows lets a thread load taps together.
    at = filters_at(weight, b, t, h, weight_batch, weight_time, K if DENSE else weight_head, PER_BATCH, PER_TIME)
    w, p, factor = filter_rows(
        at, seed, b, t, h, j, exists, K, left, dilation, begin, end, threshold, scale, weight_tap,
        SOFTMAX, RENORMALIZE, DROPOUT, HAS_STATE, PER_BATCH, PER_TIME, DTYPE,
    )  # fmt: skip
    mask_at = mask + b.to(tl.int64) * mask_batch
    partial = b.to(tl.int64) * t_blocks + tile
    channel_row = tl.arange(0, BT * BH * RP)[:, None]
    q, head, r = channel_row // (BH * RP), hb * BH + channel_row // RP % BH, channel_row % RP
    c = head * R + r
    own = (q < OWN) & (head < H) & (r < R)
    out = start + dilation * q
    out_number, out_begin, out_end = sequence_of(out, T, cu_seqlens, sequences, search_steps, PACKED)
    outputs = own & (out >= 0) & (out < T)
    dy_at = columns_at(grad, b, c, dy_batch, dy_channel)
    x_at = columns_at(x, b, c, x_batch, x_channel)
    gate_at = columns_at(gate, b, c, gate_batch, gate_channel)
    if NEED_X or NEED_GATE:
        s = source(out, K - 1, left, dilation)
        s_number, s_begin, s_end = sequence_of(s, T, cu_seqlens, sequences, search_steps, PACKED)
        inputs = own & (s >= 0) & (s < T)
        there = target(s, j, left, dilation)
        reached = inputs & (j < K) & (there >= s_begin) & (there < s_end)
        # Seen as [BT, BH * KP], a filter's taps move along columns of a length that a warp can hold.
        below = tl.arange(0, BT)[:, None] + (K - 1 - column % KP)
        w_there = tl.reshape(take(tl.reshape(w, [BT, BH * KP]), below, below >= 0, 0), [BT * BH, 1, KP])
        w_there = tl.reshape(tl.broadcast_to(w_there, [BT * BH, RP, KP]), [BT * BH * RP, KP])
        dy = load_rows(dy_at, there, reached, dy_time, DTYPE)
        dz = tl.sum(tl.where(reached, w_there * dy, 0.0), 1)[:, None]
        store_input_gradient(
            dz, x_at, gate_at, columns_at(grad_x, b, c, dx_batch, dx_channel),
            columns_at(grad_gate, b, c, dgate_batch, dgate_channel), s, inputs,
            unmasked(mask_at, s, inputs, mask_time, HAS_MASK), x_time, gate_time, dx_time, dgate_time,
            HAS_GATE, NEED_X, NEED_GATE, DTYPE,
        )  # fmt: skip
    dy = load_rows(dy_at, out, outputs, dy_time, DTYPE)
    if NEED_BIAS:
        inner = tl.arange(0, BH * RP)[None, :]
        at = biases + partial * C + (hb * BH + inner // RP) * R + inner % RP
        bias_sum = tl.sum(tl.reshape(dy, [BT, BH * RP]), 0)[None, :]
        tl.store(at, bias_sum, mask=(hb * BH + inner // RP < H) & (inner % RP < R))
    if NEED_FILTER:
        z = load_input(
            x_at, gate_at, mask_at, x_at, source(out, j, left, dilation), outputs & (j < K), out_begin, out_end,
            C, 0, x_time, gate_time, mask_time, HAS_GATE, HAS_MASK, HAS_STATE, DTYPE,
        )  # fmt: skip
        d = factor * tl.sum(tl.reshape(dy * z, [BT * BH, RP, KP]), 1)
        if SOFTMAX:
            d = p * (d - tl.sum(p * d, 1)[:, None])
        exists = exists & (row // BH < OWN)
        if PER_TIME:
            at = grad_weight + ((b.to(tl.int64) * T + t) * H + h) * K + j
            tl.store(at, narrow(d, grad_weight.dtype.element_ty), mask=exists & (j < K))
        else:
            h, j = hb * BH + column // KP, column % KP
            d = tl.sum(tl.reshape(tl.where(exists, d, 0.0), [BT, BH * KP]), 0)[None, :]
            tl.store(filters + (partial * H + h) * K + j, d, mask=(h < H) & (j < K))


@triton.jit
def grad_band(
    grad, x, weight, seed, gate, mask, cu_seqlens, state, grad_x, grad_gate, grad_state, grad_weight, filters, biases,
    T, C, R, H, left, dilation, phase_tiles, t_blocks, groups, pieces, sequences, search_steps, threshold, scale,
    dy_batch, dy_time, dy_channel, x_batch, x_time, x_channel, weight_batch, weight_time, weight_head, weight_tap,
    gate_batch, gate_time, gate_channel, mask_batch, mask_time,
    dx_batch, dx_time, dx_channel, dgate_batch, dgate_time, dgate_channel,
    K: tl.constexpr, SOFTMAX: tl.constexpr, RENORMALIZE: tl.constexpr, DROPOUT: tl.constexpr,
    HAS_GATE: tl.constexpr, HAS_MASK: tl.constexpr, PACKED: tl.constexpr, HAS_STATE: tl.constexpr,
    PER_BATCH: tl.constexpr, PER_TIME: tl.constexpr, NEED_X: tl.constexpr, NEED_GATE: tl.constexpr,
    NEED_FILTER: tl.constexpr, NEED_BIAS: tl.constexpr, NEED_STATE: tl.constexpr,
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
    pid = tl.program_id(0)
    PER_ROW: tl.constexpr = PER_TIME or RENORMALIZE
    units = H if PER_ROW else H * pieces
    unit, group, owner = pid % units, (pid // units) % groups, pid // units // groups
    h = unit if PER_ROW else unit // pieces
    first_piece = 0 if PER_ROW else unit % pieces
    last_piece = pieces if PER_ROW else first_piece + 1
    span = (K - 1) * dilation
    i = tl.arange(0, BT)[None, :]
    q, q_halo = tl.arange(0, BT)[:, None], BT + tl.arange(0, HALO)[:, None]
    m = tl.arange(0, BT)[:, None]
    j = tl.arange(0, KP)[None, :]
    in_window = q_halo < BT + K - 1
    # i + K - 1 - q, the tap by which row q of the window reads input i.
    tap, tap_halo = i + (K - 1) - q, i + (K - 1) - q_halo
    if not PER_ROW:
        filter_at = filters_at(weight, owner, owner, h, weight_batch, weight_time, weight_head, PER_BATCH, False)
        w, p, factor = filter_rows(
            filter_at, seed, owner, owner, h, j, j >= 0, K, left, dilation, 0, T, threshold, scale, weight_tap,
            SOFTMAX, RENORMALIZE, DROPOUT, HAS_STATE, PER_BATCH, PER_TIME, tl.float32,
        )  # fmt: skip
        w_halo = tl.broadcast_to(w, [HALO, KP])
        w = tl.broadcast_to(w, [BT, KP])
    pairs = tl.zeros([BT, BT], tl.float32)
    pairs_halo = tl.zeros([BT if PER_ROW else HALO, HALO if PER_ROW else BT], tl.float32)
    row_sum = tl.zeros([1, KP], tl.float32)
    bias_sum = tl.zeros([1, BC], tl.float32)
    for tile in tl.range(group, t_blocks, groups):
        row_tiles = phase_tiles * dilation
        b = owner + tile // row_tiles
        phase = (tile % row_tiles) // phase_tiles
        # With a state the tiles begin with its rows, at position -span.
        start = phase + dilation * ((tile % phase_tiles) * BT)
        if HAS_STATE:
            start -= span
        s = start + dilation * m
        number, begin, end = sequence_of(s, T, cu_seqlens, sequences, search_steps, PACKED)
        t = target(start, K - 1, left, dilation) + dilation * q
        t_halo = target(start, K - 1, left, dilation) + dilation * q_halo
        alive, alive_halo = (t >= 0) & (t < T), (t_halo >= 0) & (t_halo < T) & in_window
        t_number, t_begin, t_end = sequence_of(t, T, cu_seqlens, sequences, search_steps, PACKED)
        t_number_halo, t_begin_halo, t_end_halo = sequence_of(t_halo, T, cu_seqlens, sequences, search_steps, PACKED)
        on, on_halo = (tap >= 0) & (tap < K), (tap_halo >= 0) & (tap_halo < K)
        if PACKED:
            input_ = start + dilation * i
            on = on & (input_ >= t_begin) & (input_ < t_end)
            on_halo = on_halo & (input_ >= t_begin_halo) & (input_ < t_end_halo)
        if PER_ROW:
            filter_at = filters_at(weight, b, t, h, weight_batch, weight_time, weight_head, PER_BATCH, PER_TIME)
            w, p, factor = filter_rows(
                filter_at, seed, b, t, h, j, alive, K, left, dilation, t_begin, t_end, threshold, scale, weight_tap,
                SOFTMAX, RENORMALIZE, DROPOUT, HAS_STATE, PER_BATCH, PER_TIME, tl.float32,
            )  # fmt: skip
            filter_at = filters_at(weight, b, t_halo, h, weight_batch, weight_time, weight_head, PER_BATCH, PER_TIME)
            w_halo, p_halo, factor_halo = filter_rows(
                filter_at, seed, b, t_halo, h, j, alive_halo, K, left, dilation, t_begin_halo, t_end_halo, threshold,
                scale, weight_tap,
                SOFTMAX, RENORMALIZE, DROPOUT, HAS_STATE, PER_BATCH, PER_TIME, tl.float32,
            )  # fmt: skip
            pairs = tl.zeros([BT, BT], tl.float32)
            pairs_halo = tl.zeros([BT, HALO], tl.float32)
        mask_at = mask + b.to(tl.int64) * mask_batch
        bad_filters = tl.sum((~splittable(w)).to(tl.int32)) + tl.sum((~splittable(w_halo)).to(tl.int32))
        for piece in tl.range(first_piece, last_piece):
            inner = piece * BC + tl.arange(0, BC)[None, :]
            c, columns = h * R + inner, inner < R
            dy_at = columns_at(grad, b, c, dy_batch, dy_channel)
            x_at = columns_at(x, b, c, x_batch, x_channel)
            gate_at = columns_at(gate, b, c, gate_batch, gate_channel)
            states_at = state_at(state, b, c, 0, 0, C, span, 1)
            dy = load_rows(dy_at, t, alive & columns, dy_time, tl.float32)
            dy_halo = load_rows(dy_at, t_halo, alive_halo & columns, dy_time, tl.float32)
            inside = (s >= 0) & (s < T) & columns
            wanted = unmasked(mask_at, s, inside, mask_time, HAS_MASK)
            if NEED_X or NEED_GATE or NEED_STATE:
                spread = bad_filters + tl.sum((~splittable(dy)).to(tl.int32))
                spread += tl.sum((~splittable(dy_halo)).to(tl.int32))
                dz = tl.zeros([BT, BC], tl.float32)
                if spread == 0:
                    dz = product(tl.trans(take(w_halo, tap_halo, on_halo)), dy_halo, dz, 3, PARTS)
                    dz = product(tl.trans(take(w, tap, on)), dy, dz, 3, PARTS)
                else:
                    for far in tl.range(0, K):
                        at = target(s, far, left, dilation)
                        reached = (at >= begin) & (at < end) & (at >= 0) & (at < T)
                        at_number, at_begin, at_end = sequence_of(at, T, cu_seqlens, sequences, search_steps, PACKED)
                        filter_there = filters_at(
                            weight, b, at, h, weight_batch, weight_time, weight_head, PER_BATCH, PER_TIME
                        )
                        filters_there, p_there, factor_there = filter_rows(
                            filter_there, seed, b, at, h, j, reached, K, left, dilation, at_begin, at_end, threshold,
                            scale, weight_tap,
                            SOFTMAX, RENORMALIZE, DROPOUT, HAS_STATE, PER_BATCH, PER_TIME, tl.float32,
                        )  # fmt: skip
                        value = tl.sum(tl.where(j == far, filters_there, 0.0), 1)[:, None]
                        dz += value * load_rows(dy_at, at, reached & columns, dy_time, tl.float32)
                dx_at = columns_at(grad_x, b, c, dx_batch, dx_channel)
                dgate_at = columns_at(grad_gate, b, c, dgate_batch, dgate_channel)
                store_input_gradient(
                    dz, x_at, gate_at, dx_at, dgate_at, s, inside, wanted, x_time, gate_time, dx_time, dgate_time,
                    HAS_GATE, NEED_X, NEED_GATE, tl.float32,
                )  # fmt: skip
                if NEED_STATE:
                    at = grad_state + (b.to(tl.int64) * span + span + s) * C + c
                    tl.store(at, narrow(dz, grad_state.dtype.element_ty), mask=(s < 0) & (s >= -span) & columns)
            if NEED_BIAS:
                # Rows of d(y) at the tile's own positions.
                if PER_ROW:
                    own_grad = load_rows(dy_at, s, inside, dy_time, tl.float32)
                    at = biases + (owner.to(tl.int64) * groups + tile) * C + c
                    tl.store(at, tl.sum(own_grad, 0)[None, :], mask=columns)
                else:
                    shift = K - 1 - left // dilation
                    mine, mine_halo = (q >= shift) & (q < shift + BT), (q_halo >= shift) & (q_halo < shift + BT)
                    bias_sum += tl.sum(tl.where(mine, dy, 0.0), 0)[None, :]
                    bias_sum += tl.sum(tl.where(mine_halo, dy_halo, 0.0), 0)[None, :]
            if NEED_FILTER:
                if PER_ROW:
                    own_grad = load_rows(dy_at, s, inside, dy_time, tl.float32)
                    first = source(start, 0, left, dilation)
                    z = load_input(
                        x_at, gate_at, mask_at, states_at, first + dilation * q, columns, 0, T, C, span,
                        x_time, gate_time, mask_time,
                        HAS_GATE, HAS_MASK, HAS_STATE, tl.float32,
                    )  # fmt: skip
                    pairs = product(own_grad, tl.trans(z), pairs, PARTS, Z_PARTS)
                    z = load_input(
                        x_at, gate_at, mask_at, states_at, first + dilation * q_halo, columns & in_window, 0, T, C,
                        span, x_time, gate_time, mask_time,
                        HAS_GATE, HAS_MASK, HAS_STATE, tl.float32,
                    )  # fmt: skip
                    pairs_halo = product(own_grad, tl.trans(z), pairs_halo, PARTS, Z_PARTS)
                else:
                    z = load_input(
                        x_at, gate_at, mask_at, states_at, s, columns, 0, T, C, span,
                        x_time, gate_time, mask_time,
                        HAS_GATE, HAS_MASK, HAS_STATE, tl.float32,
                    )  # fmt: skip
                    if PACKED:
                        met = product(dy, tl.trans(z), tl.zeros([BT, BT], tl.float32), PARTS, Z_PARTS)
                        pairs += tl.where(on, met, 0.0)
                        met = product(dy_halo, tl.trans(z), tl.zeros([HALO, BT], tl.float32), PARTS, Z_PARTS)
                        pairs_halo += tl.where(on_halo, met, 0.0)
                    else:
                        pairs = product(dy, tl.trans(z), pairs, PARTS, Z_PARTS)
                        pairs_halo = product(dy_halo, tl.trans(z), pairs_halo, PARTS, Z_PARTS)
        if NEED_FILTER and PER_ROW:
            rows = (s >= 0) & (s < T)
            filter_at = filters_at(weight, b, s, h, weight_batch, weight_time, weight_head, PER_BATCH, PER_TIME)
            w, p, factor = filter_rows(
                filter_at, seed, b, s, h, j, rows, K, left, dilation, begin, end, threshold, scale, weight_tap,
                SOFTMAX, RENORMALIZE, DROPOUT, HAS_STATE, PER_BATCH, PER_TIME, tl.float32,
            )  # fmt: skip
            here = rows & (j < K)
            if PACKED:
                here = here & tap_exists(s, j, left, dilation, begin, end, False)
            d = take(pairs, m + j, here & (m + j < BT))
            d += take(pairs_halo, m + j - BT, here & (m + j >= BT))
            d *= factor
            if SOFTMAX:
                d = p * (d - tl.sum(p * d, 1)[:, None])
            if PER_TIME:
                at = grad_weight + ((b.to(tl.int64) * T + s) * H + h) * K + j
                tl.store(at, narrow(d, grad_weight.dtype.element_ty), mask=rows & (j < K))
            else:
                row_sum += tl.sum(tl.where(rows & (j < K), d, 0.0), 0)[None, :]
    partial = owner.to(tl.int64) * groups + group
    if NEED_FILTER and not PER_TIME:
        if not PER_ROW:
            back = j - (K - 1)
            met = take(pairs, q + back, (j < K) & (q + back >= 0) & (q + back < BT))
            row_sum += tl.sum(met, 0)[None, :]
            met = take(pairs_halo, q_halo + back, (j < K) & (q_halo + back >= 0) & (q_halo + back < BT))
            row_sum += tl.sum(met, 0)[None, :]
        tl.store(filters + (partial * units + unit) * K + j, row_sum, mask=j < K)
    if NEED_BIAS and not PER_ROW:
        inner = first_piece * BC + tl.arange(0, BC)[None, :]
        tl.store(biases + partial * C + h * R + inner, bias_sum, mask=inner < R)


@triton.jit
def reduce_filters(
    filters, weight, seed, grad_weight, groups, H, pieces, threshold, scale,
    weight_batch, weight_time, weight_head, weight_tap,
    K: tl.constexpr, SOFTMAX: tl.constexpr, DROPOUT: tl.constexpr, FINISHED: tl.constexpr, PER_BATCH: tl.constexpr,
    DTYPE: tl.constexpr, BR: tl.constexpr, KP: tl.constexpr,
):  # fmt: skip
    """grad_weight[owner, h] from partial sums [owner, group, h, piece, K]: their sum in fixed order, then dropout and
    softmax unless the rows have been through these already (FINISHED)."""
    pid = tl.program_id(0)
    h, owner = pid % H, pid // H
    j = tl.arange(0, KP)[None, :]
    total = tl.zeros([BR, KP], DTYPE)
    for first in tl.range(0, groups * pieces, BR):
        row = first + tl.arange(0, BR)[:, None]
        at = ((owner.to(tl.int64) * groups + row // pieces) * H + h) * pieces + row % pieces
        total += tl.load(filters + at * K + j, mask=(row < groups * pieces) & (j < K), other=0.0)
    d = tl.sum(total, 0)[None, :]
    if not FINISHED:
        filter_at = filters_at(weight, owner, owner, h, weight_batch, weight_time, weight_head, PER_BATCH, False)
        w, p, factor = filter_rows(
            filter_at, seed, owner, owner, h, j, j >= 0, K, 0, 1, 0, 0, threshold, scale, weight_tap,
            SOFTMAX, False, DROPOUT, False, PER_BATCH, False, DTYPE,
        )  # fmt: skip
        d *= factor
        if SOFTMAX:
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
    grad, biases, T, C, row_blocks, c_blocks, groups, dy_batch, dy_time, dy_channel,
    DTYPE: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Partial sums over positions of d(y), where no tap reads its own position and ``grad_tile`` cannot add them up."""
    pid = tl.program_id(0)
    c = (pid % c_blocks) * BC + tl.arange(0, BC)[None, :]
    group = pid // c_blocks
    total = tl.zeros([BT, BC], DTYPE)
    for block in tl.range(group, row_blocks, groups):
        row_tiles = tl.cdiv(T, BT)
        t = (block % row_tiles) * BT + tl.arange(0, BT)[:, None]
        dy_at = columns_at(grad, block // row_tiles, c, dy_batch, dy_channel)
        total += load_rows(dy_at, t, (t < T) & (c < C), dy_time, DTYPE)
    tl.store(biases + group.to(tl.int64) * C + c, tl.sum(total, 0)[None, :], mask=c < C)
