"""What the tests of the models share: small models, and real text as bytes."""

import pytest
import torch

from benchmarks.text import paragraphs
from convkernels import models
from convkernels.models.configs import BERT_VARIANTS

MIXERS = ("transformer", "lightweight", "dynamic", "dilated")
PAIRS = [("transformer", "paper"), ("lightweight", "fairseq"), ("dynamic", "released")]  # of a mixer and a style
VARIANTS = tuple(BERT_VARIANTS)
SIZE = 256  # bytes
PAD = 0


def seq2seq(mixer, style="paper", *, seed=0, noise=0.0, made=models.ConvSeq2SeqForConditionalGeneration, **changes):
    """A tiny encoder-decoder without dropout; noise: added to all parameters, for outputs that differ."""
    config = models.ConvSeq2SeqConfig.preset(mixer, "tiny", style, **({"dropout": 0.0} | changes))
    return _stirred(made, config, seed, noise)


def bert(variant, *, seed=0, noise=0.0, made=models.CompositeBertForMaskedLM, **changes):
    """A tiny BERT without dropout."""
    options = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, max_position_embeddings=64) | changes
    return _stirred(made, models.CompositeBertConfig.preset(variant, "tiny", **options), seed, noise)


def _stirred(made, config, seed, noise):
    torch.manual_seed(seed)
    model = made(config)
    with torch.no_grad():
        for parameter in model.parameters() if noise else ():
            parameter.add_(torch.randn_like(parameter), alpha=noise)
    return model.eval()


def generator(mixer="dynamic", style="paper", **changes):
    """A model whose next token depends much on the last ones, so that its greedy tokens vary."""
    model = seq2seq(mixer, style, noise=0.1, eos_token_id=None, tie_word_embeddings=False, **changes)
    with torch.no_grad():
        model.model.shared.weight.normal_(std=3)
        model.lm_head.weight.normal_()
    return model


MODELS = {
    "seq2seq": lambda: seq2seq("dynamic", "released", noise=0.1),
    "encoder": lambda: seq2seq("lightweight", made=models.ConvSeq2SeqForSequenceClassification),
    "bert": lambda: bert("absolute", noise=0.1),
    "labels": lambda: bert("composite", made=models.CompositeBertForSequenceClassification, num_labels=3),
    "tokens": lambda: bert("composite", made=models.CompositeBertForTokenClassification, num_labels=3),
    "answers": lambda: bert("composite", made=models.CompositeBertForQuestionAnswering),
}


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


def prompt():
    return ragged(text(3, 24), [24, 15, 3])


def given():
    """Shorter than ``prompt``, by the names of a model's arguments."""
    ids, mask = ragged(text(3, 12), [12, 7, 3])
    return dict(input_ids=ids, attention_mask=mask)


def masked(ids, seed=0):
    """Inputs with 15 % of the bytes hidden, and labels with the hidden ones alone."""
    hidden = torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed)) < 0.15
    hidden[:, 1] = True
    hidden &= ids != PAD
    return torch.where(hidden, 1, ids), torch.where(hidden, ids, -100)


def near(actual, expected, tolerance=1e-5):
    """Equal to the tolerance, relative to the largest value where that is more than 1."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * max(expected.abs().max().item(), 1.0))
