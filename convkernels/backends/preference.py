"""The order in which ``auto`` tries the backends: that of the table, after the one that was measured to be the fastest.

``preference.json`` is {device: {op: {dtype: backend}}}; `python -m benchmarks.prefer` writes it from results. A device,
op or dtype without an entry was not measured, or the table's order is right for it.
"""

import json
from functools import cache
from pathlib import Path

import torch

from . import BACKENDS

FILE = Path(__file__).with_name("preference.json")


@cache
def measured() -> dict[str, dict[str, dict[str, str]]]:
    """The content of the file."""
    return json.loads(FILE.read_text())


def fastest(op: str, device_type: str, dtype: torch.dtype) -> str | None:
    """The backend that a measurement on the current device prefers to the table's order."""
    if device_type != "cuda" or not measured() or not torch.cuda.is_available():
        return None
    return measured().get(torch.cuda.get_device_name(), {}).get(op, {}).get(str(dtype).removeprefix("torch."))


def order(op: str, device_type: str, dtype: torch.dtype) -> list[str]:
    """Names of all backends, the first to try first."""
    first = fastest(op, device_type, dtype)
    return sorted(BACKENDS, key=lambda name: name != first)
