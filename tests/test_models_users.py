"""What users of transformers expect of any model: names of arguments, outputs on demand, losses, caches, assistants,
adapters, offloading, Auto classes."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_map

pytest.importorskip("transformers")
import transformers
from modelling import bert, ragged, seq2seq, text
from transformers import DynamicCache, EncoderDecoderCache, StaticCache

from convkernels import models
from convkernels.models.base import CACHE
from convkernels.models.cache import ConvState

PAIRS = [("transformer", "paper"), ("lightweight", "fairseq"), ("dynamic", "released")]


def generator(mixer="dynamic", style="paper", **changes):
    """A model whose greedy tokens vary."""
    model = seq2seq(mixer, style, noise=0.1, eos_token_id=None, tie_word_embeddings=False, **changes)
    with torch.no_grad():
        model.model.shared.weight.normal_(std=3)
        model.lm_head.weight.normal_()
    return model


def given():
    ids, mask = ragged(text(3, 12), [12, 7, 3])
    return dict(input_ids=ids, attention_mask=mask)


def near(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * max(expected.abs().max().item(), 1.0))


# -- the cache --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mixer", ["transformer", "dynamic"])
def test_both_names_of_the_cache(mixer):
    model, ids = generator(mixer), text(2, 6)
    with torch.no_grad():
        expected = model(ids, decoder_input_ids=ids, use_cache=False).logits[:, -1:]
        for name in ("past_key_values", "cache"):
            first = model(ids, decoder_input_ids=ids[:, :-1])
            assert CACHE in first
            rest = model(ids, decoder_input_ids=ids[:, -1:], **{name: first[CACHE]})
            near(rest.logits, expected)
            assert rest[CACHE].get_seq_length() == 6
            hidden = model.model.decoder(ids[:, :1], None, rest.encoder_last_hidden_state, **{name: rest[CACHE]})
            assert hidden[CACHE].get_seq_length() == 7
        with pytest.raises(ValueError, match="argument 'cache': expected None beside past_key_values"):
            model.model(ids, decoder_input_ids=ids, cache=first[CACHE], past_key_values=first[CACHE])
    assert {"cache", "past_key_values"} <= set(model.config.keys_to_ignore_at_inference)


@pytest.mark.parametrize("mixer", ["transformer", "dynamic"])
def test_caches_of_the_user(mixer):
    """An empty one gets the layers that the mixer needs; others are refused before anything is computed."""
    model, ids = generator(mixer), text(2, 6)
    search = dict(max_new_tokens=5, do_sample=False)
    expected = model.generate(ids, **search)
    for name in ("past_key_values", "cache"):
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        assert torch.equal(model.generate(ids, **{name: cache}, **search), expected)
        assert cache.get_seq_length() == 5
    configured = EncoderDecoderCache(DynamicCache(config=model.config), DynamicCache())
    if mixer == "transformer":
        assert torch.equal(model.generate(ids, **{CACHE: configured}, **search), expected)
    else:
        with pytest.raises(TypeError, match="2 layers ConvState, because of mixer='dynamic'.*got.*DynamicLayer"):
            model(ids, decoder_input_ids=ids, **{CACHE: configured})
    static = StaticCache(config=model.config, max_cache_len=8)
    for cache in (DynamicCache(), EncoderDecoderCache(static, DynamicCache())):
        with pytest.raises(TypeError, match="expected an EncoderDecoderCache of two DynamicCaches"):
            model.generate(ids, **{CACHE: cache}, **search)


def test_a_cache_can_be_used_again_after_a_reset():
    model, ids = generator(), text(2, 6)
    with torch.no_grad():
        cache = model(text(2, 9, skip=3), decoder_input_ids=ids)[CACHE]
        cache.reset()
        expected = model(ids, decoder_input_ids=ids).logits
        near(model(ids, decoder_input_ids=ids, **{CACHE: cache}).logits, expected)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize(("mixer", "style"), PAIRS)
def test_padding_does_not_enter_the_state(mixer, style, size):
    """One position at a time, too, a decoder gives what it gives for the whole sequence."""
    model, ids, targets = generator(mixer, style), text(2, 6), text(2, 8, skip=3)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [1, 0, 1, 1, 0, 1, 1, 1]])
    with torch.no_grad():
        full = model(ids, decoder_input_ids=targets, decoder_attention_mask=mask).logits
        cache, parts = None, []
        for t in range(0, 8, size):
            out = model(
                ids, decoder_input_ids=targets[:, t : t + size], decoder_attention_mask=mask[:, : t + size],
                use_cache=True, **{CACHE: cache},
            )  # fmt: skip
            cache = out[CACHE]
            parts.append(out.logits)
    near(torch.cat(parts, 1)[mask.bool()], full[mask.bool()])
    with pytest.raises(ValueError, match=r"'decoder_attention_mask': expected shape \[B,L\] = \[2, 9\], 8 columns of"):
        model(ids, decoder_input_ids=ids[:, :1], decoder_attention_mask=mask[:, :1], **{CACHE: cache})


def test_a_step_of_a_module_takes_a_mask():
    from convkernels.nn import DepthwiseConv1d, DynamicConv1d, LightweightConv1d

    x, gate = torch.randn(2, 2, 7, 4)
    mask = torch.rand(2, 7) < 0.6
    x[~mask] = gate[~mask] = torch.nan
    options = dict(padding="causal", backend="reference")
    convs = [DepthwiseConv1d(4, 3, **options), LightweightConv1d(4, 3, 2, **options), DynamicConv1d(4, 3, 2, **options)]
    for conv in convs:
        with torch.no_grad():
            full, final = conv(x, mask, gate=gate, return_state=True)
            state = conv.init_state(2)
            steps = [conv.step(x[:, t], state, gate=gate[:, t], mask=mask[:, t]) for t in range(7)]
        near(torch.stack(steps, 1)[mask], full[mask])
        near(state, final)


@pytest.mark.parametrize("mixer", ["transformer", "dynamic", "dilated"])
def test_assisted_decoding_and_prompt_lookup(mixer):
    """Rejected drafts are taken back: the tokens are those of greedy decoding."""
    model, ids = generator(mixer), text(1, 9)
    search = dict(max_new_tokens=24, do_sample=False)
    expected = model.generate(ids, **search)
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=3, **search), expected)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.add_(torch.randn_like(other.lm_head.weight), alpha=0.2)
    assert torch.equal(model.generate(ids, assistant_model=other, **search), expected)


def test_crop_takes_back_what_was_recorded():
    model, targets = generator("dilated"), text(2, 12)
    states = torch.randn(2, 5, 32)
    run = lambda ids, cache: model.model.decoder(ids, None, states, cache=cache).last_hidden_state  # noqa: E731
    with torch.no_grad():
        full = run(targets, None)
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        run(targets[:, :3], cache)
        cache.activate_past_recording()
        for start, end in ((3, 4), (4, 8), (8, 9)):
            run(targets[:, start:end].flip(0) if start == 8 else targets[:, start:end], cache)
        cache.crop(-3)  # one whole call and half of another
        assert cache.get_seq_length() == 6
        with pytest.raises(NotImplementedError, match="does not hold what came before it"):
            cache.crop(-1)
        cache.batch_select_indices(torch.tensor([1, 0]))
        cache.reorder_cache(torch.tensor([1, 0]))
        near(run(targets[:, 6:8], cache), full[:, 6:8])
        cache.crop(0)
        near(run(targets[:, 8:], cache), full[:, 8:])
    assert isinstance(cache.self_attention_cache.layers[0], ConvState)


# -- outputs ----------------------------------------------------------------------------------------------------------


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
    from convkernels.interop import huggingface

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


MODELS = {
    "seq2seq": lambda: seq2seq("dynamic", "released", noise=0.1),
    "encoder": lambda: seq2seq("lightweight", made=models.ConvSeq2SeqForSequenceClassification),
    "bert": lambda: bert("absolute", noise=0.1),
    "labels": lambda: bert("composite", made=models.CompositeBertForSequenceClassification, num_labels=3),
    "tokens": lambda: bert("composite", made=models.CompositeBertForTokenClassification, num_labels=3),
    "answers": lambda: bert("composite", made=models.CompositeBertForQuestionAnswering),
}


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


# -- losses and heads -------------------------------------------------------------------------------------------------


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


# -- inputs that do not fit -------------------------------------------------------------------------------------------


def inputs_of(name):
    """A model and all of the inputs that it takes at once."""
    ids, mask = ragged(text(3, 12), [12, 7, 3])
    targets, target_mask = ragged(text(3, 8, skip=3), [8, 5, 2])
    source = dict(input_ids=ids, attention_mask=mask)
    embeds = dict(inputs_embeds=torch.randn(3, 12, 32), attention_mask=mask)
    target = dict(decoder_input_ids=targets, decoder_attention_mask=target_mask)
    classes, places = torch.tensor([1, 0, 1]), torch.arange(12).repeat(3, 1)
    classifier, dual = dict(made=models.ConvSeq2SeqForSequenceClassification), dict(pair_input_ids=targets)
    dual |= dict(pair_attention_mask=target_mask, pair_position_ids=places[:, :8].clone(), position_ids=places)
    segments = dict(token_type_ids=mask, position_ids=places)
    labels = dict(labels=targets, decoder_attention_mask=target_mask)
    decoded = dict(decoder_inputs_embeds=torch.randn(3, 8, 32), decoder_attention_mask=target_mask)
    states = dict(encoder_outputs=(torch.randn(3, 12, 32),), attention_mask=mask)
    return {
        "labels": lambda: (MODELS["seq2seq"](), source | labels | dict(position_ids=places)),
        "decoder": lambda: (MODELS["seq2seq"](), source | target | dict(labels=targets, decoder_position_ids=targets)),
        "embeds": lambda: (MODELS["seq2seq"](), embeds | decoded),
        "states": lambda: (MODELS["seq2seq"](), states | target),
        "states labels": lambda: (seq2seq("transformer"), states | labels),
        "base": lambda: (seq2seq("lightweight").model, source | target),
        "stack": lambda: (seq2seq("dynamic").model.encoder, source),
        "decoder stack": lambda: (
            seq2seq("dynamic").model.decoder,
            source | dict(encoder_hidden_states=torch.randn(3, 8, 32), encoder_attention_mask=target_mask),
        ),
        "encoder": lambda: (seq2seq("dynamic", **classifier), source | dict(labels=classes)),
        "dual": lambda: (
            seq2seq("dynamic", "released", dual_encoder=True, **classifier), source | dual | dict(labels=classes),
        ),
        "bert": lambda: (bert("absolute"), source | segments | dict(labels=ids)),
        "bert base": lambda: (bert("absolute").bert, source | segments),
        "bert embeds": lambda: (bert("none").bert, dict(inputs_embeds=torch.randn(3, 12, 16), attention_mask=mask)),
        "classes": lambda: (MODELS["labels"](), source | dict(labels=classes)),
        "tokens": lambda: (MODELS["tokens"](), source | dict(labels=mask)),
        "answers": lambda: (MODELS["answers"](), source | dict(start_positions=classes, end_positions=classes)),
    }[name]()  # fmt: skip


CALLS = ("labels", "decoder", "embeds", "states", "states labels", "base", "stack", "decoder stack", "encoder", "dual",
         "bert", "bert base", "bert embeds", "classes", "tokens", "answers")  # fmt: skip


def computes_nothing(model):
    """From now on the modules with parameters refuse to be called."""

    def refuse(module, args):
        raise AssertionError(f"{type(module).__name__} was called")

    for module in model.modules():
        if next(module.parameters(recurse=False), None) is not None:
            module.register_forward_pre_hook(refuse)


@pytest.mark.parametrize("name", CALLS)
def test_every_input_is_checked_before_anything_is_computed(name):
    """Each in turn of the wrong kind, type, rank, number of rows (one would broadcast) and length."""
    model, inputs = inputs_of(name)
    model(**inputs)
    computes_nothing(model)
    for argument, value in inputs.items():
        packed = isinstance(value, tuple)
        value = value[0] if packed else value
        changed = [value.tolist(), value.to(torch.complex64), value[..., None, None], torch.cat([value, value])]
        if not argument.endswith("position_ids"):
            changed.append(value[:1])
        if value.dim() > 1:
            changed.append(value[:, :-1])
        for bad in changed:
            with pytest.raises((TypeError, ValueError), match=r"argument '\w+': expected .*, got ") as caught:
                model(**(inputs | {argument: (bad,) if packed else bad}))
            blamed = str(caught.value).split("'")[1]
            assert blamed in inputs or blamed == "decoder_input_ids", caught.value
            if not isinstance(bad, torch.Tensor) or bad.is_complex() or bad.dim() > value.dim():
                assert blamed == argument, caught.value


@pytest.mark.slow
@pytest.mark.parametrize("name", ["labels", "states", "dual", "bert", "answers"])
def test_checked_models_compile_and_export(name):
    """Whole, for sizes that are not fixed."""
    torch.compiler.reset()
    model, inputs = inputs_of(name)
    model.config.use_cache = False
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    halves = {argument: tree_map(lambda value: value[:2], value) for argument, value in inputs.items()}
    with torch.no_grad():
        for given in (inputs, halves):
            near(compiled(**given)[0], model(**given)[0])
        sizes = tree_map(lambda value: dict.fromkeys(range(value.dim()), torch.export.Dim.AUTO), inputs)
        if name == "states":
            sizes["encoder_outputs"][0].pop(2)
        exported = torch.export.export(model, (), inputs, dynamic_shapes=sizes).module()
        near(exported(**halves)[0], model(**halves)[0])


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("states", {"encoder_outputs": torch.randn(3, 12, 32)}, "encoder_outputs': expected the encoder's outputs, or"),
        ("states", {"encoder_outputs": ()}, "encoder_outputs': expected the encoder's outputs"),
        ("states", {"encoder_outputs": (None,)}, "encoder_outputs': expected the encoder's outputs"),
        ("states", {"attention_mask": torch.ones(1, 12)}, r"attention_mask': expected shape \[B,S\] = \[3, 12\], got"),
        ("decoder stack", {"encoder_hidden_states": None}, "encoder_hidden_states': expected a tensor, got None"),
        ("dual", {"pair_input_ids": None}, "pair_input_ids': expected token ids, because of dual_encoder"),
        ("encoder", {"pair_attention_mask": torch.ones(3, 4)}, "pair_input_ids': expected None without dual_encoder"),
        (
            "bert",
            {"position_ids": torch.arange(12)},
            r"position_ids': expected shape \[B,T\] = \[3, 12\] or \[1,T\] = ",
        ),
        ("bert", {"attention_mask": torch.ones(3, 1, 12, 12)}, r"attention_mask': expected shape \[B,T\] = \[3, 12\]"),
    ],
)
def test_errors_say_what_was_expected(name, changes, message):
    model, inputs = inputs_of(name)
    computes_nothing(model)
    with pytest.raises((TypeError, ValueError), match=f"argument '{message}"):
        model(**(inputs | changes))


def test_outputs_of_another_encoder_and_masks_of_other_types():
    model, inputs = inputs_of("states")
    states, expected = inputs["encoder_outputs"][0], model(**inputs).logits
    pooled = transformers.modeling_outputs.BaseModelOutputWithPooling(last_hidden_state=states, pooler_output=states)
    out = model(**(inputs | dict(encoder_outputs=pooled)))
    assert torch.equal(out.logits, expected) and out.encoder_hidden_states is None
    for dtype in (torch.bool, torch.float32, torch.int32):
        assert torch.equal(model(**(inputs | dict(attention_mask=inputs["attention_mask"].to(dtype)))).logits, expected)


@pytest.mark.parametrize("mixer", ["transformer", "dynamic"])
def test_caches_of_another_batch(mixer):
    model, ids, mask = seq2seq(mixer), text(3, 6), torch.ones(3, 6)
    with torch.no_grad():
        out = model(ids, mask, ids, use_cache=True)
        states, cache = out.encoder_last_hidden_state, {CACHE: out[CACHE]}
        model.model.decoder(ids[:, :1], None, None, mask, **cache)
        computes_nothing(model)
        for rows in (1, 2):
            with pytest.raises(
                ValueError, match=f"argument '{CACHE}': expected one that holds B rows.* B = {rows}, got B = 3"
            ):
                model(ids[:rows], None, ids[:rows, :1], **cache)
        with pytest.raises(ValueError, match="S positions in the encoder, B = 3, S = 5, got B = 3, S = 6"):
            model.model.decoder(ids[:, :1], None, states[:, :5], mask[:, :5], **cache)
        with pytest.raises(
            ValueError, match=r"decoder_attention_mask': expected shape \[B,L\] = \[3, 8\], 7 columns of"
        ):
            model(ids, mask, ids[:, :1], torch.ones(3, 1), **cache)


@pytest.mark.parametrize("field", ["decoder_start_token_id", "pad_token_id"])
def test_tokens_that_making_the_input_of_a_decoder_needs(field):
    """As in transformers' own models; whoever gives the decoder's input does not need them."""
    model, ids = seq2seq("lightweight", **{field: None}), text(2, 6)
    expected = f"ConditionalGeneration: argument 'config.{field}': expected a token.*decoder_input_ids.*got None"
    for call in (model.prepare_decoder_input_ids_from_labels, lambda labels: model(ids, labels=labels)):
        with pytest.raises(ValueError, match=expected):
            call(ids)
    assert model(ids, decoder_input_ids=ids, labels=ids).loss.isfinite()


def test_places_outside_the_text_are_ignored():
    """Before it, too, where transformers' own heads count the first token."""
    model, rest = MODELS["answers"](), given()
    out = model(**rest, start_positions=torch.tensor([4, -1, -100]), end_positions=torch.tensor([[6], [12], [-1]]))
    expected = F.cross_entropy(out.start_logits[:1], torch.tensor([4])) + F.cross_entropy(
        out.end_logits[:1], torch.tensor([6])
    )
    near(out.loss, expected / 2)


def test_labels_of_smaller_types():
    ids = text(3, 12)
    for model in (MODELS["tokens"](), bert("none"), seq2seq("dynamic")):
        losses = [model(ids, labels=(ids % 3).to(dtype)).loss for dtype in (torch.int64, torch.int32, torch.uint8)]
        assert torch.equal(losses[0], losses[1]) and torch.equal(losses[0], losses[2])


# -- configurations that cannot be -----------------------------------------------------------------------------------

WRONG = {
    "size": (0, -1, 1.5, "a", True),
    "count": (-1, 0.5, "a", False),
    "probability": (-0.1, 1.5, float("nan"), "a", False),
    "scale": (-1.0, float("nan"), float("inf"), "a"),
    "flag": (1, "yes"),
}
FIELDS = {
    models.ConvSeq2SeqConfig: dict(
        size="vocab_size source_vocab_size d_model d_ff num_heads head_dim num_filters conv_dim max_positions"
        " relative_buckets relative_max_distance encoder_kernel_size decoder_kernel_size dilation pair_attention",
        count="encoder_layers decoder_layers position_offset pad_token_id decoder_start_token_id",
        probability="dropout attention_dropout activation_dropout input_dropout weight_dropout",
        scale="norm_eps initializer_factor",
        flag="glu pointwise kernel_softmax mask_query depthwise_bias kernel_bias use_bias mixer_bias final_norm"
        " scale_attention scale_embedding scale_output dual_encoder",
    ),
    models.CompositeBertConfig: dict(
        size="vocab_size embedding_size hidden_size num_attention_heads intermediate_size max_position_embeddings"
        " type_vocab_size",
        count="num_hidden_layers pad_token_id",
        probability="hidden_dropout_prob attention_probs_dropout_prob classifier_dropout",
        scale="layer_norm_eps initializer_range",
        flag="absolute_positions",
    ),
}


@pytest.mark.parametrize("config", FIELDS)
def test_every_field_is_checked(config):
    cases = [(name, value) for kind, names in FIELDS[config].items() for name in names.split() for value in WRONG[kind]]
    cases += [("backend", "zzz"), ("backend", 3)]
    cases += {
        "ConvSeq2SeqConfig": [
            ("num_filters", 5), ("encoder_kernel_size", [3] * 11 + [0]), ("dilation", ["a"] * 12), ("mixer", ["a"]),
        ],
        "CompositeBertConfig": [
            ("num_attention_heads", 3), ("hidden_act", "zzz"), ("hidden_act", F.relu), ("attention", "span"),
        ],
    }[config.__name__]  # fmt: skip
    for name, value in cases:
        with pytest.raises(ValueError, match=f"{config.__name__}: argument '{name}': expected .*, got "):
            config(**{name: value})
    with pytest.raises(Exception, match="problem_type"):  # some versions of transformers check it first
        config(problem_type="zzz")
    for changes in (dict(relative_buckets=5), dict(relative_buckets=2), dict(relative_max_distance=16)):
        with pytest.raises(ValueError, match=f"argument '{next(iter(changes))}': expected"):
            models.ConvSeq2SeqConfig(mixer="transformer", **changes)


# -- embeddings that are replaced or replicated -----------------------------------------------------------------------


class Twice(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, ids):
        return 2 * self.inner(ids)


def test_stacks_follow_a_replaced_embedding():
    model, ids = seq2seq("dynamic", tie_word_embeddings=False), text(2, 6)
    keys = list(model.state_dict())
    double = copy.deepcopy(model)
    with torch.no_grad():
        double.model.shared.weight.mul_(2)
        expected = double(ids, decoder_input_ids=ids).logits
    replaced, given = copy.deepcopy(model), copy.deepcopy(model)
    replaced.model.shared = Twice(replaced.model.shared)
    given.set_input_embeddings(double.model.shared)
    for changed in (replaced, given):
        near(changed(ids, decoder_input_ids=ids).logits, expected)
        near(changed.get_encoder()(ids).last_hidden_state, double.get_encoder()(ids).last_hidden_state)
        assert changed.get_decoder().embed_tokens is changed.model.shared
    assert list(given.state_dict()) == keys and not any("encoder.embed" in key for key in keys)
    apart = seq2seq("dynamic", source_vocab_size=256).model
    apart.source = Twice(apart.source)
    assert apart.encoder.embed_tokens is apart.source and apart.decoder.embed_tokens is apart.shared


@pytest.mark.parametrize("name", ["seq2seq", "encoder", "bert"])
def test_replicas_read_their_own_embedding(name):
    """As nn.DataParallel makes them: shallow copies of the modules around other tensors."""
    model, ids = MODELS[name](), text(2, 6)
    modules = list(model.modules())
    copies = [module._replicate_for_data_parallel() for module in modules]
    known = dict(zip(modules, copies, strict=True))
    for module, replica in known.items():
        for child, value in module._modules.items():
            replica._modules[child] = None if value is None else known[value]
        for parameter, value in module._parameters.items():
            setattr(replica, parameter, None if value is None else torch.zeros_like(value))
    out = known[model](ids, **(dict(decoder_input_ids=ids) if name == "seq2seq" else {}))
    assert not out.logits.any()


# -- adapters, quantization, offloading -------------------------------------------------------------------------------

ADAPTED = {
    "SEQ_2_SEQ_LM": [lambda mixer=mixer: seq2seq(mixer) for mixer in ("transformer", "lightweight", "dynamic")],
    "SEQ_CLS": [MODELS["encoder"], MODELS["labels"]],
    "TOKEN_CLS": [MODELS["tokens"]],
    "QUESTION_ANS": [MODELS["answers"]],
}


@pytest.mark.parametrize("task", ADAPTED)
def test_adapters(task):
    peft = pytest.importorskip("peft")
    labels = {
        "SEQ_2_SEQ_LM": dict(labels=text(3, 5)),
        "SEQ_CLS": dict(labels=torch.tensor([0, 1, 0])),
        "TOKEN_CLS": dict(labels=text(3, 12) % 3),
        "QUESTION_ANS": dict(start_positions=torch.tensor([1, 2, 0]), end_positions=torch.tensor([3, 2, 1])),
    }[task]
    for make in ADAPTED[task]:
        linear = ["query", "dense"] if task in ("TOKEN_CLS", "QUESTION_ANS") else "all-linear"  # those train the head
        model = peft.get_peft_model(make(), peft.LoraConfig(task_type=task, target_modules=linear))
        model(**given(), **labels).loss.backward()
        assert any(p.grad is not None and p.grad.any() for n, p in model.named_parameters() if "lora_B" in n)
        if task == "SEQ_2_SEQ_LM":
            model.eval().generate(**given(), max_new_tokens=3)
            base = make()
            for options in (dict(target_modules=["shared"]), dict(target_modules=["wi"], modules_to_save=["shared"])):
                tuned = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(task_type=task, **options))
                tuned(**given(), **labels).loss.backward()
                grads = {n: p.grad for n, p in tuned.named_parameters() if "shared" in n and p.requires_grad}
                assert grads and all(g is not None for g in grads.values())
                assert any(g.any() for g in grads.values())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mixer", ["dynamic", "lightweight"])
def test_quantized_models_decode(mixer):
    model = torch.ao.quantization.quantize_dynamic(generator(mixer), {nn.Linear})
    tokens = model.generate(text(2, 6), max_new_tokens=6, do_sample=False)
    assert torch.equal(tokens, model.generate(text(2, 6), max_new_tokens=6, do_sample=False, use_cache=False))


@pytest.mark.parametrize("name", ["lightweight paper", "dilated paper", "dynamic released", "bert absolute"])
def test_offloaded_models(name):
    """No parameter is read but in its module's own call, which accelerate hooks into."""
    accelerate = pytest.importorskip("accelerate")
    kind, style = name.split()
    model = bert(style, noise=0.1) if kind == "bert" else generator(kind, style)
    rest = given()
    with torch.no_grad():
        if kind == "bert":
            run = lambda: model(**rest).logits  # noqa: E731
        else:
            run = lambda: model.generate(**rest, max_new_tokens=4, do_sample=False)  # noqa: E731
        expected = run()
        accelerate.cpu_offload(model, execution_device="cpu")
        assert all(p.device.type == "meta" for p in model.parameters())
        assert torch.equal(run(), expected)
