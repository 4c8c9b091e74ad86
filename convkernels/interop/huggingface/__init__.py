"""Hugging Face transformers: this package's attention in its models, and its models' weights in this package's.

``register`` makes ``attn_implementation="convkernels"`` known; ``replace_attention`` swaps the self-attention modules
of a model in place; ``convert`` makes a model of this package from a T5, BERT or ConvBERT. ``optimize`` lets this
package compute the causal convolutions and the relative attention of a model, and ``restore`` undoes that.
"""

from ...models import needs_transformers

try:
    import transformers  # noqa: F401
except ModuleNotFoundError as error:
    needs_transformers(__name__, error)

from .attention import NAME, attention_forward, padding_mask, register
from .conversion import convbert_names, convert
from .optimization import Report, optimize, restore
from .replacement import replace_attention

__all__ = [
    "NAME", "Report", "attention_forward", "convbert_names", "convert", "optimize", "padding_mask", "register",
    "replace_attention", "restore",
]  # fmt: skip
