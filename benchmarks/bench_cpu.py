"""Measures the goals of the CPU kernels on this machine, as `make bench-cpu` does, and writes results and a table.

The choice of kernels is made once per process, so each set is measured in processes of its own: the best that this
processor has, the next where that one fails, and AVX2's; after a check that it computes what it should. There are
several processes for each, as some of what is compared keeps a time for as long as a process lives.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks import cores, report, store
from benchmarks.suites import cpu, cpu_tables
from convkernels.cli import environment, selfcheck
from convkernels.cli.console import INTERRUPTED, MISTAKE, guarded, need, positive, say

HEAD = "# Goals of the CPU kernels"


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def failures(name: str) -> list[str]:
    """What is wrong with the results of a set of kernels."""
    tell(f"{name}: compared with float64")
    return [failure for outcome in selfcheck.run_on(name) for failure in outcome.failures]


def status_of(command: list[str], variables: dict[str, str]) -> int:
    """The exit status of a program that prints nothing but progress. Ctrl-C, which it meets too, is left to it; that
    counts as interrupted whatever its status says, which is that of the signal while it imports."""
    with subprocess.Popen(command, env=variables, stdout=subprocess.DEVNULL) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:
            process.wait()
            return INTERRUPTED


def measure(name: str, arguments: argparse.Namespace) -> tuple[Path | None, int]:
    """The file of results of a set of kernels, and the exit status of what went wrong, or 0."""
    facts = {**environment.describe(torch.device("cpu")), "isa": name, "threads": arguments.threads}
    path = arguments.output / f"{environment.file_stem(facts)}.json"
    variables = {} if name == environment.active_isa() else {"CONVKERNELS_CPU_ISA": name}
    sections: list[dict] = []
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / path.name
        command = [sys.executable, "-P", "-m", "benchmarks", "bench", "--suite", cpu.NAME, "--output", folder]
        command += ["--threads", str(arguments.threads), *arguments.options]
        for i in range(arguments.processes):
            tell(f"{name}: process {i + 1} of {arguments.processes}")
            status = status_of(command, environment.with_checkout(**variables))
            if found.exists():
                sections.append(store.read(found)[cpu.NAME])
                found.unlink()
                store.write(path, store.dumps({cpu.NAME: cpu.combined(sections)}))
            if status != 0:
                tell(f"bench_cpu: {name}: the measurement ended with status {status}")
                break
    return path if sections else None, status


def run(arguments: argparse.Namespace) -> int:
    store.writable_folder(arguments.output, "--output")
    paths: list[Path] = []
    worst = 0
    for name in cpu.usable():
        if paths and name != "avx2":
            continue
        if wrong := failures(name):
            tell("\n".join(["bench_cpu: not measured, as results are wrong:", *wrong]))
            worst = 1
            continue
        path, status = measure(name, arguments)
        paths += [path] if path else []
        worst = worst or status
        if status in (INTERRUPTED, MISTAKE):  # options that are wrong are so for all sets
            break
    if not paths:
        return worst
    sections = [store.read(path)[cpu.NAME] for path in paths]
    for section in sections:
        cpu_tables.print_tables(section)
    parts = [HEAD, *(part for section in sections for part in report.goals(section))]
    path = arguments.output / "table.md"
    store.write(path, "\n\n".join(parts) + "\n")
    names = " ".join(map(str, paths))
    say(f"\nwrote {path}: the table in Markdown")
    say(f"To send these results, send {names}: files for benchmarks/results/ of the repository.")
    say(f"`python -m benchmarks.report {names}` puts them there and writes docs/results.md, for a pull request.")
    return worst


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m benchmarks.bench_cpu", description=__doc__)
    top.add_argument(
        "--output", type=Path, default=Path("results/cpu"), help="folder for results and table (default: results/cpu)"
    )
    threads = min(2, len(cores.own()))
    top.add_argument(
        "--threads", type=positive, default=threads, help="CPU threads (default: 2: the goals are for two)"
    )
    top.add_argument("--processes", type=positive, default=3, help="for each set of kernels (default: 3)")
    top.add_argument("options", nargs="*", help="options of `python -m benchmarks bench --suite cpu`, behind --")
    return top


def main(arguments: list[str] | None = None) -> int:
    parsed = parser().parse_args(arguments)

    def command() -> int:
        environment.check_variables()
        need("numpy", "the check of results")
        return run(parsed)

    return guarded("bench_cpu", command)


if __name__ == "__main__":
    sys.exit(main())
