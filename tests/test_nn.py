"""The modules: shapes, checkpoints, decoding, copies."""

import copy
import io
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT, run_page

import convkernels as ck
from convkernels import nn as cknn

B, T, C, H, K = 2, 9, 12, 3, 5
MODULES = {
    "depthwise": lambda **k: cknn.DepthwiseConv1d(C, K, **k),
    "lightweight": lambda **k: cknn.LightweightConv1d(C, K, H, bias=True, **k),
    "dynamic": lambda **k: cknn.DynamicConv1d(C, K, H, bias=True, conv_bias=True, **k),
    "dynamic_in_proj": lambda **k: cknn.DynamicConv1d(C, K, H, in_proj=True, **k),
    "separable": lambda **k: cknn.SeparableConv1d(C, C, K, **k),
    "gated_light": lambda **k: cknn.GatedConv(C, cknn.LightweightConv1d(C, K, H, **k)),
    "gated_dynamic": lambda **k: cknn.GatedConv(C, cknn.DynamicConv1d(C, K, H, **k)),
    "gated_separable": lambda **k: cknn.GatedConv(C, cknn.SeparableConv1d(C, 2 * C, K, **k), pointwise=True),
    "conformer": lambda **k: cknn.ConformerConv(C, K, norm="layer", **k),
    "gated_depthwise": lambda **k: cknn.GatedConv(C, cknn.DepthwiseConv1d(C, K, **k)),
}
NAMES = {
    "depthwise": {"weight": (C, 1, K), "bias": (C,)},
    "lightweight": {"weight": (H, 1, K), "bias": (C,)},
    "dynamic": {"weight_linear.weight": (H * K, C), "weight_linear.bias": (H * K,), "conv_bias": (C,)},
    "dynamic_in_proj": {"weight_linear.weight": (C + H * K, C), "weight_linear.bias": (C + H * K,)},
    "separable": {"depthwise.weight": (C, 1, K), "pointwise.weight": (C, C), "pointwise.bias": (C,)},
}


def gradients(module, x):
    module.zero_grad()
    y = module(x)
    y.square().sum().backward()
    return y.detach(), {n: p.grad.clone() for n, p in module.named_parameters()}


@pytest.mark.parametrize("name", MODULES)
def test_trains_and_keeps_the_shape(name, backend):
    module = MODULES[name](backend=backend)
    y, grads = gradients(module, torch.randn(B, T, C))
    assert y.shape == (B, T, C)
    assert all(g.isfinite().all() and g.any() for g in grads.values())


@pytest.mark.parametrize("name", NAMES)
def test_parameter_names_and_shapes(name):
    assert {n: tuple(p.shape) for n, p in MODULES[name]().named_parameters()} == NAMES[name]


@pytest.mark.parametrize("name", MODULES)
def test_copies_and_checkpoints(name, backend, tmp_path):
    """deepcopy, pickle, torch.save of the module, state_dict and safetensors all give the same outputs and
    gradients.
    """
    safetensors = pytest.importorskip("safetensors.torch")
    module, x = MODULES[name](backend=backend), torch.randn(B, T, C)
    expected = gradients(module, x)
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(buffer, weights_only=False)]
    by_state = MODULES[name](backend=backend)
    assert not by_state.load_state_dict(module.state_dict(), strict=True).missing_keys
    safetensors.save_model(module, str(tmp_path / "model.safetensors"))
    by_file = MODULES[name](backend=backend)
    safetensors.load_model(by_file, str(tmp_path / "model.safetensors"))
    for other in (*copies, by_state, by_file):
        y, grads = gradients(other, x)
        assert torch.equal(y, expected[0]) and all(torch.equal(grads[n], g) for n, g in expected[1].items())


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("dilation", [1, 2])
def test_steps_equal_forward(name, dilation, backend):
    module = MODULES[name](padding="causal", dilation=dilation, backend=backend).double().eval()
    x = torch.randn(B, T, C, dtype=torch.float64)
    with torch.no_grad():
        expected = module(x)
        state = module.init_state(B)
        y = torch.stack([module.step(x[:, t], state) for t in range(T)], 1)
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("name", MODULES)
def test_streaming(name, backend):
    module = MODULES[name](padding="causal", backend=backend).double()
    x = torch.randn(B, T, C, dtype=torch.float64)
    expected, final = module(x, return_state=True)
    first, state = module(x[:, :4], return_state=True)
    second, state = module(x[:, 4:], initial_state=state, return_state=True)
    torch.testing.assert_close(torch.cat([first, second], 1), expected)
    torch.testing.assert_close(state, final)


@pytest.mark.parametrize("name", MODULES)
def test_mask_hides_padding(name, backend):
    module = MODULES[name](backend=backend)
    lengths = torch.tensor([T, 4])
    mask = torch.arange(T) < lengths[:, None]
    x = torch.randn(B, T, C)
    y = module(x, mask)
    alone = module(x[1:, :4])
    torch.testing.assert_close(y[1:, :4], alone)


def test_a_conv1d_checkpoint_loads(backend):
    theirs = torch.nn.Conv1d(C, C, K, padding=K // 2, groups=C)
    ours = cknn.DepthwiseConv1d(C, K, backend=backend)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(B, T, C)
    torch.testing.assert_close(ours(x), theirs(x.transpose(1, 2)).transpose(1, 2), rtol=1e-5, atol=1e-6)


def test_depthwise_conv_takes_the_channels_of_its_weight(backend):
    """Those that pruning has left; it has no dropout, whatever sets one on all modules."""
    conv = cknn.DepthwiseConv1d(C, K, backend=backend)
    conv.weight, conv.bias = (torch.nn.Parameter(value[: C // 2].detach()) for value in (conv.weight, conv.bias))
    conv.weight_dropout = 0.5
    x = torch.randn(2, 9, C // 2)
    assert torch.equal(conv(x), conv.eval()(x))


@pytest.mark.parametrize("name", ["lightweight", "dynamic", "depthwise"])
def test_channels_that_come_first_are_said(name):
    with pytest.raises(ValueError, match=r"give x\.mT if channels come first"):
        MODULES[name]()(torch.randn(2, C, 9))


def test_inputs_of_the_modules_around_are_checked():
    attention = cknn.CompositeAttention(C, 2, 3)
    gated = MODULES["gated_light"]()
    cases = [
        (attention, (torch.randn(2, 9, C - 1),), "argument 'x': expected shape [B,T,C], C = 12, got"),
        (attention, (torch.randn(9, C),), "argument 'x': expected shape [B,T,C], C = 12, got"),
        (attention, (torch.randn(2, 9, C), torch.ones(2, 9)), "argument 'mask': expected a bool tensor"),
        (
            attention,
            (torch.randn(2, 9, C), torch.ones(9, 2) > 0),
            "argument 'mask': expected shape [B,T] = [2, 9], got",
        ),
        (gated, (torch.randn(2, 9, C - 1),), "argument 'x': expected a last dimension of C = 12, got"),
    ]
    for module, inputs, message in cases:
        with pytest.raises((TypeError, ValueError), match=re.escape(f"{type(module).__name__}: {message}")):
            module(*inputs)


@pytest.mark.parametrize("name", ["lightweight", "depthwise"])
def test_a_step_takes_no_query(name):
    module = MODULES[name](padding="causal")
    step = {"state": module.init_state(2), "query": torch.randn(2, C)}
    with pytest.raises(TypeError, match="unexpected keyword argument 'query'"):
        module(torch.randn(2, C), step=step)


def test_gated_conv_is_its_equation(backend):
    module = MODULES["gated_light"](backend=backend)
    x = torch.randn(B, T, C)
    value, gate = module.linear1(x).chunk(2, -1)
    inner = ck.lightweight_conv1d(value * torch.sigmoid(gate), module.conv.weight.squeeze(1), backend=backend)
    torch.testing.assert_close(module(x), module.linear2(inner), rtol=1e-5, atol=1e-6)
    assert torch.equal(F.glu(module.linear1(x), -1), value * torch.sigmoid(gate))


def test_dropout_only_while_training(backend):
    module = cknn.LightweightConv1d(C, K, H, weight_dropout=0.5, backend=backend)
    x = torch.randn(B, T, C)
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))
    assert torch.equal(module(x), ck.lightweight_conv1d(x, module.weight.squeeze(1), backend=backend))


@pytest.mark.parametrize("name", MODULES)
def test_repr_names_what_matters(name):
    assert f"kernel_size={K}" in repr(MODULES[name]())


def test_bad_arguments_of_modules():
    with pytest.raises(ValueError, match="LightweightConv1d: argument 'heads': expected a divisor of 12, got 5"):
        cknn.LightweightConv1d(C, K, 5)
    with pytest.raises(ValueError, match="argument 'query_size': expected 12"):
        cknn.DynamicConv1d(C, K, H, in_proj=True, query_size=4)
    with pytest.raises(RuntimeError, match="step: expected padding='causal', got 'same'"):
        module = cknn.LightweightConv1d(C, K, H)
        module.step(torch.randn(B, C), module.init_state(B))


BAD = [
    ("channels", lambda: cknn.DepthwiseConv1d(0, 3)),
    ("channels", lambda: cknn.LightweightConv1d(8.0, 3)),
    ("kernel_size", lambda: cknn.LightweightConv1d(8, 0)),
    ("kernel_size", lambda: cknn.DynamicConv1d(8, True)),
    ("heads", lambda: cknn.LightweightConv1d(8, 3, 0)),
    ("bias", lambda: cknn.LightweightConv1d(8, 3, bias=3)),
    ("bias", lambda: cknn.DepthwiseConv1d(8, 3, bias="no")),
    ("bias", lambda: cknn.DynamicConv1d(8, 3, bias=None)),
    ("conv_bias", lambda: cknn.DynamicConv1d(8, 3, conv_bias="x")),
    ("x", lambda: cknn.LightweightConv1d(8, 3, 2)(torch.ones(1, 8, 4))),
    ("x", lambda: cknn.DynamicConv1d(8, 3, 2)(torch.ones(1, 8, 4))),
    ("x", lambda: cknn.DynamicConv1d(8, 3, 2, padding="causal").step(torch.ones(1, 4), torch.ones(1, 2, 8))),
    ("query", lambda: cknn.DynamicConv1d(8, 3, 2, query_size=4)(torch.ones(1, 5, 8))),
    ("padding", lambda: cknn.LightweightConv1d(8, 3, padding="valid")),
    ("padding", lambda: cknn.DepthwiseConv1d(8, 3, padding=3)),
    ("dilation", lambda: cknn.DepthwiseConv1d(8, 3, dilation=0)),
    ("dilation", lambda: cknn.SeparableConv1d(8, 8, 3, dilation=1.5)),
    ("weight_dropout", lambda: cknn.DynamicConv1d(8, 3, weight_dropout=1.5)),
    ("weight_dropout", lambda: cknn.LightweightConv1d(8, 3, weight_dropout="0.1")),
    ("softmax", lambda: cknn.LightweightConv1d(8, 3, softmax=1)),
    ("renormalize", lambda: cknn.LightweightConv1d(8, 3, softmax=False, renormalize=True)),
    ("backend", lambda: cknn.LightweightConv1d(8, 3, backend="cput")),
    ("backend", lambda: cknn.DepthwiseConv1d(8, 3, backend=None)),
    ("query_size", lambda: cknn.DynamicConv1d(8, 3, query_size=0)),
    ("in_proj", lambda: cknn.DynamicConv1d(8, 3, in_proj="no")),
    ("out_channels", lambda: cknn.SeparableConv1d(8, 0, 3)),
    ("channels", lambda: cknn.GatedConv(0, cknn.DepthwiseConv1d(8, 3))),
    ("conv", lambda: cknn.GatedConv(8, torch.nn.Conv1d(8, 8, 3))),
    ("conv", lambda: cknn.GatedConv(8, cknn.GatedConv(8, cknn.DepthwiseConv1d(8, 3)))),
    ("glu", lambda: cknn.GatedConv(8, cknn.DepthwiseConv1d(8, 3), glu="yes")),
    ("kernel_size", lambda: ck.interop.fairseq.LightweightConv1dTBC(8, 0)),
    ("num_heads|heads", lambda: ck.interop.fairseq.DynamicConv1dTBC(8, 3, num_heads=0)),
    ("dtype", lambda: cknn.DepthwiseConv1d(8, 3).init_state(2, dtype=torch.int8)),
    ("batch", lambda: cknn.DepthwiseConv1d(8, 3).init_state(-1)),
    ("batch", lambda: cknn.GatedConv(8, cknn.DynamicConv1d(8, 3, 2)).init_state(-1)),
]


@pytest.mark.parametrize(("argument", "make"), BAD)
def test_arguments_are_checked_when_a_module_is_made(argument, make):
    with pytest.raises((ValueError, TypeError), match=f"^[A-Za-z0-9]+: argument '({argument})': expected .*, got "):
        make()


@pytest.mark.parametrize("name", ["lightweight", "dynamic", "separable", "gated_dynamic"])
def test_a_state_without_parameters(name):
    """Weights moved to buffers, of integers, or gone: the state is of a float type, on the module's device."""
    module = MODULES[name](padding="causal").double()
    assert module.init_state(B).dtype == torch.float64
    for part in module.modules():
        for key, value in list(part._parameters.items()):
            delattr(part, key)
            part.register_buffer(key, None if value is None else value.detach())
    assert module.init_state(B).dtype == torch.float64
    for part in module.modules():
        for key, value in part._buffers.items():
            part._buffers[key] = None if value is None else value.to(torch.int8)
    assert module.init_state(B).dtype == torch.float32
    for part in module.modules():
        part._buffers.clear()
    state = module.init_state(B, dtype=torch.bfloat16, device="meta")
    assert state.dtype == torch.bfloat16 and state.device.type == "meta"
    assert module.init_state(B).dtype == torch.float32 and module.init_state(B).device.type == "cpu"


@pytest.mark.parametrize("name", MODULES)
def test_a_masked_step_leaves_zeros_in_the_state(name, backend):
    """As a mask over the sequence does, whatever the padding holds."""
    module = MODULES[name](padding="causal", backend=backend).double().eval()
    x = torch.randn(B, T, C, dtype=torch.float64)
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[0, :4] = mask[1, 5] = False
    with torch.no_grad():
        expected, state = module(x, mask), module.init_state(B)
        y = torch.stack([module.step(x[:, t], state, mask=mask[:, t]) for t in range(T)], 1)
    torch.testing.assert_close(y[mask], expected[mask])


@pytest.mark.parametrize("name", MODULES)
def test_offloaded_parameters_are_fetched(name):
    """accelerate brings parameters back when a module is called: forward and step must call, not reach past."""
    accelerate = pytest.importorskip("accelerate")
    module = MODULES[name](padding="causal", backend="reference").eval()
    x, state = torch.randn(B, T, C), module.init_state(B)
    with torch.no_grad():
        expected = module(x)
        accelerate.cpu_offload(module, execution_device=torch.device("cpu"))
        assert all(p.device.type == "meta" for p in module.parameters())
        torch.testing.assert_close(module(x), expected)
        y = torch.stack([module.step(x[:, t], state) for t in range(T)], 1)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODULES)
def test_modules_on_the_meta_device(name):
    module = MODULES[name](padding="causal", device="meta") if "gated" not in name else MODULES[name]().to("meta")
    assert module(torch.empty(B, T, C, device="meta")).shape == (B, T, C)


def test_the_page_of_modules_runs():
    assert run_page("docs/modules.md") == 6
    for name in cknn.__all__:
        assert f"`{name}`" in (ROOT / "docs/modules.md").read_text()
