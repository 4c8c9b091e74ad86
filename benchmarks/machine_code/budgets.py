"""Budget files: text that people can read, a row a line, columns apart by two or more spaces, `-` for nothing."""

import re
from collections.abc import Iterable, Sequence


def format_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, *([cell or "-" for cell in row] for row in rows)]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    padded = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
    return "".join(f"{line.rstrip()}\n" for line in padded)


def parse_table(text: str) -> list[dict[str, str]]:
    """The rows by the names of their columns. ValueError for a row with more or fewer cells."""
    columns, *rows = (re.split(r" {2,}", line.strip()) for line in text.strip().splitlines())
    found = [dict(zip(columns, row, strict=True)) for row in rows]
    return [{name: "" if cell == "-" else cell for name, cell in row.items()} for row in found]


# What the rows of kernels hold per architecture.
FIGURES = ("registers", "shared")
HEAD = """\
Registers and bytes of shared memory; below them instructions of main loops, of a pass and of the body.
`python -m benchmarks.machine_code --backend NAME --update-budget` writes this.
"""


def format_limits(compiler: str, version: str, limits: dict[str, dict]) -> str:
    """limits: by `variant / kernel / sm_architecture`, as `Rules.limits` gives them."""
    kernels: dict[tuple[str, str], dict[str, str]] = {}
    loops: dict[tuple[str, str, str], dict[str, str]] = {}
    for key, figures in limits.items():
        variant, kernel, architecture = key.split(" / ")
        numbers = [str(figures[name]) for name in FIGURES]
        kernels.setdefault((kernel, variant), {})[architecture] = " ".join(numbers)
        for case, count in figures.get("instructions", {}).items():
            cell = f"{count:g} {figures['bodies'][case]}"
            loops.setdefault((kernel, variant, case), {})[architecture] = cell
    architectures = sorted({key.split(" / ")[2] for key in limits}, key=lambda name: int(re.sub(r"\D", "", name)))

    def table(names: Sequence[str], content: dict[tuple, dict[str, str]]) -> str:
        rows = ([*key, *(cells.get(a, "") for a in architectures)] for key, cells in content.items())
        return format_table([*names, *architectures], rows)

    parts = [f"{compiler} {version}\n", HEAD, table(("kernel", "variant"), kernels)]
    return "\n".join([*parts, *([table(("kernel", "variant", "case"), loops)] if loops else [])])


def parse_limits(text: str) -> tuple[str, dict[str, dict]]:
    """The version of the compiler, and what `format_limits` was given."""
    first, _, kernels, *rest = text.split("\n\n")
    limits: dict[str, dict] = {}
    for row in parse_table(kernels):
        kernel, variant = row.pop("kernel"), row.pop("variant")
        for architecture, cell in row.items():
            if cell:
                numbers = map(int, cell.split())
                limits[f"{variant} / {kernel} / {architecture}"] = dict(zip(FIGURES, numbers, strict=True))
    for row in parse_table(rest[0]) if rest else []:
        kernel, variant, case = row.pop("kernel"), row.pop("variant"), row.pop("case")
        for architecture, cell in row.items():
            if cell:
                count, body = cell.split()
                figures = limits[f"{variant} / {kernel} / {architecture}"]
                figures.setdefault("instructions", {})[case] = float(count)
                figures.setdefault("bodies", {})[case] = int(body)
    return first.split()[-1], limits


def format_counts(counts: dict[str, dict[str, dict[str, int]]]) -> str:
    """counts: by case and kernel, what a launch moves by name."""
    rows = [(case, kernel, figures) for case, launches in counts.items() for kernel, figures in launches.items()]
    names = list(dict.fromkeys(name for *_, figures in rows for name in figures))
    return format_table(
        ["case", "kernel", *names], [[c, k, *(str(figures[n]) for n in names)] for c, k, figures in rows]
    )


def parse_counts(text: str) -> dict[str, dict[str, dict[str, int]]]:
    counts: dict[str, dict[str, dict[str, int]]] = {}
    for row in parse_table(text):
        case, kernel = row.pop("case"), row.pop("kernel")
        counts.setdefault(case, {})[kernel] = {name: int(cell) for name, cell in row.items()}
    return counts
