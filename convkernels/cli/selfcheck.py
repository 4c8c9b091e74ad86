"""A quick numeric self-test of every usable backend: convolutions and attention against float64 and the a-priori bounds
of convkernels.testing, the models against themselves in float64 on the reference.

The choice of a CPU instruction set is made once per process, so each but the one in use is checked in a process of its
own: python -m convkernels.cli.selfcheck prints the outcomes there, one JSON object a line.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

import convkernels
from convkernels import backends
from convkernels.cli import environment
from convkernels.ops._dtypes import dtype_name
from convkernels.ops._spec import overload
from convkernels.ops.conv.schema import NONE, SILU
from convkernels.testing.attention import DELTA_THROUGH_OUT, INPUTS, AttentionProblem
from convkernels.testing.attention_oracle import Elements
from convkernels.testing.bounds import Bounds, StepBounds
from convkernels.testing.inputs import Problem, StepProblem

# One problem per feature, and the shapes at which kernels change path: whole and broken vectors of channels, filters
# longer than the sequence, many taps, one tap.
PROBLEMS = (
    Problem(length=70, heads=2, head_size=64, taps=7, left=3),
    Problem(length=70, heads=2, head_size=64, taps=31, left=15, softmax=True),
    Problem(length=33, heads=3, head_size=13, taps=4, left=2, softmax=True, bias=True),
    Problem(length=40, heads=77, head_size=1, taps=15, left=14),
    Problem(length=5, heads=4, head_size=16, taps=31, left=15, softmax=True, renormalize=True),
    Problem(length=40, heads=2, head_size=32, taps=3, left=4, dilation=4, layout="swap_last"),
    Problem(length=40, heads=2, head_size=32, taps=1, left=0, layout="step2", grad_layout="expanded"),
    Problem(length=40, heads=2, head_size=24, taps=7, left=3, gate=True, padding_mask=1, softmax=True),
    Problem(length=40, heads=2, head_size=24, taps=7, left=3, dropout=0.3, softmax=True),
    Problem(batch=1, lengths=(11, 0, 29), heads=2, head_size=24, taps=7, left=6, state=True, gate=True),
    Problem(length=50, heads=2, head_size=64, taps=7, left=3, kind="dynamic", softmax=True),
    Problem(length=50, heads=4, head_size=24, taps=31, left=30, kind="dynamic", softmax=True, renormalize=True),
    Problem(length=30, heads=4, head_size=9, taps=5, left=2, kind="dynamic", dropout=0.3, padding_mask=2, bias=True),
    Problem(length=40, heads=96, head_size=1, taps=4, left=3, bias=True, activation=SILU),
    Problem(length=40, heads=2, head_size=32, taps=15, left=14, gate=True, gate_activation=NONE, activation=SILU,
            out_gate=True, residual=True),
)  # fmt: skip
STEPS = (
    StepProblem(heads=3, head_size=40, taps=7, softmax=True, indexed=True, bias=True),
    StepProblem(heads=3, head_size=13, taps=4, kind="dynamic", softmax=True, renormalize=True, gate=True, position=2),
    StepProblem(heads=77, head_size=1, taps=4, bias=True, activation=SILU, out_gate=True),
    StepProblem(heads=77, head_size=1, taps=4, length=3, extra=3, slots=2, accepted=True, state_layout="swap_last"),
    StepProblem(
        heads=3, head_size=16, taps=7, softmax=True, lengths=(1, 9, 0, 30), extra=2, slots=1, saves=3, wide=False
    ),
)
# Tiles and broken tiles of queries and keys, every term, every kind of window, padding, packed sequences.
ATTENTIONS = (
    AttentionProblem(batch=1, length=37, keys=37, groups=1, head_size=16, left=3, right=3, bias=True, query_rel=2),
    AttentionProblem(length=9, keys=12, groups=1, sharing=2, head_size=8, left=2, right=0, outside=2, causal=True,
                     key_rel=1, bias=True, dropout=0.3),
    AttentionProblem(length=7, keys=7, head_size=5, left=2, right=2, outside=1, query_rel=1, rank=3, key_rel=2,
                     value_conv=3, padding=1),
    AttentionProblem(lengths=(4, 0, 6), head_size=8, left=1, right=1, bias=True, value_conv=1),
)  # fmt: skip
CONVOLUTIONS, ATTENTION, MODELS = "convolutions", "attention", "models"
RESULTS = ("x", "weight", "bias", "gate", "initial_state")


@dataclass
class Outcome:
    """Checks of one part of the package on one backend, device, instruction set and dtype: how many, the largest error
    as a fraction of its bound where that is known, what failed."""

    part: str
    backend: str
    device: str
    dtype: str
    isa: str | None = None
    checks: int = 0
    worst: float | None = None
    seconds: float = 0.0
    failures: list[str] = field(default_factory=list)

    @property
    def where(self) -> str:
        return f"{self.backend} on {self.device}{f' ({self.isa})' if self.isa else ''}"

    def compare(self, expected, actual: torch.Tensor, name: str) -> None:
        self.checks += 1
        try:
            expected.check(actual, name)
            self.worst = max(self.worst or 0.0, expected.worst(actual))
        except AssertionError as error:
            self.failures.append(f"{self.where}: {error}")


def _placed(arguments: tuple, device: str) -> tuple:
    return tuple(a.to(device) if isinstance(a, torch.Tensor) else a for a in arguments)


def _check_conv(outcome: Outcome, problem: Problem) -> None:
    tensors = problem.tensors()
    arguments = problem.op_arguments(tensors)
    bounds = Bounds(*arguments)
    y = overload("_tap_conv", outcome.backend)(*_placed(arguments, outcome.device))
    outcome.compare(bounds.output(), y, f"{problem}: y")
    if problem.activation or problem.out_gate:
        arguments = _placed(problem.activation_grad_arguments(tensors), outcome.device)
        found = overload("_tap_activation_grad", outcome.backend)(*arguments)
        for (name, exact), gradient in zip(bounds.activation_gradients(tensors["grad"]).items(), found, strict=True):
            outcome.compare(exact, gradient, f"{problem}: gradient of {name}")
    expected = bounds.gradients(tensors["grad"])
    gradients = overload("_tap_grad", outcome.backend)(*_placed(problem.grad_arguments(tensors), outcome.device))
    for name, gradient in zip(RESULTS, gradients, strict=True):
        if gradient.numel() and name in expected:
            outcome.compare(expected[name], gradient, f"{problem}: gradient of {name}")


def _check_step(outcome: Outcome, problem: StepProblem) -> None:
    arguments = problem.op_arguments(problem.tensors())
    bounds = StepBounds(*(a.clone() if isinstance(a, torch.Tensor) else a for a in arguments))
    placed = _placed(arguments, outcome.device)
    y = overload("_tap_step", outcome.backend)(*placed)
    outcome.compare(bounds.output(), y, f"{problem}: y")
    outcome.compare(bounds.state(), placed[1], f"{problem}: state")


def _convolutions(outcome: Outcome, dtype: torch.dtype) -> None:
    # Weights may have another dtype than x, except that float64 goes with float64 only.
    others = (dtype,) if dtype in (torch.float64, torch.float32) else (dtype, torch.float32)
    for weight_dtype in others:
        for problem in PROBLEMS:
            _check_conv(outcome, problem.with_(dtype=dtype, weight_dtype=weight_dtype))
        for step in STEPS:
            _check_step(outcome, step.with_(dtype=dtype, weight_dtype=weight_dtype))


@functools.cache
def _expected(problem: AttentionProblem) -> tuple[dict, Elements]:
    tensors = problem.tensors()
    elements = Elements(problem, tensors)
    gradients = elements.gradients()  # its graph is gone then
    elements.gradients = lambda: gradients
    return tensors, elements


def _attention(outcome: Outcome, dtype: torch.dtype) -> None:
    for problem in ATTENTIONS:
        problem = problem.with_(dtype=dtype, table_dtype=dtype)
        tensors, expected = _expected(problem)
        forward, backward = (overload(name, outcome.backend) for name in ("_attention", "_attention_grad"))
        out, lse = forward(*_placed(problem.op_arguments(tensors), outcome.device))
        gradients = backward(*_placed(problem.grad_arguments(tensors, out, lse), outcome.device))
        found = {n: g.cpu() for n, g in zip(INPUTS, gradients, strict=True) if tensors[n] is not None}
        outcome.checks += 2 + len(found)
        try:
            through_out = outcome.backend in DELTA_THROUGH_OUT
            shares = expected.check_out(out.cpu(), lse.cpu()), expected.check_gradients(found, through_out=through_out)
            outcome.worst = max(outcome.worst or 0.0, *shares)
        except AssertionError as error:
            outcome.failures.append(f"{outcome.where}: {problem}: {error}")


def models_here() -> bool:
    """Whether the models can be imported."""
    return importlib.util.find_spec("transformers") is not None


def _models() -> Iterator[tuple[str, Callable[[str], torch.nn.Module], dict[str, torch.Tensor]]]:
    """Name, what builds it for a backend, and inputs."""
    from convkernels import models

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 250, (2, 19), generator=generator)
    mask = (torch.arange(19) < torch.tensor([[19], [13]])).long()
    for mixer in ("transformer", "lightweight", "dynamic", "dilated"):
        config = models.ConvSeq2SeqConfig.preset(mixer, "tiny", dropout=0.0)
        made = functools.partial(_model, models.ConvSeq2SeqForConditionalGeneration, config)
        yield f"ConvSeq2Seq {mixer}", made, {"input_ids": ids, "attention_mask": mask, "labels": ids}
    for variant in ("composite", "dynamic"):
        config = models.CompositeBertConfig.preset(
            variant, "tiny", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
        )
        made = functools.partial(_model, models.CompositeBertForMaskedLM, config)
        yield f"CompositeBert {variant}", made, {"input_ids": ids, "attention_mask": mask, "labels": ids}


def _model(made: type, config, backend: str) -> torch.nn.Module:
    torch.manual_seed(0)
    config.backend = backend
    return made(config).eval()


@functools.cache
def _results_of_models() -> dict[str, list[torch.Tensor]]:
    return {name: _run_model(made("reference").double(), inputs) for name, made, inputs in _models()}


def _run_model(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """The logits, and the gradients of all parameters as one row."""
    out = model(**inputs)
    out.loss.backward()
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return [t.detach().cpu().double() for t in (out.logits, torch.cat(gradients))]


# Of the largest value: some hundred roundings of float32, one after the other.
MODEL_BOUND = 2.0**-14


def _whole_models(outcome: Outcome, dtype: torch.dtype) -> None:
    for name, made, inputs in _models():
        found = _run_model(
            made(outcome.backend).to(outcome.device), {key: value.to(outcome.device) for key, value in inputs.items()}
        )
        for what, actual, expected in zip(("logits", "gradients"), found, _results_of_models()[name], strict=True):
            outcome.checks += 1
            share = ((actual - expected).abs().max() / (MODEL_BOUND * expected.abs().max())).item()
            outcome.worst = max(outcome.worst or 0.0, share)
            if not share <= 1:  # or NaN
                outcome.failures.append(f"{outcome.where}: {name}: {what} are off by {share:.3g} times the bound")


PARTS = {
    CONVOLUTIONS: ("tap_grad", _convolutions),
    ATTENTION: ("attention_grad", _attention),
    MODELS: ("attention_grad", _whole_models),
}


def dtypes_of(backend: str, device_types: tuple[str, ...], op: str = "tap_grad") -> list[tuple[str, torch.dtype]]:
    """The device types and dtypes on which a backend can be checked."""
    return [
        (device, dtype)
        for device in device_types
        for dtype in backends.BACKENDS[backend].dtypes
        if not convkernels.why_not(backend, op=op, device=device, dtype=dtype)
    ]


def run_here(
    device_types: tuple[str, ...], only: str | None = None, parts: tuple[str, ...] = tuple(PARTS)
) -> Iterator[Outcome]:
    """One outcome per part, usable backend, device type and dtype; of the models only float32."""
    for part in parts:
        op, checks = PARTS[part]
        if part == MODELS and not models_here():
            continue
        for backend in [only] if only else backends.names():
            for device, dtype in dtypes_of(backend, device_types, op):
                if part == MODELS and dtype != torch.float32:
                    continue
                isa = environment.active_isa() if backend == "cpu" else None
                outcome, start = Outcome(part, backend, device, dtype_name(dtype), isa), time.perf_counter()
                checks(outcome, dtype)
                outcome.seconds = time.perf_counter() - start
                yield outcome


def _other_isas() -> list[str]:
    native = environment.native_module()
    if native is None or os.environ.get("CONVKERNELS_CPU_ISA"):
        return []
    return [name for name in environment.usable_isas(native) if name != native.active_isa()]


def why_not_all() -> str:
    """Why only one instruction set was checked, where that has a reason other than the machine."""
    if os.environ.get("CONVKERNELS_CPU_ISA"):
        return " (CONVKERNELS_CPU_ISA chooses it)"
    return "" if environment.native_module() else " (without the module convkernels._C the others are not known)"


def run(device_types: tuple[str, ...], only: str | None = None) -> Iterator[Outcome]:
    """The outcomes of this process, then those of the other instruction sets that this machine has."""
    yield from run_here(device_types, only)
    if only not in (None, "cpu") or convkernels.why_not("cpu"):
        return
    for isa in _other_isas():
        yield from run_on(isa)


def run_on(isa: str) -> Iterator[Outcome]:
    """The outcomes of convolutions and attention on an instruction set, in a process of its own."""
    variables = environment.with_checkout(CONVKERNELS_CPU_ISA=isa)
    # -P: the folder that this was started in may hold another convkernels.
    command = [sys.executable, "-P", "-m", "convkernels.cli.selfcheck"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=variables) as process:
        for line in process.stdout:
            yield Outcome(**json.loads(line))
    if process.returncode:
        yield Outcome(CONVOLUTIONS, "cpu", "cpu", "-", isa, failures=[f"cpu ({isa}): the check did not end well"])


if __name__ == "__main__":
    # The models are made of the same kernels, and take longest to import.
    for one in run_here(("cpu",), "cpu", (CONVOLUTIONS, ATTENTION)):
        print(json.dumps(dataclasses.asdict(one)), flush=True)
