"""What a convolution costs.

Convention: one multiply and one add per tap, for all K taps of every output position, so taps that fall outside the
sequence count too, as in PyTorch's own convolution formulas; softmax, gates, activation, bias and dropout are not
counted. Each of the two gradients (of the input side, of the weights) costs as much as the forward pass; so does the
gradient of an activation or out_gate, for which the sum is computed again.
"""

from math import prod

from .schema import TapActivationGrad, TapConv, TapGrad, TapStep


def forward(args: TapConv | TapStep | TapActivationGrad | TapGrad) -> int:
    """2*B*T*C*K for x [B,T,C]; also 2*B*C*K for one step, x [B,C]. Shapes stand for the tensors."""
    return 2 * prod(args.x) * args.weight[-1]


def backward(args: TapGrad) -> int:
    """2*B*T*C*K for the input side (x, gate and state share it) and again for the weights, where needed."""
    wanted = args.wanted
    return ((wanted.x or wanted.gate or wanted.initial_state) + wanted.weight) * forward(args)
