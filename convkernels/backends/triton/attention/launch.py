"""Host side: the operators ``attention`` and ``attention_grad`` as launches of Triton kernels.

No launch waits for the device: shapes and strides decide everything, ``cu_seqlens`` and the seed are read by kernels.
"""

from collections.abc import Iterator
from math import e as euler
from math import log2

import torch
import triton.language as tl
from torch import Tensor

from .. import interpreting, version
from ..host import architecture_of, bits, ceil_div, dropout_scale, dropout_threshold, dtype_name, run, search_steps
from . import backward_keys, backward_queries, backward_rows, configs, depthwise, forward, sums
from .tiles import Boundaries, Depthwise, Flags, Heads, Inputs, Tables, TileSizes

CLIP = 0
CONV = ("value_conv", "value_conv_bias", "value_conv_scale")
ROWS = ("q", "k", "v", "rel_query")
LOG2E = log2(euler)
MIN_ROWS = configs.MATRIX


class Call:
    """What forward and gradient share: the record of an operator's arguments, whose fields are read through this, and
    what they are to a kernel. architecture: by default that of q's device."""

    def __init__(self, args, architecture: int | None = None):
        self.args = args._replace(**{name: near_rows(getattr(args, name)) for name in ROWS})
        q, mask = self.q, self.key_mask
        self.B, self.T, self.H, self.D = q.shape
        self.S, self.G = self.k.shape[1:3]
        self.W = self.left + self.right + 1
        self.R = self.D if self.rel_query is None else self.rel_query.shape[3]
        packed = self.cu_seqlens_q is not None
        self.sequences = self.cu_seqlens_q.shape[0] - 1 if packed else None
        products = self.query_rel is not None or self.key_rel is not None
        absent = (self.key_rel, self.rel_query, self.value_conv, self.value_conv_bias, mask, self.cu_seqlens_q)
        simple = all(value is None for value in absent) and not (self.causal or self.dropout or self.outside != CLIP)
        self.shape = configs.Shape(
            self.D, self.R, self.W, dtype_name(q.dtype), products, architecture or architecture_of(q.device),
            interpreting() and not q.is_meta, version(), simple,
        )  # fmt: skip
        # Triton up to 3.6 compiles no product of float64 matrices that depend on loads of fewer bits, masks included.
        self.wide = q.dtype == torch.float64
        self.accumulator = tl.float64 if self.wide else tl.float32
        self.edges = self.outside == CLIP
        if mask is not None:
            mask = mask.long() if self.wide else mask.view(torch.uint8)
        cu_k = self.cu_seqlens_q if self.cu_seqlens_k is None else self.cu_seqlens_k
        self.records = {
            "inputs": Inputs(heads(q), heads(self.k), heads(self.v), heads(q if self.rel_query is None else
            self.rel_query)),
            "tables": Tables(*(self.table(name) for name in ("bias", "query_rel", "key_rel"))),
            "depthwise": Depthwise(*(self.table(name) for name in CONV)),
            "boundaries": Boundaries(self.cu_seqlens_q.contiguous(), cu_k.contiguous()) if packed else
            Boundaries(q, q),
            "FLAGS": Flags(
                self.D, self.shape.padded, self.R, self.shape.padded_rank, self.qk, self.scale < 0, self.causal,
                self.outside, self.bias is not None, self.query_rel is not None, self.rel_query is not None,
                self.key_rel is not None, *(getattr(self, name) is not None for name in CONV), mask is not None,
                packed, self.dropout > 0, self.shape.sliding,
            ),
        }  # fmt: skip
        inputs, tables, flags = self.records["inputs"], self.records["tables"], self.records["FLAGS"]
        sequences = self.sequences or 1
        self.values = {
            **self.records, "k": inputs.k, "v": inputs.v, "rel_query": inputs.rel_query, "key_rel": tables.key_rel,
            "key_mask": q if mask is None else mask, "seed": q if self.seed is None else self.seed,
            "mask_batch": 0 if mask is None else mask.stride(0), "mask_time": 0 if mask is None else mask.stride(1),
            "query_rel_head": self._head(self.query_rel, self.R), "key_rel_head": self._head(self.key_rel, self.D),
            "T": self.T, "S": self.S, "B": self.B, "H": self.H, "sharing": self.H // self.G, "left": self.left,
            "right": self.right, "sequences": sequences, "search_steps": search_steps(sequences),
            "scale": bits(self.scale), "rel_scale": bits(self.rel_scale), "score_scale": bits(self.scale * LOG2E),
            "table_scale": bits(self.rel_scale * LOG2E), "threshold": dropout_threshold(self.dropout),
            "keep_scale": dropout_scale(self.dropout), "plane": self.B * self.H * self.T,
            "edge_plane": self.B * self.H * self.S, "DTYPE": self.accumulator,
            **{name: getattr(flags, name) for name in ("D", "DP", "CAUSAL", "HAS_MASK", "HAS_CONV_BIAS",
            "HAS_CONV_SCALE", "PACKED")},
        }  # fmt: skip

    def __getattr__(self, name: str):
        return getattr(self.args, name)

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

    def arguments(self, kernel) -> dict:
        """Those of the kernel's parameters that several kernels have."""
        return {name: self.values[name] for name in kernel.arg_names if name in self.values}

    def tile(self, pairs: configs.Pairs, kept: int) -> dict:
        """Tile sizes and the compiler's options, for programs that keep so many rows."""
        width = configs.width(self.shape, pairs, kept)
        piece = configs.piece(self.shape, width, kept)
        sizes = pairs.BM, pairs.BN, pairs.NEAR, pairs.NEAR_STAGES, width, piece
        sizes += self.shape.in_registers, self.shape.crowded
        options = {"num_warps": pairs.num_warps, "num_stages": pairs.num_stages, "maxnreg": pairs.maxnreg}
        return {"TILE": TileSizes(*sizes), **options}

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
            yield kernel, (self.B * self.H * slots,), self.arguments(kernel) | own


def heads(tensor: Tensor) -> Heads:
    return Heads(tensor, *tensor.stride())


def near_rows(x: Tensor | None) -> Tensor | None:
    """x, or a copy if the elements of a tile lie so far apart that kernels, which count in 32 bits there, would not
    reach them all."""
    return x.contiguous() if x is not None and max(x.stride(1), x.stride(3)) >= 2**31 // 1024 else x


def attention(args) -> tuple[Tensor, Tensor]:
    """The operator ``attention``."""
    call = Call(args)
    out, lse = torch.empty_like(call.q), call.scratch(call.B, call.H, call.T)
    if out.numel():
        run(call.q, forward_launches(call, out, lse))
    return out, lse


def forward_launches(call: Call, out: Tensor, lse: Tensor) -> Iterator[tuple]:
    """Kernel, grid and arguments of every launch of a forward pass, in order."""
    yield from call.key_edges()
    kernel, pairs = forward.attention_forward, configs.forward(call.shape)
    slots = configs.tiles(call.T, pairs.BM, call.sequences)
    own = {"key_edges": call.found_edges, "out": heads(out), "lse": lse, "slots": slots, **call.tile(pairs, pairs.BM)}
    yield kernel, (call.B * call.H * slots,), call.arguments(kernel) | own


def attention_grad(args) -> tuple[Tensor, ...]:
    """The operator ``attention_grad``."""
    call = Call(args)
    results = {}
    for name, asked in args.wanted._asdict().items():
        value = getattr(call, name)
        if value is None or not asked:
            results[name] = (call.q if value is None else value).new_empty(0)
        else:
            results[name] = torch.empty_like(value) if name in ROWS else value.new_empty(value.shape)
    if call.q.numel() == 0 or call.S == 0:
        for value in results.values():
            value.zero_()
    run(call.q, gradient_launches(call, near_rows(args.grad), args.grad_lse, near_rows(args.out), args.lse, results))
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
    if wanted & set(CONV):
        yield from _conv_pass(call, grad, results, wanted)


def _prepare(call: Call, grad, grad_lse, out, lse, constants):
    kernel, height = backward_rows.prepare_rows, MIN_ROWS if call.shape.small else 64
    slots = configs.tiles(call.T, height, call.sequences)
    own = {
        "grad": heads(grad), "out": heads(out), "lse": lse.contiguous(), "grad_lse": lse if grad_lse is None else
        grad_lse.contiguous(), "constants": constants, "slots": slots,
        "DROPS_ALL": call.dropout == 1.0, "HAS_GRAD_LSE": grad_lse is not None,
        "EDGES": call.edges and (call.bias is not None or call.query_rel is not None), "BM": height,
        "num_warps": 8, "maxnreg": 255,
    }  # fmt: skip
    return kernel, (call.B * call.H * slots,), call.arguments(kernel) | own


def _query_pass(call: Call, grad, constants, results: dict, wanted: set):
    kernel, pairs = backward_queries.grad_queries, configs.backward(call.shape, keys=False)
    table, bias = "query_rel" in wanted, "bias" in wanted
    size = call.R * call.W
    slots = configs.tiles(call.T, pairs.BM, call.sequences)
    groups = configs.groups(slots, call.B * call.H, size * table + call.W * bias)
    query_sums = call.sums(call.H, call.B * groups, size) if table else call.q
    bias_sums = call.sums(call.H, call.B * groups, call.W) if bias else call.q
    dq, dr = results["q"] if "q" in wanted else call.q, results["rel_query"] if "rel_query" in wanted else call.q
    own = {
        "grad": heads(grad), "key_edges": call.found_edges, "constants": constants,
        "gradients": backward_queries.Gradients(heads(dq), heads(dr)), "query_sums": query_sums,
        "bias_sums": bias_sums, "slots": slots, "groups": groups,
        "NEED": backward_queries.Needs("q" in wanted, "rel_query" in wanted, table, bias),
        **call.tile(pairs, pairs.BM),
    }  # fmt: skip
    yield kernel, (call.B * call.H * groups,), call.arguments(kernel) | own
    if table:
        yield _sum_partials(call, query_sums, results["query_rel"], size, call.rel_scale)
    if bias:
        yield _sum_partials(call, bias_sums, results["bias"], call.W, 1.0)


def _key_pass(call: Call, grad, constants, results: dict, wanted: set):
    if call.S == 0:
        return
    kernel, pairs = backward_keys.grad_keys, configs.backward(call.shape, keys=True)
    table = "key_rel" in wanted
    size = call.D * call.W
    slots = configs.tiles(call.S, pairs.BN, call.sequences)
    # A program serves all heads that share its keys, and has sums for each.
    groups = configs.groups(slots, call.B * call.G, size * table * (call.H // call.G))
    key_sums = call.sums(call.H, call.B * groups, size) if table else call.q
    dk, dv = results["k"] if "k" in wanted else call.k, results["v"] if "v" in wanted else call.v
    own = {
        "grad": heads(grad), "key_edges": call.found_edges, "constants": constants,
        "gradients": backward_keys.Gradients(heads(dk), heads(dv)), "key_sums": key_sums, "slots": slots,
        "groups": groups, "NEED": backward_keys.Needs("k" in wanted, "v" in wanted, table),
        **call.tile(pairs, pairs.BN),
    }  # fmt: skip
    yield kernel, (call.B * call.G * groups,), call.arguments(kernel) | own
    if table:
        yield _sum_partials(call, key_sums, results["key_rel"], size, call.scale)


def _sum_partials(call: Call, partials: Tensor, result: Tensor, size: int, scale: float):
    """partials: [H, rows, size]; a result that the heads share is the sum over them too."""
    owners = result.numel() // size
    BC = 32
    arguments = {
        "partials": partials, "result": result, "rows": partials.numel() // (owners * size), "size": size,
        "scale": bits(scale), "DTYPE": call.accumulator, "BR": 64, "BC": BC, "num_warps": 4,
    }  # fmt: skip
    return sums.sum_partials, (owners * ceil_div(size, BC),), arguments


def _conv_pass(call: Call, grad, results: dict, wanted: set):
    kernel, height = depthwise.sum_taps, MIN_ROWS if call.shape.small else 64
    channels, taps = min(call.shape.padded, 64), MIN_ROWS
    pieces = ceil_div(call.D, channels)
    slots = configs.tiles(call.T, height, call.sequences)
    groups = configs.groups(slots * call.B, call.H * pieces, call.D * call.W)
    need_taps = bool(wanted & {"value_conv", "value_conv_scale"})
    tap_sums = call.sums(call.H, groups, call.D, call.W) if need_taps else call.q
    grad_sums = call.scratch(call.H, groups, call.D)
    own = {
        "grad": heads(grad), "tap_sums": tap_sums, "grad_sums": grad_sums, "slots": slots, "groups": groups,
        "NEED_TAPS": need_taps, "BM": height, "BD": channels, "TAPS": taps, "num_warps": 4,
        "maxnreg": 255,
    }  # fmt: skip
    chunks = ceil_div(call.W, taps) if need_taps else 1
    yield kernel, (call.H * pieces * groups, chunks), call.arguments(kernel) | own
    kernel = depthwise.finish_taps
    own = {
        "tap_sums": tap_sums, "grad_sums": grad_sums, "gradients": Depthwise(*(results[name] for name in CONV)),
        "groups": groups, "NEED_TAPS": "value_conv" in wanted, "NEED_BIAS": "value_conv_bias" in wanted,
        "NEED_SCALE": "value_conv_scale" in wanted, "BE": 256, "num_warps": 4,
    }  # fmt: skip
    yield kernel, (call.H,), call.arguments(kernel) | own
