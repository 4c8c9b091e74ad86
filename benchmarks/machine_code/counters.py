"""Counts what launches of the CUDA kernels ask of memory and of shared units, without a GPU: the library that
`make counted-build` makes, with ``CONVKERNELS_SIMT=1`` and ``CONVKERNELS_SIMT_COUNTED=1``.

    with counted() as launches:
        ck.lightweight_conv1d(x, weight, backend="cuda")
    print(launches[0].kernel, launches[0]["load_sectors"])

Keys: blocks, threads; bytes_read and bytes_written, every byte of global memory once; barriers of blocks;
warp_barriers, shuffles, votes, matrix_loads, matrix_products and warpgroup_products (wgmma, in matrix_products of the
same size) of warps. load, store and copy_read (cp.async) reach global memory: _requests of warps, _bytes that threads
ask for, _sectors of 32 bytes that requests touch. shared_load, shared_store, copy_write (cp.async), matrix_load
(ldmatrix) and operand_read (wgmma) reach shared memory: _requests, _bytes, _wavefronts, and _conflicts, the wavefronts
beyond one per phase. csrc/simt/counters.h says what a request and a phase are.
"""

import ctypes
import json
import re
import subprocess
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

from benchmarks.machine_code import rules
from convkernels.backends import library
from convkernels.backends.switches import switch

LIBRARY = library.path_of("counted")
SECTOR = 32
_counting = threading.Lock()


@dataclass(frozen=True)
class Launch:
    """The figures of a launch, and of its accesses those of each instruction, at a `place` in the library; `kernel`
    without namespaces and template arguments, which are `variant`."""

    kernel: str
    variant: str
    figures: dict[str, int]
    instructions: list[dict[str, int]]

    def __getitem__(self, name: str) -> int:
        return self.figures[name]

    @property
    def moved(self) -> int:
        """Bytes of the sectors that requests touch."""
        return SECTOR * (self["load_sectors"] + self["copy_read_sectors"] + self["store_sectors"])

    @property
    def least(self) -> int:
        """Bytes of global memory that are read or written, each once."""
        return self["bytes_read"] + self["bytes_written"]

    @property
    def wavefronts(self) -> int:
        return sum(self[f"{access}_wavefronts"] for access in SHARED)

    @property
    def conflicts(self) -> int:
        return sum(self[f"{access}_conflicts"] for access in SHARED)


GLOBAL = ("load", "copy_read", "store")
SHARED = ("shared_load", "shared_store", "copy_write", "matrix_load", "operand_read")


@cache
def _names() -> dict[int, tuple[str, str]]:
    """(kernel, template arguments) of the functions of the library, by their place in it."""
    listed = subprocess.run(["nm", "-C", str(LIBRARY)], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"^(\w+) \w (.*)$", listed, re.MULTILINE)
    names = {int(place, 16): rules.short_name(demangled) for place, demangled in found}
    return {place: name for place, name in names.items() if name}


@contextmanager
def counted() -> Iterator[list[Launch]]:
    """A list of the launches within, those of all threads, which is filled at the end. RuntimeError where kernels do
    not run in the counted library, and within another one."""
    for name in ("CONVKERNELS_SIMT", "CONVKERNELS_SIMT_COUNTED"):
        if not switch(name):
            raise RuntimeError(f"counted(): expected the environment variable {name}=1 from the program's start on")
    if (reason := library.missing("counted")) is not None:
        raise RuntimeError(reason)
    native = ctypes.CDLL(str(LIBRARY))
    native.ck_stop_counting.restype = ctypes.c_char_p
    launches: list[Launch] = []
    if not _counting.acquire(blocking=False):
        raise RuntimeError("counted(): expected one at a time, got one within another")
    native.ck_start_counting()
    try:
        yield launches
    finally:
        found = json.loads(native.ck_stop_counting())
        _counting.release()
        for figures in found:
            instructions = figures.pop("instructions")
            launches.append(Launch(*_names()[figures.pop("kernel")], figures, instructions))


def source_lines(places: Iterable[int]) -> dict[int, str]:
    """The line of csrc/cuda that an instruction belongs to, and those that call it, as far as it was compiled there."""
    places = sorted(set(places))
    if not places:
        return {}
    # A place is where the compiler's call returns to.
    command = ["addr2line", "-a", "-i", "-e", str(LIBRARY), *(hex(place - 1) for place in places)]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    blocks = re.split(r"^0x\w+$", found, flags=re.MULTILINE)[1:]
    lines = [re.findall(r"csrc/cuda/(\S+:\d+)", block) for block in blocks]
    return {place: " < ".join(dict.fromkeys(chain[:3])) or "?" for place, chain in zip(places, lines, strict=True)}
