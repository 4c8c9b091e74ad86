"""What the tests of the models share: small models, real text as bytes, all kinds of both."""

import pytest
import torch

from benchmarks.text import paragraphs
from convkernels.models import (
    CompositeBertConfig,
    CompositeBertForMaskedLM,
    ConvSeq2SeqConfig,
    ConvSeq2SeqForConditionalGeneration,
)
from convkernels.models.configs import BERT_VARIANTS

MIXERS = ("transformer", "lightweight", "dynamic", "dilated")
VARIANTS = tuple(BERT_VARIANTS)
SIZE = 256  # bytes
PAD = 0


def seq2seq(mixer, style="paper", *, seed=0, noise=0.0, made=ConvSeq2SeqForConditionalGeneration, **changes):
    """A tiny encoder-decoder without dropout; noise: added to all parameters, for outputs that differ."""
    config = ConvSeq2SeqConfig.preset(mixer, "tiny", style, **({"dropout": 0.0} | changes))
    return _stirred(made, config, seed, noise)


def bert(variant, *, seed=0, noise=0.0, made=CompositeBertForMaskedLM, **changes):
    """A tiny BERT without dropout."""
    options = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, max_position_embeddings=64) | changes
    return _stirred(made, CompositeBertConfig.preset(variant, "tiny", **options), seed, noise)


def _stirred(made, config, seed, noise):
    torch.manual_seed(seed)
    model = made(config)
    with torch.no_grad():
        for parameter in model.parameters() if noise else ():
            parameter.add_(torch.randn_like(parameter), alpha=noise)
    return model.eval()


def quick(names, some):
    """Names as parameters of a test, all but some of them marked slow."""
    return [pytest.param(name, marks=() if name in some else pytest.mark.slow) for name in names]


def text(count, length, skip=0):
    """Rows [count, length] of bytes, the beginnings of paragraphs; padding where one is shorter."""
    rows = torch.full((count, length), PAD)
    for row, paragraph in zip(rows, paragraphs()[skip:], strict=False):
        content = torch.tensor(list(paragraph.encode()[:length]))
        row[: len(content)] = content
    return rows


def ragged(ids, lengths):
    """Token ids cut to the lengths, and their attention mask."""
    mask = torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]
    return torch.where(mask, ids, PAD), mask.long()


def masked(ids, seed=0):
    """Inputs with 15 % of the bytes hidden, and labels with the hidden ones alone."""
    hidden = torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed)) < 0.15
    hidden[:, 1] = True
    hidden &= ids != PAD
    return torch.where(hidden, 1, ids), torch.where(hidden, ids, -100)
