"""Weights of other implementations in models of this package: T5, BERT and ConvBERT of transformers, and checkpoints
of Chang et al. 2021."""

import json

import pytest
import torch

pytest.importorskip("transformers")
from modelling import text
from stock_models import bert, equal_where_real, inputs, t5

from convkernels.interop import bert_convolutions, huggingface
from convkernels.models import CompositeBertForMaskedLM


@pytest.mark.parametrize("kind", ["relu", "gated-gelu"])
def test_t5(kind):
    theirs = t5(feed_forward_proj=kind)
    ours = huggingface.convert(theirs)
    given, targets = inputs(), text(3, 9, skip=3)
    with torch.no_grad():
        expected = theirs(**given, decoder_input_ids=targets).logits
        actual = ours(**given, decoder_input_ids=targets).logits
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    search = dict(max_new_tokens=20, num_beams=3, do_sample=False)
    assert torch.equal(theirs.generate(**given, **search), ours.generate(**given, **search))
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())


BERTS = ["BertModel", "BertForMaskedLM", "BertForSequenceClassification"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", [*BERTS, "ConvBertModel", "ConvBertForMaskedLM"])
def test_bert_and_convbert(name, dtype):
    more = dict(embedding_size=16, conv_kernel_size=5) if name.startswith("Conv") else {}
    theirs = bert(name, **more).to(dtype)
    ours = huggingface.convert(theirs)
    assert ours.dtype == dtype and not ours.training
    given = inputs()
    with torch.no_grad():
        expected, actual = theirs(**given), ours(**given)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-9
    if name == "BertForSequenceClassification":
        torch.testing.assert_close(actual.logits, expected.logits, rtol=0, atol=tolerance)
    else:
        equal_where_real(actual[0], expected[0], given["attention_mask"], tolerance)
    if name == "BertModel":
        torch.testing.assert_close(actual.pooler_output, expected.pooler_output, rtol=0, atol=tolerance)
    different = sum(p.numel() for p in ours.parameters()) - sum(p.numel() for p in theirs.parameters())
    assert different == 0


def test_what_cannot_be_converted():
    with pytest.raises(ValueError, match="convert: argument 'model': expected T5ForCond.*, got RobertaForMaskedLM"):
        huggingface.convert(bert("RobertaForMaskedLM"))
    with pytest.raises(ValueError, match="argument 'head_ratio': expected 2, got 1"):
        huggingface.convert(bert("ConvBertForMaskedLM", head_ratio=1))
    with pytest.raises(
        ValueError, match="argument 'feed_forward_proj': expected 'relu' or 'gated-gelu', got 'gated-silu'"
    ):
        huggingface.convert(t5(feed_forward_proj="gated-silu"))


@pytest.mark.parametrize(("fields", "labels"), [
    (dict(problem_type="multi_label_classification", num_labels=3), torch.tensor([[1.0, 0, 1], [0, 0, 0], [1, 1, 0]])),
    (dict(problem_type="regression", num_labels=2), torch.randn(3, 2)),
    (dict(id2label={0: "no", 1: "yes"}, label2id={"no": 0, "yes": 1}), torch.tensor([0, 1, 1])),
])  # fmt: skip
def test_the_configuration_comes_along(fields, labels):
    theirs = bert("BertForSequenceClassification", bos_token_id=7, **fields)
    ours = huggingface.convert(theirs)
    for name in ("problem_type", "id2label", "label2id", "num_labels", "bos_token_id", "return_dict"):
        assert getattr(ours.config, name) == getattr(theirs.config, name), name
    expected, given = theirs(**inputs(), labels=labels).loss, ours(**inputs(), labels=labels).loss
    torch.testing.assert_close(given, expected)


def test_the_settings_of_generation_come_along():
    theirs = t5(initializer_factor=0.5)
    theirs.generation_config.max_new_tokens, theirs.generation_config.num_beams = 3, 2
    ours = huggingface.convert(theirs)
    assert ours.generation_config.to_dict() == theirs.generation_config.to_dict()
    assert ours.generation_config is not theirs.generation_config and ours.config.initializer_factor == 0.5


def test_bert_convolutions_from_a_directory(tmp_path):
    options = dict(
        attention_kernel="qk_convfixed_convq 3", vocab_size=256, hidden_size=32, embedding_size=16, num_hidden_layers=2,
        num_attention_heads=2, intermediate_size=64, max_position_embeddings=32, remove_position_embeddings=True,
        value_forward="convolution_depth_mixed 3 1",
    )  # fmt: skip
    config = bert_convolutions.config_from_options(options)
    assert config.attention == dict(bias=True, query_rel=True, key_rel=False, value_conv=False, value_conv_scale=False,
                                    qk=True, window=3, value="mixed", conv_kernel_size=7, activation=True)  # fmt: skip
    model = CompositeBertForMaskedLM(config).eval()
    (tmp_path / "config.json").write_text(json.dumps(options))
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    again = bert_convolutions.load_checkpoint(tmp_path)
    assert torch.equal(again(**inputs()).logits, model(**inputs()).logits)
    with pytest.raises(ValueError, match="argument 'attention_kernel': expected words of .*, got 'fourier'"):
        bert_convolutions.attention_options({"attention_kernel": "fourier 8"})
    with pytest.raises(ValueError, match="argument 'options'"):
        bert_convolutions.load_checkpoint({})


def test_bert_convolutions_that_cannot_be_loaded(tmp_path):
    load, options = bert_convolutions.load_checkpoint, bert_convolutions.attention_options
    for content in ("{", "\x80", ""):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ValueError, match="argument 'checkpoint': expected JSON in .*config.json, got"):
            load(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"hello")
    with pytest.raises(ValueError, match="expected a file that torch.save wrote, got .*pytorch_model.bin"):
        load(tmp_path, {"hidden_size": 32})
    for content in ({}, [1], {"a": 3}):
        torch.save(content, tmp_path / "pytorch_model.bin")
        with pytest.raises(ValueError, match="argument 'checkpoint': expected tensors by name as the parameters, got"):
            load(tmp_path, {"hidden_size": 32})
    with pytest.raises(ValueError, match="argument 'checkpoint': expected a directory or a dict, got 5"):
        load(5)
    for wrong in ({}, [1], "x"):
        with pytest.raises(ValueError, match="argument 'options': expected a dict with 'hidden_size' in it"):
            load({"a": torch.zeros(1)}, wrong)
    with pytest.raises(ValueError, match="argument 'attention_kernel': expected a number behind 'qk_convq', got 'x'"):
        options({"attention_kernel": "qk_convq x"})
    for name in ("qk", "value_forward"):
        for wrong in ("convolution_depth", "convolution_depth 8", "convolution a 1", "convolution 8 1 2"):
            with pytest.raises(ValueError, match=f"argument '{name}': expected two numbers, reach and groups"):
                options({name: wrong})
    with pytest.raises(ValueError, match="argument 'attention_kernel': expected a string, got 3 of type int"):
        options({"attention_kernel": 3})
