"""What gates and results go through, and the derivatives."""

import triton
import triton.language as tl

# The numbers are those of ACTIVATIONS in convkernels/ops/conv/schema.py.
NONE, SIGMOID, SILU = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def activated(value, ACTIVATION: tl.constexpr):
    """act(value)."""
    if ACTIVATION == SIGMOID:
        value = tl.sigmoid(value)
    elif ACTIVATION == SILU:
        value *= tl.sigmoid(value)
    else:
        tl.static_assert(ACTIVATION == NONE)
    return value


@triton.jit
def slope(value, ACTIVATION: tl.constexpr):
    """The derivative of act."""
    if ACTIVATION == NONE:
        return tl.full(value.shape, 1.0, value.dtype)
    s = tl.sigmoid(value)
    if ACTIVATION == SIGMOID:
        return s * (1.0 - s)
    tl.static_assert(ACTIVATION == SILU)
    return s * (1.0 + value * (1.0 - s))
