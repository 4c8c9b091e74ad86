"""Numbers of parameters, initial values, and FLOPs."""

import pytest
import torch

pytest.importorskip("transformers")
from modelling import quick

from convkernels.models import (
    CompositeBertConfig,
    CompositeBertForMaskedLM,
    ConvSeq2SeqConfig,
    ConvSeq2SeqForConditionalGeneration,
    ConvSeq2SeqForSequenceClassification,
    ConvSeq2SeqModel,
    summary,
)
from convkernels.models.configs import WINDOWS


def count(made, config):
    with torch.device("meta"):
        model = made(config)
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


# The authors' models, counted; vocabulary of 30004, 12 layers.
BERTS = {
    "none": (13_414_324, 108_722_740),
    "absolute": (13_430_708, 108_821_044),
    "fixed": (13_415_140, 108_725_188),
    "dynamic": (13_427_380, 108_735_796),
    "composite": (13_428_196, 108_738_244),
    "composite-key": (13_441_252, 108_751_300),
    "depthwise": (13_469_620, 108_888_628),
    "composite-depthwise": (13_483_492, 108_904_132),
    "conv-qk": (13_524_916, 109_054_516),
    "conv-v": (13_469_620, 108_888_628),
    "conv-qkv": (13_580_212, 109_220_404),
    "composite-conv-qk": (13_538_788, 109_070_020),
    "composite-conv-v": (13_483_492, 108_904_132),
    "composite-conv-qkv": (13_594_084, 109_235_908),
    "convbert": (13_078_156, 105_520_828),
    "convbert-absolute": (13_094_540, 105_619_132),
}


@pytest.mark.parametrize("variant", quick(BERTS, ("absolute", "composite-conv-qkv", "convbert")))
def test_parameters_of_the_berts(variant):
    sizes = [count(CompositeBertForMaskedLM, CompositeBertConfig.preset(variant, size)) for size in ("small", "base")]
    assert tuple(sizes) == BERTS[variant]


EMBEDDING = 32_128 * 768
UNUSED = 24 * 768  # the bias that each of fairseq's dynamic convolutions owns and never adds
SEQ2SEQ = {
    ("transformer", "paper"): 222_903_552,
    ("lightweight", "paper"): 208_747_344,
    ("dynamic", "paper"): 209_005_056,
    ("lightweight", "fairseq"): 208_976_208,
    ("dynamic", "fairseq"): 209_252_352 - UNUSED,
    ("dilated", "fairseq"): 208_976_632,
    ("lightweight", "released"): 223_947_264,
    ("dynamic", "released"): 351_349_248,
}


@pytest.mark.parametrize(("mixer", "style"), SEQ2SEQ)
def test_parameters_of_the_encoder_decoders(mixer, style):
    """With one matrix for embeddings and output layer, and with another for the output layer."""
    for tied, expected in ((True, SEQ2SEQ[mixer, style]), (False, SEQ2SEQ[mixer, style] + EMBEDDING)):
        config = ConvSeq2SeqConfig.preset(mixer, "base", style, tie_word_embeddings=tied)
        assert count(ConvSeq2SeqForConditionalGeneration, config) == expected


@pytest.mark.parametrize(
    ("mixer", "style", "changes", "expected"),
    [
        ("dynamic", "fairseq", {"encoder_kernel_size": WINDOWS["base"]}, 209_577_984 - UNUSED),
        ("lightweight", "released", {"encoder_kernel_size": 7}, 223_910_400),
        ("dynamic", "released", {"encoder_kernel_size": 7}, 323_000_832),
    ],
)
def test_parameters_with_other_windows(mixer, style, changes, expected):
    config = ConvSeq2SeqConfig.preset(mixer, "base", style, **changes)
    assert count(ConvSeq2SeqForConditionalGeneration, config) == expected


def test_initial_values():
    """Those of T5 and BERT, and of the modules for what these do not have."""

    def spread(parameter, expected):
        assert 0.9 < parameter.std() / expected < 1.1

    torch.manual_seed(0)
    model = ConvSeq2SeqModel(ConvSeq2SeqConfig.preset("transformer", "tiny", d_model=64, d_ff=256))
    layer = model.decoder.layers[0]
    spread(model.shared.weight, 1.0)
    spread(layer.mixer.q.weight, (64 * 32) ** -0.5)
    spread(layer.cross_attention.k.weight, 64**-0.5)
    spread(layer.feed_forward.wo.weight, 256**-0.5)
    assert (layer.mixer_norm.weight == 1).all()
    model = ConvSeq2SeqModel(ConvSeq2SeqConfig.preset("lightweight", "tiny", num_filters=32))
    weight = model.encoder.layers[0].mixer.conv.weight
    assert 0.9 < weight.abs().max() / (6 / (7 + 32 * 7)) ** 0.5 <= 1  # Xavier uniform over [32,1,7]
    model = CompositeBertForMaskedLM(CompositeBertConfig.preset("composite-depthwise", "tiny", hidden_size=64))
    attention = model.bert.encoder.layer[0].attention.self
    spread(model.bert.embeddings.word_embeddings.weight, 0.02)
    spread(attention.query.weight, 0.02)
    assert not attention.convfixed_param.any() and 0.9 < attention.convq_param.abs().max() * 17**0.5 <= 1
    assert (attention.convolution_scalar == 1).all() and not attention.convolution_scalar.requires_grad


def test_summary_of_an_encoder_decoder():
    """Against the products counted by hand: B = 2, S tokens in the encoder, T in the decoder."""
    config = ConvSeq2SeqConfig.preset("dynamic", "small")
    found = summary(ConvSeq2SeqForConditionalGeneration, config, batch=2, length=96, target_length=64)
    B, S, T, C, F, H, K, V = 2, 96, 64, 512, 2048, 2, 7, 32128
    block = 2 * C * 2 * C + 2 * C * C + 2 * C * H * K + 2 * C * K
    cross = 4 * 2 * C * C
    assert found.flops == {
        "mixer": 6 * B * (S + T) * block,
        "feed-forward": 6 * B * (S + T) * 4 * C * F,
        "cross-attention": 6 * B * (T * cross // 2 + S * cross // 2 + 4 * T * S * C),
        "head": 2 * B * T * C * V,
    }
    assert found.total_parameters == count(ConvSeq2SeqForConditionalGeneration, config)
    assert f"{found.total_flops:,}" in str(found) and "batch 2, 96 tokens, 64 in the decoder" in str(found)


def test_summary_of_a_bert_and_of_its_training():
    config = CompositeBertConfig.preset("composite", "small")
    found = summary(CompositeBertForMaskedLM, config, batch=2, length=128, training=True)
    B, T, C, W = 2, 128, 256, 17
    attention = 2 * 2 * T * C + 2 * C * W  # q·k and p·v, and the kernel predicted by the query
    assert found.flops["mixer"] == 12 * B * T * (4 * 2 * C * C + attention)
    assert found.total_parameters == BERTS["composite"][0]
    forward = found.total_flops - found.flops["backward"]
    assert 1.9 * forward < found.flops["backward"] < 2.4 * forward


def test_summary_of_classifiers():
    config = ConvSeq2SeqConfig.preset("lightweight", "tiny", dual_encoder=True)
    one = summary(ConvSeq2SeqForSequenceClassification, config, length=32)
    config = ConvSeq2SeqConfig.preset("lightweight", "tiny")
    other = summary(ConvSeq2SeqForSequenceClassification, config, length=32)
    assert one.flops["mixer"] == 2 * other.flops["mixer"]
