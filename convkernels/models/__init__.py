"""Sequence models over this package's convolutions and attention, as models of Hugging Face transformers.

``ConvSeq2Seq*``: the encoder-decoders of Tay et al. 2021, attention replaced by lightweight, dynamic or dilated
convolutions. ``CompositeBert*``: the BERTs of Chang et al. 2021, attention combined with convolutions. ``summary``
counts parameters and FLOPs. Everything needs transformers (``pip install 'convkernels[hf]'``), which is imported when
one of these names is first used.
"""

import importlib
from typing import NoReturn

_HOMES = {
    "ConvSeq2SeqConfig": "configs",
    "ConvSeq2SeqModel": "seq2seq",
    "ConvSeq2SeqForConditionalGeneration": "seq2seq",
    "ConvSeq2SeqForSequenceClassification": "seq2seq",
    "CompositeBertConfig": "configs",
    "CompositeBertModel": "bert",
    "CompositeBertForMaskedLM": "bert",
    "CompositeBertForSequenceClassification": "bert",
    "Summary": "costs",
    "summary": "costs",
}
__all__ = list(_HOMES)


def needs_transformers(name: str, error: ModuleNotFoundError) -> NoReturn:
    """Raise what says how to install transformers, if that is what ``name`` lacks; else the error as it is."""
    if error.name is None or error.name.split(".")[0] != "transformers":
        raise error
    how = "pip install 'convkernels[hf]' (or, in a checkout, pip install --no-build-isolation '.[hf]')"
    raise ImportError(f"{name} needs transformers: {how}") from error


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(f".{_HOMES[name]}", __name__)
    except ModuleNotFoundError as error:
        needs_transformers(f"{__name__}.{name}", error)
    value = globals()[name] = getattr(module, name)
    return value


def __dir__():
    return sorted([*globals(), *__all__])
