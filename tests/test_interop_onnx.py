"""ONNX graphs of this package's operators compute, in onnxruntime, what the operators do."""

import pytest
import torch

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
import onnxruntime as runtime
from torch.export import Dim

import convkernels as ck
import convkernels.nn as cknn
from convkernels.interop import onnx

B, T, C, H, K, D = 2, 9, 8, 4, 5, 6
LENGTHS = (9, 2, 31)  # shorter than the filters, too
STATEFUL, PLAIN = "CausalConvWithState", "Conv"


class Model(torch.nn.Module):
    """A function of inputs and of its one parameter."""

    def __init__(self, function, *shape, dtype=torch.float32):
        super().__init__()
        self.function = function
        self.weight = torch.nn.Parameter(torch.randn(shape, dtype=dtype))

    def forward(self, *inputs):
        return self.function(*inputs, self.weight)


def rows(batch, time):
    return torch.randn(batch, time, C)


def mask(batch, time):
    kept = torch.rand(batch, time) > 0.3
    kept[:, 0] = True
    return kept


def packed(x, cu, weight):
    rows = x.unflatten(2, (H, C // H))
    attended = ck.composite_attention(rows, rows, rows, bias=weight, window=(2, 2), cu_seqlens_q=cu)
    return ck.lightweight_conv1d(x, weight, cu_seqlens=cu, padding="same"), attended


# name -> (function, shape of the parameter, inputs(batch, time), the operators it becomes with opset 27: these or none)
CONVOLUTIONS = {
    "causal": (lambda x, w: ck.depthwise_conv1d(x, w, padding="causal"), (C, K), (rows,), STATEFUL),
    "bias": (lambda x, w: ck.depthwise_conv1d(x, w, w[:, 0], padding="causal"), (C, K), (rows,), STATEFUL),
    "same": (lambda x, w: ck.depthwise_conv1d(x, w), (C, K), (rows,), PLAIN),
    "dilated": (lambda x, w: ck.depthwise_conv1d(x, w, padding="causal", dilation=3), (C, K), (rows,), PLAIN),
    "one tap": (lambda x, w: ck.depthwise_conv1d(x, w, padding="causal"), (C, 1), (rows,), PLAIN),
    "shared": (lambda x, w: ck.lightweight_conv1d(x, w, padding="causal"), (H, K), (rows,), STATEFUL),
    "renormalized": (lambda x, w: ck.lightweight_conv1d(x, w, renormalize=True), (H, K), (rows,), None),
    "gated": (
        lambda x, g, m, w: ck.lightweight_conv1d(x, w, gate=g, mask=m, padding=1),
        (H, K), (rows, rows, mask), PLAIN,
    ),
    "finished": (
        lambda x, g, o, w: ck.depthwise_conv1d(
            x, w, padding="causal", gate=g, gate_activation="none", activation="silu", out_gate=o, residual=x),
        (C, K), (rows, rows, rows), STATEFUL,
    ),
    "state": (
        lambda x, s, w: ck.depthwise_conv1d(x, w, padding="causal", initial_state=s, return_state=True),
        (C, K), (rows, lambda batch, time: torch.randn(batch, K - 1, C)), STATEFUL,
    ),
    "state and dilation": (
        lambda x, s, w: ck.depthwise_conv1d(x, w, w[:, 1], padding="causal", dilation=2, initial_state=s),
        (C, K), (rows, lambda batch, time: torch.randn(batch, 2 * K - 2, C)), PLAIN,
    ),
    "dynamic": (
        lambda x, f, w: ck.dynamic_conv1d(x, f, w, padding="causal"),
        (C,), (rows, lambda batch, time: torch.randn(batch, time, H, K)), None,
    ),
}  # fmt: skip


def heads(batch, time):
    return torch.randn(batch, time, H, D)


ATTENTION = {
    "bias": (lambda q, w: ck.composite_attention(q, q, q, bias=w, window=(2, 2)), (H, 5), (heads,)),
    "all terms": (
        lambda q, k, m, w: ck.composite_attention(
            q, k, q, window=(2, 2), bias=w[:, 0], query_rel=w, key_rel=w, value_conv=w, causal=True, outside="zero",
            key_mask=m,
        ),
        (H, D, 5), (heads, heads, mask),
    ),
    "lse": (
        lambda q, w: ck.composite_attention(q, q, q, query_rel=w, window=(2, 2), outside="mask", return_lse=True),
        (H, D, 5), (heads,),
    ),
}  # fmt: skip


def shapes(inputs):
    """Batch and length may differ where they are not those of a state."""
    return tuple({i: Dim.DYNAMIC for i, size in enumerate(value.shape[:2]) if size in (B, T)} for value in inputs)


def exported(model, inputs, **options):
    return onnx.export(model, inputs, dynamic_shapes=(shapes(inputs),), verbose=False, **options)


def run(path, inputs):
    session = runtime.InferenceSession(path)
    names = [value.name for value in session.get_inputs()]
    return [torch.from_numpy(y) for y in session.run(None, dict(zip(names, (x.numpy() for x in inputs), strict=True)))]


def compare(model, path, inputs, **tolerances):
    with torch.no_grad():
        expected = model(*inputs)
    expected = [expected] if isinstance(expected, torch.Tensor) else expected
    torch.testing.assert_close(run(path, inputs), list(expected), **tolerances)


@pytest.mark.parametrize("opset", [None, 27])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name, opset, tmp_path):
    torch.manual_seed(0)
    function, shape, make, expected = CONVOLUTIONS[name]
    model, path = Model(function, *shape).eval(), tmp_path / "model.onnx"
    program = exported(model, tuple(one(B, T) for one in make), file=path, opset_version=opset)
    kinds = {node.op_type for node in program.model.graph} & {STATEFUL, PLAIN}
    assert kinds == ({expected if opset == 27 else PLAIN} if expected else set())
    assert {node.domain for node in program.model.graph} <= {"", "pkg.onnxscript.torch_lib"}
    for length in LENGTHS:
        compare(model, path, tuple(one(3, length) for one in make), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ATTENTION)
def test_attention(name, tmp_path):
    torch.manual_seed(0)
    function, shape, make = ATTENTION[name]
    model, path = Model(function, *shape).eval(), tmp_path / "model.onnx"
    exported(model, tuple(one(B, T) for one in make), file=path)
    for length in LENGTHS:
        compare(model, path, tuple(one(3, length) for one in make), rtol=1e-5, atol=1e-5)


def test_packed_sequences(tmp_path):
    """Where the boundaries lie is an input."""
    torch.manual_seed(0)
    model, path = Model(packed, H, K).eval(), tmp_path / "model.onnx"
    given = torch.randn(1, T, C), torch.tensor([0, 4, 4, T])
    onnx.export(model, given, path, dynamic_shapes=(({1: Dim.DYNAMIC}, {}),), verbose=False)
    for length, cut in ((T, 2), (31, 17)):
        compare(model, path, (torch.randn(1, length, C), torch.tensor([0, cut, cut + 1, length])), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("opset", [None, 27])
def test_half_precision_is_computed_in_single(opset, tmp_path):
    torch.manual_seed(0)
    function, shape, _, _ = CONVOLUTIONS["bias"]
    model, path = Model(function, *shape, dtype=torch.float16).eval(), tmp_path / "model.onnx"
    given = (torch.randn(B, T, C, dtype=torch.float16),)
    exported(model, given, file=path, opset_version=opset)
    compare(model, path, given, rtol=1e-3, atol=1e-3)


def test_double_precision_goes_by_the_definition(tmp_path):
    torch.manual_seed(0)
    function, shape, _, _ = CONVOLUTIONS["bias"]
    model, path = Model(function, *shape, dtype=torch.float64).eval(), tmp_path / "model.onnx"
    given = (torch.randn(B, T, C, dtype=torch.float64),)
    program = exported(model, given, file=path, opset_version=27)
    assert {node.op_type for node in program.model.graph} & {STATEFUL, PLAIN} == set()
    compare(model, path, given, rtol=1e-12, atol=1e-12)


def test_modules(tmp_path):
    """A block of the models, and a backend that was named, whose operators are others."""
    torch.manual_seed(0)
    blocks = (cknn.GatedConv(C, cknn.LightweightConv1d(C, K, H, weight_dropout=0.5)),
              cknn.GatedConv(C, cknn.DynamicConv1d(C, K, H, conv_bias=True, backend="reference")))  # fmt: skip
    for number, block in enumerate(blocks):
        path = tmp_path / f"{number}.onnx"
        onnx.export(block.eval(), (rows(B, T),), path, verbose=False)
        compare(block, path, (rows(B, T),), rtol=1e-5, atol=1e-5)


def test_programs(tmp_path):
    function, shape, _, _ = CONVOLUTIONS["causal"]
    model, path = Model(function, *shape).eval(), tmp_path / "model.onnx"
    program = onnx.export(torch.export.export(model, (rows(B, T),)), file=path, opset_version=27, verbose=False)
    assert program.model.opset_imports[""] == 27
    compare(model, path, (rows(B, T),), rtol=1e-5, atol=1e-5)


def test_refusals():
    model = Model(lambda x, w: ck.lightweight_conv1d(x, w, weight_dropout=0.5, training=True), H, K)
    with pytest.raises(ValueError, match=r"export: argument 'model': expected one for inference .*got dropout of 0.5"):
        onnx.export(model, (rows(B, T),), verbose=False)

    def step(state, w):
        state = state.clone()
        return ck.depthwise_conv1d_step(state[:, 0], state, w.detach())

    with pytest.raises(ValueError, match="argument 'model': expected convolutions and attention .* got tap_step"):
        onnx.export(Model(step, C, K), (torch.randn(B, K - 1, C),), verbose=False)
    with pytest.raises(TypeError, match=r"argument 'model': expected a torch.nn.Module or .*, got .*function"):
        onnx.export(step, (rows(B, T),))
