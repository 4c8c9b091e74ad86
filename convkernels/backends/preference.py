"""The order in which ``auto`` tries the backends: that of the table, after the one that was measured to be the fastest.

``preference.json`` is {device: {op: {dtype: backend}}}, with {problem: backend} in place of the backend where problems
of one op differ; `python -m benchmarks.prefer` writes it from results. What has no entry was not measured, or the
table's order is right for it.
"""

import json
from functools import cache
from pathlib import Path

import torch

from . import BACKENDS

FILE = Path(__file__).with_name("preference.json")
# Classes of attention problems: the length from which on keys do not fit into a multiprocessor, and channels of a head.
SHORT, CHANNELS = 256, (64, 128, 256)
PROBLEMS = tuple(f"{length} {channels}" for length in ("short", "long") for channels in CHANNELS)


@cache
def measured() -> dict[str, dict[str, dict[str, str | dict[str, str]]]]:
    """The content of the file."""
    return json.loads(FILE.read_text())


def problem_of(keys: int, channels: int) -> str:
    """The class of an attention problem: "short 64" has at most 256 keys, in all, and at most 64 channels per head."""
    small, middle, large = CHANNELS
    room = small if channels <= small else middle if channels <= middle else large
    return f"{'short' if keys <= SHORT else 'long'} {room}"


def _entry(op: str, device_type: str, dtype: torch.dtype) -> str | dict[str, str] | None:
    if device_type != "cuda" or not measured() or not torch.cuda.is_available():
        return None
    return measured().get(torch.cuda.get_device_name(), {}).get(op, {}).get(str(dtype).removeprefix("torch."))


def problems(op: str, device_type: str, dtype: torch.dtype) -> tuple[str | None, ...]:
    """The classes of problems that the choice depends on; None for all of them."""
    return PROBLEMS if isinstance(_entry(op, device_type, dtype), dict) else (None,)


def fastest(op: str, device_type: str, dtype: torch.dtype, problem: str | None = None) -> str | None:
    """The backend that a measurement on the current device prefers to the table's order."""
    entry = _entry(op, device_type, dtype)
    return entry.get(problem) if isinstance(entry, dict) else entry


def order(op: str, device_type: str, dtype: torch.dtype, problem: str | None = None) -> list[str]:
    """Names of all backends, the first to try first."""
    first = fastest(op, device_type, dtype, problem)
    return sorted(BACKENDS, key=lambda name: name != first)
