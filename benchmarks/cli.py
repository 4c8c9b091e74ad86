"""The command line: `python -m benchmarks bench | plot`."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

import convkernels
from benchmarks import cores, timing
from benchmarks.options import FLOATS, OPTIONS, PREPARE, check
from benchmarks.store import Store, is_section, read, understood, writable_folder
from benchmarks.suites.models_tables import SHAPES, SIZES
from convkernels.cli import environment
from convkernels.cli.console import (
    INTERRUPTED,
    Mistake,
    distinct,
    first_sentence,
    guarded,
    need,
    numbers,
    positive,
    say,
)


def _draw(results: Path, suite: str, section: dict[str, Any], folder: Path, dtypes: list[str] | None) -> None:
    from benchmarks import figures

    with understood(f"{results}: its part {suite}"):
        paths = figures.draw(suite, section, folder, dtypes)
    for path in paths:
        say(f"wrote {path}")


def bench(arguments: argparse.Namespace) -> int:
    """Measure, print tables, write JSON and plots. Results are saved as they come, so that Ctrl-C loses only what is
    being measured. Lengths and dtypes that the file has already are replaced, its others kept."""
    name, plotted = arguments.suite, "no_plots" in OPTIONS[arguments.suite] and not arguments.no_plots
    check(arguments)
    if plotted:
        need("matplotlib", "plotting (--no-plots does without it)")
    if arguments.threads:
        cpus = len(cores.own())
        if arguments.threads > cpus:
            raise Mistake(f"--threads {arguments.threads}: this process has {cpus} CPUs")
        torch.set_num_threads(arguments.threads)
    if arguments.device.type != "cpu":
        cores.release()
    tables, suite = PREPARE[name](arguments, arguments.device)
    backend = arguments.backend or "auto"
    timing.counts.clear()
    empty = _recorded(suite.section())
    path = arguments.output / f"{environment.file_stem(empty['environment'])}.json"
    store = Store(path, name if backend == "auto" else f"{name} {backend}", empty, arguments.overwrite)
    reasons = convkernels.why_not("cpu") if arguments.device.type == "cpu" and backend == "auto" else []
    if reasons and not os.environ.get("CONVKERNELS_BACKEND"):
        raise Mistake(
            f"no kernels to measure: {'; '.join(reasons)}; `make bench` compiles them, and "
            "CONVKERNELS_BACKEND=reference measures plain PyTorch"
        )
    busy, interrupted, no_memory = _disturbance(arguments.device), False, ""
    try:
        suite.run(lambda section: store.save(_recorded(section)))
        busy = max(busy, _disturbance(arguments.device))
    except KeyboardInterrupt:
        interrupted = True
    except (MemoryError, RuntimeError) as error:
        known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if not known and not any(sign in str(error) for sign in ("can't allocate", "size calculation overflowed")):
            raise
        no_memory = f"there is not enough memory for these sizes: {str(error).strip().splitlines()[-1]}"
    section = _recorded(suite.section())
    if busy:
        section["environment"]["busy_cpus"] = round(busy, 1)
    errors = [*section.get("errors", ()), *filter(None, [no_memory])]
    if not section["records"] and errors and not interrupted:
        print("bench: nothing could be measured", *errors, sep="\n", file=sys.stderr)
        return 1
    if not section["records"]:
        print("bench: interrupted before anything was measured", file=sys.stderr)
        return INTERRUPTED
    tables.print_tables(section)
    counts = timing.counts
    if counts[timing.LEFT_OUT]:
        say(f"left out, as a thread waited for a core: {counts[timing.LEFT_OUT]} of {counts[timing.TIMED]} repeats")
    if counts[timing.DISTURBED]:
        say(f"times with too few other repeats, which count them: {counts[timing.DISTURBED]}")
    store.save(section)
    if store.error:
        print(f"bench: {path} could not be written: {store.error}", file=sys.stderr)
        return INTERRUPTED if interrupted else 1
    say(f"wrote {path}")
    saved = read(path)[store.name]
    if plotted:
        _draw(path, name, saved, arguments.output, None)
    if interrupted:
        print("bench: interrupted; the tables show what was measured until then", file=sys.stderr)
    if no_memory:
        print(f"bench: {no_memory}; the tables show what was measured before", file=sys.stderr)
    return INTERRUPTED if interrupted else 1 if errors else 0


def _recorded(section: dict[str, Any]) -> dict[str, Any]:
    """The section, with what is known of the cores that its threads had."""
    if section["environment"]["device_type"] != "cpu":
        return section
    counts = {name: timing.counts[name] for name in (timing.TIMED, timing.LEFT_OUT, timing.DISTURBED)}
    section["environment"] |= {"binding": cores.binding(), "samples": counts}
    return section


def _disturbance(device: torch.device) -> float:
    """The CPUs that other processes keep busy, with a warning, where that leaves too few for the threads; else 0."""
    threads, cpus = torch.get_num_threads(), len(cores.own())
    busy = timing.busy_cpus() if device.type == "cpu" else 0.0
    if busy < max(0.5, cpus - threads + 0.5):
        return 0.0
    fewer = ", or with fewer --threads" if threads > 1 else ""
    print(
        f"bench: warning: other processes keep {busy:.1f} of {cpus} CPUs busy, and {threads} threads are measured: "
        f"times can be many times too long. Measure when they have ended{fewer}.",
        file=sys.stderr,
    )
    return busy


def _only_results(folder: Path) -> Path:
    found = sorted(folder.glob("*.json"))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "no .json"
        raise Mistake(f"{folder}: expected a results file, or a folder that holds one, got {names} in the folder")
    return found[0]


def plot(arguments: argparse.Namespace) -> int:
    """Draw the plots of a results file again."""
    if arguments.results.is_dir():
        arguments.results = _only_results(arguments.results)
    results = read(arguments.results)
    need("matplotlib", "plot")
    from benchmarks import figures

    suites = [suite for suite in figures.PLOTS if is_section(results.get(suite))]
    if not suites:
        raise Mistake(f"{arguments.results} holds no measurements to draw: run `python -m benchmarks bench` first")
    folder = arguments.output or arguments.results.parent
    writable_folder(folder, "--output")
    for suite in suites:
        _draw(arguments.results, suite, results[suite], folder, arguments.dtypes)
    return 0


def _seconds(value: str, least: float = math.ulp(0.0)) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not least <= number < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number of seconds {'from 0 on' if least == 0 else 'above 0'}, "
                                         f"got {value!r}")  # fmt: skip
    return number


def _seconds_or_none(value: str) -> float:
    return _seconds(value, 0.0)


def _device(value: str) -> torch.device:
    try:
        device = torch.device(value)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"expected cpu or cuda, got {value!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(f"torch sees {torch.cuda.device_count()} GPUs, got {value!r}")
    return device


def _some_of(known: Iterable[str]) -> Callable[[str], list[str]]:
    def names(value: str) -> list[str]:
        names = value.split(",")
        unknown = [name for name in names if name not in known]
        if unknown:
            got = ", ".join(unknown) or "nothing"
            raise argparse.ArgumentTypeError(f"expected some of {', '.join(known)}, got {got}")
        return distinct(names)

    return names


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m benchmarks", description="Measurements of convkernels.")
    commands = top.add_subparsers(dest="command", required=True)
    command = commands.add_parser("bench", help=first_sentence(bench), description=bench.__doc__)
    command.set_defaults(run=bench)
    add = command.add_argument
    add(
        "--suite",
        choices=tuple(OPTIONS),
        default="sweep",
        help="speed against length of convolutions, of attention, or of training steps of whole models; the target "
        "table; the goals of the CPU kernels in use; or the fraction of memory speed on tensors of 64 MB and more",
    )
    add(
        "--backend",
        choices=("auto", *convkernels.backends.names()),
        help="of the suites streaming, attention and models; its results are kept apart (default: auto)",
    )
    add("--batch", type=positive, help="rows of the batch in the streaming (default: 16) and attention (4) suites")
    add(
        "--output",
        type=Path,
        default=Path("convkernels-bench"),
        help="folder for JSON and PNG files (default: convkernels-bench)",
    )
    add(
        "--overwrite",
        action="store_true",
        help="replace all of this suite's results in the file; without it, results of other settings are refused and "
        "other lengths and dtypes kept",
    )
    add("--no-plots", action="store_true", help="no PNG files, and no matplotlib needed")
    add("--device", type=_device, default="cpu", help="cpu or cuda (default: cpu)")
    add("--threads", type=positive, help="CPU threads (default: what torch takes)")
    add("--lengths", type=numbers, help="sequence lengths, e.g. 64,512,4096 (default: those of the suite)")
    add("--max-length", type=positive, help="go on doubling up to this length, or stop before the default's end")
    add("--dtypes", type=_some_of(FLOATS), help="default: float32,bfloat16; models: float32, on a GPU bfloat16")
    add(
        "--models",
        type=_some_of(SHAPES),
        help="of the suite models: seq2seq, bert (default: both)",
    )
    add("--size", choices=SIZES, help="of these models (default: seq2seq small, bert base)")
    add("--layers", type=positive, help="of each stack of these models (default: all)")
    add(
        "--seconds",
        type=_seconds,
        help="time for timed repeats, of the whole sweep (default: 10) or of each group of another suite (attention 6, "
        "acceptance 1, cpu 1, streaming 1, models 10)",
    )
    add(
        "--slow-call",
        type=_seconds,
        help="seconds; a slower call is not repeated (default: sweep 0.25, attention 4, acceptance 0.1, models 60)",
    )
    add(
        "--stop-call",
        type=_seconds,
        help="seconds; what takes longer in a call is not run at longer sequences (default: sweep 0.7, "
        "attention 20, models 60)",
    )
    add(
        "--compile-seconds",
        type=_seconds_or_none,
        help="time for torch.compile in the sweep (default: 20); 0, in every suite: without it",
    )
    add("--channels", type=positive, help="default: 768")
    add("--heads", type=positive, help="distinct filters, and attention heads (default: 12)")
    add("--taps", type=positive, help="filter width (default: 7)")
    add(
        "--tokens",
        type=positive,
        help="per batch, of one sequence at least (default: sweep 2048, seq2seq 4096, bert 1024)",
    )
    add(
        "--all-peers",
        action="store_true",
        default=None,
        help="also conv2d channels-last, unfold, band matrix, compiled dynamic; models: transformers' T5",
    )

    command = commands.add_parser("plot", help=first_sentence(plot), description=plot.__doc__)
    command.set_defaults(run=plot)
    command.add_argument("results", type=Path, help="JSON file written by `python -m benchmarks bench`, or its folder")
    command.add_argument("--output", type=Path, help="folder for the PNG files (default: beside the results)")
    command.add_argument("--dtypes", type=_some_of(FLOATS), help="draw only these")
    return top


def main(arguments: list[str] | None = None) -> int:
    parsed = parser().parse_args(arguments)

    def run() -> int:
        environment.check_variables()
        return parsed.run(parsed)

    return guarded(parsed.command, run)
