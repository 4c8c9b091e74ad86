"""What is hidden contributes nothing, whatever it holds: a NaN or an infinity in one row of q, k, v or of the incoming
gradient reaches the rows that see it, and no other, forward and backward. A row whose scores are all -inf sees nothing.
"""

import pytest
import torch

import convkernels as ck
from convkernels.ops.attention.reference import relation
from convkernels.ops.attention.schema import Attention
from convkernels.testing.attention import DELTA_THROUGH_OUT, INPUTS, AttentionProblem
from convkernels.testing.attention_oracle import Elements
from convkernels.testing.compare import attention_results

OP = "attention_grad"
MODES = {
    "causal": {"causal": True},
    "mask": {"outside": 2},
    "packed": {"lengths": True},
    "packed_causal": {"lengths": True, "causal": True, "outside": 1},
    "packed_mask": {"lengths": True, "outside": 2, "padding": 1},
    "padding": {"padding": 1, "causal": True},
}
TERMS = {
    "plain": {},
    "all": {"bias": True, "query_rel": 2, "key_rel": 1, "value_conv": 3},
    "rank": {"bias": True, "query_rel": 1, "rank": 5, "dropout": 0.2},
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def nan_of_a_gpu(dtype):
    """All bits set, as NVIDIA's arithmetic makes it, not one alone like Python's."""
    bits = torch.int32 if dtype.itemsize == 4 else torch.int16
    return torch.tensor(torch.iinfo(bits).max, dtype=bits).view(dtype)


def problem_of(ops, mode, terms, dtype):
    small = ops.interpreted
    lengths = (7, 1, 0, 9, 3) if small else (70, 3, 0, 57, 20)
    change = {**MODES[mode], **TERMS[terms]}
    if change.get("lengths"):
        change["lengths"] = lengths
    return AttentionProblem(
        batch=1 if "lengths" in change else 2, length=sum(lengths), keys=sum(lengths), groups=1, sharing=2,
        head_size=64 if dtype == "bfloat16" else 20, left=4, right=2, dtype=DTYPES[dtype], seed=3,
    ).with_(**change)  # fmt: skip


def visible(problem, tensors):
    """[T,S] of the first row of the batch."""
    pair = relation(Attention(*problem.op_arguments(tensors)))
    return pair.visible if tensors["key_mask"] is None else pair.visible & tensors["key_mask"][0]


def reached(name, row, sees):
    """Rows of the results that may depend on this row of an argument, by result."""
    if name in ("k", "v"):
        queries = sees[:, row]
    else:
        queries = torch.zeros_like(sees[:, 0])
        queries[row] = True
    keys = sees[queries].any(0)
    return {
        "out": queries if name != "grad" else torch.zeros_like(queries),
        "lse": queries if name in ("q", "k") else torch.zeros_like(queries),
        "q": queries,
        "k": keys,
        "v": keys if name != "v" else torch.zeros_like(keys),
        "rel_query": queries,
    }


@pytest.mark.thin(5)  # slow in the interpreter
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("mode", MODES)
def test_hidden_rows_reach_nothing(mode, terms, dtype, ops):
    problem = problem_of(ops, mode, terms, dtype)
    tensors = problem.tensors()
    expected = attention_results(ops, problem, tensors)
    sees = visible(problem, tensors)
    length = len(sees)
    for number, name in enumerate(("v", "k", "q", "grad")):
        row = (length // 3, length // 2, length // 5, length - 12)[number]
        row += int(name in "kv" and not sees[:, row].any())
        largest, common = torch.finfo(tensors[name].dtype).max, float("nan") if number % 2 else float("inf")
        for value in (common, nan_of_a_gpu(tensors[name].dtype) if number % 2 else largest):
            poisoned = dict(tensors, **{name: tensors[name].clone()})
            poisoned[name][0, row, :, 1] = value
            found = attention_results(ops, problem, poisoned)
            for result, rows in reached(name, row, sees).items():
                if tensors.get(result, 0) is None:
                    continue
                a, b = (x.movedim(2, 1) if result == "lse" else x for x in (found[result], expected[result]))
                where = f"{value} in row {row} of {name}"
                torch.testing.assert_close(a[1:], b[1:], rtol=1e-4, atol=1e-4, msg=f"{where}: batch of {result}")
                torch.testing.assert_close(
                    a[0, ~rows], b[0, ~rows], rtol=1e-4, atol=1e-4, msg=f"{where} reaches {result}"
                )
            if name == "v" and value is common:
                assert not found["out"][0, sees[:, row], :, 1].isfinite().any(), "a visible infinity is no number"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [16, 100])
def test_a_nan_of_a_gpu_is_one(channels, dtype, ops):
    problem = AttentionProblem(
        batch=1, length=20, keys=20, groups=1, head_size=channels, left=0, right=0, dtype=DTYPES[dtype], seed=3,
    )  # fmt: skip
    tensors = problem.tensors()
    for name, results in {"q": ("out",), "k": ("out",), "v": ("out",), "grad": ("q", "k", "v")}.items():
        poisoned = dict(tensors, **{name: tensors[name].clone()})
        poisoned[name][0, 7, :, 1] = nan_of_a_gpu(tensors[name].dtype)
        found = attention_results(ops, problem, poisoned)
        for result in results:
            value = found[result][0]
            value = value[7] if (name, result) in (("q", "out"), ("grad", "q")) else value
            assert (value[..., 1] if name == "v" or result == "v" else value).isnan().all(), (name, result)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["bias", "query_rel", "key_rel", "grad_lse"])
def test_a_nan_of_a_gpu_in_float32_is_one(name, dtype, ops):
    """Beside bfloat16, too: its upper half alone would be rounded to 0."""
    problem = AttentionProblem(
        batch=1, length=20, keys=20, groups=1, head_size=16, left=0, right=0, bias=True, query_rel=1, key_rel=1,
        dtype=DTYPES[dtype], seed=3,
    )  # fmt: skip
    t = problem.tensors()
    t[name] = torch.full_like(t[name], nan_of_a_gpu(torch.float32))
    out, lse = ops.attention(*problem.op_arguments(t))
    if name != "grad_lse":
        assert out.isnan().all() and lse.isnan().all()
    found = dict(zip(INPUTS, ops.attention_grad(*problem.grad_arguments(t, out, lse)), strict=True))
    for result in ("q", "k", "bias", "query_rel", "key_rel", *(() if name == "grad_lse" else ("v",))):
        assert found[result].isnan().all(), result


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["q", "grad", "grad_lse"])
def test_a_nan_stays_with_the_columns_that_its_row_sees(name, dtype, ops):
    """The first query sees the keys at its own place and to the right alone, whose offsets are not negative."""
    problem = AttentionProblem(
        batch=1, length=20, keys=20, groups=1, head_size=16, left=3, right=3, outside=2, bias=True, query_rel=1,
        dtype=DTYPES[dtype], seed=3,
    )  # fmt: skip
    t = problem.tensors()
    t[name] = t[name].clone()
    t[name][(0, 0, 0)] = float("nan")
    found = attention_results(ops, problem, t)
    seen = torch.arange(7) >= 3
    assert found["bias"][0, seen].isnan().all() and found["bias"][0, ~seen].isfinite().all()
    if name != "q":  # whose product with the zeros of those columns counts in the reference
        assert found["query_rel"][:, ~seen].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("row", [0, 31, 32, 63])
def test_a_nan_at_the_end_of_a_block(row, dtype, ops):
    """The first or the last row of those that a kernel takes together."""
    problem = AttentionProblem(
        batch=1, length=65, keys=65, groups=1, head_size=16, left=3, right=3, causal=True, bias=True, query_rel=1,
        key_rel=1, dtype=DTYPES[dtype], seed=3,
    )  # fmt: skip
    tensors = problem.tensors()
    expected = attention_results(ops, problem, tensors)
    sees = visible(problem, tensors)
    for name in ("q", "k", "v", "grad"):
        poisoned = dict(tensors, **{name: tensors[name].clone()})
        poisoned[name][0, row, :, 1] = float("nan")
        found, rows = attention_results(ops, problem, poisoned), reached(name, row, sees)
        assert found["q"][0, rows["q"]].isnan().all(), name
        for result in ("out", "q", "k", "v"):
            hidden = ~rows[result]
            torch.testing.assert_close(
                found[result][0, hidden], expected[result][0, hidden], rtol=1e-4, atol=1e-4, msg=f"{name} in {result}"
            )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
def test_keys_that_nothing_sees(mode, dtype, ops):
    """One query fewer than keys in its sequence, or a gap of the mask: their NaN reaches no table either."""
    problem = problem_of(ops, mode, "all", dtype)
    if problem.lengths:
        problem = problem.with_(lengths=(*problem.lengths[:-1], 0), key_lengths=problem.lengths)
        hidden = slice(sum(problem.lengths), None)
    else:
        problem = problem.with_(padding=1)
        hidden = ~problem.tensors()["key_mask"][0]
    tensors = problem.tensors()
    expected = attention_results(ops, problem, tensors)
    for name in "kv":
        tensors[name] = tensors[name].clone()
        tensors[name][0, hidden] = float("nan")
    found = attention_results(ops, problem, tensors)
    for name, value in found.items():
        if tensors.get(name, 0) is not None:
            torch.testing.assert_close(value, expected[name], rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [0, 5])
@pytest.mark.parametrize("outside", [0, 2])
def test_queries_that_see_nothing(outside, rank, dtype, ops):
    """More queries than keys, so that the first see none: their NaN reaches no gradient, and their own is 0."""
    T, S = (21, 16) if ops.interpreted else (150, 70)
    problem = AttentionProblem(
        batch=1, length=T, keys=S, groups=1, sharing=2, head_size=16, left=4, right=2, outside=outside, causal=True,
        bias=True, query_rel=1, rank=rank, key_rel=1, dtype=DTYPES[dtype], seed=3,
    )  # fmt: skip
    tensors = problem.tensors()
    expected = attention_results(ops, problem, tensors)
    for name in ("q", "rel_query", "grad"):
        if tensors[name] is not None:
            tensors[name] = tensors[name].clone()
            tensors[name][:, : T - S] = float("nan")
    found = attention_results(ops, problem, tensors)
    assert (found["q"][:, : T - S] == 0).all()
    for name, value in found.items():
        if tensors.get(name, 0) is not None:
            torch.testing.assert_close(value, expected[name], rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("outside", ["clip", "zero", "mask"])
def test_scores_of_minus_infinity(outside, dtype, backend):
    """A bias of -inf is how people mask: rows with nothing else give 0, lse -inf, and no gradient, even of NaN."""
    T, D = (40, 16) if backend == "triton" else (150, 64)
    q, k, v = (torch.randn(1, T, 2, D).to(DTYPES[dtype]).requires_grad_() for _ in range(3))
    bias = torch.zeros(2, 9)
    bias[0, :5] = -torch.inf  # head 0 sees what follows its place only: the last query sees nothing
    bias.requires_grad_()
    taps = torch.randn(2, D, 9)
    out, lse = ck.composite_attention(q, k, v, bias=bias, outside=outside, return_lse=True, backend=backend)
    convolved = ck.composite_attention(q, k, v, bias=bias, outside=outside, value_conv=taps, backend=backend)
    blind = torch.zeros(2, T, dtype=torch.bool)
    blind[0, T - 1] = True
    if outside == "zero":  # all keys further to the left than the window are seen
        blind[:] = False
    assert torch.equal(lse[0] == -torch.inf, blind)
    seen_by = out.transpose(1, 2)[0]
    assert (seen_by[blind] == 0).all() and seen_by.isfinite().all() and convolved.isfinite().all()
    cotangent = torch.where(blind, torch.nan, 1.0)  # what merging several results makes of -inf
    into = torch.where(blind.T[None, :, :, None], torch.nan, torch.ones_like(out))
    gradients = torch.autograd.grad((out, lse), (q, k, v, bias), (into, cotangent[None]))
    for gradient in gradients:
        assert gradient.isfinite().all()
    assert (gradients[0].transpose(1, 2)[0][blind] == 0).all()
    assert (gradients[3][0, :5] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("outside", ["clip", "mask"])
def test_infinite_keys(outside, dtype, backend):
    """A key whose score is -inf is like padding, also for queries whose numbers have few bits; one of inf, NaN."""
    T, D = (40, 16) if backend == "triton" else (150, 64)
    q, k, v = (torch.randn(1, T, 2, D) for _ in range(3))
    row, above = T // 3, torch.arange(T) < T - 4
    q[..., 1] = torch.where(above, 1.0, -1.0)[None, :, None]
    q[0, ::2, :, 1] *= torch.rand(T // 2, 2) + 0.5
    k[0, row, :, 1] = -torch.inf
    q, k, v = (x.to(DTYPES[dtype]) for x in (q, k, v))
    terms = {
        "bias": torch.randn(2, 2 * T - 1),
        "outside": outside,
        "return_lse": True,
        "backend": backend,
    }
    found = ck.composite_attention(q, k, v, **terms)
    expected = ck.composite_attention(q, k, v, key_mask=(torch.arange(T) != row)[None], **terms)
    torch.testing.assert_close(found[0][:, above], expected[0][:, above])
    torch.testing.assert_close(found[1][..., above], expected[1][..., above])
    assert not found[0][:, ~above].isfinite().any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("infinite", ["q", "k"])
def test_infinite_products_with_tables(infinite, dtype, backend):
    """Of one sign, whatever the parts that a table of float32 is multiplied in: such a score of -inf hides, too."""
    if backend in ("triton", "cuda") and dtype == "bfloat16":
        pytest.xfail("matrix units of GPUs multiply such a table in parts of both signs")
    T, D, row = 40, 16, 21
    q, k, v, query_rel, key_rel = (torch.randn(shape) for shape in [(1, T, 1, D)] * 3 + [(D, 7)] * 2)
    for tensor in (q[..., 1], k[..., 1], query_rel[1], key_rel[1]):
        tensor.copy_(torch.rand(tensor.shape) + 0.1)
    {"q": q, "k": k}[infinite][0, row, 0, 1] = -torch.inf
    q, k, v = (x.to(DTYPES[dtype]) for x in (q, k, v))
    terms = {"query_rel": query_rel, "key_rel": key_rel, "return_lse": True, "backend": backend}
    found = ck.composite_attention(q, k, v, **terms)
    rest = torch.arange(T) != row
    if infinite == "q":
        assert (found[0][0, row] == 0).all() and (found[1][..., row] == -torch.inf).all()
        assert found[0][:, rest].isfinite().all()
        return
    expected = ck.composite_attention(q, k, v, key_mask=rest[None], **terms)
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_scores_of_minus_infinity(dtype, backend):
    """Nothing is seen by anyone, and nothing depends on what the keys hold."""
    q, k, v = (torch.randn(1, 9, 2, 16).to(DTYPES[dtype]).requires_grad_() for _ in range(3))
    bias = torch.full((2, 1), -torch.inf, requires_grad=True)
    out, lse = ck.composite_attention(q, k, v, bias=bias, return_lse=True, backend=backend)
    assert (out == 0).all() and (lse == -torch.inf).all()
    for gradient in torch.autograd.grad(out.float().sum(), (q, k, v, bias)):
        assert (gradient == 0).all()


@pytest.mark.parametrize("key_lengths", [(0, 9), (20, 0, 9), (3, 0, 0, 40)], ids=str)
def test_a_sequence_without_keys_is_not_the_next_one(ops, key_lengths):
    """Their queries' places follow each other, and both sequences of keys begin at the same key."""
    lengths = tuple(length or 2 for length in key_lengths)
    problem = AttentionProblem(
        batch=1, length=sum(lengths), keys=sum(key_lengths), head_size=8, left=4, right=3, bias=True, query_rel=2,
        key_rel=2, value_conv=1, lengths=lengths, key_lengths=key_lengths,
    )  # fmt: skip
    tensors = problem.tensors()
    elements = Elements(problem, tensors)
    found = attention_results(ops, problem, tensors)
    elements.check_out(found.pop("out"), found.pop("lse"))
    given = {name: gradient for name, gradient in found.items() if tensors[name] is not None}
    elements.check_gradients(given, through_out=ops.backend in DELTA_THROUGH_OUT)


@pytest.mark.parametrize(
    "hiding",
    [{"causal": True}, {"window": 0, "outside": "mask"}, {"packed": True}],
    ids=["causal", "mask", "packed"],
)
def test_products_of_hidden_pairs_may_overflow(backend, hiding):
    """All inputs are finite, and the gradient of a hidden p is not."""
    q, k, v = (torch.ones(1, 2, 1, 16) for _ in range(3))
    v[:, 1] = 3e38
    leaves = [t.requires_grad_() for t in (q, k, v)]
    options = dict(hiding)
    if options.pop("packed", False):
        options = {name: torch.tensor([0, 1, 2]) for name in ("cu_seqlens_q", "cu_seqlens_k")}
    if "window" in options:
        options["bias"] = torch.zeros(1, 1)
    grad = torch.zeros_like(q)
    grad[:, 0] = 10
    found = torch.autograd.grad(ck.composite_attention(*leaves, **options, backend=backend), leaves, grad)
    assert [gradient[0, :, 0, 0].tolist() for gradient in found] == [[0, 0], [0, 0], [10, 0]]
