"""What only a GPU can show: streams, graphs, devices, no waiting for the device, more elements than 32 bits count."""

import pytest
import torch

import convkernels as ck
from convkernels.testing.attention import DELTA_THROUGH_OUT
from convkernels.testing.inputs import values

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]


def those_for_gpus(op):
    """The backends, skipped where they are not usable, so that they have their names without a GPU too."""
    for name in ("triton", "cuda"):
        reasons = ck.why_not(name, op=op, device="cuda")
        yield pytest.param(name, marks=pytest.mark.skipif(bool(reasons), reason="; ".join(reasons) or "usable"))


def packed(length=512, heads=4, head_size=32, taps=7, dtype=torch.bfloat16, device="cuda"):
    """Arguments of a packed, gated, masked call, and its options."""
    channels = heads * head_size
    x, gate = (values((1, length, channels), dtype, salt).to(device).requires_grad_() for salt in (1, 2))
    weight = values((heads, taps), dtype, 3).to(device).requires_grad_()
    cu_seqlens = torch.tensor([0, 100, 100, 307, length], device=device)
    mask = (torch.arange(length, device=device) % 11 != 0)[None]
    return (x, weight), {"gate": gate, "mask": mask, "cu_seqlens": cu_seqlens}


def run(backend, arguments, options):
    y = ck.lightweight_conv1d(*arguments, **options, backend=backend)
    return (y, *torch.autograd.grad(y, (*arguments, options["gate"]), torch.ones_like(y)))


@pytest.fixture(params=those_for_gpus("tap_conv"))
def backend(request):
    return request.param


def test_agrees_with_the_reference(backend):
    arguments, options = packed()
    for a, b in zip(run(backend, arguments, options), run("reference", arguments, options), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


def test_nothing_waits_for_the_device(backend):
    arguments, options = packed()
    run(backend, arguments, options)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(backend, arguments, options)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_graph_capture_reads_new_boundaries(backend):
    arguments, options = packed()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run(backend, arguments, options)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(backend, arguments, options)
    for boundaries in ([0, 100, 100, 307, 512], [0, 1, 256, 256, 512]):
        options["cu_seqlens"].copy_(torch.tensor(boundaries))
        graph.replay()
        for a, b in zip(captured, run(backend, arguments, options), strict=True):
            assert torch.equal(a, b)


def test_side_stream(backend):
    arguments, options = packed()
    expected = run(backend, arguments, options)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        # Work that the side stream, and no other, has to wait for.
        torch.cuda._sleep(20_000_000)
        late = tuple((a.detach() + 0).requires_grad_() for a in arguments)
        results = run(backend, late, options)
    stream.synchronize()
    for a, b in zip(results, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_another_device(backend):
    assert torch.cuda.current_device() == 0
    expected = run(backend, *packed())
    for a, b in zip(run(backend, *packed(device="cuda:1")), expected, strict=True):
        assert a.device.index == 1 and torch.equal(a.cpu(), b.cpu())


def test_hundred_runs_give_the_same_bits(backend):
    arguments, options = packed(length=3000)
    first = run(backend, arguments, options)
    for _ in range(100):
        assert all(torch.equal(a, b) for a, b in zip(run(backend, arguments, options), first, strict=True))


def test_more_elements_than_32_bits_count(backend):
    length, channels, taps = (1 << 21) + 100, 1024, 4
    if torch.cuda.mem_get_info()[0] < 3 * 2 * length * channels:
        pytest.skip("not enough memory")
    x = torch.ones(1, length, channels, dtype=torch.bfloat16, device="cuda")
    x[0, -50:] = values((50, channels), torch.bfloat16, 1).cuda()
    weight = values((channels, taps), torch.float32, 2).cuda()
    with torch.no_grad():
        y = ck.depthwise_conv1d(x, weight, padding="causal", backend=backend)[:, -40:]
        expected = ck.depthwise_conv1d(x[:, -60:], weight, padding="causal", backend="reference")[:, -40:]
    torch.testing.assert_close(y, expected)


attending = pytest.mark.parametrize("attending", list(those_for_gpus("attention_grad")))


def attention_inputs(length, heads=4, head_size=64, window=8, dtype=torch.bfloat16, batch=2):
    shapes = {name: (batch, length, heads, head_size) for name in "qkv"}
    shapes |= {"bias": (heads, 2 * window + 1), "query_rel": (head_size, 2 * window + 1)}
    return {
        name: values(shape, dtype, salt).cuda().requires_grad_() for salt, (name, shape) in enumerate(shapes.items())
    }


def attend(name, inputs, **options):
    y = ck.composite_attention(**inputs, backend=name, **options)
    return (y, *torch.autograd.grad(y, list(inputs.values()), torch.ones_like(y)))


@attending
@pytest.mark.parametrize("head_size", [64, 96, 128])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 2e-2), (torch.float16, 5e-3), (torch.float32, 1e-5)])
def test_attention_agrees_with_float64(dtype, limit, causal, head_size, attending):
    inputs = attention_inputs(1000, head_size=head_size, dtype=dtype)
    exact = {name: value.detach().double().requires_grad_() for name, value in inputs.items()}
    found = attend(attending, inputs, causal=causal)
    for a, b in zip(found, attend("reference", exact, causal=causal), strict=True):
        assert (a.double() - b).norm() <= limit * b.norm()


@attending
def test_attention_memory_is_linear(attending):
    def peak(length):
        inputs = attention_inputs(length)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        attend(attending, inputs)
        return torch.cuda.max_memory_allocated() - before

    peak(512)
    assert peak(16384) <= 2.1 * peak(8192)


@attending
def test_attention_waits_for_nothing_and_is_compiled_once(attending):
    mask = torch.ones(2, 512, dtype=torch.bool, device="cuda")
    attend(attending, attention_inputs(512), key_mask=mask)
    torch.cuda.synchronize()
    compiled = []
    if attending == "triton":
        import triton

        triton.knobs.runtime.jit_post_compile_hook = lambda **facts: compiled.append(facts) and None
    calls = [(attention_inputs(n), torch.ones(2, n, dtype=torch.bool, device="cuda")) for n in (512, 300, 1, 1024)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for inputs, mask in calls:
            attend(attending, inputs, key_mask=mask)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        if attending == "triton":
            triton.knobs.runtime.jit_post_compile_hook = None
    assert not compiled


@attending
def test_attention_over_a_long_sequence_is_deterministic(attending):
    inputs = attention_inputs(32768, heads=2, batch=1)
    first = attend(attending, inputs)
    assert all(torch.equal(a, b) for a, b in zip(attend(attending, inputs), first, strict=True))
    # Its last queries see what a short call with only them sees.
    tail = {name: value[:, -64:] if name == "q" else value for name, value in inputs.items()}
    with torch.no_grad():
        y = ck.composite_attention(**tail, backend="reference")
    torch.testing.assert_close(first[0][:, -64:], y, rtol=2e-2, atol=2e-2)


ATTENTION_SHAPES = {
    "paper": dict(B=4, T=128, S=128, H=4, G=4, D=64, k=8, dropout=0.1, padded=True, conv=True),
    "long": dict(B=1, T=2048, S=2048, H=4, G=4, D=64, k=8),
    "grouped causal": dict(B=2, T=1000, S=1000, H=8, G=2, D=128, k=16, causal=True),
    "uneven": dict(B=2, T=257, S=513, H=3, G=3, D=96, k=64),
    "wide window": dict(B=1, T=1024, S=1024, H=2, G=1, D=32, k=300, outside="zero"),
    "local": dict(B=1, T=4096, S=4096, H=2, G=2, D=64, k=128, outside="mask"),
}


def shaped_inputs(shape, dtype):
    B, T, S, H, G, D, W = (*(shape[n] for n in "BTSHGD"), 2 * shape["k"] + 1)
    sizes = {"q": (B, T, H, D), "k": (B, S, G, D), "v": (B, S, G, D), "bias": (H, W), "query_rel": (D, W),
             "key_rel": (D, W)}  # fmt: skip
    if shape.get("conv"):
        sizes |= {"value_conv": (H, D, W), "value_conv_bias": (H, D), "value_conv_scale": (H,)}
    inputs = {n: values(size, dtype, salt + 1).cuda().requires_grad_() for salt, (n, size) in enumerate(sizes.items())}
    options = {n: shape[n] for n in ("causal", "outside", "dropout") if n in shape}
    if "dropout" in shape:
        options |= {"training": True, "seed": torch.tensor([77], device="cuda")}
    if shape.get("padded"):
        options["key_mask"] = (torch.arange(S) < S - torch.arange(B)[:, None] * S // 6).cuda()
    return inputs, options


def run_attention(backend, inputs, options):
    y = ck.composite_attention(**inputs, **options, backend=backend)
    grads = torch.autograd.grad(y, list(inputs.values()), values(y.shape, y.dtype, 99).to(y.device))
    return dict(zip(("out", *inputs), (y, *grads), strict=True))


@attending
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", ATTENTION_SHAPES)
def test_attention_of_many_shapes(name, dtype, attending):
    inputs, options = shaped_inputs(ATTENTION_SHAPES[name], dtype)
    found = run_attention(attending, inputs, options)
    exact = {n: value.detach().double().requires_grad_() for n, value in inputs.items()}
    expected = run_attention("reference", exact, options)
    limit = {torch.bfloat16: 2e-2, torch.float16: 5e-3, torch.float32: 1e-5}[dtype]
    if "value_conv" in inputs and attending in DELTA_THROUGH_OUT:
        limit *= 2  # the depthwise term is taken out of a sum that was rounded with it
    for n, value in found.items():
        error = (value.double() - expected[n]).norm() / expected[n].norm()
        assert error <= limit, f"{n}: {error:.3g}"
    again = run_attention(attending, inputs, options)
    assert all(torch.equal(again[n], value) for n, value in found.items())
