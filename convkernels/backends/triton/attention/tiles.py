"""What the attention kernels share: records, tiles of rows and of pairs, dropout.

An *owner* is a tile of queries or keys that a program keeps; it walks over tiles of the other kind. All tiles begin at
multiples of their height. Tiles whose pairs are all visible and all beyond the same end of the window are *far*: one
column of each table serves them. The others are *near*. Their products multiply hidden rows by 0, which NaN and
infinity survive: where causality or the window hides pairs, rows that hold one count as 0 there, and the pairs that see
them get NaN. Scores are in units of log(2), so that powers are those of 2.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..device import INTERPRETED, keeps, narrow, product, sequence_bounds, widen

CLIP, ZERO, MASK = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
LOG2E = tl.constexpr(1.4426950408889634)

# What may change from call to call of a model without another compilation. Strides are not among it: whether they are 1
# or multiples of 16 decides how wide accesses are.
VARYING = [
    "T", "S", "B", "H", "sharing", "left", "right", "slots", "groups", "rows", "sequences", "search_steps", "scale",
    "rel_scale", "score_scale", "table_scale", "threshold", "keep_scale", "query_rel_head", "key_rel_head",
    "mask_batch", "mask_time", "plane", "edge_plane",
]  # fmt: skip


class Heads(NamedTuple):
    """A tensor [batch, time, heads, channels]."""

    data: Any
    batch: Any
    time: Any
    head: Any
    channel: Any


class Inputs(NamedTuple):
    q: Heads
    k: Heads
    v: Heads
    rel_query: Heads


class Tables(NamedTuple):
    """Of the relative terms, for all heads."""

    bias: Any
    query_rel: Any
    key_rel: Any


class Terms(NamedTuple):
    """The tables of one head, of W columns for the window from ``left`` to ``right``. scale: of query_rel."""

    bias: Any
    query_rel: Any
    key_rel: Any
    left: Any
    right: Any
    W: Any
    scale: Any


class Depthwise(NamedTuple):
    """The parameters of the depthwise term."""

    taps: Any
    bias: Any
    scale: Any


class Boundaries(NamedTuple):
    """cu_seqlens of packed sequences."""

    queries: Any
    keys: Any


class Mask(NamedTuple):
    """The padding mask of the keys of one batch row."""

    data: Any
    time: Any


class Owner(NamedTuple):
    """A tile that a program keeps: its first row, begin and end of its sequence, and those of the other kind."""

    first: Any
    begin: Any
    end: Any
    other_begin: Any
    other_end: Any


class Ranges(NamedTuple):
    """Ends of ranges of tiles, see ``tile_ranges``."""

    a: Any
    b: Any
    c: Any
    d: Any
    e: Any
    f: Any


class Columns(NamedTuple):
    """Columns of a table as a tile has them: the offset of the tile's first one, the table's column for each, and
    whether it is one."""

    base: Any
    index: Any
    valid: Any


class Pairs(NamedTuple):
    """A tile of pairs. offset: the place of the key less that of the query; seen: whether they meet."""

    offset: Any
    seen: Any
    columns: Columns


class Flags(NamedTuple):
    """D, R: channels of heads, and of what meets query_rel; DP, RP: padded. SLIDING: a tile has columns of its own."""

    D: int
    DP: int
    R: int
    RP: int
    QK: bool
    NEGATIVE: bool
    CAUSAL: bool
    OUTSIDE: int
    HAS_BIAS: bool
    HAS_QUERY_REL: bool
    HAS_REL_QUERY: bool
    HAS_KEY_REL: bool
    HAS_CONV: bool
    HAS_CONV_BIAS: bool
    HAS_CONV_SCALE: bool
    HAS_MASK: bool
    PACKED: bool
    DROPOUT: bool
    SLIDING: bool


class TileSizes(NamedTuple):
    """Those of ``configs.Pairs``, and WIDTH columns in a tile of relative terms, PIECE rows of a table at a time;
    IN_REGISTERS and CROWDED as ``configs.Shape`` has them."""

    BM: int
    BN: int
    NEAR: int
    NEAR_STAGES: int
    WIDTH: int
    PIECE: int
    IN_REGISTERS: bool
    CROWDED: bool


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


@triton.jit
def head_at(x, b, h):
    """x from x[b, 0, h, 0] on."""
    data = x.data + (b.to(tl.int64) * x.batch + h.to(tl.int64) * x.head)
    return Heads(data, x.batch, x.time, x.head, x.channel)


@triton.jit
def load_tile(x, first, column, keep, D: tl.constexpr, ALL: tl.constexpr):
    """Rows of x from ``first`` on, as they are stored; 0 where not ``keep`` (with ALL every row is kept) or beyond D.
    Only the first row's place takes 64 bits; within a tile 32 are enough (the host sees to it), in fewer registers."""
    at = x.data + tl.cast(first, tl.int64) * x.time
    at = at + (tl.arange(0, keep.shape[0])[:, None] * x.time + column[None, :] * x.channel)
    if D == column.shape[0]:
        if ALL:
            return tl.load(at)
        return tl.load(at, mask=keep[:, None], other=0.0)
    if ALL:
        return tl.load(at, mask=(column < D)[None, :], other=0.0)
    return tl.load(at, mask=keep[:, None] & (column < D)[None, :], other=0.0)


@triton.jit
def load_own(x, first, column, keep, D: tl.constexpr, CROWDED: tl.constexpr):
    """The same for rows that a program keeps. CROWDED: places within the tile are not kept from tile to tile."""
    if CROWDED:
        row = first + tl.arange(0, keep.shape[0])
        at = x.data + row.to(tl.int64)[:, None] * x.time + column[None, :] * x.channel
        return tl.load(at, mask=keep[:, None] & (column < D)[None, :], other=0.0)
    return load_tile(x, first, column, keep, D, False)


@triton.jit
def store_tile(x, row, value, rows, D: tl.constexpr):
    """x[row] = value, [rows, channels], for the ``rows`` that exist and the D channels."""
    column = tl.arange(0, value.shape[1])
    at = x.data + row.to(tl.int64)[:, None] * x.time + column[None, :] * x.channel
    tl.store(at, narrow(value, x.data.dtype.element_ty), mask=rows[:, None] & (column < D)[None, :])


@triton.jit
def finite_rows(x, DTYPE: tl.constexpr):
    """x with 0 for the rows that hold a NaN or an infinity, and NaN for each of these rows, 0 for the others."""
    wide = widen(x, DTYPE)
    bad = tl.sum(wide - wide, 1)
    return tl.where((bad == bad)[:, None], x, tl.zeros_like(x)), bad


@triton.jit
def real_keys(mask, j, begin, end, HAS_MASK: tl.constexpr):
    """Which keys exist and are not padding."""
    keep = (j >= begin) & (j < end)
    if HAS_MASK:
        keep = keep & (tl.load(mask.data + j.to(tl.int64) * mask.time, mask=keep, other=0) != 0)
    return keep


@triton.jit
def sequence_tile(
    slot, T, S, own_bounds, other_bounds, sequences, search_steps, PACKED: tl.constexpr, BLOCK: tl.constexpr
):
    """The owner's tile number ``slot``. A tile has rows of one sequence. Sequence n begins in tile begin // BLOCK + n,
    so that the host can count the tiles (T // BLOCK + sequences) and a program can find its own; those left over begin
    behind the end."""
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
    return Owner(first, begin, end, other_begin, other_end)


@triton.jit
def clamp_tile(tile, least, most):
    return tl.minimum(tl.maximum(tile, least), most)


@triton.jit
def tile_ranges(
    owner, shift, before, after, CAUSAL: tl.constexpr, OUTSIDE: tl.constexpr, RELATIVE: tl.constexpr,
    BLOCK: tl.constexpr, OTHER: tl.constexpr, NEAR: tl.constexpr,
):  # fmt: skip
    """The tiles that an owner of BLOCK rows meets, as six ends of ranges a <= b <= c <= d <= e <= f: [b, c) and [d, e)
    are far, before and after the window; [a, b), [c, d) and [e, f) are near. All count in tiles of NEAR rows; far ones
    have OTHER.

    Row n of the owner is at place n + shift among the other kind, and its window reaches from ``before`` places before
    it to ``after`` places behind it. CAUSAL: 1 if it sees nothing behind its place, -1 if nothing before it.
    """
    first, begin, end = owner.first, owner.begin, owner.end
    low = tl.maximum(first, begin) + shift
    high = tl.minimum(first + BLOCK, end) - 1 + shift
    some_begin, some_end = owner.other_begin, owner.other_end
    all_begin, all_end = some_begin, some_end
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
    return Ranges(some_begin // NEAR, b * SPLIT, c * SPLIT, d * SPLIT, e * SPLIT, last)


@triton.jit
def near_tiles(ranges):
    """How many near tiles there are."""
    return ranges.b - ranges.a + ranges.d - ranges.c + ranges.f - ranges.e


@triton.jit
def near_tile(n, ranges):
    """The n-th near tile, of NEAR rows."""
    head, middle = ranges.b - ranges.a, ranges.b - ranges.a + ranges.d - ranges.c
    return tl.where(n < head, ranges.a + n, tl.where(n < middle, ranges.c + n - head, ranges.e + n - middle))


@triton.jit
def far_tiles(ranges, SPLIT: tl.constexpr):
    """How many far tiles there are, of SPLIT * NEAR rows."""
    return (ranges.c - ranges.b + ranges.e - ranges.d) // SPLIT


@triton.jit
def far_tile(n, ranges, SPLIT: tl.constexpr):
    """The n-th far tile, and whether it lies before the window."""
    head = (ranges.c - ranges.b) // SPLIT
    return tl.where(n < head, ranges.b // SPLIT + n, ranges.d // SPLIT + n - head), n < head


@triton.jit
def visible_pairs(offset, terms, CAUSAL: tl.constexpr, OUTSIDE: tl.constexpr):
    """Which pairs of existing queries and keys may meet."""
    seen = offset == offset
    if CAUSAL:
        seen = offset <= 0
    if OUTSIDE == MASK:
        seen = seen & (offset >= -terms.left) & (offset <= terms.right)
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
