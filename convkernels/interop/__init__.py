"""Checkpoints, models and functions of other implementations.

``causal_conv1d``: the functions of that package, computed by this one. ``fairseq``: LightConv and DynamicConv
checkpoints, and drop-in modules. ``bert_convolutions``: the checkpoints of Chang et al. 2021. ``huggingface``: T5, BERT
and ConvBERT weights; this package's attention and causal convolutions inside other models. ``onnx``: models with this
package's operators as ONNX graphs.
"""

import importlib

__all__ = ["bert_convolutions", "causal_conv1d", "fairseq", "huggingface", "onnx"]


def __getattr__(name: str):
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(f".{name}", __name__)


def __dir__():
    return sorted([*globals(), *__all__])
