"""Reads what each kernel of the CUDA library costs, for all the architectures it was compiled for, without a GPU."""

import re
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.machine_code.control_flow import ControlFlow
from benchmarks.machine_code.instructions import COUNTED, Unreadable
from benchmarks.machine_code.loops import MAIN_LOOPS, exists
from benchmarks.machine_code.rules import (
    LoopCost,
    Resources,
    Rules,
    read_code,
    read_usage,
    run_tool,
    short_name,
    tools,
)
from convkernels.backends import library

LIBRARY = library.path_of("cuda")
# By kernel, without its template arguments: the families that were written to move memory, and to use matrix units.
ATTENTION = tuple(
    f"attention_{of}{by}" for of in ("forward", "backward_queries", "backward_keys") for by in ("", "_warpgroups")
)
DIRECTIONS = ("forward", "forward_finished", "backward")
BANDED = (*(f"band_{d}" for d in DIRECTIONS), *ATTENTION)
STREAMING = (*(f"{f}_{d}" for f in ("stream", "time", "rows") for d in DIRECTIONS), *BANDED)


def compiler_version() -> str:
    """The version of nvcc that compiled the library, as far as the information module says."""
    try:
        from convkernels._C import compilers
    except ImportError:
        return "unknown"
    return compilers.get("cuda", "unknown").split()[-1]


def missing() -> str | None:
    """Why the kernels cannot be read here; None if they can."""
    if tools() is None:
        return "cuobjdump is neither in a CUDA toolkit nor in an installed Triton"
    return library.missing("cuda")


RULES = Rules(
    Path(__file__).with_name("nvcc.txt"),
    "nvcc",
    compiler_version(),
    streaming=STREAMING,
    banded=BANDED,
    described=frozenset((loop.kernel, loop.variant) for loop in MAIN_LOOPS),
)


def _kernels(text: str, marker: str) -> dict[tuple[str, str], str]:
    """What cuobjdump says of each kernel, by (mangled name, architecture)."""
    found = {}
    for part in re.split(r"\n(?=Fatbin elf code:)", text):
        architecture = re.search(r"^arch = sm_(\w+)$", part, re.MULTILINE)
        for block in re.split(marker, part)[1:]:
            name, _, rest = block.partition("\n")
            found[name.strip(" :"), architecture.group(1)] = rest
    return found


def _short_names(mangled: set[str]) -> dict[str, tuple[str, str]]:
    """(kernel, template arguments) by mangled name, both without namespaces."""
    names = "\n".join(mangled)
    plain = subprocess.run(["c++filt"], input=names, capture_output=True, text=True, check=True).stdout.splitlines()
    return dict(zip(mangled, map(short_name, plain), strict=True))


def _main_loops(kernel: str, variant: str, code: str) -> tuple[LoopCost, ...]:
    """The cost of the main loops that loops.py describes of this kernel."""
    loops = [loop for loop in MAIN_LOOPS if (loop.kernel, loop.variant) == (kernel, variant)]
    if not loops:
        return ()
    flow, costs = None, []
    for loop in loops:
        try:
            flow = flow or ControlFlow(code)
            one = flow.cheapest_pass(loop.work)
            classes, body, fault = one.classes, flow.body_length(one), ""
        except Unreadable as error:
            classes, body, fault = {}, 0, f"{error}: loops.py no longer describes this kernel"
        shares = {name: classes.get(name, 0) / loop.makes for name in COUNTED}
        total = sum(shares.values())
        costs.append(LoopCost(kernel, variant, loop.case, loop.per, total, shares, fault, body))
    return tuple(costs)


def _read(architecture: str, kernels: dict[str, tuple], only: list[str]) -> list[Resources]:
    """The kernels of one architecture, by mangled name with their short names and what is said of their usage."""
    code = run_tool("cuobjdump", "-sass", "-arch", f"sm_{architecture}", *only, LIBRARY)
    results = []
    for (mangled, _), instructions in _kernels(code, r"\n\t\tFunction ").items():
        if mangled in kernels:
            (kernel, variant), usage = kernels[mangled]
            figures = read_usage(usage) | read_code(instructions)
            loops = _main_loops(kernel, variant, instructions)
            results.append(Resources(variant, kernel, architecture, **figures, loops=loops))
    return results


def _parts(wanted: Callable[[str, str, str], bool], all_kernels: bool) -> dict[str, Callable[[], list[Resources]]]:
    """By architecture, what reads the kernels that are wanted(kernel, variant, architecture). Where most are it is
    faster to read all."""
    usage = _kernels(run_tool("cuobjdump", "--dump-resource-usage", LIBRARY), r"\n Function ")
    names = _short_names({mangled for mangled, _ in usage})
    found: dict[str, dict[str, tuple]] = {}
    for (mangled, architecture), said in usage.items():
        if exists(*names[mangled], architecture) and wanted(*names[mangled], architecture):
            found.setdefault(architecture, {})[mangled] = names[mangled], said
    return {
        f"sm_{name}": partial(_read, name, found[name], [] if all_kernels else ["-fun", ",".join(found[name])])
        for name in sorted(found, key=lambda name: int(name.rstrip("af")))
    }


def parts(architectures: tuple[str, ...] = (), only: str | None = None) -> dict[str, Callable[[], list[Resources]]]:
    """By name, the steps that measure every kernel of the library; of these architectures if any are given, and with
    `only` in its key."""

    def wanted(kernel: str, variant: str, architecture: str) -> bool:
        key = f"{variant} / {kernel} / sm_{architecture}"
        return (not architectures or architecture.rstrip("af") in architectures) and (not only or only in key)

    return _parts(wanted, not only)


def main_loops(architecture: str = "90a") -> list[LoopCost]:
    """What the main loops of loops.py cost in the code for one architecture, in the order they have there."""
    described = {(loop.kernel, loop.variant) for loop in MAIN_LOOPS}
    steps = _parts(lambda kernel, variant, code: code == architecture and (kernel, variant) in described, False)
    results = [result for step in steps.values() for result in step()]
    costs = {(cost.kernel, cost.variant, cost.case): cost for result in results for cost in result.loops}
    found = [costs.get((loop.kernel, loop.variant, loop.case)) for loop in MAIN_LOOPS]
    for loop, cost in zip(MAIN_LOOPS, found, strict=True):
        if cost is None or cost.fault:
            why = cost.fault if cost else f"the library has no such kernel for sm_{architecture}"
            raise Unreadable(f"{loop.variant} / {loop.kernel}, {loop.case}: {why}")
    return found
