"""The CUDA backend: NVIDIA GPUs, and with ``CONVKERNELS_SIMT=1`` any CPU (slowly, for tests)."""

import ctypes
import re
from functools import cache

import torch

from .library import load_library, path_of
from .switches import switch

# The first compute capability that has what the kernels are made of: asynchronous copies, products of bfloat16.
OLDEST = (8, 0)
# The first NVIDIA driver for each major version of CUDA. A library needs one for the version it was built with.
DRIVERS = {12: "525.60", 13: "580"}


def simulating() -> bool:
    """Whether the kernels run on the CPU, one fiber per CUDA thread."""
    return switch("CONVKERNELS_SIMT")


@cache
def load() -> str | None:
    """Load the library; None, or the reason why its kernels cannot run. Only a torch built with CUDA can load it."""
    if simulating():
        name = "counted" if switch("CONVKERNELS_SIMT_COUNTED") else "simt"
        return load_library(name) or reason_of(*support(name))
    if torch.version.cuda is None:
        return "this PyTorch was built without CUDA, and CONVKERNELS_SIMT=1 is not set"
    if not torch.cuda.is_available():
        return "PyTorch finds no NVIDIA GPU"
    capability = torch.cuda.get_device_capability()
    if capability < OLDEST:
        return f"this GPU's compute capability is {dotted(capability)}, expected {dotted(OLDEST)} or newer"
    reason = load_library("cuda")
    if reason is not None:
        return reason
    with torch.cuda.device(torch.cuda.current_device()):  # which it may be for torch only so far
        return reason_of(*support("cuda"))


def support(name: str) -> tuple[int, int, str | None]:
    """What a loaded library finds: the CUDA version of the driver, its own, as 1000 major + 10 minor, both 0 where it
    needs no driver, and why the current device cannot load its kernels, if that is so. Nothing is launched."""
    function = ctypes.CDLL(str(path_of(name))).convkernels_cuda_support
    function.restype = ctypes.c_char_p
    driver, own = ctypes.c_int(), ctypes.c_int()
    error = function(ctypes.byref(driver), ctypes.byref(own))
    return driver.value, own.value, error and error.decode()


def reason_of(driver: int, own: int, error: str | None) -> str | None:
    """What ``support`` found, in words; None where nothing is wrong."""
    if driver // 1000 < own // 1000:
        needed, has, built = (dotted((n // 1000, n % 1000 // 10)) for n in (own // 1000 * 1000, driver, own))
        first = f" ({DRIVERS[own // 1000]} or newer)" if own // 1000 in DRIVERS else ""
        older = f", or build with nvcc {driver // 1000}.x" if driver // 1000 in DRIVERS else ""
        return (
            f"its library was built with CUDA {built}: expected an NVIDIA driver for CUDA {needed}{first}, got one for "
            f"CUDA {has}; update the driver{older}"
        )
    return error and f"its library does not run on this GPU: {error}{_compiled_for()}"


def _compiled_for() -> str:
    """As far as the information module, which a build may lack, says."""
    try:
        from convkernels._C import cuda_archs
    except ImportError:
        return ""
    return f" (compiled for {', '.join(cuda_archs)})"


def dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def describe(capability: tuple[int, int], native) -> str:
    """A compute capability, and what the build, of which module ``convkernels._C`` tells, means for such a GPU."""
    archs = [re.fullmatch(r"(\d+)(\d)([af]?)(\+PTX)?", name) for name in getattr(native, "cuda_archs", ())]
    made = [((int(of[1]), int(of[2])), of) for of in archs if of]
    if not made or any(
        least == capability or least[0] == capability[0] and least < capability and of[3] != "a" for least, of in made
    ):
        return dotted(capability)
    if any(least <= capability and of[4] and not of[3] for least, of in made):
        return f"{dotted(capability)}: no machine code, the driver compiles each CUDA kernel when it is first used"
    return f"{dotted(capability)}: this build has no CUDA kernels for it"
