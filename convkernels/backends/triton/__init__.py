"""The Triton backend: NVIDIA GPUs, and with ``TRITON_INTERPRET=1`` any CPU (slowly, for tests).

Importing this package does not import Triton; ``load`` does.
"""

import os
from functools import cache

import torch

KERNELS: dict = {}
OLDEST = (3, 4)


def interpreting() -> bool:
    """Whether Triton interprets kernels instead of compiling them."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def load() -> str | None:
    """Import Triton and the kernels; None, or the reason why they cannot run."""
    if not interpreting() and torch.version.cuda is None and torch.version.hip is None:
        return "this PyTorch was built without CUDA, and TRITON_INTERPRET=1 is not set"
    try:
        import triton
    except ImportError as error:
        return f"Triton does not import: {error}"
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < OLDEST:
        return f"Triton {triton.__version__} is older than {'.'.join(map(str, OLDEST))}"
    from . import attention_launch, launch

    KERNELS.update(tap_conv=launch.tap_conv, tap_grad=launch.tap_grad, tap_step=launch.tap_step)
    KERNELS.update(attention=attention_launch.attention, attention_grad=attention_launch.attention_grad)
    return None
