"""What the host side of both operators shares: numbers in the form in which kernels take them, and launching."""

import struct
import threading
from collections.abc import Iterable
from functools import cache

import torch
from torch import Tensor

_INTERPRETER = threading.RLock()


# triton.cdiv and triton.next_power_of_2 also serve kernels, and take forty times as long on the host.
def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The least power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def bits(number: float) -> int:
    """A float64 as an integer: Triton would round an argument of type float to float32."""
    return struct.unpack("<q", struct.pack("<d", number))[0]


def dropout_threshold(dropout: float) -> int:
    """The least random word that is kept, an unsigned 32-bit number, as the signed one with its bits. That of dropout 1
    lies beyond all words; the largest has to do."""
    word = min(int(dropout * 2**32), 2**32 - 1)
    return word - 2**32 if word >= 2**31 else word


def dropout_scale(dropout: float) -> int:
    """The bits of 1 / (1 - dropout), by which what is kept is multiplied."""
    return bits(1.0 / (1.0 - dropout) if dropout < 1.0 else 0.0)


def search_steps(sequences: int) -> int:
    """Steps in which bisection finds one of so many sequences."""
    return max(sequences - 1, 0).bit_length()


@cache
def architecture_of(device: torch.device) -> int:
    """What tiles are chosen for. Only sm_90 and sm_100 have matrix units that read shared memory; without a GPU any
    will do."""
    if device.type != "cuda":
        return 90
    return {9: 90, 10: 100}.get(torch.cuda.get_device_capability(device)[0], 80)


def on_device(tensor: Tensor):
    """Triton launches on the current device. Its interpreter alters its language module while a kernel runs, so that
    kernels of several threads have to take turns there."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else _INTERPRETER


def run(tensor: Tensor, launches: Iterable[tuple]) -> None:
    """Launch (kernel, grid, arguments) one after the other on the tensor's device."""
    with on_device(tensor):
        for kernel, grid, arguments in launches:
            kernel[grid](**arguments)
