"""What attention may take and lose: memory that grows linearly with the sequence, and errors beside those of PyTorch's
own operations in the same type.
"""

import pytest
import torch
from conftest import interpreted, simulated

import convkernels as ck
from benchmarks.timing import peak_extra_bytes
from convkernels.testing import compare
from convkernels.testing.attention import DELTA_THROUGH_OUT, AttentionProblem
from convkernels.testing.inputs import values

OP = "attention_grad"
H, D, WINDOW = 2, 64, 8
TABLES = {"bias": (H, 17), "query_rel": (H, D, 17), "key_rel": (D, 17), "value_conv": (H, D, 17)}


def inputs(length, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {n: (2, length, H, D) for n in "qkv"} | TABLES
    scale = {"key_rel": 0.1, "query_rel": 0.1, "value_conv": 0.1}
    return {
        n: (torch.randn(shape, generator=generator, device="cpu") * scale.get(n, 1.0))
        .to(torch.get_default_device(), dtype)
        .requires_grad_()
        for n, shape in shapes.items()
    }


def test_memory_is_linear_in_length(backend):
    """Forward and backward together, at two lengths, and less than one T x T matrix per head."""
    if backend == "reference" or interpreted(backend) or simulated(backend):
        pytest.skip("keeps T x T matrices, or would measure the interpreter")
    peaks = {}
    for length in (3072, 6144):  # so long that what threads keep between calls does not count
        leaves = inputs(length, torch.float32)
        device = leaves["q"].device

        def call(leaves=leaves):
            y = ck.composite_attention(**leaves, window=WINDOW, backend=backend)
            return torch.autograd.grad(y, list(leaves.values()), torch.ones_like(y))

        call()
        peaks[length] = peak_extra_bytes(call, device)
        if peaks[length] is None:
            pytest.skip("the peak of memory is not known here")
    assert peaks[6144] <= 2.1 * peaks[3072]
    assert peaks[6144] < 2 * H * 6144 * 6144 * 4


@pytest.mark.parametrize("term", ["query_rel", "key_rel"])
def test_memory_of_a_window_as_long_as_the_sequence(term, backend):
    """Forward and backward of a table with a column for every offset, 2T - 1: linear in T, too."""
    if backend != "cpu":
        pytest.skip("a promise of this backend")
    peaks = []
    for length in (1024, 2048):  # cut into as many parts, each with its own sums
        q, table = torch.randn(1, length, 1, D), torch.randn(1, D, 2 * length - 1)
        leaves = [q.requires_grad_(), table.requires_grad_()]

        def call(leaves=leaves):
            q, table = leaves
            y = ck.composite_attention(q, q, q, **{term: table}, backend=backend)
            return torch.autograd.grad(y, leaves, torch.ones_like(y))

        call()
        peaks.append(peak_extra_bytes(call, q.device))
    if None in peaks:
        pytest.skip("the peak of memory is not known here")
    assert peaks[1] <= 2.1 * peaks[0]


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
        cotangent = values(y.shape, dtype, 9).to(y)
        return {"out": y.detach(), **dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), cotangent),
                                              strict=True))}  # fmt: skip

    leaves = inputs(200, dtype)
    exact = results(eager, {n: t.detach().double().requires_grad_() for n, t in leaves.items()})
    plain = results(eager, leaves)
    ours = results(lambda **leaves: ck.composite_attention(**leaves, window=WINDOW, backend=backend), leaves)
    for name, expected in exact.items():
        error, allowed = ((found[name].double() - expected).norm() / expected.norm() for found in (ours, plain))
        assert error <= 2 * allowed, f"{name}: {error:.2e}, PyTorch {allowed:.2e}"


@pytest.mark.parametrize("value_conv", [0, 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_of_the_result_reaches_no_gradient(dtype, value_conv, ops):
    """Tables of float32 get gradients as good as float32 allows, and 16-bit ones lose what one rounding loses."""
    if ops.backend in DELTA_THROUGH_OUT:
        pytest.skip("finds delta from the result as it was rounded")
    problem = AttentionProblem(
        batch=1, length=300, keys=300, head_size=64, left=8, right=8, bias=True, query_rel=2, key_rel=1,
        value_conv=value_conv, dtype=dtype,
    )  # fmt: skip
    tensors = problem.tensors()
    expected = compare.attention_results(compare.REFERENCE, problem, compare.in_float64(tensors))
    for name, value in compare.attention_results(ops, problem, tensors).items():
        error = (value.double() - expected[name]).norm() / expected[name].norm() if value.numel() else 0.0
        assert error <= (2e-6 if value.dtype == torch.float32 else torch.finfo(dtype).eps / 2), f"{name}: {error:.1e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_dropped_whole_passes_no_gradient(dtype, ops):
    if ops.backend == "cuda":
        pytest.skip("finds delta from the result as it was rounded")
    problem = AttentionProblem(
        length=40, keys=40, head_size=16, bias=True, query_rel=1, key_rel=1, value_conv=3, dropout=1.0, dtype=dtype
    )
    found = compare.attention_results(ops, problem, problem.tensors() | {"grad_lse": None})
    for name in ("q", "k", "bias", "query_rel", "key_rel"):
        assert (found[name] == 0).all(), name
