"""The backward kernel for short filters of one position: a thread owns neighbouring positions, as in ``conv_tile``."""

import triton
import triton.language as tl

from ..device import narrow
from .groups import Bank, dropout_factors, first_positions, load_taps, replace, soft_taps, zeros
from .inputs import gradients_at, gradients_from, inputs_at, inputs_from, load_input_row, store_input_gradient, unmasked
from .taps import Place, Sequence, columns_at, filters_at, load_row, rows_from, sequence_of, source, tap_exists, target


@triton.jit
def filters_of_output(group, n: tl.constexpr, sequences, FILTER: tl.constexpr, PACKED: tl.constexpr):
    """Those of output n of a group, which may lie before or after the row."""
    t = group.place.t + n * group.relation.dilation
    exists = group.exists & (t >= 0) & (t < group.sizes.T)
    sequence = sequence_of(t, group.sizes.T, sequences, PACKED)
    place = Place(group.place.b, t, group.place.h)
    weight = filters_at(group.weight, place, FILTER)
    return Bank(weight, place, exists, group.columns, sequence, group.sizes, group.relation, group.dropout)


@triton.jit
def add_output(
    dz, filters, dy, bank, n: tl.constexpr,
    FILTER: tl.constexpr, PACKED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """``dz`` of a group's inputs and what its output n adds to them. filters: p of each tap and its factors."""
    K: tl.constexpr = FILTER.K
    p, factors = filters
    for j in tl.static_range(K):
        # Tap j reads input n + j - (K - 1), if there is such an input.
        if n + j >= K - 1 and n + j < ROWS + K - 1:
            w = p[j]
            if FILTER.DROPOUT:
                w *= factors[j]
            share = w * dy
            if PACKED:
                share = tl.where(tap_exists(bank.place.t, j, bank.sequence, bank.relation, False), share, 0.0)
            dz = replace(dz, n + j - K + 1, dz[n + j - K + 1] + share)
    return dz


@triton.jit
def sum_of_head(products):
    """The sum over the channels of each head, for each of its vectors."""
    shape: tl.constexpr = [products.shape[0], products.shape[1], products.shape[2], 1]
    total = tl.sum(products, 3)  # of each vector
    if products.shape[2] > 1:
        total = tl.broadcast_to(tl.sum(total, 2)[:, :, None, None], shape)
    else:
        total = tl.reshape(total, shape)
    return total


@triton.jit
def filter_gradient(filters, dy, z, bank, n: tl.constexpr, FILTER: tl.constexpr, PACKED: tl.constexpr):
    """d(filter) of output n of a group through the softmax, a tuple. z: the window of the group."""
    p, factors = filters
    gradient = ()
    mean = tl.zeros(bank.exists.shape, dy.dtype)
    for j in tl.static_range(FILTER.K):
        d = sum_of_head(dy * z[n + j])
        if PACKED:
            d = tl.where(tap_exists(bank.place.t, j, bank.sequence, bank.relation, False), d, 0.0)
        if FILTER.DROPOUT:
            d *= factors[j]
        mean += p[j] * d
        gradient = gradient + (d,)
    if FILTER.SOFTMAX:
        all_d, gradient = gradient, ()
        for j in tl.static_range(FILTER.K):
            gradient = gradient + (p[j] * (all_d[j] - mean),)
    return gradient


@triton.jit
def grad_heads(
    grad, inputs, weight, gradients, grad_weight, filters, biases, sizes, relation, sequences, dropout,
    t_blocks, h_blocks,
    FILTER: tl.constexpr, INPUT: tl.constexpr, NEED: tl.constexpr, R: tl.constexpr, DTYPE: tl.constexpr,
    ROWS: tl.constexpr, BG: tl.constexpr, BH: tl.constexpr, RV: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """All gradients where filters differ by position, for BG groups of ROWS outputs and BH heads of R channels: RV
    vectors of V, one for each thread. A group owns its outputs t, with d(w'), and the inputs s that these read with
    their last tap:

        d(w')[t, j] = sum_r d(y)[t] z[source(t, j)]        d(z)[s] = sum_j w'[target(s, j), j] d(y)[target(s, j)]

    It walks the ROWS + K - 1 outputs that its inputs reach, of which the first ROWS are its own, and each thread makes
    the filter of each."""
    K: tl.constexpr = FILTER.K
    INPUTS: tl.constexpr = NEED.X or NEED.GATE
    OUTPUTS: tl.constexpr = ROWS + (K - 1 if INPUTS else 0)
    T, C, H, dilation = sizes.T, sizes.C, sizes.H, relation.dilation
    pid = tl.program_id(0)
    hb, block, b = pid % h_blocks, (pid // h_blocks) % t_blocks, pid // h_blocks // t_blocks
    h = hb * BH + tl.arange(0, BH)[None, :, None, None]
    v = tl.arange(0, RV)[None, None, :, None] + h * 0  # [1, BH, RV, 1]
    r = v * V + tl.arange(0, V)[None, None, None, :]  # [1, BH, RV, V]
    c, exists, columns = h * R + r, h < H, (h < H) & (r < R)
    # The first input is read by the last tap of an output that may lie before the row.
    t = target(0, K - 1, relation) + first_positions(block, t_blocks, relation, BG, ROWS)[:, :, :, None]
    t += v * 0  # [BG, BH, RV, 1]
    h += v * 0
    s = source(t, 0, relation)
    dy_at = rows_from(columns_at(grad, b, c), t)
    z_at = inputs_from(inputs_at(inputs, b, c, columns_at(inputs.x, b, c)), s)  # there is no state
    # What is read comes before what is written: a thread waits for all rows at once, and for filters one ahead.
    dy, z = (), ()
    for n in tl.static_range(OUTPUTS):
        inside = (t + n * dilation >= 0) & (t + n * dilation < T) & columns
        dy = dy + (load_row(rows_from(dy_at, n * dilation), inside, DTYPE),)
    if NEED.FILTER:
        for n in tl.static_range(ROWS + K - 1):
            here, whole = inputs_from(z_at, n * dilation), Sequence(0, 0, T)
            z = z + (load_input_row(here, s + n * dilation, columns, whole, 0, INPUT, DTYPE),)
    group = Bank(weight, Place(b, t, h), exists, columns, None, sizes, relation, dropout)
    dz = zeros([BG, BH, RV, V], DTYPE, ROWS)
    sums = zeros([BG, BH, RV, 1], DTYPE, K)
    bias_sum = tl.zeros([BG, BH, RV, V], DTYPE)
    bank = filters_of_output(group, 0, sequences, FILTER, INPUT.PACKED)
    taps = load_taps(bank, FILTER, DTYPE)
    for n in tl.static_range(OUTPUTS):
        own = soft_taps(taps, bank, FILTER, DTYPE), dropout_factors(bank, FILTER, DTYPE)
        here = bank
        if n + 1 < OUTPUTS:
            bank = filters_of_output(group, n + 1, sequences, FILTER, INPUT.PACKED)
            taps = load_taps(bank, FILTER, DTYPE)
        if INPUTS:
            dz = add_output(dz, own, dy[n], here, n, FILTER, INPUT.PACKED, ROWS)
        if n < ROWS and NEED.BIAS:
            bias_sum += dy[n]
        if n < ROWS and NEED.FILTER:
            d = filter_gradient(own, dy[n], z, here, n, FILTER, INPUT.PACKED)
            at = grad_weight + ((b.to(tl.int64) * T + here.place.t) * H + h) * K
            for j in tl.static_range(K):
                if FILTER.PER_TIME:
                    tl.store(at + j, narrow(d[j], grad_weight.dtype.element_ty), mask=here.exists & (v == 0))
                else:
                    sums = replace(sums, j, sums[j] + d[j])
    if INPUTS:
        dz_at = gradients_from(gradients_at(gradients, b, c), s)
        for n in tl.static_range(K - 1, ROWS + K - 1):
            here, existing = inputs_from(z_at, n * dilation), (s + n * dilation >= 0) & (s + n * dilation < T) & columns
            wanted = unmasked(here.mask, existing, INPUT.HAS_MASK)
            there = gradients_from(dz_at, n * dilation)
            store_input_gradient(dz[n - K + 1], here, there, existing, wanted, INPUT, NEED, DTYPE)
    partial = b.to(tl.int64) * t_blocks + block
    if NEED.FILTER and not FILTER.PER_TIME:
        for j in tl.static_range(K):
            total = tl.sum(sums[j], 0)[None, :, :, :]
            tl.store(filters + (partial * H + h) * K + j, total, mask=exists & (v == 0))
    if NEED.BIAS:
        tl.store(biases + partial * C + c, tl.sum(bias_sum, 0)[None, :, :, :], mask=columns)
