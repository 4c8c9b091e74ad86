"""Values of composite_attention whose heads have another size than those of queries and keys."""

import pytest
import torch
from attention_inputs import DOUBLE, B, D, H, T
from helpers import close
from torch.func import vmap

import convkernels as ck
from convkernels.testing.inputs import values

W = 4
MODES = {
    "plain": {},
    "causal": dict(causal=True, key_mask=torch.tensor([[True] * T, [True] * (T - 2) + [False] * 2])),
    "packed": dict(cu_seqlens_q=torch.tensor([0, 2, T])),
    "sink": dict(sink=values((H,), DOUBLE, 11)),
}


def operands(E, mode, rel_query, dtype=DOUBLE):
    rows = 1 if mode == "packed" else B
    shapes = dict(
        q=(rows, T, H, D), k=(rows, T, H, D), v=(rows, T, H, E), bias=(H, W), query_rel=(H, D, W), key_rel=(D, W)
    )
    if mode != "sink":
        shapes |= dict(value_conv=(H, E, W), value_conv_bias=(H, E), value_conv_scale=(H,))
    if rel_query:
        shapes |= dict(rel_query=(rows, T, H, 2), query_rel=(H, 2, W))
    return {name: values(shape, dtype, n).requires_grad_() for n, (name, shape) in enumerate(shapes.items())}


def one_by_one(E, inputs, options, backend):
    """Each channel of the values apart: as if it were all D of them."""
    conv = [name for name in ("value_conv", "value_conv_bias") if name in inputs]

    def channel(e):
        tables = {name: inputs[name][:, e : e + 1].expand(-1, D, *inputs[name].shape[2:]) for name in conv}
        v = inputs["v"][..., e : e + 1].expand(-1, -1, -1, D)
        return ck.composite_attention(**(inputs | tables | dict(v=v)), **options, backend=backend)[..., :1]

    return torch.cat([channel(e) for e in range(E)], -1)


@pytest.mark.parametrize("rel_query", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("E", [1, D - 1, D + 3])
def test_definition(E, mode, rel_query, backend):
    """Results and gradients of all inputs."""
    inputs, options = operands(E, mode, rel_query), MODES[mode] | dict(window=(2, 1))
    y, lse = ck.composite_attention(**inputs, **options, backend=backend, return_lse=True)
    expected = one_by_one(E, inputs, options, "reference")
    assert y.shape == inputs["v"].shape and lse.shape == (y.shape[0], H, T)
    close(y, expected)
    grad = values(y.shape, DOUBLE, 20)
    actual = torch.autograd.grad(y, list(inputs.values()), grad)
    wanted = torch.autograd.grad(expected, list(inputs.values()), grad)
    for one, other in zip(actual, wanted, strict=True):
        close(one, other)


def test_derivatives(backend):
    inputs = operands(D - 1, "plain", False)

    def run(*tensors):
        given = dict(zip(inputs, tensors, strict=True))
        return ck.composite_attention(**given, window=(2, 1), backend=backend)

    assert torch.autograd.gradcheck(run, tuple(inputs.values()), fast_mode=True)
    if backend == "reference":
        assert torch.autograd.gradgradcheck(run, tuple(inputs.values()), fast_mode=True)


def test_batched_and_compiled(backend):
    inputs = operands(D + 1, "plain", False)
    q, k, v = (inputs[name].detach() for name in "qkv")

    def run(q, k, v):
        return ck.composite_attention(q, k, v, backend=backend)

    expected = run(q, k, v)
    close(vmap(run)(q[:, None], k[:, None], v[:, None])[:, 0], expected)
    torch._dynamo.reset()
    close(torch.compile(run, backend="aot_eager", fullgraph=True)(q, k, v), expected)


def test_bad_sizes():
    q = torch.randn(B, T, H, D)
    for v in (torch.randn(B, T, H, 0), torch.randn(B, T, H)):
        with pytest.raises(
            ValueError, match=r"argument 'v': expected a tensor of 4 dimensions \[B,S,G,E\], at least one"
        ):
            ck.composite_attention(q, q, v)
    v, taps = torch.randn(B, T, H, D + 1), torch.randn(H, D, W)
    with pytest.raises(ValueError, match=r"argument 'value_conv': expected .*\[H,E,W\]"):
        ck.composite_attention(q, q, v, value_conv=taps, window=(2, 1))
