"""Public functions of the convolution family for one position at a time."""

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import _functorch, _select, _validate
from . import checks, op
from .schema import TapStep


def lightweight_conv1d_step(
    x: Tensor,
    state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    softmax: bool = True,
    renormalize: bool = False,
    dilation: int = 1,
    gate: Tensor | None = None,
    gate_activation: str = "sigmoid",
    activation: str | None = None,
    out_gate: Tensor | None = None,
    residual: Tensor | None = None,
    state_index: Tensor | None = None,
    position: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """One position of a causal lightweight convolution.

        y[b,c] = bias[c] + sum_j softmax(weight)[h,j] * window[b, dilation*j, c],   window = [state, x]

    x: [B,C], the new position.
    state: [B,S,C] contiguous, S = dilation*(K-1), dtype of x: the inputs before it, gate applied, oldest first;
        start with zeros. Updated in place: the oldest row leaves, the new one enters.
    weight: [H,K].
    bias: [C], optional.
    gate, out_gate, residual: [B,C];  gate_activation, activation: as for ``lightweight_conv1d``.
    softmax, renormalize: as for ``lightweight_conv1d``.
    position: int64 [B] or [1], number of positions before this one; only ``renormalize`` needs it, to tell which
        rows of the state lie before the start of the sequence. By default none does.
    state_index: int64 [B]; row b continues from row state_index[b] of the old state (beam search). Rows may repeat.
    backend: as for ``lightweight_conv1d``.

    Step by step this equals ``lightweight_conv1d`` with padding="causal". Inference only: ValueError if an input
    requires grad in grad mode; other errors as for ``lightweight_conv1d``. Under autocast x, gates and residual are
    cast to the dtype of the state.
    Source: Wu et al. 2019.
    """
    name, finish = "lightweight_conv1d_step", (gate_activation, activation, out_gate, residual)
    operands = (x, state, weight, dilation, softmax, renormalize, bias, gate, state_index, position)
    return step(name, "[H,K]", TapStep(*operands, *checks.finish(name, *finish)), backend)


def depthwise_conv1d_step(
    x: Tensor,
    state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    dilation: int = 1,
    gate: Tensor | None = None,
    gate_activation: str = "sigmoid",
    activation: str | None = None,
    out_gate: Tensor | None = None,
    residual: Tensor | None = None,
    state_index: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """One position of a causal depthwise convolution.

        y[b,c] = bias[c] + sum_j weight[c,j] * window[b, dilation*j, c],   window = [state, x]

    weight: [C,K]. The other parameters and errors: as for ``lightweight_conv1d_step``. Step by step this equals
    ``depthwise_conv1d`` with padding="causal".
    Source: Wu et al. 2019.
    """
    name, finish = "depthwise_conv1d_step", (gate_activation, activation, out_gate, residual)
    operands = (x, state, weight, dilation, False, False, bias, gate, state_index, None)
    return step(name, "[C,K]", TapStep(*operands, *checks.finish(name, *finish)), backend)


def dynamic_conv1d_step(
    x: Tensor,
    state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    softmax: bool = True,
    renormalize: bool = False,
    dilation: int = 1,
    gate: Tensor | None = None,
    gate_activation: str = "sigmoid",
    activation: str | None = None,
    out_gate: Tensor | None = None,
    residual: Tensor | None = None,
    state_index: Tensor | None = None,
    position: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """One position of a causal dynamic convolution.

        y[b,c] = bias[c] + sum_j softmax(weight)[b,h,j] * window[b, dilation*j, c],   window = [state, x]

    weight: [B,H,K]. The other parameters and errors: as for ``lightweight_conv1d_step``. Step by step this equals
    ``dynamic_conv1d`` with padding="causal".
    Source: Wu et al. 2019.
    """
    name, finish = "dynamic_conv1d_step", (gate_activation, activation, out_gate, residual)
    operands = (x, state, weight, dilation, softmax, renormalize, bias, gate, state_index, position)
    return step(name, "[B,H,K]", TapStep(*operands, *checks.finish(name, *finish)), backend)


def step(name, letters, args: TapStep, backend) -> Tensor:
    """What the public function ``name`` computes, whose filters have the dimensions ``letters``."""
    state = args.state
    if isinstance(state, Tensor) and _validate.autocasting(args.x):
        # The state outlives the autocast region, so it decides the dtype.
        given = {argument: getattr(args, argument) for argument in ("x", "gate", "out_gate", "residual")}
        args = args._replace(**{n: v.to(state.dtype) for n, v in given.items() if isinstance(v, Tensor)})
    x = args.x
    compiling = torch.compiler.is_compiling()
    if not compiling and _functorch.transforms_active():
        raise NotImplementedError(
            f"{name}: expected no torch.func transform (vmap, functionalize, ...), because the state is updated in "
            "place; the batch is the first dimension of every argument"
        )
    if forward_ad._current_level >= 0:
        inputs = ("x", "state", "weight", "bias", "gate", "out_gate", "residual")
        _functorch.refuse_tangents(name, **{argument: getattr(args, argument) for argument in inputs})
    checks.step(name, letters, args)
    chosen = _select.pick(backend, name, x.device.type, x.dtype)
    y = op.KERNELS[chosen].step(*args)
    if not compiling and not state.is_inference():
        torch.autograd.graph.increment_version(state)
    return y
