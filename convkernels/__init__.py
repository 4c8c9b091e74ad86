"""Fused convolution kernels for sequence models.

Functions: ``depthwise_conv1d``, ``lightweight_conv1d``, ``dynamic_conv1d`` and their ``*_step`` forms for decoding;
``composite_attention`` and, for its tables, ``t5_relative_bias`` and ``alibi_bias``.
Modules: ``convkernels.nn``; models: ``convkernels.models``; what belongs to other libraries: ``convkernels.interop``;
each is imported when it is first used. ``why_not(backend, ...)`` lists the reasons a backend cannot be used here
(empty: it can); ``convkernels.backends`` holds the table of backends. Importing this package loads neither Triton nor
transformers.
"""

import importlib

from . import backends
from ._version import __version__
from .backends import native
from .ops._select import why_not
from .ops.attention.alibi import alibi_bias
from .ops.attention.api import composite_attention
from .ops.attention.t5 import t5_relative_bias
from .ops.conv.api import depthwise_conv1d, dynamic_conv1d, lightweight_conv1d
from .ops.conv.step import depthwise_conv1d_step, dynamic_conv1d_step, lightweight_conv1d_step

# Loaded with the package (1 ms), so that programs saved by torch.export find their operators; a library that is missing
# or does not load is no error here, ``why_not("cpu")`` tells.
native.load()

__all__ = [
    "__version__",
    "alibi_bias",
    "backends",
    "composite_attention",
    "depthwise_conv1d",
    "depthwise_conv1d_step",
    "dynamic_conv1d",
    "dynamic_conv1d_step",
    "lightweight_conv1d",
    "lightweight_conv1d_step",
    "t5_relative_bias",
    "why_not",
]


def __getattr__(name: str):
    if name not in ("interop", "models", "nn"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(f".{name}", __name__)


def __dir__():
    return sorted([*globals(), "interop", "models", "nn"])
