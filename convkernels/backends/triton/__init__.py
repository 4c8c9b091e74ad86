"""The Triton backend: NVIDIA GPUs, and with ``TRITON_INTERPRET=1`` any CPU (slowly, for tests).

Importing this package does not import Triton; ``load`` does.
"""

import os
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import torch

KERNELS: dict = {}
OLDEST = (3, 4)
# ptxas 12.8, which Triton 3.6 brings, makes code for compute capability 9.x in which products of matrices use addresses
# before they are written: gradients of attention come out wrong. The same input assembled by 12.9 or 13.0 is right.
OLDEST_ASSEMBLER = (12, 9)


def interpreting() -> bool:
    """Whether Triton interprets kernels instead of compiling them."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _version(assembler: Path | str) -> tuple[int, ...]:
    """Of a ptxas; (0,) where there is none."""
    try:
        told = subprocess.run([assembler, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return (0,)
    found = re.search(r"release (\d+)\.(\d+)", told)
    return (int(found[1]), int(found[2])) if found else (0,)


def choose_assembler(folder: Path) -> str | None:
    """Have this process's Triton, whose programs are in ``folder``, take a newer ptxas than its own where that is too
    old; the reason why not, if there is none. What TRITON_PTXAS_PATH says stays."""
    given = os.environ.get("TRITON_PTXAS_PATH") or folder / "ptxas"
    if _version(given) >= OLDEST_ASSEMBLER:
        return None
    if "TRITON_PTXAS_PATH" not in os.environ:
        # First what Triton itself takes for newer GPUs: it asks for no newer driver.
        toolkits = [
            os.path.join(os.environ[n], "bin", "ptxas") for n in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(n)
        ]
        for other in (folder / "ptxas-blackwell", *toolkits, shutil.which("ptxas") or "/usr/local/cuda/bin/ptxas"):
            if _version(other) >= OLDEST_ASSEMBLER:
                os.environ["TRITON_PTXAS_PATH"] = str(other)
                return None
    return (
        f"{given} is older than 12.9 and assembles kernels for compute capability 9.x wrongly: "
        "set TRITON_PTXAS_PATH to the ptxas of CUDA 12.9 or newer"
    )


def version() -> tuple[int, ...]:
    """Major and minor version of Triton."""
    import triton

    return tuple(int(part) for part in triton.__version__.split(".")[:2])


@cache
def load() -> str | None:
    """Import Triton and the kernels; None, or the reason why they cannot run."""
    if not interpreting() and torch.version.cuda is None and torch.version.hip is None:
        return "this PyTorch was built without CUDA, and TRITON_INTERPRET=1 is not set"
    if not interpreting() and not torch.cuda.is_available():
        return "PyTorch finds no GPU, and TRITON_INTERPRET=1 is not set"
    try:
        import triton
    except ImportError as error:
        return f"Triton does not import: {error}"
    if version() < OLDEST:
        return f"Triton {triton.__version__} is older than {'.'.join(map(str, OLDEST))}"
    if not interpreting() and any(
        torch.cuda.get_device_capability(n)[0] == 9 for n in range(torch.cuda.device_count())
    ):
        reason = choose_assembler(Path(triton.__file__).parent / "backends" / "nvidia" / "bin")
        if reason:
            return reason
    from .attention import launch as attention
    from .conv import launch as conv
    from .conv import launch_step as decoding

    KERNELS.update(tap_conv=conv.tap_conv, tap_activation_grad=conv.tap_activation_grad, tap_grad=conv.tap_grad)
    KERNELS.update(tap_step=decoding.tap_step)
    KERNELS.update(attention=attention.attention, attention_grad=attention.attention_grad)
    return None
