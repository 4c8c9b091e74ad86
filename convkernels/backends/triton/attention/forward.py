"""The forward kernel of attention, and what both passes want to know about keys beforehand.

A program keeps a tile of queries and walks over the keys in two loops: tiles near the window, where each pair finds its
column in a small product of queries and tables, and far ones, where the tables' outermost column only moves the
constant of the exponential. The largest score, the sum and the result of each query stay in registers.
"""

import triton
import triton.language as tl

from ..conv.taps import narrow, number_from_bits, take
from .tiles import (
    CLIP,
    LOG2E,
    MASK,
    VARYING,
    bias_of_pairs,
    convolved,
    edge_of_rows,
    far_tile,
    finite_rows,
    first_offset,
    head_at,
    kept_pairs,
    key_columns,
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


@triton.jit
def add_scores(scores, largest, edge, top, total):
    """A tile of scores and the largest of each row, still without ``edge``: their powers relative to the largest score
    so far, the factor by which what has been summed before shrinks, the new largest score and sum."""
    new = tl.maximum(top, largest + edge)
    start = tl.where(new == float("-inf"), float("inf"), new - edge)
    power = tl.exp2(scores - start[:, None])
    factor = tl.where(new == float("-inf"), 1.0, tl.exp2(top - new))
    return power, factor, new, total * factor + tl.sum(power, 1)


@triton.jit(do_not_specialize=VARYING)
def attention_forward(
    q, k, v, rel_query, query_rel, bias, key_rel, key_edges, value_conv, conv_bias, conv_scale, key_mask,
    cu_q, cu_k, seed, out, lse,
    T, S, H, sharing, left, right, slots, sequences, search_steps, score_scale, table_scale, threshold, keep_scale,
    q_batch, q_time, q_head, q_channel, k_batch, k_time, k_head, k_channel, v_batch, v_time, v_head, v_channel,
    r_batch, r_time, r_head, r_channel, o_batch, o_time, o_head, o_channel, query_rel_head, key_rel_head,
    mask_batch, mask_time, edge_plane,
    D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, QK: tl.constexpr, NEGATIVE: tl.constexpr,
    CAUSAL: tl.constexpr, OUTSIDE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_QUERY_REL: tl.constexpr,
    HAS_KEY_REL: tl.constexpr, HAS_CONV: tl.constexpr, HAS_CONV_BIAS: tl.constexpr,
    HAS_CONV_SCALE: tl.constexpr, HAS_MASK: tl.constexpr, PACKED: tl.constexpr, DROPOUT: tl.constexpr,
    DTYPE: tl.constexpr, SLIDING: tl.constexpr, WIDTH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    NEAR: tl.constexpr, NEAR_STAGES: tl.constexpr, IN_REGISTERS: tl.constexpr,
):  # fmt: skip
    """out[b, i, h] and lse[b, h, i] for BM queries of one head."""
    QUERY_TERMS: tl.constexpr = HAS_BIAS or HAS_QUERY_REL
    EDGES: tl.constexpr = OUTSIDE == CLIP
    HIDING: tl.constexpr = CAUSAL or OUTSIDE == MASK
    pid = tl.program_id(0)
    slot, h, b = pid % slots, pid // slots % H, pid // slots // H
    if CAUSAL:
        slot = slots - 1 - slot  # those with the most to do begin first
    first, begin, end, k_begin, k_end = sequence_tile(slot, T, S, cu_q, cu_k, sequences, search_steps, PACKED, BM)
    shift = k_end - end
    W = left + right + 1
    i = first + tl.arange(0, BM)
    rows, place, d = (i >= begin) & (i < end), i + shift, tl.arange(0, DP)
    key_scale, rel_scale = number_from_bits(score_scale, DTYPE), number_from_bits(table_scale, DTYPE)
    positive = -key_scale if NEGATIVE else key_scale
    q_at, r_at = head_at(q, b, h, q_batch, q_head), head_at(rel_query, b, h, r_batch, r_head)
    queries = load_tile(q_at, first, d, rows, q_time, q_channel, D, False)
    r = queries
    if HAS_QUERY_REL:
        r = load_tile(r_at, first, tl.arange(0, RP), rows, r_time, r_channel, R, False)
    query_table, bias_row = query_rel + h.to(tl.int64) * query_rel_head, bias + h.to(tl.int64) * W
    key_table = key_rel + h.to(tl.int64) * key_rel_head
    k_at = head_at(k, b, h // sharing, k_batch, k_head)
    v_at = head_at(v, b, h // sharing, v_batch, v_head)
    mask_at = key_mask + b.to(tl.int64) * mask_batch
    top = tl.full([BM], float("-inf"), DTYPE)
    total = tl.zeros([BM], DTYPE)
    result = tl.zeros([BM, DP], DTYPE)
    none = tl.zeros([BM], DTYPE)
    t0, t1, t2, t3, t4, t5 = tile_ranges(
        first, begin, end, k_begin, k_end, shift, left, right, 1 if CAUSAL else 0, OUTSIDE,
        QUERY_TERMS or HAS_KEY_REL, BM, BN, NEAR,
    )  # fmt: skip

    base = first_offset(first, 0, shift, left, BM, False)
    column, valid = table_columns(base, left, right, WIDTH, False, OUTSIDE)
    if HAS_QUERY_REL and not SLIDING:
        by_query = query_columns(r, query_table, bias_row, column, valid, W, rel_scale, R, HAS_BIAS, False, DTYPE)
    for n in tl.range(0, t1 - t0 + t3 - t2 + t5 - t4, num_stages=NEAR_STAGES, disable_licm=True):
        tile = near_tile(n, t0, t1, t2, t3, t4)
        j = tile * NEAR + tl.arange(0, NEAR)
        keep = real_keys(mask_at, j, k_begin, k_end, mask_time, HAS_MASK)
        scores = tl.zeros([BM, NEAR], DTYPE)
        if QK or HAS_KEY_REL:
            keys = load_tile(k_at, tile * NEAR, d, keep, k_time, k_channel, D, False)
        if QK:
            scores = matrix(queries, tl.trans(keys), scores) * key_scale
        offset = j[None, :] - place[:, None]
        seen = visible_pairs(offset, left, right, CAUSAL, OUTSIDE) & keep[None, :]
        if SLIDING:
            base = first_offset(first, tile * NEAR, shift, left, BM, True)
            column, valid = table_columns(base, left, right, WIDTH, True, OUTSIDE)
        spot, inside = tile_column(offset, base, left, right, SLIDING, OUTSIDE)
        if HAS_QUERY_REL:
            if SLIDING:
                by_query = query_columns(
                    r, query_table, bias_row, column, valid, W, rel_scale, R, HAS_BIAS, False, DTYPE
                )
            scores += take(by_query, spot, inside)
        elif HAS_BIAS:
            scores += bias_of_pairs(bias_row, offset, seen, left, right, OUTSIDE, DTYPE)
        if HAS_KEY_REL:
            by_key = key_columns(keys, key_table, column, valid, W, key_scale, D, True, DTYPE)
            scores += take(by_key, spot, inside, 0)
        scores = tl.where(seen, scores, float("-inf"))
        power, factor, top, total = add_scores(scores, tl.max(scores, 1), none, top, total)
        if DROPOUT:
            power = tl.where(kept_pairs(seed, b, h, i, tile * NEAR, threshold, NEAR, False), power, 0.0)
        values = load_tile(v_at, tile * NEAR, d, keep, v_time, v_channel, D, False)
        if HIDING:
            values, bad = finite_rows(values, DTYPE)
            power = tl.where(seen & (bad != bad)[None, :], float("nan"), power)
        result = matrix(narrow(power, values.dtype), values, result * factor[:, None])

    if IN_REGISTERS:
        # Products of another shape have their operands in other registers: read again, none is held for both loops.
        tl.debug_barrier()
        queries = load_tile(q_at, first, d, rows, q_time, q_channel, D, False)
        r = queries
        if HAS_QUERY_REL and EDGES:
            r = load_tile(r_at, first, tl.arange(0, RP), rows, r_time, r_channel, R, False)
    before, after = none, none
    if QUERY_TERMS and EDGES:
        before = query_edge(r, query_table, bias_row, 0, W, rel_scale, R, HAS_BIAS, HAS_QUERY_REL, DTYPE)
        after = query_edge(r, query_table, bias_row, W - 1, W, rel_scale, R, HAS_BIAS, HAS_QUERY_REL, DTYPE)
    edges_at = key_edges + (b.to(tl.int64) * H + h) * S
    for n in tl.range(0, (t2 - t1 + t4 - t3) // (BN // NEAR), disable_licm=not IN_REGISTERS):
        tile, is_before = far_tile(n, t1, t2, t3, BN // NEAR)
        j = tile * BN + tl.arange(0, BN)
        keep = j >= 0
        if HAS_MASK:
            keep = real_keys(mask_at, j, k_begin, k_end, mask_time, True)
        edge = none
        if QUERY_TERMS and EDGES:
            edge = tl.where(is_before, before, after)
        scores = tl.zeros([BM, BN], DTYPE)
        if QK:
            keys = load_tile(k_at, tile * BN, d, keep, k_time, k_channel, D, not HAS_MASK)
            scores = matrix(queries, tl.trans(keys), scores)
            if NEGATIVE:
                scores = -scores
        largest = tl.max(scores, 1) * positive  # what follows is one multiplication and addition in the exponent
        scores *= positive
        if HAS_KEY_REL and EDGES:
            scores += tl.load(edges_at + tl.where(is_before, 0, edge_plane) + j)[None, :]
        if HAS_MASK:
            scores = tl.where(keep[None, :], scores, float("-inf"))
        if HAS_MASK or (HAS_KEY_REL and EDGES):
            largest = tl.max(scores, 1)
        power, factor, top, total = add_scores(scores, largest, edge, top, total)
        if DROPOUT:
            power = tl.where(kept_pairs(seed, b, h, i, tile * BN, threshold, BN, False), power, 0.0)
        values = load_tile(v_at, tile * BN, d, keep, v_time, v_channel, D, not HAS_MASK)
        result = matrix(narrow(power, values.dtype), values, result * factor[:, None])

    empty = total == 0.0
    inverse = tl.where(empty, 0.0, 1.0 / tl.where(empty, 1.0, total))
    if DROPOUT:
        inverse *= number_from_bits(keep_scale, DTYPE)
    result *= inverse[:, None]
    found = tl.where(empty, float("-inf"), (top + tl.log2(tl.where(empty, 1.0, total))) / LOG2E)
    tl.store(lse + (b.to(tl.int64) * H + h) * T + i, found, mask=rows)
    if HAS_CONV:
        result += convolved(
            v_at, mask_at, value_conv + h.to(tl.int64) * D * W, conv_bias + h * D, conv_scale + h, first + shift, rows,
            k_begin, k_end, left, W, v_time, v_channel, mask_time,
            D, DP, CAUSAL, HAS_MASK, HAS_CONV_BIAS, HAS_CONV_SCALE, DTYPE,
        )  # fmt: skip
    at = head_at(out, b, h, o_batch, o_head) + i.to(tl.int64)[:, None] * o_time + d[None, :] * o_channel
    tl.store(at, narrow(result, out.dtype.element_ty), mask=rows[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=VARYING)
def find_key_edges(
    k, key_rel, key_mask, key_edges, S, H, sharing, left, right, slots, score_scale,
    k_batch, k_time, k_head, k_channel, key_rel_head, mask_batch, mask_time, edge_plane,
    D: tl.constexpr, DP: tl.constexpr, HAS_MASK: tl.constexpr, DTYPE: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """key_edges[e, b, h, j]: what key_rel adds to the scores of key j for queries that it lies before (e = 0) or behind
    (e = 1) of, beyond their window."""
    pid = tl.program_id(0)
    slot, h, b = pid % slots, pid // slots % H, pid // slots // H
    W = left + right + 1
    j, d = slot * BN + tl.arange(0, BN), tl.arange(0, DP)
    keep = real_keys(key_mask + b.to(tl.int64) * mask_batch, j, 0, S, mask_time, HAS_MASK)
    keys = load_tile(head_at(k, b, h // sharing, k_batch, k_head), slot * BN, d, keep, k_time, k_channel, D, False)
    table, scale = key_rel + h.to(tl.int64) * key_rel_head, number_from_bits(score_scale, DTYPE)
    at = key_edges + (b.to(tl.int64) * H + h) * S + j
    tl.store(at, edge_of_rows(keys, table, d, W - 1, W, scale, D, DTYPE), mask=j < S)
    tl.store(at + edge_plane, edge_of_rows(keys, table, d, 0, W, scale, D, DTYPE), mask=j < S)
