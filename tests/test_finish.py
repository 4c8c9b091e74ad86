"""What follows the sum of a convolution, and what its gate goes through: activations, a gate of the result, a residual.

Bounds of every element: test_fuzz.py. Derivatives by finite differences: test_gradients.py.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import interpreted
from helpers import CALLS

import convkernels as ck
from convkernels import nn as cknn
from convkernels.testing.inputs import arrange, values

B, T, C, H, K = 2, 9, 12, 3, 4
GATES = {"sigmoid": torch.sigmoid, "silu": F.silu, "none": lambda gate: gate}
STEPS = {name: getattr(ck, f"{name}_conv1d_step") for name in CALLS}


def tensors(function, dtype=torch.float64, layout="contiguous"):
    rows = {"depthwise": (C,), "lightweight": (H,), "dynamic": (B, T, H)}[function]
    like_x = ("x", "gate", "out_gate", "residual")
    made = {name: arrange(values((B, T, C), dtype, salt), layout) for salt, name in enumerate(like_x)}
    return made | {"weight": values((*rows, K), dtype, 5), "bias": values((C,), dtype, 6)}


def composed(function, t, gate_activation, activation, backend, **options):
    """The same of a plain convolution and PyTorch."""
    x = t["x"] * GATES[gate_activation](t["gate"])
    y = CALLS[function](x, t["weight"], t["bias"], backend=backend, **options)
    return t["residual"] + t["out_gate"] * (y if activation is None else F.silu(y))


@pytest.mark.parametrize("layout", ["contiguous", "swap_last", "step2"])
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("gate_activation", GATES)
@pytest.mark.parametrize("function", CALLS)
def test_equals_its_parts(function, gate_activation, activation, layout, backend):
    """Values, gradients of all inputs, and those that reach only some of them."""
    t = {name: value.requires_grad_() for name, value in tensors(function, layout=layout).items()}
    y = CALLS[function](**t, gate_activation=gate_activation, activation=activation, backend=backend)
    expected = composed(function, t, gate_activation, activation, backend)
    torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-11)
    cotangent = arrange(values((B, T, C), torch.float64, 9), layout)
    found = torch.autograd.grad(y, t.values(), cotangent, retain_graph=True)
    wanted = torch.autograd.grad(expected, t.values(), cotangent)
    for name, one, other in zip(t, found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")
        detached = {key: value.detach() for key, value in t.items()} | {name: t[name]}
        alone = CALLS[function](**detached, gate_activation=gate_activation, activation=activation, backend=backend)
        (gradient,) = torch.autograd.grad(alone, t[name], cotangent)
        assert torch.equal(gradient, one), name


@pytest.mark.parametrize("function", CALLS)
def test_nothing_but_inputs_is_kept(function, backend):
    """The sum is computed again, so that an activation costs no memory between the passes."""
    t = {name: value.requires_grad_() for name, value in tensors(function).items()}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda value: kept.append(value.data_ptr()) or value, lambda v: v):
        CALLS[function](**t, activation="silu", backend=backend)
    assert set(kept) <= {value.data_ptr() for value in t.values()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("function", CALLS)
def test_steps_equal_the_causal_run(function, dtype, backend):
    t = tensors(function, dtype)
    options = {"gate_activation": "silu", "activation": "silu", "backend": backend}
    expected, final = CALLS[function](**t, padding="causal", return_state=True, **options)
    state = torch.zeros(B, K - 1, C, dtype=dtype)
    for n in range(T):
        now = {name: t[name][:, n] for name in ("x", "gate", "out_gate", "residual")}
        weight = t["weight"][:, n] if function == "dynamic" else t["weight"]
        y = STEPS[function](now.pop("x"), state, weight, t["bias"], **now, **options)
        tolerance = 2 * torch.finfo(dtype).eps
        torch.testing.assert_close(y, expected[:, n], rtol=4 * tolerance, atol=4 * tolerance)
    torch.testing.assert_close(state, final, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("function", CALLS)
def test_transforms(function, backend):
    """vmap of values and of gradients, also where each element has a bias of its own."""
    elements = [tensors(function), {name: value.cos() for name, value in tensors(function).items()}]
    names = list(elements[0])

    def call(*given):
        return CALLS[function](**dict(zip(names, given, strict=True)), activation="silu", backend=backend)

    def loss(*given):
        return call(*given).sin().sum()

    every = tuple(range(len(names)))
    for dims in (every, [None if name == "bias" else 0 for name in names]):
        stacked, in_dims = [], []
        for name, mapped in zip(names, dims, strict=True):
            both = torch.stack([element[name] for element in elements])
            stacked.append(both[0] if mapped is None else both)
            in_dims.append(None if mapped is None else 0)
        found = torch.func.vmap(call, tuple(in_dims))(*stacked)
        gradients = torch.func.vmap(torch.func.grad(loss, every), tuple(in_dims))(*stacked)
        for index in range(2):
            own = [value if dim is None else value[index] for value, dim in zip(stacked, in_dims, strict=True)]
            torch.testing.assert_close(found[index], call(*own), rtol=1e-12, atol=1e-12)
            for one, other in zip(gradients, torch.func.grad(loss, every)(*own), strict=True):
                torch.testing.assert_close(one[index], other, rtol=1e-10, atol=1e-10)


def test_compiled(backend):
    if interpreted(backend):
        pytest.skip("the interpreter is no program that compiles")
    t = {name: value.requires_grad_() for name, value in tensors("depthwise", torch.float32).items()}

    def call(t):
        return ck.depthwise_conv1d(**t, padding="causal", activation="silu", gate_activation="none", backend=backend)

    def gradients(y):
        return torch.autograd.grad(y.sin().sum(), t.values())

    y = torch.compile(call, fullgraph=True, backend="aot_eager")(t)
    torch.testing.assert_close(y, call(t))
    for one, other in zip(gradients(y), gradients(call(t)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_exported(tmp_path):
    """A program names the operator with its numbers, and can be trained when it is loaded again."""
    module = cknn.DepthwiseConv1d(C, K, padding="causal", activation="silu", gate_activation="none")
    t = tensors("depthwise", torch.float32)
    given = {name: t[name] for name in ("x", "gate", "out_gate", "residual")}
    program = torch.export.export(module, (), given)
    names = [str(node.target) for node in program.graph.nodes if "convkernels" in str(node.target)]
    assert names == ["convkernels.tap_conv.default"]
    torch.export.save(program, tmp_path / "program.pt2")
    loaded = torch.export.load(tmp_path / "program.pt2").module()
    expected = module(**given)
    torch.testing.assert_close(loaded(**given), expected)
    loaded(**given).sin().sum().backward()
    expected.sin().sum().backward()
    torch.testing.assert_close(loaded.weight.grad, module.weight.grad)


def test_what_lies_under_a_mask_leaks_nowhere(backend):
    t = tensors("depthwise", torch.float32)
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[:, 3] = False
    clean = {**t, "x": t["x"].clone(), "gate": t["gate"].clone()}
    for name in ("x", "gate"):
        t[name] = t[name].clone()
        t[name][:, 3] = float("nan")
        clean[name][:, 3] = 0
    t, clean = ({name: value.requires_grad_() for name, value in given.items()} for given in (t, clean))
    options = {"mask": mask, "gate_activation": "silu", "activation": "silu", "backend": backend}
    y, expected = ck.depthwise_conv1d(**t, **options), ck.depthwise_conv1d(**clean, **options)
    assert torch.equal(y, expected)
    for one, other in zip(
        torch.autograd.grad(y.sum(), t.values()), torch.autograd.grad(expected.sum(), clean.values()), strict=True
    ):
        assert torch.equal(one, other)


def test_limits_of_silu(backend):
    """Far from 0 the sum itself, or 0; NaN and infinities as in PyTorch."""
    far = torch.tensor(
        [-1e30, -500.0, -100.0, -88.0, -1e-30, 0.0, 1e-30, 88.0, 500.0, 1e30, float("inf"), float("nan")]
    )
    x = far[None, :, None].expand(1, -1, 8).contiguous().requires_grad_()
    y = ck.depthwise_conv1d(x, torch.ones(8, 1), activation="silu", backend=backend)
    expected = F.silu(x)
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-30, equal_nan=True)
    (found,), (wanted,) = (torch.autograd.grad(value, x, torch.ones_like(x)) for value in (y, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-30, equal_nan=True)


@pytest.mark.parametrize("name", ["DepthwiseConv1d", "LightweightConv1d", "DynamicConv1d"])
def test_modules(name, backend):
    """The options of a module, in a pass and in steps; they show, and copies have them."""
    kind = getattr(cknn, name)
    heads = () if name == "DepthwiseConv1d" else (H,)
    module = kind(C, K, *heads, padding="causal", activation="silu", gate_activation="none", backend=backend)
    assert "gate_activation='none', activation='silu'" in repr(module)
    t = tensors("depthwise", torch.float32)
    given = {name: t[name] for name in ("x", "gate", "out_gate", "residual")}
    with torch.no_grad():
        plain = kind(C, K, *heads, padding="causal", backend=backend)
        plain.load_state_dict(module.state_dict())
        expected = t["residual"] + t["out_gate"] * F.silu(plain(t["x"] * t["gate"]))
        torch.testing.assert_close(module(**given), expected, rtol=1e-5, atol=1e-5)
        state = module.init_state(B)
        for n in range(T):
            y = module.step(state=state, **{name: value[:, n] for name, value in given.items()})
            torch.testing.assert_close(y, expected[:, n], rtol=1e-5, atol=1e-5)


def test_modules_saved_before_there_was_a_choice(backend):
    module = cknn.DepthwiseConv1d(C, K, backend=backend)
    old, x = copy.deepcopy(module), torch.randn(B, T, C)
    del old.__dict__["gate_activation"], old.__dict__["activation"]
    assert torch.equal(old(x), module(x)) and repr(old) == repr(module)


@pytest.mark.parametrize("argument", ["gate_activation", "activation"])
@pytest.mark.parametrize("op", ["tap_conv", "tap_activation_grad", "tap_grad", "tap_step"])
def test_operators_refuse_numbers_that_mean_nothing(op, argument, ops):
    x = torch.randn(B, T, C)
    given = {"x": x, "weight": torch.randn(C, K), "gate": x, argument: 3}
    given |= {"x": x[:, 0], "gate": x[:, 0], "state": torch.zeros(B, K - 1, C)} if op == "tap_step" else {"left": 1}
    given |= {"grad": x} if op.endswith("grad") else {}
    if op == "tap_grad" and argument == "activation":
        pytest.skip("it has no such argument")
    with pytest.raises((ValueError, RuntimeError), match=f"argument '{argument}': expected 0, 1 or 2"):
        getattr(ops, op)(**given)


def test_autocast_casts_what_lies_beside_x(backend):
    if ck.backends.BACKENDS[backend].devices == ("cuda",):
        pytest.skip("its device has an autocast of its own")
    t = tensors("depthwise", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = ck.depthwise_conv1d(**t, activation="silu", backend=backend)
    low = {name: t[name].bfloat16() for name in ("x", "gate", "out_gate", "residual")}
    assert torch.equal(y, ck.depthwise_conv1d(**{**t, **low}, activation="silu", backend=backend))
