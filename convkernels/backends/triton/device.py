"""Device functions that the kernels of both operators share: numbers, matrix products, dropout, sequences.

Records (named tuples) carry what belongs together: a tensor's pointer and its strides, or flags. Triton specialises
their fields as it does plain arguments, whatever ``do_not_specialize`` says; numbers that vary from call to call are
therefore plain arguments.
"""

import os

import triton
import triton.language as tl

# The interpreter (triton 3.4 to 3.9) truncates where the hardware rounds to bfloat16, and multiplies the bits of
# bfloat16 matrices instead of their values. The functions below go around both, and only there.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


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
def anew(value):
    """The same 32-bit integer, of which the compiler knows nothing: what depends on it is not computed before a loop
    that precedes it, and takes no registers there."""
    if INTERPRETED:
        return value
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [value], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def number_from_bits(bits, dtype: tl.constexpr):
    """The float64 whose bits an integer argument holds (an argument of type float would be rounded to float32)."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True).to(dtype)


@triton.jit
def keeps(word, threshold):
    """Whether dropout keeps what has drawn a random word. ``threshold``: the bits of an unsigned number, so that its
    size decides no type."""
    return word >= tl.cast(threshold, tl.uint32, bitcast=True)


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
def product(a, b, total, A_PARTS: tl.constexpr, B_PARTS: tl.constexpr):
    """total + a @ b to float32 accuracy on bfloat16 matrix units. PARTS: how many bfloat16 numbers make up an element
    (1 bfloat16, 2 float16, 3 float32). Not finite where an element is not, or rounds to infinity as bfloat16."""
    return product_of_parts(split(a), b, total, A_PARTS, B_PARTS)


@triton.jit
def product_of_parts(a, b, total, A_PARTS: tl.constexpr, B_PARTS: tl.constexpr):
    """``product`` for a matrix that has been split. Products below 2^-26 of the largest are left out, small ones added
    first."""
    a0, a1, a2 = a
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


@triton.jit
def finite(value):
    """Whether no element of a tile is infinite or NaN."""
    return tl.sum((~(tl.abs(value) < float("inf"))).to(tl.int32)) == 0


@triton.jit
def look_up(rows, index, valid, AXIS: tl.constexpr = 1):
    """rows[i, index[i, j]] (along the other AXIS: rows[index[i, j], j]) where ``valid``, else 0; every index is one."""
    return tl.where(valid, tl.gather(rows, index, AXIS), 0.0)


@triton.jit
def take(rows, index, valid, AXIS: tl.constexpr = 1):
    """The same for indices that may be none where not ``valid``."""
    size: tl.constexpr = rows.shape[AXIS]
    return look_up(rows, tl.minimum(tl.maximum(index, 0), size - 1), valid, AXIS)


@triton.jit
def sequence_bounds(number, T, cu_seqlens):
    """Begin and end of a sequence, clamped: cu_seqlens is not validated on the host."""
    begin = tl.load(cu_seqlens + number).to(tl.int32)
    end = tl.load(cu_seqlens + number + 1).to(tl.int32)
    return tl.maximum(begin, 0), tl.minimum(end, T)
