"""The estimate of Triton's convolutions: how long the units of an H100 are busy at the shape of the streaming suite,
counted in code compiled for it.

A program asks for each byte that its tile meets once: what comes again is taken to come from the first cache, rows
that belong to other programs' tiles are counted as bytes moved. Partial sums are written and read. Instructions are
those of the whole kernel, times its programs. Products are counted as far as instructions name their shapes.
"""

import re
from collections import Counter
from math import prod

import torch

from benchmarks.machine_code.counters import SECTOR
from benchmarks.machine_code.estimate import PRODUCT, of_a_copy, of_counts, row
from benchmarks.machine_code.instructions import classes_of
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


def rows(only: str = "") -> list[tuple[str, ...]]:
    """The table's rows: all launches of a direction of a case together, for cases with `only` in their names."""
    found = []
    for name, variant in CASES.items():
        for direction, launches in variant.passes(ARCHITECTURE).items() if only in name else ():
            bytes_moved, wavefronts, multiplied, issued = 0.0, 0.0, [0.0, 0.0], [0.0, 0.0, 0.0]
            for kernel, grid, arguments in launches:
                _, _, code = compiled(kernel, arguments, ARCHITECTURE)
                names, warps = executed(kernel.__name__, arguments, code), prod(grid) * arguments["num_warps"]
                classes = classes_of(names)
                bytes_moved += moved(variant, kernel.__name__, arguments)
                wavefronts += classes["shared"] * warps
                multiplied = [n + more * warps for n, more in zip(multiplied, products(names), strict=True)]
                more = classes.total(), classes["alu"], classes["special"]
                issued = [n + of * warps for n, of in zip(issued, more, strict=True)]
            e = of_counts(least(variant, direction), bytes_moved / SECTOR, wavefronts, tuple(multiplied), tuple(issued))
            kernels = ", ".join(dict.fromkeys(kernel.__name__ for kernel, *_ in launches))
            bytes_met = least(variant, direction)
            reached = of_a_copy(bytes_met, e.bound()[1])
            found.append(row(f"{name}-{direction}", kernels, e, bytes_moved, bytes_met, reached))
    return found
