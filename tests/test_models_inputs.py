"""Inputs and configurations that do not fit are refused, before anything is computed, with an error that names them."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_map

pytest.importorskip("transformers")
import transformers
from modelling import MODELS, bert, given, near, ragged, seq2seq, text

from convkernels import models
from convkernels.models.base import CACHE


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
    """As in transformers' own models; a call with the decoder's input does not need them."""
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
