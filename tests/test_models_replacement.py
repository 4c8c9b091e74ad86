"""Self-attention modules of transformers replaced in place: the same numbers until trained, and what is refused."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")
import transformers
from modelling import text
from stock_models import bert, equal_where_real, inputs, llama

from convkernels.interop import huggingface


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
    with pytest.raises(ValueError, match="argument 'layers': expected a list of numbers from 0 to 1, got \\[2\\]"):
        huggingface.replace_attention(bert(), layers=[2])
    for layers in (0, "0", [0.5], [-1], [None], torch.tensor(0)):
        with pytest.raises(ValueError, match="argument 'layers': expected a list of numbers from 0 to 1, got"):
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
        with pytest.raises(ValueError, match="argument 'layers': expected a list of numbers from 0 to 1, got"):
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
