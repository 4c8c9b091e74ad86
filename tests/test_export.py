"""Exported programs: they name no backend unless the call did, choose one where they run, and can be trained."""

import io

import pytest
import torch
from test_opcheck import check, sample_of_attention
from torch.export import Dim

import convkernels as ck
from convkernels.ops import _select

B, T, C, H, K = 2, 9, 8, 4, 3
DYNAMIC = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}


def lightweight(x, weight, **options):
    return ck.lightweight_conv1d(x, weight, padding="causal", **options)


def depthwise(x, weight, **options):
    return ck.depthwise_conv1d(x, weight, return_state=True, padding="causal", **options)


def dynamic(x, weight, **options):
    return ck.dynamic_conv1d(x, weight, gate=x, renormalize=True, **options)


def attention(q, bias, **options):
    return ck.composite_attention(q, q, q, bias=bias, window=(2, 2), return_lse=True, **options)


def step(state, weight, **options):
    """The state is a copy: a program gives back what it changes of its inputs, which is not the point here."""
    state = state.clone()
    return ck.lightweight_conv1d_step(state[:, 0] * 2, state, weight, **options), state


SHAPES = {
    lightweight: ((B, T, C), (H, K), "tap_conv"),
    depthwise: ((B, T, C), (C, K), "tap_conv"),
    dynamic: ((B, T, C), (B, T, H, K), "tap_conv"),
    attention: ((B, T, H, C), (H, 5), "attention"),
    step: ((B, K - 1, C), (H, K), "tap_step"),
}
TRAINED = [function for function in SHAPES if function is not step]


class Model(torch.nn.Module):
    def __init__(self, function, **options):
        super().__init__()
        first, second, _ = SHAPES[function]
        self.function, self.options = function, options
        self.per_position = len(second) == 4
        trained = function in TRAINED
        self.weight = None if self.per_position else torch.nn.Parameter(torch.randn(second), trained)

    def forward(self, x, weight=None):
        return self.function(x, weight if self.per_position else self.weight, **self.options)


def inputs(function, batch=B, time=T):
    first, second, _ = SHAPES[function]
    if function is step:
        return (torch.randn(batch, *first[1:]),)
    return tuple(torch.randn(batch, time, *shape[2:]) for shape in (first, second) if len(shape) > 2)


def exported(function, strict=False, **options):
    """The module, and its program after it has been a file."""
    torch.manual_seed(0)
    model, given = Model(function, **options), inputs(function)
    shapes = tuple({0: Dim.DYNAMIC} if function is step else DYNAMIC for _ in given)
    file = io.BytesIO()
    torch.export.save(torch.export.export(model, given, dynamic_shapes=shapes, strict=strict), file)
    file.seek(0)
    return model, torch.export.load(file)


def operators(program):
    return {str(node.target) for node in program.graph.nodes if "convkernels" in str(node.target)}


def flat(results):
    return [results] if isinstance(results, torch.Tensor) else list(results)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("function", SHAPES)
def test_programs_name_no_backend(function, strict):
    """Also after decomposition, and for other sizes than those they were exported with."""
    model, program = exported(function, strict)
    name = f"convkernels.{SHAPES[function][2]}.default"
    assert operators(program) == {name}
    if function is not step:  # the compiler wraps operators that change their arguments
        assert operators(program.run_decompositions()) == {name}
    for sizes in ((B, T), (3, 17), (1, 2)):
        given = inputs(function, *sizes)
        for found, expected in zip(flat(program.module()(*given)), flat(model(*given)), strict=True):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("function", SHAPES)
def test_programs_keep_a_backend_that_was_named(function):
    _, program = exported(function, backend="reference")
    assert operators(program) == {f"convkernels._{SHAPES[function][2]}.reference"}


@pytest.mark.parametrize("function", SHAPES)
def test_programs_choose_where_they_run(function, monkeypatch):
    """Written where the reference was wanted, run where it is not, and the other way round."""
    monkeypatch.setenv("CONVKERNELS_BACKEND", "reference")
    _select.reset()
    model, program = exported(function)
    given = inputs(function)
    for backend in ("reference", "cpu"):
        if ck.why_not(backend):
            continue
        monkeypatch.setenv("CONVKERNELS_BACKEND", backend)
        _select.reset()
        model.options = {"backend": backend}
        for found, expected in zip(flat(program.module()(*given)), flat(model(*given)), strict=True):
            assert torch.equal(found, expected)
    monkeypatch.setenv("CONVKERNELS_BACKEND", "triton")
    monkeypatch.setitem(ck.backends.BACKENDS, "triton", ck.backends.BACKENDS["triton"]._replace(devices=("cuda",)))
    _select.reset()
    with pytest.raises(RuntimeError, match="'CONVKERNELS_BACKEND': backend 'triton': it runs on cuda tensors, not on"):
        program.module()(*given)
    monkeypatch.undo()
    _select.reset()


@pytest.mark.parametrize("function", TRAINED)
def test_programs_can_be_trained(function):
    """First and second derivatives are those of the module."""
    model, program = exported(function)
    loaded = program.module()
    given = [value.requires_grad_() for value in inputs(function)]
    gradients = []
    for module in (loaded, model):
        leaves = [*given, *module.parameters()]
        loss = sum(value.square().sum() for value in flat(module(*given)))
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        second = torch.autograd.grad(sum(value.square().sum() for value in first), leaves)
        gradients.append((*first, *second))
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("op", ["tap_conv", "tap_activation_grad", "tap_grad", "tap_step"])
def test_opcheck_of_what_programs_name(op):
    check(op, op, "default", range(400, 408))


@pytest.mark.parametrize("number", [7001, 7002, 7003])
def test_opcheck_of_attention_as_programs_name_it(number):
    problem, t = sample_of_attention(number, number % 4 == 3)
    torch.library.opcheck(torch.ops.convkernels.attention.default, problem.op_arguments(t))


def test_flops_of_programs():
    from torch.utils.flop_counter import FlopCounterMode

    model, program = exported(lightweight)
    given, counts = inputs(lightweight), []
    for module in (model, program.module()):
        with FlopCounterMode(display=False) as counter:
            module(*given)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@pytest.mark.slow
def test_ahead_of_time_inductor(tmp_path):
    """A package that was compiled where it was exported."""
    model, program = exported(lightweight)
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    loaded = torch._inductor.aoti_load_package(package)
    for sizes in ((B, T), (3, 17)):
        given = inputs(lightweight, *sizes)
        with torch.no_grad():
            assert torch.equal(loaded(*given), model(*given))
