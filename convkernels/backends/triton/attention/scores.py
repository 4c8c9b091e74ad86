"""Scores of tiles of pairs, for the forward pass and for both halves of the backward pass, which find them again.

A column of a relative table belongs to an offset. A tile of columns begins at the offset ``base``: with a whole table
in a tile (SLIDING False) that is -left; otherwise it is that of the tile's first corner, and the tile has the columns
of all offsets of its pairs, each where it belongs. TRANSPOSED: tiles are [keys, queries], as the keys' pass has them.
"""

import triton
import triton.language as tl

from ..device import look_up, widen
from .tiles import CLIP, LOG2E, Columns, Terms, exact_matrix, matrix


@triton.jit
def head_terms(terms, h, query_rel_head, key_rel_head):
    """``terms`` of all heads, from those of head h on. A table without heads has a stride of 0."""
    h = h.to(tl.int64)
    return Terms(
        terms.bias + h * terms.W,
        terms.query_rel + h * query_rel_head,
        terms.key_rel + h * key_rel_head,
        terms.left,
        terms.right,
        terms.W,
        terms.scale,
    )


@triton.jit
def table_columns(base, terms, WIDTH: tl.constexpr, SLIDING: tl.constexpr, OUTSIDE: tl.constexpr):
    """The WIDTH columns of a tile that begins at ``base``."""
    offset = base + tl.arange(0, WIDTH)
    inside = (offset >= -terms.left) & (offset <= terms.right)
    column = tl.minimum(tl.maximum(offset, -terms.left), terms.right) + terms.left
    if SLIDING and OUTSIDE == CLIP:
        inside = column >= 0
    return Columns(base, column, inside)


@triton.jit
def columns_of_tile(
    whole, query_first, key_first, shift, terms, QUERIES: tl.constexpr, WIDTH: tl.constexpr, FLAGS: tl.constexpr
):
    """The columns for the tile of QUERIES queries and any keys that begins there: unless SLIDING the ``whole``
    table's."""
    if FLAGS.SLIDING:
        base = key_first - (query_first + QUERIES - 1 + shift)
        return table_columns(base, terms, WIDTH, True, FLAGS.OUTSIDE)
    else:
        return whole


@triton.jit
def column_of_pairs(offset, base, terms, SLIDING: tl.constexpr, OUTSIDE: tl.constexpr):
    """The column of a tile for each pair, some column where it has none, and whether it has one."""
    if SLIDING:
        return offset - base, offset == offset
    inside = (offset >= -terms.left) & (offset <= terms.right)
    if OUTSIDE == CLIP:
        inside = offset == offset
    return tl.minimum(tl.maximum(offset, -terms.left), terms.right) - base, inside


@triton.jit
def load_columns(table, row, index, valid, W, ROWS: tl.constexpr):
    """A tile of a table [ROWS, W] as it is stored, 0 where it has no such element."""
    at = table + (row[:, None] * W + index[None, :])
    return tl.load(at, mask=(row < ROWS)[:, None] & valid[None, :], other=0.0)


@triton.jit
def edge_of_rows(rows, table, column, W, scale, ROWS: tl.constexpr, DTYPE: tl.constexpr):
    """scale * rows @ table[:, column]: [rows]."""
    row = tl.arange(0, rows.shape[1])
    values = widen(tl.load(table + (row * W + column), mask=row < ROWS, other=0.0), DTYPE)
    return tl.sum(widen(rows, DTYPE) * values[None, :], 1) * scale


@triton.jit
def query_edge(r, terms, column, FLAGS: tl.constexpr, DTYPE: tl.constexpr):
    """What the tables add to the scores of each query at one column; r: [queries, R]."""
    edge = tl.zeros([r.shape[0]], DTYPE)
    if FLAGS.HAS_QUERY_REL:
        edge = edge_of_rows(r, terms.query_rel, column, terms.W, terms.scale, FLAGS.R, DTYPE)
    if FLAGS.HAS_BIAS:
        edge += widen(tl.load(terms.bias + column), DTYPE) * LOG2E
    return edge


@triton.jit
def query_columns(r, columns, terms, FLAGS: tl.constexpr, TRANSPOSED: tl.constexpr, DTYPE: tl.constexpr):
    """The same for columns of a tile: [queries, columns], or [columns, queries] if TRANSPOSED."""
    index, valid = columns.index, columns.valid
    weights = load_columns(terms.query_rel, tl.arange(0, r.shape[1]), index, valid, terms.W, FLAGS.R)
    if TRANSPOSED:
        total = tl.zeros([index.shape[0], r.shape[0]], DTYPE)
        found = exact_matrix(tl.trans(weights), tl.trans(r), total) * terms.scale
    else:
        found = exact_matrix(r, weights, tl.zeros([r.shape[0], index.shape[0]], DTYPE)) * terms.scale
    if FLAGS.HAS_BIAS:
        value = widen(tl.load(terms.bias + index, mask=valid, other=0.0), DTYPE) * LOG2E
        found += value[:, None] if TRANSPOSED else value[None, :]
    return found


@triton.jit
def edge_of_columns(by_query, column):
    """One of a whole table's columns from ``query_columns``, [queries]."""
    index = tl.arange(0, by_query.shape[1])
    return tl.sum(tl.where((index == column)[None, :], by_query, 0.0), 1)


@triton.jit
def key_columns(k, columns, terms, scale, D: tl.constexpr, TRANSPOSED: tl.constexpr, DTYPE: tl.constexpr):
    """What key_rel adds to the scores of each key: [keys, columns], or [columns, keys] if TRANSPOSED. Columns count as
    for queries; the key looks back at them."""
    index = columns.index
    back = terms.W - 1 - index
    weights = load_columns(terms.key_rel, tl.arange(0, k.shape[1]), back, columns.valid, terms.W, D)
    if TRANSPOSED:
        return exact_matrix(tl.trans(weights), tl.trans(k), tl.zeros([index.shape[0], k.shape[0]], DTYPE)) * scale
    else:  # only the branch taken may decide the result's shape
        return exact_matrix(k, weights, tl.zeros([k.shape[0], index.shape[0]], DTYPE)) * scale


@triton.jit
def bias_of_pairs(pairs, terms, OUTSIDE: tl.constexpr, DTYPE: tl.constexpr):
    """The bias of each pair, read from the first-level cache."""
    column, inside = column_of_pairs(pairs.offset, -terms.left, terms, False, OUTSIDE)
    return widen(tl.load(terms.bias + column, mask=pairs.seen & inside, other=0.0), DTYPE) * LOG2E


@triton.jit
def products(queries, keys, FLAGS: tl.constexpr, TRANSPOSED: tl.constexpr, DTYPE: tl.constexpr):
    """Those of queries and keys, where scores contain them: [queries, keys], or [keys, queries] if TRANSPOSED."""
    if TRANSPOSED:
        found = tl.zeros([keys.shape[0], queries.shape[0]], DTYPE)
        if FLAGS.QK:
            found = matrix(keys, tl.trans(queries), found)
    else:
        found = tl.zeros([queries.shape[0], keys.shape[0]], DTYPE)
        if FLAGS.QK:
            found = matrix(queries, tl.trans(keys), found)
    return found


@triton.jit
def near_terms(
    r, keys, held, pairs, terms, key_scale, FLAGS: tl.constexpr, TRANSPOSED: tl.constexpr, DTYPE: tl.constexpr
):
    """What the tables add to the scores of a near tile, where there are any."""
    spot, inside = column_of_pairs(pairs.offset, pairs.columns.base, terms, FLAGS.SLIDING, FLAGS.OUTSIDE)
    added = tl.zeros(pairs.offset.shape, DTYPE)
    if FLAGS.HAS_QUERY_REL:
        by_query = held
        if TRANSPOSED or FLAGS.SLIDING:
            by_query = query_columns(r, pairs.columns, terms, FLAGS, TRANSPOSED, DTYPE)
        added = look_up(by_query, spot, inside, 0 if TRANSPOSED else 1)
    elif FLAGS.HAS_BIAS:
        added = bias_of_pairs(pairs, terms, FLAGS.OUTSIDE, DTYPE)
    if FLAGS.HAS_KEY_REL:
        by_key = held
        if not TRANSPOSED or FLAGS.SLIDING:
            by_key = key_columns(keys, pairs.columns, terms, key_scale, FLAGS.D, not TRANSPOSED, DTYPE)
        added += look_up(by_key, spot, inside, 1 if TRANSPOSED else 0)
    return added


@triton.jit
def near_scores(
    queries, r, keys, held, pairs, terms, key_scale, FLAGS: tl.constexpr, TRANSPOSED: tl.constexpr, DTYPE: tl.constexpr
):
    """The scores of a near tile, also of pairs that are hidden. held: the columns of the owner (``query_columns``, if
    TRANSPOSED ``key_columns``), which unless SLIDING are the same for all its tiles."""
    # The terms come first: of the layouts of two tiles that meet, Triton gives the later one's to the sums over rows.
    # That in which columns are looked up has a row in all lanes of a warp, and five shuffles for each sum.
    RELATIVE: tl.constexpr = FLAGS.HAS_BIAS or FLAGS.HAS_QUERY_REL or FLAGS.HAS_KEY_REL
    if RELATIVE:
        added = near_terms(r, keys, held, pairs, terms, key_scale, FLAGS, TRANSPOSED, DTYPE)
    scores = products(queries, keys, FLAGS, TRANSPOSED, DTYPE)
    if FLAGS.QK:
        scores *= key_scale
    if RELATIVE:
        scores += added
    return scores


@triton.jit
def far_scores(queries, keys, edge, key_scale, FLAGS: tl.constexpr, TRANSPOSED: tl.constexpr, DTYPE: tl.constexpr):
    """For a far tile: products of queries and keys, negated where the scale is negative; and the scores but for what
    the tables add to each query. edge: what key_rel adds to each key."""
    found = products(queries, keys, FLAGS, TRANSPOSED, DTYPE)
    if FLAGS.QK and FLAGS.NEGATIVE:
        found = -found
    scores = found * (-key_scale if FLAGS.NEGATIVE else key_scale)
    if FLAGS.HAS_KEY_REL and FLAGS.OUTSIDE == CLIP:
        scores += edge
    return found, scores
