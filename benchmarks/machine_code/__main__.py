"""Registers, stack, shared memory and instructions of the kernels for GPUs, held to their rules and budgets; no GPU is
needed: python -m benchmarks.machine_code [--backend cuda|triton] [--only NAME] [--update-budget]

Reads the kernels of the CUDA library for every architecture it holds (75 s), and compiles Triton's here (minutes).
Exit status 1 where a kernel breaks a rule or exceeds its budget, 2 where nothing could be read.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from types import ModuleType

from benchmarks.machine_code.rules import Resources, Rules
from convkernels.cli.console import Mistake, guarded, numbers, progress, say, table

MODULES = {"triton": "benchmarks.machine_code.triton", "cuda": "benchmarks.machine_code.nvcc"}
PROGRAM = "benchmarks.machine_code"


def backend(name: str) -> ModuleType | str:
    """The module that measures a backend's kernels, or why none can here."""
    try:
        module = importlib.import_module(MODULES[name])
    except ImportError as error:
        return f"needs {error.name}: pip install {error.name}"
    return module.missing() or module


def measure(module: ModuleType, arguments: argparse.Namespace) -> list[Resources]:
    steps = module.parts(tuple(map(str, arguments.architectures or ())), arguments.only)
    results = []
    if steps:
        with progress(len(steps)) as step:
            for name, work in steps.items():
                step(name, 0)
                results += work()
                step(name, 1)
    return sorted(results, key=lambda r: (r.kernel, r.variant))


def run(arguments: argparse.Namespace) -> int:
    if arguments.update_budget and (arguments.only or arguments.architectures):
        raise Mistake("--update-budget replaces the whole budget: leave out --only and --architectures")
    if arguments.update_budget and not arguments.backend:
        raise Mistake("--update-budget writes what one backend's kernels take: add --backend")
    modules = {name: backend(name) for name in ([arguments.backend] if arguments.backend else MODULES)}
    usable = {name: module for name, module in modules.items() if not isinstance(module, str)}
    for name in modules.keys() - usable.keys():
        print(f"{PROGRAM}: {name}: {modules[name]}", file=sys.stderr)
    if not usable:
        return 2
    found = {name: results for name, module in usable.items() if (results := measure(module, arguments))}
    if not found:
        chosen = [f"--only {arguments.only}"] if arguments.only else []
        chosen += [f"--architectures {','.join(map(str, arguments.architectures))}"] if arguments.architectures else []
        raise Mistake(f"{' '.join(chosen)}: no kernel of {' or '.join(usable)} is meant by that")
    return max(judge(name, usable[name].RULES, results, arguments) for name, results in found.items())


def show(name: str, results: list[Resources]) -> None:
    """The table of kernels, and that of their main loops."""
    rows = [
        (
            r.variant,
            r.kernel,
            f"sm_{r.architecture}",
            str(r.registers),
            str(r.spills),
            str(r.shared),
            f"{r.wide_loads} / {r.narrow_loads}",
            f"{r.wide_stores} / {r.narrow_stores}",
            str(r.matrix),
        )
        for r in results
    ]
    columns = ("variant", "kernel", "for", "registers", "spilled bytes", "shared bytes", "loads 16 B / less",
               "stores 16 B / less", "matrix instructions")  # fmt: skip
    table(f"ahead-of-time compiled kernels, {name}", columns, rows)
    loops = [(r, loop) for r in results for loop in r.loops if not loop.fault]
    if loops:
        kinds = list(loops[0][1].classes)
        rows = [
            (loop.variant, loop.kernel, loop.case, f"sm_{r.architecture}", f"{loop.instructions:.1f} / {loop.per}",
             str(loop.body), *(f"{loop.classes[kind]:.1f}" for kind in kinds))
            for r, loop in loops
        ]  # fmt: skip
        table(f"instructions of main loops, {name}", ("variant", "kernel", "case", "for", "all", "body", *kinds), rows)


def judge(name: str, rules: Rules, results: list[Resources], arguments: argparse.Namespace) -> int:
    """Show what the kernels cost and say whether they keep to the rules; the exit status."""
    show(name, results)
    if arguments.update_budget:
        up = rules.update(results)
        say(f"wrote {rules.budget}: {'these go up' if up else 'nothing goes up'}")
        for line in up:
            say(line)
    if (why := rules.not_compared()) is not None:
        print(f"{PROGRAM}: {name}: {why}", file=sys.stderr)
    violations = rules.violations(results, everything=not arguments.only)
    for violation in violations:
        say(violation)
    if violations:
        say(f"{name}: {len(violations)} excesses, listed above, among {len(results)} kernels")
        return 1
    held = "keep to the rules" if why else "are within their budget"
    say(f"{name}: {len(results)} kernels {held}")
    return 0


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog=f"python -m {PROGRAM}", description=__doc__.split("\n\n")[1])
    add = top.add_argument
    add("--backend", choices=tuple(MODULES), help="only this one (default: both)")
    add("--architectures", type=numbers, help="compute capabilities (default: 80,90,100)")
    add("--only", help="variants whose name contains this")
    add("--update-budget", action="store_true", help="make these figures the committed budget")
    return top


def main(arguments: list[str] | None = None) -> int:
    parsed = parser().parse_args(arguments)
    return guarded(PROGRAM, lambda: run(parsed))


if __name__ == "__main__":
    sys.exit(main())
