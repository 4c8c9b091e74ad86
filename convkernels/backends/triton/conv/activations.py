"""What gates and results go through, and the derivatives."""

import triton
import triton.language as tl

# The numbers are those of ACTIVATIONS in convkernels/ops/conv/schema.py.
NONE, SIGMOID, SILU = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
ACTIVATIONS = 3


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
    if ACTIVATION == SIGMOID:
        s = tl.sigmoid(value)
        value = s * (1.0 - s)
    elif ACTIVATION == SILU:
        s = tl.sigmoid(value)
        value = s * (1.0 + value * (1.0 - s))
    else:
        tl.static_assert(ACTIVATION == NONE)
        value = tl.full(value.shape, 1.0, value.dtype)
    return value
