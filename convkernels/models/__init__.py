"""Sequence models over this package's convolutions and attention, as models of Hugging Face transformers.

``ConvSeq2Seq*``: the encoder-decoders of Tay et al. 2021, attention replaced by lightweight, dynamic or dilated
convolutions. ``CompositeBert*``: the BERTs of Chang et al. 2021, attention combined with convolutions. ``summary``
counts parameters and FLOPs. Everything needs transformers (``pip install 'transformers>=5.17'``), whose Auto classes
know these models as soon as this package is imported. Without it the import succeeds, and the names say what is
missing.
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
    "CompositeBertForTokenClassification": "bert",
    "CompositeBertForQuestionAnswering": "bert",
    "Summary": "costs",
    "summary": "costs",
}
__all__ = list(_HOMES)


def _lacks_transformers(error: ModuleNotFoundError) -> bool:
    return error.name is not None and error.name.split(".")[0] == "transformers"


def needs_transformers(name: str, error: ModuleNotFoundError) -> NoReturn:
    """Raise what says how to install transformers, if that is what ``name`` lacks; else the error as it is."""
    if not _lacks_transformers(error):
        raise error
    how = "pip install 'transformers>=5.17'"
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


try:
    from . import bert, seq2seq  # noqa: F401  they register themselves
except ModuleNotFoundError as error:
    if not _lacks_transformers(error):
        raise
