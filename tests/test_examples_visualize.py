"""The pictures of trained models: which are written, that they hold the model's own numbers, and what is said where
there is nothing to draw."""

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")
pytest.importorskip("matplotlib")
pytest.importorskip("datasets")
import visualize
from modelling import bert, seq2seq
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import BertConfig, PreTrainedTokenizerFast

from convkernels import models
from convkernels.models.configs import BERT_VARIANTS

TEXT = "the cat sat on the mat and cost $5 or $6"
SEQ2SEQ = {
    "lightweight": lambda: seq2seq("lightweight", noise=0.3),
    "dilated": lambda: seq2seq("dilated", noise=0.3, dilation=[1, 2]),
    "dynamic": lambda: seq2seq("dynamic", noise=0.3, dilation=2),
    "transformer": lambda: seq2seq("transformer", noise=0.3),
    "paired": lambda: seq2seq(
        "lightweight", pair_attention=2, noise=0.3, made=models.ConvSeq2SeqForSequenceClassification
    ),
}
VARIANTS = ("none", "composite", "composite-depthwise", "conv-qk")
BOTH = (1, 2)
CROSS = [f"cross-attention-layer-{i}" for i in BOTH]
ATTENTION = [f"attention-layer-{i}" for i in BOTH]
RELATIVE = [f"relative-layer-{i}" for i in BOTH]
WRITTEN = {
    "lightweight": ["encoder-filters", "decoder-filters", *CROSS],
    "dilated": ["encoder-filters", "decoder-filters", *CROSS],
    "dynamic": [f"{stack}-filters-layer-{i}" for stack in ("encoder", "decoder") for i in BOTH] + CROSS,
    "transformer": [f"{stack}-attention-layer-{i}" for stack in ("encoder", "decoder") for i in BOTH] + CROSS,
    "paired": ["encoder-filters", "pair-attention-layer-2"],
    "none": ATTENTION,
    "composite": ["bias", *ATTENTION, *RELATIVE],
    "composite-depthwise": ["bias", "depthwise-values", *ATTENTION, *RELATIVE],
    "conv-qk": ["depthwise-query-projection", "depthwise-key-projection", *ATTENTION],
}


@pytest.fixture(scope="module")
def tokenizer():
    words = ["<pad>", "</s>", "<unk>", *sorted({*TEXT.replace("$", "$ ").split()})]
    made = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="module")
def ids(tokenizer):
    return tokenizer(TEXT, return_tensors="pt").input_ids


@pytest.fixture(scope="module")
def made():
    """The models by name; frozen, as those that the script loads."""
    kinds = SEQ2SEQ | {variant: lambda variant=variant: bert(variant, noise=0.3) for variant in VARIANTS}
    return {name: kind().requires_grad_(False) for name, kind in kinds.items()}


def saved(model, tokenizer, folder):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", WRITTEN)
def test_pictures_are_written(made, tokenizer, tmp_path, capsys, name):
    folder = saved(made[name], tokenizer, tmp_path / "model")
    paths = visualize.visualize(visualize.Arguments(folder, str(tmp_path / "pictures"), "the cat sat"))
    assert sorted(path.stem for path in paths) == sorted(WRITTEN[name])
    assert sorted(paths) == sorted((tmp_path / "pictures").iterdir())
    for path in paths:
        content = path.read_bytes()
        assert content.startswith(b"\x89PNG") and len(content) > 2000
    assert capsys.readouterr().out.splitlines() == [f"wrote {path}" for path in paths]


@pytest.mark.parametrize("name", ["lightweight", "dilated"])
def test_filters_are_those_that_the_convolution_applies(made, name):
    """A one at a position comes out at all others, weighed by the tap that sees it from there."""
    model = made[name]
    found = visualize.kernels(model)
    assert list(found) == ["encoder-filters", "decoder-filters"]
    for stack in ("encoder", "decoder"):
        for i, layer in enumerate(getattr(model.model, stack).layers, 1):
            weights, offsets, rows = found[f"{stack}-filters"][i]
            assert rows is None and weights.shape == (2, len(offsets))
            assert max(offsets) == 0 or stack == "encoder"
            close(weights.sum(1), torch.ones(2))
            x = torch.zeros(1, 41, 32)
            x[0, 20] = 1
            y = layer.mixer.conv(x)[0]
            for head, channel in ((0, 3), (1, 20)):
                wanted = torch.zeros(41)
                wanted[20 - torch.tensor(offsets)] = weights[head]
                close(y[:, channel], wanted)


def test_dynamic_filters_are_those_that_the_convolution_applies(made, tokenizer, ids):
    """Sums over taps with them are the convolution's output."""
    model, seen = made["dynamic"], {}
    mixers = {
        (stack, i): getattr(model.model, stack).layers[i - 1].mixer for stack in ("encoder", "decoder") for i in BOTH
    }

    def keep(key):
        return lambda _, inputs, given, y: seen.update({key: (inputs[0] * torch.sigmoid(given["gate"]), y)})

    hooks = [mixer.conv.register_forward_hook(keep(key), with_kwargs=True) for key, mixer in mixers.items()]
    found = visualize.maps(model, tokenizer, TEXT)
    for hook in hooks:
        hook.remove()
    T = ids.shape[1]
    assert seen.keys() == mixers.keys()
    for (stack, i), (x, y) in seen.items():
        weights, offsets, rows = found[f"{stack}-filters"][i]
        assert weights.shape == (2, T, 7) and len(rows) == T
        assert offsets == ([-6, -4, -2, 0, 2, 4, 6] if stack == "encoder" else [-12, -10, -8, -6, -4, -2, 0])
        close(weights.sum(-1), torch.ones(2, T))
        wanted = torch.zeros(T, 32)
        for tap, offset in enumerate(offsets):
            for t in range(max(0, -offset), min(T, T - offset)):
                wanted[t] += weights[:, t, tap].repeat_interleave(16) * x[0, t + offset]
        close(y[0], wanted)
    assert found["encoder-filters"][1].rows == tokenizer.tokenize(TEXT)
    assert found["decoder-filters"][1].rows == ["<pad>", *tokenizer.tokenize(TEXT)[:-1]]


@pytest.mark.parametrize("variant", VARIANTS)
def test_kernels_of_a_bert_are_its_parameters(made, variant):
    model = made[variant]
    attentions = {i: layer.attention.self for i, layer in enumerate(model.bert.encoder.layer, 1)}
    found, options = visualize.kernels(model), BERT_VARIANTS[variant]
    assert ("bias" in found, "depthwise-values" in found) == ("bias" in options, "value_conv" in options)
    for kernels in found.values():
        assert [one.columns for one in kernels.values()] == [list(range(-8, 9))] * 2
    for i, attention in attentions.items():
        if "bias" in found:
            close(found["bias"][i].weights, attention.convfixed_param.view(2, 17))
        if "depthwise-values" in found:
            by_head = attention.convolution_scalar.view(2, 1, 1) * attention.convolution.weight.view(2, 16, 17)
            close(found["depthwise-values"][i].weights, by_head.view(32, 17))
        for name in ("query", "key") if variant == "conv-qk" else ():
            kernel = getattr(attention, f"{name}_conv").weight.view(32, 17)
            close(found[f"depthwise-{name}-projection"][i].weights, kernel)


def test_lopsided_windows_and_kernels_of_other_sizes():
    attention = dict(bias=True, value_conv=True, window=[3, 1], value="conv", conv_kernel_size=7)
    found = visualize.kernels(bert("composite", attention=attention).requires_grad_(False))
    assert found["bias"][1].columns == found["depthwise-values"][1].columns == [-3, -2, -1, 0, 1]
    assert found["depthwise-value-projection"][1].columns == [-3, -2, -1, 0, 1, 2, 3]
    grouped = bert("conv-v", attention=dict(value="conv", value_groups=2)).requires_grad_(False)
    assert visualize.kernels(grouped) == {}


@pytest.mark.parametrize("variant", VARIANTS)
def test_attention_of_a_bert(made, tokenizer, ids, variant):
    model = made[variant]
    found, outputs = visualize.maps(model, tokenizer, TEXT), model(ids, output_attentions=True)
    for i, weights in enumerate(outputs.attentions, 1):
        one = found["attention"][i]
        close(one.weights, weights[0])
        close(one.weights.sum(-1), torch.ones(2, ids.shape[1]))
        assert one.rows == one.columns == tokenizer.tokenize(TEXT)
    assert ("relative" in found) == ("query_rel" in BERT_VARIANTS[variant])


def test_the_relative_terms_alone(made, tokenizer, ids):
    """Softmax of scale * q·query_rel + bias, by hand; the model is as before."""
    model = made["composite"]
    before = model(ids).logits
    found = visualize.maps(model, tokenizer, TEXT)["relative"]
    states = model(ids, output_hidden_states=True).hidden_states
    place = torch.arange(ids.shape[1])
    columns = (place - place[:, None]).clamp(-8, 8) + 8
    for i in BOTH:
        attention = model.bert.encoder.layer[i - 1].attention.self
        q = attention.query(states[i - 1])[0].view(-1, 2, 16).transpose(0, 1)
        scores = 16**-0.5 * q @ attention.convq_param + attention.convfixed_param.view(2, 1, 17)
        close(found[i].weights, scores.gather(2, columns.expand(2, -1, -1)).softmax(-1))
    assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("name", ["transformer", "lightweight"])
def test_attention_of_an_encoder_decoder(made, tokenizer, ids, name):
    model = made[name]
    found, outputs = visualize.maps(model, tokenizer, TEXT), model(ids, labels=ids, output_attentions=True)
    pairs = {"cross-attention": outputs.cross_attentions}
    if name == "transformer":
        pairs |= {"encoder-attention": outputs.encoder_attentions, "decoder-attention": outputs.decoder_attentions}
    assert found.keys() == pairs.keys()
    words = tokenizer.tokenize(TEXT)
    for title, attentions in pairs.items():
        for i, weights in enumerate(attentions, 1):
            weighed, columns, rows = found[title][i]
            close(weighed, weights[0])
            close(weighed.sum(-1), torch.ones(2, len(words)))
            before = ["<pad>", *words[:-1]]
            assert columns == (before if title == "decoder-attention" else words)
            assert rows == (words if title == "encoder-attention" else before)


def test_full_attention_between_convolutions(made, tokenizer, ids):
    found = visualize.maps(made["paired"], tokenizer, TEXT)
    assert list(found) == ["pair-attention"] and list(found["pair-attention"]) == [2]
    (weights,) = made["paired"](ids, output_attentions=True).attentions
    close(found["pair-attention"][2].weights, weights[0])


def test_pictures_hold_the_numbers(made, tokenizer):
    """Of the layers and heads that are asked for: lines of kernels, heat maps with tokens beside them."""
    model = made["composite-depthwise"]
    kernels, maps = visualize.kernels(model), visualize.maps(model, tokenizer, TEXT)
    pictures = dict(visualize.pictures(kernels | maps, [2], [1]))
    assert list(pictures) == ["bias", "depthwise-values", "attention-layer-2", "relative-layer-2"]
    (axis,) = pictures["bias"].axes
    (line,) = axis.lines
    assert axis.get_title() == "layer 2" and [text.get_text() for text in pictures["bias"].legends[0].texts] == [
        "head 1"
    ]
    assert np.array_equal(line.get_xdata(), range(-8, 9))
    assert np.array_equal(line.get_ydata(), kernels["bias"][2].weights[0])
    axis, _ = pictures["depthwise-values"].axes  # the other one is the colour bar
    assert np.array_equal(axis.images[0].get_array(), kernels["depthwise-values"][2].weights)
    assert axis.images[0].get_extent() == [-8.5, 8.5, 31.5, -0.5]
    axis, _ = pictures["attention-layer-2"].axes
    assert axis.get_title() == "head 1"
    assert np.array_equal(axis.images[0].get_array(), maps["attention"][2].weights[0])
    words = tokenizer.tokenize(TEXT)
    for labels in (axis.get_xticklabels(), axis.get_yticklabels()):
        assert [label.get_text() for label in labels] == words


def test_many_filters_are_a_heat_map():
    model = seq2seq("lightweight", "released").requires_grad_(False)
    found = visualize.kernels(model)
    figure = dict(visualize.pictures(found, [], []))["encoder-filters"]
    first, second, _ = figure.axes
    for i, axis in ((1, first), (2, second)):
        assert np.array_equal(axis.images[0].get_array(), found["encoder-filters"][i].weights)
        assert axis.get_yticklabels()[-1].get_text() == "head 32"


# Mistakes


def message(monkeypatch, *options):
    monkeypatch.setattr("sys.argv", ["visualize.py", *map(str, options)])
    with pytest.raises(SystemExit) as stopped:
        visualize.main(visualize.run)
    assert isinstance(stopped.value.code, str) and "\n" not in stopped.value.code
    return stopped.value.code


@pytest.fixture(scope="module")
def plain(made, tokenizer, tmp_path_factory):
    """The folder of a model without kernels."""
    return saved(made["none"], tokenizer, tmp_path_factory.mktemp("plain"))


def test_mistakes_are_one_line(monkeypatch, tmp_path, plain):
    to = ("--output_dir", tmp_path / "pictures")
    said = message(monkeypatch, "--model", plain, *to)
    assert said == f"visualize.py: --text: expected a text, because {plain} has no kernels to draw without one"
    assert message(monkeypatch, "--model", plain, *to, "--text", " ").endswith("--text: expected a text, got ' '")
    said = message(monkeypatch, "--model", plain, *to, "--text", TEXT, "--layers", 1, 3, 4)
    assert said.endswith("--layers: expected some of [1, 2], got [3, 4]")
    said = message(monkeypatch, "--model", plain, *to, "--text", TEXT, "--heads", 3)
    assert said.endswith("--heads: expected some of [1, 2], got [3]")
    missing = tmp_path / "missing"
    assert f"--model {missing}: " in message(monkeypatch, "--model", missing, *to)
    assert f"--tokenizer {missing}: " in message(
        monkeypatch, "--model", plain, *to, "--text", TEXT, "--tokenizer", missing
    )
    assert not (tmp_path / "pictures").exists()


def test_a_model_without_layers_or_of_another_kind_is_refused(monkeypatch, tokenizer, tmp_path):
    folder = saved(bert("composite", num_hidden_layers=0), tokenizer, tmp_path / "empty")
    to = ("--output_dir", tmp_path / "pictures")
    said = message(monkeypatch, "--model", folder, *to, "--text", TEXT)
    assert said.endswith(f"--model {folder}: there is nothing to draw")
    BertConfig(architectures=["BertModel"]).save_pretrained(tmp_path / "bert")
    said = message(monkeypatch, "--model", tmp_path / "bert", *to)
    assert said.endswith("expected a model of convkernels, got BertModel (bert)")


def test_another_tokenizer_is_noticed(monkeypatch, tokenizer, tmp_path):
    folder = saved(bert("none", vocab_size=5), tokenizer, tmp_path / "model")
    said = message(monkeypatch, "--model", folder, "--output_dir", tmp_path / "pictures", "--text", TEXT)
    assert "--tokenizer: expected that of the model, 5 tokens, got number" in said
    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"<unk>": 0, "the": 1}, "<unk>")))
    other.save_pretrained(tmp_path / "other")
    options = ("--output_dir", tmp_path / "pictures", "--text", TEXT, "--tokenizer", tmp_path / "other")
    said = message(monkeypatch, "--model", folder, *options)
    assert said.endswith(f"--tokenizer {tmp_path / 'other'}: expected the tokens of --model {folder}, got others")
