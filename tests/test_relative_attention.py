"""Relative attention of Transformer-XL: beside its definition, with memory, windows, packed, and Parakeet's module."""

import pytest
import torch
from helpers import close
from torch import nn

from convkernels.nn import RelativeAttention
from convkernels.testing.inputs import values

B, T, C, H, D = 2, 7, 12, 3, 4
DOUBLE = torch.float64
OP = "attention_grad"


def made(backend="auto", dtype=DOUBLE, **options):
    torch.manual_seed(0)
    module = RelativeAttention(C, H, backend=backend, dtype=dtype, **options)
    with torch.no_grad():
        module.bias_u.copy_(values((H, D), dtype, 5))
        module.bias_v.copy_(values((H, D), dtype, 6))
    return module


def defined(module, x, memory=None, mask=None):
    """Every pair of a query and a key, one sinusoid for each."""
    seen = x if memory is None else torch.cat([memory, x], 1)
    distance = torch.arange(x.shape[1])[:, None] + seen.shape[1] - x.shape[1] - torch.arange(seen.shape[1])
    angle = distance[..., None] / 10000.0 ** (torch.arange(0, C, 2, dtype=DOUBLE) / C)
    embedded = torch.empty(*distance.shape, C, dtype=DOUBLE)
    embedded[..., 0::2], embedded[..., 1::2] = angle.sin(), angle.cos()
    q, k, v = (linear(y).unflatten(-1, (H, D))
               for linear, y in ((module.q_proj, x), (module.k_proj, seen), (module.v_proj, seen)))  # fmt: skip
    r = module.relative_k_proj(embedded).unflatten(-1, (H, D))
    scores = torch.einsum("bihd,bjhd->bhij", q + module.bias_u, k)
    scores = (scores + torch.einsum("bihd,ijhd->bhij", q + module.bias_v, r)) * D**-0.5
    left, right = (module.window or (10**6, 10**6))[0], 0 if module.causal else (module.window or (0, 10**6))[1]
    hidden = (distance > left) | (distance < -right)
    hidden = hidden if mask is None else hidden | ~mask[:, None, None]
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    return module.o_proj(torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2))


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (3, 1)}, {"window": 2, "causal": True},
                                     {"window": 50, "bias": False}], ids=str)  # fmt: skip
@pytest.mark.parametrize("length", [0, 4])
def test_definition(length, options, backend):
    """Outputs and gradients of x, memory and all parameters."""
    module, results = made(backend, **options), []
    mask = torch.arange(length + T) < torch.tensor([[length + T], [length + 5]])
    real = mask[:, length:]
    for call in (module, lambda x, mask, memory: defined(module, x, memory, mask)):
        x, memory = (values((B, n, C), DOUBLE, n).requires_grad_() for n in (T, length))
        module.zero_grad()
        y = call(x, mask, memory=memory)[real]
        (y * values(y.shape, DOUBLE, 9)).sum().backward()
        results.append([y, x.grad, memory.grad, *(p.grad.clone() for p in module.parameters())])
    for found, expected in zip(*results, strict=True):
        close(found, expected)


def test_packed_sequences(backend):
    module, x = made(backend), values((1, T, C), DOUBLE, 1)
    y = module(x, cu_seqlens=torch.tensor([0, 3, 3, T]))
    close(torch.cat([module(x[:, :3]), module(x[:, 3:])], 1), y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes(dtype, backend):
    module, x = made(backend, dtype), values((B, T, C), dtype, 1)
    y, tolerance = module(x), 1e-5 if dtype == torch.float32 else 3e-2
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), defined(module.double(), x.double()), rtol=tolerance, atol=tolerance)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert module.float()(x.float()).dtype == torch.bfloat16


@pytest.mark.parametrize("causal", [False, True])
def test_compile(causal):
    torch._dynamo.reset()
    module = made(causal=causal)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=True)
    for length in (5, 9, 12):
        x = values((B, length, C), DOUBLE, 1)
        close(compiled(x), module(x))
    torch._dynamo.reset()


@pytest.mark.parametrize("lengths", [(0, 0), (0, 3), (1, 0)])
def test_no_queries_and_one(lengths, backend):
    length, before = lengths
    module = made(backend)
    assert module(values((B, length, C), DOUBLE, 1), memory=values((B, before, C), DOUBLE, 2)).shape == (B, length, C)


@pytest.mark.parametrize(("changes", "expected"), [
    ({"channels": 0}, r"argument 'channels': expected .*, got 0"),
    ({"channels": 9}, r"argument 'channels': expected an even number, got 9"),
    ({"heads": 5}, r"argument 'heads': expected a divisor of 12, got 5"),
    ({"window": (1, -1)}, r"argument 'window': expected .*, got \(1, -1\)"),
    ({"causal": 1}, r"argument 'causal': expected True or False, got 1"),
    ({"dropout": -1.0}, r"argument 'dropout': expected .*, got -1.0"),
    ({"backend": "cudnn"}, r"argument 'backend': expected .*, got 'cudnn'"),
])  # fmt: skip
def test_errors(changes, expected):
    with pytest.raises((ValueError, TypeError), match=expected):
        RelativeAttention(**{"channels": C, "heads": H, **changes})


@pytest.mark.parametrize(("given", "expected"), [
    ({"x": torch.randn(B, T, C + 1)}, r"argument 'x': expected .*12"),
    ({"memory": torch.randn(B, T, 3)}, r"argument 'memory': expected .*12"),
    ({"memory": torch.randn(B, 2, C), "cu_seqlens": torch.tensor([0, T])}, r"argument 'memory': expected None"),
    ({"mask": torch.ones(B, T + 1, dtype=torch.bool)}, r"RelativeAttention: argument 'mask': expected .*\[2, 7\]"),
])  # fmt: skip
def test_errors_of_calls(given, expected):
    with pytest.raises(ValueError, match=expected):
        RelativeAttention(C, H)(**{"x": torch.randn(B, T, C), **given})


def test_the_module_of_parakeet():
    parakeet = pytest.importorskip("transformers.models.parakeet.modeling_parakeet")
    config = parakeet.ParakeetEncoderConfig(
        hidden_size=C, num_attention_heads=H, attention_bias=True, attn_implementation="eager"
    )
    expected = parakeet.ParakeetEncoderAttention(config, 0).double().eval()
    for parameter in (expected.bias_u, expected.bias_v):
        nn.init.normal_(parameter)
    module = RelativeAttention(C, H, dtype=DOUBLE)
    module.load_state_dict(expected.state_dict())
    x, mask = values((B, T, C), DOUBLE, 1), torch.arange(T) < torch.tensor([[T], [T - 3]])
    positions = parakeet.ParakeetEncoderRelPositionalEncoding(config)(x)
    found = module(x, mask)
    full = mask[:, None, None].expand(B, 1, T, T) & mask[:, None, :, None]
    close(found[mask], expected(x, positions, full)[0][mask], rtol=1e-6, atol=1e-6)  # its sinusoids are float32
