"""Hugging Face transformers: this package's attention in its models, and its models' weights in this package's.

``register`` makes ``attn_implementation="convkernels"`` known; ``replace_attention`` swaps the self-attention modules
of a model in place; ``convert`` makes a model of this package from a T5, BERT or ConvBERT.
"""

from ...models import needs_transformers

try:
    import transformers  # noqa: F401
except ModuleNotFoundError as error:
    needs_transformers(__name__, error)

from .attention import NAME, attention_forward, padding_mask, register
from .conversion import convbert_names, convert
from .replacement import replace_attention

__all__ = ["NAME", "attention_forward", "convbert_names", "convert", "padding_mask", "register", "replace_attention"]
