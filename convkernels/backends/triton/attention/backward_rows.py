"""What both halves of the backward pass need to know of each query."""

import triton
import triton.language as tl

from ..device import number_from_bits, widen
from .depthwise import convolved, head_depthwise
from .scores import head_terms, query_edge
from .tiles import LOG2E, MASK, VARYING, Mask, Terms, finite_rows, head_at, load_tile, sequence_tile


@triton.jit(do_not_specialize=VARYING)
def prepare_rows(
    grad, out, v, rel_query, tables, depthwise, key_mask, boundaries, lse, grad_lse, constants,
    T, S, H, sharing, left, right, slots, sequences, search_steps, table_scale, query_rel_head, mask_batch, mask_time,
    plane,
    FLAGS: tl.constexpr, DROPS_ALL: tl.constexpr, HAS_GRAD_LSE: tl.constexpr, EDGES: tl.constexpr,
    DTYPE: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """constants[n, b, h, i] of each query: 0 delta, the gradient that all its scores share; 1 what to take from a score
    before the exponential; 2 and 3 the same for pairs before and behind the window, whose columns it contains. 1 to 3
    are infinite if the query sees nothing, and NaN if its gradient is not finite and other pairs of its tiles are
    hidden: both passes then load 0 for it."""
    D: tl.constexpr = FLAGS.D
    pid = tl.program_id(0)
    slot, h, b = pid % slots, pid // slots % H, pid // slots // H
    owner = sequence_tile(slot, T, S, boundaries.queries, boundaries.keys, sequences, search_steps, FLAGS.PACKED, BM)
    first = owner.first
    i, d = first + tl.arange(0, BM), tl.arange(0, FLAGS.DP)
    rows = (i >= owner.begin) & (i < owner.end)
    W = left + right + 1
    result = load_tile(head_at(out, b, h), first, d, rows, D, False)  # [BM, DP]
    dy = load_tile(head_at(grad, b, h), first, d, rows, D, False)  # [BM, DP]
    attended = widen(result, DTYPE)
    if FLAGS.HAS_CONV:
        v_at, mask = head_at(v, b, h // sharing), Mask(key_mask + b.to(tl.int64) * mask_batch, mask_time)
        attended -= convolved(v_at, mask, head_depthwise(depthwise, h, W, D), owner, rows, left, W, FLAGS, DTYPE)
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
    if FLAGS.CAUSAL or FLAGS.OUTSIDE == MASK:
        start += finite_rows(dy, DTYPE)[1]
    start = tl.where(empty, float("inf"), start)
    tl.store(constants + plane + row, start, mask=rows)
    if EDGES:
        r = load_tile(head_at(rel_query, b, h), first, tl.arange(0, FLAGS.RP), rows, FLAGS.R, False)
        rel_scale = number_from_bits(table_scale, DTYPE)
        terms = Terms(tables.bias, tables.query_rel, tables.key_rel, left, right, W, rel_scale)
        terms = head_terms(terms, h, query_rel_head, 0)
        edge = query_edge(r, terms, 0, FLAGS, DTYPE)
        tl.store(constants + 2 * plane + row, tl.where(empty, float("inf"), start - edge), mask=rows)
        edge = query_edge(r, terms, W - 1, FLAGS, DTYPE)
        tl.store(constants + 3 * plane + row, tl.where(empty, float("inf"), start - edge), mask=rows)
