"""The attention modules: parameters, initial values, training, padding. The numbers: tests/test_attention_golden.py."""

import copy

import pytest
import torch

from convkernels import nn as cknn
from convkernels.testing.inputs import values

OP = "attention_grad"
B, T, C, H, K = 2, 9, 16, 4, 2
W = 2 * K + 1
SEPARABLE = {"query_conv.weight": (C, 1, W), "query_conv.bias": (C,), "query_pointwise.weight": (C // 2, C),
             "query_pointwise.bias": (C // 2,), "query_linear.weight": (C // 2, C),
             "query_linear.bias": (C // 2,)}  # fmt: skip
LINEAR = {f"{n}.{p}": (C, C) if p == "weight" else (C,) for n in ("query", "key", "value") for p in ("weight", "bias")}
MODULES = {
    "plain": {},
    "fixed": {"bias": True},
    "composite": {"bias": True, "query_rel": True, "key_rel": True},
    "depthwise": {"value_conv": True, "value_conv_scale": True},
    "mixed": {"query_key": "mixed", "value": "mixed", "query_rel": True},
    "grouped": {"query_key": "conv", "query_key_groups": 2, "value": "conv", "activation": True},
    "no_qk": {"qk": False, "bias": True},
    "identity": {"query_key": "identity"},
    "span_output": {"span": "output"},
    "span_key": {"span": "key", "dropout": 0.1},
    "causal": {"bias": True, "value_conv": True, "causal": True, "outside": "mask"},
}
NAMES = {
    "plain": LINEAR,
    "composite": {**LINEAR, "convfixed_param": (1, H, 1, W), "convq_param": (C // H, W), "convk_param": (C // H, W)},
    "depthwise": {**LINEAR, "convolution.weight": (C, 1, W), "convolution.bias": (C,),
                  "convolution_scalar": (1, H, 1, 1)},
    "no_qk": {"value.weight": (C, C), "value.bias": (C,), "convfixed_param": (1, H, 1, W)},
    "identity": {"value.weight": (C, C), "value.bias": (C,)},
    "mixed": {**{name.replace("query", n): s for name, s in SEPARABLE.items() for n in ("query", "key", "value")},
              "convq_param": (C // H, W)},
}  # fmt: skip


def make(name, backend="reference"):
    return cknn.CompositeAttention(C, H, K, backend=backend, **MODULES[name])


@pytest.mark.parametrize("name", MODULES)
def test_trains_and_keeps_the_shape(name, backend):
    module = make(name, backend)
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[:, -2:] = False
    y = module(values((B, T, C), torch.float32, 1), mask)
    assert y.shape == (B, T, C)
    y.square().sum().backward()
    for key, parameter in module.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.isfinite().all() and (parameter.grad.any() or key == "key.bias"), key
    assert copy.deepcopy(module)(torch.randn(B, T, C)).shape == (B, T, C)
    assert type(module).__name__ in repr(module)


@pytest.mark.parametrize("name", NAMES)
def test_parameter_names_and_shapes(name):
    found = {key: tuple(value.shape) for key, value in make(name).state_dict().items()}
    assert found == NAMES[name]


def test_initial_values():
    torch.manual_seed(1)
    module = cknn.CompositeAttention(64, 4, 8, bias=True, query_rel=True, value_conv=True, backend="reference")
    assert not module.convfixed_param.any() and (module.convolution_scalar == 1).all()
    assert not module.convolution_scalar.requires_grad
    assert 0.2 < module.convq_param.abs().max() <= 17**-0.5
    assert 0.018 < module.query.weight.std() < 0.022 and not module.query.bias.any()
    before = module.convq_param.clone()
    module.reset_parameters()
    assert not torch.equal(before, module.convq_param)


@pytest.mark.parametrize("name", ["composite", "mixed", "span_key"])
def test_padding_does_not_reach_the_rest(name, backend):
    module = make(name, backend).eval()
    x = values((B, T, C), torch.float32, 1).clone()
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[0, -3:] = False
    y = module(x, mask)
    x[0, -3:] = 1e4
    torch.testing.assert_close(module(x, mask)[mask], y[mask])
    torch.testing.assert_close(module(x[:1, :-3]), y[:1, :-3])


@pytest.mark.parametrize("name", ["composite", "depthwise", "mixed"])
def test_packed_sequences(name, backend):
    module = make(name, backend)
    x = values((1, T, C), torch.float32, 1)
    y = module(x, cu_seqlens=torch.tensor([0, 4, T]))
    torch.testing.assert_close(y, torch.cat([module(x[:, :4]), module(x[:, 4:])], 1))


@pytest.mark.parametrize("options", [
    {"bias": True, "value_conv": True, "outside": "mask"},
    {"query_key": "mixed", "value": "mixed", "query_rel": True},
    {"query_key": "conv", "query_key_groups": 2, "value": "conv", "value_groups": 1, "activation": True},
    {"value": "conv", "window": (3, 0)},
])  # fmt: skip
def test_causal(options, backend):
    module = cknn.CompositeAttention(C, H, **({"window": K, "causal": True, "backend": backend} | options))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(values(parameter.shape, torch.float32, 2))
    x = values((B, T, C), torch.float32, 1)
    torch.testing.assert_close(module(x)[:, :5], module(x[:, :5]))
    changed = torch.cat([x[:, :5], -x[:, 5:]], 1)
    assert not torch.allclose(module(x)[:, 5:], module(changed)[:, 5:])


def test_dropout_only_in_training(backend):
    module = cknn.CompositeAttention(C, H, K, dropout=0.5, backend=backend)
    x = values((B, T, C), torch.float32, 1)
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))


@pytest.mark.parametrize(("arguments", "options", "argument"), [
    ((C, 3), {}, "heads"),
    ((C, 1), {"span": "key"}, "heads"),
    ((C, H), {"query_key": "cnn"}, "query_key"),
    ((C, H), {"value": "identity"}, "value"),
    ((C, H), {"span": "both"}, "span"),
    ((C, H), {"span": "key", "bias": True}, "span"),
    ((C, H, (1, 2)), {"value": "conv"}, "conv_kernel_size"),
])  # fmt: skip
def test_bad_options(arguments, options, argument):
    with pytest.raises(ValueError, match=f"^CompositeAttention: argument '{argument}': expected .*, got"):
        cknn.CompositeAttention(*arguments, **options)


@pytest.mark.parametrize(("options", "argument"), [
    (dict(channels=0), "channels"),
    (dict(heads=0), "heads"),
    (dict(heads="4"), "heads"),
    (dict(window=2.5), "window"),
    (dict(window="88"), "window"),
    (dict(window=-1), "window"),
    (dict(window=None), "window"),
    (dict(outside="masked"), "outside"),
    (dict(dropout=3), "dropout"),
    (dict(backend="nope"), "backend"),
    (dict(causal=1), "causal"),
    (dict(bias="yes"), "bias"),
    (dict(qk=False), "qk"),
    (dict(value_conv_scale=True), "value_conv_scale"),
    (dict(value="conv", conv_kernel_size=0), "conv_kernel_size"),
    (dict(value="conv", conv_kernel_size=2.5), "conv_kernel_size"),
    (dict(value="conv", value_groups=3), "value_groups"),
    (dict(query_key="conv", query_key_groups=0), "query_key_groups"),
    (dict(span="key", span_kernel_size=0), "span_kernel_size"),
])  # fmt: skip
def test_options_are_checked_when_a_module_is_made(options, argument):
    with pytest.raises((ValueError, TypeError), match=f"^CompositeAttention: argument '{argument}': expected .*, got"):
        cknn.CompositeAttention(**(dict(channels=C, heads=H) | options))


@pytest.mark.parametrize("name", MODULES)
def test_offloaded_parameters_are_fetched(name):
    """accelerate brings parameters back when a module is called."""
    accelerate = pytest.importorskip("accelerate")
    module, x = make(name).eval(), torch.randn(B, T, C)
    with torch.no_grad():
        calls = [module, module.weights] if hasattr(module, "weights") else [module]
        expected = [call(x) for call in calls]
        accelerate.cpu_offload(module, execution_device=torch.device("cpu"))
        torch.testing.assert_close([call(x) for call in calls], expected)


@pytest.mark.parametrize("name", MODULES)
def test_modules_on_the_meta_device(name):
    module = make(name).to("meta")
    assert module(torch.empty(B, T, C, device="meta")).shape == (B, T, C)


def test_span_needs_values_from_outside():
    module = cknn.SpanDynamicConv(C, 8, 2, predicted_at="key", backend="reference")
    assert "predicted_at='key'" in repr(module)
    with pytest.raises(ValueError, match="SpanDynamicConv: argument 'value': expected"):
        module(torch.randn(B, T, C), torch.randn(B, T, 8))
    for options in ({"kernel_size": 4}, {"predicted_at": "both"}):
        with pytest.raises(ValueError, match=f"argument '{next(iter(options))}'"):
            cknn.SpanDynamicConv(C, 8, 2, **options)


@pytest.mark.parametrize("predicted_at", ["output", "key"])
def test_span_definition(predicted_at, backend):
    """Against the sum written out, in float64, with padding."""
    module = cknn.SpanDynamicConv(C, 8, 2, 3, predicted_at=predicted_at, backend=backend, dtype=torch.float64)
    x, query, value = (values((1, T, n), torch.float64, n) for n in (C, 8, 7 + 1))
    mask = torch.ones(1, T, dtype=torch.bool)
    mask[0, [2, 5, 6, 7]] = False
    y = module(x, query, value, mask)
    span = module.pointwise(module.depthwise(x, mask))
    kernels = module.kernel(query * span).view(T, 2, 3)
    for i in range(T):
        for h in range(2):
            total, weights = torch.zeros(4, dtype=torch.float64), kernels[i, h].softmax(0)
            inside = [c for c in range(3) if 0 <= i + c - 1 < T and mask[0, i + c - 1]]
            if predicted_at == "key" and inside:
                chosen = torch.stack([kernels[i + c - 1, h, c] for c in inside]).softmax(0)
                weights = dict(zip(inside, chosen, strict=True))
            for c in inside:
                total = total + weights[c] * value[0, i + c - 1, 4 * h : 4 * h + 4]
            torch.testing.assert_close(y[0, i, 4 * h : 4 * h + 4], total, rtol=1e-12, atol=1e-12)
