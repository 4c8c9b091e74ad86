"""Outputs on demand, embeddings and positions as inputs, losses and heads, Auto classes."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")
import transformers
from modelling import MODELS, PAIRS, bert, generator, given, near, seq2seq, text

from convkernels import models
from convkernels.interop import huggingface


@pytest.mark.parametrize(("mixer", "style"), PAIRS)
def test_hidden_states_and_attentions_of_an_encoder_decoder(mixer, style):
    model, rest, targets = generator(mixer, style), given(), text(3, 8, skip=3)
    out = model(**rest, decoder_input_ids=targets, output_hidden_states=True, output_attentions=True)
    assert len(out.encoder_hidden_states) == len(out.decoder_hidden_states) == 3
    near(out.encoder_hidden_states[-1], out.encoder_last_hidden_state)
    x = out.decoder_hidden_states[-1]
    near(model.lm_head(x * (32**-0.5 if model.config.scale_output else 1.0)), out.logits)
    assert [w.shape for w in out.cross_attentions] == 2 * [(3, 2, 8, 12)]
    near(out.cross_attentions[0].sum(-1), torch.ones(3, 2, 8))
    assert not out.cross_attentions[1][1, :, :, 7:].any()
    assert (out.encoder_attentions is None) == (out.decoder_attentions is None) == (mixer != "transformer")
    if mixer == "transformer":
        assert not out.decoder_attentions[0].triu(1).any() and out.encoder_attentions[1].shape == (3, 2, 12, 12)
    model.config.output_hidden_states = True
    assert len(model(**rest, decoder_input_ids=targets).decoder_hidden_states) == 3
    assert model(**rest, decoder_input_ids=targets, output_hidden_states=False).decoder_hidden_states is None
    generated = model.generate(
        **rest, max_new_tokens=4, num_beams=2, return_dict_in_generate=True, output_hidden_states=True,
        output_attentions=True,
    )  # fmt: skip
    assert len(generated.decoder_hidden_states) == 4 and len(generated.decoder_hidden_states[0]) == 3
    assert len(generated.encoder_hidden_states) == 3 and generated.cross_attentions[3][1].shape[2:] == (1, 12)


def test_attention_weights_are_those_of_the_output():
    """Against T5's own."""
    config = transformers.T5Config(
        vocab_size=256, d_model=32, d_kv=12, d_ff=64, num_layers=2, num_heads=3, decoder_start_token_id=0,
        attn_implementation="eager",
    )  # fmt: skip
    theirs = transformers.T5ForConditionalGeneration(config).eval()
    rest = dict(**given(), decoder_input_ids=text(3, 8, skip=3), output_attentions=True)
    with torch.no_grad():
        expected, actual = theirs(**rest), huggingface.convert(theirs)(**rest)
    for name in ("encoder_attentions", "decoder_attentions", "cross_attentions"):
        for found, wanted in zip(actual[name], expected[name], strict=True):
            near(found, wanted)


@pytest.mark.parametrize("variant", ["absolute", "composite-depthwise", "conv-qkv", "convbert-output"])
def test_hidden_states_and_attentions_of_a_bert(variant):
    model, rest = bert(variant, noise=0.1), given()
    out = model(**rest, output_hidden_states=True, output_attentions=True)
    assert len(out.hidden_states) == 3 and len(out.attentions) == 2
    near(model.cls.predictions(out.hidden_states[-1]), out.logits)
    weights, layer = out.attentions[0], model.bert.encoder.layer[0].attention.self
    near(weights.sum(-1), torch.ones(weights.shape[:3]))
    assert not weights[1, :, :, 7:].any()
    if variant == "absolute":
        v = layer.value(out.hidden_states[0]).unflatten(2, (2, 16)).transpose(1, 2)
        near((weights @ v).transpose(1, 2).flatten(2), layer(out.hidden_states[0], rest["attention_mask"].bool()))
    model.config.output_attentions = True
    assert model(**rest).attentions is not None and model(**rest, output_attentions=False).attentions is None


def test_attention_weights_where_nothing_attends():
    model = seq2seq("dynamic", made=models.ConvSeq2SeqForSequenceClassification)
    with pytest.raises(ValueError, match="argument 'output_attentions': expected False, because mixer='dynamic'"):
        model(**given(), output_attentions=True)
    paired = seq2seq("dynamic", made=models.ConvSeq2SeqForSequenceClassification, pair_attention=1)
    assert [w.shape for w in paired(**given(), output_attentions=True).attentions] == [(3, 2, 12, 12)]
    dual = seq2seq("dynamic", made=models.ConvSeq2SeqForSequenceClassification, dual_encoder=True)
    out = dual(**given(), pair_input_ids=text(3, 5), output_hidden_states=True)
    assert [x.shape[1] for x in out.hidden_states] == [12, 12, 12, 5, 5, 5]


@pytest.mark.parametrize("name", MODELS)
def test_embeddings_and_tuples(name):
    """inputs_embeds and decoder_inputs_embeds give what the tokens give; return_dict=False gives a tuple."""
    model, rest = MODELS[name](), given()
    more = dict(decoder_input_ids=text(3, 5)) if name == "seq2seq" else {}
    with torch.no_grad():
        expected = model(**rest, **more)
        first = expected.to_tuple()[0]
        assert torch.equal(model(**rest, **more, return_dict=False)[0], first)
        model.config.return_dict = False
        assert isinstance(model(**rest, **more), tuple)
        model.config.return_dict = True
        embed = model.get_input_embeddings()
        more = {"decoder_inputs_embeds": embed(more["decoder_input_ids"])} if more else {}
        embeds = dict(inputs_embeds=embed(rest["input_ids"]), attention_mask=rest["attention_mask"])
        assert torch.equal(model(**embeds, **more).to_tuple()[0], first)
        if name == "seq2seq":
            states = model.get_encoder()(**embeds, return_dict=False, output_hidden_states=True)
            assert len(states) == 2 and torch.equal(model(encoder_outputs=states, **more, **rest).logits, first)
        with pytest.raises(ValueError, match="argument 'input_ids': expected either input_ids or inputs_embeds"):
            model(**rest, inputs_embeds=embeds["inputs_embeds"], **more)


def test_positions():
    for model, more in (
        (bert("absolute", noise=0.1), ("position_ids",)),
        (seq2seq("dynamic", "released", noise=0.1), ("position_ids", "decoder_position_ids")),
    ):
        ids = text(2, 6)
        rest = dict(input_ids=ids, **(dict(decoder_input_ids=ids) if len(more) > 1 else {}))
        expected, place = model(**rest).logits, torch.arange(6)[None]
        near(model(**rest, **{name: place for name in more}).logits, expected)
        for name in more:
            assert (model(**rest, **{name: place + 1}).logits - expected).abs().max() > 1e-3
    for model in (bert("composite"), seq2seq("dynamic", made=models.ConvSeq2SeqForSequenceClassification)):
        with pytest.raises(
            ValueError, match="argument 'position_ids': expected None, because the configuration has no"
        ):
            model(ids, position_ids=place)


def test_a_forgotten_input_of_the_decoder():
    with pytest.raises(ValueError, match="ConvSeq2SeqModel: argument 'decoder_input_ids': expected either decoder_"):
        seq2seq("dynamic")(text(1, 4))


@pytest.mark.parametrize("name", ["bert", "seq2seq"])
def test_classification_losses(name):
    def loss(labels, n, kind=None):
        if name == "bert":
            made = models.CompositeBertForSequenceClassification
            model = bert("composite", made=made, num_labels=n, problem_type=kind)
        else:
            made = models.ConvSeq2SeqForSequenceClassification
            model = seq2seq("lightweight", made=made, num_labels=n, problem_type=kind)
        out = model(**given(), labels=labels)
        return out.loss, out.logits

    for labels in (torch.tensor([0.5, -1.0, 2.0]), torch.tensor([1, 0, 2])):
        for shape in ((3,), (3, 1)):
            found, logits = loss(labels.view(shape), 1)
            near(found, F.mse_loss(logits[:, 0], labels.float()))
    classes = torch.tensor([1, 0, 3])
    for labels in (classes, classes[:, None]):
        found, logits = loss(labels, 4)
        near(found, F.cross_entropy(logits, classes))
    several = torch.rand(3, 4).round()
    for labels, kind in ((several, None), (several, "multi_label_classification"),
                         (several.long(), "multi_label_classification")):  # fmt: skip
        found, logits = loss(labels, 4, kind)
        near(found, F.binary_cross_entropy_with_logits(logits, several))
    found, logits = loss(several, 4, "regression")
    near(found, F.mse_loss(logits, several))
    for labels, n, kind in (
        (several, 4, "single_label_classification"),
        (classes, 4, "regression"),
        (several, 1, None),
    ):
        with pytest.raises(ValueError, match="SequenceClassification: argument 'labels': expected"):
            loss(labels, n, kind)


def test_heads_for_tokens_and_answers(tmp_path):
    theirs = transformers.BertConfig(
        vocab_size=256, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, num_labels=3,
        max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    rest, places = given(), torch.tensor([[2], [5], [99]])
    for task, labels in (
        ("TokenClassification", dict(labels=torch.randint(-1, 3, (3, 12)))),
        ("QuestionAnswering", dict(start_positions=places[:, 0], end_positions=places)),
    ):
        if "labels" in labels:
            labels["labels"][labels["labels"] < 0] = -100
        else:
            theirs.num_labels = 2
        old = getattr(transformers, f"BertFor{task}")(theirs).eval()
        made = getattr(models, f"CompositeBertFor{task}")
        changes = dict(embedding_size=32, num_labels=theirs.num_labels)
        new = bert("absolute", made=made, **changes)
        new.load_state_dict(old.state_dict(), strict=True)
        expected, found = old(**rest, **labels), new(**rest, **labels)
        near(found.loss, expected.loss)
        near(found[1][rest["attention_mask"].bool()], expected[1][rest["attention_mask"].bool()])
        new.save_pretrained(tmp_path / task)
        auto = getattr(transformers, f"AutoModelFor{task}")
        assert type(auto.from_pretrained(tmp_path / task)) is made
        cost = models.summary(made, new.config, length=16)
        assert cost.total_parameters == sum(p.numel() for p in new.parameters() if p.requires_grad)
        assert cost.flops["head"] == 2 * 16 * 32 * theirs.num_labels
    with pytest.raises(ValueError, match="argument 'end_positions': expected given where start_positions is"):
        new(**rest, start_positions=places)


@pytest.mark.slow
def test_auto_classes_know_the_models(tmp_path):
    """Once the package is imported, whatever is imported first."""
    bert("composite").save_pretrained(tmp_path)
    code = f"""
import convkernels.models
from transformers import AutoConfig, AutoModel
print(AutoConfig.from_pretrained({str(tmp_path)!r}).model_type)
print(type(AutoModel.from_pretrained({str(tmp_path)!r})).__name__)
"""
    root = Path(models.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.stdout.split() == ["composite_bert", "CompositeBertModel"], done.stderr
