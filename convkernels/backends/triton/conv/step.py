"""The decoding step: a causal pass over the next positions of every sequence, which then updates the sequence's state.

One program for each block of channels owns a sequence: it alone reads the old state, and it writes the new one when
it has read the old one. Positions from ``head`` on, which reach no row of a state, are left to programs that read x
alone. Channels, or positions and channels, lie along the first axis of all tiles, taps or rows of the state along the
second. Positions of a sequence are numbered from its first one in x on.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..device import narrow, widen
from .finish import finish_at, finish_from, store_finished
from .inputs import Inputs, Mask, inputs_from, load_gated, load_input_row
from .taps import (
    Place,
    Relation,
    Rows,
    Sequence,
    columns_at,
    filter_statistics,
    filter_tap,
    filters_at,
    load_row,
    rows_from,
    store_rows,
)


class Indices(NamedTuple):
    """Integers of which every sequence, or saved state, has one."""

    data: Any
    stride: Any


class PerSequence(NamedTuple):
    """bounds: begins of packed sequences, and the last one's end. slots: whose state a sequence has; source: where its
    old state is, by default there. accepted: how many of the newest rows of the old state count. position: how many
    inputs precede x. The state before position save_at of x is also left in slot save_slots."""

    bounds: Indices
    slots: Indices
    source: Indices
    accepted: Indices
    position: Indices
    save_at: Indices
    save_slots: Indices


class StepFlags(NamedTuple):
    """ONE: every sequence has one position, a batch row of its own. TAIL: there are positions from ``head`` on. INPUT,
    LATER: of positions before ``head``, which read a state, and of later ones. DTYPE: of sums; the rest:
    ``configs.Step``."""

    ONE: bool
    TAIL: bool
    PACKED: bool
    HAS_SLOTS: bool
    HAS_SOURCE: bool
    HAS_ACCEPTED: bool
    HAS_POSITION: bool
    HAS_SAVES: bool
    HAS_BIAS: bool
    FILTER: Any
    INPUT: Any
    LATER: Any
    FINISH: Any
    DTYPE: Any
    BC: int
    BP: int
    BS: int
    BT: int


class Operands(NamedTuple):
    """The tensors that outputs are made of, and where they go."""

    x: Rows
    gate: Rows
    weight: Any
    bias: Any
    finish: Any
    sizes: Any
    relation: Relation


class Batch(NamedTuple):
    """N sequences, T positions in each batch row, states of W rows in a pool of S, M saved ones; from ``head`` on
    positions are left to other programs."""

    per_sequence: PerSequence
    S: Any
    W: Any
    T: Any
    N: Any
    M: Any
    head: Any


class Given(NamedTuple):
    """What the newest rows of a state are made of: x and gate from the first position on, or z if there is one."""

    x: Rows
    gate: Rows
    z: Any


class Part(NamedTuple):
    """A sequence: its batch row, its begin in x, how many positions it has, and how many inputs precede them."""

    b: Any
    begin: Any
    length: Any
    history: Any


class Before(NamedTuple):
    """Rows of an old state: their tensor, the slot, and the row that position 0 would have."""

    pool: Rows
    slot: Any
    row: Any


@triton.jit
def number_of(numbers, n):
    """The integer that sequence n has."""
    return tl.load(numbers.data + tl.cast(n, tl.int64) * numbers.stride)


@triton.jit
def part_of(n, T, bounds, history, STEP: tl.constexpr):
    """Sequence n; cu_seqlens is not validated on the host."""
    if STEP.PACKED:
        begin = tl.minimum(tl.maximum(number_of(bounds, n), 0), T).to(tl.int32)
        end = tl.minimum(number_of(bounds, n + 1), T).to(tl.int32)
        part = Part(n * 0, begin, tl.maximum(end - begin, 0), history)
    else:
        part = Part(n, n * 0, n * 0 + (1 if STEP.ONE else T), history)
    return part


@triton.jit
def find_sequence(t, bounds, count, steps):
    """The last of the sequences that begin at or before position t of x, by bisection."""
    number, above = count * 0, count
    for _ in tl.range(0, steps):
        middle = (number + above) // 2
        right = number_of(bounds, middle) <= t
        number, above = tl.where(right, middle, number), tl.where(right, above, middle)
    return number


@triton.jit
def store_sum(operands, finish, t, total, c, keep, STEP: tl.constexpr):
    """What becomes of the sums over taps at positions t of ``finish``."""
    if STEP.HAS_BIAS:
        total += widen(tl.load(operands.bias + c, mask=c < operands.sizes.C, other=0.0), STEP.DTYPE)
    store_finished(finish, t, total, keep, STEP.FINISH, STEP.DTYPE)


@triton.jit
def tap_weight(filters, place, tap, exists, statistics, given, relation, STEP: tl.constexpr):
    """Tap ``tap`` after softmax."""
    w, _, _ = filter_tap(filters, place, tap, exists, statistics, given, relation, None, STEP.FILTER, STEP.DTYPE)
    return w


@triton.jit
def store_sums(operands, part, before, first, last, first_channel, INPUT: tl.constexpr, STEP: tl.constexpr):
    """y at positions first to last - 1 of a sequence, BP at a time. INPUT.HAS_STATE: some of them read the state. Taps
    are added one after the other, as in ``conv_tile``, so that steps of any length give the same bits."""
    FILTER: tl.constexpr = STEP.FILTER
    DTYPE: tl.constexpr = STEP.DTYPE
    BC: tl.constexpr = STEP.BC
    BP: tl.constexpr = STEP.BP
    K: tl.constexpr = FILTER.K
    UNROLL: tl.constexpr = K if K <= 8 else 4
    SHARED: tl.constexpr = not (FILTER.PER_TIME or FILTER.RENORMALIZE)
    relation, begin, b = operands.relation, part.begin, part.b
    i = tl.arange(0, BP * BC)[:, None]
    p, c = i // BC, first_channel + i % BC
    columns, h = c < operands.sizes.C, c // operands.sizes.R
    x = rows_from(columns_at(operands.x, b, c), begin)
    gate = rows_from(columns_at(operands.gate, b, c), begin)
    z = Inputs(x, gate, Mask(operands.x.data, 0, 0), rows_from(columns_at(before.pool, before.slot, c), before.row))
    finish = finish_from(finish_at(operands.finish, b, c), begin)
    held, given = Sequence(0, 0, part.length), Sequence(0, -part.history, part.length)
    if SHARED:
        place, exists = Place(b, begin, h), columns
        filters = filters_at(operands.weight, place, FILTER)
        statistics = filter_statistics(filters, begin, exists, given, relation, FILTER, DTYPE)
    for start in tl.range(first, last, BP):
        t = start + p
        keep = columns & (t < last)
        if not SHARED:
            place, exists = Place(b, t, h), keep
            filters = filters_at(operands.weight, Place(b, begin + t, h), FILTER)
            statistics = filter_statistics(filters, t, exists, given, relation, FILTER, DTYPE)
        here = inputs_from(z, t - relation.left)
        total = tl.zeros([BP * BC, 1], DTYPE)
        for tap in tl.range(0, K, loop_unroll_factor=UNROLL):
            w = tap_weight(filters, place, tap, exists, statistics, given, relation, STEP)
            s = t + relation.dilation * tap - relation.left
            row = inputs_from(here, relation.dilation * tap)
            total += w * load_input_row(row, s, keep, held, relation.left, INPUT, DTYPE)
        store_sum(operands, finish, t, total, c, keep, STEP)


@triton.jit
def store_zeros(y, part, first, last, first_channel, C, BC: tl.constexpr, BP: tl.constexpr):
    """y = 0 at positions first to last - 1 of a sequence."""
    i = tl.arange(0, BP * BC)[:, None]
    c = first_channel + i % BC
    y = rows_from(columns_at(y, part.b, c), part.begin)
    for start in tl.range(first, last, BP):
        t = start + i // BC
        store_rows(y, t, (c * 0).to(tl.float32), (t < last) & (c < C))


@triton.jit
def leave_state(new, old, given, n, shift, W, columns, STEP: tl.constexpr, IN_PLACE: tl.constexpr):
    """The state after n positions of a sequence, BS rows at a time: row w + shift of the old one, 0 where there is
    none, and z at the last rows. IN_PLACE: ``new`` is ``old``, so no row is written that is still to be read."""
    BS: tl.constexpr = STEP.BS
    blocks = tl.cdiv(W, BS)
    for index in tl.range(0, blocks):
        block = index
        if IN_PLACE and STEP.HAS_ACCEPTED:
            block = tl.where(shift >= 0, index, blocks - 1 - index)
        row = block * BS + tl.arange(0, BS)[None, :]
        s = row - W + n
        inside = columns & (row < W)
        moved = inside & (s < 0)
        if STEP.HAS_ACCEPTED:
            moved = moved & (row + shift >= 0)
        value = tl.load(rows_from(old, row + shift).data, mask=moved, other=0.0)
        if STEP.ONE:
            fresh = given.z
        else:
            x, gate = rows_from(given.x, s), rows_from(given.gate, s)
            fresh = load_gated(x, gate, inside & (s >= 0), STEP.INPUT, STEP.DTYPE)
            fresh = narrow(fresh, new.data.dtype.element_ty)
        value = tl.where(s >= 0, fresh, value)
        if IN_PLACE:
            tl.debug_barrier()  # every thread has read
        tl.store(rows_from(new, row).data, value, mask=inside)


@triton.jit
def step_sequence(operands, part, last, before, target, slot, batch, first_channel, STEP: tl.constexpr):
    """The outputs of a sequence at positions before ``last``, and its states; the new one goes to a slot of
    ``target``."""
    FILTER: tl.constexpr = STEP.FILTER
    DTYPE: tl.constexpr = STEP.DTYPE
    K: tl.constexpr = FILTER.K
    UNROLL: tl.constexpr = K - 1 if 1 < K <= 9 else 4
    relation, b, begin, W = operands.relation, part.b, part.begin, batch.W
    c = first_channel + tl.arange(0, STEP.BC)[:, None]
    columns = c < operands.sizes.C
    x, gate = rows_from(columns_at(operands.x, b, c), begin), rows_from(columns_at(operands.gate, b, c), begin)
    old, new = columns_at(before.pool, before.slot, c), columns_at(target, slot, c)
    if STEP.ONE:
        place = Place(b, begin, c // operands.sizes.R)
        z = load_gated(x, gate, columns, STEP.INPUT, DTYPE)
        existing = Sequence(0, -part.history, 1)
        filters = filters_at(operands.weight, place, FILTER)
        statistics = filter_statistics(filters, 0, columns, existing, relation, FILTER, DTYPE)
        window = rows_from(old, before.row - relation.left)
        total = tl.zeros([STEP.BC, 1], DTYPE)
        for tap in tl.range(0, K - 1, loop_unroll_factor=UNROLL):
            w = tap_weight(filters, place, tap, columns, statistics, existing, relation, STEP)
            total += w * load_row(rows_from(window, relation.dilation * tap), columns, DTYPE)
        total += tap_weight(filters, place, K - 1, columns, statistics, existing, relation, STEP) * z
        store_sum(operands, finish_at(operands.finish, b, c), 0, total, c, columns, STEP)
        z = narrow(z, new.data.dtype.element_ty)
    else:
        z = 0
        store_sums(operands, part, before, 0, last, first_channel, STEP.INPUT, STEP)
    given = Given(x, gate, z)
    if STEP.HAS_SAVES:  # first, because they are made of the old state
        numbers = batch.per_sequence
        for m in tl.range(0, batch.M):
            count, into = number_of(numbers.save_at, m) - begin, number_of(numbers.save_slots, m)
            if (count > 0) & (count <= part.length) & (into >= 0) & (into < batch.S):
                n = count.to(tl.int32)
                saved = columns_at(target, into, c)
                leave_state(saved, old, given, n, before.row - W + n, W, columns, STEP, False)
    n = part.length
    leave_state(new, old, given, n, before.row - W + n, W, columns, STEP, not STEP.HAS_SOURCE)


@triton.jit
def own_sequences(operands, n, pool, scratch, batch, first_channel, STEP: tl.constexpr):
    """Sequence n; all of them where they continue from each other's states. Then new states go to ``scratch``, and move
    when the last old one has been read."""
    per_sequence, W, N = batch.per_sequence, batch.W, batch.N
    span, C = operands.relation.left, operands.sizes.C
    for index in tl.range(0, N if STEP.HAS_SOURCE else 1):
        number = n + index
        history = span
        if STEP.HAS_POSITION:
            history = tl.minimum(number_of(per_sequence.position, number), span).to(tl.int32)
        part = part_of(number, batch.T, per_sequence.bounds, history, STEP)
        row = W
        if STEP.HAS_ACCEPTED:
            accepted = tl.maximum(number_of(per_sequence.accepted, number), part.length - (W - span))
            row = W - part.length + tl.minimum(accepted, part.length).to(tl.int32)
        slot, live = number, True
        if STEP.HAS_SLOTS:
            slot = number_of(per_sequence.slots, number)
            live = (slot >= 0) & (slot < batch.S)
        source, target = slot, pool
        if STEP.HAS_SOURCE:
            source = tl.minimum(tl.maximum(number_of(per_sequence.source, number), 0), N - 1)
            target = scratch
        last = tl.minimum(part.length, batch.head) if STEP.TAIL else part.length
        if live:
            before = Before(pool, source, row)
            step_sequence(operands, part, last, before, target, slot, batch, first_channel, STEP)
        else:
            store_zeros(operands.finish.y, part, 0, last, first_channel, C, STEP.BC, STEP.BP)
    if STEP.HAS_SOURCE:
        tl.debug_barrier()  # what other threads of the program wrote
        c = first_channel + tl.arange(0, STEP.BC)[:, None]
        for index in tl.range(0, N):
            number = n + index
            made, kept = columns_at(scratch, number, c), columns_at(pool, number, c)
            for start in tl.range(0, W, STEP.BS):
                row = start + tl.arange(0, STEP.BS)[None, :]
                inside = (row < W) & (c < C)
                tl.store(rows_from(kept, row).data, tl.load(rows_from(made, row).data, mask=inside), mask=inside)


@triton.jit
def later_positions(operands, block, pool, batch, t_blocks, steps, first_channel, STEP: tl.constexpr):
    """A block of BT positions, and of these the ones that lie ``head`` or more behind the begin of their sequence:
    positions of x if sequences are packed, else positions of a batch row from ``head`` on."""
    BT: tl.constexpr = STEP.BT
    span, per_sequence = operands.relation.left, batch.per_sequence
    T, N, head = batch.T, batch.N, batch.head
    if STEP.PACKED:
        start = block * BT
        low = find_sequence(start, per_sequence.bounds, N, steps)
        high = find_sequence(tl.minimum(start + BT, T) - 1, per_sequence.bounds, N, steps)
    else:
        start = head + block % t_blocks * BT
        low = block // t_blocks
        high = low
    for index in tl.range(0, high - low + 1):
        number = low + index
        part = part_of(number, T, per_sequence.bounds, span, STEP)
        first, last = tl.maximum(start - part.begin, head), tl.minimum(start + BT - part.begin, part.length)
        live = True
        if STEP.HAS_SLOTS:
            slot = number_of(per_sequence.slots, number)
            live = (slot >= 0) & (slot < batch.S)
        if live:
            store_sums(operands, part, Before(pool, number, 0), first, last, first_channel, STEP.LATER, STEP)
        else:
            store_zeros(operands.finish.y, part, first, last, first_channel, operands.sizes.C, STEP.BC, STEP.BP)


@triton.jit(do_not_specialize=["S", "T", "N", "M", "owners", "t_blocks", "steps"])
def conv_step(
    x, gate, weight, bias, finish, pool, scratch, per_sequence, S, W, T, N, M, sizes, relation, head, owners, t_blocks,
    steps, c_blocks, STEP: tl.constexpr,
):  # fmt: skip
    """The step of a batch. The first ``owners`` programs of a block of channels own sequences; the others have blocks
    of later positions, t_blocks in a batch row. steps: in which bisection finds one of the sequences."""
    pid = tl.program_id(0)
    unit, first_channel = pid // c_blocks, pid % c_blocks * STEP.BC
    operands = Operands(x, gate, weight, bias, finish, sizes, relation)
    batch = Batch(per_sequence, S, W, T, N, M, head)
    if STEP.TAIL:
        if unit < owners:
            own_sequences(operands, unit, pool, scratch, batch, first_channel, STEP)
        else:
            later_positions(operands, unit - owners, pool, batch, t_blocks, steps, first_channel, STEP)
    else:
        own_sequences(operands, unit, pool, scratch, batch, first_channel, STEP)
