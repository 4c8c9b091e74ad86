"""Host side of decoding: the operator ``tap_step`` as launches of a Triton kernel."""

import torch
import triton.language as tl
from torch import Tensor

from ..host import ceil_div, run
from . import configs, forward
from .launch import check_dilation, finish_arguments, input_flags, options
from .taps import FilterFlags, Filters, Rows, Sizes

ROWS_OF_A_LAUNCH = 65_535  # what the second dimension of a grid may count


def tap_step(args) -> Tensor:
    """The operator ``tap_step``: one launch (one per 65,535 rows)."""
    x, state, weight, dilation = args.x, args.state, args.weight, args.dilation
    K = weight.shape[-1]
    check_dilation(dilation, K)
    shape = (x.shape[0], dilation * (K - 1), x.shape[1])
    if state.shape != shape or not state.is_contiguous():
        expected = f"contiguous [batch, dilation * (taps - 1), channels] = {shape}"
        raise ValueError(f"argument 'state': expected {expected}, got {tuple(state.shape)}")
    y = torch.empty_like(x)
    if y.numel() == 0:
        return y
    whole = x.shape[0] if args.state_index is not None else ROWS_OF_A_LAUNCH

    def launches():
        for first in range(0, x.shape[0], whole):

            def part(tensor: Tensor | None, first=first) -> Tensor | None:
                shared = tensor is None or tensor.shape[0] != x.shape[0]
                return tensor if shared else tensor[first : first + whole]

            names = ("x", "state", "gate", "position", "out_gate", "residual")
            shares = {name: part(getattr(args, name)) for name in names}
            shares["weight"] = weight if weight.dim() == 2 else part(weight)
            yield step_launch(args._replace(**shares), part(y))

    run(x, launches())
    return y


def step_launch(args, y: Tensor):
    """Kernel, grid and arguments of a decoding step."""
    x, state, weight, bias, gate = args.x, args.state, args.weight, args.bias, args.gate
    state_index, position = args.state_index, args.position
    B, C = x.shape
    H, K = weight.shape[-2:]
    indexed, per_batch = state_index is not None, weight.dim() == 3
    batch, head, tap = weight.stride() if per_batch else (0, *weight.stride())
    config = configs.step(C, K)

    def row(tensor: Tensor) -> Rows:
        batch, channel = tensor.stride()
        return Rows(tensor, batch, 0, channel)

    x_row = row(x)
    arguments = {
        "x": x_row, "gate": x_row if gate is None else row(gate), "weight": Filters(weight, batch, 0, head, tap),
        "bias": x if bias is None else bias.contiguous(), "state": state,
        **finish_arguments(args.activation, x_row, y, args.out_gate, args.residual, rows_of=row),
        "scratch": torch.empty_like(state) if indexed else state,
        "state_index": state_index.contiguous() if indexed else x, "position": x if position is None else position,
        "position_stride": 0 if position is None or position.shape[0] == 1 else position.stride(0), "B": B,
        "sizes": Sizes(1, C, H, C // H), "dilation": args.dilation,
        "FILTER": FilterFlags(K, args.softmax, args.renormalize, False, per_batch, False, False),
        "INPUT": input_flags(args), "HAS_BIAS": bias is not None, "INDEXED": indexed,
        "HAS_POSITION": position is not None,
        "DTYPE": tl.float64 if x.dtype == torch.float64 else tl.float32, "BC": config.BC, "KP": config.KP,
        "BS": config.BS, **options(config),
    }  # fmt: skip
    return forward.conv_step, (ceil_div(C, config.BC), 1 if indexed else B), arguments
