"""Reader of the golden tensors: float64 results recorded from other people's implementations of these operators.

A directory holds index.json (one record per case: id, group, op, options, layout, notes, file) and the safetensors
files. Names inside: in.* inputs, param.* parameters, cot.* cotangents, out.* outputs, aux.* intermediate values,
grad.<name> gradients of sum over outputs of (cotangent * output).
"""

import functools
import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch

REPOSITORY = Path(__file__).resolve().parents[2]


def directory():
    """$CONVKERNELS_GOLDEN, else ../shared/golden beside the repository (the full set), else tests/golden (a
    selection).
    """
    chosen = os.environ.get("CONVKERNELS_GOLDEN")
    if chosen:
        return Path(chosen)
    full = REPOSITORY.parent / "shared" / "golden"
    return full if (full / "index.json").exists() else REPOSITORY / "tests" / "golden"


@dataclass(frozen=True)
class Case:
    """One recorded call. `case["in.x"]` is a tensor on the default device; `case.options["kernel_size"]` an option of
    the recorded module.
    """

    id: str
    group: str
    op: str
    options: dict
    path: Path
    names: frozenset
    quirk: str

    @functools.cached_property
    def _tensors(self):
        from safetensors.torch import load_file

        return load_file(self.path)

    def __contains__(self, name):
        return name in self.names

    def __getitem__(self, name):
        return self._tensors[name].to(torch.get_default_device())

    def get(self, name):
        return self[name] if name in self.names else None


def cases(*groups, root=None):
    """All cases of the groups (of every group when none is named), in the order of the index."""
    root = Path(root) if root is not None else directory()
    index = root / "index.json"
    if not index.exists():
        raise FileNotFoundError(f"no golden tensors at {root}: expected an index.json; set CONVKERNELS_GOLDEN")
    records = json.loads(index.read_text())["cases"]
    return [
        Case(r["id"], r["group"], r["op"], r["options"], root / r["file"], frozenset(r["tensors"]), r.get("quirk", ""))
        for r in records
        if not groups or r["group"] in groups
    ]


def check(actual, expected, name):
    """Fails unless within 1e-10 of the largest element, which counts as 1e-2 at least and as 1 at most."""
    assert actual.shape == expected.shape, f"{name}: {tuple(actual.shape)} instead of {tuple(expected.shape)}"
    if expected.numel():
        error, size = (actual - expected).abs().max().item(), expected.abs().max().clamp(1e-2, 1.0).item()
        assert error <= 1e-10 * size, f"{name}: off by {error:.3g} of {size:.3g}"
