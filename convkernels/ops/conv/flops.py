"""What an operator costs: floating-point operations, and the least bytes it must move.

Convention: one multiply and one add per tap, for all K taps of every output position, so taps that fall outside the
sequence count too, as in PyTorch's own convolution formulas; softmax, gate, bias and dropout are not counted. Each
of the two gradients (of the input side, of the weights) costs as much as the forward pass. Bytes: every input is
read once and every output written once.
"""

from collections.abc import Sequence

NEED_X, NEED_WEIGHT, NEED_BIAS, NEED_GATE, NEED_STATE = 1, 2, 4, 8, 16


def conv_flops(x: Sequence[int], weight: Sequence[int]) -> int:
    """2*B*T*C*K for x [B,T,C]; also 2*B*C*K for one step, x [B,C]."""
    total = 2 * weight[-1]
    for size in x:
        total *= size
    return total


def grad_flops(x: Sequence[int], weight: Sequence[int], needs: int) -> int:
    """2*B*T*C*K for the input side (x, gate and state share it) and again for the weights, where needed."""
    sides = bool(needs & (NEED_X | NEED_GATE | NEED_STATE)) + bool(needs & NEED_WEIGHT)
    return sides * conv_flops(x, weight)


def conv_bytes(
    x: Sequence[int], weight: Sequence[int], itemsize: int, *, weight_itemsize: int | None = None, gate=False
) -> int:
    """Read x, weight and gate, write y."""
    return (2 + gate) * _size(x) * itemsize + _size(weight) * (weight_itemsize or itemsize)


def grad_bytes(
    x: Sequence[int],
    weight: Sequence[int],
    itemsize: int,
    needs: int,
    *,
    weight_itemsize: int | None = None,
    gate=False,
) -> int:
    """Read grad, weight, gate and (where a gradient depends on it) x; write the gradients needed."""
    reads_x = bool(needs & (NEED_WEIGHT | NEED_GATE))
    passes = 1 + reads_x + gate + bool(needs & NEED_X) + bool(needs & NEED_GATE)
    weight_passes = 1 + bool(needs & NEED_WEIGHT)
    return passes * _size(x) * itemsize + weight_passes * _size(weight) * (weight_itemsize or itemsize)


def step_bytes(x: Sequence[int], state: Sequence[int], weight: Sequence[int], itemsize: int) -> int:
    """Read x, weight and the state, write y and the shifted state."""
    return (2 * _size(x) + 2 * _size(state) + _size(weight)) * itemsize


def _size(shape: Sequence[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
