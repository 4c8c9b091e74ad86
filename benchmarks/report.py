"""Writes docs/results.md, all of it, from the results in benchmarks/results: python -m benchmarks.report [FILE ...]

Files that are named are put there first, each suite in them in the place of the same suite of the same machine. The
results are what `make bench-cpu` and `bench --suite acceptance`, `--suite attention` and `--suite models` leave on a
CPU, and `--suite streaming`, `--suite attention` and `--suite models` on a GPU with `--backend cuda` and `--backend
triton`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import store, timing
from benchmarks.suites import (
    BACKWARD,
    BOTH,
    COPY,
    FORWARD,
    OURS,
    acceptance_tables,
    attention_tables,
    cpu_tables,
    models_tables,
    streaming,
)
from benchmarks.suites.attention_tables import COMPOSITE, PLAIN
from convkernels.cli import environment
from convkernels.cli.console import Mistake, guarded, markdown_table, quantity

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "results.md"
HEADS = 12
BACKENDS = ("cuda", "triton")
HEAD = """\
# Results

What the machines below gave, written by `python -m benchmarks.report` from `benchmarks/results/*.json`.
[performance.md](performance.md) says how it is measured, and by which command. Compare within a table: absolute times
do not travel between machines. Times come first, then the targets and how the machines stand to them. Kernels change: a
table is about those of its day.
"""

MODEL_VALUES: dict[str, Callable[[dict[str, Any]], str]] = {
    "examples per second": models_tables.speed,
    "FLOPs per example": lambda r: quantity(r["flops"] and r["flops"] / r["batch"]),
    "extra memory at the peak of a step": lambda r: quantity(r["peak_extra_bytes"], "B"),
}

Rows = list[tuple[str, ...]]


def day(section: dict[str, Any]) -> str:
    """When a suite was measured: a file may have suites of several days, and has dates since 2026-11-28."""
    return f"Measured {section['environment'].get('date', 'before 2026-11-28')}."


def of_backends(content: dict, suite: str) -> dict[str, dict]:
    return {name: content[f"{suite} {name}"] for name in BACKENDS if f"{suite} {name}" in content}


def cpu_convolutions(section: dict[str, Any]) -> Iterator[str]:
    """Ours beside F.conv1d and the best stock form, with the heads that models have."""
    columns = ("op", "direction", "dtype", "K", "convkernels, us", "of a copy", "F.conv1d, us", "best stock form, us",
               "times faster than conv1d", "than the best")  # fmt: skip
    rows, results = [], acceptance_tables.Results(section)
    for key, times in results.groups.items():
        op, direction, dtype, length, heads, taps, memory = key
        if (length, heads, memory) != (acceptance_tables.TABLE_LENGTH, HEADS, acceptance_tables.FRESH):
            continue
        name, best = results.best_stock(times)
        share = (1.0 if direction == FORWARD else 1.5) * times[COPY] / times[OURS]
        conv1d = times.get("conv1d")
        rows.append(
            (
                op, direction, dtype, str(taps), f"{times[OURS] * 1e6:.0f}", f"{share:.2f}",
                f"{conv1d * 1e6:.0f}" if conv1d else "-", f"{best * 1e6:.0f} ({name})",
                f"{conv1d / times[OURS]:.1f}" if conv1d else "-", f"{best / times[OURS]:.1f}",
            )
        )  # fmt: skip
    shape = section["shape"]
    yield (
        f"### Convolutions\n\n`--suite acceptance`: B={shape['batch']}, T={acceptance_tables.TABLE_LENGTH}, "
        f"C={shape['channels']}, H={HEADS}, softmax over taps included; backward: d(x) and d(taps). {day(section)}"
    )
    yield markdown_table(columns, rows)
    if shared := section["environment"].get("samples", {}).get(timing.DISTURBED):
        yield f"Note: threads shared their cores in {shared} of the suite's times."
    call = {mode: [f"{seconds * 1e6:.1f}" for seconds in times.values()] for mode, times in section["overhead"].items()}
    names = next(iter(section["overhead"].values()))
    yield "A call on a tiny tensor (B=1, T=4, C=64, K=7, float32), in microseconds:"
    yield markdown_table(("call", *names), [(mode, *cells) for mode, cells in call.items()])


def attention_times(sections: dict[str, dict]) -> Iterator[str]:
    """Times by length of ours and of what others offer; of several sections, the others from the last that has them."""
    times, memory = {}, {}
    for name, section in sections.items():
        for r in section["records"]:
            line = f"{r['line']}, {name}" if name and r["line"] in (COMPOSITE, PLAIN) else r["line"]
            key = r["dtype"], r["direction"], r["length"]
            times.setdefault(key, {})[line] = quantity(r["seconds"], "s")
            memory.setdefault(key, {})[line] = quantity(r["peak_extra_bytes"], "B")
    lines = list(dict.fromkeys(line for cells in times.values() for line in cells))
    lines.sort(key=lambda line: not line.startswith((COMPOSITE, PLAIN)))
    first = next(iter(sections.values()))
    yield f"### Attention\n\n`--suite attention`: {attention_tables.shape(first['settings'])}. {day(first)}"
    for dtype in dict.fromkeys(dtype for dtype, _, _ in times):
        for direction in (FORWARD, BACKWARD):
            yield f"{direction}, {dtype}:"
            yield markdown_table(("T", *lines), _by_length(times, lines, dtype, direction))
        yield f"extra memory at the peak of {BOTH}, {dtype}:"
        yield markdown_table(("T", *lines), _by_length(memory, lines, dtype, BOTH))


def training_steps(sections: dict[str, dict]) -> Iterator[str]:
    """Speed, FLOPs and memory of whole models by length, of each backend."""
    first = next(iter(sections.values()))
    yield f"### Models\n\n`--suite models`: forward pass, loss and backward pass. {day(first)}"
    for name, section in sections.items():
        for case, shape in models_tables.shapes(section).items():
            yield f"{shape}{f', {name}' if name else ''}:"
            chosen = [r for r in section["records"] if r["case"] == case]
            lines = list(dict.fromkeys(r["line"] for r in chosen))
            for dtype in dict.fromkeys(r["dtype"] for r in chosen):
                for what, value in MODEL_VALUES.items():
                    cells: dict[tuple, dict[str, str]] = {}
                    for r in chosen:
                        cells.setdefault((r["dtype"], BOTH, r["length"]), {})[r["line"]] = value(r)
                    yield f"{what}, {dtype}:"
                    yield markdown_table(("T", *lines), _by_length(cells, lines, dtype, BOTH))


def _by_length(cells: dict[tuple, dict[str, str]], lines: list[str], dtype: str, direction: str) -> Rows:
    lengths = sorted(length for d, way, length in cells if (d, way) == (dtype, direction))
    return [(str(n), *(cells[dtype, direction, n].get(line, "-") for line in lines)) for n in lengths]


def gpu_convolutions(sections: dict[str, dict]) -> Iterator[str]:
    """Times of the backends, the fraction of a copy, and F.conv1d's time in units of the first one's."""
    found = {name: {(r["case"], r["direction"]): r for r in s["records"]} for name, s in sections.items()}
    first, rows = next(iter(found.values())), []
    for case in first:
        cells, times = list(case), first[case]["seconds"]
        for records in found.values():
            r = records.get(case)
            cells += [f"{r['seconds'][OURS] * 1e6:.0f}", f"{streaming.fraction(r):.2f}"] if r else ["-", "-"]
        rows.append((*cells, f"{times['conv1d'] / times[OURS]:.1f}" if "conv1d" in times else ""))
    section = next(iter(sections.values()))
    shape = section["shape"]
    yield (
        f"### Convolutions\n\n`--suite streaming`: B={shape['batch']}, T={shape['length']}, C={shape['channels']}, "
        f"H={shape['heads']}, {shape['dtype']}, softmax included, a cold cache. {day(section)}"
    )
    titles = [title for name in found for title in (f"{name}, us", "of a copy")]
    yield markdown_table(("case", "direction", *titles, f"{next(iter(found))}: times faster than conv1d"), rows)


def aims(content: dict[str, dict]) -> Iterator[str]:
    """Targets and where this machine stands."""
    yield f"### {title(content)}"
    if "acceptance" in content:
        section = content["acceptance"]
        heads = " / ".join(map(str, section["shape"]["heads"]))
        yield f"Convolutions; values for H = {heads} (dynamic: H = {HEADS}), all of which have to pass:"
        yield markdown_table(acceptance_tables.TARGET_COLUMNS, acceptance_tables.target_rows(section))
        yield markdown_table(acceptance_tables.OVERHEAD_COLUMNS, acceptance_tables.overhead_rows(section))
    if "cpu" in content:
        yield from goals(content["cpu"])
    for name, section in of_backends(content, "streaming").items():
        met = sum(streaming.fraction(r) >= r["target"] for r in section["records"])
        bounds = sorted(r["target"] for r in section["records"])
        yield (
            f"Convolutions, {name}: {bounds[0]:.2f} to {bounds[-1]:.2f} of a copy, met by {met} of "
            f"{len(section['records'])} cases."
        )
    for name, section in sections(content, "attention").items():
        yield f"Attention{f', {name}' if name else ''}:"
        yield markdown_table(*attention_tables.target_rows(section))
        yield from (f"Note: {note}." for note in section["notes"])
    for name, section in sections(content, "models").items():
        yield f"Models{f', {name}' if name else ''}:"
        if not attention_tables.on_gpu(section) and (rows := models_tables.target_rows(section))[1]:
            yield markdown_table(*rows)
        yield markdown_table(*models_tables.crossover_rows(section))
        yield from (f"Note: {note}." for note in section["notes"])


def goals(section: dict[str, Any]) -> Iterator[str]:
    """Goals of the CPU kernels, and where this machine stands with the kernels in use."""
    yield f"Kernels, `make bench-cpu`, {environment.title(section['environment'])}:"
    yield markdown_table(cpu_tables.COLUMNS, cpu_tables.rows(section))
    yield "\n".join(f"* {note}" for note in cpu_tables.notes(section))


def sections(content: dict[str, dict], suite: str) -> dict[str, dict]:
    """Of each backend, or of the one that auto takes, with the name ""."""
    return of_backends(content, suite) or ({"": content[suite]} if suite in content else {})


def title(content: dict[str, dict]) -> str:
    return environment.title(next(iter(content.values()))["environment"])


def times(content: dict[str, dict]) -> Iterator[str]:
    """What one machine gave."""
    facts = next(iter(content.values()))["environment"]
    yield f"## {title(content)}"
    yield f"convkernels {facts['convkernels']}, Python {facts['python']}."
    if "acceptance" in content:
        yield from cpu_convolutions(content["acceptance"])
    if of_backends(content, "streaming"):
        yield from gpu_convolutions(of_backends(content, "streaming"))
    if sections(content, "attention"):
        yield from attention_times(sections(content, "attention"))
    if sections(content, "models"):
        yield from training_steps(sections(content, "models"))


def page() -> str:
    contents = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"), reverse=True)]
    timed = [content for content in contents if content.keys() - {"cpu"}]
    parts = [HEAD.rstrip("\n"), *(part for content in timed for part in times(content)), "## Targets"]
    return "\n\n".join([*parts, *(part for content in contents for part in aims(content))]) + "\n"


def take(path: Path) -> None:
    """Put a file of results among those that the page is made of."""
    content = store.read(path)
    if not content or not all(map(store.is_section, content.values())):
        raise Mistake(f"{path}: expected a results file, with measurements in it")
    target = RESULTS / path.name
    kept = store.read(target) if target.exists() else {}
    store.write(target, store.dumps(kept | content))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="results to put into benchmarks/results")
    files = parser.parse_args(arguments).files

    def write() -> int:
        for path in files:
            take(path)
        PAGE.write_text(page())
        print(f"wrote {PAGE}")
        return 0

    return guarded("report", write)


if __name__ == "__main__":
    sys.exit(main())
