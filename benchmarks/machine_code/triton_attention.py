"""The estimate of Triton's attention: how long the units of an H100 are busy with its kernels at the shapes of the CUDA
kernels' estimate, counted in code compiled for it.

Loops count as often as programs pass them, by the function with which a program finds its tiles. A program asks once
for each byte of its own rows and of the tiles of rows that it meets.
"""

from collections import Counter
from dataclasses import dataclass
from math import prod
from types import FunctionType, SimpleNamespace

from benchmarks.machine_code.control_flow import ControlFlow
from benchmarks.machine_code.estimate import PRODUCT, of_a_copy, of_products, row
from benchmarks.machine_code.instructions import Unreadable, by_base
from benchmarks.machine_code.triton import AttentionVariant, compiled
from benchmarks.machine_code.triton_estimate import ARCHITECTURE, of_launches, products
from convkernels.backends.triton.attention import tiles
from convkernels.backends.triton.host import ceil_div

__all__ = ["CASES", "rows"]

POSITIONS, CHANNELS = 16384, 2048
# Products of a tile of pairs with tiles of channels: q k^T and p v; backward also those of gradients.
PRODUCTS = {"attention_forward": 2, "grad_queries": 3, "grad_keys": 4}


def _cases() -> dict[str, AttentionVariant]:
    terms = {"left": 8, "right": 8, "bias": True, "query_rel": True, "per_head": True}
    found = {}
    for time in (512, 4096):
        for channels in (64, 128):
            shape = {"channels": channels, "heads": CHANNELS // channels, "shared": CHANNELS // channels}
            shape |= {"batch": POSITIONS // time, "time": time}
            name = f"attention-d{channels}-t{time}"
            found[f"{name}-plain"] = shape
            found[name] = shape | terms
    found["banded"] = {
        "channels": 128, "heads": 64, "shared": 8, "batch": 1, "time": 8192, "left": 1023, "outside": 1, "causal": True,
        "query_rel": True, "rank": 16,
    }  # fmt: skip
    return {name: AttentionVariant(name, **fields) for name, fields in found.items()}


CASES = _cases()


def _on_numbers(function, **known):
    """A device function whose arguments and results are whole numbers, for Python. known: what it calls."""
    language = SimpleNamespace(maximum=max, minimum=min, where=lambda c, a, b: a if c else b, cdiv=ceil_div)
    return FunctionType(function.fn.__code__, {**function.fn.__globals__, "tl": language, **known})


_clamp = _on_numbers(tiles.clamp_tile)
_ranges = _on_numbers(tiles.tile_ranges, clamp_tile=_clamp, MASK=tiles.MASK.value)
_near, _far = _on_numbers(tiles.near_tiles), _on_numbers(tiles.far_tiles)


@dataclass(frozen=True)
class Walk:
    """How the programs of a launch walk: slots: tiles that they keep, of a head; own: rows of these, others: rows that
    are met; near, far: tiles of pairs that a slot has on the average."""

    slots: int
    own: int
    others: int
    near: float
    far: float


def walk(kernel: str, arguments: dict) -> Walk:
    flags, tile, keys = arguments["FLAGS"], arguments["TILE"], kernel == "grad_keys"
    lengths, sizes, window = ("T", "S"), (tile.BM, tile.BN), (arguments["left"], arguments["right"])
    if keys:  # seen from them the window is mirrored
        lengths, sizes, window = lengths[::-1], sizes[::-1], window[::-1]
    own, others = (arguments[name] for name in lengths)
    causal = (-1 if keys else 1) if flags.CAUSAL else 0
    relative = flags.HAS_BIAS or flags.HAS_QUERY_REL or flags.HAS_KEY_REL
    near = far = 0
    for slot in range(arguments["slots"]):
        owner = tiles.Owner(slot * sizes[0], 0, own, 0, others)
        ranges = _ranges(owner, others - own, *window, causal, flags.OUTSIDE, relative, *sizes, tile.NEAR)
        near += _near(ranges)
        far += _far(ranges, sizes[1] // tile.NEAR)
    return Walk(arguments["slots"], sizes[0], sizes[1], near / arguments["slots"], far / arguments["slots"])


def executed(kernel: str, arguments: dict, code: str) -> Counter:
    """Instructions of a thread by name. Of the loops with products of matrices that hold no other such loop one walks
    near tiles and one far ones, the pass over queries first these."""
    flow = ControlFlow(code)
    if kernel not in PRODUCTS:  # sums over rows; the other kernel has no loop
        return flow.whole(lambda names: ceil_div(arguments["rows"], arguments["BR"]))
    multiplied = {head: sum(products(flow.names(body))) for head, body in flow.loops.items()}
    inner = [
        multiplied[head]
        for head, body in flow.loops.items()
        if multiplied[head] and not any(multiplied[other] for other in body & flow.loops.keys() - {head})
    ]
    if len(set(inner)) != 2:
        raise Unreadable(f"{kernel}: {len(inner)} loops with products of matrices, expected two that differ in them")
    near, far = inner[::-1] if kernel == "grad_queries" else inner
    way = walk(kernel, arguments)

    def passes(names: Counter) -> float:
        found = sum(products(names))
        if found in (0, near, far):
            return {0: 1, near: way.near, far: way.far}[found]
        if kernel == "grad_keys" and not by_base(names)["STG"]:
            return arguments["sharing"]
        return way.slots / arguments["groups"]

    return flow.whole(passes)


def needed(kernel: str, arguments: dict) -> float:
    """Products of the tiles of pairs that a head's programs meet, as often as they are needed: without those of tables,
    and where two warps make the same ones, once."""
    if kernel not in PRODUCTS:
        return 0.0
    way, tile = walk(kernel, arguments), arguments["TILE"]
    met = way.near * tile.NEAR + way.far * way.others
    return PRODUCTS[kernel] * arguments["FLAGS"].DP * way.slots * way.own * met / PRODUCT


def traffic(variant: AttentionVariant, kernel: str, arguments: dict) -> tuple[float, float]:
    """Bytes of every input read and every output written once, and those that the programs of a launch ask for."""
    H, G, B, T, number = variant.heads, variant.shared, variant.batch, variant.time, variant.dtype.itemsize
    rows, rank = variant.channels * number, variant.rank * number
    if kernel == "sum_partials":
        once = 4 * arguments["partials"].numel() + number * arguments["result"].numel()
        return once, once
    constants = 4 * arguments["constants"].shape[0] if "constants" in arguments else 0
    if kernel == "prepare_rows":
        table = (rank or rows) if arguments["EDGES"] else 0
        once = B * H * T * (2 * rows + table + 4 + constants)
        return once, once
    way = walk(kernel, arguments)
    met = way.near * arguments["TILE"].NEAR + way.far * way.others  # rows, by a slot
    sums = 0
    if kernel == "grad_keys":
        once = B * T * (4 * rows * G + (2 * rows + rank + 8) * H)
        moved = B * T * 4 * rows * G + B * H * way.slots * met * (2 * rows + rank + 8)
        return once, moved
    if kernel == "grad_queries":
        own = 3 * rows + 2 * rank + constants
        wanted = {"query_sums": arguments["NEED"].TABLE, "bias_sums": arguments["NEED"].BIAS}
        sums = sum(4 * arguments[name].numel() for name, needed in wanted.items() if needed)
    else:
        own = 2 * rows + rank + 4
    once = B * T * (own * H + 2 * rows * G) + sums
    # Sums are read and written again for each tile of queries.
    tables = 2 * sums * way.slots / arguments.get("groups", 1)
    return once, B * T * own * H + B * H * way.slots * met * 2 * rows + tables


def rows(only: str = "") -> list[tuple[str, ...]]:
    """The table's rows, by kernel, for cases with `only` in their names."""
    found = []
    for name, variant in CASES.items():
        for direction, launches in variant.passes(ARCHITECTURE).items() if only in name else ():
            for kernel in dict.fromkeys(kernel for kernel, *_ in launches):
                least, multiplied, counted = 0.0, 0.0, []
                for _, grid, arguments in (one for one in launches if one[0] is kernel):
                    _, _, code = compiled(kernel, arguments, ARCHITECTURE)
                    once, moved = traffic(variant, kernel.__name__, arguments)
                    names = executed(kernel.__name__, arguments, code)
                    least += once
                    multiplied += variant.batch * variant.heads * needed(kernel.__name__, arguments)
                    counted.append((moved, names, prod(grid) * arguments["num_warps"]))
                e, moved = of_launches(least, counted)
                reached = of_products(multiplied, e.bound()[1]) if multiplied else of_a_copy(least, e.bound()[1])
                found.append(row(f"{name}-{direction}", kernel.__name__, e, moved, least, reached))
    return found
