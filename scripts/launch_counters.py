"""Counts what the CUDA kernels move, simulated on the CPU, and holds it to a budget.

    python scripts/launch_counters.py [--only NAME]              # table, and comparison with the budget
    python scripts/launch_counters.py --lines [--only NAME]      # which lines have conflicts or touch too much
    python scripts/launch_counters.py --update                   # the counts of now are the budget: prints what rises
    python scripts/launch_counters.py --estimate                 # what an H100 would take at least
    python scripts/launch_counters.py --estimate --backend triton   # the same of Triton's kernels, compiled here

needs the library of `make counted-build`. Problems are small; the estimate scales their counts to the shapes of the
streaming and attention suites, and reads instructions from the library for GPUs, if there is one.
Exit status 1 if a count is above its budget, a kernel has none, or one of the budget is no longer launched.
"""

import argparse
import itertools
import os
import re
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from operator import itemgetter
from pathlib import Path

if __name__ == "__main__":
    os.environ |= {"CONVKERNELS_SIMT": "1", "CONVKERNELS_SIMT_COUNTED": "1"}
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import kernel_cases
import torch

from benchmarks.machine_code import nvcc
from benchmarks.machine_code.budgets import format_counts, parse_counts
from benchmarks.machine_code.counters import GLOBAL, SECTOR, SHARED, Launch, counted, source_lines
from benchmarks.machine_code.estimate import COLUMNS as ESTIMATE_COLUMNS
from benchmarks.machine_code.estimate import PROCESSORS, Estimate, of_a_copy, of_counts, of_products, ratio
from benchmarks.machine_code.estimate import row as estimate_row
from benchmarks.machine_code.loops import BEGINNING, NEAR
from benchmarks.machine_code.rules import LoopCost, raised
from benchmarks.machine_code.tiles import backward_passes, near_parts
from benchmarks.suites import attention, streaming
from convkernels.cli.console import markdown_table

BUDGET = Path(__file__).resolve().parents[1] / "tests" / "launch_budget.txt"
# What a budget holds: totals of a launch, of which less is better.
HELD: dict[str, Callable[[Launch], int]] = {
    "bytes": lambda launch: launch.moved,
    "conflicts": lambda launch: launch.conflicts,
} | {
    # Each kind by itself: a copy that becomes a load and a store asks for as much in all.
    name.replace("_", " "): itemgetter(name)
    for name in (
        *(f"{access}_requests" for access in GLOBAL), *(f"{access}_wavefronts" for access in SHARED),
        "barriers", "warp_barriers", "shuffles", "votes", "matrix_products", "warpgroup_products",
    )
}  # fmt: skip
# Margins: another compiler may keep a number in a register that this one loads twice.
SLACK = 1.01
DIRECTIONS = {"fwd": "forward", "bwd": "backward"}
# Of a window for which the forward pass of warpgroups makes one strip per tile of queries.
MOST_COLUMNS = 48


@dataclass(frozen=True)
class Case:
    """make(settings, device) gives the call. loop: of a convolution, the case of its main loops in loops.py. window,
    causal: of attention, the columns to the left and right, if it has relative terms."""

    make: Callable
    small: object
    large: object
    loop: str = ""
    window: tuple[int, int] | None = None
    causal: bool = False

    @property
    def is_attention(self) -> bool:
        return isinstance(self.small, attention.Settings)

    def outputs(self, settings) -> int:
        if self.is_attention:
            return settings.batch * settings.heads * settings.lengths[0] * settings.head_size
        return settings.batch * settings.length * settings.channels

    def twice(self):
        """The small problem with twice as many positions."""
        if self.is_attention:
            return replace(self.small, lengths=(2 * self.small.lengths[0],))
        return replace(self.small, length=2 * self.small.length)

    def passes(self, loop: LoopCost) -> float:
        """How often the warps of the large problem go through a main loop."""
        if loop.per != "tile":
            return self.outputs(self.large) / 32 if loop.case == self.loop else 0.0
        heads, length = self.large.batch * self.large.heads, self.large.lengths[0]
        if loop.kernel == "attention_forward_warpgroups":
            return heads * self._passes_of_warpgroups(length).get(loop.case, 0.0)
        if loop.kernel.endswith("_warpgroups"):
            others = int(re.findall(r"\d+", loop.case)[1])
            by_keys = "keys" in loop.kernel
            return heads * backward_passes(by_keys, others, length, self.window, self.causal).get(loop.case, 0.0)
        rows, columns = map(int, re.findall(r"\d+", loop.case))
        return heads * length**2 / (rows * columns)

    def _passes_of_warpgroups(self, length: int) -> dict[str, float]:
        tiles = near_parts(length, 16, 128, 128, self.window, self.causal)
        near = {parts: count for parts, count in tiles.items() if parts > 0}
        strips = self.window is not None and sum(self.window) + 1 > MOST_COLUMNS
        # What a tile of 2 or 3 near parts takes lies between those of 1 and 4.
        return {
            "16 x 128 pairs": tiles[0],
            NEAR[strips].format(1): sum(count * (4 - parts) / 3 for parts, count in near.items()),
            NEAR[strips].format(4): sum(count * (parts - 1) / 3 for parts, count in near.items()),
            BEGINNING[self.window is not None and not strips]: length / 16,
        }


def _cases() -> dict[str, Case]:
    cases = {}
    large = streaming.Settings(backend="cuda", compiled=False)
    # Several blocks of channels and of rows; of the latter few enough that each walks far, as in large problems.
    small = replace(large, batch=2, length=512, channels=256, heads=4)
    float32 = {"dtype": torch.float32}
    for short, direction in DIRECTIONS.items():
        for name, op, taps, options, changes in (
            ("stream-k3", streaming.LIGHTWEIGHT, 3, {}, {}),
            ("stream-k7", streaming.LIGHTWEIGHT, 7, {}, {}),
            ("stream-k7-float32", streaming.LIGHTWEIGHT, 7, {}, float32),
            ("band-k15", streaming.LIGHTWEIGHT, 15, {}, {}),
            ("band-k31", streaming.LIGHTWEIGHT, 31, {}, {}),
            ("gate-k7", streaming.LIGHTWEIGHT, 7, {"gate": True}, {}),
            ("gate-k31", streaming.LIGHTWEIGHT, 31, {"gate": True}, {}),
            ("dynamic-k7", streaming.DYNAMIC, 7, {}, {}),
            ("dynamic-k31", streaming.DYNAMIC, 31, {}, {}),
            ("rows-k7-float32", streaming.DYNAMIC, 7, {}, float32),
        ):
            make = kernel_cases.convolution(op, taps, direction, **options)
            loop = f"{taps} taps{', gate + mask' if options else ''}"
            cases[f"{name}-{short}"] = Case(make, replace(small, **changes), replace(large, **changes), loop)
        for name, changes in (("time-k7", {}), ("time-k7-float32", float32)):
            make = kernel_cases.time_layout(direction)
            cases[f"{name}-{short}"] = Case(make, replace(small, **changes), replace(large, **changes), "7 taps")
        for name, form, size in (
            ("attention-d64-plain", attention.PLAIN, 64),
            ("attention-d64", attention.COMPOSITE, 64),
            ("attention-d128", attention.COMPOSITE, 128),
        ):
            shape = attention.Settings(lengths=(2048,), batch=8, heads=12, head_size=size, backend="cuda")
            # More keys than are kept in shared memory all at once.
            few = replace(shape, lengths=(384,), batch=1, heads=2)
            window = None if form == attention.PLAIN else (shape.window, shape.window)
            cases[f"{name}-{short}"] = Case(kernel_cases.attend(form, direction), few, shape, window=window)
    rows = replace(large, batch=64, length=1)
    for name, op, taps, reorder in (
        ("step-k7", streaming.LIGHTWEIGHT, 7, False),
        ("step-k31-reorder", streaming.LIGHTWEIGHT, 31, True),
        ("dynamic-step-k7", streaming.DYNAMIC, 7, False),
        ("dynamic-step-k7-reorder", streaming.DYNAMIC, 7, True),
    ):
        cases[name] = Case(kernel_cases.decode(op, taps, reorder), rows, rows)
    for name, form in (
        ("serve-k4", (4, 1, True)),
        ("serve-k4-channels", (4, 1, False)),
        ("serve-k4-accepted", (4, 4, True)),
        ("serve-k4-packed", (4, 200, False, True)),
    ):
        cases[name] = Case(kernel_cases.serve(*form), rows, rows)
    return cases


def _estimated() -> dict[str, Case]:
    """Attention over 16384 positions of 2048 channels, and the banded workload: not in the budget."""
    cases = {}
    for (short, direction), length, (name, form), size in itertools.product(
        DIRECTIONS.items(), (512, 4096), (("-plain", attention.PLAIN), ("", attention.COMPOSITE)), (64, 128)
    ):
        shape = attention.Settings((length,), batch=16384 // length, heads=2048 // size, head_size=size, backend="cuda")
        few = replace(shape, lengths=(384,), batch=1, heads=2)
        window = None if form == attention.PLAIN else (shape.window, shape.window)
        make = kernel_cases.attend(form, direction)
        cases[f"attention-d{size}-t{length}{name}-{short}"] = Case(make, few, shape, window=window)
    shape = attention.Settings((8192,), batch=1, heads=64, head_size=128, backend="cuda")
    # What pairs within the window cost does not grow with the square of the length: twice this one is the large one.
    few = replace(shape, lengths=(4096,), heads=1)
    for short, direction in DIRECTIONS.items():
        cases[f"banded-{short}"] = Case(kernel_cases.banded(direction), few, shape, window=(1023, 0), causal=True)
    return cases


CASES = _cases()
ESTIMATED = CASES | _estimated()


def measure(case: Case, settings: object | None = None) -> dict[str, Launch]:
    """The launches of a call by kernel; a second one of the same kernel has a number."""
    call = case.make(settings or case.small, "cpu")
    with counted() as launches:
        call()
    found: dict[str, Launch] = {}
    for launch in launches:
        same = sum(key.split("#")[0] == launch.kernel for key in found)
        found[f"{launch.kernel}#{same + 1}" if same else launch.kernel] = launch
    return found


def extrapolate(case: Case) -> dict[str, Launch]:
    """What the kernels would count in the large problem, from the small one and one of twice the length. Convolutions
    do something once per block, of which a GPU has as many more as it has processors, the rest per position; attention
    per position and per pair of them. Of the different bytes that attention meets, tables are there once."""
    once, twice = measure(case), measure(case, case.twice())
    rows = case.outputs(case.large) / case.outputs(case.small)

    def grown(name: str, a: int, b: int) -> int:
        if not case.is_attention or name in ("bytes_read", "bytes_written"):
            return round((2 * a - b) * (1 if case.is_attention else PROCESSORS) + (b - a) * rows)
        pairs = (b - 2 * a) / 2
        return round((a - pairs) * rows + pairs * rows * case.large.lengths[0] / case.small.lengths[0])

    return {
        key: replace(launch, figures={name: grown(name, a, twice[key][name]) for name, a in launch.figures.items()})
        for key, launch in once.items()
        if launch.kernel in nvcc.STREAMING
    }


# Those of shared memory, shuffles and products are per 1000 outputs.
COLUMNS = ("case", "kernel", "bytes over least", "sectors per load", "per copy", "per store", "wavefronts", "conflicts",
           "shuffles", "matrix products", "barriers per block")  # fmt: skip


def row(name: str, key: str, launch: Launch) -> tuple[str, ...]:
    outputs = CASES[name].outputs(CASES[name].small)
    sectors = [ratio(launch[f"{access}_sectors"], launch[f"{access}_requests"]) for access in GLOBAL]
    products = launch["matrix_products"] + launch["warpgroup_products"]
    shared = (launch.wavefronts, launch.conflicts, launch["shuffles"], products)
    return (name, key, ratio(launch.moved, launch.least), *sectors, *(f"{1000 * n / outputs:.1f}" for n in shared),
            ratio(launch["barriers"], launch["blocks"]))  # fmt: skip


LINE_COLUMNS = ("case", "kernel", "line", "access", "requests", "bytes each", "sectors or wavefronts", "conflicts")


def lines(name: str, key: str, launch: Launch) -> list[tuple[str, ...]]:
    """Lines with bank conflicts, or whose sectors are half empty, if they make a hundredth of the kernel's."""
    where = source_lines(one["place"] for one in launch.instructions)
    sums: dict[tuple[str, str], Counter] = {}
    for one in launch.instructions:
        access = next(n for n in one if n.endswith("_requests")).removesuffix("_requests")
        figures = {n.removeprefix(f"{access}_"): value for n, value in one.items() if n != "place"}
        sums.setdefault((where[one["place"]], access), Counter()).update(figures)
    found = []
    for (line, access), n in sums.items():
        asked = n["sectors"] + n["wavefronts"]
        share = asked / (launch.moved / SECTOR if access in GLOBAL else launch.wavefronts)
        if share >= 0.01 and (n["conflicts"] or n["sectors"] * SECTOR >= 2 * n["bytes"]):
            each = (n["requests"], f"{n['bytes'] / n['requests']:.0f}", f"{asked / n['requests']:.2f}", n["conflicts"])
            found.append((name, key, line, access, *map(str, each)))
    return sorted(found, key=lambda cells: -int(cells[-1]))


def instructions(case: Case, launch: Launch, loops: list[LoopCost]) -> tuple[float, float, float] | None:
    """What warps execute at least, and how much of that is for the units of integers and of special functions, if
    there are main loops like this."""
    passes = [(case.passes(one), one) for one in loops if (one.kernel, one.variant) == (launch.kernel, launch.variant)]
    passes = [(times, loop) for times, loop in passes if times > 0]
    if not passes:
        return None
    alu, special = (sum(n * one.classes[kind] for n, one in passes) for kind in ("alu", "special"))
    return sum(times * loop.instructions for times, loop in passes), alu, special


def estimate(launch: Launch, executed: tuple[float, float, float] | None = None) -> Estimate:
    """executed: instructions of warps, all and those of the units of integers and of special functions."""
    # Loads are left out of what reaches the second cache: the first one may have them.
    cached = launch["copy_read_sectors"] + launch["store_sectors"]
    wavefronts = launch.wavefronts + launch["shuffles"]
    products = launch["matrix_products"], launch["warpgroup_products"]
    return of_counts(launch.least, cached, wavefronts, products, executed)


def reached(case: Case, launch: Launch, seconds: float) -> str:
    """The fraction of a copy; of attention, what its products of matrices make per second."""
    if not case.is_attention:
        return of_a_copy(launch.least, seconds)
    return of_products(launch["matrix_products"] + launch["warpgroup_products"], seconds)


def estimates(names: list[str]) -> str:
    rows = []
    loops = [] if nvcc.missing() else nvcc.main_loops()
    for name in names:
        case = ESTIMATED[name]
        for key, launch in extrapolate(case).items():
            e = estimate(launch, instructions(case, launch, loops))
            rows.append(estimate_row(name, key, e, launch.moved, launch.least, reached(case, launch, e.bound()[1])))
    return markdown_table(ESTIMATE_COLUMNS, rows)


def estimate_triton(only: str) -> int:
    """Needs Triton, but neither library; its kernels are compiled for compute capability 9.0."""
    from benchmarks.machine_code import triton_attention, triton_estimate

    if (reason := triton_estimate.missing()) is not None:
        print(f"triton: {reason}", file=sys.stderr)
        return 2
    rows = triton_estimate.rows(only) + triton_attention.rows(only)
    print(markdown_table(ESTIMATE_COLUMNS, rows))
    return 0


def held(results: dict[str, dict[str, Launch]]) -> dict[str, dict[str, dict[str, int]]]:
    return {
        name: {key: {what: count(launch) for what, count in HELD.items()} for key, launch in launches.items()}
        for name, launches in results.items()
    }


def violations(now: dict, budget: dict) -> list[str]:
    found = []
    for name, launches in now.items():
        gone = budget.get(name, {}).keys() - launches.keys()
        found += [f"{name} {key}: no longer launched, --update takes it out" for key in sorted(gone)]
        for key, figures in launches.items():
            allowed = budget.get(name, {}).get(key)
            if allowed is None:
                found.append(f"{name} {key}: no budget")
                continue
            found += [
                f"{name} {key}: {what} {value}, budget {allowed.get(what, 0)}"
                for what, value in figures.items()
                if value > allowed.get(what, 0) * SLACK
            ]
    return found


def improvements(now: dict, budget: dict) -> int:
    return sum(
        value < budget.get(name, {}).get(key, {}).get(what, 0)
        for name, launches in now.items()
        for key, figures in launches.items()
        for what, value in figures.items()
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--update", action="store_true", help="write the budget")
    parser.add_argument("--lines", action="store_true", help="print which lines have conflicts or touch too much")
    parser.add_argument("--estimate", action="store_true", help="print what an H100 would take at least")
    parser.add_argument("--backend", choices=("cuda", "triton"), default="cuda", help="whose kernels are estimated")
    parser.add_argument("--budget", type=Path, default=BUDGET)
    arguments = parser.parse_args()
    if arguments.backend == "triton":
        if not arguments.estimate:
            parser.error("--backend triton: expected with --estimate, its kernels are not simulated")
        return estimate_triton(arguments.only)
    cases = ESTIMATED if arguments.estimate else CASES
    names = [name for name in cases if arguments.only in name]
    if not names:
        parser.error(f"--only {arguments.only}: expected part of one of {', '.join(cases)}")
    if arguments.update and arguments.only:
        parser.error("--update: expected without --only, the budget is of all cases")
    if arguments.estimate:
        print(estimates(names))
        return 0
    results = {name: measure(CASES[name]) for name in names}
    launches = [(name, key, launch) for name, found in results.items() for key, launch in found.items()]
    if arguments.lines:
        print(markdown_table(LINE_COLUMNS, [line for one in launches for line in lines(*one)]))
        return 0
    rows = [row(*one) for one in launches]
    print(markdown_table(COLUMNS, rows))
    now = held(results)
    budget = parse_counts(arguments.budget.read_text()) if arguments.budget.exists() else {}
    if arguments.update:
        arguments.budget.write_text(format_counts(now))
        print(*raised(budget, now) or ["nothing goes up"], sep="\n")
        return 0
    found = violations(now, budget)
    for line in found:
        print(f"outside the budget: {line}")
    if better := improvements(now, budget):
        print(f"{better} counts are below the budget; --update lowers it")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
