"""Measures the goals of the CPU kernels on this machine, as `make bench-cpu` does, and writes results and a table.

The choice of kernels is made once per process, so each set is measured in processes of its own: the best that this
processor has, the next where that one fails, and AVX2's. There are several for each, as some of what is compared keeps
a time for as long as a process lives, and another in the next.
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
from convkernels.cli import environment
from convkernels.cli.console import INTERRUPTED, guarded, positive, say

HEAD = "# Goals of the CPU kernels"


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
            print(f"{name}: process {i + 1} of {arguments.processes}", file=sys.stderr, flush=True)
            started = {"env": environment.with_checkout(**variables), "stdout": subprocess.DEVNULL}
            status = subprocess.run(command, **started).returncode
            if found.exists():
                sections.append(store.read(found)[cpu.NAME])
                found.unlink()
                store.write(path, store.dumps({cpu.NAME: cpu.combined(sections)}))
            if status != 0:
                print(f"bench_cpu: {name}: the measurement ended with status {status}", file=sys.stderr)
                break
    return path if sections else None, status


def run(arguments: argparse.Namespace) -> int:
    store.writable_folder(arguments.output, "--output")
    paths: list[Path] = []
    worst = 0
    for name in cpu.usable():
        if paths and name != "avx2":
            continue
        path, status = measure(name, arguments)
        paths += [path] if path else []
        worst = worst or status
        if status == INTERRUPTED:
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
        return run(parsed)

    return guarded("bench_cpu", command)


if __name__ == "__main__":
    sys.exit(main())
