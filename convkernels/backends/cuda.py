"""The CUDA backend: NVIDIA GPUs, and with ``CONVKERNELS_SIMT=1`` any CPU (slowly, for tests)."""

import re
from functools import cache

import torch

from .library import load_library
from .switches import switch

# The first compute capability that has what the kernels are made of: asynchronous copies, products of bfloat16.
OLDEST = (8, 0)


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
    capability = torch.cuda.get_device_capability()
    if capability < OLDEST:
        return f"this GPU's compute capability is {dotted(capability)}, expected {dotted(OLDEST)} or newer"
    return load_library("cuda")


def dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def describe(capability: tuple[int, int], native) -> str:
    """A compute capability, and what the build, of which module ``convkernels._C`` tells, means for such a GPU."""
    major, minor = capability
    made = [re.fullmatch(r"(\d+)(\d)[af]?(?:\+PTX)?", name) for name in getattr(native, "cuda_archs", ())]
    if not made or any(of and int(of[1]) == major and int(of[2]) <= minor for of in made):
        return dotted(capability)
    return f"{dotted(capability)}: no machine code, the driver compiles each CUDA kernel when it is first used"
