"""The arguments of ``tap_conv``, its gradients and ``tap_step``: names, order, defaults, and the bits of ``needs``."""

from .._arguments import Inputs, Saved, arguments, replacing
from .._spec import Form

_SETTING = "int dilation=1, bool softmax=False, bool renormalize=False"
_OPTIONAL = "Tensor? gate=None, Tensor? mask=None, Tensor? cu_seqlens=None, Tensor? initial_state=None"
_INPUTS = ("x", "weight", "bias", "gate", "initial_state")

ACTIVATIONS = ("none", "sigmoid", "silu")
"""What the numbers ``activation`` and ``gate_activation`` stand for."""
NONE, SIGMOID, SILU = range(len(ACTIVATIONS))

_FINISH = f"int gate_activation={SIGMOID}, int activation={NONE}, Tensor? out_gate=None"

TapConv = arguments(
    "tap_conv",
    f"(Tensor x, Tensor weight, int left, {_SETTING}, float dropout=0.0, Tensor? seed=None, Tensor? bias=None, "
    f"{_OPTIONAL}, {_FINISH}, Tensor? residual=None) -> Tensor",
)
TapActivationGrad = arguments(
    "tap_activation_grad",
    f"(Tensor grad, Tensor x, Tensor weight, int left, {_SETTING}, float dropout=0.0, Tensor? seed=None, "
    f"Tensor? bias=None, {_OPTIONAL}, {_FINISH}, int needs=3) -> (Tensor, Tensor)",
    ("sum", "out_gate"),
)
TapGrad = arguments(
    "tap_grad",
    f"(Tensor grad, Tensor x, Tensor weight, int left, {_SETTING}, float dropout=0.0, Tensor? seed=None, {_OPTIONAL}, "
    f"int gate_activation={SIGMOID}, int needs={2 ** len(_INPUTS) - 1}) -> ({', '.join(['Tensor'] * len(_INPUTS))})",
    _INPUTS,
)
TapStep = arguments(
    "tap_step",
    f"(Tensor x, Tensor(a!) state, Tensor weight, {_SETTING}, Tensor? bias=None, Tensor? gate=None, "
    f"Tensor? state_index=None, Tensor? position=None, {_FINISH}, Tensor? residual=None, Tensor? slots=None, "
    "Tensor? accepted=None, Tensor? cu_seqlens=None, Tensor? save_at=None, Tensor? save_slots=None) -> Tensor",
)


def packed(left: int, dilation: int, softmax: bool) -> int:
    """``settings`` of ``_plain_tap_conv``; both numbers are at most 2^30."""
    return left << 32 | dilation << 1 | softmax


def _of_plain(x, weight, settings: int) -> TapConv:
    return TapConv(x, weight, settings >> 32, settings >> 1 & 0x7FFFFFFF, bool(settings & 1))


PLAIN = Form("(Tensor x, Tensor weight, int settings) -> Tensor", _of_plain)

INPUTS = Inputs(TapConv, (*_INPUTS, "out_gate", "residual"))
OF_SUM = 2 ** len(_INPUTS) - 1  # of INPUTS, what ``tap_grad`` has gradients of
ACTIVATION_GRAD_INPUTS = Inputs(TapActivationGrad, ("grad", *_INPUTS, "out_gate"))
GRAD_INPUTS = Inputs(TapGrad, ("grad", "x", "weight", "gate", "initial_state"))
settled = replacing(TapConv, "left", "dropout", "seed")
FOR_GRAD = Saved(TapConv, TapGrad, rest=("grad", "needs"))
FOR_ACTIVATION_GRAD = Saved(TapConv, TapActivationGrad, rest=("grad", "needs"))
FOR_DOUBLE_BACKWARD = Saved(TapGrad, TapGrad)
OF_ACTIVATION_GRAD = Saved(TapActivationGrad, TapActivationGrad)


def of_grad(args: TapActivationGrad, grad, needs: int) -> TapGrad:
    """The call of ``tap_grad`` for the gradient of the sum that ``tap_activation_grad`` has found."""
    shared = (name for name in TapGrad._fields if name not in ("grad", "needs"))
    return TapGrad(grad=grad, needs=needs, **{name: getattr(args, name) for name in shared})
