"""Attention on tensors that span several blocks of queries and of keys: against the reference in float64, and the same
bits for any number of threads and on every instruction set that the machine has.
"""

import itertools

import pytest
import torch
from conftest import interpreted, simulated
from test_instruction_sets import isa, lower_isa, run  # noqa: F401

import convkernels as ck
from convkernels.testing.attention import INPUTS, AttentionProblem

OP = "attention_grad"
BASE = AttentionProblem(batch=2, length=75, keys=301, groups=2, sharing=2, head_size=20, left=5, right=3,
                        dtype=torch.float64, table_dtype=torch.float64, seed=3)  # fmt: skip
PROBLEMS = {
    "plain": {},
    "causal": {"causal": True, "length": 301},
    "clip": {"bias": True, "query_rel": 2, "key_rel": 2, "length": 301},
    "clip_wide": {"bias": True, "query_rel": 1, "key_rel": 1, "left": 140, "right": 37, "length": 170, "keys": 170},
    "zero": {"bias": True, "query_rel": 1, "rank": 6, "key_rel": 1, "outside": 1, "causal": True},
    "mask": {"bias": True, "key_rel": 2, "outside": 2, "left": 40, "right": 30, "length": 333},
    "padding": {"bias": True, "query_rel": 2, "key_rel": 1, "padding": 2, "value_conv": 3, "length": 150},
    "dropout": {"bias": True, "key_rel": 1, "dropout": 0.3, "value_conv": 2, "padding": 1},
    "packed": {"batch": 1, "lengths": (100, 3, 0, 40, 64), "key_lengths": (131, 0, 5, 150, 64), "bias": True,
               "query_rel": 2, "key_rel": 2, "value_conv": 3, "causal": True},
    "no_qk": {"qk": False, "bias": True, "key_rel": 1, "value_conv": 1, "causal": True, "length": 300},
    "long_queries": {"length": 301, "keys": 75, "bias": True, "query_rel": 1, "key_rel": 1, "value_conv": 3},
    "one_query": {"length": 1, "keys": 400, "bias": True, "query_rel": 1, "key_rel": 1, "value_conv": 3},
}  # fmt: skip


@pytest.fixture(autouse=True)
def not_interpreted(request):
    if "backend" in request.fixturenames and interpreted(request.getfixturevalue("backend")):
        pytest.skip("these sizes take the interpreter minutes; tests/test_attention_tiles.py has some for it")


def results(backend, problem, tensors):
    """out, lse and all gradients, by name."""
    attention, attention_grad = (
        getattr(getattr(torch.ops.convkernels, name), backend) for name in ("_attention", "_attention_grad")
    )
    out, lse = attention(*problem.op_arguments(tensors))
    found = attention_grad(*problem.grad_arguments(tensors, out, lse))
    return {"out": out, "lse": lse, **dict(zip(INPUTS, found, strict=True))}


def largest(value):
    value = value[value.isfinite()]
    return value.abs().max().item() if value.numel() else 0.0


@pytest.mark.parametrize("name", PROBLEMS)
def test_float64(name, backend):
    problem = BASE.with_(**PROBLEMS[name])
    tensors = problem.tensors()
    expected = results("reference", problem, tensors)
    for key, value in results(backend, problem, tensors).items():
        torch.testing.assert_close(
            value,
            expected[key],
            rtol=0,
            atol=1e-12 * max(1.0, largest(expected[key])),
            msg=lambda m, k=key: f"{k}: {m}",
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", PROBLEMS)
def test_other_types(name, dtype, backend):
    """Close to the reference's results from the same inputs in float64."""
    problem = BASE.with_(**PROBLEMS[name], **{"dtype": dtype, "table_dtype": dtype})
    tensors = problem.tensors()
    exact = {n: t.double() if t is not None and t.is_floating_point() else t for n, t in tensors.items()}
    expected = results("reference", problem, exact)
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    for key, value in results(backend, problem, tensors).items():
        torch.testing.assert_close(
            value.double(), expected[key], rtol=0, atol=tolerance * max(1.0, largest(expected[key])),
            msg=lambda m, k=key: f"{k}: {m}",
        )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["clip", "padding", "dropout", "packed"])
def test_any_number_of_threads(name, dtype, backend):
    if backend == "reference" or simulated(backend):
        pytest.skip("PyTorch's own sums, or kernels for which threads of the CPU do nothing")
    problem = BASE.with_(**PROBLEMS[name]).with_(dtype=dtype, table_dtype=dtype)
    tensors = problem.tensors()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first = results(backend, problem, tensors)
        for count, _ in itertools.product((2, 3, 5), range(2)):
            torch.set_num_threads(count)
            again = results(backend, problem, tensors)
            assert all(torch.equal(first[n], again[n]) for n in first), f"{count} threads differ from one"
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("needs", [1, 2, 4, 8, 16, 64, 128, 256, 512, 2 + 4, 1 + 64])
def test_any_gradient_alone_has_the_same_bits(needs, backend):
    problem = BASE.with_(**PROBLEMS["padding"])
    tensors = problem.tensors()
    everything = results(backend, problem, tensors)
    grad = getattr(torch.ops.convkernels._attention_grad, backend)
    found = grad(*problem.grad_arguments(tensors, everything["out"], everything["lse"], needs))
    for bit, (name, value) in enumerate(zip(INPUTS, found, strict=True)):
        if needs & 1 << bit:
            assert torch.equal(value, everything[name]), name


@pytest.mark.slow
def test_every_instruction_set(lower_isa):  # noqa: F811
    done = run(
        ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "cpu and not instruction_set", "-m", "not slow",
         "tests/test_attention_blocks.py", "tests/test_attention_fuzz.py"],
        lower_isa,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


B, T, S, H, G, D, W = 2, 5, 6, 4, 2, 3, 4
GOOD = {"q": (B, T, H, D), "k": (B, S, G, D), "v": (B, S, G, D), "bias": (H, W), "query_rel": (D, W),
        "key_rel": (H, D, W), "value_conv": (H, D, W), "value_conv_bias": (H, D), "value_conv_scale": (H,)}  # fmt: skip
REFUSED = [
    ("q", {"q": torch.randn(T, H, D)}),
    ("q", {"q": torch.ones(B, T, H, D, dtype=torch.int64)}),
    ("q", {"q": torch.randn(B, T, 0, D)}),
    ("k", {"k": torch.randn(B, S, 3, D)}),
    ("k", {"k": torch.randn(B + 1, S, G, D)}),
    ("k", {"k": torch.randn(B, S, G, D).half()}),
    ("v", {"v": torch.randn(B, S - 1, G, D)}),
    ("v", {"v": torch.randn(B, S, G, D - 1)}),
    ("left", {"left": -1}),
    ("right", {"right": -1}),
    ("outside", {"outside": 3}),
    ("bias", {"bias": torch.randn(H, W - 1)}),
    ("bias", {"left": 2}),
    ("bias", {"bias": torch.randn(H, W).double()}),
    ("query_rel", {"query_rel": torch.randn(D + 1, W)}),
    ("query_rel", {"query_rel": torch.randn(H + 1, D, W)}),
    ("query_rel", {"rel_query": torch.randn(B, T, H, 2)}),
    ("rel_query", {"rel_query": torch.randn(B, T + 1, H, D)}),
    ("rel_query", {"rel_query": torch.randn(B, T, H, D).half()}),
    ("key_rel", {"key_rel": torch.randn(D, W + 1)}),
    ("value_conv", {"value_conv": torch.randn(D, W)}),
    ("value_conv", {"value_conv": None}),
    ("value_conv_bias", {"value_conv_bias": torch.randn(H, D + 1)}),
    ("value_conv_scale", {"value_conv_scale": torch.randn(H, 1)}),
    ("key_mask", {"key_mask": torch.ones(B, S)}),
    ("key_mask", {"key_mask": torch.ones(B, S + 1, dtype=torch.bool)}),
    ("q", {"cu_seqlens_q": torch.tensor([0, T]), "cu_seqlens_k": torch.tensor([0, S])}),
    ("cu_seqlens_k", {"cu_seqlens_q": torch.tensor([0, T])}),
    ("dropout", {"dropout": 1.5}),
    ("seed", {"dropout": 0.5}),
]
PACKED_REFUSED = [
    ("cu_seqlens_q", torch.tensor([0, T + 5]), torch.tensor([0, S])),
    ("cu_seqlens_k", torch.tensor([0, T]), torch.tensor([0, S + 5])),
    ("cu_seqlens_k", torch.tensor([0, 2, T]), torch.tensor([0, S])),
    ("cu_seqlens_q", torch.tensor([0, 4, 2, T]), torch.tensor([0, 1, 2, S])),
    ("cu_seqlens_q", torch.tensor([0.0, 5.0]), torch.tensor([0, S])),
    ("cu_seqlens_q", torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)),
]


def native():
    reasons = ck.why_not("cpu", op=OP)
    if reasons:
        pytest.skip("; ".join(reasons))
    return torch.ops.convkernels


def refused(argument, kwargs):
    with pytest.raises(RuntimeError, match=f"argument '{argument}'"):
        native()._attention.cpu(**kwargs)
    grad, lse = torch.randn(B, T, H, D), torch.randn(B, H, T)
    with pytest.raises(RuntimeError, match=f"argument '{argument}'"):
        native()._attention_grad.cpu(grad, None, grad, lse, **kwargs)


@pytest.mark.parametrize("row", range(len(REFUSED)), ids=lambda i: f"{i}-{REFUSED[i][0]}")
def test_the_native_ops_refuse_to_leave_their_memory(row):
    argument, changes = REFUSED[row]
    good = {name: torch.randn(shape) for name, shape in GOOD.items()}
    refused(argument, {**good, "left": 1, "right": 2, **changes})


@pytest.mark.parametrize("row", range(len(PACKED_REFUSED)), ids=lambda i: f"{i}-{PACKED_REFUSED[i][0]}")
def test_the_native_ops_refuse_bad_boundaries(row):
    argument, of_queries, of_keys = PACKED_REFUSED[row]
    good = {name: torch.randn(1, *GOOD[name][1:]) for name in "qkv"}
    refused(argument, {**good, "cu_seqlens_q": of_queries, "cu_seqlens_k": of_keys})


@pytest.mark.parametrize(
    ("argument", "changes"),
    [
        ("grad", {"grad": torch.randn(B, T, H, D + 1)}),
        ("grad", {"grad": torch.randn(B, T, H, D).double()}),
        ("lse", {"lse": torch.randn(B, T, H)}),
        ("lse", {"lse": torch.randn(B, H, T).double()}),
        ("grad_lse", {"grad_lse": torch.randn(B, H, T + 1)}),
        ("grad_lse", {"grad_lse": torch.randn(B, H, T).half()}),
    ],
)
def test_the_native_gradient_refuses_to_leave_its_memory(argument, changes):
    good = {name: torch.randn(GOOD[name]) for name in "qkv"}
    extra = {"grad": torch.randn(B, T, H, D), "grad_lse": None, "out": torch.randn(B, T, H, D),
             "lse": torch.randn(B, H, T)}  # fmt: skip
    with pytest.raises(RuntimeError, match=f"argument '{argument}'"):
        native()._attention_grad.cpu(**{**extra, **good, **changes})
