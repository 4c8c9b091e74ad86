"""The queries' half of the backward pass of attention.

Each half finds the scores again from lse. Its programs own what they sum: the gradients of a tile of queries (or keys)
in registers, sums of tables in memory of their own.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from ..device import anew, narrow, number_from_bits, take, widen
from .scores import (
    columns_of_tile,
    far_scores,
    head_terms,
    load_columns,
    near_scores,
    query_columns,
    table_columns,
)
from .sums import Block, add_products, add_to_bias, add_to_edge, with_edges
from .tiles import (
    CLIP,
    MASK,
    VARYING,
    ZERO,
    Heads,
    Mask,
    Pairs,
    Terms,
    exact_matrix,
    far_tile,
    far_tiles,
    finite_rows,
    head_at,
    kept_pairs,
    load_own,
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


class Gradients(NamedTuple):
    q: Heads
    rel_query: Heads


class Needs(NamedTuple):
    """Which gradients are wanted: q, rel_query, query_rel, bias."""

    QUERY: bool
    REL_QUERY: bool
    TABLE: bool
    BIAS: bool


@triton.jit(do_not_specialize=VARYING)
def grad_queries(
    grad, inputs, tables, key_edges, constants, key_mask, boundaries, seed, gradients, query_sums, bias_sums,
    T, S, B, H, sharing, left, right, slots, groups, sequences, search_steps, scale, rel_scale, score_scale,
    table_scale, threshold, keep_scale, query_rel_head, key_rel_head, mask_batch, mask_time, plane, edge_plane,
    FLAGS: tl.constexpr, NEED: tl.constexpr, TILE: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """grad_q and grad_rel_query for every ``groups``-th tile of BM queries of a head, and the sums over these for
    query_rel, query_sums[h, b, group, R, W], and bias, bias_sums[h, b, group, W]."""
    D: tl.constexpr = FLAGS.D
    R: tl.constexpr = FLAGS.R
    DP: tl.constexpr = FLAGS.DP
    RP: tl.constexpr = FLAGS.RP
    HAS_MASK: tl.constexpr = FLAGS.HAS_MASK
    HAS_REL_QUERY: tl.constexpr = FLAGS.HAS_REL_QUERY
    CAUSAL: tl.constexpr = FLAGS.CAUSAL
    SLIDING: tl.constexpr = FLAGS.SLIDING
    BM: tl.constexpr = TILE.BM
    BN: tl.constexpr = TILE.BN
    NEAR: tl.constexpr = TILE.NEAR
    NEAR_STAGES: tl.constexpr = TILE.NEAR_STAGES
    WIDTH: tl.constexpr = TILE.WIDTH
    IN_REGISTERS: tl.constexpr = TILE.IN_REGISTERS
    CROWDED: tl.constexpr = TILE.CROWDED
    QUERY_TERMS: tl.constexpr = FLAGS.HAS_BIAS or FLAGS.HAS_QUERY_REL
    RELATIVE: tl.constexpr = QUERY_TERMS or FLAGS.HAS_KEY_REL
    # Whether what meets the table, q itself or rel_query, gets a gradient through it.
    NEED_R: tl.constexpr = FLAGS.HAS_QUERY_REL and (NEED.REL_QUERY if HAS_REL_QUERY else NEED.QUERY)
    COLUMNS: tl.constexpr = NEED_R or NEED.TABLE or NEED.BIAS
    EDGES: tl.constexpr = FLAGS.OUTSIDE == CLIP
    HIDING: tl.constexpr = CAUSAL or FLAGS.OUTSIDE == MASK
    pid = tl.program_id(0)
    group, h, b = pid % groups, pid // groups % H, pid // groups // H
    W = left + right + 1
    d, x = tl.arange(0, DP), tl.arange(0, RP)
    key_scale, by_table = number_from_bits(score_scale, DTYPE), number_from_bits(table_scale, DTYPE)
    keep_factor = number_from_bits(keep_scale, DTYPE)
    terms = Terms(tables.bias, tables.query_rel, tables.key_rel, left, right, W, by_table)
    terms = head_terms(terms, h, query_rel_head, key_rel_head)
    program = (h.to(tl.int64) * B + b) * groups + group
    table_sums, row_sums = query_sums + program * R * W, bias_sums + program * W
    k_at, v_at = head_at(inputs.k, b, h // sharing), head_at(inputs.v, b, h // sharing)
    mask = Mask(key_mask + b.to(tl.int64) * mask_batch, mask_time)
    row_at = constants + (b.to(tl.int64) * H + h) * T
    edges_at = key_edges + (b.to(tl.int64) * H + h) * S
    for step in tl.range(group, slots, groups, disable_licm=True):
        slot = step
        if CAUSAL:
            slot = slots - 1 - step
        owner = sequence_tile(
            slot, T, S, boundaries.queries, boundaries.keys, sequences, search_steps, FLAGS.PACKED, BM
        )
        first, shift = owner.first, owner.other_end - owner.end
        i = first + tl.arange(0, BM)
        rows, place = (i >= owner.begin) & (i < owner.end), i + shift
        q_at, g_at, r_at = head_at(inputs.q, b, h), head_at(grad, b, h), head_at(inputs.rel_query, b, h)
        delta = tl.load(row_at + i, mask=rows, other=0.0)
        start = tl.load(row_at + plane + i, mask=rows, other=float("inf"))
        live = tl.abs(start) < float("inf")
        queries = load_own(q_at, first, d, live, D, CROWDED)  # [BM, DP]
        dy = load_own(g_at, first, d, live, D, CROWDED)  # [BM, DP]
        total = tl.zeros([BM, DP], DTYPE)
        sum_before, sum_after = tl.zeros([BM], DTYPE), tl.zeros([BM], DTYPE)
        ranges = tile_ranges(owner, shift, left, right, 1 if CAUSAL else 0, FLAGS.OUTSIDE, RELATIVE, BM, BN, NEAR)

        before, after = start, start
        if QUERY_TERMS and EDGES:
            before = tl.load(row_at + 2 * plane + i, mask=rows, other=float("inf"))
            after = tl.load(row_at + 3 * plane + i, mask=rows, other=float("inf"))
        for n in tl.range(0, far_tiles(ranges, BN // NEAR), disable_licm=not IN_REGISTERS):
            tile, is_before = far_tile(n, ranges, BN // NEAR)
            j_first = tile * BN
            j = j_first + tl.arange(0, BN)
            keep = j >= 0
            if HAS_MASK:
                keep = real_keys(mask, j, owner.other_begin, owner.other_end, True)
            key_edge = start[None, :]
            if FLAGS.HAS_KEY_REL and EDGES:
                key_edge = tl.load(edges_at + tl.where(is_before, 0, edge_plane) + j)[None, :]
            keys = load_tile(k_at, j_first, d, keep, D, not HAS_MASK)  # [BN, DP]
            products, scores = far_scores(queries, keys, key_edge, key_scale, FLAGS, False, DTYPE)  # [BM, BN]
            power = tl.exp2(scores - tl.where(is_before, before, after)[:, None])
            if HAS_MASK:
                power = tl.where(keep[None, :], power, 0.0)
            values = load_tile(v_at, j_first, d, keep, D, not HAS_MASK)  # [BN, DP]
            found = matrix(dy, tl.trans(values), tl.zeros([BM, BN], DTYPE))
            if FLAGS.DROPOUT:
                kept = kept_pairs(seed, b, h, i, j_first, threshold, BN, False)
                found = tl.where(kept, found * keep_factor, 0.0)
            found = power * (found - delta[:, None])
            if COLUMNS and EDGES:
                sums = tl.sum(found, 1)
                sum_before += tl.where(is_before, sums, 0.0)
                sum_after += tl.where(is_before, 0.0, sums)
            if NEED.QUERY and FLAGS.QK:
                total = matrix(narrow(found, keys.dtype), keys, total)

        if IN_REGISTERS:
            # Products of another shape have their operands in other registers: load q and dy again, so that their
            # registers are not live across both loops.
            tl.debug_barrier()
            queries = load_tile(q_at, first, d, live, D, False)
            dy = load_tile(g_at, first, d, live, D, False)
        r = queries
        if FLAGS.HAS_QUERY_REL:
            r = load_own(r_at, first, x, live, R, CROWDED)  # [BM, RP]
        r_total = tl.zeros([BM, RP], DTYPE)
        whole = table_columns(anew(-left) if CROWDED else -left, terms, WIDTH, False, FLAGS.OUTSIDE)
        column_sums = tl.zeros([BM, WIDTH], DTYPE)
        by_query = start
        if FLAGS.HAS_QUERY_REL and not SLIDING:
            by_query = query_columns(r, whole, terms, FLAGS, False, DTYPE)  # [BM, WIDTH]
        for n in tl.range(0, near_tiles(ranges), num_stages=NEAR_STAGES, disable_licm=True):
            j_first = near_tile(n, ranges) * NEAR
            j = j_first + tl.arange(0, NEAR)
            keep = real_keys(mask, j, owner.other_begin, owner.other_end, HAS_MASK)
            keys = load_tile(k_at, j_first, d, keep, D, False)  # [NEAR, DP]
            if HIDING and NEED.QUERY and FLAGS.QK:
                keys, bad = finite_rows(keys, DTYPE)
            offset = j[None, :] - place[:, None]
            seen = visible_pairs(offset, terms, CAUSAL, FLAGS.OUTSIDE) & keep[None, :]
            columns = columns_of_tile(whole, first, j_first, shift, terms, BM, WIDTH, FLAGS)
            pairs = Pairs(offset, seen, columns)
            scores = near_scores(queries, r, keys, by_query, pairs, terms, key_scale, FLAGS, False, DTYPE)
            if HIDING and NEED.QUERY and FLAGS.QK:
                scores += bad[None, :]
            power = tl.exp2(scores - start[:, None])
            values = load_tile(v_at, j_first, d, keep, D, False)  # [NEAR, DP]
            found = matrix(dy, tl.trans(values), tl.zeros([BM, NEAR], DTYPE))
            if FLAGS.DROPOUT:
                kept = kept_pairs(seed, b, h, i, j_first, threshold, NEAR, False)
                found = tl.where(kept, found * keep_factor, 0.0)
            found = tl.where(seen, power * (found - delta[:, None]), 0.0)
            if NEED.QUERY and FLAGS.QK:
                total = matrix(narrow(found, keys.dtype), keys, total)
            if COLUMNS:
                if EDGES:
                    sum_before += tl.sum(tl.where(offset < -left, found, 0.0), 1)
                    sum_after += tl.sum(tl.where(offset > right, found, 0.0), 1)
                strict = table_columns(columns.base, terms, WIDTH, SLIDING, ZERO)
                back = columns.base + tl.arange(0, WIDTH)[None, :] + place[:, None] - j_first
                met = take(found, back, strict.valid[None, :] & (back >= 0) & (back < NEAR))  # [BM, WIDTH]
                if SLIDING:
                    if NEED.BIAS:
                        add_to_bias(row_sums, strict.index, tl.sum(met, 0), strict.valid)
                    if NEED_R:
                        weights = load_columns(terms.query_rel, x, strict.index, strict.valid, W, R)
                        r_total = exact_matrix(narrow(met, r.dtype), tl.trans(weights), r_total)
                    if NEED.TABLE:
                        block = Block(r, r_at, first, live)
                        add_products(table_sums, block, narrow(met, r.dtype), strict, W, R, TILE.PIECE)
                else:
                    column_sums += met
        if COLUMNS and not SLIDING:
            if EDGES:
                column_sums = with_edges(column_sums, sum_before, sum_after, W)
            # Places in the tables are found again instead of being kept across the loops.
            last, row = table_columns(anew(-left), terms, WIDTH, False, FLAGS.OUTSIDE), anew(W)
            if NEED_R:
                weights = tl.trans(load_columns(terms.query_rel, x, last.index, last.valid, row, R))
                if HAS_REL_QUERY:
                    r_total = exact_matrix(narrow(column_sums, r.dtype), weights, r_total)
                else:
                    scaled = column_sums * number_from_bits(rel_scale, DTYPE)
                    total *= number_from_bits(scale, DTYPE)
                    total = exact_matrix(narrow(scaled, r.dtype), weights, total)
        if COLUMNS and SLIDING and EDGES:
            for side in tl.static_range(2):
                outermost = W - 1 if side else 0
                sums = sum_after if side else sum_before
                if NEED.BIAS:
                    one = tl.zeros([1], tl.int32) + outermost
                    add_to_bias(row_sums, one, tl.sum(sums, 0), one >= 0)
                if NEED_R:
                    weights = widen(tl.load(terms.query_rel + x * W + outermost, mask=x < R, other=0.0), DTYPE)
                    r_total += sums[:, None] * weights[None, :]
                if NEED.TABLE:
                    met = tl.sum(widen(r, DTYPE) * sums[:, None], 0)
                    add_to_edge(table_sums, x, outermost, met, W, R)
        if NEED_R and (HAS_REL_QUERY or SLIDING):
            r_total *= number_from_bits(rel_scale, DTYPE)
        head = anew(h)  # as above
        if HAS_REL_QUERY and NEED.REL_QUERY:
            store_tile(head_at(gradients.rel_query, b, head), i, r_total, rows, R)
        if NEED.QUERY:
            if SLIDING or HAS_REL_QUERY or not NEED_R:
                total *= number_from_bits(scale, DTYPE)
            if SLIDING and NEED_R and not HAS_REL_QUERY:
                total += r_total
            store_tile(head_at(gradients.q, b, head), i, total, rows, D)
        if COLUMNS and not SLIDING:  # last: the gradients of the queries take no registers any more
            own = (head.to(tl.int64) * B + b) * groups + group
            if NEED.BIAS:
                add_to_bias(bias_sums + own * W, last.index, tl.sum(column_sums, 0), last.valid)
            if NEED.TABLE:
                tl.debug_barrier()
                live = tl.abs(tl.load(row_at + plane + i, mask=rows, other=float("inf"))) < float("inf")  # not held
                r_at = head_at(inputs.rel_query, b, head)
                block = Block(load_own(r_at, first, x, live, R, CROWDED), r_at, first, live)
                table_at = query_sums + own * R * W
                add_products(table_at, block, narrow(column_sums, r.dtype), last, row, R, TILE.PIECE)
