"""What ``interop.huggingface.optimize`` says, what it leaves alone, and the functions that it puts into models."""

import functools
import types

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
import transformers
from causal_families import FAMILIES, built, counted, near, tokens
from stock_models import llama

from convkernels.interop import causal_conv1d, huggingface
from convkernels.interop.huggingface import convolution, swapping


def test_packed_sequences():
    """seq_idx, which the stock model refuses without the package causal_conv1d."""
    model, ids = built("lfm2", layer_types=["conv"] * 4), tokens()
    huggingface.optimize(model)
    packed = ids.reshape(1, -1)
    seq_idx = torch.arange(2, dtype=torch.int32).repeat_interleave(11)[None]
    with torch.no_grad():
        actual = model(input_ids=packed, seq_idx=seq_idx, use_cache=False).logits
        near(actual.view(2, 11, -1), model(input_ids=ids, use_cache=False).logits)


def test_functions_take_what_models_give():
    torch.manual_seed(2)
    x, weight, bias = torch.randn(1, 6, 9), torch.randn(6, 4), torch.randn(6)
    expected = causal_conv1d.causal_conv1d_fn(x, weight, bias)
    fn, update = convolution.causal_conv1d_fn, convolution.causal_conv1d_update
    near(fn(x, weight, bias, "gelu", position_ids=None), nn.functional.gelu(expected), 1e-6)
    near(fn(x, weight, bias, activation="silu"), nn.functional.silu(expected), 1e-6)
    cut = fn(x, weight, bias, cu_seqlens=torch.tensor([0, 5, 9]))
    near(cut, torch.cat([fn(x[..., :5], weight, bias), fn(x[..., 5:], weight, bias)], 2), 1e-6)
    near(fn(x, weight.double(), bias.double()), expected, 1e-6)  # of a model that convolves in float32 always
    state = torch.zeros(1, 6, 4)
    steps = [update(x[..., t : t + 1], state, weight, bias, "gelu") for t in range(9)]
    near(torch.cat(steps, 2), nn.functional.gelu(expected), 1e-6)
    assert torch.equal(state, x[..., -4:])


def test_a_model_without_such_convolutions():
    model = llama()
    before = [type(module) for module in model.modules()]
    report = huggingface.optimize(model)
    assert (report.replaced, report.skipped) == ({}, {}) and [type(module) for module in model.modules()] == before
    assert str(report) == "LlamaForCausalLM: convkernels computes in 0 modules"
    report = huggingface.optimize(nn.Sequential(nn.Conv1d(4, 4, 3, groups=4), nn.Conv1d(4, 4, 3), nn.Conv1d(1, 1, 3)))
    assert report.skipped == {"0": "Sequential runs this nn.Conv1d, and does not call causal_conv1d_fn"}


def test_the_report():
    model = built("mamba", num_hidden_layers=6)
    lines = str(huggingface.optimize(model)).splitlines()
    assert lines == [
        "MambaForCausalLM: convkernels computes in 6 modules",
        "  MambaMixer: backbone.layers.0.mixer ... backbone.layers.5.mixer, 6 in all",
    ]
    alone = model.backbone.layers[0].mixer
    assert huggingface.restore(alone) == [""] and huggingface.optimize(alone).replaced == {"": "MambaMixer"}


@pytest.mark.parametrize("function", [huggingface.optimize, huggingface.restore])
def test_wrong_arguments(function):
    expected = f"{function.__name__}: argument 'model': expected a torch.nn.Module, .* got str"
    with pytest.raises(TypeError, match=expected):
        function("mamba")


def causal_conv1d_fn(*args, **options):
    raise AssertionError("never called here")


def unreachable():
    """Subclasses of Mamba's mixer, and why they are not replaced."""
    mixer = transformers.models.mamba.modeling_mamba.MambaMixer

    class Written(mixer):
        def forward(self, hidden_states, *args, **options):
            return causal_conv1d_fn(hidden_states)

    class Other(mixer):
        def slow(self, hidden_states):
            return causal_conv1d_fn(hidden_states)

    class Wrapped(mixer):
        @functools.wraps(mixer.forward)
        def forward(self, *args, **options):
            return super().forward(*args, **options)

    class Closed(Written):
        def forward(self, hidden_states, *args, **options):
            return super().forward(causal_conv1d_fn(hidden_states))

    Closed.forward.__module__ = mixer.__module__
    return {
        Written: f"Written: its forward is written in {__name__}, not in transformers",
        Other: "Other calls causal_conv1d_fn and causal_conv1d_update in forward, slow, not in forward alone",
        Wrapped: "Wrapped: other code has wrapped its forward",
        Closed: "Closed: its forward uses variables of a function around it",
    }


@pytest.mark.parametrize("which", range(4))
def test_other_forwards_are_left_alone(which):
    kind, reason = list(unreachable().items())[which]
    model = built("mamba")
    model.backbone.layers[1].mixer.__class__ = kind
    report = huggingface.optimize(model)
    assert report.skipped == {"backbone.layers.1.mixer": reason} and len(report.replaced) == 3
    assert type(model.backbone.layers[1].mixer) is kind
    assert f"  not in backbone.layers.1.mixer: {reason}" in str(report).splitlines()


def test_a_forward_of_the_module_itself_is_left_alone():
    model = built("mamba")
    mixer = model.backbone.layers[1].mixer
    mixer.forward = types.MethodType(lambda self, hidden_states, **options: hidden_states, mixer)
    assert huggingface.optimize(model).skipped == {
        "backbone.layers.1.mixer": "this MambaMixer has a forward of its own"
    }


def test_without_the_source(monkeypatch):
    kind = type(built("mamba").backbone.layers[0].mixer)

    def missing(function):
        raise OSError

    monkeypatch.setattr(swapping.inspect, "getsourcelines", missing)
    with pytest.raises(swapping.Unreachable, match="the source of its forward is not installed"):
        swapping.rebound(kind.forward, {})


def test_tracebacks_show_the_lines_of_transformers():
    model = built("mamba")
    huggingface.optimize(model)
    mixer = type(model.backbone.layers[0].mixer)
    new, old = (swapping.inspect.unwrap(kind.forward).__code__ for kind in (mixer, mixer.stock))
    assert (new.co_filename, new.co_firstlineno) == (old.co_filename, old.co_firstlineno)
    lines = [{line for *_, line in code.co_lines() if line is not None} for code in (new, old)]
    assert lines[0] == lines[1]


@pytest.mark.parametrize("hooked_first", [True, False])
def test_hooks_of_accelerate(hooked_first, monkeypatch):
    calls = counted(monkeypatch)
    hooks = pytest.importorskip("accelerate.hooks")
    model, ids = built("lfm2"), tokens()
    expected = model(input_ids=ids).logits.detach()
    moved = [name for name, module in model.named_modules() if type(module).__name__ == FAMILIES["lfm2"].module]

    def hook():
        for name in moved:
            hooks.add_hook_to_module(model.get_submodule(name), hooks.AlignDevicesHook("cpu"))

    steps = (hook, lambda: huggingface.optimize(model))
    for step in steps if hooked_first else steps[::-1]:
        step()
    assert list(huggingface.optimize(model).replaced) == moved
    near(model(input_ids=ids).logits, expected)
    assert len(calls) == 2
    assert huggingface.restore(model) == moved
    assert torch.equal(model(input_ids=ids).logits, expected) and len(calls) == 2
    hooks.remove_hook_from_submodules(model)
    assert torch.equal(model(input_ids=ids).logits, expected) and len(calls) == 2
