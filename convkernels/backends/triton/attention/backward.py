"""The backward kernels of attention: once over the scores for the queries' gradients, once for the keys'.

Each pass finds the scores again from lse. Its programs own what they sum: the gradients of a tile of queries (or keys)
in registers, sums of tables in memory of their own, which ``sum_partials`` adds in a fixed order. Nothing is added
atomically, so results are equal bit for bit, always.
"""

import triton
import triton.language as tl

from ..conv.taps import narrow, number_from_bits, take, widen
from .tiles import (
    CLIP,
    LOG2E,
    MASK,
    VARYING,
    ZERO,
    bias_of_pairs,
    convolved,
    exact_matrix,
    far_tile,
    finite_rows,
    first_offset,
    head_at,
    kept_pairs,
    key_columns,
    load_columns,
    load_tile,
    matrix,
    near_tile,
    query_columns,
    query_edge,
    real_keys,
    sequence_tile,
    table_columns,
    tile_column,
    tile_ranges,
    visible_pairs,
)


@triton.jit(do_not_specialize=VARYING)
def prepare_rows(
    grad, out, q, v, rel_query, query_rel, bias, value_conv, conv_bias, conv_scale, key_mask, cu_q, cu_k,
    lse, grad_lse, constants,
    T, S, H, sharing, left, right, slots, sequences, search_steps, table_scale, plane,
    g_batch, g_time, g_head, g_channel, o_batch, o_time, o_head, o_channel, q_batch, q_time, q_head, q_channel,
    v_batch, v_time, v_head, v_channel, r_batch, r_time, r_head, r_channel, query_rel_head, mask_batch, mask_time,
    D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, CAUSAL: tl.constexpr, OUTSIDE: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_QUERY_REL: tl.constexpr, HAS_CONV: tl.constexpr,
    HAS_CONV_BIAS: tl.constexpr, HAS_CONV_SCALE: tl.constexpr, HAS_MASK: tl.constexpr, PACKED: tl.constexpr,
    DROPS_ALL: tl.constexpr, HAS_GRAD_LSE: tl.constexpr, EDGES: tl.constexpr, DTYPE: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """What both passes need to know of each query, constants[n, b, h, i]: 0 delta, the gradient that all its scores
    share; 1 what to take from a score before the exponential; 2 and 3 the same for pairs before and behind the window,
    whose columns it contains. 1 to 3 are infinite if the query sees nothing, and NaN if its gradient is not finite and
    other pairs of its tiles are hidden: both passes then load 0 for it."""
    pid = tl.program_id(0)
    slot, h, b = pid % slots, pid // slots % H, pid // slots // H
    first, begin, end, k_begin, k_end = sequence_tile(slot, T, S, cu_q, cu_k, sequences, search_steps, PACKED, BM)
    i, d = first + tl.arange(0, BM), tl.arange(0, DP)
    rows = (i >= begin) & (i < end)
    W = left + right + 1
    result = load_tile(head_at(out, b, h, o_batch, o_head), first, d, rows, o_time, o_channel, D, False)
    dy = load_tile(head_at(grad, b, h, g_batch, g_head), first, d, rows, g_time, g_channel, D, False)
    attended = widen(result, DTYPE)
    if HAS_CONV:
        attended -= convolved(
            head_at(v, b, h // sharing, v_batch, v_head), key_mask + b.to(tl.int64) * mask_batch,
            value_conv + h.to(tl.int64) * D * W, conv_bias + h * D, conv_scale + h, first + k_end - end, rows,
            k_begin, k_end, left, W, v_time, v_channel, mask_time,
            D, DP, CAUSAL, HAS_MASK, HAS_CONV_BIAS, HAS_CONV_SCALE, DTYPE,
        )  # fmt: skip
    delta = tl.sum(widen(dy, DTYPE) * attended, 1)
    if DROPS_ALL:
        delta = tl.zeros([BM], DTYPE)  # what remains of out is the rounding of the depthwise term
    row = (b.to(tl.int64) * H + h) * T + i
    found = tl.load(lse + row, mask=rows, other=0.0)
    empty = found == float("-inf")
    if HAS_GRAD_LSE:
        delta -= tl.load(grad_lse + row, mask=rows, other=0.0)
    # A query that sees nothing passes nothing on, not even a NaN of grad_lse.
    tl.store(constants + row, tl.where(empty, 0.0, delta), mask=rows)
    start = found * LOG2E
    if CAUSAL or OUTSIDE == MASK:
        start += finite_rows(dy, DTYPE)[1]
    start = tl.where(empty, float("inf"), start)
    tl.store(constants + plane + row, start, mask=rows)
    if EDGES:
        at = head_at(rel_query, b, h, r_batch, r_head)
        r = load_tile(at, first, tl.arange(0, RP), rows, r_time, r_channel, R, False)
        table, bias_row = query_rel + h.to(tl.int64) * query_rel_head, bias + h.to(tl.int64) * W
        rel_scale = number_from_bits(table_scale, DTYPE)
        edge = query_edge(r, table, bias_row, 0, W, rel_scale, R, HAS_BIAS, HAS_QUERY_REL, DTYPE)
        tl.store(constants + 2 * plane + row, tl.where(empty, float("inf"), start - edge), mask=rows)
        edge = query_edge(r, table, bias_row, W - 1, W, rel_scale, R, HAS_BIAS, HAS_QUERY_REL, DTYPE)
        tl.store(constants + 3 * plane + row, tl.where(empty, float("inf"), start - edge), mask=rows)


# -- sums of tables: memory that one program alone reads and writes ---


@triton.jit
def add_to_columns(sums, row, column, value, valid, W, ROWS: tl.constexpr):
    """sums[row, column] += value for the rows of a table and the columns that are ``valid``, each of them once."""
    at = sums + (row[:, None] * W + column[None, :])
    inside = (row < ROWS)[:, None] & valid[None, :]
    tl.debug_barrier()  # another thread of the program may have written them
    tl.store(at, tl.load(at, mask=inside, other=0.0) + value, mask=inside)


@triton.jit
def add_products(
    sums, x, at, first, keep, row_stride, column_stride, columns, column, valid, W,
    ROWS: tl.constexpr, PIECE: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The same for the product of the transposed tile x, which begins at row ``first``, with its ``columns``; PIECE
    rows of the table at a time, since those of wide ones do not all fit into registers."""
    if PIECE >= x.shape[1]:
        found = matrix(tl.trans(x), columns, tl.zeros([x.shape[1], columns.shape[1]], DTYPE))
        add_to_columns(sums, tl.arange(0, x.shape[1]), column, found, valid, W, ROWS)
    else:
        for first_row in tl.range(0, x.shape[1], PIECE, disable_licm=True):
            row = first_row + tl.arange(0, PIECE)
            piece = load_tile(at, first, row, keep, row_stride, column_stride, ROWS, False)
            found = matrix(tl.trans(piece), columns, tl.zeros([PIECE, columns.shape[1]], DTYPE))
            add_to_columns(sums, row, column, found, valid, W, ROWS)


@triton.jit
def add_to_bias(sums, column, value, valid):
    """The same for a single row."""
    tl.debug_barrier()
    tl.store(sums + column, tl.load(sums + column, mask=valid, other=0.0) + value, mask=valid)


@triton.jit
def add_to_edge(sums, row, column, value, W, ROWS: tl.constexpr):
    """The same for a single column."""
    at = sums + (row * W + column)
    tl.debug_barrier()
    tl.store(at, tl.load(at, mask=row < ROWS, other=0.0) + value, mask=row < ROWS)


@triton.jit
def with_edges(columns, before, after, W):
    """Columns of a whole table, and what belongs to the outermost ones from beyond the window."""
    a = tl.arange(0, columns.shape[1])[None, :]
    return columns + tl.where(a == 0, before[:, None], 0.0) + tl.where(a == W - 1, after[:, None], 0.0)


# -- queries ---


@triton.jit(do_not_specialize=VARYING)
def grad_queries(
    grad, q, k, v, rel_query, query_rel, bias, key_rel, key_edges, constants, key_mask, cu_q, cu_k, seed,
    grad_q, grad_rel_query, query_sums, bias_sums,
    T, S, B, H, sharing, left, right, slots, groups, sequences, search_steps, scale, rel_scale, score_scale,
    table_scale, threshold, keep_scale, plane, edge_plane,
    g_batch, g_time, g_head, g_channel, q_batch, q_time, q_head, q_channel, k_batch, k_time, k_head, k_channel,
    v_batch, v_time, v_head, v_channel, r_batch, r_time, r_head, r_channel, dq_batch, dq_time, dq_head, dq_channel,
    dr_batch, dr_time, dr_head, dr_channel, query_rel_head, key_rel_head, mask_batch, mask_time,
    D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, QK: tl.constexpr, NEGATIVE: tl.constexpr,
    CAUSAL: tl.constexpr, OUTSIDE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_QUERY_REL: tl.constexpr,
    HAS_REL_QUERY: tl.constexpr, HAS_KEY_REL: tl.constexpr, HAS_MASK: tl.constexpr, PACKED: tl.constexpr,
    DROPOUT: tl.constexpr, NEED_QUERY: tl.constexpr, NEED_REL_QUERY: tl.constexpr, NEED_TABLE: tl.constexpr,
    NEED_BIAS: tl.constexpr, DTYPE: tl.constexpr, SLIDING: tl.constexpr, WIDTH: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, NEAR: tl.constexpr, NEAR_STAGES: tl.constexpr, IN_REGISTERS: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """grad_q and grad_rel_query for every ``groups``-th tile of BM queries of a head, and the sums over these for
    query_rel, query_sums[h, b, group, R, W], and bias, bias_sums[h, b, group, W]."""
    QUERY_TERMS: tl.constexpr = HAS_BIAS or HAS_QUERY_REL
    # Whether the query's table is met again on the way back: by q itself, or by rel_query.
    NEED_R: tl.constexpr = HAS_QUERY_REL and (NEED_REL_QUERY if HAS_REL_QUERY else NEED_QUERY)
    COLUMNS: tl.constexpr = NEED_R or NEED_TABLE or NEED_BIAS
    EDGES: tl.constexpr = OUTSIDE == CLIP
    HIDING: tl.constexpr = CAUSAL or OUTSIDE == MASK
    pid = tl.program_id(0)
    group, h, b = pid % groups, pid // groups % H, pid // groups // H
    W = left + right + 1
    d, x = tl.arange(0, DP), tl.arange(0, RP)
    key_scale, by_table = number_from_bits(score_scale, DTYPE), number_from_bits(table_scale, DTYPE)
    positive = -key_scale if NEGATIVE else key_scale
    keep_factor = number_from_bits(keep_scale, DTYPE)
    query_table, bias_row = query_rel + h.to(tl.int64) * query_rel_head, bias + h.to(tl.int64) * W
    key_table = key_rel + h.to(tl.int64) * key_rel_head
    program = (h.to(tl.int64) * B + b) * groups + group
    table_sums, row_sums = query_sums + program * R * W, bias_sums + program * W
    k_at = head_at(k, b, h // sharing, k_batch, k_head)
    v_at = head_at(v, b, h // sharing, v_batch, v_head)
    mask_at = key_mask + b.to(tl.int64) * mask_batch
    row_at = constants + (b.to(tl.int64) * H + h) * T
    edges_at = key_edges + (b.to(tl.int64) * H + h) * S
    for step in tl.range(group, slots, groups, disable_licm=True):
        slot = step
        if CAUSAL:
            slot = slots - 1 - step
        first, begin, end, k_begin, k_end = sequence_tile(slot, T, S, cu_q, cu_k, sequences, search_steps, PACKED, BM)
        shift = k_end - end
        i = first + tl.arange(0, BM)
        rows, place = (i >= begin) & (i < end), i + shift
        q_at, g_at = head_at(q, b, h, q_batch, q_head), head_at(grad, b, h, g_batch, g_head)
        r_at = head_at(rel_query, b, h, r_batch, r_head)
        delta = tl.load(row_at + i, mask=rows, other=0.0)
        start = tl.load(row_at + plane + i, mask=rows, other=float("inf"))
        live = tl.abs(start) < float("inf")
        queries = load_tile(q_at, first, d, live, q_time, q_channel, D, False)
        dy = load_tile(g_at, first, d, live, g_time, g_channel, D, False)
        total = tl.zeros([BM, DP], DTYPE)
        sum_before, sum_after = tl.zeros([BM], DTYPE), tl.zeros([BM], DTYPE)
        t0, t1, t2, t3, t4, t5 = tile_ranges(
            first, begin, end, k_begin, k_end, shift, left, right, 1 if CAUSAL else 0, OUTSIDE,
            QUERY_TERMS or HAS_KEY_REL, BM, BN, NEAR,
        )  # fmt: skip

        before, after = start, start
        if QUERY_TERMS and EDGES:
            before = tl.load(row_at + 2 * plane + i, mask=rows, other=float("inf"))
            after = tl.load(row_at + 3 * plane + i, mask=rows, other=float("inf"))
        for n in tl.range(0, (t2 - t1 + t4 - t3) // (BN // NEAR), disable_licm=not IN_REGISTERS):
            tile, is_before = far_tile(n, t1, t2, t3, BN // NEAR)
            j = tile * BN + tl.arange(0, BN)
            keep = j >= 0
            if HAS_MASK:
                keep = real_keys(mask_at, j, k_begin, k_end, mask_time, True)
            scores = tl.zeros([BM, BN], DTYPE)
            if QK:
                keys = load_tile(k_at, tile * BN, d, keep, k_time, k_channel, D, not HAS_MASK)
                scores = matrix(queries, tl.trans(keys), scores)
                if NEGATIVE:
                    scores = -scores
            scores *= positive
            if HAS_KEY_REL and EDGES:
                scores += tl.load(edges_at + tl.where(is_before, 0, edge_plane) + j)[None, :]
            power = tl.exp2(scores - tl.where(is_before, before, after)[:, None])
            if HAS_MASK:
                power = tl.where(keep[None, :], power, 0.0)
            values = load_tile(v_at, tile * BN, d, keep, v_time, v_channel, D, not HAS_MASK)
            found = matrix(dy, tl.trans(values), tl.zeros([BM, BN], DTYPE))
            if DROPOUT:
                kept = kept_pairs(seed, b, h, i, tile * BN, threshold, BN, False)
                found = tl.where(kept, found * keep_factor, 0.0)
            found = power * (found - delta[:, None])
            if COLUMNS and EDGES:
                sums = tl.sum(found, 1)
                sum_before += tl.where(is_before, sums, 0.0)
                sum_after += tl.where(is_before, 0.0, sums)
            if NEED_QUERY and QK:
                total = matrix(narrow(found, keys.dtype), keys, total)

        if IN_REGISTERS:
            # Products of another shape have their operands in other registers: read again, none is held for both loops.
            tl.debug_barrier()
            queries = load_tile(q_at, first, d, live, q_time, q_channel, D, False)
            dy = load_tile(g_at, first, d, live, g_time, g_channel, D, False)
        r = queries
        if HAS_QUERY_REL:
            r = load_tile(r_at, first, x, live, r_time, r_channel, R, False)
        r_total = tl.zeros([BM, RP], DTYPE)
        base = first_offset(first, 0, shift, left, BM, False)
        column, valid = table_columns(base, left, right, WIDTH, False, OUTSIDE)
        columns = tl.zeros([BM, WIDTH], DTYPE)
        if HAS_QUERY_REL and not SLIDING:
            by_query = query_columns(r, query_table, bias_row, column, valid, W, by_table, R, HAS_BIAS, False, DTYPE)
        for n in tl.range(0, t1 - t0 + t3 - t2 + t5 - t4, num_stages=NEAR_STAGES, disable_licm=True):
            tile = near_tile(n, t0, t1, t2, t3, t4)
            j = tile * NEAR + tl.arange(0, NEAR)
            keep = real_keys(mask_at, j, k_begin, k_end, mask_time, HAS_MASK)
            scores = tl.zeros([BM, NEAR], DTYPE)
            if QK or HAS_KEY_REL:
                keys = load_tile(k_at, tile * NEAR, d, keep, k_time, k_channel, D, False)
            if HIDING and NEED_QUERY and QK:
                keys, bad = finite_rows(keys, DTYPE)
            if QK:
                scores = matrix(queries, tl.trans(keys), scores) * key_scale
            if HIDING and NEED_QUERY and QK:
                scores += bad[None, :]
            offset = j[None, :] - place[:, None]
            seen = visible_pairs(offset, left, right, CAUSAL, OUTSIDE) & keep[None, :]
            if SLIDING:
                base = first_offset(first, tile * NEAR, shift, left, BM, True)
                column, valid = table_columns(base, left, right, WIDTH, True, OUTSIDE)
            spot, inside = tile_column(offset, base, left, right, SLIDING, OUTSIDE)
            if HAS_QUERY_REL:
                if SLIDING:
                    by_query = query_columns(
                        r, query_table, bias_row, column, valid, W, by_table, R, HAS_BIAS, False, DTYPE
                    )
                scores += take(by_query, spot, inside)
            elif HAS_BIAS:
                scores += bias_of_pairs(bias_row, offset, seen, left, right, OUTSIDE, DTYPE)
            if HAS_KEY_REL:
                by_key = key_columns(keys, key_table, column, valid, W, key_scale, D, True, DTYPE)
                scores += take(by_key, spot, inside, 0)
            power = tl.exp2(scores - start[:, None])
            values = load_tile(v_at, tile * NEAR, d, keep, v_time, v_channel, D, False)
            found = matrix(dy, tl.trans(values), tl.zeros([BM, NEAR], DTYPE))
            if DROPOUT:
                kept = kept_pairs(seed, b, h, i, tile * NEAR, threshold, NEAR, False)
                found = tl.where(kept, found * keep_factor, 0.0)
            found = tl.where(seen, power * (found - delta[:, None]), 0.0)
            if NEED_QUERY and QK:
                total = matrix(narrow(found, keys.dtype), keys, total)
            if COLUMNS:
                if EDGES:
                    sum_before += tl.sum(tl.where(offset < -left, found, 0.0), 1)
                    sum_after += tl.sum(tl.where(offset > right, found, 0.0), 1)
                strict_column, strict = table_columns(base, left, right, WIDTH, SLIDING, ZERO)
                back = base + tl.arange(0, WIDTH)[None, :] + place[:, None] - tile * NEAR
                met = take(found, back, strict[None, :] & (back >= 0) & (back < NEAR))
                if SLIDING:
                    if NEED_BIAS:
                        add_to_bias(row_sums, strict_column, tl.sum(met, 0), strict)
                    if NEED_R:
                        weights = load_columns(query_table, x, strict_column, strict, W, R)
                        r_total = exact_matrix(narrow(met, r.dtype), tl.trans(weights), r_total)
                    if NEED_TABLE:
                        add_products(
                            table_sums, r, r_at, first, live, r_time, r_channel, narrow(met, r.dtype), strict_column,
                            strict, W, R, PIECE, DTYPE,
                        )  # fmt: skip
                else:
                    columns += met
        if COLUMNS and not SLIDING:
            tl.debug_barrier()
            live = tl.abs(tl.load(row_at + plane + i, mask=rows, other=float("inf"))) < float("inf")  # not held
            if HAS_QUERY_REL:
                r = load_tile(r_at, first, x, live, r_time, r_channel, R, False)
            if EDGES:
                columns = with_edges(columns, sum_before, sum_after, W)
            if NEED_BIAS:
                add_to_bias(row_sums, column, tl.sum(columns, 0), valid)
            if NEED_TABLE:
                add_products(
                    table_sums, r, r_at, first, live, r_time, r_channel, narrow(columns, r.dtype), column, valid, W, R,
                    PIECE, DTYPE,
                )  # fmt: skip
            if NEED_R:
                weights = tl.trans(load_columns(query_table, x, column, valid, W, R))
                if HAS_REL_QUERY:
                    r_total = exact_matrix(narrow(columns, r.dtype), weights, r_total)
                else:
                    columns *= number_from_bits(rel_scale, DTYPE)
                    total *= number_from_bits(scale, DTYPE)
                    total = exact_matrix(narrow(columns, r.dtype), weights, total)
        if COLUMNS and SLIDING and EDGES:
            for side in tl.static_range(2):
                outermost = W - 1 if side else 0
                sums = sum_after if side else sum_before
                if NEED_BIAS:
                    one = tl.zeros([1], tl.int32) + outermost
                    add_to_bias(row_sums, one, tl.sum(sums, 0), one >= 0)
                if NEED_R:
                    weights = widen(tl.load(query_table + x * W + outermost, mask=x < R, other=0.0), DTYPE)
                    r_total += sums[:, None] * weights[None, :]
                if NEED_TABLE:
                    met = tl.sum(widen(r, DTYPE) * sums[:, None], 0)
                    add_to_edge(table_sums, x, outermost, met, W, R)
        if NEED_R and (HAS_REL_QUERY or SLIDING):
            r_total *= number_from_bits(rel_scale, DTYPE)
        if HAS_REL_QUERY and NEED_REL_QUERY:
            at = head_at(grad_rel_query, b, h, dr_batch, dr_head)
            at += i.to(tl.int64)[:, None] * dr_time + x[None, :] * dr_channel
            tl.store(at, narrow(r_total, grad_rel_query.dtype.element_ty), mask=rows[:, None] & (x < R)[None, :])
        if NEED_QUERY:
            if SLIDING or HAS_REL_QUERY or not NEED_R:
                total *= number_from_bits(scale, DTYPE)
            if SLIDING and NEED_R and not HAS_REL_QUERY:
                total += r_total
            at = head_at(grad_q, b, h, dq_batch, dq_head) + i.to(tl.int64)[:, None] * dq_time + d[None, :] * dq_channel
            tl.store(at, narrow(total, grad_q.dtype.element_ty), mask=rows[:, None] & (d < D)[None, :])


# -- keys and values ---


@triton.jit(do_not_specialize=VARYING)
def grad_keys(
    grad, q, k, v, rel_query, query_rel, bias, key_rel, key_edges, value_conv, conv_scale, constants, key_mask,
    cu_q, cu_k, seed, grad_k, grad_v, key_sums,
    T, S, B, H, sharing, left, right, slots, groups, sequences, search_steps, scale, score_scale, table_scale,
    threshold, keep_scale, plane, edge_plane,
    g_batch, g_time, g_head, g_channel, q_batch, q_time, q_head, q_channel, k_batch, k_time, k_head, k_channel,
    v_batch, v_time, v_head, v_channel, r_batch, r_time, r_head, r_channel, dk_batch, dk_time, dk_head, dk_channel,
    dv_batch, dv_time, dv_head, dv_channel, query_rel_head, key_rel_head, mask_batch, mask_time,
    D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, QK: tl.constexpr, NEGATIVE: tl.constexpr,
    CAUSAL: tl.constexpr, OUTSIDE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_QUERY_REL: tl.constexpr,
    HAS_KEY_REL: tl.constexpr, HAS_CONV: tl.constexpr, HAS_CONV_SCALE: tl.constexpr,
    HAS_MASK: tl.constexpr, PACKED: tl.constexpr, DROPOUT: tl.constexpr, NEED_KEY: tl.constexpr,
    NEED_VALUE: tl.constexpr, NEED_TABLE: tl.constexpr, DTYPE: tl.constexpr, SLIDING: tl.constexpr,
    WIDTH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, NEAR: tl.constexpr,
    NEAR_STAGES: tl.constexpr, IN_REGISTERS: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """grad_k and grad_v for every ``groups``-th tile of BN keys, over all query heads that share them, and the sums
    over these for key_rel, key_sums[h, b, group, D, W]. Tiles of pairs are [keys, queries] here."""
    QUERY_TERMS: tl.constexpr = HAS_BIAS or HAS_QUERY_REL
    # Whether the scores' gradients are wanted, and those of the key's columns among them.
    SCORES: tl.constexpr = NEED_KEY or NEED_TABLE
    COLUMNS: tl.constexpr = HAS_KEY_REL and SCORES
    EDGES: tl.constexpr = OUTSIDE == CLIP
    HIDING: tl.constexpr = CAUSAL or OUTSIDE == MASK
    pid = tl.program_id(0)
    shared = H // sharing
    group, g, b = pid % groups, pid // groups % shared, pid // groups // shared
    W = left + right + 1
    d, x = tl.arange(0, DP), tl.arange(0, RP)
    key_scale, by_table = number_from_bits(score_scale, DTYPE), number_from_bits(table_scale, DTYPE)
    positive = -key_scale if NEGATIVE else key_scale
    keep_factor = number_from_bits(keep_scale, DTYPE)
    mask_at = key_mask + b.to(tl.int64) * mask_batch
    for slot in tl.range(group, slots, groups, disable_licm=True):
        first, begin, end, q_begin, q_end = sequence_tile(slot, S, T, cu_k, cu_q, sequences, search_steps, PACKED, BN)
        shift = end - q_end
        j = first + tl.arange(0, BN)
        keep = real_keys(mask_at, j, begin, end, mask_time, HAS_MASK)
        k_at = head_at(k, b, g, k_batch, k_head)
        keys = load_tile(k_at, first, d, keep, k_time, k_channel, D, False)
        values = load_tile(head_at(v, b, g, v_batch, v_head), first, d, keep, v_time, v_channel, D, False)
        key_total, value_total = tl.zeros([BN, DP], DTYPE), tl.zeros([BN, DP], DTYPE)
        # Seen from the keys the window is mirrored, and what is causal is what comes after.
        t0, t1, t2, t3, t4, t5 = tile_ranges(
            first, begin, end, q_begin, q_end, -shift, right, left, -1 if CAUSAL else 0, OUTSIDE,
            QUERY_TERMS or HAS_KEY_REL, BN, BM, NEAR,
        )  # fmt: skip
        for head in tl.range(0, sharing, disable_licm=True):
            h = g * sharing + head
            query_table, bias_row = query_rel + h.to(tl.int64) * query_rel_head, bias + h.to(tl.int64) * W
            key_table = key_rel + h.to(tl.int64) * key_rel_head
            q_at, g_at = head_at(q, b, h, q_batch, q_head), head_at(grad, b, h, g_batch, g_head)
            row_at = constants + (b.to(tl.int64) * H + h) * T
            base = first_offset(0, first, shift, left, BM, False)
            column, valid = table_columns(base, left, right, WIDTH, False, OUTSIDE)
            columns = tl.zeros([BN, WIDTH], DTYPE)
            # Before and behind the window of the queries.
            sum_before, sum_after = tl.zeros([BN], DTYPE), tl.zeros([BN], DTYPE)
            edge_before, edge_after = sum_before, sum_after
            if HAS_KEY_REL and EDGES:
                at = key_edges + (b.to(tl.int64) * H + h) * S + j
                edge_before = tl.load(at, mask=keep, other=0.0)
                edge_after = tl.load(at + edge_plane, mask=keep, other=0.0)
            if HAS_KEY_REL and not SLIDING:
                by_key = key_columns(keys, key_table, column, valid, W, key_scale, D, False, DTYPE)
            for n in tl.range(0, t1 - t0 + t3 - t2 + t5 - t4, num_stages=NEAR_STAGES, disable_licm=True):
                tile = near_tile(n, t0, t1, t2, t3, t4)
                i = tile * NEAR + tl.arange(0, NEAR)
                rows = (i >= q_begin) & (i < q_end)
                start = tl.load(row_at + plane + i, mask=rows, other=float("inf"))
                live = tl.abs(start) < float("inf")
                # Without hidden pairs a NaN of q has its way, and q need not wait for start.
                queries = load_tile(q_at, tile * NEAR, d, live if HIDING else rows, q_time, q_channel, D, False)
                scores = tl.zeros([BN, NEAR], DTYPE)
                if QK:
                    scores = matrix(keys, tl.trans(queries), scores) * key_scale
                offset = j[:, None] - (i + shift)[None, :]
                seen = visible_pairs(offset, left, right, CAUSAL, OUTSIDE) & rows[None, :]
                if SLIDING:
                    base = first_offset(tile * NEAR, first, shift, left, NEAR, True)
                    column, valid = table_columns(base, left, right, WIDTH, True, OUTSIDE)
                spot, inside = tile_column(offset, base, left, right, SLIDING, OUTSIDE)
                if HAS_QUERY_REL:
                    r_at = head_at(rel_query, b, h, r_batch, r_head)
                    r = load_tile(r_at, tile * NEAR, x, rows, r_time, r_channel, R, False)
                    by_query = query_columns(
                        r, query_table, bias_row, column, valid, W, by_table, R, HAS_BIAS, True, DTYPE
                    )
                    scores += take(by_query, spot, inside, 0)
                elif HAS_BIAS:
                    scores += bias_of_pairs(bias_row, offset, seen, left, right, OUTSIDE, DTYPE)
                if HAS_KEY_REL:
                    if SLIDING:
                        by_key = key_columns(keys, key_table, column, valid, W, key_scale, D, False, DTYPE)
                    scores += take(by_key, spot, inside)
                power = tl.where(seen, tl.exp2(scores - start[None, :]), 0.0)
                dy = load_tile(g_at, tile * NEAR, d, live, g_time, g_channel, D, False)
                if DROPOUT:
                    kept = kept_pairs(seed, b, h, i, first, threshold, BN, True)
                if NEED_VALUE:
                    weights = power
                    if DROPOUT:
                        weights = tl.where(kept, power * keep_factor, 0.0)
                    value_total = matrix(narrow(weights, dy.dtype), dy, value_total)
                if SCORES:
                    found = matrix(values, tl.trans(dy), tl.zeros([BN, NEAR], DTYPE))
                    if DROPOUT:
                        found = tl.where(kept, found * keep_factor, 0.0)
                    found = power * (found - tl.load(row_at + i, mask=rows, other=0.0)[None, :])
                    if HIDING:
                        found = tl.where(seen, found, 0.0)
                    if NEED_KEY and QK:
                        key_total = matrix(narrow(found, queries.dtype), queries, key_total)
                if COLUMNS:
                    found = tl.where(keep[:, None], found, 0.0)
                    if EDGES:
                        sum_before += tl.sum(tl.where(offset < -left, found, 0.0), 1)
                        sum_after += tl.sum(tl.where(offset > right, found, 0.0), 1)
                    strict_column, strict = table_columns(base, left, right, WIDTH, SLIDING, ZERO)
                    back = j[:, None] - base - tl.arange(0, WIDTH)[None, :] - shift - tile * NEAR
                    met = take(found, back, strict[None, :] & (back >= 0) & (back < NEAR))
                    if SLIDING:
                        key_total = key_columns_back(
                            met, keys, k_at, first, keep, k_time, k_channel, key_table, key_sums, strict_column, strict,
                            key_total, h, b, group, B, groups, W, D, NEED_KEY, NEED_TABLE, PIECE, DTYPE,
                        )  # fmt: skip
                    else:
                        columns += met

            far_first, far_last = t1, t4
            if HAS_BIAS and EDGES:
                # A bias of -inf hides all queries of a side, also those that see nothing and may have any gradient.
                far_first = tl.where(widen(tl.load(bias_row + W - 1), DTYPE) == float("-inf"), t2, t1)
                far_last = tl.where(widen(tl.load(bias_row), DTYPE) == float("-inf"), t3, t4)
            for n in tl.range(0, (t2 - far_first + far_last - t3) // (BM // NEAR), disable_licm=not IN_REGISTERS):
                tile, is_before = far_tile(n, far_first, t2, t3, BM // NEAR)
                i = tile * BM + tl.arange(0, BM)
                rows = i >= 0
                queries = load_tile(q_at, tile * BM, d, rows, q_time, q_channel, D, True)
                scores = tl.zeros([BN, BM], DTYPE)
                if QK:
                    scores = matrix(keys, tl.trans(queries), scores)
                    if NEGATIVE:
                        scores = -scores
                scores *= positive
                if HAS_KEY_REL and EDGES:
                    scores += tl.where(is_before, edge_after, edge_before)[:, None]
                # Queries before the window of a key have it behind theirs.
                which = plane
                if QUERY_TERMS and EDGES:
                    which = tl.where(is_before, 3, 2) * plane
                power = tl.exp2(scores - tl.load(row_at + which + i)[None, :])
                dy = load_tile(g_at, tile * BM, d, rows, g_time, g_channel, D, True)
                if DROPOUT:
                    kept = kept_pairs(seed, b, h, i, first, threshold, BN, True)
                if NEED_VALUE:
                    weights = power
                    if DROPOUT:
                        weights = tl.where(kept, power * keep_factor, 0.0)
                    value_total = matrix(narrow(weights, dy.dtype), dy, value_total)
                if SCORES:
                    found = matrix(values, tl.trans(dy), tl.zeros([BN, BM], DTYPE))
                    if DROPOUT:
                        found = tl.where(kept, found * keep_factor, 0.0)
                    found = power * (found - tl.load(row_at + i)[None, :])
                    if COLUMNS and EDGES:
                        sums = tl.sum(found, 1)
                        sum_before += tl.where(is_before, 0.0, sums)
                        sum_after += tl.where(is_before, sums, 0.0)
                    if NEED_KEY and QK:
                        key_total = matrix(narrow(found, queries.dtype), queries, key_total)

            if COLUMNS and not SLIDING:
                if EDGES:
                    columns = with_edges(columns, tl.where(keep, sum_before, 0.0), tl.where(keep, sum_after, 0.0), W)
                key_total = key_columns_back(
                    columns, keys, k_at, first, keep, k_time, k_channel, key_table, key_sums, column, valid,
                    key_total, h, b, group, B, groups, W, D, NEED_KEY, NEED_TABLE, PIECE, DTYPE,
                )  # fmt: skip
            if COLUMNS and SLIDING and EDGES:
                for side in tl.static_range(2):
                    outermost = 0 if side else W - 1
                    sums = tl.where(keep, sum_after if side else sum_before, 0.0)
                    if NEED_KEY:
                        weights = widen(tl.load(key_table + d * W + outermost, mask=d < D, other=0.0), DTYPE)
                        key_total += sums[:, None] * weights[None, :]
                    if NEED_TABLE:
                        sums_at = key_sums + ((h.to(tl.int64) * B + b) * groups + group) * D * W
                        met = tl.sum(widen(finite_rows(keys, DTYPE)[0], DTYPE) * sums[:, None], 0)
                        add_to_edge(sums_at, d, outermost, met, W, D)

        column_mask = (d < D)[None, :]
        inside = ((j >= begin) & (j < end))[:, None] & column_mask
        if NEED_KEY:
            key_total = tl.where(keep[:, None], key_total * number_from_bits(scale, DTYPE), 0.0)
            at = head_at(grad_k, b, g, dk_batch, dk_head) + j.to(tl.int64)[:, None] * dk_time + d[None, :] * dk_channel
            tl.store(at, narrow(key_total, grad_k.dtype.element_ty), mask=inside)
        if NEED_VALUE:
            if HAS_CONV:
                value_total += convolved_back(
                    grad, value_conv, conv_scale, b, g, first - shift, keep, q_begin, q_end, left, W, sharing,
                    g_batch, g_time, g_head, g_channel, D, DP, CAUSAL, HAS_CONV_SCALE, DTYPE,
                )  # fmt: skip
            value_total = tl.where(keep[:, None], value_total, 0.0)
            at = head_at(grad_v, b, g, dv_batch, dv_head) + j.to(tl.int64)[:, None] * dv_time + d[None, :] * dv_channel
            tl.store(at, narrow(value_total, grad_v.dtype.element_ty), mask=inside)


@triton.jit
def key_columns_back(
    columns, keys, k_at, first, keep, k_time, k_channel, key_table, key_sums, column, valid, key_total, h, b, group, B,
    groups, W,
    D: tl.constexpr, NEED_KEY: tl.constexpr, NEED_TABLE: tl.constexpr, PIECE: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """From gradients of columns [keys, columns] to those of the keys, returned, and to the sums of key_rel."""
    d = tl.arange(0, keys.shape[1])
    small = narrow(columns, keys.dtype)
    if NEED_KEY:
        weights = load_columns(key_table, d, W - 1 - column, valid, W, D)
        key_total = exact_matrix(small, tl.trans(weights), key_total)
    if NEED_TABLE:
        sums_at = key_sums + ((h.to(tl.int64) * B + b) * groups + group) * D * W
        # A key that nothing sees adds nothing; the gradients of one that is seen are no numbers either.
        keys, bad = finite_rows(keys, DTYPE)
        keep = keep & (bad == bad)
        add_products(
            sums_at, keys, k_at, first, keep, k_time, k_channel, small, W - 1 - column, valid, W, D, PIECE, DTYPE
        )
    return key_total


@triton.jit
def convolved_back(
    grad, value_conv, conv_scale, b, g, first_place, keep, begin, end, left, W, sharing,
    g_batch, g_time, g_head, g_channel,
    D: tl.constexpr, DP: tl.constexpr, CAUSAL: tl.constexpr, HAS_CONV_SCALE: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The gradient that values, whose places among the queries begin at ``first_place``, get from the depthwise terms
    of all heads that share them."""
    d = tl.arange(0, DP)
    total = tl.zeros([keep.shape[0], DP], DTYPE)
    for head in tl.range(0, sharing, disable_licm=True):
        h = g * sharing + head
        taps = value_conv + h.to(tl.int64) * D * W
        factor = widen(tl.load(conv_scale + h), DTYPE) if HAS_CONV_SCALE else 1.0
        for c in tl.range(0, left + 1 if CAUSAL else W):
            i_first = first_place - c + left
            i = i_first + tl.arange(0, keep.shape[0])
            at = head_at(grad, b, h, g_batch, g_head)
            dy = load_tile(at, i_first, d, (i >= begin) & (i < end), g_time, g_channel, D, False)
            tap = widen(tl.load(taps + d * W + c, mask=d < D, other=0.0), DTYPE) * factor
            total += tap[None, :] * widen(dy, DTYPE)
    return total


# -- the depthwise term's own parameters ---


@triton.jit(do_not_specialize=VARYING)
def sum_taps(
    grad, v, key_mask, cu_q, cu_k, tap_sums, grad_sums,
    T, S, B, H, sharing, left, right, slots, groups, sequences, search_steps,
    g_batch, g_time, g_head, g_channel, v_batch, v_time, v_head, v_channel, mask_batch, mask_time,
    D: tl.constexpr, CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, PACKED: tl.constexpr, NEED_TAPS: tl.constexpr,
    DTYPE: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    """For each head, and TAPS taps of BD channels: tap_sums[h, group, D, W], the products of the output's gradient with
    the values that a tap reads, and grad_sums[h, group, D], that gradient, over every ``groups``-th tile of queries."""
    pid = tl.program_id(0)
    group, h, first_channel = pid % groups, pid // groups % H, pid // groups // H * BD
    first_tap = tl.program_id(1) * TAPS
    W = left + right + 1
    last_tap = tl.minimum(first_tap + TAPS, left + 1 if CAUSAL else W)
    d, tap = first_channel + tl.arange(0, BD), first_tap + tl.arange(0, TAPS)
    sums, taps = tl.zeros([BD], DTYPE), tl.zeros([BD, TAPS], DTYPE)
    for item in tl.range(group, B * slots, groups):
        slot, b = item % slots, item // slots
        first, begin, end, k_begin, k_end = sequence_tile(slot, T, S, cu_q, cu_k, sequences, search_steps, PACKED, BM)
        i = first + tl.arange(0, BM)
        rows = (i >= begin) & (i < end)
        at = head_at(grad, b, h, g_batch, g_head)
        dy = widen(load_tile(at, first, d, rows, g_time, g_channel, D, False), DTYPE)
        sums += tl.sum(dy, 0)
        if NEED_TAPS:
            v_at, mask_at = head_at(v, b, h // sharing, v_batch, v_head), key_mask + b.to(tl.int64) * mask_batch
            for c in tl.range(first_tap, last_tap):
                j_first = first + k_end - end + c - left
                j = j_first + tl.arange(0, BM)
                keep = rows & real_keys(mask_at, j, k_begin, k_end, mask_time, HAS_MASK)
                value = widen(load_tile(v_at, j_first, d, keep, v_time, v_channel, D, False), DTYPE)
                taps += tl.where(tap == c, 1.0, 0.0).to(DTYPE)[None, :] * tl.sum(dy * value, 0)[:, None]
    row = (h.to(tl.int64) * groups + group) * D + d
    tl.store(grad_sums + row, sums, mask=d < tl.where(first_tap == 0, D, 0))
    if NEED_TAPS:
        tl.store(tap_sums + row[:, None] * W + tap[None, :], taps, mask=(d < D)[:, None] & (tap < W)[None, :])


@triton.jit(do_not_specialize=VARYING)
def finish_taps(
    tap_sums, grad_sums, value_conv, conv_bias, conv_scale, grad_conv, grad_conv_bias, grad_conv_scale,
    left, right, groups,
    D: tl.constexpr, HAS_CONV_BIAS: tl.constexpr, HAS_CONV_SCALE: tl.constexpr, NEED_TAPS: tl.constexpr,
    NEED_BIAS: tl.constexpr, NEED_SCALE: tl.constexpr, DTYPE: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """Gradients of value_conv, value_conv_bias and value_conv_scale of one head from the sums of its groups."""
    h = tl.program_id(0).to(tl.int64)
    size = D * (left + right + 1)
    factor = widen(tl.load(conv_scale + h), DTYPE) if HAS_CONV_SCALE else 1.0
    # Each gradient, but for the factor, is a sum; the factor's own is their product with what it multiplies.
    scale = tl.zeros([BE], DTYPE)
    if NEED_TAPS or NEED_SCALE:
        for first in tl.range(0, size, BE):
            e = first + tl.arange(0, BE)
            total = tl.zeros([BE], DTYPE)
            for group in tl.range(0, groups):
                total += tl.load(tap_sums + (h * groups + group) * size + e, mask=e < size, other=0.0)
            scale += total * widen(tl.load(value_conv + h * size + e, mask=e < size, other=0.0), DTYPE)
            if NEED_TAPS:
                tl.store(grad_conv + h * size + e, narrow(total * factor, grad_conv.dtype.element_ty), mask=e < size)
    if NEED_BIAS or (NEED_SCALE and HAS_CONV_BIAS):
        for first in tl.range(0, D, BE):
            e = first + tl.arange(0, BE)
            total = tl.zeros([BE], DTYPE)
            for group in tl.range(0, groups):
                total += tl.load(grad_sums + (h * groups + group) * D + e, mask=e < D, other=0.0)
            if HAS_CONV_BIAS:
                scale += total * widen(tl.load(conv_bias + h * D + e, mask=e < D, other=0.0), DTYPE)
            if NEED_BIAS:
                at = grad_conv_bias + h * D + e
                tl.store(at, narrow(total * factor, grad_conv_bias.dtype.element_ty), mask=e < D)
    if NEED_SCALE:
        one = h + tl.arange(0, 1)
        tl.store(
            grad_conv_scale + one, narrow(tl.sum(scale, 0) + tl.zeros([1], DTYPE), grad_conv_scale.dtype.element_ty)
        )


@triton.jit(do_not_specialize=[*VARYING, "size"])
def sum_partials(
    partials, result, rows, size, scale, DTYPE: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """result[n, e] = scale times the sum over rows of partials[n, row, e], in fixed order."""
    pieces = tl.cdiv(size, BC)
    pid = tl.program_id(0)
    e, n = pid % pieces * BC + tl.arange(0, BC), (pid // pieces).to(tl.int64)
    total = tl.zeros([BR, BC], DTYPE)
    for first in tl.range(0, rows, BR):
        row = first + tl.arange(0, BR)
        at = partials + (n * rows + row.to(tl.int64))[:, None] * size + e[None, :]
        total += tl.load(at, mask=(row < rows)[:, None] & (e < size)[None, :], other=0.0)
    total = tl.sum(total, 0) * number_from_bits(scale, DTYPE)
    tl.store(result + n * size + e, narrow(total, result.dtype.element_ty), mask=e < size)
