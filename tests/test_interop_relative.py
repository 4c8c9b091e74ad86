"""Models of transformers whose relative attention this package computes: the same results, nothing else changed."""

import copy
import pickle
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
import transformers
from modelling import quick
from relative_families import FAMILIES, built, text

from convkernels.interop import huggingface
from convkernels.interop.huggingface.families import ADAPTERS
from convkernels.interop.huggingface.optimization import Swapped

COMPILED = quick(FAMILIES, ["deberta_v3", "t5", "bloom"])
SEQ2SEQ = [name for name, family in FAMILIES.items() if "decoder_input_ids" in family.inputs()]
CAUSAL = [name for name, family in FAMILIES.items() if family.causal]


def made(name):
    """A model of that family, or a skip where the installed transformers has none."""
    try:
        return built(name)
    except (ImportError, AttributeError):
        pytest.skip(f"transformers {transformers.__version__} has no {FAMILIES[name].model}")


def given(name, dtype=torch.float32):
    torch.manual_seed(1)
    return {k: x.to(dtype) if x.is_floating_point() else x for k, x in FAMILIES[name].inputs().items()}


def real(output, inputs):
    """Which rows of an output [B,T,...] do not belong to padding; of speech, whose frames are fewer, most of them."""
    B, T = output.shape[:2]
    mask = inputs["attention_mask"]
    if "decoder_input_ids" in inputs:
        return torch.ones(B, T, dtype=torch.bool)
    if mask.shape[1] == T:
        return mask.bool()
    lengths = mask.sum(1) * T // mask.shape[1] - 2
    lengths[mask.all(1)] = T
    return torch.arange(T) < lengths[:, None]


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


def test_all_adapters_are_tested():
    keys = {f"{family.family or name}.{kind}" for name, family in FAMILIES.items() for kind in family.modules}
    assert set(ADAPTERS) == {key for key in keys if not key.endswith("ShortConvolution")}


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


@pytest.mark.parametrize("name", ["bloom", "inkling", "inkling2", "mpnet", "parakeet", "t5", "wav2vec2_bert", "wavlm"])
def test_weights_kept_elsewhere(name):
    """accelerate's offloading, whose hooks bring the weights of a module when it is called."""
    accelerate = pytest.importorskip("accelerate")
    model, inputs = made(name), given(name)
    output = FAMILIES[name].output
    with torch.no_grad():
        huggingface.optimize(model)
        expected = model(**inputs)[output]
        accelerate.cpu_offload(model, execution_device="cpu")
        assert torch.equal(model(**inputs)[output], expected)


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


def test_dropout_is_drawn():
    model = made("deberta_v3").train()
    huggingface.optimize(model)
    inputs = given("deberta_v3")
    assert torch.equal(model(**inputs).logits, model(**inputs).logits)
    for module in model.modules():
        if type(module).__name__ == "DisentangledSelfAttention":
            module.dropout.p = 0.5
    assert not torch.equal(model(**inputs).logits, model(**inputs).logits)


def test_padding_between_tokens_is_refused_by_alibi():
    for name in ("bloom", "falcon"):
        model, inputs = made(name), given(name)
        huggingface.optimize(model)
        inputs["attention_mask"][0, 3] = 0
        with pytest.raises(RuntimeError, match="argument 'attention_mask': expected no padding between tokens"):
            model(**inputs)
    model, inputs = made("mpt"), given("mpt")
    inputs["attention_mask"][0, 3] = 0
    expected = model(**inputs).logits.detach()
    huggingface.optimize(model)
    rows = inputs["attention_mask"].bool()
    torch.testing.assert_close(model(**inputs).logits[rows], expected[rows], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("deberta_v3", dict(output_attentions=True), "'output_attentions': expected None"),
        ("mpnet", dict(output_attentions=True), "'output_attentions': expected None"),
        ("bloom", dict(output_attentions=True), "'output_attentions': expected None"),
        ("t5", dict(attention_mask=torch.ones(2, 21, 21)), "'attention_mask': expected"),
    ],
)
def test_what_is_not_computed_is_refused(name, changes, message):
    model = made(name)
    huggingface.optimize(model)
    with pytest.raises((NotImplementedError, ValueError), match=message):
        model(**(given(name) | changes))


@pytest.mark.parametrize("name", ["bloom", "inkling", "mpnet", "seamless_m4t_v2", "t5", "umt5", "wav2vec2_conformer"])
def test_another_attention_function_is_refused(name):
    """Never what one function made, read by another."""
    model, inputs = made(name), given(name)
    huggingface.optimize(model)
    for module in model.modules():
        if isinstance(module, transformers.PreTrainedModel):
            module.config._attn_implementation_internal = "eager"
    with pytest.raises((TypeError, ValueError), match="'attn_implementation': expected|_mask': expected"):
        model(**inputs)


def test_masks_of_pairs_are_refused_by_deberta():
    encoder = made("deberta").deberta.encoder
    huggingface.optimize(encoder)
    with pytest.raises(NotImplementedError, match=r"argument 'attention_mask': expected shape \[B,S\]"):
        encoder(torch.randn(2, 21, 48), torch.ones(2, 21, 21))


def test_models_that_stay_as_they_are():
    """The report says why, and all attention of a model changes or none."""

    def skipped(name, change):
        model = made(name)
        before = [type(module) for module in model.modules()]
        change(model)
        report = huggingface.optimize(model)
        assert [type(module) for module in model.modules()] == before and not report.replaced
        assert model.config._attn_implementation != "convkernels"
        return set(report.skipped.values())

    def talk(model):
        model.deberta.encoder.layer[1].attention.self.talking_head = True

    assert skipped("deberta", talk) == {
        "its heads talk to each other (talking_head)",
        "shares masks and positions with deberta.encoder.layer.1.attention.self",
    }

    def own(model):
        attention = model.encoder.block[0].layer[0].SelfAttention
        attention.forward = lambda *args, **options: None

    assert skipped("t5", own) == {
        "this T5Attention has a forward of its own",
        "shares masks and positions with encoder.block.0.layer.0.SelfAttention",
    }
    rotary = transformers.FalconConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, vocab_size=64)
    report = huggingface.optimize(transformers.FalconForCausalLM(rotary))
    assert set(report.skipped.values()) == {"its positions are rotary, not ALiBi's"}


def test_a_part_of_a_model():
    model = made("t5")
    report = huggingface.optimize(model.encoder.block[0])
    assert report.skipped == {"layer.0.SelfAttention": "optimize the model that it is a part of, which makes its masks"}
    layer = made("wavlm").wavlm.encoder.layers[0]
    assert huggingface.optimize(layer).replaced == {"attention": "WavLMAttention"}


def test_padding_never_matters():
    """What stands where the mask is False changes nothing, NaN in the embeddings included."""
    model = made("deberta_v3")
    huggingface.optimize(model)
    inputs = text()
    expected = model(**inputs).logits[inputs["attention_mask"].bool()]
    inputs["input_ids"][inputs["attention_mask"] == 0] = 7
    assert torch.equal(model(**inputs).logits[inputs["attention_mask"].bool()], expected)


def test_the_table_of_families():
    """docs/models.md lists all adapters, by family, and no others; README.md counts the families."""
    root = Path(__file__).resolve().parent.parent
    page = (root / "docs" / "models.md").read_text()
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| (`\w+`(?:, `\w+`)*) \| [^|]+ \| [\d., ]+ \|$", page, re.M)
    listed = {
        (family, kind) for row in rows for family in re.findall(r"\w+", row[0]) for kind in re.findall(r"\w+", row[1])
    }
    adapted = {tuple(key.split(".")) for key in ADAPTERS}
    assert adapted <= listed
    families, kinds = {family for family, _ in adapted}, {kind for _, kind in adapted}
    assert {family for family, _ in listed} == families and {kind for _, kind in listed} == kinds
    assert f"[{len(families) - 6} other families]" in (root / "README.md").read_text()
