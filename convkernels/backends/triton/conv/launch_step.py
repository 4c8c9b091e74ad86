"""Host side of decoding: the operator ``tap_step`` as one launch of a Triton kernel."""

import torch
import triton.language as tl
from torch import Tensor

from ..host import ceil_div, dtype_name, run, search_steps
from . import configs, step
from .launch import check_dilation, finish_arguments, input_flags, options, rows
from .step import Indices, PerSequence, StepFlags
from .taps import FilterFlags, Filters, Relation, Rows, Sizes


def tap_step(args) -> Tensor:
    """The operator ``tap_step``. No values are looked at, so a CUDA graph can capture it."""
    x, state, K = args.x, args.state, args.weight.shape[-1]
    check_dilation(args.dilation, K)
    states, width, channels = state.shape
    N, span = sequence_count(args), args.dilation * (K - 1)
    if width < span or channels != x.shape[-1] or (args.slots is None and states != N):
        slots = "slots" if args.slots is not None else N
        expected = f"[{slots}, at least dilation * (taps - 1) = {span}, {x.shape[-1]}]"
        raise ValueError(f"argument 'state': expected {expected}, got {tuple(state.shape)}")
    y = torch.empty_like(x)
    if N * channels > 0:
        run(x, [step_launch(args, y)])
    return y


def sequence_count(args) -> int:
    return args.x.shape[0] if args.cu_seqlens is None else args.cu_seqlens.shape[0] - 1


def rows_of(tensor: Tensor) -> Rows:
    """Of [batch, channels] or [batch, time, channels]."""
    if tensor.dim() == 3:
        return rows(tensor)
    batch, channel = tensor.stride()
    return Rows(tensor, batch, 0, channel)


def filters_of(weight: Tensor) -> Filters:
    """Of [heads, taps], [batch, heads, taps] or [batch, time, heads, taps]."""
    strides = weight.stride()
    return Filters(weight, *((*strides[:-2], 0, 0)[:2]), *strides[-2:])


def step_launch(args, y: Tensor):
    """Kernel, grid and arguments of a step."""
    x, state, weight, bias, gate = args.x, args.state, args.weight, args.bias, args.gate
    T, C = x.shape[1] if x.dim() == 3 else 1, x.shape[-1]
    (H, K), (S, W, _) = weight.shape[-2:], state.shape
    N, span, dynamic = sequence_count(args), args.dilation * (K - 1), weight.dim() > 2
    packed, indexed = args.cu_seqlens is not None, args.state_index is not None
    one = T == 1 and not packed
    shape = configs.Shape(N, T, C, H, K, args.dilation, dtype_name(x.dtype), dynamic or args.renormalize)
    config = configs.step(shape, W)

    def indices(tensor: Tensor | None) -> Indices:
        """Absent ones are not looked at."""
        return Indices(x, 0) if tensor is None else Indices(tensor, tensor.stride(0))

    position = args.position if args.renormalize else None
    if position is not None:
        position = position.expand(N)
    saves = 0 if args.save_at is None else args.save_at.shape[0]
    tail = T > config.head
    t_blocks = (ceil_div(T, config.BT) if packed else ceil_div(T - config.head, config.BT)) if tail else 0
    owners, c_blocks = 1 if indexed else N, ceil_div(C, config.BC)
    x_row = rows_of(x)
    finish = finish_arguments(args.activation, x_row, y, args.out_gate, args.residual, rows_of=rows_of)
    arguments = {
        "x": x_row, "gate": x_row if gate is None else rows_of(gate), "weight": filters_of(weight),
        "bias": x if bias is None else bias.contiguous(),
        "finish": finish["finish"],
        "pool": rows_of(state), "scratch": rows_of(torch.empty_like(state) if indexed else state),
        "per_sequence": PerSequence(
            indices(args.cu_seqlens), indices(args.slots), indices(args.state_index), indices(args.accepted),
            indices(position), indices(args.save_at), indices(args.save_slots),
        ),
        "S": S, "W": W, "T": T, "N": N, "M": saves, "sizes": Sizes(1, C, H, C // H),
        "relation": Relation(span, args.dilation), "head": config.head, "owners": owners, "t_blocks": t_blocks,
        "steps": search_steps(N), "c_blocks": c_blocks,
        "STEP": StepFlags(
            one, tail, packed, args.slots is not None, indexed, args.accepted is not None,
            position is not None, saves > 0, bias is not None,
            FilterFlags(K, args.softmax, args.renormalize, False, dynamic, dynamic, False),
            input_flags(args, has_state=True), input_flags(args), finish["FINISH"],
            tl.float64 if x.dtype == torch.float64 else tl.float32,
            config.BC, config.BP, config.BS, config.BT,
        ),
        **options(config),
    }  # fmt: skip
    return step.conv_step, (c_blocks * (owners + t_blocks * (1 if packed else N)),), arguments
