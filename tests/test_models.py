"""The models as models: storage, precision, compilation, mistakes; test_models_*.py have the rest."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
from modelling import MIXERS, VARIANTS, bert, masked, prompt, quick, seq2seq, text
from transformers import AutoModelForMaskedLM, AutoModelForSeq2SeqLM

from convkernels import models
from convkernels.models import (
    CompositeBertConfig,
    CompositeBertForSequenceClassification,
    ConvSeq2SeqConfig,
    ConvSeq2SeqForSequenceClassification,
    ConvSeq2SeqModel,
)


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
