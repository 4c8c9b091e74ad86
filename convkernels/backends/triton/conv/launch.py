"""Host side: the operators ``tap_conv``, ``tap_activation_grad`` and ``tap_grad`` as launches of Triton kernels.

No launch waits for the device: shapes and strides decide everything, ``cu_seqlens`` and the seed are read by kernels.
"""

import torch
import triton.language as tl
from torch import Tensor

from ..host import (
    architecture_of,
    ceil_div,
    dropout_scale,
    dropout_threshold,
    dtype_name,
    power_of_2,
    run,
    search_steps,
)
from . import backward_band, backward_heads, backward_tile, backward_window, configs, forward, sums
from .activations import ACTIVATIONS
from .configs import Band, Config, Groups, Heads, Tile, Window
from .finish import Finish, FinishFlags
from .inputs import Gradients, InputFlags, Inputs, Mask
from .taps import Dropout, FilterFlags, Filters, Needs, Relation, Rows, Sequences, Sizes


def check_dilation(dilation: int, K: int) -> None:
    if not 0 < dilation <= configs.MAX_SPAN // max(K - 1, 1):
        expected = f"a positive number, at most 2^30, also times K - 1 = {K - 1}"
        raise ValueError(f"argument 'dilation': expected {expected}, got {dilation}")


def check_activation(argument: str, number: int) -> None:
    if not 0 <= number < ACTIVATIONS:
        raise ValueError(f"argument '{argument}': expected 0, 1 or 2, got {number}")


class Call:
    """What forward and gradient share: the record of an operator's arguments, whose fields are read through this, and
    what they are to a kernel. architecture: by default that of x's device."""

    def __init__(self, args, architecture: int | None = None):
        self.args = args
        x, weight = args.x, args.weight
        self.B, self.T, self.C = x.shape
        self.H, self.K = weight.shape[-2:]
        check_dilation(self.dilation, self.K)
        self.packed, self.has_state = self.cu_seqlens is not None, self.initial_state is not None
        # Dimensions decide, not strides: dropout draws per element of the weight, also where an expanded one repeats.
        self.per_batch = weight.dim() == 4
        self.per_time = weight.dim() == 4 and not (weight.shape[1] == 1 and self.T != 1)
        self.per_row = self.per_time or self.renormalize
        self.shape = configs.Shape(
            self.B, self.T, self.C, self.H, self.K, self.dilation, dtype_name(x.dtype), self.per_row,
            self.gate is not None, self.packed, self.has_state, self.dropout > 0,
            architecture or architecture_of(x.device),
        )  # fmt: skip
        self.accumulator = tl.float64 if x.dtype == torch.float64 else tl.float32
        self.sequence_count = self.cu_seqlens.shape[0] - 1 if self.packed else 1
        # A kernel gets a pointer for every tensor; what is absent is not looked at.
        self.filters = Filters(weight, *(weight.stride() if self.per_batch else (0, 0, *weight.stride())))
        self.drawing = Dropout(
            x if self.seed is None else self.seed, dropout_threshold(self.dropout), dropout_scale(self.dropout)
        )
        self.filter_flags = FilterFlags(
            self.K, self.softmax, self.renormalize, self.dropout > 0, self.per_batch, self.per_time, self.has_state
        )
        self.positions = {
            "sizes": Sizes(self.T, self.C, self.H, self.C // self.H),
            "relation": Relation(self.left, self.dilation),
            "sequences": Sequences(
                self.cu_seqlens.contiguous() if self.packed else x, self.sequence_count,
                search_steps(self.sequence_count),
            ),
        }  # fmt: skip
        self.arguments = {
            "inputs": Inputs(
                rows(x), rows(x if self.gate is None else self.gate),
                Mask(x, 0, 0) if self.mask is None else Mask(self.mask.view(torch.uint8), *self.mask.stride()),
                self.initial_state.contiguous() if self.has_state else x,
            ),
            "weight": self.filters, **self.positions, "dropout": self.drawing, "FILTER": self.filter_flags,
            "INPUT": input_flags(args, self.mask is not None, self.has_state, self.packed),
        }  # fmt: skip

    def __getattr__(self, name: str):
        return getattr(self.args, name)


def rows(tensor: Tensor) -> Rows:
    return Rows(tensor, *tensor.stride())


def input_flags(args, has_mask: bool = False, has_state: bool = False, packed: bool = False) -> InputFlags:
    check_activation("gate_activation", args.gate_activation)
    gated = args.gate is not None
    return InputFlags(gated, has_mask, has_state, packed, args.gate_activation if gated else 0)


def finish_arguments(
    activation: int, absent: Rows, y: Tensor | None = None, out_gate: Tensor | None = None,
    residual: Tensor | None = None, grad: Tensor | None = None, grad_out_gate: Tensor | None = None, rows_of=rows,
) -> dict:  # fmt: skip
    """What forward kernels are told of the tensors that sums go to or meet, those of ``Finish``. Absent ones are not
    looked at."""
    check_activation("activation", activation)
    tensors = (y, out_gate, residual, grad, grad_out_gate)
    return {
        "finish": Finish(*[absent if tensor is None else rows_of(tensor) for tensor in tensors]),
        "FINISH": FinishFlags(activation, *[tensor is not None for tensor in tensors]),
    }


def sums_like(x: Tensor, *shape: int) -> Tensor:
    """Memory for sums, in the accumulation type."""
    return x.new_empty(shape, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


def options(config) -> dict:
    """What the compiler, not the kernel, gets from a configuration."""
    return {name: getattr(config, name) for name in ("num_warps", "num_stages", "maxnreg") if hasattr(config, name)}


def tap_conv(args) -> Tensor:
    """The operator ``tap_conv``."""
    y = torch.empty_like(args.x)
    if y.numel() == 0:
        return y
    call = Call(args)
    run(args.x, [forward_launch(call, configs.choose(call.shape, False), y=y, residual=args.residual)])
    return y


def tap_activation_grad(args) -> tuple[Tensor, Tensor]:
    """The operator ``tap_activation_grad``: the forward pass, of whose sums something else becomes."""
    x, wanted = args.x, args.wanted
    results = tuple(torch.empty_like(x) if asked else x.new_empty(0) for asked in wanted)
    if x.numel() and any(wanted):
        call = Call(args)
        y, grad_out_gate = (result if asked else None for result, asked in zip(results, wanted, strict=True))
        config = configs.choose(call.shape, False)
        run(x, [forward_launch(call, config, y=y, grad=args.grad, grad_out_gate=grad_out_gate)])
    return results


def forward_launch(call: Call, config: Tile | Band, **finish: Tensor | None):
    """Kernel, grid and arguments of a forward pass; nothing is launched. finish: the tensors of ``Finish`` that are no
    inputs of both operators."""
    args = call.args
    arguments = {
        **call.arguments, "bias": args.x if args.bias is None else args.bias.contiguous(),
        "HAS_BIAS": args.bias is not None,
        **finish_arguments(args.activation, call.arguments["inputs"].x, out_gate=args.out_gate, **finish),
        **options(config),
    }  # fmt: skip
    if isinstance(config, Band):
        c_blocks = call.H * ceil_div(call.C // call.H, config.BC)
        t_blocks = ceil_div(ceil_div(call.T, call.dilation), config.BT * config.TILES) * call.dilation
        kernel = forward.conv_band
        arguments |= {
            "BT": config.BT, "HALO": config.HALO, "BC": config.BC, "KP": config.KP, "TILES": config.TILES,
            "Z_PARTS": configs.parts(call.shape.dtype, call.gate is not None),
        }  # fmt: skip
    else:
        c_blocks, t_blocks = ceil_div(call.C, config.BC), tile_blocks(call, call.T, config)
        kernel = forward.conv_tile
        arguments |= tile_arguments(call, config)
    arguments |= {"t_blocks": t_blocks, "c_blocks": c_blocks}
    return kernel, (call.B * t_blocks * c_blocks,), arguments


def tile_blocks(call: Call, positions: int, config: Groups) -> int:
    """Blocks of positions, those of a group a dilation apart."""
    phases = call.dilation if config.ROWS > 1 else 1
    return phases * ceil_div(ceil_div(positions, phases), config.BT)


def tile_arguments(call: Call, config: Tile) -> dict:
    return {
        "UNIFORM": call.C // call.H % config.V == 0, "DTYPE": call.accumulator, "ROWS": config.ROWS, "BG": config.BG,
        "BV": config.BV, "V": config.V, "TAPS": config.TAPS,
    }  # fmt: skip


def tap_grad(args) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The operator ``tap_grad``."""
    x, weight, gate, state, wanted = args.x, args.weight, args.gate, args.initial_state, args.wanted
    none = x.new_empty(0)
    results = (
        torch.empty_like(x) if wanted.x else none,
        weight.new_empty(weight.shape if wanted.weight else 0),
        sums_like(x, x.shape[2] if wanted.bias else 0),
        torch.empty_like(gate) if wanted.gate and gate is not None else none,
        x.new_empty(state.shape) if wanted.initial_state and state is not None else none,
    )
    if x.numel() == 0:
        for result in results:
            result.zero_()
        return results
    call = Call(args)
    run(x, gradient_launches(call, args.grad, results, configs.choose(call.shape, True)))
    return results


def gradient_launches(call: Call, grad: Tensor, results: tuple, config: Config):
    """Kernel, grid and arguments of every launch of a backward pass, in order."""
    grad_x, _, grad_bias, grad_gate, _ = results
    need = Needs(*(results[n].numel() > 0 for n in (0, 3, 1, 2, 4)))
    gradients = Gradients(rows(grad_x if need.X else call.x), rows(grad_gate if need.GATE else call.x))
    arguments = call.arguments | {"grad": rows(grad), "gradients": gradients, **options(config)}
    if isinstance(config, Window | Heads):
        yield from _window_launches(call, arguments, results, need, config)
        return
    aligned = call.left % call.dilation == 0  # some tap reads its own position
    launches = _band_launches if isinstance(config, Band) else _tile_launches
    yield from launches(call, arguments, results, need._replace(BIAS=need.BIAS and aligned), config)
    if need.BIAS and not aligned:
        yield from _bias_launches(call, grad, grad_bias)


def _reduce_filters(call: Call, filters: Tensor, grad_weight: Tensor, owners: int, pieces: int, finished: bool):
    KP = power_of_2(call.K)
    arguments = {
        "filters": filters, "weight": call.filters, "grad_weight": grad_weight, "dropout": call.drawing,
        "groups": filters.numel() // (owners * call.H * pieces * call.K), "H": call.H, "pieces": pieces,
        "FILTER": call.filter_flags, "FINISHED": finished, "DTYPE": call.accumulator, "BR": max(1, 2048 // KP),
        "KP": KP, "num_warps": 4,
    }  # fmt: skip
    return sums.reduce_filters, (owners * call.H,), arguments


def _reduce_bias(call: Call, biases: Tensor, grad_bias: Tensor):
    BC = min(power_of_2(call.C), 32)
    arguments = {
        "biases": biases, "grad_bias": grad_bias, "rows": biases.numel() // call.C, "C": call.C,
        "DTYPE": call.accumulator, "BR": 64, "BC": BC, "num_warps": 4,
    }  # fmt: skip
    return sums.reduce_bias, (ceil_div(call.C, BC),), arguments


def _bias_launches(call: Call, grad: Tensor, grad_bias: Tensor):
    config = configs.tile(call.shape, backward=True)
    c_blocks, row_blocks = ceil_div(call.C, config.BC), call.B * ceil_div(call.T, config.BT)
    groups = configs.groups(row_blocks, c_blocks)
    biases = sums_like(call.x, groups, call.C)
    arguments = {
        "grad": rows(grad), "biases": biases, "T": call.T, "C": call.C, "groups": groups, "row_blocks": row_blocks,
        "c_blocks": c_blocks, "DTYPE": call.accumulator, "BT": config.BT, "BC": config.BC,
        "num_warps": config.num_warps,
    }  # fmt: skip
    yield sums.sum_rows, (groups * c_blocks,), arguments
    yield _reduce_bias(call, biases, grad_bias)


def _tile_launches(call: Call, arguments: dict, results: tuple, need: Needs, config: Tile):
    """Filters are summed tap by tap."""
    _, grad_weight, grad_bias, _, grad_state = results
    # Rows of the state are no inputs of the tiles of grad_tile: their products are found from the outputs' side.
    rowwise = call.per_row or call.has_state
    blocks = configs.rows(call.shape)
    statistics = call.x
    if call.per_row and call.softmax and (need.X or need.GATE or need.STATE):
        statistics = sums_like(call.x, call.B, call.T, call.H, 2)
        BH = min(power_of_2(call.H), 32)
        h_blocks = ceil_div(call.H, BH)
        own = {
            "statistics": statistics, "weight": call.filters, **call.positions, "h_blocks": h_blocks,
            "FILTER": call.filter_flags, "PACKED": call.packed, "DTYPE": call.accumulator, "BT": blocks.BT, "BH": BH,
            "num_warps": 4,
        }  # fmt: skip
        yield backward_tile.filter_sums, (call.B * ceil_div(call.T, blocks.BT) * h_blocks,), own
    owners = call.B if call.per_batch and not call.per_row else 1
    c_blocks = ceil_div(call.C, config.BC)
    common = {
        **arguments, "statistics": statistics, "grad_state": grad_state, "c_blocks": c_blocks, "filters": call.x,
        "biases": call.x, "OF_STATE": False, **tile_arguments(call, config),
    }  # fmt: skip
    tiles = tile_blocks(call, call.T, config) * call.B // owners
    chunks = ceil_div(call.K, config.TAPS)
    # Sums for all taps fit into registers, or the other gradients come first and then, TAPS at a time, these.
    needs = need._replace(FILTER=need.FILTER and not rowwise, STATE=False)
    filters_alone = Needs(X=False, GATE=False, FILTER=needs.FILTER, BIAS=False, STATE=False)
    for part in (needs,) if chunks == 1 else (needs._replace(FILTER=False), filters_alone):
        if not any(part):
            continue
        groups = configs.groups(tiles, c_blocks * (chunks if part.FILTER else 1), owners)
        filters = sums_like(call.x, owners, groups, call.C, call.K) if part.FILTER else call.x
        biases = sums_like(call.x, owners * groups, call.C) if part.BIAS else call.x
        own = {"filters": filters, "biases": biases, "t_blocks": tiles, "groups": groups, "NEED": part}
        yield backward_tile.grad_tile, (c_blocks * groups * owners, chunks if part.FILTER else 1), common | own
        if part.FILTER:
            yield _reduce_filters(call, filters, grad_weight, owners, call.C // call.H, False)
        if part.BIAS:
            yield _reduce_bias(call, biases, grad_bias)
    if need.STATE:
        tiles = ceil_div(call.shape.span, config.BT) * call.sequence_count * call.B // owners
        own = {"t_blocks": tiles, "groups": tiles, "NEED": need._replace(FILTER=False, BIAS=False), "OF_STATE": True}
        yield backward_tile.grad_tile, (c_blocks * tiles * owners, 1), common | own
    if need.FILTER and rowwise:
        t_blocks, h_blocks = ceil_div(call.T, blocks.BT), ceil_div(call.H, blocks.BH)
        filters = call.x if call.per_time else sums_like(call.x, call.B, t_blocks, call.H, call.K)
        own = {
            **call.arguments, "grad": arguments["grad"], "grad_weight": grad_weight, "filters": filters,
            "t_blocks": t_blocks, "h_blocks": h_blocks, "r_blocks": ceil_div(call.C // call.H, blocks.RP),
            "DTYPE": call.accumulator, "BT": blocks.BT, "BH": blocks.BH, "RP": blocks.RP, **options(blocks),
        }  # fmt: skip
        yield backward_tile.grad_filter_rows, (call.B * t_blocks * h_blocks,), own
        if not call.per_time:
            yield _reduce_filters(call, filters, grad_weight, call.B if call.per_batch else 1, 1, True)


def _window_launches(call: Call, arguments: dict, results: tuple, need: Needs, config: Window | Heads):
    """Short filters of one position, and longer ones in narrow heads."""
    _, grad_weight, grad_bias, _, _ = results
    h_blocks = ceil_div(call.H, config.BH)
    # Outputs from target(0, K - 1) on: before these none reads an input that exists.
    outputs = call.T + call.shape.span - call.left
    own = {
        **arguments, "grad_weight": grad_weight, "h_blocks": h_blocks, "NEED": need, "R": call.C // call.H,
        "DTYPE": call.accumulator, "BH": config.BH,
    }  # fmt: skip
    if isinstance(config, Heads):
        kernel, t_blocks = backward_heads.grad_heads, tile_blocks(call, outputs, config)
        own |= {"ROWS": config.ROWS, "BG": config.BG, "RV": config.RV, "V": config.V}
    else:
        phase_tiles = ceil_div(ceil_div(outputs, call.dilation), config.BT - (call.K - 1))
        kernel, t_blocks = backward_window.grad_window, phase_tiles * call.dilation
        dense = call.weight.stride()[-2:] == (call.K, 1)
        own |= {"phase_tiles": phase_tiles, "DENSE": dense, "BT": config.BT, "RP": config.RP, "KP": config.KP}
    filters = sums_like(call.x, call.B, t_blocks, call.H, call.K) if need.FILTER and not call.per_time else call.x
    biases = sums_like(call.x, call.B * t_blocks, call.C) if need.BIAS else call.x
    own |= {"filters": filters, "biases": biases, "t_blocks": t_blocks}
    yield kernel, (call.B * t_blocks * h_blocks,), own
    if need.FILTER and not call.per_time:
        yield _reduce_filters(call, filters, grad_weight, call.B if call.per_batch else 1, 1, True)
    if need.BIAS:
        yield _reduce_bias(call, biases, grad_bias)


def _band_launches(call: Call, arguments: dict, results: tuple, need: Needs, config: Band):
    """Filters meet their inputs in matrix products."""
    _, grad_weight, grad_bias, _, grad_state = results
    dtype = call.shape.dtype
    pieces = ceil_div(call.C // call.H, config.BC)
    units = call.H if call.per_row else call.H * pieces
    owners = call.B if call.per_batch and not call.per_time else 1
    phase_rows = ceil_div(call.T, call.dilation) + (call.K - 1 if call.has_state else 0)
    phase_tiles = ceil_div(phase_rows, config.BT)
    tiles = phase_tiles * call.dilation * call.B // owners
    groups = tiles if call.per_row else configs.groups(tiles, units, owners)
    filters = call.x
    if need.FILTER and not call.per_time:
        filters = sums_like(call.x, owners, groups, units, call.K)
    biases = sums_like(call.x, owners * groups, call.C) if need.BIAS else call.x
    own = {
        **arguments, "grad_state": grad_state, "grad_weight": grad_weight, "filters": filters, "biases": biases,
        "phase_tiles": phase_tiles, "t_blocks": tiles, "groups": groups, "pieces": pieces, "NEED": need,
        "BT": config.BT, "HALO": config.HALO, "BC": config.BC, "KP": config.KP, "PARTS": configs.parts(dtype),
        "Z_PARTS": configs.parts(dtype, call.gate is not None),
    }  # fmt: skip
    yield backward_band.grad_band, (units * groups * owners,), own
    if need.FILTER and not call.per_time:
        yield _reduce_filters(call, filters, grad_weight, owners, 1 if call.per_row else pieces, call.per_row)
    if need.BIAS:
        yield _reduce_bias(call, biases, grad_bias)
