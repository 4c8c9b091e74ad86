"""Forward kernels and the decoding step.

``conv_tile`` adds up shifted tiles of the input, tap by tap; it serves every problem. ``conv_band`` multiplies a window
of the input, read once, by the banded matrix of a head's filters; it serves heads of 16 channels and more.
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
    narrow,
    product,
    sequence_of,
    sigmoid,
    source,
    splittable,
    state_at,
    take,
    tap_exists,
    widen,
)


@triton.jit
def conv_tile(
    x, weight, seed, bias, gate, mask, cu_seqlens, state, y,
    T, C, R, left, dilation, t_blocks, c_blocks, sequences, search_steps, threshold, scale,
    x_batch, x_time, x_channel, weight_batch, weight_time, weight_head, weight_tap,
    gate_batch, gate_time, gate_channel, mask_batch, mask_time, y_batch, y_time, y_channel,
    K: tl.constexpr, SOFTMAX: tl.constexpr, RENORMALIZE: tl.constexpr, DROPOUT: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_GATE: tl.constexpr, HAS_MASK: tl.constexpr, PACKED: tl.constexpr, HAS_STATE: tl.constexpr,
    PER_BATCH: tl.constexpr, PER_TIME: tl.constexpr, DTYPE: tl.constexpr,
    BT: tl.constexpr, BC: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """y[b, t, c] for BT positions and BC channels: one shifted tile of z per tap, from the first-level cache."""
    pid = tl.program_id(0)
    block, b = (pid // c_blocks) % t_blocks, pid // c_blocks // t_blocks
    t = block * BT + tl.arange(0, BT)[:, None]
    c = (pid % c_blocks) * BC + tl.arange(0, BC)[None, :]
    h, columns, inside = c // R, c < C, (t < T) & (c < C)
    number, begin, end = sequence_of(t, T, cu_seqlens, sequences, search_steps, PACKED)
    span = (K - 1) * dilation
    PER_ROW: tl.constexpr = PER_TIME or RENORMALIZE
    exists = inside if PER_ROW else columns
    filter_t = t if PER_ROW else tl.zeros([1, 1], tl.int32)
    at = filters_at(weight, b, filter_t, h, weight_batch, weight_time, weight_head, PER_BATCH, PER_TIME)
    most, inverse = filter_statistics(
        at, filter_t, exists, K, left, dilation, begin, end, weight_tap, SOFTMAX, RENORMALIZE, HAS_STATE, DTYPE
    )
    x_at = columns_at(x, b, c, x_batch, x_channel)
    gate_at = columns_at(gate, b, c, gate_batch, gate_channel)
    mask_at = mask + b.to(tl.int64) * mask_batch
    states_at = state_at(state, b, c, number, begin, C, span, sequences)
    total = tl.zeros([BT, BC], DTYPE)
    for j in tl.range(0, K, loop_unroll_factor=UNROLL):
        w, p, factor = filter_tap(
            at, seed, b, filter_t, h, j, exists, most, inverse, left, dilation, begin, end, threshold, scale,
            weight_tap, SOFTMAX, RENORMALIZE, DROPOUT, HAS_STATE, PER_BATCH, PER_TIME, DTYPE,
        )  # fmt: skip
        total += w * load_input(
            x_at, gate_at, mask_at, states_at, source(t, j, left, dilation), inside, begin, end, C, span,
            x_time, gate_time, mask_time, HAS_GATE, HAS_MASK, HAS_STATE, DTYPE,
        )  # fmt: skip
    if HAS_BIAS:
        total += widen(tl.load(bias + c, mask=columns, other=0.0), DTYPE)
    at = columns_at(y, b, c, y_batch, y_channel) + t.to(tl.int64) * y_time
    tl.store(at, narrow(total, y.dtype.element_ty), mask=inside)


@triton.jit
def conv_band(
    x, weight, seed, bias, gate, mask, cu_seqlens, state, y,
    T, C, R, left, dilation, t_blocks, c_blocks, heads, sequences, search_steps, threshold, scale,
    x_batch, x_time, x_channel, weight_batch, weight_time, weight_head, weight_tap,
    gate_batch, gate_time, gate_channel, mask_batch, mask_time, y_batch, y_time, y_channel,
    K: tl.constexpr, SOFTMAX: tl.constexpr, RENORMALIZE: tl.constexpr, DROPOUT: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_GATE: tl.constexpr, HAS_MASK: tl.constexpr, PACKED: tl.constexpr, HAS_STATE: tl.constexpr,
    PER_BATCH: tl.constexpr, PER_TIME: tl.constexpr,
    BT: tl.constexpr, HALO: tl.constexpr, BC: tl.constexpr, KP: tl.constexpr, TILES: tl.constexpr,
    Z_PARTS: tl.constexpr,
):  # fmt: skip
    """y = W z for TILES tiles of BT positions that lie ``dilation`` apart and BC channels of one head. Row m of W holds
    the filter of position m from column m on; the window of z has BT + HALO >= BT + K - 1 rows. A tile with an infinite
    or NaN element, which the zeros of W would spread, is summed tap by tap instead."""
    pid = tl.program_id(0)
    block, b = (pid // c_blocks) % t_blocks, pid // c_blocks // t_blocks
    pieces = c_blocks // heads
    h = (pid % c_blocks) // pieces
    first_channel = (pid % pieces) * BC
    c = h * R + first_channel + tl.arange(0, BC)[None, :]
    columns = first_channel + tl.arange(0, BC)[None, :] < R
    phase_tiles = t_blocks // dilation
    phase = block // phase_tiles
    m = tl.arange(0, BT)[:, None]
    q, q_halo = tl.arange(0, BT)[None, :], BT + tl.arange(0, HALO)[None, :]
    rows, rows_halo = tl.arange(0, BT)[:, None], BT + tl.arange(0, HALO)[:, None]
    j = tl.arange(0, KP)[None, :]
    span = (K - 1) * dilation
    PER_ROW: tl.constexpr = PER_TIME or RENORMALIZE
    x_at = columns_at(x, b, c, x_batch, x_channel)
    gate_at = columns_at(gate, b, c, gate_batch, gate_channel)
    y_at = columns_at(y, b, c, y_batch, y_channel)
    mask_at = mask + b.to(tl.int64) * mask_batch
    states_at = state_at(state, b, c, 0, 0, C, span, 1)
    if not PER_ROW:
        at = filters_at(weight, b, b, h, weight_batch, weight_time, weight_head, PER_BATCH, False)
        w, p, factor = filter_rows(
            at, seed, b, b, h, j, j >= 0, K, left, dilation, 0, T, threshold, scale, weight_tap,
            SOFTMAX, RENORMALIZE, DROPOUT, HAS_STATE, PER_BATCH, PER_TIME, tl.float32,
        )  # fmt: skip
        w = tl.broadcast_to(w, [BT, KP])
    for step in tl.range(0, TILES):
        start = phase + dilation * (((block % phase_tiles) * TILES + step) * BT)
        t = start + dilation * m
        number, begin, end = sequence_of(t, T, cu_seqlens, sequences, search_steps, PACKED)
        if PER_ROW:
            at = filters_at(weight, b, t, h, weight_batch, weight_time, weight_head, PER_BATCH, PER_TIME)
            w, p, factor = filter_rows(
                at, seed, b, t, h, j, t < T, K, left, dilation, begin, end, threshold, scale, weight_tap,
                SOFTMAX, RENORMALIZE, DROPOUT, HAS_STATE, PER_BATCH, PER_TIME, tl.float32,
            )  # fmt: skip
        z = load_input(
            x_at, gate_at, mask_at, states_at, source(start, rows, left, dilation), columns, 0, T, C, span,
            x_time, gate_time, mask_time, HAS_GATE, HAS_MASK, HAS_STATE, tl.float32,
        )  # fmt: skip
        z_halo = load_input(
            x_at, gate_at, mask_at, states_at, source(start, rows_halo, left, dilation),
            columns & (rows_halo < BT + K - 1), 0, T, C, span,
            x_time, gate_time, mask_time, HAS_GATE, HAS_MASK, HAS_STATE, tl.float32,
        )  # fmt: skip
        spread = tl.sum((~splittable(z)).to(tl.int32)) + tl.sum((~splittable(z_halo)).to(tl.int32))
        spread += tl.sum((~splittable(w)).to(tl.int32))
        total = tl.zeros([BT, BC], tl.float32)
        if spread == 0:
            on = (q - m >= 0) & (q - m < K)
            on_halo = (q_halo - m >= 0) & (q_halo - m < K)
            if PACKED:
                on = on & tap_exists(start, q, left, dilation, begin, end, False)
                on_halo = on_halo & tap_exists(start, q_halo, left, dilation, begin, end, False)
            total = product(take(w, q_halo - m, on_halo), z_halo, total, 3, Z_PARTS)
            total = product(take(w, q - m, on), z, total, 3, Z_PARTS)
        else:
            for tap in tl.range(0, K):
                total += tl.sum(tl.where(j == tap, w, 0.0), 1)[:, None] * load_input(
                    x_at, gate_at, mask_at, states_at, source(t, tap, left, dilation), columns, begin, end, C, span,
                    x_time, gate_time, mask_time, HAS_GATE, HAS_MASK, HAS_STATE, tl.float32,
                )  # fmt: skip
        if HAS_BIAS:
            total += widen(tl.load(bias + c, mask=columns, other=0.0), tl.float32)
        tl.store(y_at + t.to(tl.int64) * y_time, narrow(total, y.dtype.element_ty), mask=(t < T) & columns)


@triton.jit
def conv_step(
    x, state, weight, bias, gate, state_index, position, scratch, y,
    B, C, R, dilation, position_stride, x_batch, x_channel, weight_batch, weight_head, weight_tap,
    gate_batch, gate_channel, y_batch, y_channel,
    K: tl.constexpr, SOFTMAX: tl.constexpr, RENORMALIZE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_GATE: tl.constexpr,
    INDEXED: tl.constexpr, HAS_POSITION: tl.constexpr, PER_BATCH: tl.constexpr, DTYPE: tl.constexpr,
    BC: tl.constexpr, KP: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """One position of every row, and the shift of its state. Rows that continue from each other's states share a
    program: new states go to ``scratch`` and move when the last old one has been read. Channels lie along the first
    axis of all tiles, taps or rows of the state along the second."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)[:, None]
    columns, h = c < C, c // R
    j, r = tl.arange(0, KP)[None, :], tl.arange(0, BS)[None, :]
    span = (K - 1) * dilation
    first = tl.program_id(1)
    for index in tl.range(0, B if INDEXED else 1):
        b = first + index  # there is one program for all rows, or one per row
        row = tl.load(state_index + b) if INDEXED else b
        old = state + row.to(tl.int64) * span * C + c
        z = widen(tl.load(columns_at(x, b, c, x_batch, x_channel), mask=columns, other=0.0), DTYPE)
        if HAS_GATE:
            at = columns_at(gate, b, c, gate_batch, gate_channel)
            z *= sigmoid(widen(tl.load(at, mask=columns, other=0.0), DTYPE))
        # The new position is ``before``, and tap j reads position source(before, j); rows of the state that lie before
        # position 0 do not exist.
        before = span
        if HAS_POSITION:
            before = tl.minimum(tl.load(position + b * position_stride), span).to(tl.int32)
        at = filters_at(weight, b, b, h, weight_batch, 0, weight_head, PER_BATCH, False)
        w, p, factor = filter_rows(
            at, x, b, before, h, j, columns, K, span, dilation, 0, before + 1, 0, 0, weight_tap,
            SOFTMAX, RENORMALIZE, False, False, PER_BATCH, False, DTYPE,
        )  # fmt: skip
        window = tl.load(old + j.to(tl.int64) * dilation * C, mask=columns & (j < K - 1), other=0.0)
        total = tl.sum(w * tl.where(j == K - 1, z, widen(window, DTYPE)), 1)[:, None]
        if HAS_BIAS:
            total += widen(tl.load(bias + c, mask=columns, other=0.0), DTYPE)
        y_at = columns_at(y, b, c, y_batch, y_channel)
        tl.store(y_at, narrow(total, y.dtype.element_ty), mask=columns)
        new = (scratch if INDEXED else state) + b.to(tl.int64) * span * C + c
        for start in tl.range(0, span - 1, BS):
            rows = (start + r).to(tl.int64)
            moved = columns & (rows < span - 1)
            value = tl.load(old + (rows + 1) * C, mask=moved)
            tl.debug_barrier()  # no row is overwritten before every thread has read
            tl.store(new + rows * C, value, mask=moved)
        if K > 1:
            tl.debug_barrier()  # with one row there was nothing to move
            tl.store(new + (span - 1) * C, narrow(z, y.dtype.element_ty), mask=columns)
    if INDEXED:
        tl.debug_barrier()  # what other threads of the program wrote
        for start in tl.range(0, B * span, BS):
            at = (start + r).to(tl.int64) * C + c
            inside = (start + r < B * span) & columns
            tl.store(state + at, tl.load(scratch + at, mask=inside), mask=inside)
