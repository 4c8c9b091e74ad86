"""Files of results: saved as they grow, whole at every moment, and never in place of what took longer to measure."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from convkernels.cli.console import Mistake, reason_of

# What makes two records of one list belong to one measurement, which is kept or replaced as a whole.
GROUP = ("case", "workload", "shape", "op", "direction", "heads", "taps", "dtype", "length")
RECORDS = ("records", "work", "workloads")
REMARKS = ("notes", "skipped", "failures", "errors")
# What a section says of its records, and of the machine, that may differ between runs that are put together.
COVERED = ("lengths", "dtypes", "padding")
# What it says of each model; runs that are put together may be of different ones.
EACH = ("shapes",)
INCIDENTAL = ("platform", "busy_cpus", "date", "samples", "chosen")


@contextlib.contextmanager
def understood(what: str) -> Iterator[None]:
    """Mistake where the content of a results file is not what a suite writes."""
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise Mistake(f"{what}: expected what a suite writes: {type(error).__name__}: {error}") from error


def write(path: Path, text: str) -> None:
    """Write a file so that it holds its old content or the new one, whenever this is interrupted."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_text(text)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def dumps(content: dict[str, Any]) -> str:
    """A results file's text: a record a line, numbers with six digits."""
    parts = []
    for name, section in content.items():
        lines = [f"  {json.dumps(key)}: {_value(value)}" for key, value in _rounded(section).items()]
        parts.append(f" {json.dumps(name)}: {{\n" + ",\n".join(lines) + "\n }")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _value(value: Any) -> str:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "[\n" + ",\n".join(f"   {json.dumps(item)}" for item in value) + "\n  ]"
    return json.dumps(value)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, (list, tuple)) else value


def writable_folder(folder: Path, option: str) -> None:
    """Make the folder; Mistake where nothing can be written into it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise Mistake(f"{option} {folder}: expected a folder that can be written to: {reason_of(error)}") from None


def read(path: Path) -> dict[str, Any]:
    """The sections of a results file; Mistake for anything else."""
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise Mistake(f"{path}: expected a results file: {error.strerror or error}") from None
    except ValueError as error:
        raise Mistake(f"{path}: expected a results file: {error}") from None
    if not isinstance(content, dict):
        raise Mistake(f"{path}: expected a results file, an object of JSON, got {type(content).__name__}")
    return content


def is_section(section: Any) -> bool:
    """Whether this is a suite's part of a results file, with something measured in it."""
    return (
        isinstance(section, dict)
        and isinstance(section.get("environment"), dict)
        and isinstance(section.get("settings", section.get("shape")), dict)
        and isinstance(section.get("records"), list)
        and bool(section["records"])
    )


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """In what two sections differ that cannot be put together, as `name: old, not new`."""
    found = []
    for part in ("environment", "settings", "shape", "backend"):
        before, after = old.get(part), new.get(part)
        if isinstance(before, dict) and isinstance(after, dict):
            names = [name for name in {**before, **after} if name not in (*COVERED, *INCIDENTAL)]
            pairs = [(name, before.get(name), after.get(name)) for name in names if name not in EACH]
            for name in EACH:
                old_ones, new_ones = before.get(name, {}), after.get(name, {})
                pairs += [(key, old_ones[key], new_ones[key]) for key in old_ones if key in new_ones]
        else:
            pairs = [(part, before, after)]
        found += [f"{name}: {a}, not {b}" for name, a, b in pairs if _plain(a) != _plain(b)]
    return found


def _plain(value: Any) -> Any:
    """A value as it comes back from a file."""
    return json.loads(json.dumps(value))


def _group(record: dict[str, Any]) -> tuple:
    return tuple(record.get(name) for name in GROUP)


def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """The new section, and of the old one what the new one has not measured."""
    new = _plain(new)
    kept = {}
    for part in RECORDS:
        measured = {_group(record) for record in new.get(part, ())}
        kept[part] = [record for record in old.get(part, ()) if _group(record) not in measured]
    if not any(kept.values()):
        return new
    result = {**old, **{key: value for key, value in new.items() if value or key not in old}}
    for part in RECORDS:
        if part in new:
            result[part] = kept[part] + new[part]
    for part in REMARKS:
        if part in new:
            result[part] = [r for r in old.get(part, ()) if r not in new[part]] + new[part]
    for part in ("settings", "shape"):
        if part in new:
            together = [name for name in (*COVERED, *EACH) if name in new[part]]
            result[part] = {**new[part], **{name: _union(old[part][name], new[part][name]) for name in together}}
    return result


def _union(old: Any, new: Any) -> Any:
    if isinstance(new, dict):
        return {**old, **new}
    both = list(dict.fromkeys([*old, *new]))
    return sorted(both) if all(isinstance(value, int) for value in both) else both


class Store:
    """One section of a results file, which keeps the others."""

    def __init__(self, path: Path, name: str, empty: dict[str, Any], overwrite: bool) -> None:
        """empty: the section before anything is measured. Mistake where the results could not be saved, or would take
        the place of others."""
        writable_folder(path.parent, "--output")
        self.path, self.name, self.error = path, name, None
        self.old = None
        if not path.exists():
            return
        old = read(path).get(name)
        if overwrite or not is_section(old):
            return
        with understood(f"{path}: its part {name} (--overwrite replaces it)"):
            merged(old, empty)
            unlike = differences(old, empty)
        if unlike:
            raise Mistake(
                f"{path} holds results of the suite {name} that cannot be put together with these "
                f"({'; '.join(unlike)}): give another --output, or --overwrite to replace them"
            )
        self.old = old

    def save(self, section: dict[str, Any]) -> None:
        """Put the section into the file, with what it had before of measurements that the section has not. An error is
        kept in `error`: what has been measured is worth more than the file."""
        if not section["records"]:
            return
        try:
            content = read(self.path) if self.path.exists() else {}
            content[self.name] = section if self.old is None else merged(self.old, section)
            write(self.path, dumps(content))
            self.error = None
        except OSError as error:
            self.error = reason_of(error)
        except Mistake as error:
            self.error = str(error)
