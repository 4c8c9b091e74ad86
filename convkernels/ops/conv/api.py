"""Public functions of the convolution family.

Each call first tries a short path: a few comparisons that together prove a plain call valid, then the operator.
Anything else (optional arguments, autocast, torch.func, torch.compile, mistakes) goes through ``_general``, which
checks everything.
"""

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import _dtypes, _functorch, _select, _validate
from . import checks, op, reference
from .schema import INPUTS, TapConv, settled

_autocast_somewhere = _validate.autocast_somewhere
_transforms_active = _functorch.transforms_active
_is_compiling = torch.compiler.is_compiling
_is_grad_enabled = torch.is_grad_enabled
_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
_STRIDED = torch.strided
_CAST = ("x", "gate", "initial_state", "out_gate", "residual")
_MAX_SPAN = checks.MAX_SPAN

# (function, backend, dtype of x, dtype of weight, device, None for the CPU) of calls that passed all checks -> Kernels.
_proven: dict[tuple, tuple] = {}
_select.on_reset(_proven.clear)


def lightweight_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    softmax: bool = True,
    renormalize: bool = False,
    padding: str | int = "same",
    dilation: int = 1,
    weight_dropout: float = 0.0,
    training: bool = False,
    seed: Tensor | None = None,
    gate: Tensor | None = None,
    gate_activation: str = "sigmoid",
    activation: str | None = None,
    out_gate: Tensor | None = None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    backend: str = "auto",
):
    """Lightweight convolution: one filter per head, the same at every position.

        y[b,t,c] = bias[c] + sum_j w[h,j] * x[b, t + dilation*j - P, c],   h = c // (C/H),   w = softmax_j(weight)

    with x = 0 outside the sequence.

    x: [B,T,C], float64, float32, bfloat16 or float16, any strides; the result has its shape, dtype and layout.
    weight: [H,K], H divides C.
    bias: [C], optional.
    softmax: use softmax over the K taps of ``weight`` (taps outside the sequence keep their share).
    renormalize: leave taps outside the sequence out of the softmax, so that the others sum to 1. Masked positions and
        rows of the initial state are inside.
    weight_dropout: probability of dropping a (softmaxed) tap, scaling the kept ones by 1/(1-p); only if ``training``.
        One mask [H,K] serves the whole batch.
    seed: int64 [1], fixes the dropout mask; by default drawn from PyTorch's generator of x's device.
    mask: bool [B,T], False for padding: x is taken as 0 there whatever it holds, NaN included, and gets no gradient.
    gate: like x; the input becomes x * gate_act(gate) inside the kernel.
    gate_activation: what gate_act is: "sigmoid", "silu", gate * sigmoid(gate), or "none", the gate itself.
    activation: None, or "silu": the kernel puts y * sigmoid(y) in the place of y.
    out_gate: like x; the result, after the activation, is multiplied by it.
    residual: like x; is added to that. Each of the three takes no further pass over memory, nor do their gradients
        keep anything but the inputs: the sum is computed again.
    padding: "same" (P = dilation*(K//2)), "causal" (P = dilation*(K-1)) or P itself, from 0 to dilation*(K-1).
    cu_seqlens: int32 or int64 [N+1], from 0 to T, never decreasing: x is [1,T,C] and holds N sequences one after the
        other; no window reaches from one into another.
    initial_state: [B,S,C] ([N,S,C] when packed), S = dilation*(K-1), causal only: the inputs before the first, gate and
        mask already applied, oldest first.
    return_state: also return the state after the last position, same shape; causal only. Differentiable.
    backend: "auto" or a name from ``convkernels.backends.names()``; a named one never falls back.

    The arithmetic is float32 (float64 for float64); weight and bias may be of another float dtype than x, except that
    float64 goes only with float64. Under autocast x, gates, residual and initial_state are cast, parameters are not.
    Raises ValueError or TypeError naming the argument, what was expected and what was given, and RuntimeError if the
    backend named cannot run the call.
    Source: Wu et al. 2019, "Pay less attention with lightweight and dynamic convolutions"; Tay et al. 2021, equation 2.
    """
    return convolve(
        "lightweight_conv1d", "[H,K]", (softmax, renormalize, padding, dilation, weight_dropout, training), x, weight,
        bias, seed, gate, mask, cu_seqlens, initial_state, (gate_activation, activation, out_gate, residual),
        return_state, backend,
    )  # fmt: skip


def depthwise_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    padding: str | int = "same",
    dilation: int = 1,
    gate: Tensor | None = None,
    gate_activation: str = "sigmoid",
    activation: str | None = None,
    out_gate: Tensor | None = None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    backend: str = "auto",
):
    """Depthwise convolution: one filter per channel.

        y[b,t,c] = bias[c] + sum_j weight[c,j] * x[b, t + dilation*j - P, c]

    with x = 0 outside the sequence. It is ``lightweight_conv1d`` with H = C and without softmax.

    x: [B,T,C], as for ``lightweight_conv1d``.  weight: [C,K].  bias: [C], optional.
    padding, dilation, gate, gate_activation, activation, out_gate, residual, mask, cu_seqlens, initial_state,
        return_state, backend, dtypes and errors: as for ``lightweight_conv1d``.

    Source: Chang et al. 2021 (depthwise terms of convolutional attention); Tay et al. 2021.
    """
    return convolve(
        "depthwise_conv1d", "[C,K]", (False, False, padding, dilation, 0.0, False), x, weight, bias, None, gate, mask,
        cu_seqlens, initial_state, (gate_activation, activation, out_gate, residual), return_state, backend,
    )  # fmt: skip


def dynamic_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    softmax: bool = True,
    renormalize: bool = False,
    padding: str | int = "same",
    dilation: int = 1,
    weight_dropout: float = 0.0,
    training: bool = False,
    seed: Tensor | None = None,
    gate: Tensor | None = None,
    gate_activation: str = "sigmoid",
    activation: str | None = None,
    out_gate: Tensor | None = None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    backend: str = "auto",
):
    """Dynamic convolution: every output position has filters of its own.

        y[b,t,c] = bias[c] + sum_j w[b,t,h,j] * x[b, t + dilation*j - P, c],   h = c // (C/H),   w = softmax_j(weight)

    with x = 0 outside the sequence.

    x: [B,T,C], as for ``lightweight_conv1d``.
    weight: [B,T,H,K], usually a linear map of x, H divides C.
    weight_dropout: as for ``lightweight_conv1d``, but every tap of every position is dropped on its own.
    bias, softmax, renormalize, padding, dilation, training, seed, gate, gate_activation, activation, out_gate,
        residual, mask, cu_seqlens, initial_state, return_state, backend, dtypes and errors: as for
        ``lightweight_conv1d``.

    Source: Wu et al. 2019, "Pay less attention with lightweight and dynamic convolutions"; Tay et al. 2021, equation 3.
    """
    return convolve(
        "dynamic_conv1d", "[B,T,H,K]", (softmax, renormalize, padding, dilation, weight_dropout, training), x, weight,
        bias, seed, gate, mask, cu_seqlens, initial_state, (gate_activation, activation, out_gate, residual),
        return_state, backend,
    )  # fmt: skip


def convolve(
    name, letters, settings, x, weight, bias, seed, gate, mask, cu_seqlens, initial_state, finish, return_state, backend
):
    """What the public function ``name`` computes, whose filters have the dimensions ``letters``. settings: softmax,
    renormalize, padding, dilation, weight_dropout, training.  finish: gate_activation, activation, out_gate, residual.
    """
    softmax, renormalize, padding, dilation, p, training = settings
    gate_activation, activation, out_gate, residual = finish
    plain = (
        not _is_compiling()
        and gate is None
        and mask is None
        and cu_seqlens is None
        and initial_state is None
        and activation is None
        and out_gate is None
        and residual is None
        and gate_activation.__class__ is str
        and gate_activation == "sigmoid"
        and renormalize is False
        and return_state is False
        and (training is False or (training is True and p == 0.0))
        and seed is None
        and dilation.__class__ is int
        and 0 < dilation <= _MAX_SPAN
        and (softmax is True or softmax is False)
        and p.__class__ is float
        and 0.0 <= p <= 1.0
        and not _transforms_active()
        and not _autocast_somewhere()
        and forward_ad._current_level < 0
    )
    if plain:
        try:
            B, T, C = x.shape
            if letters == "[B,T,H,K]":
                b, t, H, K = weight.shape
                fits = b == B and t == T
            else:
                H, K = weight.shape
                fits = letters == "[H,K]" or H == C
            device = None if x.is_cpu and weight.is_cpu else x.device  # asking for a device takes longer than for this
            kernels = _proven[name, backend, x.dtype, weight.dtype, device]
            if padding == "same":
                left = dilation * (K // 2)
            elif padding == "causal":
                left = dilation * (K - 1)
            else:
                left = padding if padding.__class__ is int else -1
            fits = (
                fits
                and (device is None or weight.device == device)
                and x.layout is weight.layout is _STRIDED
                and K > 0
                and C % H == 0
                and 0 <= left <= (K - 1) * dilation <= _MAX_SPAN
            )
            if fits and bias is None:
                settings = left << 32 | dilation << 1 | softmax  # as packed() does it
                if not (_is_grad_enabled() and (x.requires_grad or weight.requires_grad)):
                    return kernels.plain(x, weight, settings)
                if not (_is_wrapped(x) or _is_wrapped(weight)):  # by a transform that has ended
                    return kernels.record_plain(x, weight, settings)
                return kernels.record(x, weight, left, dilation, softmax)
            here = bias.is_cpu if device is None else bias.device == device
            if fits and here and bias.shape == (C,) and bias.dtype is weight.dtype:
                recorded = _is_grad_enabled() and (x.requires_grad or weight.requires_grad or bias.requires_grad)
                run = kernels.record if recorded else kernels.fast
                return run(x, weight, left, dilation, softmax, False, 0.0, None, bias)
        except (AttributeError, LookupError, NotImplementedError, TypeError, ValueError, ZeroDivisionError):
            pass  # `_general` says what is wrong, if anything is
        except RuntimeError:
            if not any(getattr(value, "is_nested", False) for value in (x, weight, bias)):
                raise
    args = TapConv(
        x, weight, 0, dilation, softmax, renormalize, p, seed, bias, gate, mask, cu_seqlens, initial_state,
        *checks.finish(name, *finish),
    )  # fmt: skip
    return _general(name, letters, args, padding, training, return_state, backend)


def _general(name, letters, args: TapConv, padding, training, return_state, backend):
    """Every check and every feature."""
    transforming = _functorch.transforming()
    if forward_ad._current_level >= 0:
        _functorch.refuse_tangents(name, **dict(zip(INPUTS.names, INPUTS.of(args), strict=True)))
    if transforming or _autocast_somewhere():
        values = _validate.autocast(args.x, args.gate, args.initial_state, args.out_gate, args.residual)
        args = args._replace(**dict(zip(_CAST, values, strict=True)))
    left = checks.convolution(name, letters, args, padding, training, return_state)
    x, weight = args.x, args.weight
    chosen = _select.pick(backend, name, x.device.type, x.dtype)
    kernels = op.KERNELS[chosen]
    if not transforming:
        _proven[name, backend, x.dtype, weight.dtype, None if x.is_cpu else x.device] = kernels
    settled_args = settled(args, left, *_dtypes.drawn(args.dropout, training, args.seed, x.device))
    if transforming:
        y = op.differentiable_conv(chosen, *settled_args)
    else:
        y = (kernels.record if _functorch.recording(INPUTS.of(args)) else kernels.fast)(*settled_args)
    return (y, _final_state(args, left)) if return_state else y


def _final_state(args: TapConv, S: int) -> Tensor:
    """The last S rows of [initial state, z] of every sequence, [B,S,C] or [N,S,C]; gathered without asking how long the
    sequences are, so that it neither waits for a device nor ties a compiled graph to lengths."""
    x, cu_seqlens, initial_state = args.x, args.cu_seqlens, args.initial_state
    B, T, C = x.shape
    row = torch.arange(S, device=x.device)
    if cu_seqlens is None:
        lengths = end = torch.full((1, 1), T, device=x.device)
    else:
        cu = cu_seqlens.to(torch.int64)
        lengths, end = (cu[1:] - cu[:-1])[:, None], cu[1:, None]
    sequences = B if cu_seqlens is None else lengths.shape[0]
    source = end - S + row

    def gather(value):
        if value is None:
            return None
        if T == 0:
            return value.new_zeros(sequences, S, *value.shape[2:])
        index = source.clamp(0, T - 1)
        return value[:, index[0]] if cu_seqlens is None else value[0, index]

    # Rounded once, like the rows that steps make.
    wide = x.dtype if args.gate is None else _dtypes.accumulate_dtype(x.dtype)
    gate = None if args.gate is None else gather(args.gate).to(wide)
    z = reference.gated_input(gather(x).to(wide), gate, gather(args.mask), args.gate_activation).to(x.dtype)
    if initial_state is None:
        before = torch.zeros_like(z)
    else:
        index = (lengths + row).clamp(max=max(S - 1, 0))
        before = initial_state.gather(1, index[..., None].expand(sequences, S, C))
    return torch.where((lengths + row >= S)[..., None], z, before)
