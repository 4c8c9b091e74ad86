"""The convolution module of the Conformer: beside its definition in torch.nn, streaming, and checkpoints."""

import copy

import pytest
import torch
from helpers import close
from torch import nn

from convkernels.nn import ConformerConv
from convkernels.testing.inputs import values

B, T, C, K = 2, 11, 12, 5
DOUBLE = torch.float64
NORMS = ["batch", "layer", None]


class Defined(nn.Module):
    """With the names of Parakeet's module, and convolutions as pointwise maps."""

    def __init__(self, norm, padding, bias):
        super().__init__()
        self.pointwise_conv1 = nn.Conv1d(C, 2 * C, 1, bias=bias)
        self.depthwise_conv = nn.Conv1d(C, C, K, groups=C, bias=bias)
        self.norm = {"batch": nn.BatchNorm1d, "layer": nn.LayerNorm}[norm](C) if norm else None
        self.pointwise_conv2 = nn.Conv1d(C, C, 1, bias=bias)
        self.ahead = 0 if padding == "causal" else (K - 1) // 2

    def forward(self, x, mask=None):
        y = nn.functional.glu(self.pointwise_conv1(x.mT), 1)
        if mask is not None:
            y = y.masked_fill(~mask[:, None], 0.0)
        y = self.depthwise_conv(nn.functional.pad(y, (K - 1 - self.ahead, self.ahead)))
        if isinstance(self.norm, nn.LayerNorm):
            y = self.norm(y.mT).mT
        elif self.norm is not None:
            y = self.norm(y)
        return self.pointwise_conv2(nn.functional.silu(y)).mT


def stirred(module):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in (*module.parameters(), *module.buffers()):
            if value.dtype.is_floating_point:
                value.add_(torch.rand(value.shape, generator=generator), alpha=0.5)
    return module.double()


def pair(norm, padding="same", bias=True, backend="auto"):
    expected = stirred(Defined(norm, padding, bias))
    module = ConformerConv(C, K, norm=norm, padding=padding, bias=bias, backend=backend, dtype=DOUBLE)
    module.load_state_dict(expected.state_dict())
    return module, expected


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("padding", ["same", "causal"])
@pytest.mark.parametrize("norm", NORMS)
def test_definition(norm, padding, bias, training, backend):
    """Outputs, gradients and running statistics, beside padding."""
    results = []
    mask = torch.arange(T) < torch.tensor([[T], [T - 4]])
    for module in pair(norm, padding, bias, backend):
        x = values((B, T, C), DOUBLE, 1).requires_grad_()
        y = module.train(training)(x, mask)
        (y * values(y.shape, DOUBLE, 2)).sum().backward()
        grads = {name: p.grad.squeeze(-1) if p.grad.dim() == 3 and "pointwise" in name else p.grad
                 for name, p in module.named_parameters()}  # fmt: skip
        results.append({"y": y, "x": x.grad, **grads, **dict(module.named_buffers())})
    found, expected = results
    assert found.keys() == expected.keys()
    for name in found:
        close(found[name], expected[name])


def state_of(module, x):
    return nn.functional.glu(module.pointwise_conv1(x), -1)


@pytest.mark.parametrize("norm", NORMS)
def test_streaming(norm, backend):
    """A prefix, steps of one position and of several give the whole sequence; packed sequences each alone."""
    module = pair(norm, "causal", backend=backend)[0].eval()
    x = values((B, T, C), DOUBLE, 1)
    with torch.no_grad():
        expected = module(x)
        y, state = module(x[:, :4], return_state=True)
        state, rows = state.contiguous(), [y]
        rows += [module.step(x[:, 4], state)[:, None], module.step(x[:, 5:9], state), module.step(x[:, 9:], state)]
        close(torch.cat(rows, 1), expected)
        first = module.init_state(B)
        close(module.step(x[:, 0], first), expected[:, 0])
        packed = module(x[:1], cu_seqlens=torch.tensor([0, 4, T]))
        close(packed[:, 4:], module(x[:1, 4:]))
        pool, slots, real = torch.zeros(5, K - 1, C, dtype=DOUBLE), torch.tensor([3, -1]), torch.tensor([True, False])
        close(module.step(x[:, 0], pool, slots=slots)[0], expected[0, 0])
        close(pool[3, -1], state_of(module, x[0, 0]))
        module.step(x[:, 0].masked_fill(~real[:, None], torch.nan), first.zero_(), mask=real)
        close(first[:, -1], torch.stack([pool[3, -1], torch.zeros(C, dtype=DOUBLE)]))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("hooked", ["depthwise_conv", "norm"])
def test_hooks(hooked, norm):
    """Whoever waits for the call of a module gets it, and the same numbers."""
    if hooked == "norm" and norm is None:
        return
    module, x, calls = pair(norm, "causal")[0].eval(), values((B, T, C), DOUBLE, 1), []
    state, again = module.init_state(B), module.init_state(B)
    with torch.no_grad():
        expected, one = module(x), module.step(x[:, 0], state)
        getattr(module, hooked).register_forward_hook(lambda *_: calls.append(1))
        close(module(x), expected)
        close(module.step(x[:, 0], again), one)
    assert len(calls) == 2 and torch.equal(state, again)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes(dtype, backend):
    module, expected = pair("batch", backend=backend)
    x = values((B, T, C), dtype, 1)
    y = module.to(dtype).eval()(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), expected.eval()(x.double()), rtol=0.05 if dtype == torch.bfloat16 else 1e-4,
                               atol=0.05 if dtype == torch.bfloat16 else 1e-4)  # fmt: skip


@pytest.mark.parametrize("training", [True, False])
def test_compile(training):
    torch._dynamo.reset()
    module = pair("batch")[0].train(training)
    x, reference = values((B, T, C), DOUBLE, 1), copy.deepcopy(module)
    close(torch.compile(module, backend="aot_eager", fullgraph=True)(x), reference(x))
    torch._dynamo.reset()


@pytest.mark.parametrize(("changes", "expected"), [
    ({"channels": 0}, r"argument 'channels': expected .*, got 0"),
    ({"norm": "group"}, r"argument 'norm': expected 'batch', 'layer' or None, got 'group'"),
    ({"bias": 1}, r"argument 'bias': expected True or False, got 1"),
    ({"dropout": 2.0}, r"argument 'dropout': expected .*, got 2.0"),
    ({"kernel_size": 0}, r"argument 'kernel_size': expected .*, got 0"),
    ({"padding": "valid"}, r"argument 'padding': expected .*, got 'valid'"),
])  # fmt: skip
def test_errors(changes, expected):
    with pytest.raises((ValueError, TypeError), match=expected):
        ConformerConv(**{"channels": C, **changes})


def test_calls_that_cannot_be():
    x = torch.randn(B, C)
    with pytest.raises(RuntimeError, match="DepthwiseConv1d.step: expected padding='causal', got 'same'"):
        ConformerConv(C).eval().step(x, torch.zeros(B, 30, C))
    module = ConformerConv(C, K, padding="causal")
    with pytest.raises(RuntimeError, match="ConformerConv.step: expected a module in eval mode"):
        module.step(x, module.init_state(B))
    with pytest.raises(ValueError, match=r"argument 'x': expected .*12"):
        module(torch.randn(B, T, C + 1))


@pytest.mark.parametrize("training", [True, False])
def test_the_module_of_parakeet(training):
    parakeet = pytest.importorskip("transformers.models.parakeet.modeling_parakeet")
    config = parakeet.ParakeetEncoderConfig(hidden_size=C, conv_kernel_size=K, convolution_bias=False)
    expected = stirred(parakeet.ParakeetEncoderConvolutionModule(config)).train(training)
    module = ConformerConv(C, K, bias=False, dtype=DOUBLE).train(training)
    module.load_state_dict(expected.state_dict())
    x, mask = values((B, T, C), DOUBLE, 1), torch.arange(T) < torch.tensor([[T], [T - 3]])
    close(module(x, mask), expected(x, mask[:, None, None].expand(B, 1, T, T) & mask[:, None, :, None]))
