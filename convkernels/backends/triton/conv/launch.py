"""Host side: the operators ``tap_conv``, ``tap_grad`` and ``tap_step`` as launches of Triton kernels.

No launch waits for the device: shapes and strides decide everything, ``cu_seqlens`` and the seed are read by kernels.
"""

import struct
import threading
from dataclasses import asdict, dataclass

import torch
import triton.language as tl
from torch import Tensor

from . import backward, configs, forward
from .configs import Band, Config, Tile, Window, ceil_div, power_of_2

_INTERPRETER = threading.RLock()
ROWS_OF_A_LAUNCH = 65_535  # what the second dimension of a grid may count


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _on(tensor: Tensor):
    """Triton launches on the current device. Its interpreter alters its language module while a kernel runs, so that
    kernels of several threads have to take turns there."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else _INTERPRETER


def _bits(number: float) -> int:
    return struct.unpack("<q", struct.pack("<d", number))[0]


def _threshold(dropout: float) -> int:
    """The least random word that is kept, an unsigned 32-bit number, as the signed one with its bits. That of dropout 1
    lies beyond all words; the largest has to do."""
    word = min(int(dropout * 2**32), 2**32 - 1)
    return word - 2**32 if word >= 2**31 else word


def check_dilation(dilation: int, K: int) -> None:
    if not 0 < dilation <= configs.FARTHEST // max(K - 1, 1):
        expected = f"a positive number, at most 2^30, also times K - 1 = {K - 1}"
        raise ValueError(f"argument 'dilation': expected {expected}, got {dilation}")


@dataclass
class Call:
    """What forward and gradient share: the problem, its tensors and the arguments that describe them to a kernel."""

    x: Tensor
    weight: Tensor
    left: int
    dilation: int
    softmax: bool
    renormalize: bool
    dropout: float
    seed: Tensor | None
    gate: Tensor | None
    mask: Tensor | None
    cu_seqlens: Tensor | None
    state: Tensor | None

    def __post_init__(self):
        self.B, self.T, self.C = self.x.shape
        self.H, self.K = self.weight.shape[-2:]
        check_dilation(self.dilation, self.K)
        # A kernel gets a pointer for every tensor; what is absent is not looked at.
        self.has_mask, self.packed, self.has_state = (
            value is not None for value in (self.mask, self.cu_seqlens, self.state)
        )
        self.mask = self.mask.view(torch.uint8) if self.has_mask else self.x
        self.cu_seqlens = self.cu_seqlens.contiguous() if self.packed else self.x
        self.sequences = self.cu_seqlens.shape[0] - 1 if self.packed else 1
        self.state = self.state.contiguous() if self.has_state else self.x
        self.seed = self.x if self.seed is None else self.seed
        batch, time, head, tap = self.weight.stride() if self.weight.dim() == 4 else (0, 0, *self.weight.stride())
        self.weight_strides = batch, time, head, tap
        # Dimensions decide, not strides: dropout draws per element of the weight, also where an expanded one repeats.
        self.per_batch = self.weight.dim() == 4
        self.per_time = self.weight.dim() == 4 and not (self.weight.shape[1] == 1 and self.T != 1)
        self.shape = configs.Shape(
            self.B, self.T, self.C, self.H, self.K, self.dilation, _name(self.x.dtype),
            self.per_time or self.renormalize, self.gate is not None, self.packed, self.has_state,
            self.dropout > 0,
        )  # fmt: skip
        self.accumulator = tl.float64 if self.x.dtype == torch.float64 else tl.float32

    @property
    def search(self) -> dict:
        return {"sequences": self.sequences, "search_steps": max(self.sequences - 1, 0).bit_length()}

    @property
    def dropping(self) -> dict:
        scale = 1.0 / (1.0 - self.dropout) if self.dropout < 1.0 else 0.0
        return {"threshold": _threshold(self.dropout), "scale": _bits(scale)}

    @property
    def filters(self) -> dict:
        names = ("weight_batch", "weight_time", "weight_head", "weight_tap")
        return {"weight": self.weight, **dict(zip(names, self.weight_strides, strict=True))}

    @property
    def inputs(self) -> dict:
        gate = self.x if self.gate is None else self.gate
        mask = self.mask.stride() if self.has_mask else (0, 0)
        return {
            "x": self.x, "gate": gate, "mask": self.mask, **_strides("x", self.x), **_strides("gate", gate),
            "mask_batch": mask[0], "mask_time": mask[1],
        }  # fmt: skip

    @property
    def flags(self) -> dict:
        return {
            "K": self.K, "SOFTMAX": self.softmax, "RENORMALIZE": self.renormalize, "DROPOUT": self.dropout > 0,
            "HAS_GATE": self.gate is not None, "HAS_MASK": self.has_mask, "PACKED": self.packed,
            "HAS_STATE": self.has_state, "PER_BATCH": self.per_batch, "PER_TIME": self.per_time,
        }  # fmt: skip

    @property
    def relation(self) -> dict:
        return {"T": self.T, "C": self.C, "R": self.C // self.H, "left": self.left, "dilation": self.dilation}


def _strides(name: str, tensor: Tensor) -> dict:
    batch, time, channel = tensor.stride()
    return {f"{name}_batch": batch, f"{name}_time": time, f"{name}_channel": channel}


def tap_conv(
    x, weight, left, dilation=1, softmax=False, renormalize=False, dropout=0.0, seed=None, bias=None, gate=None,
    mask=None, cu_seqlens=None, initial_state=None,
) -> Tensor:  # fmt: skip
    """The operator ``tap_conv``."""
    y = torch.empty_like(x)
    if y.numel() == 0:
        return y
    call = Call(x, weight, left, dilation, softmax, renormalize, dropout, seed, gate, mask, cu_seqlens, initial_state)
    kernel, grid, arguments = forward_launch(call, bias, y, configs.choose(call.shape, False))
    with _on(x):
        kernel[grid](**arguments)
    return y


def forward_launch(call: Call, bias: Tensor | None, y: Tensor, config: Tile | Band):
    """Kernel, grid and arguments of a forward pass; nothing is launched."""
    arguments = {
        **call.inputs, **call.filters, **call.relation, **call.search, **call.dropping, **call.flags,
        "seed": call.seed, "bias": y if bias is None else bias.contiguous(), "cu_seqlens": call.cu_seqlens,
        "state": call.state, "y": y, **_strides("y", y), "HAS_BIAS": bias is not None,
    }  # fmt: skip
    if isinstance(config, Band):
        pieces = ceil_div(call.C // call.H, config.BC)
        c_blocks = call.H * pieces
        phase_tiles = ceil_div(ceil_div(call.T, call.dilation), config.BT * config.TILES)
        t_blocks = phase_tiles * call.dilation
        arguments |= {"heads": call.H, "Z_PARTS": configs.parts(_name(call.x.dtype), call.gate is not None)}
        kernel = forward.conv_band
        arguments |= asdict(config)
    else:
        c_blocks, t_blocks = ceil_div(call.C, config.BC), ceil_div(call.T, config.BT)
        kernel = forward.conv_tile
        arguments |= {"DTYPE": call.accumulator, **asdict(config)}
        del arguments["KP"]
    arguments |= {"t_blocks": t_blocks, "c_blocks": c_blocks}
    return kernel, (call.B * t_blocks * c_blocks,), arguments


def tap_grad(
    grad, x, weight, left, dilation=1, softmax=False, renormalize=False, dropout=0.0, seed=None, gate=None, mask=None,
    cu_seqlens=None, initial_state=None, needs=31,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The operator ``tap_grad``."""
    none = x.new_empty(0)
    grad_x = torch.empty_like(x) if needs & 1 else none
    grad_weight = weight.new_empty(weight.shape) if needs & 2 else weight.new_empty(0)
    grad_bias = _partial(x, x.shape[2] if needs & 4 else 0)
    grad_gate = torch.empty_like(gate) if needs & 8 and gate is not None else none
    grad_state = x.new_empty(initial_state.shape) if needs & 16 and initial_state is not None else none
    results = grad_x, grad_weight, grad_bias, grad_gate, grad_state
    if x.numel() == 0:
        for result in results:
            result.zero_()
        return results
    call = Call(x, weight, left, dilation, softmax, renormalize, dropout, seed, gate, mask, cu_seqlens, initial_state)
    with _on(x):
        for kernel, grid, arguments in gradient_launches(call, grad, results, configs.choose(call.shape, True)):
            kernel[grid](**arguments)
    return results


def gradient_launches(call: Call, grad: Tensor, results: tuple, config: Config):
    """Kernel, grid and arguments of every launch of a backward pass, in order."""
    grad_x, grad_weight, grad_bias, grad_gate, grad_state = results
    need_x, need_filter, need_bias, need_gate, need_state = (result.numel() > 0 for result in results)
    aligned = call.left % call.dilation == 0  # some tap reads its own position
    arguments = {
        **call.inputs, **call.filters, **call.relation, **call.search, **call.dropping, **call.flags, "H": call.H,
        "grad": grad, **_strides("dy", grad), "seed": call.seed, "cu_seqlens": call.cu_seqlens,
    }  # fmt: skip
    dx, dgate = grad_x if need_x else call.x, grad_gate if need_gate else call.x
    outputs = {
        "grad_x": dx, "grad_gate": dgate, "grad_state": grad_state, **_strides("dx", dx), **_strides("dgate", dgate),
        "NEED_X": need_x, "NEED_GATE": need_gate,
    }  # fmt: skip
    if isinstance(config, Window):
        yield from _window_plan(call, arguments, outputs, results, need_bias, config)
        return
    plan = _band_plan if isinstance(config, Band) else _tile_plan
    yield from plan(call, arguments, outputs, results, need_bias and aligned, config)
    if need_bias and not aligned:
        yield from _bias_launches(call, grad, grad_bias)


def _partial(x: Tensor, *shape: int) -> Tensor:
    """Room for sums, in the accumulation type."""
    return x.new_empty(shape, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


def _reduce_filters(call: Call, filters: Tensor, grad_weight: Tensor, owners: int, pieces: int, finished: bool):
    KP = power_of_2(call.K)
    arguments = {
        "filters": filters, "seed": call.seed, "grad_weight": grad_weight, **call.filters, **call.dropping,
        "groups": filters.numel() // (owners * call.H * pieces * call.K), "H": call.H, "pieces": pieces, "K": call.K,
        "SOFTMAX": call.softmax, "DROPOUT": call.dropout > 0, "FINISHED": finished, "PER_BATCH": call.per_batch,
        "DTYPE": call.accumulator, "BR": max(1, 2048 // KP), "KP": KP, "num_warps": 4,
    }  # fmt: skip
    return backward.reduce_filters, (owners * call.H,), arguments


def _reduce_bias(call: Call, biases: Tensor, grad_bias: Tensor):
    BC = min(power_of_2(call.C), 32)
    arguments = {
        "biases": biases, "grad_bias": grad_bias, "rows": biases.numel() // call.C, "C": call.C,
        "DTYPE": call.accumulator, "BR": 64, "BC": BC, "num_warps": 4,
    }  # fmt: skip
    return backward.reduce_bias, (ceil_div(call.C, BC),), arguments


def _bias_launches(call: Call, grad: Tensor, grad_bias: Tensor):
    config = configs.tile(call.shape, backward=True)
    c_blocks, row_blocks = ceil_div(call.C, config.BC), call.B * ceil_div(call.T, config.BT)
    groups = configs.groups(row_blocks, c_blocks)
    biases = _partial(call.x, groups, call.C)
    arguments = {
        "grad": grad, **_strides("dy", grad), "biases": biases, "T": call.T, "C": call.C, "groups": groups,
        "row_blocks": row_blocks, "c_blocks": c_blocks, "DTYPE": call.accumulator, "BT": config.BT, "BC": config.BC,
        "num_warps": config.num_warps,
    }  # fmt: skip
    yield backward.sum_rows, (groups * c_blocks,), arguments
    yield _reduce_bias(call, biases, grad_bias)


def _tile_plan(call: Call, arguments: dict, outputs: dict, results: tuple, need_bias: bool, config: Tile):
    """Launches where filters are summed tap by tap."""
    grad_x, grad_weight, grad_bias, grad_gate, grad_state = results
    need_filter, need_state = grad_weight.numel() > 0, grad_state.numel() > 0
    per_row = call.shape.per_row
    # Rows of the state are no inputs of the tiles of grad_tile: their products are found from the outputs' side.
    rowwise = per_row or call.has_state
    rows = configs.rows(call.shape)
    statistics = call.x
    if per_row and call.softmax and (grad_x.numel() or grad_gate.numel() or need_state):
        statistics = _partial(call.x, call.B, call.T, call.H, 2)
        BH = min(power_of_2(call.H), 32)
        h_blocks = ceil_div(call.H, BH)
        names = "T H left dilation sequences search_steps cu_seqlens K RENORMALIZE PACKED HAS_STATE PER_BATCH PER_TIME"
        own = {name: arguments[name] for name in names.split()}
        own |= {**call.filters, "statistics": statistics, "h_blocks": h_blocks, "DTYPE": call.accumulator}
        own |= {"BT": rows.BT, "BH": BH, "num_warps": 4}
        yield backward.filter_sums, (call.B * ceil_div(call.T, rows.BT) * h_blocks,), own
    owners = call.B if call.per_batch and not per_row else 1
    c_blocks = ceil_div(call.C, config.BC)
    sums = need_filter and not rowwise
    arguments = {**arguments, "DTYPE": call.accumulator}
    common = {**arguments, **outputs, **asdict(config), "statistics": statistics, "c_blocks": c_blocks}
    if outputs["NEED_X"] or outputs["NEED_GATE"] or sums or need_bias:
        tiles = ceil_div(call.T, config.BT) * call.B // owners
        groups = configs.groups(tiles, c_blocks, owners)
        filters = _partial(call.x, owners, groups, call.C, call.K) if sums else call.x
        biases = _partial(call.x, owners * groups, call.C) if need_bias else call.x
        own = {**common, "filters": filters, "biases": biases, "t_blocks": tiles, "groups": groups}
        own |= {"NEED_FILTER": sums, "NEED_BIAS": need_bias, "OF_STATE": False}
        chunks = ceil_div(call.K, config.KP) if sums else 1
        yield backward.grad_tile, (c_blocks * groups * owners, chunks), own
        if sums:
            yield _reduce_filters(call, filters, grad_weight, owners, call.C // call.H, False)
        if need_bias:
            yield _reduce_bias(call, biases, grad_bias)
    if need_state:
        tiles = ceil_div(call.shape.span, config.BT) * call.sequences * call.B // owners
        own = {**common, "filters": call.x, "biases": call.x, "t_blocks": tiles, "groups": tiles}
        own |= {"NEED_FILTER": False, "NEED_BIAS": False, "OF_STATE": True}
        yield backward.grad_tile, (c_blocks * tiles * owners, 1), own
    if need_filter and rowwise:
        t_blocks, h_blocks = ceil_div(call.T, rows.BT), ceil_div(call.H, rows.BH)
        filters = call.x if call.per_time else _partial(call.x, call.B, t_blocks, call.H, call.K)
        own = {**arguments, "state": call.state, "grad_weight": grad_weight, "filters": filters, "t_blocks": t_blocks}
        own |= {"h_blocks": h_blocks, "r_blocks": ceil_div(call.C // call.H, rows.RP), **asdict(rows)}
        yield backward.grad_filter_rows, (call.B * t_blocks * h_blocks,), own
        if not call.per_time:
            yield _reduce_filters(call, filters, grad_weight, call.B if call.per_batch else 1, 1, True)


def _window_plan(call: Call, arguments: dict, outputs: dict, results: tuple, need_bias: bool, config: Window):
    """One launch for filters of one position in narrow heads."""
    _, grad_weight, grad_bias, _, _ = results
    need_filter = grad_weight.numel() > 0
    h_blocks = ceil_div(call.H, config.BH)
    # Outputs from target(0, K - 1) on: before these none reads an input that exists.
    outputs_of_phase = ceil_div(call.T + call.shape.span - call.left, call.dilation)
    phase_tiles = ceil_div(outputs_of_phase, config.BT - (call.K - 1))
    t_blocks = phase_tiles * call.dilation
    filters = _partial(call.x, call.B, t_blocks, call.H, call.K) if need_filter and not call.per_time else call.x
    biases = _partial(call.x, call.B * t_blocks, call.C) if need_bias else call.x
    own = {
        **arguments, **outputs, **asdict(config), "grad_weight": grad_weight, "filters": filters, "biases": biases,
        "phase_tiles": phase_tiles, "t_blocks": t_blocks, "h_blocks": h_blocks, "DTYPE": call.accumulator,
        "NEED_FILTER": need_filter, "NEED_BIAS": need_bias, "DENSE": call.weight_strides[2:] == (call.K, 1),
    }  # fmt: skip
    del own["grad_state"]
    yield backward.grad_window, (call.B * t_blocks * h_blocks,), own
    if need_filter and not call.per_time:
        yield _reduce_filters(call, filters, grad_weight, call.B if call.per_batch else 1, 1, True)
    if need_bias:
        yield _reduce_bias(call, biases, grad_bias)


def _band_plan(call: Call, arguments: dict, outputs: dict, results: tuple, need_bias: bool, config: Band):
    """Launches where filters meet their inputs in matrix products."""
    _, grad_weight, grad_bias, _, grad_state = results
    need_filter, per_row = grad_weight.numel() > 0, call.shape.per_row
    dtype = _name(call.x.dtype)
    pieces = ceil_div(call.C // call.H, config.BC)
    units = call.H if per_row else call.H * pieces
    owners = call.B if call.per_batch and not call.per_time else 1
    phase_rows = ceil_div(call.T, call.dilation) + (call.K - 1 if call.has_state else 0)
    phase_tiles = ceil_div(phase_rows, config.BT)
    tiles = phase_tiles * call.dilation * call.B // owners
    groups = tiles if per_row else configs.groups(tiles, units, owners)
    filters = _partial(call.x, owners, groups, units, call.K) if need_filter and not call.per_time else call.x
    biases = _partial(call.x, owners * groups, call.C) if need_bias else call.x
    own = {
        **arguments, **outputs, **asdict(config), "state": call.state, "grad_weight": grad_weight, "filters": filters,
        "biases": biases, "phase_tiles": phase_tiles, "t_blocks": tiles, "groups": groups, "pieces": pieces,
        "NEED_FILTER": need_filter, "NEED_BIAS": need_bias, "NEED_STATE": grad_state.numel() > 0,
        "PARTS": configs.parts(dtype), "Z_PARTS": configs.parts(dtype, call.gate is not None),
    }  # fmt: skip
    del own["TILES"]
    yield backward.grad_band, (units * groups * owners,), own
    if need_filter and not call.per_time:
        yield _reduce_filters(call, filters, grad_weight, owners, 1 if per_row else pieces, per_row)
    if need_bias:
        yield _reduce_bias(call, biases, grad_bias)


def tap_step(
    x, state, weight, dilation=1, softmax=False, renormalize=False, bias=None, gate=None, state_index=None,
    position=None,
) -> Tensor:  # fmt: skip
    """The operator ``tap_step``: one launch (one per 65,535 rows)."""
    K = weight.shape[-1]
    check_dilation(dilation, K)
    shape = (x.shape[0], dilation * (K - 1), x.shape[1])
    if state.shape != shape or not state.is_contiguous():
        expected = f"contiguous [batch, dilation * (taps - 1), channels] = {shape}"
        raise ValueError(f"argument 'state': expected {expected}, got {tuple(state.shape)}")
    y = torch.empty_like(x)
    if y.numel() == 0:
        return y
    whole = x.shape[0] if state_index is not None else ROWS_OF_A_LAUNCH
    with _on(x):
        for first in range(0, x.shape[0], whole):

            def rows(tensor: Tensor | None, first=first) -> Tensor | None:
                shared = tensor is None or tensor.shape[0] != x.shape[0]
                return tensor if shared else tensor[first : first + whole]

            kernel, grid, arguments = step_launch(
                rows(x), rows(state), weight if weight.dim() == 2 else rows(weight), dilation, softmax, renormalize,
                bias, rows(gate), state_index, rows(position), rows(y),
            )  # fmt: skip
            kernel[grid](**arguments)
    return y


def step_launch(x, state, weight, dilation, softmax, renormalize, bias, gate, state_index, position, y):
    """Kernel, grid and arguments of a decoding step."""
    B, C = x.shape
    H, K = weight.shape[-2:]
    indexed = state_index is not None
    weight_batch, weight_head, weight_tap = weight.stride() if weight.dim() == 3 else (0, *weight.stride())
    config = configs.step(C, K)
    arguments = {
        "x": x, "state": state, "weight": weight, "bias": y if bias is None else bias.contiguous(),
        "gate": x if gate is None else gate, "state_index": state_index.contiguous() if indexed else x,
        "position": x if position is None else position, "scratch": torch.empty_like(state) if indexed else state,
        "y": y, "B": B, "C": C, "R": C // H, "dilation": dilation,
        "position_stride": 0 if position is None or position.shape[0] == 1 else position.stride(0),
        "x_batch": x.stride(0), "x_channel": x.stride(1),
        "weight_batch": weight_batch, "weight_head": weight_head, "weight_tap": weight_tap,
        "gate_batch": 0 if gate is None else gate.stride(0), "gate_channel": 0 if gate is None else gate.stride(1),
        "y_batch": y.stride(0), "y_channel": y.stride(1), "K": K, "SOFTMAX": softmax, "RENORMALIZE": renormalize,
        "HAS_BIAS": bias is not None, "HAS_GATE": gate is not None, "INDEXED": indexed,
        "HAS_POSITION": position is not None, "PER_BATCH": weight.dim() == 3,
        "DTYPE": tl.float64 if x.dtype == torch.float64 else tl.float32, **asdict(config),
    }  # fmt: skip
    return forward.conv_step, (ceil_div(C, config.BC), 1 if indexed else B), arguments
