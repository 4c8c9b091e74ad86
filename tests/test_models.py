"""The models as models: sizes, padding, decoding, storage, precision, compilation, cost.

Training: test_models_training.py. Numbers of other implementations: test_models_golden.py, test_models_interop.py."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
from modelling import MIXERS, VARIANTS, bert, masked, quick, ragged, seq2seq, text
from transformers import AutoModelForMaskedLM, AutoModelForSeq2SeqLM
from transformers.cache_utils import DynamicLayer

from convkernels import models
from convkernels.models import (
    CompositeBertConfig,
    CompositeBertForMaskedLM,
    CompositeBertForSequenceClassification,
    ConvSeq2SeqConfig,
    ConvSeq2SeqForConditionalGeneration,
    ConvSeq2SeqForSequenceClassification,
    ConvSeq2SeqModel,
    summary,
)
from convkernels.models.cache import ConvState, decoder_cache
from convkernels.models.configs import WINDOWS

# -- parameters -------------------------------------------------------------------------------------------------------


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


# -- padding ----------------------------------------------------------------------------------------------------------


def same(actual, expected):
    """To 1e-6, relative to the largest value where that is more than 1."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6 * max(expected.abs().max().item(), 1.0))


def unchanged(short, long, real):
    same(long[:, : short.shape[1]][real], short[real])


@pytest.mark.parametrize("variant", VARIANTS)
def test_padding_does_not_change_a_bert(variant):
    model = bert(variant)
    ids, mask = ragged(text(3, 24), [24, 15, 3])
    wide = torch.nn.functional.pad
    with torch.no_grad():
        short, long = model(ids, mask).logits, model(wide(ids, (0, 9), value=7), wide(mask, (0, 9))).logits
        alone = model(ids[1:2, :15]).logits
    unchanged(short, long, mask.bool())
    same(short[1:2, :15], alone)


@pytest.mark.parametrize("style", quick(("paper", "fairseq", "released"), ("paper",)))
@pytest.mark.parametrize("mixer", MIXERS)
def test_padding_does_not_change_an_encoder_decoder(mixer, style):
    model = seq2seq(mixer, style, pair_attention=1)
    ids, mask = ragged(text(3, 24), [24, 15, 3])
    targets, target_mask = ragged(text(3, 20, skip=3), [20, 9, 2])
    wide = torch.nn.functional.pad
    with torch.no_grad():
        short = model(ids, mask, targets).logits
        long = model(wide(ids, (0, 9), value=7), wide(mask, (0, 9)), wide(targets, (0, 5), value=7)).logits
        alone = model(ids[1:2, :15], None, targets[1:2, :9]).logits
        # Padding to the left, as prompts have it.
        prompt = model(
            ids, mask, wide(targets, (4, 0), value=7), decoder_attention_mask=wide(torch.ones_like(targets), (4, 0))
        ).logits
    unchanged(short, long, target_mask.bool())
    same(short[1:2, :9], alone)
    same(prompt[:, 4:], short)


@pytest.mark.parametrize("dual", [False, True])
def test_padding_does_not_change_a_classifier(dual):
    model = seq2seq("lightweight", made=ConvSeq2SeqForSequenceClassification, dual_encoder=dual)
    ids, mask = ragged(text(3, 24), [24, 15, 3])
    others, other_mask = ragged(text(3, 20, skip=3), [20, 9, 2])
    pair = (others, other_mask) if dual else ()
    with torch.no_grad():
        logits = model(ids, mask, *pair).logits
        pair = (others[1:2, :9],) if dual else ()
        alone = model(ids[1:2, :15], None, *(p for q in pair for p in (q, None))).logits
    assert logits.shape == (3, 2)
    same(logits[1:2], alone)


# -- decoding ---------------------------------------------------------------------------------------------------------

NEW = 40  # more than twice any window below
DECODERS = {
    "transformer": ("transformer", "paper", {}),
    "lightweight": ("lightweight", "paper", {}),
    "dynamic": ("dynamic", "paper", {}),
    "dilated": ("dilated", "paper", {"dilation": [3, 2]}),
    "lightweight-fairseq": ("lightweight", "fairseq", {"positions": "sinusoidal", "position_offset": 2}),
    "dynamic-released": ("dynamic", "released", {}),
}


def decoder(name):
    """A model whose next token depends much on the last ones, so that it does not repeat one for ever."""
    mixer, style, changes = DECODERS[name]
    model = seq2seq(mixer, style, noise=0.1, eos_token_id=None, tie_word_embeddings=False, **changes)
    with torch.no_grad():
        model.model.shared.weight.normal_(std=3)
        model.lm_head.weight.normal_()
    return model


def prompt():
    return ragged(text(3, 24), [24, 15, 3])


@pytest.mark.parametrize("name", quick(DECODERS, ("transformer", "dynamic", "dilated")))
def test_greedy_decoding_equals_the_full_forward(name):
    """Also when it goes on from a prompt of several tokens."""
    model, (ids, mask) = decoder(name), prompt()
    for given in (None, text(3, 5, skip=9)):
        more = {} if given is None else {"decoder_input_ids": given}
        generated = model.generate(
            ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True,
            output_logits=True, **more,
        )  # fmt: skip
        tokens = generated.sequences
        with torch.no_grad():
            full = model(ids, mask, tokens, use_cache=False).logits
        steps = torch.stack(generated.logits, 1)
        full = full[:, -NEW - 1 : -1]
        torch.testing.assert_close(steps, full, rtol=0, atol=1e-5 * full.abs().max().item())
        assert torch.equal(tokens[:, -NEW:], full.argmax(2))
        assert len(tokens[:, -NEW:].unique()) > 5, "these tokens show nothing"


@pytest.mark.parametrize("name", quick(DECODERS, ("transformer", "dynamic", "dilated")))
def test_beam_search_equals_the_full_forward(name):
    """Beams are reordered at every step, so the states must follow."""
    model, (ids, mask) = decoder(name), prompt()
    search = dict(attention_mask=mask, max_new_tokens=NEW, num_beams=4, num_return_sequences=2, do_sample=False)
    tokens = model.generate(ids, **search)
    assert torch.equal(tokens, model.generate(ids, use_cache=False, **search))
    assert not torch.equal(tokens[::2], model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False))


@pytest.mark.parametrize("name", ["transformer", "dynamic", "dynamic-released", "lightweight-fairseq"])
def test_prompts_of_different_lengths(name):
    """Padded to the left, each goes on as it does alone."""
    model, (ids, mask), lengths = decoder(name), prompt(), (9, 4, 1)
    given = text(3, 9, skip=9)
    decoder_mask = torch.stack([torch.arange(9) >= 9 - length for length in lengths]).long()
    given[torch.arange(3), 9 - torch.tensor(lengths)] = model.config.decoder_start_token_id
    search = dict(max_new_tokens=NEW, do_sample=False)
    together = model.generate(
        ids, attention_mask=mask, decoder_input_ids=given, decoder_attention_mask=decoder_mask, **search
    )
    for row, length in enumerate(lengths):
        one = slice(row, row + 1)
        alone = model.generate(ids[one], attention_mask=mask[one], decoder_input_ids=given[one, 9 - length :], **search)
        assert torch.equal(together[one, -NEW:], alone[:, -NEW:])


def test_reordering_costs_no_copy_and_adds_up():
    """Two reorders before a step are one permutation; the state itself stays where it is."""
    model = decoder("lightweight")
    cache = decoder_cache(model.config)
    states = torch.randn(4, 6, 32)
    tokens = text(4, 9)
    with torch.no_grad():
        run = lambda ids, cache: model.model.decoder(ids, None, states, None, cache).last_hidden_state  # noqa: E731
        for t in range(8):
            run(tokens[:, t : t + 1], cache)
        other = copy.deepcopy(cache)
        layer = cache.self_attention_cache.layers[0]
        where = layer.state.data_ptr()
        first, second = torch.tensor([1, 1, 3, 0]), torch.tensor([2, 0, 0, 3])
        cache.reorder_cache(first)
        cache.reorder_cache(second)
        assert layer.state.data_ptr() == where
        other.batch_select_indices(first[second])
        torch.testing.assert_close(run(tokens[:, 8:], cache), run(tokens[:, 8:], other))
        other.batch_repeat_interleave(2)
        assert other.self_attention_cache.layers[0].state.shape[0] == 8
    assert cache.get_seq_length() == 9
    cache.reset()
    assert cache.get_seq_length() == 0 and layer.state is None


def test_a_cache_is_kept_only_to_go_on():
    model, ids = decoder("dynamic"), text(2, 9)
    assert model(ids, None, ids).past_key_values.get_seq_length() == 9
    assert model(ids, None, ids, use_cache=False).past_key_values is None
    assert model(ids, labels=ids).past_key_values is None
    assert model.train()(ids, None, ids).past_key_values is None


def test_labels_become_the_input_of_the_decoder():
    model, ids, labels = decoder("dynamic"), text(2, 9), text(2, 6, skip=2)
    labels[0, 4:] = -100
    given = torch.cat([torch.zeros(2, 1, dtype=torch.int64), labels[:, :-1].clamp(min=0)], 1)
    logits = model(ids, None, given).logits
    expected = torch.nn.functional.cross_entropy(logits[labels != -100], labels[labels != -100])
    torch.testing.assert_close(model(ids, labels=labels).loss, expected)


def test_the_cache_of_a_convolution_keeps_its_size():
    for mixer, kind in (("dynamic", ConvState), ("transformer", DynamicLayer)):
        cache = decoder_cache(ConvSeq2SeqConfig.preset(mixer, "tiny"))
        assert all(type(layer) is kind for layer in cache.self_attention_cache.layers)
    model, (ids, mask) = decoder("dilated"), prompt()
    generated = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, return_dict_in_generate=True)
    assert generated.past_key_values.get_seq_length() == NEW
    layers = generated.past_key_values.self_attention_cache.layers
    assert [layer.state.shape[1] for layer in layers] == [(4 - 1) * 3, (7 - 1) * 2]
    assert all(layer.length == NEW for layer in layers)
    with pytest.raises(NotImplementedError, match="what came before"):
        layers[0].crop(1)
    with pytest.raises(ValueError, match="'cache_implementation': expected None or 'dynamic', got 'static'"):
        model.generate(ids, max_new_tokens=2, cache_implementation="static")


# -- storage ----------------------------------------------------------------------------------------------------------


def examples(name):
    """A model and its inputs."""
    kind, _, name = name.partition(":")
    ids, mask = prompt()
    if kind == "bert":
        return bert(name, noise=0.1), (ids, mask)
    return seq2seq(name, noise=0.1), (ids, mask, text(3, 20, skip=3))


EXAMPLES = quick(
    [f"seq2seq:{mixer}" for mixer in MIXERS] + [f"bert:{variant}" for variant in VARIANTS],
    ("seq2seq:transformer", "seq2seq:dynamic", "bert:composite-conv-qkv", "bert:convbert-output"),
)


@pytest.mark.parametrize("name", EXAMPLES)
def test_save_and_load(name, tmp_path):
    model, inputs = examples(name)
    model.save_pretrained(tmp_path)
    auto = AutoModelForSeq2SeqLM if name.startswith("seq2seq") else AutoModelForMaskedLM
    again, report = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert type(again) is type(model) and not any(report.values()), report
    assert again.config.to_diff_dict() == model.config.to_diff_dict()
    assert sum(p.numel() for p in again.parameters()) == sum(p.numel() for p in model.parameters())
    assert torch.equal(model(*inputs).logits, again(*inputs).logits)


def test_a_classifier_takes_the_encoder_of_a_pretrained_model(tmp_path):
    seq2seq("dynamic", noise=0.1).save_pretrained(tmp_path / "seq2seq")
    model, report = ConvSeq2SeqForSequenceClassification.from_pretrained(
        tmp_path / "seq2seq", output_loading_info=True, num_labels=3
    )
    assert {key.split(".")[0] for key in report["missing_keys"]} == {"dense", "classifier"}
    pretrained = ConvSeq2SeqModel.from_pretrained(tmp_path / "seq2seq")
    first, second = (encoder.layers[0].mixer.linear1.weight for encoder in (model.model.encoder, pretrained.encoder))
    assert torch.equal(first, second)
    assert 0.8 < model.dense.weight.std() * 32**0.5 < 1.2 and not model.dense.bias.any()
    assert model(text(2, 9)).logits.shape == (2, 3)
    bert("composite", noise=0.1).save_pretrained(tmp_path / "bert")
    model, report = CompositeBertForSequenceClassification.from_pretrained(tmp_path / "bert", output_loading_info=True)
    assert {key.split(".")[0] for key in report["missing_keys"]} == {"bert", "classifier"}
    assert all("pooler" in key or "classifier" in key for key in report["missing_keys"])


def test_a_vocabulary_of_its_own_for_the_encoder_and_a_larger_one(tmp_path):
    model = seq2seq("lightweight", source_vocab_size=300)
    assert model(torch.full((1, 4), 299), None, torch.full((1, 3), 255)).logits.shape == (1, 3, 256)
    model = seq2seq("lightweight")
    model.resize_token_embeddings(270)
    ids = torch.full((1, 4), 269)
    assert model(ids, None, ids).logits.shape == (1, 4, 270)
    assert model.lm_head.weight is model.model.shared.weight


# -- precision, compilation, memory -----------------------------------------------------------------------------------


def loss_and_gradients(model, inputs, labels):
    model.zero_grad()
    loss = model(*inputs, labels=labels).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def training_inputs(name):
    model, inputs = examples(name)
    if name.startswith("bert"):
        ids, labels = masked(inputs[0])
        return model, (ids, inputs[1]), labels
    return model, inputs[:2], inputs[2]


@pytest.mark.parametrize("name", EXAMPLES)
def test_bf16_autocast(name):
    model, inputs, labels = training_inputs(name)
    exact, gradients = loss_and_gradients(model, inputs, labels)
    with torch.autocast("cpu", torch.bfloat16):
        loss, found = loss_and_gradients(model, inputs, labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=0.02, atol=0.02)
    assert found.keys() == gradients.keys()
    whole = [torch.cat([g.flatten() for g in each.values()]) for each in (found, gradients)]
    assert torch.cosine_similarity(*whole, dim=0) > 0.98


@pytest.mark.parametrize("name", ["seq2seq:transformer", "seq2seq:lightweight", "seq2seq:dynamic", "bert:composite"])
def test_weights_in_bfloat16(name):
    model, inputs = examples(name)
    expected = model(*inputs).logits
    model.to(torch.bfloat16)
    logits = model(*inputs).logits
    assert logits.dtype == torch.bfloat16
    whole = torch.cosine_similarity(logits.float().flatten(), expected.flatten(), dim=0)
    assert whole > 0.99
    if name.startswith("seq2seq"):
        tokens = model.generate(inputs[0], attention_mask=inputs[1], max_new_tokens=20, num_beams=2)
        assert tokens.shape[0] == 3


@pytest.mark.parametrize("name", ["seq2seq:transformer", "seq2seq:dynamic", "bert:composite-conv-qkv"])
def test_gradient_checkpointing(name):
    model, inputs, labels = training_inputs(name)
    loss, gradients = loss_and_gradients(model, inputs, labels)
    enable = "activation_checkpointing_enable"  # its name in newer versions of transformers
    getattr(model, enable, model.gradient_checkpointing_enable)()
    model.train()
    again, found = loss_and_gradients(model, inputs, labels)
    assert torch.equal(loss, again) and found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, msg=name)


COMPILED = ["seq2seq:transformer", "seq2seq:lightweight", "seq2seq:dynamic", "seq2seq:dilated", "bert:composite",
            "bert:composite-conv-qkv", "bert:convbert"]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_compiles_whole(name):
    """The encoder in one graph, forward and backward."""
    torch.compiler.reset()
    model, inputs, _ = training_inputs(name)
    encoder = model.model.encoder if name.startswith("seq2seq") else model.bert
    compiled = torch.compile(encoder, fullgraph=True, backend="aot_eager")
    expected = encoder(*inputs).last_hidden_state
    actual = compiled(*inputs).last_hidden_state
    torch.testing.assert_close(actual, expected)
    actual.square().sum().backward()
    found = {n: p.grad for n, p in encoder.named_parameters()}
    encoder.zero_grad()
    encoder(*inputs).last_hidden_state.square().sum().backward()
    for name, parameter in encoder.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-4, msg=name)


# -- what a model costs -----------------------------------------------------------------------------------------------


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


# -- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixer": "recurrent"}, "argument 'mixer': expected one of .*, got 'recurrent'"),
        ({"norm_placement": "sandwich"}, "argument 'norm_placement'"),
        ({"num_heads": 5}, "argument 'num_heads': expected a divisor of d_model = 768, got 5"),
        ({"encoder_kernel_size": [3, 5]}, "argument 'encoder_kernel_size'.*each of 12 layers, got \\[3, 5\\]"),
        ({"pair_attention": 13}, "argument 'pair_attention'.*1 to 12, got 13"),
    ],
)
def test_bad_configurations(changes, message):
    with pytest.raises(ValueError, match=message):
        ConvSeq2SeqConfig(**changes)


def test_bad_presets_and_inputs():
    with pytest.raises(ValueError, match="preset: argument 'style': expected one of .*, got 'keras'"):
        ConvSeq2SeqConfig.preset("dynamic", style="keras")
    with pytest.raises(ValueError, match="preset: argument 'variant': expected one of .*, got 'wide'"):
        CompositeBertConfig.preset("wide")
    with pytest.raises(ValueError, match="argument 'span'"):
        bert("none", attention={"span": "nowhere"})
    with pytest.raises(ValueError, match="at most max_position_embeddings = 64 positions, got 65"):
        bert("absolute")(torch.ones(1, 65, dtype=torch.int64))
    with pytest.raises(ValueError, match="at most max_positions = 512 positions, got 513"):
        seq2seq("lightweight", "released")(text(1, 4), None, torch.ones(1, 513, dtype=torch.int64))
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        bert("none")()
    model = seq2seq("lightweight", made=ConvSeq2SeqForSequenceClassification, dual_encoder=True)
    with pytest.raises(ValueError, match="argument 'pair_input_ids': expected token ids, because of dual_encoder"):
        model(text(1, 4))


@pytest.mark.slow
def test_without_transformers():
    """The package says which extra is missing; the rest of it does not care."""
    code = """
import sys
sys.modules["transformers"] = None
import convkernels.models, convkernels.interop.fairseq, convkernels.interop.bert_convolutions
try:
    convkernels.models.ConvSeq2SeqModel
except ImportError as error:
    print(error)
"""
    root = Path(models.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    how = "pip install 'transformers>=5.17'"
    expected = f"convkernels.models.ConvSeq2SeqModel needs transformers: {how}"
    assert done.stdout.strip() == expected, done.stderr
    with pytest.raises(AttributeError, match="no attribute 'Transformer'"):
        models.Transformer  # noqa: B018
    assert set(models.__all__) <= set(dir(models))
