"""What a convolution costs: floating-point operations, and the least bytes it must move.

Convention: one multiply and one add per tap, for all K taps of every output position, so taps that fall outside the
sequence count too, as in PyTorch's own convolution formulas; softmax, gate, bias and dropout are not counted. Each
of the two gradients (of the input side, of the weights) costs as much as the forward pass. Bytes: every input is
read once and every output written once.
"""

from collections.abc import Sequence
from math import prod

from .schema import INPUTS, TapConv, TapGrad, TapStep

NEED_X, NEED_WEIGHT, NEED_GATE = (INPUTS.bit[name] for name in ("x", "weight", "gate"))


def forward(args: TapConv | TapStep | TapGrad) -> int:
    """2*B*T*C*K for x [B,T,C]; also 2*B*C*K for one step, x [B,C]. Shapes stand for the tensors."""
    return 2 * prod(args.x) * args.weight[-1]


def backward(args: TapGrad) -> int:
    """2*B*T*C*K for the input side (x, gate and state share it) and again for the weights, where needed."""
    wanted = args.wanted
    return ((wanted.x or wanted.gate or wanted.initial_state) + wanted.weight) * forward(args)


def conv_bytes(
    x: Sequence[int], weight: Sequence[int], itemsize: int, *, weight_itemsize: int | None = None, gate=False
) -> int:
    """Read x, weight and gate, write y."""
    return (2 + gate) * prod(x) * itemsize + prod(weight) * (weight_itemsize or itemsize)


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
    return passes * prod(x) * itemsize + weight_passes * prod(weight) * (weight_itemsize or itemsize)
