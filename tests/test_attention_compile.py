"""composite_attention: torch.compile without graph breaks, tensors without numbers, autocast and checkpointing."""

import pytest
import torch
from attention_inputs import DOUBLE, MODES, SHAPES, TERMS, B, D, H, T, leaf, qkv
from helpers import close
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import grad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint

import convkernels as ck
from convkernels.testing.inputs import values

OP = "attention_grad"


@pytest.mark.parametrize("mode", ["everything", "packed"])
def test_compile(mode, backend):
    """No graph breaks, dynamic shapes, forward and backward equal to eager."""
    torch._dynamo.reset()
    extra, _, options = MODES[mode]
    options = {name: value for name, value in options.items() if name not in ("mask", "seeded")}

    def call(leaves, more):
        return ck.composite_attention(**leaves, **more, backend=backend)

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True, dynamic=True)
    for length in (5, 9, 12):
        leaves = {name: leaf(name, shape=(1, length, *SHAPES[name][2:]) if name in "qkv" else None)
                  for name in ("q", "k", "v", *extra)}  # fmt: skip
        more = dict(options, key_mask=values((1, length), DOUBLE, 8) > -0.5)
        if mode == "packed":
            more.update({name: torch.tensor([0, 3, length]) for name in ("cu_seqlens_q", "cu_seqlens_k")})
        else:
            more["seed"] = torch.tensor([3])
        y, expected = compiled(leaves, more), call(leaves, more)
        close(y, expected)
        for a, b in zip(
            *(torch.autograd.grad(r.square().sum(), list(leaves.values())) for r in (y, expected)), strict=True
        ):
            close(a, b)
    torch._dynamo.reset()


def test_compile_of_a_functional_gradient(backend):
    """torch.compile(torch.func.grad(...)) keeps the operator whole; traced into, its gradient would be zero."""
    torch._dynamo.reset()
    q, k, v = (t.detach() for t in qkv())
    function = grad(lambda q: ck.composite_attention(q, k, v, backend=backend).square().sum())
    found = torch.compile(function, backend="aot_eager", fullgraph=True)(q)
    assert found.any()
    close(found, function(q))
    torch._dynamo.reset()


@pytest.mark.parametrize("mode", ["fake", "symbolic"])
def test_boundaries_without_values(mode, backend):
    """Where sequences' boundaries only stand for others they are not read; in eager code they are."""
    q, bounds = torch.randn(1, T, H, D), torch.tensor([0, 2, T])

    def call(q, bounds):
        return ck.composite_attention(q, q, q, cu_seqlens_q=bounds, backend=backend)

    graph = make_fx(call, tracing_mode=mode)(q, bounds)
    assert torch.equal(graph(q, bounds), call(q, bounds))
    with FakeTensorMode() as fakes:
        assert call(*map(fakes.from_tensor, (q, bounds))).shape == q.shape
    doubled = call(*(TwoTensor(t, t.clone()) for t in (q, bounds)))
    assert torch.equal(doubled.a, call(q, bounds))


def test_meta_tensors(backend):
    """Shapes, dtypes and strides as on a device, and nothing is computed."""
    names = ("q", "k", "v", *TERMS)
    for chosen in (backend, "auto"):
        inputs = {name: leaf(name).detach().to("meta").requires_grad_() for name in names}
        out, lse = ck.composite_attention(**inputs, window=(1, 2), return_lse=True, dropout=0.2, training=True,
                                          backend=chosen)  # fmt: skip
        assert out.is_meta and out.shape == inputs["q"].shape and lse.shape == (B, H, T)
        out.sum().backward()
        assert all(value.grad.shape == value.shape for value in inputs.values())


def test_autocast_and_checkpoint(backend):
    q, k, v = (t.requires_grad_() for t in qkv(torch.float32))
    bias = leaf("bias", dtype=torch.float32)
    kind = q.device.type
    with torch.autocast(kind, dtype=torch.bfloat16):
        y = ck.composite_attention(q, k, v, bias=bias, window=(1, 2), backend=backend)
    assert y.dtype == torch.bfloat16
    found = torch.autograd.grad(y.float().sum(), (q, k, v, bias))
    assert all(value.dtype == torch.float32 for value in found)

    def call(q, k, v):
        return ck.composite_attention(q, k, v, dropout=0.3, training=True, backend=backend)

    torch.manual_seed(1)
    plain = torch.autograd.grad(call(q, k, v).sum(), q)
    torch.manual_seed(1)
    assert torch.equal(torch.autograd.grad(checkpoint(call, q, k, v, use_reentrant=False).sum(), q)[0], plain[0])
