"""What ``interop.huggingface.optimize`` leaves alone or refuses of relative attention, and what its pages say."""

import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
import transformers
from relative_families import FAMILIES, given, made

from convkernels.interop import huggingface
from convkernels.interop.huggingface.families import ADAPTERS


def test_all_adapters_are_tested():
    keys = {f"{family.family or name}.{kind}" for name, family in FAMILIES.items() for kind in family.modules}
    assert set(ADAPTERS) == {key for key in keys if not key.endswith("ShortConvolution")}


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


def test_padding_between_tokens_is_refused_by_alibi():
    for name in ("bloom", "falcon"):
        model, inputs = made(name), given(name)
        huggingface.optimize(model)
        inputs["attention_mask"][0, 3] = 0
        with pytest.raises(ValueError, match="argument 'attention_mask': expected no padding between tokens"):
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
