"""Models of transformers whose causal convolutions this package computes: the same results, nothing else changed."""

import copy
import io
import pickle
import re
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
import transformers
from causal_families import FAMILIES, built, counted, near, tokens
from modelling import quick

from convkernels.interop import huggingface
from convkernels.interop.huggingface.optimization import Swapped

ROOT = Path(__file__).resolve().parent.parent
VERSION = re.match(r"\d+\.\d+", transformers.__version__)[0]
COMPILED = quick(FAMILIES, ["lfm2", "mamba2"])
SHORT = {name: dict(num_hidden_layers=2) for name in ("glm5_next", "qwen4_exp")}  # whose code dynamo takes minutes for


def padded():
    """Two rows of tokens, the first one shorter, and their mask."""
    ids = tokens()
    mask = torch.ones_like(ids)
    ids[0, :4] = mask[0, :4] = 0
    return dict(input_ids=ids, attention_mask=mask)


def trained(model, ids):
    """Logits and gradients of a step of training."""
    model.train().zero_grad()
    out = model(input_ids=ids, labels=ids, use_cache=False)
    out.loss.backward()
    model.eval()
    return out.logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def written(model, **given):
    options = dict(max_new_tokens=10, min_new_tokens=10, do_sample=False, output_logits=True)
    out = model.generate(**given, **options, return_dict_in_generate=True)
    return out.sequences, torch.stack(out.logits)


def distance(actual, expected):
    """The largest difference of a tensor, relative to the largest element of that tensor."""
    assert actual.keys() == expected.keys()
    return max(
        ((actual[name] - expected[name]).abs().max() / expected[name].abs().max().clamp(min=1e-30)).item()
        for name in expected
    )


def nudged(model, report):
    """The stock model again, its filters moved by one unit in the last place."""
    huggingface.restore(model)
    torch.manual_seed(2)
    with torch.no_grad():
        for module in (child for name in report.replaced for child in model.get_submodule(name).children()):
            if isinstance(module, nn.Conv1d):
                module.weight.copy_(torch.nextafter(module.weight, module.weight + torch.randn_like(module.weight)))
    return model


def allowed(moved, expected):
    """1e-5, or four times what a stock model's results change by with ``nudged`` filters: gradients of norms of small
    numbers change by more, and so do logits behind a delta rule, which SiLU rounded correctly moves by 1.2e-5
    (qwen3_5_moe)."""
    return max(1e-5, 4 * distance(moved, expected))


@pytest.mark.parametrize("name", FAMILIES)
def test_training_computes_the_same(name, monkeypatch):
    """Logits and gradients."""
    calls = counted(monkeypatch)
    model, ids = built(name), tokens()
    logits, expected = trained(model, ids)
    report = huggingface.optimize(model)
    assert FAMILIES[name].module in report.replaced.values()
    actual_logits, actual = trained(model, ids)
    convolving = list(report.replaced.values()).count(FAMILIES[name].module)
    assert calls == ["causal_conv1d_fn"] * len(calls) and len(calls) >= convolving
    moved_logits, moved = trained(nudged(model, report), ids)
    assert distance({"": actual_logits}, {"": logits}) <= allowed({"": moved_logits}, {"": logits})
    assert distance(actual, expected) <= allowed(moved, expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_generation_computes_the_same(name, monkeypatch):
    """Greedy tokens, with a cache, with and without padding on the left."""
    calls = counted(monkeypatch)
    model = built(name)
    plain, left = dict(input_ids=tokens()), padded()
    expected = [written(model, **given) for given in (plain, left)]
    assert not calls
    report = huggingface.optimize(model)
    actual = [written(model, **given) for given in (plain, left)]
    assert calls.count("causal_conv1d_update") >= 2 * 9 * list(report.replaced.values()).count(FAMILIES[name].module)
    alone, _ = written(model, input_ids=left["input_ids"][:1, 4:])
    nudged(model, report)
    for given, (sequences, logits), (found, found_logits) in zip((plain, left), expected, actual, strict=True):
        moved_sequences, moved = written(model, **given)
        assert torch.equal(found, sequences) and torch.equal(moved_sequences, sequences)
        assert distance({"": found_logits}, {"": logits}) <= allowed({"": moved}, {"": logits})
    assert torch.equal(alone[0, -10:], found[0, -10:])


def test_steps_that_autograd_records():
    """Steps of decoding outside of no_grad, and gradients through the states of the cache."""
    model, ids = built("lfm2"), tokens()
    results = []
    for change in (huggingface.restore, huggingface.optimize):
        change(model)
        model.zero_grad()
        with torch.no_grad():
            cache = model(input_ids=ids, use_cache=True).past_key_values
        logits = torch.cat([model(input_ids=ids[:, t : t + 1], past_key_values=cache).logits for t in range(3)], 1)
        logits.square().mean().backward()
        results.append(
            (logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        )
    (expected, gradients), (actual, actual_gradients) = results
    near(actual, expected)
    assert distance(actual_gradients, gradients) <= 1e-5


@pytest.mark.parametrize("name", FAMILIES)
def test_nothing_else_changes(name):
    """Parameters, names, other models of that class; and restore undoes it."""
    model, other = built(name), built(name)
    before = [(type(module), dict(vars(module))) for module in model.modules()]
    others = [type(module) for module in other.modules()]
    state = dict(model.state_dict(keep_vars=True))
    report = huggingface.optimize(model)
    assert huggingface.optimize(model) == report
    assert [type(module) for module in other.modules()] == others
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(state) and all(after[key] is state[key] for key in state)
    for (kind, _), module in zip(before, model.modules(), strict=True):
        assert isinstance(module, kind) and type(module).__qualname__ == kind.__qualname__
    assert huggingface.restore(model) == list(report.replaced)
    assert [(type(module), dict(vars(module))) for module in model.modules()] == before
    assert huggingface.restore(model) == [] and huggingface.restore(other) == []


@pytest.mark.parametrize("name", FAMILIES)
def test_copies_and_files(name, monkeypatch, tmp_path):
    """Copies and pickles are optimized; what save_pretrained writes is what it was."""
    calls = counted(monkeypatch)
    model, ids = built(name), tokens(5)
    report = huggingface.optimize(model)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        count = len(calls)
        for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            del calls[:]
            assert torch.equal(again(input_ids=ids).logits, expected) and len(calls) == count
            assert huggingface.optimize(again) == report
            assert huggingface.restore(again) == list(report.replaced)
            assert not any(isinstance(module, Swapped) for module in again.modules())
        model.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path)
        assert huggingface.restore(loaded) == []
        near(loaded(input_ids=ids).logits, expected)


@pytest.mark.thin(5)
@pytest.mark.parametrize("name", COMPILED)
def test_no_graph_breaks_are_added(name):
    model, ids = built(name, **SHORT.get(name, {})), tokens(3)
    breaks = []
    for change in (huggingface.restore, huggingface.optimize):
        change(model)
        torch._dynamo.reset()
        breaks.append(torch._dynamo.explain(model)(input_ids=ids, use_cache=False).graph_break_count)
    assert breaks[1] <= breaks[0]


def test_compiled_training(monkeypatch):
    calls = counted(monkeypatch)
    model, ids = built("lfm2"), tokens()
    logits, expected = trained(model, ids)
    huggingface.optimize(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    actual_logits, actual = trained(compiled, ids)
    near(actual_logits, logits)
    assert calls and distance({n.removeprefix("_orig_mod."): g for n, g in actual.items()}, expected) <= 1e-5


def test_lower_precision():
    """In bfloat16 and under autocast, as near to float32 as the stock model."""
    model, ids = built("mamba2"), tokens()
    expected = model(input_ids=ids).logits.detach()

    def error(model):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            mixed = model(input_ids=ids).logits.float()
        low = copy.deepcopy(model).bfloat16()(input_ids=ids).logits.detach().float()
        return torch.stack([(logits - expected).abs().max() for logits in (mixed, low)])

    stock = error(model)
    huggingface.optimize(model)
    assert (error(model) <= 1.5 * stock).all()


def test_float64():
    model, ids = built("mamba").double(), tokens()
    expected = model(input_ids=ids).logits.detach()
    huggingface.optimize(model)
    near(model(input_ids=ids).logits, expected, 1e-12)


def test_files_written_by_torch(tmp_path):
    model, ids = built("lfm2"), tokens()
    huggingface.optimize(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
    again.load_state_dict(built("lfm2").state_dict())


def test_every_family_of_the_installed_transformers_is_here():
    models = Path(transformers.__file__).parent / "models"
    calling = {
        path.parent.name for path in models.glob("*/modeling_*.py") if "def causal_conv1d_fn(" in path.read_text()
    }
    assert calling == {name for name, one in FAMILIES.items() if hasattr(transformers, one.model)}


def test_the_table_of_families():
    """docs/models.md lists them, with the modules replaced and the versions of transformers that have them; README.md
    counts them."""
    page = (ROOT / "docs" / "models.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \| ([\d., ]+) \|$", page, re.M)
    assert [(name, module) for name, module, _ in rows] == [(name, one.module) for name, one in FAMILIES.items()]
    for name, _, versions in rows:
        assert VERSION not in ("5.17", "5.24") or (VERSION in versions.split(", ")) == hasattr(
            transformers, FAMILIES[name].model
        )
    assert f"[{len(FAMILIES) - 3} other families]" in (ROOT / "README.md").read_text()
