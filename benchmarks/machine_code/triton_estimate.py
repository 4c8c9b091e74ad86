"""The estimate of Triton's convolutions: how long the units of an H100 are busy at the shape of the streaming suite,
counted in code compiled for it.

A program asks for each byte that its tile meets once: what comes again is taken to come from the first cache, rows
that belong to other programs' tiles are counted as bytes moved. Partial sums are written and read. Instructions are
those of the whole kernel, times its programs. Products are counted as far as instructions name their shapes.
"""

import re
from collections import Counter
from collections.abc import Iterable
from math import prod

import torch

from benchmarks.machine_code.counters import SECTOR
from benchmarks.machine_code.estimate import PRODUCT, Estimate, of_a_copy, of_counts, row
from benchmarks.machine_code.instructions import CLASS_OF, LEFT_IN_REGISTERS, NEVER, classes_of
from benchmarks.machine_code.triton import Variant, compiled, executed, missing

__all__ = ["CASES", "missing", "rows"]

CHANNELS, BATCH, TIME, ARCHITECTURE = 1024, 16, 4096, 90


def _cases() -> dict[str, Variant]:
    narrow = {8: "heads of 8", 4: "heads of 4"}
    found = {f"k{taps}": {"taps": taps} for taps in (3, 7, 15, 31)}
    found |= {f"k{taps}-float32": {"taps": taps, "dtype": torch.float32} for taps in (7, 31)}
    found |= {"k7-float16": {"taps": 7, "dtype": torch.float16}}
    found |= {f"gate-k{taps}": {"taps": taps, "gate": True, "mask": True} for taps in (7, 31)}
    found |= {f"dynamic-k{taps}": {"taps": taps, "dynamic": True} for taps in (7, 31)}
    found |= {"dynamic-k7-float32": {"taps": 7, "dynamic": True, "dtype": torch.float32}}
    for size in narrow:
        found[f"heads-of-{size}-k7"] = {"taps": 7, "head_channels": size}
        found[f"dynamic-heads-of-{size}-k7"] = {"taps": 7, "head_channels": size, "dynamic": True}
    found["depthwise-k4"] = {"taps": 4, "head_channels": 1, "softmax": False, "bias": True}
    found["depthwise-k31"] = {"taps": 31, "head_channels": 1, "softmax": False}
    found["time-k7"] = {"taps": 7, "time_last": True}
    return {
        name: Variant(name, batch=BATCH, heads=CHANNELS // fields.get("head_channels", 64), **fields)
        for name, fields in found.items()
    }


CASES = _cases()


def least(variant: Variant, direction: str) -> float:
    """Bytes of every input read and every output written once."""
    rho = variant.taps / variant.head_channels if variant.dynamic else 0
    times = 2 + variant.gate + rho if direction == "fwd" else 3 + 2 * variant.gate + 2 * rho
    return times * BATCH * TIME * CHANNELS * variant.dtype.itemsize


def moved(variant: Variant, kernel: str, arguments: dict) -> float:
    """Bytes that the programs of a launch ask for."""
    x = BATCH * TIME * CHANNELS * variant.dtype.itemsize
    w = x * variant.taps / variant.head_channels if variant.dynamic else 0
    if kernel.startswith("reduce"):
        return 2 * 4 * arguments["filters" if "filters" in arguments else "biases"].numel()
    if kernel == "filter_sums":
        return w
    if kernel == "grad_filter_rows":
        return (2 + variant.gate) * x + 2 * w
    halo = variant.taps - 1
    own = arguments["BT"] if "BT" in arguments else arguments["ROWS"] * arguments["BG"]
    if kernel == "grad_window":
        own -= halo
    side_by_side = arguments.get("TILES", 1)
    if kernel == "grad_band":
        side_by_side = -(-arguments["t_blocks"] // arguments["groups"])
    window = 1 + halo / (own * side_by_side)
    inputs = 1 + variant.gate
    if kernel in ("conv_tile", "conv_band"):
        width = arguments.get("BC") or arguments["BV"] * arguments["V"]
        return x * (inputs * window + 1) + w * max(1, variant.head_channels // width)
    need, outputs = arguments["NEED"], arguments["NEED"].X + arguments["NEED"].GATE
    if kernel == "grad_tile":
        alone = need.FILTER and not outputs  # as often as there are programs for other taps
        reads = x * (window + (inputs if need.FILTER or need.GATE else 0))
        return reads * (-(-variant.taps // arguments["TAPS"]) if alone else 1) + x * outputs
    if variant.dynamic:  # outputs that read a tile, and those of its own positions; inputs of these, filters of both
        return x * (window * (1 + inputs) + outputs) + w * (1 + window)
    return x * (window + inputs + outputs)


def products(names: Counter) -> tuple[float, float]:
    """Of 16 x 8 by 16 numbers, per warp: by mma.sync, and of warpgroups."""
    found = [0.0, 0.0]
    for name, count in names.items():
        if shape := re.match(r"HMMA\.(\d)(\d+)(\d\d)\b", name):
            found[0] += count * prod(map(int, (16, 8, shape[3]))) / PRODUCT
        elif shape := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", name):  # of four warps
            found[1] += count * prod(map(int, shape.groups())) / PRODUCT / 4
    return found[0], found[1]


def wavefronts(names: Counter) -> float:
    """How often a warp asks the banks of shared memory, without conflicts: 128 bytes at a time. Products of a warpgroup
    read b for all its four warps, and a where it is not in registers."""
    found = 0.0
    for name, count in names.items():
        base, *rest = name.split(".")
        if NEVER in rest:
            continue
        if shape := re.match(r"HGMMA\.64x(\d+)x", name):
            found += count * (int(shape[1]) / 16 + (0 if LEFT_IN_REGISTERS in rest else 4))
        elif base in ("LDSM", "STSM"):
            found += count * (int(rest[-1]) if rest[-1] in "24" else 1)
        elif CLASS_OF.get(base) == "shared" or base == "LDGSTS":
            found += count * (4 if "128" in rest else 2 if "64" in rest else 1)
    return found


def of_launches(least: float, launches: Iterable[tuple[float, Counter, float]]) -> tuple[Estimate, float]:
    """The estimate and the bytes moved of launches together. least: bytes of inputs and outputs, each once;
    launches: bytes moved, what a warp executes by name, and warps of each."""
    moved, asked, multiplied, issued = 0.0, 0.0, [0.0, 0.0], [0.0, 0.0, 0.0]
    for bytes_moved, names, warps in launches:
        classes = classes_of(names)
        moved += bytes_moved
        asked += wavefronts(names) * warps
        multiplied = [n + more * warps for n, more in zip(multiplied, products(names), strict=True)]
        more = classes.total(), classes["alu"], classes["special"]
        issued = [n + of * warps for n, of in zip(issued, more, strict=True)]
    return of_counts(least, moved / SECTOR, asked, tuple(multiplied), tuple(issued)), moved


def rows(only: str = "") -> list[tuple[str, ...]]:
    """The table's rows: all launches of a direction of a case together, for cases with `only` in their names."""
    found = []
    for name, variant in CASES.items():
        for direction, launches in variant.passes(ARCHITECTURE).items() if only in name else ():
            counted = []
            for kernel, grid, arguments in launches:
                _, _, code = compiled(kernel, arguments, ARCHITECTURE)
                names, warps = executed(kernel.__name__, arguments, code), prod(grid) * arguments["num_warps"]
                counted.append((moved(variant, kernel.__name__, arguments), names, warps))
            bytes_met = least(variant, direction)
            e, bytes_moved = of_launches(bytes_met, counted)
            kernels = ", ".join(dict.fromkeys(kernel.__name__ for kernel, *_ in launches))
            reached = of_a_copy(bytes_met, e.bound()[1])
            found.append(row(f"{name}-{direction}", kernels, e, bytes_moved, bytes_met, reached))
    return found
