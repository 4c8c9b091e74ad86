"""Models of transformers whose relative attention this package computes: the same results, nothing else changed."""

import copy
import pickle

import pytest
import torch

pytest.importorskip("transformers")
import transformers
from modelling import quick
from relative_families import FAMILIES, given, made, real, text
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from convkernels.interop import huggingface
from convkernels.interop.huggingface.optimization import Swapped

COMPILED = quick(FAMILIES, ["deberta_v3", "t5", "bloom"])
SEQ2SEQ = [name for name, family in FAMILIES.items() if "decoder_input_ids" in family.inputs()]
CAUSAL = [name for name, family in FAMILIES.items() if family.causal]


def trained(name, model, inputs):
    """Outputs of real positions, and the gradients of all parameters."""
    model.zero_grad()
    y = model(**inputs)[FAMILIES[name].output]
    y = y[real(y, inputs)]
    torch.manual_seed(2)
    (y * torch.randn_like(y)).mean().backward()
    return y.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_near(actual, expected, tolerance):
    """Outputs relative to the largest; gradients relative to the largest of their parameter, or to a part of
    the largest of all, where what is left of them is rounding."""
    (y, gradients), (expected_y, expected_gradients) = actual, expected
    assert (y - expected_y).abs().max() <= tolerance * expected_y.abs().max()
    assert gradients.keys() == expected_gradients.keys()
    largest = max(g.abs().max() for g in expected_gradients.values())
    for n, g in expected_gradients.items():
        allowed = tolerance * max(g.abs().max(), largest / 30)
        assert (gradients[n] - g).abs().max() <= allowed, n


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", FAMILIES)
def test_training_computes_the_same(name, dtype):
    """Outputs and gradients with padding, in training mode without dropout."""
    if dtype == torch.float64 and name.startswith("inkling"):
        pytest.skip("its experts take no float64")
    model, inputs = made(name).to(dtype).train(), given(name, dtype)
    if FAMILIES[name].causal and dtype == torch.float64:  # padded queries of Bloom are NaN there
        inputs["attention_mask"] = inputs["attention_mask"].flip(1)
    expected = trained(name, model, inputs)
    report = huggingface.optimize(model)
    assert set(report.replaced.values()) <= FAMILIES[name].modules
    tolerance = 1e-5 if dtype == torch.float32 else 1e-6 if FAMILIES[name].single else 1e-9
    assert_near(trained(name, model, inputs), expected, tolerance)
    assert huggingface.restore(model) == list(report.replaced)
    again = trained(name, model, inputs)
    assert torch.equal(again[0], expected[0])


@pytest.mark.parametrize("name", FAMILIES)
def test_without_a_mask(name):
    model, inputs = made(name), given(name)
    del inputs["attention_mask"]
    expected = model(**inputs)[FAMILIES[name].output].detach()
    huggingface.optimize(model)
    torch.testing.assert_close(model(**inputs)[FAMILIES[name].output], expected, rtol=1e-4, atol=1e-5)


def written(model, **options):
    asked = dict(max_new_tokens=9, min_new_tokens=9, output_logits=True, return_dict_in_generate=True, do_sample=False)
    out = model.generate(**(asked | options))
    return out.sequences, torch.stack(out.logits)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", CAUSAL + SEQ2SEQ)
def test_generation_computes_the_same(name, cache):
    """Greedy tokens and their logits, behind padding."""
    if name.startswith("inkling") and cache == "static":
        pytest.skip("its layers keep states of convolutions, which no static cache has")
    model, inputs = made(name), given(name)
    inputs.pop("decoder_input_ids", None)
    options = dict(cache_implementation="static") if cache == "static" else {}
    if name == "pop2piano":  # whose own generate takes the features of sound
        model.generate = transformers.GenerationMixin.generate.__get__(model)
    # Falcon itself cannot count the tokens of a static cache's mask
    expected, logits = written(model, **inputs, **({} if name.startswith("falcon") else options))
    huggingface.optimize(model)
    actual, found = written(model, **inputs, **options)
    assert torch.equal(actual, expected)
    torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-5 * logits.abs().max().item())


@pytest.mark.parametrize("name", FAMILIES)
def test_nothing_else_changes(name):
    """Parameters, names, other models of that class; and restore undoes it."""
    model, other = made(name), made(name)
    before = [(type(module), dict(vars(module))) for module in model.modules()]
    implementation = model.config._attn_implementation
    state = dict(model.state_dict(keep_vars=True))
    report = huggingface.optimize(model)
    assert huggingface.optimize(model) == report
    assert not any(isinstance(module, Swapped) for module in other.modules())
    assert other.config._attn_implementation == implementation
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(state) and all(after[key] is state[key] for key in state)
    assert huggingface.restore(model) == list(report.replaced)
    assert [(type(module), dict(vars(module))) for module in model.modules()] == before
    assert model.config._attn_implementation == implementation


@pytest.mark.parametrize("name", FAMILIES)
def test_copies_and_files(name, tmp_path):
    model, inputs = made(name), given(name)
    report = huggingface.optimize(model)
    output = FAMILIES[name].output
    expected = model(**inputs)[output]
    parametrized = any(torch.nn.utils.parametrize.is_parametrized(module) for module in model.modules())
    copies = [copy.deepcopy(model)] if parametrized else [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for again in copies:
        assert torch.equal(again(**inputs)[output], expected)
        assert huggingface.optimize(again) == report
        assert huggingface.restore(again) == list(report.replaced)
        assert again.config._attn_implementation != "convkernels"
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert huggingface.restore(loaded) == [] and loaded.config._attn_implementation != "convkernels"


@pytest.mark.thin(5)
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_whole(name):
    """The modules that changed add no graph break, and compute the same when compiled."""
    model, inputs = made(name), given(name)
    breaks = []
    for change in (huggingface.restore, huggingface.optimize):
        change(model)
        torch._dynamo.reset()
        breaks.append(torch._dynamo.explain(model)(**inputs).graph_break_count)
    assert breaks[1] <= breaks[0]
    torch._dynamo.reset()
    y = torch.compile(model, backend="aot_eager")(**inputs)[FAMILIES[name].output]
    torch.testing.assert_close(y, model(**inputs)[FAMILIES[name].output], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["t5", "deberta_v3", "bloom"])
def test_gradient_checkpointing(name):
    model, inputs = made(name).train(), given(name)
    huggingface.optimize(model)
    expected = trained(name, model, inputs)
    model.gradient_checkpointing_enable()
    assert_near(trained(name, model, inputs), expected, 1e-6)


def test_lower_precision():
    """In bfloat16, as near to float32 as the stock model."""
    for name in ("t5", "deberta_v3", "wavlm", "mpt"):
        model, inputs = made(name), given(name)
        output = FAMILIES[name].output
        expected = model(**inputs)[output].detach()
        low = copy.deepcopy(model).bfloat16()
        half = given(name, torch.bfloat16)
        rows = real(expected, inputs)

        def error(model, half=half, output=output, expected=expected, rows=rows):
            return (model(**half)[output].detach().float() - expected)[rows].square().mean().sqrt()

        stock = error(low)
        huggingface.optimize(low)
        assert error(low) <= 1.2 * stock, name


class Shapes(TorchDispatchMode):
    """Of all tensors that operators return."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), options=None):
        results = function(*args, **(options or {}))
        self.seen |= {tuple(x.shape) for x in tree_leaves(results) if isinstance(x, torch.Tensor)}
        return results


@pytest.mark.parametrize("name", FAMILIES)
def test_no_tensor_of_all_pairs(name):
    """No tensor of a step of training has the length twice, so memory is linear in it; stock models make some."""
    model, inputs = made(name), given(name)
    if name == "parakeet":  # which makes a mask [B,1,T,T] of padding, once for all layers
        del inputs["attention_mask"]
    lengths = []
    for module in model.modules():
        if type(module).__name__.endswith(("Attention", "SelfAttention")):
            module.register_forward_hook(lambda m, a, o: lengths.append((o if torch.is_tensor(o) else o[0]).shape[1]))
    found = []
    for change in (huggingface.restore, huggingface.optimize):
        change(model)
        with Shapes() as shapes:
            y = model(**inputs)[FAMILIES[name].output]
            y.square().sum().backward()
        keys = {T for T in lengths if T > 12}
        found.append([shape for shape in shapes.seen if sum(size in keys for size in shape) > 1])
    assert found[0]
    assert not found[1] or name == "umt5"  # whose attention to the encoder adds zeros, [1,H,T,S]


def test_dropout_is_drawn():
    model = made("deberta_v3").train()
    huggingface.optimize(model)
    inputs = given("deberta_v3")
    assert torch.equal(model(**inputs).logits, model(**inputs).logits)
    for module in model.modules():
        if type(module).__name__ == "DisentangledSelfAttention":
            module.dropout.p = 0.5
    assert not torch.equal(model(**inputs).logits, model(**inputs).logits)


def test_padding_never_matters():
    """What stands where the mask is False changes nothing, NaN in the embeddings included."""
    model = made("deberta_v3")
    huggingface.optimize(model)
    inputs = text()
    expected = model(**inputs).logits[inputs["attention_mask"].bool()]
    inputs["input_ids"][inputs["attention_mask"] == 0] = 7
    assert torch.equal(model(**inputs).logits[inputs["attention_mask"].bool()], expected)
