"""The modules: shapes, checkpoints, decoding, copies."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F

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


@pytest.mark.parametrize("name", [n for n in MODULES if n != "separable"])
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
