"""What the attention kernels share: tiles of pairs, the columns of relative tables, dropout, the depthwise term.

An *owner* is a tile of queries or keys that a program keeps; it walks over tiles of the other kind. All tiles begin at
multiples of their height. Tiles whose pairs are all visible and all beyond the same end of the window are *far*: one
column of each table serves them. The others are *near*. Their products multiply hidden rows by 0, which NaN and
infinity survive: where causality or the window hides pairs, rows that hold one count as 0 there, and the pairs that see
them get NaN. Scores are in units of log(2), so that powers are those of 2.
"""

import triton
import triton.language as tl

from ..conv.taps import INTERPRETED, keeps, product, sequence_bounds, widen

CLIP, ZERO, MASK = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
LOG2E = tl.constexpr(1.4426950408889634)

# What may change from call to call of a model without another compilation. Strides are not among it: whether they are 1
# or multiples of 16 decides how wide accesses are.
VARYING = [
    "T", "S", "B", "H", "sharing", "left", "right", "slots", "groups", "rows", "sequences", "search_steps", "scale",
    "rel_scale", "score_scale", "table_scale", "threshold", "keep_scale", "query_rel_head", "key_rel_head",
    "mask_batch", "mask_time", "plane", "edge_plane",
]  # fmt: skip


# -- numbers ---


@triton.jit
def matrix(a, b, total):
    """total + a @ b for matrices of one type; float32 and float64 are not rounded."""
    if INTERPRETED:
        a, b = widen(a, total.dtype), widen(b, total.dtype)
    return tl.dot(a, b, total, input_precision="ieee", out_dtype=total.dtype)


@triton.jit
def exact_matrix(a, b, total):
    """The same for matrices of any types, to the accuracy of ``total``."""
    if a.dtype == b.dtype:
        return matrix(a, b, total)
    else:
        A_PARTS: tl.constexpr = 1 if a.dtype == tl.bfloat16 else (2 if a.dtype == tl.float16 else 3)
        B_PARTS: tl.constexpr = 1 if b.dtype == tl.bfloat16 else (2 if b.dtype == tl.float16 else 3)
        return product(widen(a, tl.float32), widen(b, tl.float32), total, A_PARTS, B_PARTS)


# -- tensors ---


@triton.jit
def head_at(x, b, h, batch_stride, head_stride):
    """A pointer to x[b, 0, h, 0]."""
    return x + (b.to(tl.int64) * batch_stride + h.to(tl.int64) * head_stride)


@triton.jit
def load_tile(at, first, column, keep, row_stride, column_stride, D: tl.constexpr, ALL: tl.constexpr):
    """Rows of x from ``first`` on, as they are stored; 0 where not ``keep`` (with ALL every row is kept) or beyond D.
    Only the first row's place takes 64 bits; within a tile 32 are enough (the host sees to it) and leave registers to
    other things."""
    at += tl.cast(first, tl.int64) * row_stride
    at = at + (tl.arange(0, keep.shape[0])[:, None] * row_stride + column[None, :] * column_stride)
    if D == column.shape[0]:
        if ALL:
            return tl.load(at)
        return tl.load(at, mask=keep[:, None], other=0.0)
    if ALL:
        return tl.load(at, mask=(column < D)[None, :], other=0.0)
    return tl.load(at, mask=keep[:, None] & (column < D)[None, :], other=0.0)


@triton.jit
def finite_rows(x, DTYPE: tl.constexpr):
    """x with 0 for the rows that hold a NaN or an infinity, and NaN for each of these rows, 0 for the others."""
    wide = widen(x, DTYPE)
    bad = tl.sum(wide - wide, 1)
    return tl.where((bad == bad)[:, None], x, tl.zeros_like(x)), bad


@triton.jit
def real_keys(at, j, begin, end, stride, HAS_MASK: tl.constexpr):
    """Which keys exist and are not padding."""
    keep = (j >= begin) & (j < end)
    if HAS_MASK:
        keep = keep & (tl.load(at + j.to(tl.int64) * stride, mask=keep, other=0) != 0)
    return keep


# -- tiles ---


@triton.jit
def sequence_tile(
    slot, T, S, own_bounds, other_bounds, sequences, search_steps, PACKED: tl.constexpr, BLOCK: tl.constexpr
):
    """First row of the owner's tile number ``slot``, begin and end of its sequence, begin and end of the sequence of
    the other kind. A tile has rows of one sequence. Sequence n begins in tile begin // BLOCK + n, so that the host can
    count the tiles (T // BLOCK + sequences) and a program can find its own; those left over begin behind the end."""
    first, begin, end, other_begin, other_end = slot * BLOCK, slot * 0, slot * 0 + T, slot * 0, slot * 0 + S
    if PACKED:
        number = slot * 0
        above = number + sequences
        for _ in range(search_steps):
            middle = (number + above) // 2
            right = tl.load(own_bounds + middle).to(tl.int32) // BLOCK + middle <= slot
            # An interval of one is already decided; its middle is its lower end.
            number = tl.where(right, middle, number)
            above = tl.where(right, above, middle)
        begin, end = sequence_bounds(number, T, own_bounds)
        other_begin, other_end = sequence_bounds(number, S, other_bounds)
        first = (slot - number) * BLOCK
    return first, begin, end, other_begin, other_end


@triton.jit
def clamp_tile(tile, least, most):
    return tl.minimum(tl.maximum(tile, least), most)


@triton.jit
def tile_ranges(
    first, begin, end, other_begin, other_end, shift, before, after,
    CAUSAL: tl.constexpr, OUTSIDE: tl.constexpr, RELATIVE: tl.constexpr, BLOCK: tl.constexpr, OTHER: tl.constexpr,
    NEAR: tl.constexpr,
):  # fmt: skip
    """The tiles that an owner of BLOCK rows meets, as six ends of ranges a <= b <= c <= d <= e <= f: [b, c) and [d, e)
    are far, before and after the window; [a, b), [c, d) and [e, f) are near. All count in tiles of NEAR rows; far ones
    have OTHER.

    Row n of the owner is at place n + shift among the other kind, and its window reaches from ``before`` places before
    it to ``after`` places behind it. CAUSAL: 1 if it sees nothing behind its place, -1 if nothing before it.
    """
    low = tl.maximum(first, begin) + shift
    high = tl.minimum(first + BLOCK, end) - 1 + shift
    some_begin, some_end, all_begin, all_end = other_begin, other_end, other_begin, other_end
    if CAUSAL == 1:
        some_end, all_end = tl.minimum(some_end, high + 1), tl.minimum(all_end, low + 1)
    if CAUSAL == -1:
        some_begin, all_begin = tl.maximum(some_begin, low), tl.maximum(all_begin, high)
    if OUTSIDE == MASK:
        some_begin, all_begin = tl.maximum(some_begin, low - before), tl.maximum(all_begin, high - before)
        some_end, all_end = tl.minimum(some_end, high + after + 1), tl.minimum(all_end, low + after + 1)
    # Either side may have no rows, also in the middle of a tile.
    some = (tl.maximum(first, begin) < end) & (some_begin < some_end)
    some_begin, some_end = tl.where(some, some_begin, 0), tl.where(some, some_end, 0)
    a = some_begin // OTHER
    f = tl.cdiv(some_end, OTHER)
    b = clamp_tile(tl.cdiv(tl.maximum(all_begin, 0), OTHER), a, f)
    e = clamp_tile(tl.maximum(all_end, 0) // OTHER, b, f)
    c = e
    d = e
    if RELATIVE:
        c = clamp_tile(tl.maximum(low - before, 0) // OTHER, b, e)
        d = clamp_tile(tl.cdiv(tl.maximum(high + after + 1, 0), OTHER), c, e)
    SPLIT: tl.constexpr = OTHER // NEAR
    last = tl.maximum(tl.cdiv(some_end, NEAR), e * SPLIT)
    return some_begin // NEAR, b * SPLIT, c * SPLIT, d * SPLIT, e * SPLIT, last


@triton.jit
def near_tile(n, a, b, c, d, e):
    """The n-th near tile, of NEAR rows."""
    head, middle = b - a, b - a + d - c
    return tl.where(n < head, a + n, tl.where(n < middle, c + n - head, e + n - middle))


@triton.jit
def far_tile(n, b, c, d, SPLIT: tl.constexpr):
    """The n-th far tile, of SPLIT * NEAR rows, and whether it lies before the window."""
    head = (c - b) // SPLIT
    return tl.where(n < head, b // SPLIT + n, d // SPLIT + n - head), n < head


# -- pairs; ``offset`` is the place of the key less that of the query ---


@triton.jit
def visible_pairs(offset, left, right, CAUSAL: tl.constexpr, OUTSIDE: tl.constexpr):
    """Which pairs of existing queries and keys may meet."""
    seen = offset == offset
    if CAUSAL:
        seen = offset <= 0
    if OUTSIDE == MASK:
        seen = seen & (offset >= -left) & (offset <= right)
    return seen


@triton.jit
def kept_pairs(seed, b, h, i, j_first, threshold, COLUMNS: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Which pairs of the queries i and the COLUMNS keys from j_first, a multiple of 4, dropout keeps: [i, j], or [j, i]
    if TRANSPOSED. Philox4x32-10 of the coordinates, each block of 4 words drawn once."""
    ROWS: tl.constexpr = i.shape[0]
    quad = j_first // 4 + tl.arange(0, COLUMNS // 4)
    if TRANSPOSED:
        zero = (quad * 0)[:, None] + (i * 0)[None, :]
        i, quad = zero + i[None, :], zero + quad[:, None]
    else:
        zero = (i * 0)[:, None] + (quad * 0)[None, :]
        i, quad = zero + i[:, None], zero + quad[None, :]
    word0, word1, word2, word3 = tl.philox(tl.load(seed), i, zero + b, zero + h, quad)
    even = tl.join(keeps(word0, threshold).to(tl.int8), keeps(word1, threshold).to(tl.int8))
    keep = tl.join(even, tl.join(keeps(word2, threshold).to(tl.int8), keeps(word3, threshold).to(tl.int8)))
    # keep[..., low, high] is word 2 * high + low.
    if TRANSPOSED:
        keep = tl.reshape(tl.permute(keep, (0, 3, 2, 1)), (COLUMNS, ROWS))
    else:
        keep = tl.reshape(tl.permute(keep, (0, 1, 3, 2)), (ROWS, COLUMNS))
    return keep != 0


# -- columns of relative tables. Column number a of a tile belongs to the offset base + a: with a whole table in a tile
# (SLIDING False) base is -left; otherwise it is that of the tile's first corner, and the tile holds the columns of all
# its offsets, each where it belongs ---


@triton.jit
def first_offset(query_first, key_first, shift, left, QUERIES: tl.constexpr, SLIDING: tl.constexpr):
    """``base`` for the tile of QUERIES queries and any keys that begins there."""
    if SLIDING:
        return key_first - (query_first + QUERIES - 1 + shift)
    return -left


@triton.jit
def table_columns(base, left, right, WIDTH: tl.constexpr, SLIDING: tl.constexpr, OUTSIDE: tl.constexpr):
    """Which column of the table each column of a tile shows, and whether it shows any."""
    offset = base + tl.arange(0, WIDTH)
    inside = (offset >= -left) & (offset <= right)
    column = tl.minimum(tl.maximum(offset, -left), right) + left
    if SLIDING and OUTSIDE == CLIP:
        inside = column >= 0
    return column, inside


@triton.jit
def tile_column(offset, base, left, right, SLIDING: tl.constexpr, OUTSIDE: tl.constexpr):
    """The column of a tile for each pair, and whether the pair has one."""
    if SLIDING:
        return offset - base, offset == offset
    inside = (offset >= -left) & (offset <= right)
    if OUTSIDE == CLIP:
        inside = offset == offset
    return tl.minimum(tl.maximum(offset, -left), right) - base, inside


@triton.jit
def load_columns(table, row, column, valid, W, ROWS: tl.constexpr):
    """A tile of a table [ROWS, W] as it is stored, 0 where it has no such element."""
    at = table + (row[:, None] * W + column[None, :])
    return tl.load(at, mask=(row < ROWS)[:, None] & valid[None, :], other=0.0)


@triton.jit
def edge_of_rows(rows, table, row, column, W, scale, ROWS: tl.constexpr, DTYPE: tl.constexpr):
    """scale * rows @ table[:, column]."""
    values = widen(tl.load(table + (row * W + column), mask=row < ROWS, other=0.0), DTYPE)
    return tl.sum(widen(rows, DTYPE) * values[None, :], 1) * scale


@triton.jit
def query_edge(
    r, query_rel, bias, column, W, rel_scale, R: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_QUERY_REL: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """What the tables of one head add to the scores of each query at one column; r: [queries, R]."""
    edge = tl.zeros([r.shape[0]], DTYPE)
    if HAS_QUERY_REL:
        edge = edge_of_rows(r, query_rel, tl.arange(0, r.shape[1]), column, W, rel_scale, R, DTYPE)
    if HAS_BIAS:
        edge += widen(tl.load(bias + column), DTYPE) * LOG2E
    return edge


@triton.jit
def query_columns(
    r, query_rel, bias, column, valid, W, rel_scale, R: tl.constexpr, HAS_BIAS: tl.constexpr,
    TRANSPOSED: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The same for columns of a tile: [queries, columns], or [columns, queries] if TRANSPOSED."""
    weights = load_columns(query_rel, tl.arange(0, r.shape[1]), column, valid, W, R)
    if TRANSPOSED:
        found = exact_matrix(tl.trans(weights), tl.trans(r), tl.zeros([column.shape[0], r.shape[0]], DTYPE)) * rel_scale
    else:
        found = exact_matrix(r, weights, tl.zeros([r.shape[0], column.shape[0]], DTYPE)) * rel_scale
    if HAS_BIAS:
        value = widen(tl.load(bias + column, mask=valid, other=0.0), DTYPE) * LOG2E
        found += value[:, None] if TRANSPOSED else value[None, :]
    return found


@triton.jit
def key_columns(k, key_rel, column, valid, W, scale, D: tl.constexpr, TRANSPOSED: tl.constexpr, DTYPE: tl.constexpr):
    """What key_rel adds to the scores of each key: [keys, columns], or [columns, keys] if TRANSPOSED. ``column`` counts
    as for queries; the key looks back at them."""
    weights = load_columns(key_rel, tl.arange(0, k.shape[1]), W - 1 - column, valid, W, D)
    if TRANSPOSED:
        return exact_matrix(tl.trans(weights), tl.trans(k), tl.zeros([column.shape[0], k.shape[0]], DTYPE)) * scale
    else:  # only the branch taken may decide the result's shape
        return exact_matrix(k, weights, tl.zeros([k.shape[0], column.shape[0]], DTYPE)) * scale


@triton.jit
def bias_of_pairs(bias, offset, seen, left, right, OUTSIDE: tl.constexpr, DTYPE: tl.constexpr):
    """The bias of each pair, read from the first-level cache."""
    column, inside = tile_column(offset, -left, left, right, False, OUTSIDE)
    return widen(tl.load(bias + column, mask=seen & inside, other=0.0), DTYPE) * LOG2E


# -- the depthwise term ---


@triton.jit
def convolved(
    v_at, mask_at, taps, conv_bias, conv_scale, first_place, rows, begin, end, left, W, v_time, v_channel, mask_time,
    D: tl.constexpr, DP: tl.constexpr, CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, HAS_CONV_BIAS: tl.constexpr,
    HAS_CONV_SCALE: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """conv_scale * (conv_bias + the taps of one head on the values around the places from ``first_place`` on), as a
    tile [queries, DP]."""
    d = tl.arange(0, DP)
    total = tl.zeros([rows.shape[0], DP], DTYPE)
    for c in tl.range(0, left + 1 if CAUSAL else W):
        j_first = first_place + c - left
        j = j_first + tl.arange(0, rows.shape[0])
        keep = rows & real_keys(mask_at, j, begin, end, mask_time, HAS_MASK)
        value = widen(load_tile(v_at, j_first, d, keep, v_time, v_channel, D, False), DTYPE)
        total += widen(tl.load(taps + d * W + c, mask=d < D, other=0.0), DTYPE)[None, :] * value
    if HAS_CONV_BIAS:
        total += widen(tl.load(conv_bias + d, mask=d < D, other=0.0), DTYPE)[None, :]
    if HAS_CONV_SCALE:
        total *= widen(tl.load(conv_scale), DTYPE)
    return total
