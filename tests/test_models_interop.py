"""Models and modules of other libraries: the same numbers after conversion, under the attention interface, and after
replacement of their attention; fairseq's checkpoints and modules."""

import argparse
import copy
import io
import math
import pickle
import runpy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import convkernels as ck

pytest.importorskip("transformers")
import transformers
from modelling import ragged, text
from transformers.masking_utils import chunked_causal_mask_function, sliding_window_bidirectional_mask_function

from convkernels.interop import bert_convolutions, fairseq, huggingface
from convkernels.models import CompositeBertForMaskedLM
from convkernels.models.base import CACHE

ROOT = Path(__file__).resolve().parent.parent


def stirred(made, config):
    """A model of transformers with random parameters, norms and biases too."""
    torch.manual_seed(1)
    model = made(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def t5(**changes):
    options = dict(vocab_size=256, d_model=32, d_kv=12, d_ff=64, num_layers=2, num_heads=3, decoder_start_token_id=0)
    return stirred(transformers.T5ForConditionalGeneration, transformers.T5Config(**(options | changes)))


def bert(made="BertForMaskedLM", **changes):
    options = dict(
        vocab_size=256, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=64,
    )  # fmt: skip
    made = getattr(transformers, made)
    return stirred(made, made.config_class(**(options | changes)))


def inputs():
    ids, mask = ragged(text(3, 24), [24, 15, 3])
    return dict(input_ids=ids, attention_mask=mask)


def equal_where_real(actual, expected, mask, tolerance=1e-5):
    real = mask.bool()
    size = max(expected[real].abs().max().item(), 1.0)
    torch.testing.assert_close(actual[real], expected[real], rtol=0, atol=tolerance * size)


# -- weights of Hugging Face models -----------------------------------------------------------------------------------


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


# -- the attention interface ------------------------------------------------------------------------------------------


def llama(made="LlamaForCausalLM", **changes):
    options = dict(
        vocab_size=256, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64,
    )  # fmt: skip
    made = getattr(transformers, made)
    return stirred(made, made.config_class(**(options | changes)))


REGISTERED = {
    "bert": bert,
    "roberta": lambda: bert("RobertaForMaskedLM"),
    "t5": t5,
    "llama": llama,
    "mistral": lambda: llama("MistralForCausalLM", sliding_window=5),
}


@pytest.mark.parametrize("name", REGISTERED)
def test_under_the_attention_interface(name):
    model, given = REGISTERED[name](), inputs()
    mask = given["attention_mask"]
    if name == "t5":
        given["decoder_input_ids"], mask = text(3, 9, skip=3), torch.ones(3, 9)
    results = []
    huggingface.register()
    for implementation in ("eager", "convkernels"):
        model.set_attn_implementation(implementation)
        model.zero_grad()
        logits = model(**given).logits
        logits[mask.bool()].square().mean().backward()
        results.append((logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (expected, gradients), (actual, found) = results
    equal_where_real(actual, expected, mask)
    assert found.keys() == gradients.keys()
    for parameter, gradient in gradients.items():
        size = max(gradient.abs().max().item(), 1e-2)
        torch.testing.assert_close(found[parameter], gradient, rtol=0, atol=1e-4 * size, msg=parameter)


@pytest.mark.parametrize("name", ["T5", "MT5", "UMT5"])
@pytest.mark.parametrize("padded", [False, True])
def test_a_decoder_longer_than_the_encoder(name, padded):
    """Decoders of every length beside an encoder of 3: numbers and gradients of the bias's table too."""
    made = getattr(transformers, f"{name}ForConditionalGeneration")
    config = made.config_class(
        vocab_size=256, d_model=16, d_kv=6, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0, dropout_rate=0
    )
    model, results = stirred(made, config), []
    given = dict(input_ids=text(2, 3), attention_mask=torch.tensor([[1, 1, 1], [1, 1, 1 - padded]]))
    huggingface.register()
    for implementation in ("eager", "convkernels"):
        model.set_attn_implementation(implementation)
        model.zero_grad()
        logits = [model(**given, decoder_input_ids=text(2, T, skip=3)).logits for T in (1, 2, 3, 4, 5, 6, 13)]
        torch.cat(logits, 1).square().mean().backward()
        results.append((torch.cat(logits, 1).detach(), {n: p.grad for n, p in model.named_parameters()}))
    (expected, gradients), (actual, found) = results
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    for parameter, gradient in gradients.items():
        size = max(gradient.abs().max().item(), 1e-2)
        torch.testing.assert_close(found[parameter], gradient, rtol=0, atol=1e-4 * size, msg=parameter)


def test_distances_of_a_bias():
    """Every difference of positions has its own column, whichever of the two sequences is longer."""
    module = torch.nn.Module()
    module.config = transformers.T5Config()
    for T in range(1, 7):
        for S in range(1, 7):
            distance = torch.arange(S) - torch.arange(T)[:, None] + T - S
            table = huggingface.attention._by_distance(module, distance[None, None].float())
            assert table.tolist() == [list(range(1 - S, T))]


@pytest.mark.parametrize("name", ["t5", "llama", "mistral"])
def test_generation_under_the_attention_interface(name):
    """Prompts padded to the left, as generation wants them."""
    model = REGISTERED[name]()
    ids, mask = (value.flip(1) for value in ragged(text(3, 12), [12, 7, 3]))
    search = dict(attention_mask=mask, max_new_tokens=12, num_beams=2, do_sample=False, pad_token_id=0)
    huggingface.register()
    expected = model.generate(ids, **search)
    model.set_attn_implementation("convkernels")
    assert torch.equal(model.generate(ids, **search), expected)


def test_a_static_cache_under_the_attention_interface():
    model, ids = llama(), text(2, 6)
    huggingface.register()
    search = dict(max_new_tokens=9, do_sample=False, pad_token_id=0)
    expected = model.generate(ids, **search)
    model.set_attn_implementation("convkernels")
    for mask in (None, torch.ones_like(ids)):
        found = model.generate(ids, attention_mask=mask, cache_implementation="static", **search)
        assert torch.equal(found, expected)


CACHES = {
    "none": lambda config: None,
    "dynamic": lambda config: transformers.DynamicCache(config=config),
    "static": lambda config: transformers.StaticCache(config=config, max_cache_len=20),
}
DECODERS = {
    "llama": llama,
    "mistral": REGISTERED["mistral"],
    "qwen2": lambda: llama("Qwen2ForCausalLM", use_sliding_window=True, sliding_window=4, max_window_layers=1),
}


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("name", DECODERS)
def test_masks_of_any_width(name, kind):
    """As wide as what was written, or wider, or none, at once, in chunks and in steps: column s belongs to key s."""
    model, ids = DECODERS[name](), text(3, 13)
    huggingface.register()
    for sizes in ([13],) if kind == "none" else ([13], [6, 7], [3, 1, 1, 4, 4], [1] * 13):
        for left in (0, 5):
            mask = torch.ones(3, 13, dtype=torch.long)
            mask[1, :left] = mask[2, : 2 * left] = 0
            logits = {}
            # transformers' own need a cache for a mask that is wider than the input
            for implementation, more in (("sdpa", 0), ("convkernels", 0), ("convkernels", 7), ("convkernels", None)):
                if more is None and left:
                    continue
                model.set_attn_implementation(implementation)
                cache, parts, end = CACHES[kind](model.config), [], 0
                for size in sizes:
                    end += size
                    given = None if more is None else F.pad(mask, (0, more)) if more else mask[:, :end]
                    with torch.no_grad():
                        out = model(
                            ids[:, end - size : end], attention_mask=given, use_cache=cache is not None,
                            **{CACHE: cache},
                        )  # fmt: skip
                    parts.append(out.logits)
                logits[implementation, more] = torch.cat(parts, 1)[mask.bool()]
            expected = logits.pop(("sdpa", 0))
            for found in logits.values():
                torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("kind", CACHES)
def test_masks_that_leave_keys_out(kind):
    model, ids = llama(attn_implementation="convkernels"), text(2, 13)
    huggingface.register()
    options = {CACHE: CACHES[kind](model.config), "use_cache": kind != "none"}
    with pytest.raises(ValueError, match="'attention_mask': expected .* each of 13 keys, got bool .* \\[2, 9\\]"):
        model(ids, attention_mask=torch.ones(2, 9), **options)
    if kind != "none":
        model(ids, **options)
        with pytest.raises(ValueError, match="argument 'attention_mask': expected .* for each of 14 keys"):
            model(ids[:, :1], attention_mask=torch.ones(2, 1), **options)
    for mask in (torch.ones(2, 9), torch.ones(2, 20), torch.ones(1, 13)):
        with pytest.raises(ValueError, match="argument 'attention_mask': expected shape .* \\[2, 13\\], a column"):
            bert(attn_implementation="convkernels")(ids, attention_mask=mask)


def test_masks_decide_on_the_window():
    """Phimoe's attention does not pass it on."""
    model, (ids, mask) = llama("PhimoeForCausalLM", sliding_window=5, num_local_experts=2), inputs().values()
    huggingface.register()
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
        model.set_attn_implementation("convkernels")
        equal_where_real(model(ids, attention_mask=mask).logits, expected, mask)


@pytest.mark.parametrize("name", ["MistralForCausalLM", "Gemma3ForCausalLM"])
def test_a_static_cache_of_windows(name):
    """generate makes the masks for it beforehand."""
    huggingface.register()
    more = {} if name[0] == "M" else dict(head_dim=8, layer_types=["sliding_attention", "full_attention"])
    made = getattr(transformers, name)
    config = made.config_class if name[0] == "M" else transformers.Gemma3TextConfig
    options = dict(vocab_size=256, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    model = stirred(made, config(**options, intermediate_size=64, sliding_window=5, eos_token_id=None, **more))
    ids, mask = (value.flip(1) for value in ragged(text(3, 12), [12, 7, 3]))
    search = dict(attention_mask=mask, max_new_tokens=9, do_sample=False, pad_token_id=0)
    expected = model.generate(ids, **search)
    model.set_attn_implementation("convkernels")
    for cache in ("dynamic", "static"):
        assert torch.equal(model.generate(ids, cache_implementation=cache, **search), expected)


@pytest.mark.parametrize("name", ["Splinter", "NllbMoe"])
def test_masks_decide_what_is_causal(name):
    """Splinter's attention does not say that it is not, and that of NllbMoe's decoder says wrongly that it is not."""
    ids, mask = ragged(text(3, 12), [12, 7, 3])
    given = dict(input_ids=ids)
    options = dict(vocab_size=256, max_position_embeddings=64)
    if name == "Splinter":
        options |= dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    else:
        sides = [(f"{side}_layers", f"{side}_attention_heads", f"{side}_ffn_dim") for side in ("encoder", "decoder")]
        options |= dict(d_model=32, encoder_sparse_step=0, decoder_sparse_step=0)
        options |= {key: value for side in sides for key, value in zip(side, (2, 4, 64), strict=True)}
        given["decoder_input_ids"] = ids
    made = getattr(transformers, f"{name}Model")
    model = stirred(made, made.config_class(**options))
    huggingface.register()
    for attention_mask in (None, mask):
        results = []
        for implementation in ("eager", "convkernels"):
            model.set_attn_implementation(implementation)
            with torch.no_grad():
                results.append(model(**given, attention_mask=attention_mask).last_hidden_state)
        equal_where_real(results[1], results[0], mask)


EAGER = [
    "BigBird", "BigBirdPegasus", "Bloom", "Canine", "ConvBert", "IBert", "LED", "Luke", "MPNet", "MegatronBert", "Mpt",
    "LayoutLM", "MarkupLM", "Nystromformer", "RemBert", "RoFormer",
]  # fmt: skip


@pytest.mark.parametrize("name", EAGER)
def test_models_without_the_interface_refuse_it(name):
    """They would add its masks to their scores, or do without."""
    made = getattr(transformers, f"{name}Model")
    sizes = dict(
        vocab_size=256, hidden_size=32, n_embed=32, d_model=32, num_hidden_layers=1, num_attention_heads=4,
        intermediate_size=64, attention_window=4,
    )  # fmt: skip
    known = made.config_class().to_dict()
    config = made.config_class(**{key: value for key, value in sizes.items() if key in known})
    huggingface.register()
    huggingface.register()
    expected = f"{name}Model: argument 'attn_implementation': expected 'eager', because .* got 'convkernels'"
    derived = type(made.__name__, (made,), {"__module__": __name__})  # elsewhere than its attention
    for model in (derived, made):
        with torch.device("meta"), pytest.raises(ValueError, match=expected):
            model._from_config(copy.deepcopy(config), attn_implementation="convkernels")


def test_what_the_interface_refuses():
    huggingface.register()
    q = torch.randn(1, 2, 4, 8)
    module = torch.nn.Module()
    with pytest.raises(NotImplementedError, match="argument 'softcap': expected None, .* got 30.0"):
        huggingface.attention_forward(module, q, q, q, None, softcap=30.0)
    for argument in ("s_aux", "sinks", "cu_seq_lens_q", "head_mask"):
        with pytest.raises(NotImplementedError, match=f"argument '{argument}': expected None, because"):
            huggingface.attention_forward(module, q, q, q, None, **{argument: torch.zeros(2)})
    with pytest.raises(
        NotImplementedError, match="argument 'output_attentions': expected None, .*'eager' may.*, got True"
    ):
        llama(attn_implementation="convkernels")(text(1, 8), output_attentions=True)
    with pytest.raises(ValueError, match="argument 'attention_mask': expected a bool tensor.* \\[1, 1, 4, 4\\]"):
        huggingface.attention_forward(module, q, q, q, torch.zeros(1, 1, 4, 4))
    with pytest.raises(NotImplementedError, match="argument 'position_bias': expected that of one of"):
        huggingface.attention_forward(module, q, q, q, None, position_bias=torch.zeros(1, 2, 4, 4))
    model = llama(attn_implementation="convkernels")
    ids = text(1, 8)
    packed = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
    with pytest.raises(NotImplementedError, match="argument 'mask_function': expected the causal"):
        model(ids, position_ids=packed, use_cache=False)
    for mask in (chunked_causal_mask_function(4, torch.zeros(1)), sliding_window_bidirectional_mask_function(4)):
        with pytest.raises(NotImplementedError, match="argument 'mask_function': expected the causal"):
            huggingface.padding_mask(1, 8, 8, mask_function=mask)


# -- replacement ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["BertForMaskedLM", "RobertaForMaskedLM", "ElectraForMaskedLM"])
def test_replaced_attention_computes_the_same_until_it_is_trained(name):
    model, given = bert(name), inputs()
    expected = model(**given).logits.detach()
    terms = dict(window=3, bias=True, query_rel=True, key_rel=True, value_conv=True)
    assert huggingface.replace_attention(model, **terms) is model
    equal_where_real(model(**given).logits, expected, given["attention_mask"])
    new = {n: p for n, p in model.named_parameters() if ".attention.conv" in n and p.requires_grad}
    assert len(new) == 2 * 5
    model(**given, labels=given["input_ids"]).loss.backward()
    torch.optim.SGD(new.values(), lr=1.0).step()
    assert all(parameter.grad.any() for parameter in new.values())
    assert (model(**given).logits - expected).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["lightweight", "dynamic"])
def test_replaced_by_a_convolution(kind):
    model, given = bert(), inputs()
    old = model.bert.encoder.layer[1].attention.self
    huggingface.replace_attention(model, kind, layers=[1], kernel_size=5, filters=2)
    new = model.bert.encoder.layer[1].attention.self
    assert new.value is old.value and new.conv.heads == 2 and new.conv.kernel_size == 5
    assert type(model.bert.encoder.layer[0].attention.self) is type(old)
    wide = {name: F.pad(value, (0, 5)) for name, value in given.items()}
    with torch.no_grad():
        logits, padded = model(**given).logits, model(**wide).logits
    equal_where_real(padded[:, :24], logits, given["attention_mask"], 1e-6)
    model(**given, labels=given["input_ids"]).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in new.parameters())


def test_replaced_projections_keep_the_linear_half():
    model, given = bert(), inputs()
    old = model.bert.encoder.layer[0].attention.self.query.weight.detach().clone()
    huggingface.replace_attention(model, query_key="mixed", value="mixed", bias=True)
    new = model.bert.encoder.layer[0].attention.self.attention
    assert torch.equal(new.query_linear.weight, old[16:])
    assert model(**given).logits.isfinite().all()


@pytest.mark.parametrize("kind", ["composite", "lightweight"])
def test_replaced_modules_refuse_what_they_cannot_do(kind):
    """Whatever the installed transformers calls a cache, and without a word lost on what changes nothing."""
    model = bert("BertLMHeadModel", is_decoder=True, bos_token_id=1, eos_token_id=255)
    huggingface.replace_attention(model, kind)
    ids = text(2, 5)
    search = dict(attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
    with pytest.raises(
        NotImplementedError, match="replace_attention: argument '(cache|past_key_values)': expected None"
    ):
        model.generate(ids, use_cache=True, **search)
    assert model.generate(ids, use_cache=False, **search).shape == (2, 8)
    module, x = model.get_submodule("bert.encoder.layer.0.attention.self"), torch.randn(2, 5, 32)
    for argument in ("cache", "past_key_values", "past_key_value"):
        with pytest.raises(NotImplementedError, match=f"argument '{argument}': expected None.* got a DynamicCache"):
            module(x, **{argument: transformers.DynamicCache()})
    for argument in ("encoder_hidden_states", "position_embeddings", "sinusoidal_pos", "head_mask"):
        with pytest.raises(NotImplementedError, match=f"argument '{argument}': expected None.* got float32 tensor"):
            module(x, **{argument: x})
    with pytest.raises(NotImplementedError, match="argument 'output_attentions': expected None.* got True"):
        model(ids, output_attentions=True, use_cache=False)
    with pytest.raises(NotImplementedError, match="argument 'number 3'"):
        module(x, None, x)
    harmless = dict(num_items_in_batch=torch.tensor(3), position_ids=torch.arange(5)[None], output_hidden_states=True)
    assert torch.equal(module(x, cache=None, output_attentions=False, **harmless)[0], module(x)[0])


def test_cross_attention_is_not_replaced():
    model = bert("RemBertForCausalLM", is_decoder=True, add_cross_attention=True)
    found = huggingface.replacement._self_attention(model)
    assert len(found) == 2 and not any("cross" in name for name in found)


def test_bad_replacements():
    with pytest.raises(ValueError, match="argument 'kind': expected 'composite', 'light.*', got 'rnn'"):
        huggingface.replace_attention(bert(), "rnn")
    with pytest.raises(ValueError, match="argument 'model': expected self-attention .*, got LlamaForCausalLM"):
        huggingface.replace_attention(llama())
    with pytest.raises(ValueError, match="argument 'layers': expected numbers from 0 to 1, got \\[2\\]"):
        huggingface.replace_attention(bert(), layers=[2])
    for layers in (0, "0", [0.5], [-1], [None], torch.tensor(0)):
        with pytest.raises(ValueError, match="argument 'layers': expected numbers from 0 to 1, got"):
            huggingface.replace_attention(bert(), layers=layers)
    model = bert()
    types = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match="argument 'layers': expected each layer once, got \\[0, 0\\]"):
        huggingface.replace_attention(model, layers=[0, 0])
    with pytest.raises(ValueError, match="argument 'window'"):
        huggingface.replace_attention(model, window=-3)
    with pytest.raises(ValueError, match="argument 'kernel_size': expected None, because kind='composite'"):
        huggingface.replace_attention(model, kernel_size=5)
    with pytest.raises(ValueError, match="argument 'heads': expected a positive integer"):
        huggingface.replace_attention(model, "dynamic", filters=0)
    for kind, name, other in (
        ("composite", "biass", "bias"),
        ("composite", "dropout", "span"),
        ("dynamic", "window", "dilation"),
        ("dynamic", "query_size", "in_proj"),
    ):
        expected = f"argument '{name}': expected an argument of kind='{kind}': .*{other}.*, got {name}"
        with pytest.raises(TypeError, match=expected):
            huggingface.replace_attention(model, kind, **{name: 1})
    assert [type(module) for module in model.modules()] == types
    for layers in ([True], [0, False]):
        with pytest.raises(ValueError, match="argument 'layers': expected numbers from 0 to 1, got"):
            huggingface.replace_attention(model, layers=layers)
    for other in (model.bert.encoder, torch.nn.Sequential(model), torch.compile(model), None):
        with pytest.raises(TypeError, match="argument 'model': expected a transformers.PreTrainedModel, as it is"):
            huggingface.replace_attention(other)
    for name in ("LayoutLM", "Lilt", "MarkupLM", "MobileBert", "Nystromformer", "RoFormer"):
        other = bert(f"{name}Model", hidden_size=48)
        with pytest.raises(ValueError, match=f"argument 'model': expected self-attention of hidden_.*, got {name}"):
            huggingface.replace_attention(other)


def test_replaced_maps_without_bias():
    model, given = bert(), inputs()
    for module in model.modules():
        if hasattr(module, "query"):
            module.query.bias = module.key.bias = module.value.bias = None
    expected = model(**given).logits.detach()
    huggingface.replace_attention(model)
    equal_where_real(model(**given).logits, expected, given["attention_mask"])


def test_replacement_in_a_model_that_computes_its_attention_itself():
    """All of it, because what is left would add the mask to its scores."""
    ids, mask = inputs().values()
    model = bert("MegatronBertModel")
    with pytest.raises(ValueError, match="argument 'layers': expected None, because the other layers .*, got \\[1\\]"):
        huggingface.replace_attention(model, layers=[1])
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).last_hidden_state
        huggingface.replace_attention(model)
        equal_where_real(model(ids, attention_mask=mask).last_hidden_state, expected, mask)


def test_the_example(capsys):
    runpy.run_path(str(ROOT / "examples" / "drop_in.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    first, last = (float(line.rpartition(" ")[2]) for line in lines[-2:])
    assert last < first
    readme = (ROOT / "README.md").read_text()
    assert "examples/drop_in.py" in readme


# -- fairseq ----------------------------------------------------------------------------------------------------------


def fairseq_state(args, sizes, old_names=False):
    """Random parameters under fairseq's names."""
    torch.manual_seed(2)
    C, F_, H = args.encoder_embed_dim, args.encoder_ffn_embed_dim, args.encoder_attention_heads
    state = {}

    def linear(name, outputs, inputs):
        state[f"{name}.weight"] = torch.randn(outputs, inputs, dtype=torch.float64) * inputs**-0.5
        state[f"{name}.bias"] = torch.randn(outputs, dtype=torch.float64) * 0.1

    def norm(name):
        state[f"{name}.weight"] = 1 + 0.1 * torch.randn(C, dtype=torch.float64)
        state[f"{name}.bias"] = 0.1 * torch.randn(C, dtype=torch.float64)

    for stack, taps in (("encoder", args.encoder_kernel_size_list), ("decoder", args.decoder_kernel_size_list)):
        table = torch.randn(sizes[stack], C, dtype=torch.float64) * C**-0.5
        if args.share_all_embeddings and stack == "decoder":
            table = state["encoder.embed_tokens.weight"]
        state[f"{stack}.embed_tokens.weight"] = table
        state[f"{stack}.embed_positions._float_tensor"] = torch.zeros(1)
        state[f"{stack}.version"] = torch.tensor([2.0])
        for i, K in enumerate(taps):
            prefix = f"{stack}.layers.{i}."
            linear(prefix + "linear1", 2 * C if args.encoder_glu else C, C)
            linear(prefix + "linear2", C, C)
            linear(prefix + "fc1", F_, C)
            linear(prefix + "fc2", C, F_)
            if args.encoder_conv_type == "lightweight":
                state[prefix + "conv.weight"] = torch.randn(H, 1, K, dtype=torch.float64)
            else:
                state[prefix + "conv.weight_linear.weight"] = torch.randn(H * K, C, dtype=torch.float64) * 0.3
                state[prefix + "conv.conv_bias"] = torch.randn(1, 1, C, dtype=torch.float64)
            if stack == "encoder":
                for number in (1, 2):
                    norm(prefix + (f"layer_norms.{number - 1}" if old_names else f"layer_norm{number}"))
                continue
            for name in ("conv_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"):
                norm(prefix + name)
            if old_names:
                state[prefix + "encoder_attn.in_proj_weight"] = torch.randn(3 * C, C, dtype=torch.float64) * C**-0.5
                state[prefix + "encoder_attn.in_proj_bias"] = torch.randn(3 * C, dtype=torch.float64)
                linear(prefix + "encoder_attn.out_proj", C, C)
            else:
                for name in "qkv":
                    linear(prefix + f"encoder_attn.{name}_proj", C, C)
                linear(prefix + "encoder_attn.out_proj", C, C)
        if args.encoder_normalize_before:
            norm(f"{stack}.layer_norm")
    if not args.share_decoder_input_output_embed:
        state["decoder.embed_out"] = torch.randn(sizes["decoder"], C, dtype=torch.float64) * C**-0.5
    return state


def fairseq_forward(args, state, source, target, pad=1):
    """fairseq's model written out: one convolution tap after the other, positions as sines beside cosines."""
    C, H = args.encoder_embed_dim, args.encoder_attention_heads
    pre = args.encoder_normalize_before

    def linear(name, x):
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(name, x):
        return F.layer_norm(x, (C,), state[f"{name}.weight"], state[f"{name}.bias"], 1e-5)

    def add(name, x, branch):
        return x + branch(norm(name, x)) if pre else norm(name, x + branch(x))

    def embed(stack, ids):
        place = (ids != pad).long().cumsum(1) * (ids != pad) + pad
        rates = torch.exp(torch.arange(C // 2) * -(math.log(10000) / (C // 2 - 1)))
        angles = place[..., None].float() * rates
        positions = torch.cat([angles.sin(), angles.cos()], 2) * (ids != pad)[..., None]
        return C**0.5 * state[f"{stack}.embed_tokens.weight"][ids] + positions

    def convolve(prefix, x, K, left, padding):
        x = linear(prefix + "linear1", x)
        if args.encoder_glu:
            x = F.glu(x, -1)
        if padding is not None:
            x = x.masked_fill(padding[..., None], 0)
        if args.encoder_conv_type == "lightweight":
            taps = state[prefix + "conv.weight"].view(H, K).expand(*x.shape[:2], H, K)
        else:
            taps = F.linear(x, state[prefix + "conv.weight_linear.weight"]).unflatten(2, (H, K))
        taps = taps.softmax(-1)
        y = torch.zeros_like(x).unflatten(2, (H, -1))
        for t in range(x.shape[1]):
            for j in range(K):
                if 0 <= t + j - left < x.shape[1]:
                    y[:, t] += taps[:, t, :, j, None] * x[:, t + j - left].unflatten(1, (H, -1))
        return linear(prefix + "linear2", y.flatten(2))

    def feed_forward(prefix, x):
        return linear(prefix + "fc2", linear(prefix + "fc1", x).relu())

    def attend(prefix, x, states, padding):
        if prefix + "encoder_attn.in_proj_weight" in state:
            weights = state[prefix + "encoder_attn.in_proj_weight"].chunk(3)
            biases = state[prefix + "encoder_attn.in_proj_bias"].chunk(3)
            q, k, v = (F.linear(z, w, b) for z, w, b in zip((x, states, states), weights, biases, strict=True))
        else:
            q, k, v = (
                linear(f"{prefix}encoder_attn.{n}_proj", z) for n, z in zip("qkv", (x, states, states), strict=True)
            )
        q, k, v = (z.unflatten(2, (H, -1)).transpose(1, 2) for z in (q, k, v))
        scores = (q * (C // H) ** -0.5) @ k.transpose(2, 3)
        scores = scores.masked_fill(padding[:, None, None], -math.inf)
        return linear(prefix + "encoder_attn.out_proj", (scores.softmax(-1) @ v).transpose(1, 2).flatten(2))

    padding = source == pad
    x = embed("encoder", source)
    for i, K in enumerate(args.encoder_kernel_size_list):
        prefix = f"encoder.layers.{i}."
        names = [
            prefix + n
            for n in (("layer_norms.0", "layer_norms.1"), ("layer_norm1", "layer_norm2"))[
                prefix + "layer_norm1.weight" in state
            ]
        ]
        x = add(names[0], x, lambda z, p=prefix, K=K: convolve(p, z, K, K // 2, padding))
        x = add(names[1], x, lambda z, p=prefix: feed_forward(p, z))
    states = norm("encoder.layer_norm", x) if pre else x
    x = embed("decoder", target)
    for i, K in enumerate(args.decoder_kernel_size_list):
        prefix = f"decoder.layers.{i}."
        x = add(prefix + "conv_layer_norm", x, lambda z, p=prefix, K=K: convolve(p, z, K, K - 1, None))
        x = add(prefix + "encoder_attn_layer_norm", x, lambda z, p=prefix: attend(p, z, states, padding))
        x = add(prefix + "final_layer_norm", x, lambda z, p=prefix: feed_forward(p, z))
    x = norm("decoder.layer_norm", x) if pre else x
    return x @ state.get("decoder.embed_out", state["decoder.embed_tokens.weight"]).T


CHECKPOINTS = {
    "dynamic, one vocabulary": dict(),
    "lightweight, two vocabularies": dict(
        encoder_conv_type="lightweight", share_all_embeddings=False, encoder_glu=False,
        share_decoder_input_output_embed=False,
    ),
    "old names, norm first": dict(old_names=True, encoder_normalize_before=True),
}  # fmt: skip


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_fairseq_checkpoints(name, tmp_path):
    changes = dict(CHECKPOINTS[name])
    old_names = changes.pop("old_names", False)
    options = dict(
        encoder_embed_dim=16, encoder_ffn_embed_dim=24, encoder_attention_heads=4, encoder_normalize_before=False,
        encoder_conv_type="dynamic", encoder_glu=True, encoder_kernel_size_list=[3, 7],
        decoder_kernel_size_list=[3, 5, 7],
        share_all_embeddings=True, share_decoder_input_output_embed=True, weight_softmax=True, dropout=0.1,
        max_source_positions=64, max_target_positions=64,
    ) | changes  # fmt: skip
    options |= {
        n.replace("encoder", "decoder"): v for n, v in options.items() if n.startswith("encoder") and "kernel" not in n
    }
    args = argparse.Namespace(**options)
    sizes = {"encoder": 50, "decoder": 50 if options["share_all_embeddings"] else 40}
    state = fairseq_state(args, sizes, old_names)
    torch.save({"args": args, "model": state}, tmp_path / "checkpoint.pt")
    model = fairseq.load_checkpoint(tmp_path / "checkpoint.pt")
    source = torch.randint(4, 50, (2, 9))
    source[1, 6:] = 1
    target = torch.randint(4, 40, (2, 8))
    target[:, 0] = 2
    expected = fairseq_forward(args, state, source, target)
    with torch.no_grad():
        actual = model(source, (source != 1).long(), target).logits
        again = fairseq.load_checkpoint({"cfg": {"model": vars(args)}, "model": state}, backend="reference")
        assert torch.allclose(again(source, source != 1, target).logits, actual)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)  # the sines are float32
    search = dict(attention_mask=(source != 1).long(), max_new_tokens=20, num_beams=3, do_sample=False)
    tokens = model.generate(source, **search)
    assert tokens[0, 0] == 2 and torch.equal(tokens, model.generate(source, use_cache=False, **search))


def test_fairseq_checkpoints_that_cannot_be_loaded():
    args = dict(encoder_embed_dim=16, encoder_attention_heads=4, adaptive_softmax_cutoff="10,20")
    with pytest.raises(ValueError, match="argument 'adaptive_softmax_cutoff': expected None, got '10,20'"):
        fairseq.config_from_args(args, {})
    args = dict(encoder_embed_dim=16, decoder_embed_dim=32)
    with pytest.raises(ValueError, match="argument 'embed_dim': expected one value for both stacks, got 16 and 32"):
        fairseq.config_from_args(args, {})
    with pytest.raises(ValueError, match="'self_attn.weight' is no parameter of a LightConv encoder layer"):
        fairseq.layer_state({"self_attn.weight": torch.zeros(1)}, "encoder")


MODULES = {
    "light": lambda **o: fairseq.LightweightConv1dTBC(16, 7, 6, 4, weight_softmax=True, bias=True, **o),
    "dynamic": lambda **o: fairseq.DynamicConv1dTBC(16, 7, 6, 4, weight_softmax=True, bias=True, conv_bias=True, **o),
    "renormalized": lambda **o: fairseq.DynamicConv1dTBC(16, 7, 6, 4, weight_softmax=True, renorm_padding=True, **o),
    "query": lambda **o: fairseq.DynamicConv1dTBC(16, 7, 6, 4, weight_softmax=True, query_size=8, **o),
}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_fairseq_modules_step_by_step(name, backend):
    """With incremental_state, beams reordered on the way, as with the whole sequence at once."""
    if ck.why_not(backend):
        pytest.skip("; ".join(ck.why_not(backend)))
    module = MODULES[name](backend=backend)
    x, order = torch.randn(17, 3, 16), torch.tensor([2, 0, 0])
    query = {"query": torch.randn(17, 3, 8)} if name == "query" else {}
    rows = torch.cat([x[:9, order], x[9:]])
    queries = {k: torch.cat([v[:9, order], v[9:]]) for k, v in query.items()}
    expected = module(rows, **queries)
    state, other = {}, MODULES[name](backend=backend)
    for t in range(17):
        if t == 9:
            module.reorder_incremental_state(state, order)
        y = module(x[t : t + 1], state, **{k: v[t : t + 1] for k, v in query.items()})
        if t >= 9:
            torch.testing.assert_close(y[0], expected[t], rtol=1e-5, atol=1e-5)
        other(x[t : t + 1], state, **{k: v[t : t + 1] for k, v in query.items()})  # another module's state is its own
    with pytest.raises(ValueError, match="argument 'x': expected one position, because of incremental_state, got 2"):
        module(x[:2], state)


def test_copies_of_a_fairseq_module_decode_apart():
    """Layers made by deepcopy, copy and pickle share no state, as little as layers made one by one."""
    first = MODULES["light"](backend="reference")
    layers = [first, copy.deepcopy(first), copy.copy(first), pickle.loads(pickle.dumps(first))]
    x, state = torch.randn(9, 2, 16), {}
    with torch.no_grad():
        expected = x
        for layer in layers:
            expected = layer(expected)
        rows = []
        for row in x.split(1):
            for layer in layers:
                row = layer(row, state)
            rows.append(row)
    torch.testing.assert_close(torch.cat(rows), expected, rtol=1e-5, atol=1e-5)
    assert len(state) == len(layers)


def test_a_step_of_a_fairseq_module():
    module = MODULES["light"](backend="reference")
    x, state = torch.randn(5, 2, 16), module.init_state(2)
    with torch.no_grad():
        y = torch.stack([module.step(row, state) for row in x])
    torch.testing.assert_close(y, module(x).detach(), rtol=1e-5, atol=1e-5)


def test_other_forms_of_fairseq_modules_load():
    light = MODULES["light"]()
    state = dict(light.state_dict(), weight=torch.randn(4, 7))  # the CUDA form
    torch.nn.Sequential(light).load_state_dict({f"0.{name}": value for name, value in state.items()})
    assert torch.equal(light.weight[:, 0], state["weight"])
    plain = fairseq.DynamicConv1dTBC(16, 7, 6, 4, weight_softmax=True)
    unused = dict(plain.state_dict(), conv_bias=torch.randn(1, 1, 16))  # the scriptable form, which never adds it
    plain.load_state_dict(unused)
    with pytest.raises(RuntimeError, match="conv_bias"):
        fairseq.DynamicConv1dTBC(16, 7, 6, 4, weight_softmax=True, conv_bias=True).load_state_dict(unused)


class Unwanted:
    def __reduce__(self):
        return exec, ("raise SystemExit('executed')",)


def test_fairseq_files_with_values_of_numpy(tmp_path):
    """They are read, written by numpy 1 or 2; what could run code is not."""
    np = pytest.importorskip("numpy")
    file = tmp_path / "checkpoint.pt"
    values = [np.float64(3.2), np.float32(1), np.int64(4), np.bool_(True), np.arange(3), np.ones((2, 2), np.float16)]
    keys = "expected the parameters under 'model' and fairseq's arguments under 'args' or 'cfg', got "
    torch.save({"model": {}, "extra_state": {"val_loss": values}}, file)
    with pytest.raises(ValueError, match=f"load_checkpoint: argument 'checkpoint': {keys}.'extra_state', 'model'.$"):
        fairseq.load_checkpoint(file)
    content = pickle.dumps(np.float64(2.5), 2)
    old, new = b"numpy.core.multiarray", b"numpy._core.multiarray"
    for name in (old, new):
        with torch.serialization.safe_globals(fairseq._plain_types()):
            found = torch._weights_only_unpickler.load(io.BytesIO(content.replace(new, old).replace(old, name)))
        assert found == 2.5
    for unwanted in (Unwanted(), np.array([None], dtype=object)):
        torch.save({"model": {}, "args": unwanted}, file)
        with pytest.raises(ValueError, match="argument 'checkpoint': expected a file of parameters.*, got one with"):
            fairseq.load_checkpoint(file)
    for content in ({"model": {}}, {"model": {}, "cfg": {}}, {"args": {}}):
        with pytest.raises(ValueError, match=keys):
            fairseq.load_checkpoint(content)


def test_fairseq_files_that_are_something_else(tmp_path):
    np = pytest.importorskip("numpy")
    file, args = tmp_path / "checkpoint.pt", argparse.Namespace()
    for content in (b"hello", b"", b"PK\x03\x04", pickle.dumps([1], 2)[:-3], b"\x80\x02."):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="argument 'checkpoint': expected a file that torch.save wrote.*kpoint.pt"):
            fairseq.load_checkpoint(file)
    keys = "load_checkpoint: argument 'checkpoint': expected the parameters under 'model' and fairseq's arguments under"
    for content in ([1], torch.ones(2), {"model": {}, "cfg": "x"}, {"model": {}, "cfg": [1]}, {"model": {}, "args": 3}):
        torch.save(content, file)
        with pytest.raises(ValueError, match=f"{keys} 'args' or 'cfg'.*, got"):
            fairseq.load_checkpoint(file)
    torch.save({"model": {}, "args": np.datetime64("2020-01-01")}, file)
    with pytest.raises(ValueError, match="got one with numpy.dtypes.DateTime64DType in it"):
        fairseq.load_checkpoint(file)
    for state in (None, {}, [1], {"encoder.embed_tokens.weight": 3}):
        with pytest.raises(ValueError, match="argument 'checkpoint': expected tensors by name as the parameters, got"):
            fairseq.load_checkpoint({"model": state, "args": args})
    with pytest.raises(ValueError, match="'state': expected parameters of a LightConvModel with a matrix 'encoder.emb"):
        fairseq.load_checkpoint({"model": {"encoder.layers.x.weight": torch.zeros(1)}, "args": args})
    with pytest.raises(ValueError, match="argument 'checkpoint': expected a path or a dict, got 5 of type int"):
        fairseq.load_checkpoint(5)
    with pytest.raises(FileNotFoundError):
        fairseq.load_checkpoint(tmp_path / "nothing.pt")


def test_fairseq_modules_refuse_other_paddings():
    with pytest.raises(
        ValueError,
        match="LightweightConv1dTBC: argument 'padding_l': expected None or an integer from 0 to 3, got \\(1, 2\\)",
    ):
        fairseq.LightweightConv1dTBC(8, 4, (1, 2))
    assert fairseq.LightweightConv1dTBC(8, 7).padding == 3


# -- Chang et al. 2021 ------------------------------------------------------------------------------------------------


def test_bert_convolutions_from_a_directory(tmp_path):
    import json

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
