"""The keys' half of the backward pass of attention; tiles of pairs are [keys, queries] here."""

from typing import NamedTuple

import triton
import triton.language as tl

from ..device import narrow, number_from_bits, take, widen
from .depthwise import convolved_back
from .scores import (
    columns_of_tile,
    far_scores,
    head_terms,
    key_columns,
    load_columns,
    near_scores,
    table_columns,
)
from .sums import Block, add_products, add_to_edge, mirrored, with_edges
from .tiles import (
    CLIP,
    MASK,
    VARYING,
    ZERO,
    Heads,
    Mask,
    Pairs,
    Ranges,
    Terms,
    exact_matrix,
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


class Gradients(NamedTuple):
    k: Heads
    v: Heads


class Needs(NamedTuple):
    """Which gradients are wanted: k, v, key_rel."""

    KEY: bool
    VALUE: bool
    TABLE: bool


@triton.jit
def key_columns_back(
    found, block, total, columns, terms, sums, D: tl.constexpr, NEED: tl.constexpr, PIECE: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """From gradients of columns [keys, columns] to those of the keys, ``total`` with them, and to the sums of key_rel.
    block: the tile of keys."""
    keys = block.rows
    small = narrow(found, keys.dtype)
    back = mirrored(columns, terms.W)
    if NEED.KEY:
        weights = load_columns(terms.key_rel, tl.arange(0, keys.shape[1]), back.index, back.valid, terms.W, D)
        total = exact_matrix(small, tl.trans(weights), total)
    if NEED.TABLE:
        # A key that nothing sees adds nothing; the gradients of one that is seen are no numbers either.
        keys, bad = finite_rows(keys, DTYPE)
        block = Block(keys, block.tensor, block.first, block.keep & (bad == bad))
        add_products(sums, block, small, back, terms.W, D, PIECE)
    return total


@triton.jit(do_not_specialize=VARYING)
def grad_keys(
    grad, inputs, tables, key_edges, depthwise, constants, key_mask, boundaries, seed, gradients, key_sums,
    T, S, B, H, sharing, left, right, slots, groups, sequences, search_steps, scale, score_scale, table_scale,
    threshold, keep_scale, query_rel_head, key_rel_head, mask_batch, mask_time, plane, edge_plane,
    FLAGS: tl.constexpr, NEED: tl.constexpr, TILE: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """grad_k and grad_v for every ``groups``-th tile of BN keys, over all query heads that share them, and the sums
    over these for key_rel, key_sums[h, b, group, D, W]."""
    D: tl.constexpr = FLAGS.D
    DP: tl.constexpr = FLAGS.DP
    CAUSAL: tl.constexpr = FLAGS.CAUSAL
    SLIDING: tl.constexpr = FLAGS.SLIDING
    BM: tl.constexpr = TILE.BM
    BN: tl.constexpr = TILE.BN
    NEAR: tl.constexpr = TILE.NEAR
    NEAR_STAGES: tl.constexpr = TILE.NEAR_STAGES
    WIDTH: tl.constexpr = TILE.WIDTH
    IN_REGISTERS: tl.constexpr = TILE.IN_REGISTERS
    QUERY_TERMS: tl.constexpr = FLAGS.HAS_BIAS or FLAGS.HAS_QUERY_REL
    RELATIVE: tl.constexpr = QUERY_TERMS or FLAGS.HAS_KEY_REL
    # Whether the scores' gradients are wanted, and those of the key's columns among them.
    SCORES: tl.constexpr = NEED.KEY or NEED.TABLE
    COLUMNS: tl.constexpr = FLAGS.HAS_KEY_REL and SCORES
    EDGES: tl.constexpr = FLAGS.OUTSIDE == CLIP
    HIDING: tl.constexpr = CAUSAL or FLAGS.OUTSIDE == MASK
    pid = tl.program_id(0)
    shared = H // sharing
    group, g, b = pid % groups, pid // groups % shared, pid // groups // shared
    W = left + right + 1
    d, x = tl.arange(0, DP), tl.arange(0, FLAGS.RP)
    key_scale, by_table = number_from_bits(score_scale, DTYPE), number_from_bits(table_scale, DTYPE)
    keep_factor = number_from_bits(keep_scale, DTYPE)
    mask = Mask(key_mask + b.to(tl.int64) * mask_batch, mask_time)
    for slot in tl.range(group, slots, groups, disable_licm=True):
        owner = sequence_tile(
            slot, S, T, boundaries.keys, boundaries.queries, sequences, search_steps, FLAGS.PACKED, BN
        )
        first, shift = owner.first, owner.end - owner.other_end
        j = first + tl.arange(0, BN)
        keep = real_keys(mask, j, owner.begin, owner.end, FLAGS.HAS_MASK)
        k_at = head_at(inputs.k, b, g)
        keys = load_tile(k_at, first, d, keep, D, False)  # [BN, DP]
        values = load_tile(head_at(inputs.v, b, g), first, d, keep, D, False)  # [BN, DP]
        block = Block(keys, k_at, first, keep)
        key_total, value_total = tl.zeros([BN, DP], DTYPE), tl.zeros([BN, DP], DTYPE)
        # Seen from the keys the window is mirrored, and what is causal is what comes after.
        ranges = tile_ranges(owner, -shift, right, left, -1 if CAUSAL else 0, FLAGS.OUTSIDE, RELATIVE, BN, BM, NEAR)
        for head in tl.range(0, sharing, disable_licm=True):
            h = g * sharing + head
            terms = Terms(tables.bias, tables.query_rel, tables.key_rel, left, right, W, by_table)
            terms = head_terms(terms, h, query_rel_head, key_rel_head)
            q_at, g_at = head_at(inputs.q, b, h), head_at(grad, b, h)
            row_at = constants + (b.to(tl.int64) * H + h) * T
            sums_at = key_sums + ((h.to(tl.int64) * B + b) * groups + group) * D * W
            whole = table_columns(-left, terms, WIDTH, False, FLAGS.OUTSIDE)
            column_sums = tl.zeros([BN, WIDTH], DTYPE)
            # Before and behind the window of the queries.
            sum_before, sum_after = tl.zeros([BN], DTYPE), tl.zeros([BN], DTYPE)
            edge_before, edge_after = sum_before, sum_after
            if FLAGS.HAS_KEY_REL and EDGES:
                at = key_edges + (b.to(tl.int64) * H + h) * S + j
                edge_before = tl.load(at, mask=keep, other=0.0)
                edge_after = tl.load(at + edge_plane, mask=keep, other=0.0)
            by_key = sum_before
            if FLAGS.HAS_KEY_REL and not SLIDING:
                by_key = key_columns(keys, whole, terms, key_scale, D, False, DTYPE)  # [BN, WIDTH]
            for n in tl.range(0, near_tiles(ranges), num_stages=NEAR_STAGES, disable_licm=True):
                i_first = near_tile(n, ranges) * NEAR
                i = i_first + tl.arange(0, NEAR)
                rows = (i >= owner.other_begin) & (i < owner.other_end)
                start = tl.load(row_at + plane + i, mask=rows, other=float("inf"))
                live = tl.abs(start) < float("inf")
                # Without hidden pairs a NaN of q has its way, and q need not wait for start.
                queries = load_tile(q_at, i_first, d, live if HIDING else rows, D, False)  # [NEAR, DP]
                offset = j[:, None] - (i + shift)[None, :]
                seen = visible_pairs(offset, terms, CAUSAL, FLAGS.OUTSIDE) & rows[None, :]
                columns = columns_of_tile(whole, i_first, first, shift, terms, NEAR, WIDTH, FLAGS)
                r = queries
                if FLAGS.HAS_QUERY_REL:
                    r = load_tile(head_at(inputs.rel_query, b, h), i_first, x, rows, FLAGS.R, False)  # [NEAR, RP]
                pairs = Pairs(offset, seen, columns)
                scores = near_scores(queries, r, keys, by_key, pairs, terms, key_scale, FLAGS, True, DTYPE)
                power = tl.where(seen, tl.exp2(scores - start[None, :]), 0.0)
                dy = load_tile(g_at, i_first, d, live, D, False)  # [NEAR, DP]
                if FLAGS.DROPOUT:
                    kept = kept_pairs(seed, b, h, i, first, threshold, BN, True)
                if NEED.VALUE:
                    weights = power
                    if FLAGS.DROPOUT:
                        weights = tl.where(kept, power * keep_factor, 0.0)
                    value_total = matrix(narrow(weights, dy.dtype), dy, value_total)
                if SCORES:
                    found = matrix(values, tl.trans(dy), tl.zeros([BN, NEAR], DTYPE))
                    if FLAGS.DROPOUT:
                        found = tl.where(kept, found * keep_factor, 0.0)
                    found = power * (found - tl.load(row_at + i, mask=rows, other=0.0)[None, :])
                    if HIDING:
                        found = tl.where(seen, found, 0.0)
                    if NEED.KEY and FLAGS.QK:
                        key_total = matrix(narrow(found, queries.dtype), queries, key_total)
                if COLUMNS:
                    found = tl.where(keep[:, None], found, 0.0)
                    if EDGES:
                        sum_before += tl.sum(tl.where(offset < -left, found, 0.0), 1)
                        sum_after += tl.sum(tl.where(offset > right, found, 0.0), 1)
                    strict = table_columns(columns.base, terms, WIDTH, SLIDING, ZERO)
                    back = j[:, None] - columns.base - tl.arange(0, WIDTH)[None, :] - shift - i_first
                    met = take(found, back, strict.valid[None, :] & (back >= 0) & (back < NEAR))  # [BN, WIDTH]
                    if SLIDING:
                        key_total = key_columns_back(
                            met, block, key_total, strict, terms, sums_at, D, NEED, TILE.PIECE, DTYPE
                        )
                    else:
                        column_sums += met

            far_first, far_last = ranges.b, ranges.e
            if FLAGS.HAS_BIAS and EDGES:
                # A bias of -inf hides all queries of a side, also those that see nothing and may have any gradient.
                hidden = widen(tl.load(terms.bias + W - 1), DTYPE) == float("-inf")
                far_first = tl.where(hidden, ranges.c, ranges.b)
                far_last = tl.where(widen(tl.load(terms.bias), DTYPE) == float("-inf"), ranges.d, ranges.e)
            seen_ranges = Ranges(ranges.a, far_first, ranges.c, ranges.d, far_last, ranges.f)
            for n in tl.range(0, far_tiles(seen_ranges, BM // NEAR), disable_licm=not IN_REGISTERS):
                tile, is_before = far_tile(n, seen_ranges, BM // NEAR)
                i_first = tile * BM
                i = i_first + tl.arange(0, BM)
                rows = i >= 0
                queries = load_tile(q_at, i_first, d, rows, D, True)  # [BM, DP]
                key_edge = tl.where(is_before, edge_after, edge_before)[:, None]
                products, scores = far_scores(queries, keys, key_edge, key_scale, FLAGS, True, DTYPE)  # [BN, BM]
                # The key lies behind the window of a query that lies before the window of the key.
                which = plane
                if QUERY_TERMS and EDGES:
                    which = tl.where(is_before, 3, 2) * plane
                power = tl.exp2(scores - tl.load(row_at + which + i)[None, :])
                dy = load_tile(g_at, i_first, d, rows, D, True)  # [BM, DP]
                if FLAGS.DROPOUT:
                    kept = kept_pairs(seed, b, h, i, first, threshold, BN, True)
                if NEED.VALUE:
                    weights = power
                    if FLAGS.DROPOUT:
                        weights = tl.where(kept, power * keep_factor, 0.0)
                    value_total = matrix(narrow(weights, dy.dtype), dy, value_total)
                if SCORES:
                    found = matrix(values, tl.trans(dy), tl.zeros([BN, BM], DTYPE))
                    if FLAGS.DROPOUT:
                        found = tl.where(kept, found * keep_factor, 0.0)
                    found = power * (found - tl.load(row_at + i)[None, :])
                    if COLUMNS and EDGES:
                        sums = tl.sum(found, 1)
                        sum_before += tl.where(is_before, 0.0, sums)
                        sum_after += tl.where(is_before, sums, 0.0)
                    if NEED.KEY and FLAGS.QK:
                        key_total = matrix(narrow(found, queries.dtype), queries, key_total)

            if COLUMNS and not SLIDING:
                if EDGES:
                    before, after = tl.where(keep, sum_before, 0.0), tl.where(keep, sum_after, 0.0)
                    column_sums = with_edges(column_sums, before, after, W)
                key_total = key_columns_back(
                    column_sums, block, key_total, whole, terms, sums_at, D, NEED, TILE.PIECE, DTYPE
                )
            if COLUMNS and SLIDING and EDGES:
                for side in tl.static_range(2):
                    outermost = 0 if side else W - 1
                    sums = tl.where(keep, sum_after if side else sum_before, 0.0)
                    if NEED.KEY:
                        weights = widen(tl.load(terms.key_rel + d * W + outermost, mask=d < D, other=0.0), DTYPE)
                        key_total += sums[:, None] * weights[None, :]
                    if NEED.TABLE:
                        met = tl.sum(widen(finite_rows(keys, DTYPE)[0], DTYPE) * sums[:, None], 0)
                        add_to_edge(sums_at, d, outermost, met, W, D)

        existing = (j >= owner.begin) & (j < owner.end)
        if NEED.KEY:
            key_total = tl.where(keep[:, None], key_total * number_from_bits(scale, DTYPE), 0.0)
            store_tile(head_at(gradients.k, b, g), j, key_total, existing, D)
        if NEED.VALUE:
            if FLAGS.HAS_CONV:
                value_total = convolved_back(value_total, grad, depthwise, b, g, owner, left, W, sharing, FLAGS)
            value_total = tl.where(keep[:, None], value_total, 0.0)
            store_tile(head_at(gradients.v, b, g), j, value_total, existing, D)
