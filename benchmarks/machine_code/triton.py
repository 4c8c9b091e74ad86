"""Compiles the kernels ahead of time, without a GPU, and reads what they cost from the machine code.

The launches are those of ``launch``, for tensors without memory, so what is compiled is what would run.
"""

import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.machine_code.control_flow import ControlFlow
from benchmarks.machine_code.instructions import COUNTED, MATRIX, by_base, classes_of, instructions_of
from benchmarks.machine_code.rules import LoopCost, Resources, Rules, read_code, read_usage, run_tool, tools
from benchmarks.machine_code.triton_steps import STEP_VARIANTS, StepVariant
from convkernels.backends.triton.attention import launch as attention_launch
from convkernels.backends.triton.conv import configs, launch, launch_step
from convkernels.ops.attention.schema import INPUTS, Attention
from convkernels.ops.conv.schema import NONE, SIGMOID, SILU, TapActivationGrad, TapConv, TapStep

ARCHITECTURES = (80, 90, 100)
# The instruction by which each architecture's matrix unit multiplies at its full speed.
MATRIX_UNITS = {"100": "tcgen05.mma", "90": "wgmma.mma_async", "80": "mma.sync"}
RULES = Rules(
    Path(__file__).with_name("triton.txt"),
    "triton",
    triton.__version__,
    streaming=("conv_tile", "conv_band", "grad_band", "grad_heads", "grad_window"),
    vectors=("grad_tile",),
    # A thread has one channel of filters that differ by position and channel.
    scattered=frozenset(
        {
            ("conv_tile", "dynamic per channel K=4"),
            ("grad_heads", "dynamic per channel K=4"),
            ("conv_tile", "dynamic per channel gate mask K=4"),
            ("grad_heads", "dynamic per channel gate mask K=4"),
            ("conv_tile", "dynamic per channel K=63"),
            ("grad_tile", "dynamic per channel K=63"),
        }
    ),
    banded=("conv_band", "grad_band"),
    multiplying=("attention_forward", "grad_queries", "grad_keys"),
    units=MATRIX_UNITS,
)
_TYPES = {
    torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64",
    torch.int32: "i32", torch.uint8: "u8",
}  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """A problem with contiguous tensors, as models have it; channels = heads * head_channels. time_last: positions, not
    channels, lie side by side in memory. silu: of the gate and of the result."""

    name: str
    taps: int
    heads: int = 16
    head_channels: int = 64
    dynamic: bool = False
    softmax: bool = True
    renormalize: bool = False
    dropout: float = 0.0
    gate: bool = False
    mask: bool = False
    bias: bool = False
    packed: bool = False
    state: bool = False
    dilation: int = 1
    dtype: torch.dtype = torch.bfloat16
    batch: int = 8
    time_last: bool = False
    silu: bool = False
    out_gate: bool = False
    residual: bool = False

    def launches(self, architecture: int) -> Iterator[tuple]:
        """(kernel, arguments) of the forward and the backward pass, and of a decoding step."""
        for launches in self.passes(architecture).values():
            for kernel, _, arguments in launches:
                yield kernel, arguments
        if not (self.packed or self.mask or self.dropout):
            yield self.step()

    @property
    def _activations(self) -> tuple[int, int]:
        """Of the gate and of the result."""
        return (SILU, SILU) if self.silu else (SIGMOID, NONE)

    def _empty(self, *shape, dtype=None):
        return torch.empty(shape, dtype=dtype or self.dtype, device="meta")

    def passes(self, architecture: int) -> dict[str, list[tuple]]:
        """(kernel, grid, arguments) of the launches of each direction."""
        batch, time, channels = 1 if self.packed else self.batch, 4096, self.heads * self.head_channels
        empty = self._empty
        x = empty(batch, channels, time).transpose(1, 2) if self.time_last else empty(batch, time, channels)
        weight = empty(*((batch, time) if self.dynamic else ()), self.heads, self.taps)
        bias = empty(channels) if self.bias else None
        span = (self.taps - 1) * self.dilation
        gate, state = x if self.gate else None, empty(batch, span, channels) if self.state else None
        args = TapConv(
            x, weight, span if self.state else self.dilation * (self.taps // 2), self.dilation, self.softmax,
            self.renormalize, self.dropout, empty(1, dtype=torch.int64), bias, gate,
            empty(batch, time, dtype=torch.bool) if self.mask else None,
            empty(9, dtype=torch.int64) if self.packed else None, state, *self._activations,
            x if self.out_gate else None, x if self.residual else None,
        )  # fmt: skip
        call = launch.Call(args, architecture)
        none = empty(0)
        results = (
            torch.empty_like(x), empty(*weight.shape), empty(channels) if self.bias else none,
            torch.empty_like(x) if self.gate else none, none if state is None else empty(*state.shape),
        )  # fmt: skip
        like = torch.empty_like(x)
        backward = list(launch.gradient_launches(call, like, results, configs.choose(call.shape, True)))
        config = configs.choose(call.shape, False)
        forward = launch.forward_launch(call, config, y=like, residual=args.residual)
        if self.silu or self.out_gate:
            call = launch.Call(TapActivationGrad(like, *args[:-1]), architecture)
            out_gate = like if self.out_gate else None
            backward.insert(0, launch.forward_launch(call, config, y=like, grad=like, grad_out_gate=out_gate))
        return {"fwd": [forward], "bwd": backward}

    def step(self) -> tuple:
        """(kernel, arguments) of a decoding step."""
        channels, span, empty = self.heads * self.head_channels, (self.taps - 1) * self.dilation, self._empty
        row, weight = empty(256, channels), empty(*((256,) if self.dynamic else ()), self.heads, self.taps)
        step = TapStep(
            row, empty(256, span, channels), weight, self.dilation, self.softmax, self.renormalize,
            empty(channels) if self.bias else None, row if self.gate else None,
            empty(256, dtype=torch.int64) if self.state else None, None, *self._activations,
            row if self.out_gate else None, row if self.residual else None,
        )  # fmt: skip
        kernel, _, arguments = launch_step.step_launch(step, empty(*row.shape))
        return kernel, arguments


VARIANTS = (
    *(Variant(f"light K={taps}", taps) for taps in (3, 7, 15, 31, 63)),
    Variant("light gate mask K=7", 7, gate=True, mask=True),
    Variant("light gate mask K=31", 31, gate=True, mask=True),
    Variant("light dropout K=31", 31, dropout=0.1),
    Variant("light renormalize packed K=7", 7, renormalize=True, packed=True),
    Variant("light dilated bias K=7", 7, dilation=2, bias=True),
    Variant("light state K=7", 7, state=True),
    Variant("light float32 K=7", 7, dtype=torch.float32),
    Variant("light float32 K=31", 31, dtype=torch.float32),
    Variant("light float16 K=7", 7, dtype=torch.float16),
    Variant("light float16 K=31", 31, dtype=torch.float16),
    Variant("depthwise bias K=4", 4, heads=1024, head_channels=1, softmax=False, bias=True),
    Variant("depthwise K=31", 31, heads=1024, head_channels=1, softmax=False),
    Variant("depthwise gate mask K=4", 4, heads=1024, head_channels=1, softmax=False, gate=True, mask=True),
    Variant("depthwise float32 K=7", 7, heads=1024, head_channels=1, softmax=False, dtype=torch.float32),
    Variant("dynamic K=7", 7, dynamic=True),
    Variant("dynamic K=31", 31, dynamic=True),
    Variant("dynamic dropout K=31", 31, dynamic=True, dropout=0.1),
    Variant("dynamic gate mask K=7", 7, dynamic=True, gate=True, mask=True),
    Variant("dynamic float32 K=7", 7, dynamic=True, dtype=torch.float32),
    Variant("dynamic per channel K=4", 4, heads=1024, head_channels=1, dynamic=True),
    Variant("dynamic per channel gate mask K=4", 4, heads=1024, head_channels=1, dynamic=True, gate=True, mask=True),
    Variant("dynamic heads of 8 K=7", 7, heads=128, head_channels=8, dynamic=True),
    Variant("dynamic heads of 8 K=16", 16, heads=128, head_channels=8, dynamic=True),
    Variant("dynamic dropout K=7", 7, dynamic=True, dropout=0.1),
    Variant("dynamic per channel K=63", 63, heads=1024, head_channels=1, dynamic=True),
    Variant("depthwise bias silu K=4", 4, heads=1024, head_channels=1, softmax=False, bias=True, silu=True),
    Variant(
        "depthwise silu gates residual K=4", 4, heads=1024, head_channels=1, softmax=False, gate=True, silu=True,
        out_gate=True, residual=True,
    ),
    Variant("light silu gates residual K=31", 31, gate=True, silu=True, out_gate=True, residual=True),
    Variant(
        "light float32 silu gates residual K=31", 31, gate=True, silu=True, out_gate=True, residual=True,
        dtype=torch.float32,
    ),
    Variant("light packed silu gates residual K=7", 7, gate=True, packed=True, silu=True, out_gate=True, residual=True),
    Variant("dynamic silu gates residual K=7", 7, dynamic=True, gate=True, silu=True, out_gate=True, residual=True),
    Variant(
        "dynamic heads of 8 silu gates residual K=16", 16, heads=128, head_channels=8, dynamic=True, gate=True,
        silu=True, out_gate=True, residual=True,
    ),
)  # fmt: skip


@dataclass(frozen=True)
class AttentionVariant:
    """A problem of attention with contiguous tensors, as models have it. rank: R of a separate rel_query; per_head:
    heads have a query_rel of their own."""

    name: str
    channels: int = 64
    heads: int = 16
    shared: int = 16
    left: int = 0
    right: int = 0
    outside: int = 0
    causal: bool = False
    dropout: float = 0.0
    bias: bool = False
    query_rel: bool = False
    rank: int = 0
    key_rel: bool = False
    value_conv: bool = False
    mask: bool = False
    packed: bool = False
    dtype: torch.dtype = torch.bfloat16
    per_head: bool = False
    batch: int = 8
    time: int = 4096

    def launches(self, architecture: int) -> Iterator[tuple]:
        """(kernel, arguments) of the forward and the backward pass; of equal kernels the first."""
        found: dict[str, tuple] = {}
        for launches in self.passes(architecture).values():
            for kernel, _, arguments in launches:
                found.setdefault(kernel.__name__, (kernel, arguments))
        yield from found.values()

    def passes(self, architecture: int) -> dict[str, list[tuple]]:
        """(kernel, grid, arguments) of the launches of each direction."""
        batch, time, H, D = 1 if self.packed else self.batch, self.time, self.heads, self.channels
        R, W = self.rank or D, self.left + self.right + 1

        def empty(*shape, given=True, dtype=self.dtype):
            return torch.empty(shape, dtype=dtype, device="meta") if given else None

        q, k, v = empty(batch, time, H, D), empty(batch, time, self.shared, D), empty(batch, time, self.shared, D)
        cu_seqlens = empty(9, given=self.packed, dtype=torch.int32)
        args = Attention(
            q, k, v, self.left, self.right, self.outside, self.causal, True, D**-0.5,
            1.0 if self.rank else D**-0.5, self.dropout, empty(1, dtype=torch.int64), empty(H, W, given=self.bias),
            empty(*((H,) if self.per_head else ()), R, W, given=self.query_rel),
            empty(batch, time, H, self.rank, given=self.rank > 0),
            empty(D, W, given=self.key_rel), empty(H, D, W, given=self.value_conv),
            empty(H, D, given=self.value_conv), empty(H, given=self.value_conv),
            empty(batch, time, given=self.mask, dtype=torch.bool), cu_seqlens, cu_seqlens,
        )  # fmt: skip
        call = attention_launch.Call(args, architecture)
        out, lse = torch.empty_like(q), empty(batch, H, time, dtype=torch.float32)
        results = {}
        for name in INPUTS.names:
            value = getattr(call, name)
            results[name] = empty(0) if value is None else empty(*value.shape)
        return {
            "fwd": list(attention_launch.forward_launches(call, out, lse)),
            "bwd": list(attention_launch.gradient_launches(call, out, None, out, lse, results)),
        }


ATTENTION_VARIANTS = (
    AttentionVariant("attention D=64", left=8, right=8, bias=True, query_rel=True),
    # What BERT with composite attention trains.
    AttentionVariant(
        "attention composite dropout mask D=64", left=8, right=8, bias=True, query_rel=True, value_conv=True,
        dropout=0.1, mask=True,
    ),
    AttentionVariant(
        "attention wide bias dropout mask float16 D=64", left=128, right=128, bias=True, dropout=0.1, mask=True,
        dtype=torch.float16,
    ),
    AttentionVariant("attention D=128", channels=128, left=8, right=8, bias=True, query_rel=True),
    AttentionVariant("attention causal without terms D=128", channels=128, causal=True),
    AttentionVariant(
        "attention packed causal D=128", channels=128, left=8, right=8, bias=True, causal=True, packed=True,
    ),
    AttentionVariant(
        "attention banded D=128", channels=128, heads=64, shared=8, left=1023, outside=1, causal=True, query_rel=True,
        rank=16,
    ),
)  # fmt: skip


def source(kernel, arguments: dict) -> tuple[ASTSource, dict]:
    """What the compiler gets for a launch, specialised as a launch would be: integers that are 1 become constants,
    divisibility by 16 is passed on, also for the fields of records."""
    rest = dict(arguments)
    options = {name: rest.pop(name) for name in ("num_warps", "num_stages", "maxnreg") if name in rest}
    signature, constants, attributes = {}, {}, {}

    def specialise(value, path: tuple[int, ...], varies: bool):
        """The type of the argument at a path of indices. That of a record is one of types; its fields are specialised
        whatever ``do_not_specialize`` says."""
        if isinstance(value, tuple):
            return type(value)(*(specialise(field, (*path, n), False) for n, field in enumerate(value)))
        if isinstance(value, torch.Tensor):
            attributes[path] = [["tt.divisibility", 16]]
            return f"*{_TYPES[value.dtype]}"
        if value == 1 and not varies:
            constants[path] = value
            return "constexpr"
        if value % 16 == 0 and not varies:
            attributes[path] = [["tt.divisibility", 16]]
        return "i32" if -(2**31) <= value < 2**31 else "i64"

    for index, parameter in enumerate(kernel.params):
        value = rest.pop(parameter.name)
        if parameter.is_constexpr:
            signature[parameter.name] = "constexpr"
            constants[(index,)] = value
        else:
            signature[parameter.name] = specialise(value, (index,), parameter.do_not_specialize)
    if rest:
        raise TypeError(f"{kernel.__name__}: no parameters for {sorted(rest)}")
    return ASTSource(kernel, signature, constants, attributes), options


def compiled(kernel, arguments: dict, architecture: int) -> tuple:
    """Of one launch: what the compiler made, and what the tools write of its usage and its instructions."""
    what, options = source(kernel, arguments)
    made = triton.compile(what, target=GPUTarget("cuda", architecture, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage = run_tool("cuobjdump", "--dump-resource-usage", file.name)
        return made, usage, run_tool("cuobjdump", "-sass", file.name)


def measure(variant: str, kernel, arguments: dict, architecture: int) -> Resources:
    """Compile one launch for one architecture and read its machine code."""
    made, usage, code = compiled(kernel, arguments, architecture)
    unit = next((name for name in MATRIX_UNITS.values() if name in made.asm["ptx"]), "")
    figures = read_usage(usage) | read_code(code) | {"shared": made.metadata.shared, "unit": unit}
    loops = ()
    if kernel.__name__ in (*RULES.streaming, *RULES.vectors):
        names = executed(kernel.__name__, arguments, code)
        classes = {name: classes_of(names)[name] for name in COUNTED}
        whole = sum(classes.values())
        body = len(instructions_of(code))
        loops = (LoopCost(kernel.__name__, variant, "whole kernel", "thread", whole, classes, body=body),)
    return Resources(variant, kernel.__name__, str(architecture), **figures, loops=loops)


def executed(kernel: str, arguments: dict, code: str) -> Counter:
    """Instructions of a thread of a convolution kernel by name. A loop with matrix products, stores or sums for filters
    walks the tiles of a program; one without, next to matrix products, serves what is not finite; others walk taps."""
    if kernel in ("reduce_filters", "reduce_bias"):
        summed = arguments["groups"] * arguments["pieces"] if kernel == "reduce_filters" else arguments["rows"]
        return ControlFlow(code).whole(lambda names: -(-summed // arguments["BR"]))
    taps = arguments["FILTER"].K
    tiles = arguments.get("TILES", 1)
    if "groups" in arguments:
        tiles = arguments["t_blocks"] / arguments["groups"]

    def passes(names: Counter) -> float:
        names = by_base(names)
        if kernel == "grad_heads":  # walks neither tiles nor taps, but looks for sequences
            return arguments["sequences"].steps
        if "TAPS" not in arguments and not kernel.endswith("_band"):
            return taps
        if kernel.endswith("_band"):
            return tiles if any(names[kind] for kind in MATRIX) else 0
        if names["STG"] or (kernel == "grad_tile" and arguments["NEED"].FILTER):
            return tiles
        if names["FFMA"] > arguments["TAPS"]:
            return taps // arguments["TAPS"]
        return taps * (1 if arguments["UNIFORM"] else arguments["V"]) / max(names["LDG"], 1)

    return ControlFlow(code).whole(passes)


def measure_all(variant: Variant | AttentionVariant | StepVariant, architectures=ARCHITECTURES) -> list[Resources]:
    """Every kernel of a variant for every architecture; of several launches of a kernel what the most demanding takes,
    and the instructions of each."""
    found: dict[str, Resources] = {}
    for architecture in architectures:
        for kernel, arguments in variant.launches(architecture):
            one = measure(variant.name, kernel, arguments, architecture)
            found[one.key] = together(found[one.key], one) if one.key in found else one
    return list(found.values())


def together(first: Resources, other: Resources) -> Resources:
    # One that leaves nothing but sums stores no tensor.
    most = ("registers", "spills", "shared", "wide_stores", "vector_stores")
    largest = {name: max(getattr(first, name), getattr(other, name)) for name in most}
    least = {name: min(getattr(first, name), getattr(other, name)) for name in ("wide_loads", "vector_loads", "matrix")}
    renamed = (replace(loop, case=f"{loop.case}, launch {len(first.loops) + 1}") for loop in other.loops)
    return replace(first, **largest, **least, loops=(*first.loops, *renamed))


def missing() -> str | None:
    """Why the kernels cannot be compiled here; None if they can."""
    return None if tools() else "cuobjdump is neither in a CUDA toolkit nor in this Triton"


def parts(architectures: tuple[str, ...] = (), only: str | None = None) -> dict[str, Callable[[], list[Resources]]]:
    """By name, the steps that compile every variant; for these architectures if any are given, and with `only` in the
    variant's name."""
    chosen = tuple(a for a in ARCHITECTURES if not architectures or str(a) in architectures)
    wanted = [v for v in (*VARIANTS, *ATTENTION_VARIANTS, *STEP_VARIANTS) if not only or only in v.name]
    return {v.name: partial(measure_all, v, chosen) for v in wanted if chosen}
