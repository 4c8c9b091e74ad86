"""The forward kernel of attention, and what both passes want to know about keys beforehand.

A program keeps a tile of queries and walks over the keys in two loops: tiles near the window, where each pair finds its
column in a small product of queries and tables, and far ones, where the tables' outermost column only moves the
constant of the exponential. The largest score, the sum and the result of each query stay in registers.
"""

import triton
import triton.language as tl

from ..device import narrow, number_from_bits
from .depthwise import convolved, head_depthwise
from .scores import (
    columns_of_tile,
    edge_of_columns,
    edge_of_rows,
    far_scores,
    head_terms,
    near_scores,
    query_columns,
    query_edge,
    table_columns,
)
from .tiles import (
    CLIP,
    LOG2E,
    MASK,
    VARYING,
    Mask,
    Pairs,
    Terms,
    far_tile,
    far_tiles,
    finite_rows,
    head_at,
    kept_pairs,
    load_tile,
    matrix,
    near_tile,
    near_tiles,
    real_keys,
    sequence_tile,
    store_tile,
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
    inputs, tables, key_edges, depthwise, key_mask, boundaries, seed, out, lse,
    T, S, H, sharing, left, right, slots, sequences, search_steps, score_scale, table_scale, threshold, keep_scale,
    query_rel_head, key_rel_head, mask_batch, mask_time, edge_plane,
    FLAGS: tl.constexpr, TILE: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """out[b, i, h] and lse[b, h, i] for BM queries of one head."""
    D: tl.constexpr = FLAGS.D
    DP: tl.constexpr = FLAGS.DP
    HAS_MASK: tl.constexpr = FLAGS.HAS_MASK
    CAUSAL: tl.constexpr = FLAGS.CAUSAL
    SLIDING: tl.constexpr = FLAGS.SLIDING
    BM: tl.constexpr = TILE.BM
    BN: tl.constexpr = TILE.BN
    NEAR: tl.constexpr = TILE.NEAR
    NEAR_STAGES: tl.constexpr = TILE.NEAR_STAGES
    IN_REGISTERS: tl.constexpr = TILE.IN_REGISTERS
    QUERY_TERMS: tl.constexpr = FLAGS.HAS_BIAS or FLAGS.HAS_QUERY_REL
    RELATIVE: tl.constexpr = QUERY_TERMS or FLAGS.HAS_KEY_REL
    EDGES: tl.constexpr = FLAGS.OUTSIDE == CLIP
    HIDING: tl.constexpr = CAUSAL or FLAGS.OUTSIDE == MASK
    pid = tl.program_id(0)
    slot, h, b = pid % slots, pid // slots % H, pid // slots // H
    if CAUSAL:
        slot = slots - 1 - slot  # those with the most to do begin first
    owner = sequence_tile(slot, T, S, boundaries.queries, boundaries.keys, sequences, search_steps, FLAGS.PACKED, BM)
    first, shift = owner.first, owner.other_end - owner.end
    W = left + right + 1
    i = first + tl.arange(0, BM)
    rows, place = (i >= owner.begin) & (i < owner.end), i + shift
    d, x = tl.arange(0, DP), tl.arange(0, FLAGS.RP)
    key_scale, rel_scale = number_from_bits(score_scale, DTYPE), number_from_bits(table_scale, DTYPE)
    positive = -key_scale if FLAGS.NEGATIVE else key_scale
    terms = Terms(tables.bias, tables.query_rel, tables.key_rel, left, right, W, rel_scale)
    terms = head_terms(terms, h, query_rel_head, key_rel_head)
    q_at, r_at = head_at(inputs.q, b, h), head_at(inputs.rel_query, b, h)
    k_at, v_at = head_at(inputs.k, b, h // sharing), head_at(inputs.v, b, h // sharing)
    mask = Mask(key_mask + b.to(tl.int64) * mask_batch, mask_time)
    queries = load_tile(q_at, first, d, rows, D, False)  # [BM, DP]
    r = queries
    if FLAGS.HAS_QUERY_REL:
        r = load_tile(r_at, first, x, rows, FLAGS.R, False)  # [BM, RP]
    top = tl.full([BM], float("-inf"), DTYPE)
    total = tl.zeros([BM], DTYPE)
    result = tl.zeros([BM, DP], DTYPE)
    none = tl.zeros([BM], DTYPE)
    ranges = tile_ranges(owner, shift, left, right, 1 if CAUSAL else 0, FLAGS.OUTSIDE, RELATIVE, BM, BN, NEAR)

    whole = table_columns(-left, terms, TILE.WIDTH, False, FLAGS.OUTSIDE)
    by_query = none
    if FLAGS.HAS_QUERY_REL and not SLIDING:
        by_query = query_columns(r, whole, terms, FLAGS, False, DTYPE)  # [BM, WIDTH]
    for n in tl.range(0, near_tiles(ranges), num_stages=NEAR_STAGES, disable_licm=True):
        j_first = near_tile(n, ranges) * NEAR
        j = j_first + tl.arange(0, NEAR)
        keep = real_keys(mask, j, owner.other_begin, owner.other_end, HAS_MASK)
        keys = load_tile(k_at, j_first, d, keep, D, False)  # [NEAR, DP]
        offset = j[None, :] - place[:, None]
        seen = visible_pairs(offset, terms, CAUSAL, FLAGS.OUTSIDE) & keep[None, :]
        columns = columns_of_tile(whole, first, j_first, shift, terms, BM, TILE.WIDTH, FLAGS)
        pairs = Pairs(offset, seen, columns)
        scores = near_scores(queries, r, keys, by_query, pairs, terms, key_scale, FLAGS, False, DTYPE)
        scores = tl.where(seen, scores, float("-inf"))
        power, factor, top, total = add_scores(scores, tl.max(scores, 1), none, top, total)
        if FLAGS.DROPOUT:
            power = tl.where(kept_pairs(seed, b, h, i, j_first, threshold, NEAR, False), power, 0.0)
        values = load_tile(v_at, j_first, d, keep, D, False)  # [NEAR, DP]
        if HIDING:
            values, bad = finite_rows(values, DTYPE)
            power = tl.where(seen & (bad != bad)[None, :], float("nan"), power)
        result = matrix(narrow(power, values.dtype), values, result * factor[:, None])

    if IN_REGISTERS:
        # Products of another shape have their operands in other registers: load q again, so that its registers are not
        # live across both loops.
        tl.debug_barrier()
        queries = load_tile(q_at, first, d, rows, D, False)
        r = queries
        if FLAGS.HAS_QUERY_REL and EDGES and SLIDING:
            r = load_tile(r_at, first, x, rows, FLAGS.R, False)
    before, after = none, none
    if QUERY_TERMS and EDGES:
        if FLAGS.HAS_QUERY_REL and not SLIDING:  # where their products lie already
            before, after = edge_of_columns(by_query, 0), edge_of_columns(by_query, W - 1)
        else:
            before = query_edge(r, terms, 0, FLAGS, DTYPE)
            after = query_edge(r, terms, W - 1, FLAGS, DTYPE)
    edges_at = key_edges + (b.to(tl.int64) * H + h) * S
    for n in tl.range(0, far_tiles(ranges, BN // NEAR), disable_licm=not IN_REGISTERS):
        tile, is_before = far_tile(n, ranges, BN // NEAR)
        j_first = tile * BN
        j = j_first + tl.arange(0, BN)
        keep = j >= 0
        if HAS_MASK:
            keep = real_keys(mask, j, owner.other_begin, owner.other_end, True)
        edge, key_edge = none, none[None, :]
        if QUERY_TERMS and EDGES:
            edge = tl.where(is_before, before, after)
        if FLAGS.HAS_KEY_REL and EDGES:
            key_edge = tl.load(edges_at + tl.where(is_before, 0, edge_plane) + j)[None, :]
        keys = load_tile(k_at, j_first, d, keep, D, not HAS_MASK)  # [BN, DP]
        products, scores = far_scores(queries, keys, key_edge, key_scale, FLAGS, False, DTYPE)  # [BM, BN]
        largest = tl.max(products, 1) * positive  # what follows is one multiplication and addition in the exponent
        if HAS_MASK:
            scores = tl.where(keep[None, :], scores, float("-inf"))
        if HAS_MASK or (FLAGS.HAS_KEY_REL and EDGES):
            largest = tl.max(scores, 1)
        power, factor, top, total = add_scores(scores, largest, edge, top, total)
        if FLAGS.DROPOUT:
            power = tl.where(kept_pairs(seed, b, h, i, j_first, threshold, BN, False), power, 0.0)
        values = load_tile(v_at, j_first, d, keep, D, not HAS_MASK)  # [BN, DP]
        result = matrix(narrow(power, values.dtype), values, result * factor[:, None])

    empty = total == 0.0
    inverse = tl.where(empty, 0.0, 1.0 / tl.where(empty, 1.0, total))
    if FLAGS.DROPOUT:
        inverse *= number_from_bits(keep_scale, DTYPE)
    result *= inverse[:, None]
    found = tl.where(empty, float("-inf"), (top + tl.log2(tl.where(empty, 1.0, total))) / LOG2E)
    tl.store(lse + (b.to(tl.int64) * H + h) * T + i, found, mask=rows)
    if FLAGS.HAS_CONV:
        result += convolved(v_at, mask, head_depthwise(depthwise, h, W, D), owner, rows, left, W, FLAGS, DTYPE)
    store_tile(head_at(out, b, h), i, result, rows, D)


@triton.jit(do_not_specialize=VARYING)
def find_key_edges(
    k, key_rel, key_mask, key_edges, S, H, sharing, left, right, slots, score_scale, key_rel_head, mask_batch,
    mask_time, edge_plane,
    D: tl.constexpr, DP: tl.constexpr, HAS_MASK: tl.constexpr, DTYPE: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """key_edges[e, b, h, j]: what key_rel adds to the scores of key j for queries that it lies before (e = 0) or behind
    (e = 1) of, beyond their window."""
    pid = tl.program_id(0)
    slot, h, b = pid % slots, pid // slots % H, pid // slots // H
    W = left + right + 1
    j, d = slot * BN + tl.arange(0, BN), tl.arange(0, DP)
    keep = real_keys(Mask(key_mask + b.to(tl.int64) * mask_batch, mask_time), j, 0, S, HAS_MASK)
    keys = load_tile(head_at(k, b, h // sharing), slot * BN, d, keep, D, False)  # [BN, DP]
    table, scale = key_rel + h.to(tl.int64) * key_rel_head, number_from_bits(score_scale, DTYPE)
    at = key_edges + (b.to(tl.int64) * H + h) * S + j
    tl.store(at, edge_of_rows(keys, table, W - 1, W, scale, D, DTYPE), mask=j < S)
    tl.store(at + edge_plane, edge_of_rows(keys, table, 0, W, scale, D, DTYPE), mask=j < S)
