"""How the drop-ins for the package causal_conv1d get along with torch's compiler, autocast and transforms, and with the
models that call them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import convkernels
from convkernels.interop.causal_conv1d import causal_conv1d_fn, causal_conv1d_update

NUMBERS = ((4, 4, 4, 5, 5, 9), (-1, 2, 2, 2, 2, -1))  # of the sequences in two rows


def everything(device="cpu"):
    """Tensors that need gradients, and calls of each kind."""
    torch.manual_seed(0)
    shapes = (2, 3, 6), (3, 4), (3,), (2, 3, 3)
    x, weight, bias, state = inputs = [torch.randn(shape, device=device).requires_grad_() for shape in shapes]
    packed, rows, at = (torch.tensor(list(v), device=device) for v in (NUMBERS, (3, -1), (3, 7)))

    def updated(width, length, at=None, rows=None):
        conv_state = torch.ones(2 if rows is None else 4, width, 3, device=device).mT
        return causal_conv1d_update(x[:, :, :length], conv_state, weight, bias, "silu", at, rows), conv_state

    return inputs, {
        "plain": lambda: causal_conv1d_fn(x, weight, bias, activation="silu"),
        "states": lambda: causal_conv1d_fn(x, weight, bias, None, state, True, activation="silu"),
        "out": lambda: causal_conv1d_fn(x, weight, bias, None, state, True, torch.empty(2, 3, 3, device=device)),
        "numbers": lambda: causal_conv1d_fn(x, weight, bias, packed, state, activation="silu"),
        "step": lambda: updated(3, 1),
        "wide": lambda: updated(5, 2),
        "ring": lambda: updated(5, 2, at),
        "rows": lambda: updated(5, 2, None, rows),
        "rows of rings": lambda: updated(5, 9, at, rows),
    }


def several(result):
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("name", everything()[1])
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_without_graph_breaks(compiler, name):
    torch._dynamo.reset()
    inputs, calls = everything()
    expected = several(calls[name]())
    actual = several(torch.compile(calls[name], fullgraph=True, backend=compiler)())
    torch.testing.assert_close(actual, expected)
    if expected[0].requires_grad:
        results = [
            torch.autograd.grad(sum(v.square().sum() for v in r), inputs, allow_unused=True) for r in (actual, expected)
        ]
        torch.testing.assert_close(*results)


@pytest.mark.parametrize("name", everything()[1])
def test_autocast_changes_no_dtype(name):
    calls = everything()[1]
    expected = several(calls[name]())
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(a, e) for a, e in zip(several(calls[name]()), expected, strict=True))


@pytest.mark.parametrize("name", everything()[1])
def test_shapes_without_memory(name):
    expected = [(v.shape, v.stride(), v.dtype) for v in several(everything()[1][name]())]
    with FakeTensorMode():
        fake = [(v.shape, v.stride(), v.dtype) for v in several(everything()[1][name]())]
    meta = [(v.shape, v.stride(), v.dtype) for v in several(everything("meta")[1][name]())]
    assert fake == expected and meta == expected


@pytest.mark.parametrize("numbers", [None, NUMBERS], ids=["whole", "numbers"])
def test_transforms(numbers):
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(shape, dtype=torch.float64) for shape in ((4, 2, 3, 6), (3, 4), (3,)))
    seq_idx = None if numbers is None else torch.tensor(numbers)

    def call(x, weight):
        return causal_conv1d_fn(x, weight, bias, seq_idx, activation="silu")

    each = [call(one, weight) for one in x]
    torch.testing.assert_close(torch.func.vmap(call, (0, None))(x, weight), torch.stack(each))
    expected = torch.autograd.functional.jacobian(lambda weight: call(x[0], weight), weight)
    torch.testing.assert_close(torch.func.jacrev(call, 1)(x[0], weight), expected)


def test_updates_carry_no_gradient():
    x, weight, bias = (torch.randn(shape).requires_grad_() for shape in ((2, 3), (3, 4), (3,)))
    for width in (3, 4):
        state = torch.zeros(2, width, 3).mT
        assert not causal_conv1d_update(x, state, weight, bias, "silu").requires_grad
        assert not state.requires_grad and torch.equal(state[:, :, -1], x)


@pytest.mark.parametrize("width", [3, 5])
def test_updates_under_vmap(width):
    torch.manual_seed(0)
    x, weight, states = torch.randn(4, 2, 3, 1), torch.randn(3, 4), torch.randn(4, 2, width, 3).mT
    again = states.clone()
    expected = torch.stack([causal_conv1d_update(*given, weight) for given in zip(x, again, strict=True)])
    assert torch.equal(torch.func.vmap(lambda x, state: causal_conv1d_update(x, state, weight))(x, states), expected)
    assert torch.equal(states, again)


STAND_IN = """
import functools, sys
from convkernels.interop import causal_conv1d

def counted(function):
    return functools.wraps(function)(lambda *given, **options: called.append(function) or function(*given, **options))

called, functions = [], [causal_conv1d.causal_conv1d_fn, causal_conv1d.causal_conv1d_update]
for function in functions:
    setattr(causal_conv1d, function.__name__, counted(function))
sys.modules["causal_conv1d"] = causal_conv1d if {used} else None
"""
MAMBA = """
import torch
from transformers import Mamba2Config, Mamba2ForCausalLM

torch.manual_seed(0)
sizes = dict(vocab_size=64, hidden_size=32, num_heads=4, head_dim=16, state_size=8, n_groups=1, chunk_size=8)
model = Mamba2ForCausalLM(Mamba2Config(num_hidden_layers=2, **sizes)).eval()
tokens = torch.randint(3, 64, (2, 13))
model(tokens, labels=tokens).loss.backward()
results = [model.generate(tokens, max_new_tokens=8, do_sample=False), *(p.grad for p in model.parameters())]
assert set(called) == (set(functions) if {used} else set())
torch.save(results, {file!r})
"""


@pytest.mark.slow
def test_mamba_of_transformers(tmp_path):
    """Its models call these functions where this module stands in the place of the package."""
    pytest.importorskip("transformers")
    files = {True: str(tmp_path / "ours"), False: str(tmp_path / "stock")}
    environment = os.environ | {"PYTHONPATH": str(Path(convkernels.__file__).parent.parent)}
    for used, file in files.items():
        code = (STAND_IN + MAMBA).replace("{used}", str(used)).replace("{file!r}", repr(file))
        subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    ours, theirs = map(torch.load, files.values())
    assert torch.equal(ours[0], theirs[0])
    torch.testing.assert_close(ours[1:], theirs[1:])
