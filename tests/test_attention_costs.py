"""What attention may take and lose: memory that grows linearly with the sequence, and errors beside those of PyTorch's
own operations in the same type.
"""

import pytest
import torch
from conftest import interpreted, simulated

import convkernels as ck
from convkernels._bench.timing import peak_extra_bytes

OP = "attention_grad"
H, D, WINDOW = 2, 64, 8
TABLES = {"bias": (H, 17), "query_rel": (H, D, 17), "key_rel": (D, 17), "value_conv": (H, D, 17)}


def inputs(length, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {n: (2, length, H, D) for n in "qkv"} | TABLES
    scale = {"key_rel": 0.1, "query_rel": 0.1, "value_conv": 0.1}
    return {
        n: (torch.randn(shape, generator=generator) * scale.get(n, 1.0)).to(dtype).requires_grad_()
        for n, shape in shapes.items()
    }


def test_memory_is_linear_in_length(backend):
    """Forward and backward together, at two lengths, and less than one T x T matrix per head."""
    if backend == "reference" or interpreted(backend) or simulated(backend):
        pytest.skip("keeps T x T matrices, or would measure the interpreter")
    peaks = {}
    for length in (1536, 3072):
        leaves = inputs(length, torch.float32)
        device = leaves["q"].device

        def call(leaves=leaves):
            y = ck.composite_attention(**leaves, window=WINDOW, backend=backend)
            return torch.autograd.grad(y, list(leaves.values()), torch.ones_like(y))

        call()
        peaks[length] = peak_extra_bytes(call, device)
        if peaks[length] is None:
            pytest.skip("the peak of memory is not known here")
    assert peaks[3072] <= 2.1 * peaks[1536]
    assert peaks[3072] < 2 * H * 3072 * 3072 * 4


def eager(q, k, v, bias, query_rel, key_rel, value_conv):
    """The definition by PyTorch's operations, in the type of the inputs."""
    length = q.shape[1]
    place = torch.arange(length)
    offset = place - place[:, None]
    column = offset.clamp(-WINDOW, WINDOW) + WINDOW
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    scale = D**-0.5
    by_query = torch.einsum("bhtd,hdw->bhtw", q * scale, query_rel) + bias[:, None]
    by_key = torch.einsum("bhsd,dw->bhsw", k * scale, key_rel)
    index = column.expand(*q.shape[:2], -1, -1)
    scores = (q * scale) @ k.transpose(2, 3) + by_query.gather(3, index)
    scores = scores + by_key.gather(3, (2 * WINDOW - index).transpose(2, 3)).transpose(2, 3)
    out = scores.softmax(-1) @ v
    padded = torch.nn.functional.pad(v, (0, 0, WINDOW, WINDOW)).unfold(2, 2 * WINDOW + 1, 1)
    return (out + (padded * value_conv[:, None]).sum(-1)).transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_beside_that_of_pytorch(dtype, backend):
    """Against float64, output and gradients: at most twice the error of the same in PyTorch's operations."""
    if interpreted(backend) or simulated(backend):
        pytest.skip("the lengths that matter take too long")

    def results(form, leaves):
        y = form(**leaves)
        cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(dtype).to(y)
        return {"out": y.detach(), **dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), cotangent),
                                              strict=True))}  # fmt: skip

    leaves = inputs(200, dtype)
    exact = results(eager, {n: t.detach().double().requires_grad_() for n, t in leaves.items()})
    plain = results(eager, leaves)
    ours = results(lambda **leaves: ck.composite_attention(**leaves, window=WINDOW, backend=backend), leaves)
    for name, expected in exact.items():
        error, allowed = ((found[name].double() - expected).norm() / expected.norm() for found in (ours, plain))
        assert error <= 2 * allowed, f"{name}: {error:.2e}, PyTorch {allowed:.2e}"
