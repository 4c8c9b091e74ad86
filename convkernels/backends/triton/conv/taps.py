"""What all kernels of this backend share: the index relation, finding sequences, filters, inputs, arithmetic.

Shapes: a *column* tensor is [rows, 1] (one value per position), a *row* tensor is [1, channels]; they broadcast.
Offsets are 64 bits wide, positions 32.
"""

import os

import triton
import triton.language as tl

# The interpreter (triton 3.4 to 3.9) truncates where the hardware rounds to bfloat16, and multiplies the bits of
# bfloat16 matrices instead of their values. The helpers below go around both, and only there.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


# -- the one index relation: output t, tap j reads input s = t + dilation * j - left ---


@triton.jit
def source(t, j, left, dilation):
    """The input position that tap j of output t reads."""
    return t + dilation * j - left


@triton.jit
def target(s, j, left, dilation):
    """The output position whose tap j reads input s."""
    return s - dilation * j + left


# -- numbers ---


@triton.jit
def widen(value, dtype: tl.constexpr):
    """A loaded value in the accumulation type, exactly."""
    if INTERPRETED and value.dtype == tl.bfloat16:
        return (value.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return value.to(dtype)


@triton.jit
def narrow(value, dtype: tl.constexpr):
    """Rounded to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        rounded = bits + 0x7FFF + ((bits >> 16) & 1)
        bits = tl.where(value == value, rounded, bits | 0x400000)
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return value.to(dtype)


@triton.jit
def multiply(a, b, total):
    """total + a @ b for bfloat16 matrices, summed in float32."""
    if INTERPRETED:
        return tl.dot(widen(a, tl.float32), widen(b, tl.float32), total, input_precision="ieee")
    return tl.dot(a, b, total)


@triton.jit
def split(value):
    """Three bfloat16 numbers whose sum is the float32 value (its 24 bits), for values below the bfloat16 maximum."""
    high = narrow(value, tl.bfloat16)
    rest = value - widen(high, tl.float32)
    middle = narrow(rest, tl.bfloat16)
    low = narrow(rest - widen(middle, tl.float32), tl.bfloat16)
    return high, middle, low


@triton.jit
def splittable(value):
    """Whether ``split`` is exact: finite, and not rounded up to infinity."""
    return tl.abs(value) < 3.38e38


@triton.jit
def sigmoid(value):
    return 1.0 / (1.0 + tl.exp(-value))


# -- sequences ---


@triton.jit
def sequence_bounds(number, T, cu_seqlens):
    """Begin and end of a sequence. The host does not look at boundaries on a device, so wrong ones must do no harm."""
    begin = tl.load(cu_seqlens + number).to(tl.int32)
    end = tl.load(cu_seqlens + number + 1).to(tl.int32)
    return tl.maximum(begin, 0), tl.minimum(end, T)


@triton.jit
def sequence_of(t, T, cu_seqlens, sequences, search_steps, PACKED: tl.constexpr):
    """Number, begin and end of the sequence of each position: the last one that begins at or before it. Read on the
    device, by bisection; positions outside the row are taken for its first or last."""
    number = tl.zeros_like(t)
    if PACKED:
        inside = tl.minimum(tl.maximum(t, 0), T - 1)
        above = number + sequences
        for _ in range(search_steps):
            middle = (number + above) // 2
            right = tl.load(cu_seqlens + middle).to(tl.int32) <= inside
            # An interval of one is already decided; its middle is its lower end.
            number = tl.where(right, middle, number)
            above = tl.where(right, above, middle)
        begin, end = sequence_bounds(number, T, cu_seqlens)
    else:
        begin = tl.zeros_like(t)
        end = begin + T
    return number, begin, end


# -- inputs: pointers to the channels of position 0 are made once, each load adds the positions ---


@triton.jit
def columns_at(x, b, c, batch_stride, channel_stride):
    """Pointers to x[b, 0, c]."""
    return x + b.to(tl.int64) * batch_stride + c.to(tl.int64) * channel_stride


@triton.jit
def state_at(state, b, c, number, begin, C, span, sequences):
    """Pointers such that adding s * C gives position s of the state that comes before ``begin``."""
    return state + ((b.to(tl.int64) * sequences + number) * span + (span - begin)) * C + c


@triton.jit
def load_rows(at, s, keep, time_stride, DTYPE: tl.constexpr):
    """x[s] for pointers ``at`` to x[0], in the accumulation type; 0 where ``keep`` is False."""
    return widen(tl.load(at + s.to(tl.int64) * time_stride, mask=keep, other=0.0), DTYPE)


@triton.jit
def unmasked(mask_at, s, inside, mask_time, HAS_MASK: tl.constexpr):
    """``inside``, less the positions that the padding mask excludes."""
    if HAS_MASK:
        inside = inside & (tl.load(mask_at + s.to(tl.int64) * mask_time, mask=inside, other=0) != 0)
    return inside


@triton.jit
def load_input(
    x_at, gate_at, mask_at, states_at, s, columns, begin, end, C, span, x_time, gate_time, mask_time,
    HAS_GATE: tl.constexpr, HAS_MASK: tl.constexpr, HAS_STATE: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """z[s]: x, gated, 0 by selection where masked or outside; positions before ``begin`` from the state."""
    inside = unmasked(mask_at, s, (s >= begin) & (s < end), mask_time, HAS_MASK) & columns
    value = load_rows(x_at, s, inside, x_time, DTYPE)
    if HAS_GATE:
        value *= sigmoid(load_rows(gate_at, s, inside, gate_time, DTYPE))
    if HAS_STATE:
        value += load_rows(states_at, s, (s < begin) & (s >= begin - span) & columns, C, DTYPE)
    return value


# -- filters ---


@triton.jit
def filters_at(
    weight, b, t, h, batch_stride, time_stride, head_stride, PER_BATCH: tl.constexpr, PER_TIME: tl.constexpr
):
    """Pointers to tap 0 of the filters of positions t and heads h."""
    at = weight + h.to(tl.int64) * head_stride
    if PER_BATCH:
        at += b.to(tl.int64) * batch_stride
    if PER_TIME:
        at = at + t.to(tl.int64) * time_stride
    return at


@triton.jit
def tap_exists(t, j, left, dilation, begin, end, HAS_STATE: tl.constexpr):
    """Whether the row that tap j of output t reads exists; rows of the state do."""
    s = source(t, j, left, dilation)
    return (s < end) if HAS_STATE else (s >= begin) & (s < end)


@triton.jit
def number_from_bits(bits, dtype: tl.constexpr):
    """The float64 whose bits an integer argument holds (an argument of type float would be rounded to float32)."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True).to(dtype)


@triton.jit
def keeps(word, threshold):
    """Whether dropout keeps what has drawn a word. ``threshold``: the bits of an unsigned number, so that its size
    decides no type."""
    return word >= tl.cast(threshold, tl.uint32, bitcast=True)


@triton.jit
def kept(seed, b, t, h, j, threshold):
    """Which elements of the weight dropout keeps: Philox4x32-10 of the coordinates, word j % 4 of block j // 4."""
    zero = t * 0 + h * 0 + j * 0
    word0, word1, word2, word3 = tl.philox(tl.load(seed), zero + t, zero + b, zero + h, zero + j // 4)
    which = zero + j % 4
    word = tl.where(which < 2, tl.where(which == 0, word0, word1), tl.where(which == 2, word2, word3))
    return keeps(word, threshold)


@triton.jit
def filter_rows(
    at, seed, b, t, h, j, rows, K, left, dilation, begin, end, threshold, scale, tap_stride,
    SOFTMAX: tl.constexpr, RENORMALIZE: tl.constexpr, DROPOUT: tl.constexpr, HAS_STATE: tl.constexpr,
    PER_BATCH: tl.constexpr, PER_TIME: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Whole filters, taps side by side (j a row): w' after softmax and dropout, p after softmax, and the multiplier of
    dropout. ``rows`` (a column): positions that exist; the others have filters of 0."""
    taps = rows & (j < K)
    w = widen(tl.load(at + j.to(tl.int64) * tap_stride, mask=taps, other=0.0), DTYPE)
    if SOFTMAX:
        real = taps
        if RENORMALIZE:
            real = taps & tap_exists(t, j, left, dilation, begin, end, HAS_STATE)
        most = tl.max(tl.where(real, w, float("-inf")), 1)[:, None]
        power = tl.where(real, tl.exp(w - most), 0.0)
        total = tl.sum(power, 1)[:, None]
        if RENORMALIZE:
            total = tl.where(total == 0.0, 1.0, total)  # no tap exists
        w = power / tl.where(rows, total, 1.0)
    p = w
    factor = tl.where(taps, 1.0, 0.0).to(DTYPE)
    if DROPOUT:
        # A weight that serves all batches or positions has one mask for them.
        b_at = b if PER_BATCH else b * 0
        t_at = t if PER_TIME else t * 0
        factor = tl.where(taps & kept(seed, b_at, t_at, h, j, threshold), number_from_bits(scale, DTYPE), 0.0)
        w = tl.where(taps, w * factor, 0.0)
    return w, p, factor


@triton.jit
def filter_statistics(
    at, t, exists, K: tl.constexpr, left, dilation, begin, end, tap_stride,
    SOFTMAX: tl.constexpr, RENORMALIZE: tl.constexpr, HAS_STATE: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Maximum and reciprocal sum of exponentials of the filters that exist (``exists`` has one entry per filter), tap
    by tap. (0, 1) without softmax."""
    inverse = tl.where(exists, 1.0, 1.0).to(DTYPE)
    most = inverse - inverse
    if SOFTMAX:
        inverse = most
        most += float("-inf")
        for j in tl.range(0, K):
            real = exists
            if RENORMALIZE:
                real = real & tap_exists(t, j, left, dilation, begin, end, HAS_STATE)
            logit = widen(tl.load(at + j * tap_stride, mask=exists, other=0.0), DTYPE)
            most = tl.maximum(most, tl.where(real, logit, float("-inf")))
        for j in tl.range(0, K):
            real = exists
            if RENORMALIZE:
                real = real & tap_exists(t, j, left, dilation, begin, end, HAS_STATE)
            logit = widen(tl.load(at + j * tap_stride, mask=exists, other=0.0), DTYPE)
            inverse += tl.where(real, tl.exp(logit - most), 0.0)
        inverse = 1.0 / tl.where(inverse == 0.0, 1.0, inverse)  # no tap exists
    return most, inverse


@triton.jit
def filter_tap(
    at, seed, b, t, h, j, exists, most, inverse, left, dilation, begin, end, threshold, scale, tap_stride,
    SOFTMAX: tl.constexpr, RENORMALIZE: tl.constexpr, DROPOUT: tl.constexpr, HAS_STATE: tl.constexpr,
    PER_BATCH: tl.constexpr, PER_TIME: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Tap j of the filters at positions t and heads h: w' after softmax and dropout, p after softmax, and the
    multiplier of dropout."""
    w = widen(tl.load(at + j * tap_stride, mask=exists, other=0.0), DTYPE)
    if SOFTMAX:
        w = tl.exp(w - most) * inverse
        if RENORMALIZE:
            w = tl.where(tap_exists(t, j, left, dilation, begin, end, HAS_STATE), w, 0.0)
    p = w
    factor = tl.where(exists, 1.0, 1.0).to(DTYPE)
    if DROPOUT:
        b_at = b if PER_BATCH else b * 0
        t_at = t if PER_TIME else t * 0
        factor = tl.where(kept(seed, b_at, t_at, h, j, threshold), number_from_bits(scale, DTYPE), 0.0)
        w *= factor
    return w, p, factor


# -- band matrices: a tile of convolutions as a matrix product ---


@triton.jit
def take(rows, index, valid, AXIS: tl.constexpr = 1):
    """rows[i, index[i, j]] (along the other AXIS: rows[index[i, j], j]) where ``valid``, else 0."""
    size: tl.constexpr = rows.shape[AXIS]
    return tl.where(valid, tl.gather(rows, tl.minimum(tl.maximum(index, 0), size - 1), AXIS), 0.0)


@triton.jit
def product(a, b, total, A_PARTS: tl.constexpr, B_PARTS: tl.constexpr):
    """total + a @ b to float32 accuracy on bfloat16 matrix units. PARTS: how many bfloat16 numbers make up an element
    (1 bfloat16, 2 float16, 3 float32). Products below 2^-26 of the largest are left out, small ones added first."""
    a0, a1, a2 = split(a)
    b0, b1, b2 = split(b)
    if A_PARTS == 3:
        total = multiply(a2, b0, total)
    if B_PARTS == 3:
        total = multiply(a0, b2, total)
    if A_PARTS > 1 and B_PARTS > 1:
        total = multiply(a1, b1, total)
    if A_PARTS > 1:
        total = multiply(a1, b0, total)
    if B_PARTS > 1:
        total = multiply(a0, b1, total)
    return multiply(a0, b0, total)
