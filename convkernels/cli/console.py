"""What command lines share: mistakes, exit statuses, lists of numbers; tables and progress on a terminal, by rich where
it is installed and as plain text elsewhere."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import itertools
import os
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence

try:
    import rich.console
    import rich.progress
    import rich.table
except ImportError:
    rich = None

CELL = 76  # characters of a cell on a line
MISTAKE = 2  # argparse's status for wrong options, too
INTERRUPTED = 130  # what a shell says of a program that Ctrl-C ended
PIPE_CLOSED = 141
LARGEST = 2**24  # of a number that makes sizes: products of two fit into what torch can count


class Mistake(Exception):
    """What the user has to change, in one sentence."""


def reason_of(error: OSError) -> str:
    return f"{error.strerror or error}" + (f": {error.filename}" if error.filename else "")


def need(module: str, reason: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise Mistake(f"{reason} needs {module}, which is not installed: pip install {module}")


def guarded(program: str, command: Callable[[], int]) -> int:
    """The exit status of a command, whose failures become one line."""
    if sys.stdout is None:  # closed by the shell
        sys.stdout = open(os.devnull, "w")
    try:
        status = command()
        sys.stdout.flush()
        return status
    except Mistake as error:
        print(f"{program}: {error}", file=sys.stderr)
        return MISTAKE
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except OSError as error:
        # Python would fail once more, when it closes the stream.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return PIPE_CLOSED
        print(f"{program}: {reason_of(error)}", file=sys.stderr)
        return 1


def first_sentence(command: Callable) -> str:
    """Of a command's documentation, as the list of commands shows it."""
    return " ".join(command.__doc__.split()).split(". ")[0]


def positive(value: str) -> int:
    if not value.strip().isdecimal() or not 1 <= int(value) <= LARGEST:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 to {LARGEST}, got {value!r}")
    return int(value)


def distinct(values: list) -> list:
    twice = [value for value in values if values.count(value) > 1]
    if twice:
        raise argparse.ArgumentTypeError(f"{twice[0]} is given twice")
    return values


def numbers(value: str) -> list[int]:
    return distinct([positive(part) for part in value.split(",")])


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table, unless it has no rows; a column of numbers is set flush right, a long cell is wrapped."""
    if not rows:
        return
    numeric = [all(row[i][:1].isdigit() or row[i] in ("", "-") for row in rows) for i in range(len(columns))]
    if rich is not None and sys.stdout.isatty():
        grid = rich.table.Table(title=title, title_justify="left", title_style="bold")
        for name, right in zip(columns, numeric, strict=True):
            grid.add_column(name, justify="right" if right else "left", overflow="fold")
        for row in rows:
            grid.add_row(*(rich.markup.escape(cell) for cell in row))
        rich.console.Console().print(grid)
        return
    wrap = textwrap.TextWrapper(CELL, break_long_words=False, break_on_hyphens=False).wrap
    wrapped = [[wrap(cell) for cell in row] for row in rows]
    rows = [line for cells in wrapped for line in itertools.zip_longest(*cells, fillvalue="")]
    widths = [max(len(cell) for cell in column) for column in zip(columns, *rows, strict=True)]
    print(f"\n{title}")
    for row in (columns, ["-" * width for width in widths], *rows):
        cells = [c.rjust(w) if n else c.ljust(w) for c, w, n in zip(row, widths, numeric, strict=True)]
        print("  ".join(cells).rstrip())


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def say(text: str) -> None:
    print(text, flush=True)


@contextlib.contextmanager
def progress(total: int) -> Iterator[Callable[[str, int], None]]:
    """Yields step(description, advance): a bar on a terminal, a line per finished step elsewhere."""
    if rich is not None and sys.stderr.isatty():
        columns = (
            rich.progress.TextColumn("{task.description:<44}"),
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TimeElapsedColumn(),
        )
        with rich.progress.Progress(*columns, console=rich.console.Console(stderr=True)) as bar:
            task = bar.add_task("", total=total)
            yield lambda text, advance: bar.update(task, description=text, advance=advance)
        return
    done = 0

    def step(text: str, advance: int) -> None:
        nonlocal done
        done += advance
        print(f"[{done}/{total}] {text}", file=sys.stderr, flush=True)

    yield step


def quantity(value: float | None, unit: str = "") -> str:
    """Three significant digits with a metric prefix; a dash for None."""
    if value is None:
        return "-"
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""), (1e-3, "m"), (1e-6, "u")):
        if abs(value) >= factor:
            return f"{value / factor:.3g} {prefix}{unit}".strip()
    return f"{value:.3g} {unit}".strip()
