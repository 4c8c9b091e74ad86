"""Public functions of the convolution family for decoding: the next position of every sequence, or the next few."""

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
    slots: Tensor | None = None,
    accepted: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    save_at: Tensor | None = None,
    save_slots: Tensor | None = None,
    position: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """The next position of a causal lightweight convolution, or the next T positions.

        y[b,t,c] = bias[c] + sum_j softmax(weight)[h,j] * window[b, t + dilation*j, c],
        window   = [last dilation*(K-1) rows of the state that count, x]

    x: [B,C], one new position, or [B,T,C]; y has its shape.
    state: [B,W,C], W >= dilation*(K-1), dtype of x, any strides (a cache [B,C,W] is given as ``cache.mT``): the inputs
        before x, gate applied, oldest first; start with zeros. Updated in place: the last W of [those that count, x].
    weight: [H,K].
    bias: [C], optional.
    gate, out_gate, residual: like x;  gate_activation, activation: as for ``lightweight_conv1d``.
    softmax, renormalize: as for ``lightweight_conv1d``.
    position: int64 [B] or [1], number of positions before x; only ``renormalize`` needs it, to tell which rows of the
        state lie before the start of the sequence. By default none does.
    state_index: int32 or int64 [B]; row b continues from row state_index[b] of the old state (beam search). Rows may
        repeat.
    slots: int32 or int64 [B]; state is a pool [S,W,C], and row b continues from and updates slot slots[b]. Where that
        is negative y is 0, and nothing else of the row is read or written. No slot twice.
    accepted: int32 or int64 [B]; only so many of the T newest rows of the state count, as after a step of T positions
        of which a verifier took the first accepted[b] (speculative decoding): the last T - accepted[b] are taken back.
        At most T; at least T - (W - dilation*(K-1)), so that those that count are held. Rows at the beginning of the
        new state for which the old one held nothing become 0. By default all count.
    cu_seqlens: int32 or int64 [N+1]; x is [1,T,C], N sequences one after the other, of which sequence n is positions
        cu_seqlens[n] to cu_seqlens[n+1]-1 and has the state, slots, accepted and position of row n (chunked prefill,
        also beside sequences of one position). Not with state_index.
    save_at, save_slots: int32 or int64 [M], with cu_seqlens and slots; the state before position save_at[m] of x, from
        1 to T, is also left in slot save_slots[m], where that is not negative (prefix caching). A boundary of sequences
        stands for the end of the one before it. None of save_slots twice, or in slots.
    backend: as for ``lightweight_conv1d``.

    Step by step this equals ``lightweight_conv1d`` with padding="causal". Inference only: ValueError if an input
    requires grad in grad mode; other errors as for ``lightweight_conv1d``. Under autocast x, gates and residual are
    cast to the dtype of the state.
    Source: Wu et al. 2019.
    """
    name, finish = "lightweight_conv1d_step", (gate_activation, activation, out_gate, residual)
    serving = (slots, accepted, cu_seqlens, save_at, save_slots)
    operands = (x, state, weight, dilation, softmax, renormalize, bias, gate, state_index, position)
    return step(name, "[H,K]", TapStep(*operands, *checks.finish(name, *finish), *serving), backend)


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
    slots: Tensor | None = None,
    accepted: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    save_at: Tensor | None = None,
    save_slots: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """The next position of a causal depthwise convolution, or the next T positions.

        y[b,t,c] = bias[c] + sum_j weight[c,j] * window[b, t + dilation*j, c],
        window   = [last dilation*(K-1) rows of the state that count, x]

    weight: [C,K]. The other parameters and errors: as for ``lightweight_conv1d_step``. Step by step this equals
    ``depthwise_conv1d`` with padding="causal".
    Source: Wu et al. 2019.
    """
    name, finish = "depthwise_conv1d_step", (gate_activation, activation, out_gate, residual)
    serving = (slots, accepted, cu_seqlens, save_at, save_slots)
    operands = (x, state, weight, dilation, False, False, bias, gate, state_index, None)
    return step(name, "[C,K]", TapStep(*operands, *checks.finish(name, *finish), *serving), backend)


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
    slots: Tensor | None = None,
    accepted: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    save_at: Tensor | None = None,
    save_slots: Tensor | None = None,
    position: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """The next position of a causal dynamic convolution, or the next T positions.

        y[b,t,c] = bias[c] + sum_j softmax(weight)[b,t,h,j] * window[b, t + dilation*j, c],
        window   = [last dilation*(K-1) rows of the state that count, x]

    weight: [B,H,K], or [B,T,H,K] for x [B,T,C]. The other parameters and errors: as for ``lightweight_conv1d_step``.
    Step by step this equals ``dynamic_conv1d`` with padding="causal".
    Source: Wu et al. 2019.
    """
    name, finish = "dynamic_conv1d_step", (gate_activation, activation, out_gate, residual)
    serving = (slots, accepted, cu_seqlens, save_at, save_slots)
    operands = (x, state, weight, dilation, softmax, renormalize, bias, gate, state_index, position)
    return step(name, "[B,H,K]", TapStep(*operands, *checks.finish(name, *finish), *serving), backend)


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
