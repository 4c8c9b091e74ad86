"""Host side: the operators ``attention`` and ``attention_grad`` as launches of Triton kernels.

No launch waits for the device: shapes and strides decide everything, ``cu_seqlens`` and the seed are read by kernels.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from math import e as euler
from math import log2

import torch
import triton.language as tl
from torch import Tensor

from .. import interpreting
from ..conv.configs import ceil_div
from ..conv.launch import _bits, _name, _on, _threshold
from . import backward, configs, forward

CLIP = 0
LOG2E = log2(euler)
MIN_ROWS = configs.MATRIX


@dataclass
class Call:
    """What forward and gradient share: the arguments of ``attention``, and what they are to a kernel."""

    q: Tensor
    k: Tensor
    v: Tensor
    left: int = 0
    right: int = 0
    outside: int = CLIP
    causal: bool = False
    qk: bool = True
    scale: float = 1.0
    rel_scale: float = 1.0
    dropout: float = 0.0
    seed: Tensor | None = None
    bias: Tensor | None = None
    query_rel: Tensor | None = None
    rel_query: Tensor | None = None
    key_rel: Tensor | None = None
    value_conv: Tensor | None = None
    value_conv_bias: Tensor | None = None
    value_conv_scale: Tensor | None = None
    key_mask: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    architecture: int | None = None  # by default that of q's device

    def __post_init__(self):
        self.q, self.k, self.v, self.rel_query = (near_rows(x) for x in (self.q, self.k, self.v, self.rel_query))
        self.B, self.T, self.H, self.D = self.q.shape
        self.S, self.G = self.k.shape[1:3]
        self.W = self.left + self.right + 1
        self.R = self.D if self.rel_query is None else self.rel_query.shape[3]
        self.packed = self.cu_seqlens_q is not None
        self.sequences = self.cu_seqlens_q.shape[0] - 1 if self.packed else None
        products = self.query_rel is not None or self.key_rel is not None
        self.shape = configs.Shape(
            self.D, self.R, self.W, _name(self.q.dtype), products, self.architecture or architecture_of(self.q.device),
            interpreting() and not self.q.is_meta,
        )  # fmt: skip
        # Triton up to 3.6 compiles no product of float64 matrices that depend on loads of fewer bits, masks included.
        self.wide = self.q.dtype == torch.float64
        self.accumulator = tl.float64 if self.wide else tl.float32
        self.edges = self.outside == CLIP

    def sums(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=self.results, device=self.q.device)

    def scratch(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.results, device=self.q.device)

    @property
    def results(self) -> torch.dtype:
        """The accumulation type, that of lse."""
        return torch.float64 if self.wide else torch.float32

    def table(self, name: str) -> Tensor:
        """A table in the order that kernels read; a kernel gets a pointer also for what is absent, and does not look
        at it."""
        value = getattr(self, name)
        return self.q if value is None else (value.double() if self.wide else value).contiguous()

    def arguments(self, names: list[str], pairs: configs.Pairs | None = None, kept: int = 0) -> dict:
        """What kernels have in common; ``names``: those of the parameters that one of them has."""
        cu_k = self.cu_seqlens_q if self.cu_seqlens_k is None else self.cu_seqlens_k
        r = self.q if self.rel_query is None else self.rel_query
        mask = self.key_mask
        if mask is not None:
            mask = mask.long() if self.wide else mask.view(torch.uint8)
        factor = 1.0 / (1.0 - self.dropout) if self.dropout < 1.0 else 0.0
        values = {
            "q": self.q, "k": self.k, "v": self.v, "rel_query": r, "query_rel": self.table("query_rel"),
            "bias": self.table("bias"), "key_rel": self.table("key_rel"), "value_conv": self.table("value_conv"),
            "conv_bias": self.table("value_conv_bias"), "conv_scale": self.table("value_conv_scale"),
            "key_mask": self.q if mask is None else mask, "cu_q": self.cu_seqlens_q.contiguous() if self.packed
            else self.q, "cu_k": cu_k.contiguous() if self.packed else self.q,
            "seed": self.q if self.seed is None else self.seed,
            **strides("q", self.q), **strides("k", self.k), **strides("v", self.v), **strides("r", r),
            "mask_batch": 0 if mask is None else mask.stride(0), "mask_time": 0 if mask is None else mask.stride(1),
            "query_rel_head": self._head(self.query_rel, self.R), "key_rel_head": self._head(self.key_rel, self.D),
            "T": self.T, "S": self.S, "B": self.B, "H": self.H, "sharing": self.H // self.G, "left": self.left,
            "right": self.right, "sequences": self.sequences or 1,
            "search_steps": max((self.sequences or 1) - 1, 0).bit_length(),
            "scale": _bits(self.scale), "rel_scale": _bits(self.rel_scale), "score_scale": _bits(self.scale * LOG2E),
            "table_scale": _bits(self.rel_scale * LOG2E), "threshold": _threshold(self.dropout),
            "keep_scale": _bits(factor), "plane": self.B * self.H * self.T, "edge_plane": self.B * self.H * self.S,
            "D": self.D, "DP": self.shape.padded, "R": self.R, "RP": self.shape.padded_rank, "QK": self.qk,
            "NEGATIVE": self.scale < 0, "CAUSAL": self.causal, "OUTSIDE": self.outside,
            "HAS_BIAS": self.bias is not None, "HAS_QUERY_REL": self.query_rel is not None,
            "HAS_REL_QUERY": self.rel_query is not None, "HAS_KEY_REL": self.key_rel is not None,
            "HAS_CONV": self.value_conv is not None, "HAS_CONV_BIAS": self.value_conv_bias is not None,
            "HAS_CONV_SCALE": self.value_conv_scale is not None, "HAS_MASK": mask is not None, "PACKED": self.packed,
            "DROPOUT": self.dropout > 0, "DTYPE": self.accumulator, "SLIDING": self.shape.sliding,
        }  # fmt: skip
        if pairs is not None:
            width = configs.width(self.shape, pairs, kept)
            values |= asdict(pairs) | {
                "WIDTH": width, "PIECE": configs.piece(self.shape, width, kept),
                "IN_REGISTERS": self.shape.in_registers,
            }  # fmt: skip
        wanted = {*names, "num_warps", "num_stages", "maxnreg"}
        return {name: value for name, value in values.items() if name in wanted}

    def _head(self, table: Tensor | None, rows: int) -> int:
        return rows * self.W if table is not None and table.dim() == 3 else 0

    def key_edges(self) -> Iterator[tuple]:
        """The launch that fills ``self.found_edges``, where there are any."""
        self.found_edges = self.q
        if self.key_rel is None or not self.edges:
            return
        self.found_edges = self.scratch(2, self.B, self.H, self.S)
        kernel, height = forward.find_key_edges, MIN_ROWS if self.shape.small else 64
        slots = ceil_div(self.S, height)
        own = {"key_edges": self.found_edges, "slots": slots, "BN": height, "num_warps": 4}
        if slots:
            yield kernel, (self.B * self.H * slots,), self.arguments(kernel.arg_names) | own


@cache
def architecture_of(device: torch.device) -> int:
    """What tiles are chosen for. Only sm_90 and sm_100 have matrix units that read shared memory; without a GPU any
    will do."""
    if device.type != "cuda":
        return 90
    return {9: 90, 10: 100}.get(torch.cuda.get_device_capability(device)[0], 80)


def strides(name: str, tensor: Tensor) -> dict:
    batch, time, head, channel = tensor.stride()
    return {f"{name}_batch": batch, f"{name}_time": time, f"{name}_head": head, f"{name}_channel": channel}


def near_rows(x: Tensor | None) -> Tensor | None:
    """x, or a copy if the elements of a tile lie so far apart that kernels, which count in 32 bits there, would not
    reach them all."""
    return x.contiguous() if x is not None and max(x.stride(1), x.stride(3)) >= 2**31 // 1024 else x


def attention(*arguments) -> tuple[Tensor, Tensor]:
    """The operator ``attention``."""
    call = Call(*arguments)
    out, lse = torch.empty_like(call.q), call.scratch(call.B, call.H, call.T)
    if out.numel():
        launch(call, forward_launches(call, out, lse))
    return out, lse


def launch(call: Call, launches: Iterator[tuple]) -> None:
    with _on(call.q):
        for kernel, grid, arguments in launches:
            kernel[grid](**arguments)


def forward_launches(call: Call, out: Tensor, lse: Tensor) -> Iterator[tuple]:
    """Kernel, grid and arguments of every launch of a forward pass, in order."""
    yield from call.key_edges()
    kernel, pairs = forward.attention_forward, configs.forward(call.shape)
    slots = configs.tiles(call.T, pairs.BM, call.sequences)
    own = {"key_edges": call.found_edges, "out": out, "lse": lse, "slots": slots, **strides("o", out)}
    yield kernel, (call.B * call.H * slots,), call.arguments(kernel.arg_names, pairs, pairs.BM) | own


INPUTS = (
    "q", "k", "v", "bias", "query_rel", "rel_query", "key_rel", "value_conv", "value_conv_bias", "value_conv_scale",
)  # fmt: skip
LIKE_INPUT = ("q", "k", "v", "rel_query")


def attention_grad(grad, grad_lse, out, lse, *arguments) -> tuple[Tensor, ...]:
    """The operator ``attention_grad``."""
    *arguments, needs = arguments if len(arguments) == 23 else (*arguments, 1023)
    call = Call(*arguments)
    results = {}
    for bit, name in enumerate(INPUTS):
        value = getattr(call, name)
        if value is None or not needs & 1 << bit:
            results[name] = (call.q if value is None else value).new_empty(0)
        else:
            results[name] = torch.empty_like(value) if name in LIKE_INPUT else value.new_empty(value.shape)
    if call.q.numel() == 0 or call.S == 0:
        for value in results.values():
            value.zero_()
    launch(call, gradient_launches(call, near_rows(grad), grad_lse, near_rows(out), lse, results))
    return tuple(results.values())


def gradient_launches(
    call: Call, grad: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, results: dict[str, Tensor]
) -> Iterator[tuple]:
    """Kernel, grid and arguments of every launch of a backward pass, in order. Gradients not wanted are empty."""
    if call.q.numel() == 0:
        return  # no query: all gradients are 0
    wanted = {name for name, value in results.items() if value.numel()}
    queries, keys = wanted & {"q", "bias", "query_rel", "rel_query"}, wanted & {"k", "v", "key_rel"}
    if queries or keys:
        yield from call.key_edges()
        constants = call.scratch(4 if call.edges else 2, call.B, call.H, call.T)
        yield _prepare(call, grad, grad_lse, out, lse, constants)
        if queries:
            yield from _query_pass(call, grad, constants, results, wanted)
        if keys:
            yield from _key_pass(call, grad, constants, results, wanted)
    if wanted & {"value_conv", "value_conv_bias", "value_conv_scale"}:
        yield from _conv_pass(call, grad, results, wanted)


def _prepare(call: Call, grad, grad_lse, out, lse, constants):
    kernel, height = backward.prepare_rows, MIN_ROWS if call.shape.small else 64
    slots = configs.tiles(call.T, height, call.sequences)
    own = {
        "grad": grad, "out": out, "lse": lse.contiguous(), "grad_lse": lse if grad_lse is None else
        grad_lse.contiguous(), "constants": constants, "slots": slots, **strides("g", grad), **strides("o", out),
        "DROPS_ALL": call.dropout == 1.0, "HAS_GRAD_LSE": grad_lse is not None,
        "EDGES": call.edges and (call.bias is not None or call.query_rel is not None), "BM": height,
        "num_warps": 8, "maxnreg": 255,
    }  # fmt: skip
    return kernel, (call.B * call.H * slots,), call.arguments(kernel.arg_names) | own


def _query_pass(call: Call, grad, constants, results: dict, wanted: set):
    kernel, pairs = backward.grad_queries, configs.backward(call.shape, keys=False)
    table, bias = "query_rel" in wanted, "bias" in wanted
    size = call.R * call.W
    slots = configs.tiles(call.T, pairs.BM, call.sequences)
    groups = configs.groups(slots, call.B * call.H, size * table + call.W * bias)
    query_sums = call.sums(call.H, call.B * groups, size) if table else call.q
    bias_sums = call.sums(call.H, call.B * groups, call.W) if bias else call.q
    dq, dr = results["q"] if "q" in wanted else call.q, results["rel_query"] if "rel_query" in wanted else call.q
    own = {
        "grad": grad, "key_edges": call.found_edges, "constants": constants, "grad_q": dq, "grad_rel_query": dr,
        "query_sums": query_sums, "bias_sums": bias_sums, "slots": slots, "groups": groups, **strides("g", grad),
        **strides("dq", dq), **strides("dr", dr), "NEED_QUERY": "q" in wanted,
        "NEED_REL_QUERY": "rel_query" in wanted, "NEED_TABLE": table, "NEED_BIAS": bias,
    }  # fmt: skip
    yield kernel, (call.B * call.H * groups,), call.arguments(kernel.arg_names, pairs, pairs.BM) | own
    if table:
        yield _sum_partials(call, query_sums, results["query_rel"], size, call.rel_scale)
    if bias:
        yield _sum_partials(call, bias_sums, results["bias"], call.W, 1.0)


def _key_pass(call: Call, grad, constants, results: dict, wanted: set):
    if call.S == 0:
        return
    kernel, pairs = backward.grad_keys, configs.backward(call.shape, keys=True)
    table = "key_rel" in wanted
    size = call.D * call.W
    slots = configs.tiles(call.S, pairs.BN, call.sequences)
    # A program serves all heads that share its keys, and has sums for each.
    groups = configs.groups(slots, call.B * call.G, size * table * (call.H // call.G))
    key_sums = call.sums(call.H, call.B * groups, size) if table else call.q
    dk, dv = results["k"] if "k" in wanted else call.k, results["v"] if "v" in wanted else call.v
    own = {
        "grad": grad, "key_edges": call.found_edges, "constants": constants, "grad_k": dk, "grad_v": dv,
        "key_sums": key_sums, "slots": slots, "groups": groups, **strides("g", grad), **strides("dk", dk),
        **strides("dv", dv), "NEED_KEY": "k" in wanted, "NEED_VALUE": "v" in wanted, "NEED_TABLE": table,
    }  # fmt: skip
    yield kernel, (call.B * call.G * groups,), call.arguments(kernel.arg_names, pairs, pairs.BN) | own
    if table:
        yield _sum_partials(call, key_sums, results["key_rel"], size, call.scale)


def _sum_partials(call: Call, partials: Tensor, result: Tensor, size: int, scale: float):
    """partials: [H, rows, size]; a result that the heads share is the sum over them too."""
    owners = result.numel() // size
    BC = 32
    arguments = {
        "partials": partials, "result": result, "rows": partials.numel() // (owners * size), "size": size,
        "scale": _bits(scale), "DTYPE": call.accumulator, "BR": 64, "BC": BC, "num_warps": 4,
    }  # fmt: skip
    return backward.sum_partials, (owners * ceil_div(size, BC),), arguments


def _conv_pass(call: Call, grad, results: dict, wanted: set):
    kernel, height = backward.sum_taps, MIN_ROWS if call.shape.small else 64
    channels, taps = min(call.shape.padded, 64), MIN_ROWS
    pieces = ceil_div(call.D, channels)
    slots = configs.tiles(call.T, height, call.sequences)
    groups = configs.groups(slots * call.B, call.H * pieces, call.D * call.W)
    need_taps = bool(wanted & {"value_conv", "value_conv_scale"})
    tap_sums = call.sums(call.H, groups, call.D, call.W) if need_taps else call.q
    grad_sums = call.scratch(call.H, groups, call.D)
    own = {
        "grad": grad, "tap_sums": tap_sums, "grad_sums": grad_sums, "slots": slots, "groups": groups,
        **strides("g", grad), "NEED_TAPS": need_taps, "BM": height, "BD": channels, "TAPS": taps, "num_warps": 4,
        "maxnreg": 255,
    }  # fmt: skip
    chunks = ceil_div(call.W, taps) if need_taps else 1
    yield kernel, (call.H * pieces * groups, chunks), call.arguments(kernel.arg_names) | own
    kernel = backward.finish_taps
    own = {
        "tap_sums": tap_sums, "grad_sums": grad_sums, "grad_conv": results["value_conv"],
        "grad_conv_bias": results["value_conv_bias"], "grad_conv_scale": results["value_conv_scale"],
        "groups": groups, "NEED_TAPS": "value_conv" in wanted, "NEED_BIAS": "value_conv_bias" in wanted,
        "NEED_SCALE": "value_conv_scale" in wanted, "BE": 256, "num_warps": 4,
    }  # fmt: skip
    yield kernel, (call.H,), call.arguments(kernel.arg_names) | own
