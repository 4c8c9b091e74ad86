"""The CUDA backend: NVIDIA GPUs, and with ``CONVKERNELS_SIMT=1`` any CPU (slowly, for tests)."""

from functools import cache

import torch

from .library import load_library
from .switches import switch

# Major compute capabilities the library has kernels for.
GENERATIONS = (8, 9, 10)


def simulating() -> bool:
    """Whether the kernels run on the CPU, one fiber per CUDA thread."""
    return switch("CONVKERNELS_SIMT")


@cache
def load() -> str | None:
    """Load the library; None, or the reason why its kernels cannot run. Only a torch built with CUDA can load it."""
    if simulating():
        return load_library("simt")
    if torch.version.cuda is None:
        return "this PyTorch was built without CUDA, and CONVKERNELS_SIMT=1 is not set"
    if not torch.cuda.is_available():
        return "PyTorch finds no NVIDIA GPU"
    major, minor = torch.cuda.get_device_capability()
    if major not in GENERATIONS:
        expected = " or ".join(f"{known}.x" for known in GENERATIONS)
        return f"this GPU's compute capability is {major}.{minor}, expected {expected}"
    return load_library("cuda")
