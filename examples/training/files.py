"""Text and tables from files, plain, .gz or .xz, or from the Hugging Face Hub. What is wrong with a file is an error
that names its line."""

import fcntl
import gzip
import json
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO

from datasets import Dataset, DatasetDict, load_dataset
from datasets.exceptions import DatasetGenerationError

# How the scripts describe an option that names texts.
TEXTS = "files: .txt, or .jsonl with 'text' in each line, also .gz or .xz; or of the Hub, as name:configuration:split"
_OPENERS = {".gz": gzip.open, ".xz": lzma.open}
# What ends a sentence, if it does not end an initial or a title.
_SENTENCE_END = re.compile(r"((?<!\b[A-Z])(?<!\bMr)(?<!\bMrs)(?<!\bDr)(?<!\bSt)[.!?][\"')\]]*)\s+")


class DataError(Exception):
    """A file that cannot be used, and why."""


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """The numbered lines of a UTF-8 file, without their ends; DataError for what cannot be read."""
    number = 0
    try:
        with _OPENERS.get(path.suffix, open)(path, "rb") as file:
            for number, raw in enumerate(file, 1):
                yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}, line {number}: expected UTF-8, got byte {error.object[error.start]:#04x}") from None
    except (lzma.LZMAError, zlib.error, EOFError, gzip.BadGzipFile) as error:
        raise DataError(f"{path}, after line {number}: expected {path.suffix} data, got: {error}") from None
    except OSError as error:
        raise DataError(f"{path}: expected a file that can be read: {error.strerror or error}") from None


def json_object(text: str, where: str) -> dict:
    """An object of JSON; DataError naming where it stands for anything else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: expected an object of JSON: {error}") from None
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected an object of JSON, got {type(value).__name__}")
    if "\\ud" in text or "\\uD" in text:  # of these escapes, which come in pairs, one alone is no character
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{where}: expected characters, got {error.object[error.start]!a}") from None
    return value


def _objects(path: Path) -> Iterator[tuple[int, dict]]:
    for number, line in lines(path):
        if line.strip():
            yield number, json_object(line, f"{path}, line {number}")


def logged(path: Path) -> list[dict]:
    """The lines of a log, objects of JSON; without the last one if it was cut off while it was written."""
    *whole, last = path.read_text(errors="replace").split("\n")
    found = [json_object(line, f"{path}, line {number}") for number, line in enumerate(whole, 1)]
    with suppress(DataError):
        found.append(json_object(last, f"{path}, last line"))
    return found


def stored(path: Path) -> dict:
    """The object of JSON that a file holds."""
    return json_object(path.read_text(errors="replace"), str(path))


def replace(path: Path, text: str) -> None:
    """Write a file in one go: whoever reads it sees the old text or the new one."""
    new = path.with_name(f"{path.name}.new")
    with new.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)


def lock(folder: Path) -> IO:
    """Keep other processes out of a folder, where the file system can, until the file that is returned is closed.
    ValueError if one of them has it."""
    file = (folder / "lock").open("w")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.close()
        raise ValueError(f"{folder}: expected a folder that no other process writes to, got one in use") from None
    except OSError:
        pass
    return file


def first_line(error: BaseException) -> str:
    """What an error says first, or its name."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _tabbed(path: Path) -> Iterator[tuple[int, dict]]:
    rows = lines(path)
    _, head = next(rows, (0, ""))
    columns = head.split("\t")
    if not head or len(set(columns)) != len(columns):
        raise DataError(f"{path}, line 1: expected different names of columns, got {head!r}")
    for number, line in rows:
        fields = line.split("\t")
        if len(fields) != len(columns):
            raise DataError(
                f"{path}, line {number}: expected {len(columns)} fields separated by tabs ({', '.join(columns)}), got "
                f"{len(fields)}"
            )
        yield number, dict(zip(columns, fields, strict=True))


def _format(path: Path) -> str:
    return next((suffix for suffix in reversed(path.suffixes) if suffix not in _OPENERS), "")


def _strings(row: dict, columns: tuple[str, ...], where: str) -> dict[str, str]:
    for column in columns:
        if column not in row:
            raise DataError(f"{where}: expected a column {column!r}, got {', '.join(row)}")
        if not isinstance(row[column], str | int) or isinstance(row[column], bool):
            raise DataError(
                f"{where}: expected a string or an integer in column {column!r}, got {json.dumps(row[column])}"
            )
        if not str(row[column]).strip():
            raise DataError(f"{where}: column {column!r} is empty")
    return {column: str(row[column]) for column in columns}


def rows(path: Path, columns: tuple[str, ...]) -> list[dict[str, str]]:
    """The columns of a table: .tsv with a first line of names and no quoting, or .jsonl."""
    reader = {".tsv": _tabbed, ".jsonl": _objects}.get(_format(path))
    if reader is None:
        raise DataError(f"{path}: expected a table, .tsv or .jsonl (or one of them with .gz or .xz behind)")
    found = []
    for number, row in reader(path):
        found.append(_strings(row, columns, f"{path}, line {number}"))
    if not found:
        raise DataError(f"{path}: expected rows, got none")
    return found


def tables(files: dict[str, str], columns: tuple[str, ...]) -> DatasetDict:
    """Named tables. A value is a file, or ``name:configuration:split`` of a data set on the Hub."""
    found = DatasetDict()
    for split, source in files.items():
        if Path(source).exists() or _format(Path(source)) in (".tsv", ".jsonl"):
            found[split] = Dataset.from_list(rows(Path(source), columns))
            continue
        data = _from_hub(source, split)
        found[split] = Dataset.from_list(
            [_strings(row, columns, f"{source}, row {number}") for number, row in enumerate(data, 1)]
        )
    return found


def _from_hub(source: str, split: str) -> Dataset:
    name, configuration, part = (*source.split(":"), "", "")[:3]
    try:
        return load_dataset(name, configuration or None, split=part or split)
    except Exception as error:
        raise DataError(
            f"{source}: expected a file, or a data set on the Hub as name:configuration:split; {first_line(error)}"
        ) from None


def documents(sources: list[str]) -> Iterator[str]:
    """The texts of files: .jsonl, in each line an object with "text", or plain text, in which a form feed ends a text;
    or of data sets on the Hub with a column "text"."""
    for source in sources:
        path = Path(source)
        kind = _format(path)
        if kind == ".jsonl":
            for number, value in _objects(path):
                if not isinstance(value.get("text"), str):
                    raise DataError(f"{path}, line {number}: expected a string named 'text', got {', '.join(value)}")
                yield value["text"]
        elif kind == ".txt":
            part = []
            for _, line in lines(path):
                before, *after = line.split("\f")
                part.append(before)
                for text in after:
                    yield "\n".join(part)
                    part = [text]
            yield "\n".join(part)
        elif path.exists():
            raise DataError(f"{path}: expected texts, .txt or .jsonl (or one of them with .gz or .xz behind)")
        else:
            for row in tables({"train": source}, ("text",))["train"]:
                yield row["text"]


def read(rows: Callable[[list[str]], Iterator[dict]], sources: list[str], what: str) -> Dataset:
    """What a function makes of sources of texts, kept on disk for the next time. DataError if that is nothing, or as
    the function has it."""
    given = {"rows": rows, "sources": sources, "what": what, "state": _state(rows, sources)}
    try:
        return Dataset.from_generator(_read, gen_kwargs=given)
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, DataError):
            raise error.__cause__ from None
        raise


def _read(rows, sources, what, state) -> Iterator[dict]:
    row = None
    for row in rows(sources):
        yield row
    if row is None:
        raise DataError(f"{', '.join(sources)}: expected {what}, got none")


def _state(rows: Callable, sources: list[str]) -> tuple:
    """Sizes and times of files, and how they are read: what is kept of them is of no use once any of that changes."""
    paths = [Path(source) for source in sources]
    kept = [(path.stat().st_size, path.stat().st_mtime_ns) if path.exists() else () for path in paths]
    return *kept, *(zlib.crc32(Path(code).read_bytes()) for code in (__file__, rows.__code__.co_filename))


def paragraphs(text: str) -> Iterator[str]:
    """Paragraphs of a text, each as one line. Blank lines separate them; where there are none, every line is one."""
    for part in re.split(r"\n\s*\n" if re.search(r"\n\s*\n", text) else r"\n", text):
        line = " ".join(part.split())
        if line:
            yield line


def sentences(text: str) -> Iterator[str]:
    """Sentences of a text, in the order of its paragraphs."""
    for paragraph in paragraphs(text):
        yield from _SENTENCE_END.sub(r"\1\n", paragraph).split("\n")
