"""torch.compile without graph breaks, few recompilations, export, and the neighbours: autocast, AMP, checkpointing."""

import warnings

import pytest
import torch
from helpers import CALLS
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint

import convkernels as ck
from convkernels import nn as cknn
from convkernels.testing.inputs import values

B, C, H, K = 2, 12, 3, 5
LENGTHS = (7, 12, 9, 33, 8, 64, 15, 17, 100, 21)
MODES = {
    "plain": {},
    "everything": {"gate": True, "mask": True, "bias": True, "state": True, "padding": "causal"},
    "packed": {"packed": True, "gate": True},
    "dropout": {"weight_dropout": 0.3, "training": True, "seeded": True, "renormalize": True},
}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compilations(counter):
    """Graphs with something in them; selecting a backend for the first time leaves an empty one."""
    return sum(any(node.op == "call_function" for node in graph.graph.nodes) for graph in counter.graphs)


def inputs_of(function, mode, length, dtype=torch.float32):
    """Tensors that need gradients by name, and the rest of the arguments."""
    options = dict(MODES[mode])
    rows = {"depthwise": (C,), "lightweight": (H,), "dynamic": (1 if options.get("packed") else B, length, H)}[function]
    batch = 1 if options.pop("packed", False) else B
    packed = batch == 1
    leaves = {"x": (batch, length, C), "weight": (*rows, K)}
    for name, shape in {"bias": (C,), "gate": (batch, length, C), "state": (B, K - 1, C)}.items():
        if options.pop(name, False):
            leaves["initial_state" if name == "state" else name] = shape
    leaves = {n: values(s, dtype, i).clone().requires_grad_() for i, (n, s) in enumerate(leaves.items())}
    if options.pop("mask", False):
        options["mask"] = values((batch, length), torch.float64, 6) > -0.5
    if options.pop("seeded", False):
        options["seed"] = torch.tensor([11])
    if packed:
        options["cu_seqlens"] = torch.tensor([0, length // 3, length // 3, length])
    return leaves, options


def run(call, leaves, options):
    y = call(**leaves, **options)
    loss = (y * torch.linspace(0.5, 1.5, y.shape[1])[:, None]).sum()
    return y.detach(), torch.autograd.grad(loss, list(leaves.values()))


CASES = [(f, m) for f in CALLS for m in MODES if f != "depthwise" or m != "dropout"]


@pytest.mark.parametrize(("function", "mode"), CASES)
def test_no_breaks_and_few_recompilations(function, mode, backend):
    """fullgraph (a break would raise), dynamic shapes, ten lengths, forward and backward equal to eager."""
    counter = CompileCounterWithBackend("aot_eager")

    def call(**kwargs):
        return CALLS[function](backend=backend, **kwargs)

    compiled = torch.compile(call, backend=counter, fullgraph=True, dynamic=True)
    for length in LENGTHS:
        leaves, options = inputs_of(function, mode, length)
        y, grads = run(compiled, leaves, options)
        expected_y, expected = run(call, leaves, options)
        torch.testing.assert_close(y, expected_y)
        torch.testing.assert_close(grads, expected)
    recompilations = compilations(counter) - 1
    assert recompilations <= 2, f"{recompilations} recompilations over {len(LENGTHS)} lengths"


def test_auto_backend_compiles():
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x, w: ck.lightweight_conv1d(x, w), backend=counter, fullgraph=True, dynamic=True)
    x, weight = torch.randn(2, 9, C), torch.randn(H, K)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(compiled(x, weight), ck.lightweight_conv1d(x, weight))
    assert compilations(counter) == 1


@pytest.mark.parametrize("mode", ["fake", "symbolic"])
@pytest.mark.parametrize("function", CALLS)
def test_values_are_not_read_where_there_are_none(function, mode, backend):
    """Boundaries of sequences and rows of a state under make_fx, FakeTensorMode and in a subclass of tensors."""
    leaves, options = inputs_of(function, "packed", 9)
    tensors = [*(v.detach() for v in leaves.values()), options["cu_seqlens"]]

    def call(x, weight, gate, bounds):
        return CALLS[function](x, weight, gate=gate, cu_seqlens=bounds, backend=backend)

    graph = make_fx(call, tracing_mode=mode)(*tensors)
    assert torch.equal(graph(*tensors), call(*tensors))
    with FakeTensorMode() as fakes:
        assert call(*map(fakes.from_tensor, tensors)).shape == tensors[0].shape
    doubled = call(*(TwoTensor(t, t.clone()) for t in tensors))
    assert torch.equal(doubled.a, call(*tensors)) and torch.equal(doubled.b, doubled.a)
    if function == "lightweight":
        step = [torch.randn(B, C), torch.zeros(B, K - 1, C), tensors[1], torch.tensor([1, 0])]

        def one(x, state, weight, rows):
            return ck.lightweight_conv1d_step(x, state, weight, state_index=rows, backend=backend)

        with FakeTensorMode() as fakes:
            assert one(*map(fakes.from_tensor, step)).shape == (B, C)
        assert torch.equal(make_fx(one, tracing_mode=mode)(*step)(*step), one(step[0], step[1] * 0, *step[2:]))


@pytest.mark.parametrize("function", CALLS)
def test_meta_tensors(function, backend):
    """Shapes, strides and dtypes as on a device, gradients too, and nothing is computed."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for chosen, mode in ((backend, "everything"), ("auto", "everything"), ("auto", "packed")):
            leaves, options = inputs_of(function, mode, 9)
            leaves = {n: v.detach().to("meta").requires_grad_() for n, v in leaves.items()}
            options = {n: v.to("meta") if isinstance(v, torch.Tensor) else v for n, v in options.items()}
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y = CALLS[function](**leaves, **options, backend=chosen)
            assert y.is_meta and y.stride() == leaves["x"].stride() and y.dtype == torch.float32
            y.sum().backward()
            assert all(v.grad.is_meta and v.grad.shape == v.shape for v in leaves.values())
    with torch.device("meta"):
        module = cknn.GatedConv(C, cknn.LightweightConv1d(C, K, H, weight_dropout=0.1, backend=backend))
        assert module(torch.randn(B, 9, C)).shape == (B, 9, C)
        step = getattr(ck, f"{function}_conv1d_step")
        weight = torch.randn(*{"depthwise": (C,), "lightweight": (H,), "dynamic": (B, H)}[function], K)
        rows = torch.zeros(B, dtype=torch.int64)
        y = step(torch.randn(B, C), torch.zeros(B, K - 1, C), weight, state_index=rows, backend=backend)
        assert y.is_meta and y.shape == (B, C)


def test_explain_reports_no_graph_break(backend):
    module = cknn.GatedConv(C, cknn.LightweightConv1d(C, K, H, backend=backend))
    explained = torch._dynamo.explain(module)(torch.randn(B, 9, C))
    assert explained.graph_break_count == 0, explained.break_reasons


def test_step_compiles(backend):
    compiled = torch.compile(
        lambda x, s, w: ck.lightweight_conv1d_step(x, s, w, backend=backend), backend="aot_eager", fullgraph=True
    )
    x, weight = torch.randn(B, C), torch.randn(H, K)
    ours, theirs = torch.zeros(B, K - 1, C), torch.zeros(B, K - 1, C)
    for _ in range(3):
        y = compiled(x, ours, weight)
        torch.testing.assert_close(y, ck.lightweight_conv1d_step(x, theirs, weight, backend=backend))
    assert torch.equal(ours, theirs) and ours.any()


@pytest.mark.parametrize("layout", ["rows", "channels"])
def test_serving_compiles_with_dynamic_shapes(layout, backend):
    """Pools, batches and numbers of positions of any size, without recompilations."""
    counter = CompileCounterWithBackend("aot_eager")

    def call(x, pool, weight, slots, accepted):
        return ck.depthwise_conv1d_step(x, pool, weight, slots=slots, accepted=accepted, backend=backend)

    compiled, weight = torch.compile(call, backend=counter, fullgraph=True, dynamic=True), torch.randn(C, K)
    for batch, length, slots in ((2, 6, 4), (3, 2, 9), (4, 7, 6)):
        pool = torch.randn(slots, C, 15).mT if layout == "channels" else torch.randn(slots, 15, C)
        x, kept, numbers = torch.randn(batch, length, C), pool.clone(), torch.arange(batch).flip(0)
        accepted = torch.full((batch,), length - 1)
        y = compiled(x, pool, weight, numbers, accepted)
        assert torch.equal(y, call(x, kept, weight, numbers, accepted)) and torch.equal(pool, kept)
    assert compilations(counter) == 1


@pytest.mark.slow
@pytest.mark.thin(3)
@pytest.mark.parametrize("make", [
    lambda backend: cknn.GatedConv(C, cknn.LightweightConv1d(C, K, H, renormalize=True, backend=backend)),
    lambda backend: cknn.GatedConv(C, cknn.DynamicConv1d(C, K, H, conv_bias=True, backend=backend)),
    lambda backend: cknn.SeparableConv1d(C, C, K, backend=backend),
], ids=["lightweight", "dynamic", "separable"])  # fmt: skip
def test_inductor(make, backend):
    """The default compiler, a whole module, transposed input, training step."""
    torch.manual_seed(0)
    module = make(backend)
    compiled = torch.compile(module, fullgraph=True, dynamic=True)
    for length in (9, 14, 30):
        x = torch.randn(length, B, C).transpose(0, 1)
        for call in (module, compiled):
            module.zero_grad()
            y = call(x)
            y.square().sum().backward()
            found = y.detach().clone(), [p.grad.clone() for p in module.parameters()]
            if call is module:
                expected = found
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("function", CALLS)
def test_export_with_dynamic_dimensions(function, backend):
    class Model(torch.nn.Module):
        def forward(self, x, weight):
            return CALLS[function](x, weight, backend=backend)

    batch, length = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("length", min=1, max=4096)
    leaves, _ = inputs_of(function, "plain", 9)
    x, weight = leaves["x"].detach(), leaves["weight"].detach()
    shape = {0: batch, 1: length} if function == "dynamic" else None
    program = torch.export.export(Model(), (x, weight), dynamic_shapes=({0: batch, 1: length}, shape))
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert any("tap_conv" in name for name in names), names
    for size in (3, 8):
        x = torch.randn(size, 21, C)
        weight = torch.randn(size, 21, H, K) if function == "dynamic" else weight
        torch.testing.assert_close(program.module()(x, weight), CALLS[function](x, weight, backend=backend))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("function", CALLS)
def test_autocast(function, dtype, backend):
    """Activations in the region's dtype, parameters as they are, gradients in each input's own dtype; float64 is
    left alone.
    """
    leaves, _ = inputs_of(function, "everything", 9)
    with torch.autocast(leaves["x"].device.type, dtype=dtype):
        y = CALLS[function](**leaves, padding="causal", backend=backend)
        double = CALLS[function](leaves["x"].double(), leaves["weight"].double(), backend=backend)
    assert y.dtype == dtype and double.dtype == torch.float64
    plain = CALLS[function](**leaves, padding="causal", backend=backend)
    torch.testing.assert_close(y.float(), plain, rtol=0.05, atol=0.05)
    for grad, leaf in zip(torch.autograd.grad(y.float().sum(), list(leaves.values())), leaves.values(), strict=True):
        assert grad.dtype == leaf.dtype and grad.isfinite().all()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(CALLS[function], backend=counter, fullgraph=True)
    with torch.autocast(leaves["x"].device.type, dtype=dtype):
        assert torch.equal(compiled(**leaves, padding="causal", backend=backend), y)


def test_amp_training_step(backend):
    """Autocast and gradient scaling end in the same update as float32, up to the precision of bfloat16."""
    torch.manual_seed(0)
    module = cknn.GatedConv(C, cknn.LightweightConv1d(C, K, H, backend=backend))
    reference = cknn.GatedConv(C, cknn.LightweightConv1d(C, K, H, backend=backend))
    reference.load_state_dict(module.state_dict())
    x = torch.randn(B, 9, C)
    scaler = torch.amp.GradScaler(x.device.type, init_scale=1024.0)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (module, reference)]
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        loss = module(x).float().square().mean()
    scaler.scale(loss).backward()
    scaler.step(optimizers[0])
    scaler.update()
    reference(x).square().mean().backward()
    optimizers[1].step()
    assert scaler.get_scale() == 1024.0
    for ours, theirs in zip(module.parameters(), reference.parameters(), strict=True):
        assert ours.grad.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(use_reentrant, backend):
    """Recomputing the forward pass draws the same dropout mask and gives the same gradients."""
    module = cknn.GatedConv(C, cknn.LightweightConv1d(C, K, H, weight_dropout=0.4, backend=backend))
    x = torch.randn(B, 9, C, requires_grad=True)
    found = []
    for call in (module, lambda v: checkpoint(module, v, use_reentrant=use_reentrant)):
        torch.manual_seed(3)
        y = call(x)
        x.grad = None
        y.square().sum().backward()
        found.append((y.detach(), x.grad))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


def test_saved_tensor_hooks(backend):
    """Activation offloading sees and may replace what is saved for backward."""
    x, weight = torch.randn(B, 9, C, requires_grad=True), torch.randn(H, K, requires_grad=True)
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t.clone(), lambda t: t):
        y = ck.lightweight_conv1d(x, weight, backend=backend)
    expected = torch.autograd.grad(ck.lightweight_conv1d(x, weight, backend=backend).sum(), (x, weight))
    found = torch.autograd.grad(y.sum(), (x, weight))
    assert packed
    torch.testing.assert_close(found, expected)


def test_x_is_not_kept_when_no_gradient_needs_it(backend):
    """With a constant kernel and no gate only the kernel is saved: nothing of x's size stays alive."""
    x, weight = torch.randn(B, 9, C, requires_grad=True), torch.randn(H, K)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        ck.lightweight_conv1d(x, weight, backend=backend)
    assert max(sizes) == weight.numel()


def test_double_use_after_release_raises(backend):
    x = torch.randn(B, 9, C, requires_grad=True)
    y = ck.lightweight_conv1d(x, torch.randn(H, K), backend=backend)
    y.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()


def test_compiled_autograd(backend):
    """A backward pass that is compiled as a whole has the operators in it, without a graph break."""
    x, w = torch.randn(2, 5, 4, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    q, bias = torch.randn(1, 4, 2, 8, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    calls = [lambda: ck.lightweight_conv1d(x, w, backend=backend)]
    if not ck.why_not(backend, op="attention", device=x.device):
        calls.append(lambda: ck.composite_attention(q, q, q, bias=bias, backend=backend))
    for call in calls:
        leaves = (x, w, q, bias)
        call().sum().backward()
        expected = [leaf.grad for leaf in leaves]
        for leaf in leaves:
            leaf.grad = None
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager", fullgraph=True)):
            call().sum().backward()
        for leaf, gradient in zip(leaves, expected, strict=True):
            assert (leaf.grad is None) == (gradient is None)
            assert gradient is None or torch.equal(leaf.grad, gradient)
            leaf.grad = None


def test_autograd_names_the_operator():
    x, w = torch.randn(2, 5, 4, requires_grad=True), torch.randn(2, 3)
    q = torch.randn(1, 4, 2, 8, requires_grad=True)
    assert type(ck.lightweight_conv1d(x, w).grad_fn).__name__ == "RecordedTapConvBackward"
    assert type(ck.composite_attention(q, q, q).grad_fn).__name__ == "RecordedAttentionBackward"
