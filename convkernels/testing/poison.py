"""Traps for memory errors: fresh memory full of NaN, inputs that lie inside storage which must not change, and inputs
beside memory that cannot be touched."""

import contextlib
import ctypes
import mmap

import torch

MARGIN = 5


@contextlib.contextmanager
def poisoned_allocations():
    """Every torch.empty inside is filled with NaN (integers: their maximum).

    Whatever a kernel forgets to write, or reads before writing, then shows up in its results. Outputs that the native
    library allocates by itself are filled where CONVKERNELS_POISON=1 was set before its first call.
    """
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill


class Guarded:
    """A copy of a tensor as a view in the middle of a larger buffer of NaN (integers: 99, bools: True).

    A kernel that reads past the view picks up NaN; one that writes past it is caught by `check`, and one that writes
    to an input by `check(unchanged=True)`.
    """

    def __init__(self, tensor, margin=MARGIN):
        shape = [size + 2 * margin for size in tensor.shape]
        fill = float("nan") if tensor.dtype.is_floating_point else (True if tensor.dtype == torch.bool else 99)
        self.buffer = torch.full(shape, fill, dtype=tensor.dtype, device=tensor.device)
        self.index = tuple(slice(margin, margin + size) for size in tensor.shape)
        self.view = self.buffer[self.index]
        self.view.copy_(tensor)
        self.before = self.buffer.clone()

    def check(self, name, unchanged=True):
        """Raises AssertionError if anything around the view changed (or, with `unchanged`, the view itself)."""
        expected = self.before.clone()
        if not unchanged:
            expected[self.index] = self.view
        same = torch.equal(self.buffer.view(torch.uint8), expected.view(torch.uint8))
        assert same, f"{name}: memory {'of or ' if unchanged else ''}around the tensor was overwritten"


def fenced(tensor: torch.Tensor, after: bool) -> torch.Tensor:
    """A contiguous copy on the CPU with inaccessible memory right after it, or right before it: an access there ends
    the process."""
    if tensor.numel() == 0:
        return torch.empty_like(tensor)
    size = tensor.numel() * tensor.element_size()
    room = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, room + mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + (room if after else 0)
    if ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(address), ctypes.c_size_t(mmap.PAGESIZE), 0):
        raise OSError(ctypes.get_errno(), "mprotect")
    flat = torch.frombuffer(
        memory, dtype=tensor.dtype, count=tensor.numel(), offset=room - size if after else mmap.PAGESIZE
    )
    return flat.view(tensor.shape).copy_(tensor)
