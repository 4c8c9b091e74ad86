"""The sink of composite_attention: one more score of the softmax, which belongs to no key."""

import pytest
import torch
from attention_inputs import DOUBLE, SHAPES, B, D, H, T, leaf, qkv
from helpers import close
from torch.func import vmap

import convkernels as ck
from convkernels.testing.inputs import values

OP = "attention_grad"
INFINITE = float("inf")
MODES = {
    "plain": {},
    "causal": {"causal": True},
    "padded": {"key_mask": torch.tensor([[True] * T, [False] * T])},  # queries of the second row see no key
    "packed": {"cu_seqlens_q": torch.tensor([0, 2, 2, T])},
    "terms": {"window": (1, 2), "outside": "mask", "scale": 0.3},
}


def operands(mode, of_each, dtype=DOUBLE):
    rows = 1 if mode == "packed" else B
    inputs = {name: values((rows, *SHAPES[name][1:]), dtype, n) for n, name in enumerate("qkv")}
    if mode == "terms":
        inputs["bias"] = values((H, 4), dtype, 5)
    return inputs, values((rows, T, H) if of_each else (H,), dtype, 6)


def defined(q, k, v, sink, bias=None, causal=False, key_mask=None, cu_seqlens_q=None, window=None, scale=None, **_):
    """All scores, the sink's beside them, and torch's softmax."""
    k, v = (t.repeat_interleave(H // t.shape[2], 2) for t in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * (D**-0.5 if scale is None else scale)
    offset = torch.arange(T) - torch.arange(T)[:, None]
    hidden = torch.zeros(q.shape[0], 1, T, T, dtype=torch.bool)
    if bias is not None:
        scores = scores + bias[:, (offset + window[0]).clamp(0, sum(window))]
        hidden = hidden | (offset < -window[0]) | (offset > window[1])
    if causal:
        hidden = hidden | (offset > 0)
    if key_mask is not None:
        hidden = hidden | ~key_mask[:, None, None]
    if cu_seqlens_q is not None:
        number = torch.bucketize(torch.arange(T), cu_seqlens_q, right=True)
        hidden = hidden | (number != number[:, None])
    column = (sink if sink.dim() == 3 else sink.expand(q.shape[0], T, H)).transpose(1, 2)[..., None]
    scores = torch.cat([scores.masked_fill(hidden, -INFINITE), column], -1)
    return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1)[..., :-1], v), scores.logsumexp(-1)


@pytest.mark.parametrize("of_each", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_definition(mode, of_each, backend):
    """Outputs, lse and all gradients."""
    inputs, sink = operands(mode, of_each)
    results = []
    for call in (defined, lambda **t: ck.composite_attention(**t, return_lse=True, backend=backend)):
        leaves = {name: t.clone().requires_grad_() for name, t in {**inputs, "sink": sink}.items()}
        out, lse = call(**leaves, **MODES[mode])
        cotangents = values(out.shape, DOUBLE, 8), values(lse.shape, DOUBLE, 9)
        results.append((out, lse, *torch.autograd.grad((out, lse), list(leaves.values()), cotangents)))
    for found, expected in zip(*reversed(results), strict=True):
        close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype, backend):
    inputs, sink = operands("causal", True, dtype)
    expected, total = defined(*(t.double() for t in (*inputs.values(), sink)), causal=True)
    out, lse = ck.composite_attention(**inputs, sink=sink, causal=True, return_lse=True, backend=backend)
    assert out.dtype == dtype and lse.dtype == torch.float32
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), expected, rtol=2 * eps, atol=2 * eps)
    torch.testing.assert_close(lse.double(), total, rtol=1e-5, atol=1e-5)
    recorded = ck.composite_attention(**inputs, sink=sink.requires_grad_(), causal=True, backend=backend)
    assert torch.equal(out, recorded)


def test_gradients(backend):
    inputs, sink = operands("causal", False)
    leaves = [t.requires_grad_() for t in (*inputs.values(), sink)]

    def call(q, k, v, sink):
        return ck.composite_attention(q, k, v, sink=sink, causal=True, return_lse=True, backend=backend)

    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)


@pytest.mark.parametrize("value", [-INFINITE, -1e30, 1e30, INFINITE])
def test_extremes(value, backend):
    """A sink of -inf takes nothing, one of inf everything; no gradient is NaN, also where no key is seen."""
    q, k, v = (t.requires_grad_() for t in qkv())
    mask = MODES["padded"]["key_mask"]
    sink = torch.full((H,), value, dtype=q.dtype, requires_grad=True)
    out, lse = ck.composite_attention(q, k, v, sink=sink, key_mask=mask, return_lse=True, backend=backend)
    plain, without = ck.composite_attention(q, k, v, key_mask=mask, return_lse=True, backend=backend)
    if value < 0:
        assert torch.equal(out, plain) and torch.equal(lse[0], without[0])
    else:
        assert not out.any()
    assert (lse[1] == value).all()
    for gradient in torch.autograd.grad(out.sum() + lse[0].sum(), (q, k, v, sink)):
        assert gradient.isfinite().all()


def test_transforms(backend):
    q, k, v = (t.detach() for t in qkv())
    sinks = values((3, H), DOUBLE, 7)

    def call(sink):
        return ck.composite_attention(q, k, v, sink=sink, backend=backend)

    close(vmap(call)(sinks), torch.stack([call(sink) for sink in sinks]))
    torch._dynamo.reset()
    close(torch.compile(call, backend="aot_eager", fullgraph=True)(sinks[0]), call(sinks[0]))
    torch._dynamo.reset()


r = torch.randn
BAD = {
    "a number": ({"sink": 0.0}, TypeError, "a tensor", "0.0"),
    "of keys": ({"sink": r(T)}, ValueError, r"\[H\] = \[4\] or \[B,T,H\] = \[2, 5, 4\]", r"\[5\]"),
    "transposed": ({"sink": r(B, H, T)}, ValueError, r"\[B,T,H\] = \[2, 5, 4\]", r"\[2, 4, 5\]"),
    "integers": ({"sink": torch.ones(H, dtype=torch.int64)}, TypeError, "float", "int64"),
    "float64": ({"sink": r(H).double()}, TypeError, "not float64, because q is torch.float32", "float64"),
    "elsewhere": ({"sink": r(H, device="meta")}, ValueError, "on cpu, where q is", "on meta"),
    "depthwise": ({"sink": r(H), "value_conv": r(H, D, 3)}, ValueError, "None, because value_conv is given", r"\[4\]"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_errors(name):
    changes, kind, expected, got = BAD[name]
    inputs = {name: leaf(name).detach().float() for name in "qkv"}
    with pytest.raises(kind, match=rf"^composite_attention: argument 'sink': expected .*{expected}.*, got .*{got}"):
        ck.composite_attention(**inputs, **changes)
