"""Which backend runs, why another does not, and the environment variables that decide."""

import json
import math
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import convkernels as ck
from convkernels.backends.switches import switch
from convkernels.cli import environment
from convkernels.ops import _select, _spec

ROOT = Path(ck.__file__).parents[1]


@pytest.fixture(autouse=True)
def forget_decisions(monkeypatch):
    monkeypatch.delenv("CONVKERNELS_BACKEND", raising=False)
    monkeypatch.delenv("CONVKERNELS_STRICT", raising=False)
    _select.reset()
    yield
    _select.reset()


@pytest.fixture
def no_fast_backend(monkeypatch):
    """A machine without the native library."""
    monkeypatch.setattr(_select, "_load", lambda name: None if name == "reference" else "it was not built")
    _select.reset()


X, W = torch.randn(1, 5, 4), torch.randn(2, 3)
ESTIMATED = dict(_select.ESTIMATED)


def test_why_not():
    assert ck.why_not("reference") == [] and ck.why_not("auto") == []
    assert ck.why_not("reference", dtype=torch.float64, device="cuda") == []
    (reason,) = ck.why_not("reference", dtype=torch.int8)
    assert reason == "it does not compute in torch.int8"
    assert "it runs on cpu tensors, not on cuda" in ck.why_not("cpu", device="cuda")
    with pytest.raises(ValueError, match="argument 'backend': expected one of 'auto', .*, got 'gpu'"):
        ck.why_not("gpu")
    with pytest.raises(ValueError, match="argument 'op': expected one of .*'tap_conv', .*, got 'conv'"):
        ck.why_not("cpu", op="conv")
    with pytest.raises(TypeError, match="argument 'dtype': expected a torch.dtype, got 'float16'"):
        ck.why_not("cpu", dtype="float16")


def test_the_reasons_are_those_of_the_error(no_fast_backend):
    """Selection, errors and test skips share one list."""
    (reason,) = ck.why_not("cpu")
    with pytest.raises(RuntimeError) as caught:
        ck.lightweight_conv1d(X, W, backend="cpu")
    assert reason in str(caught.value)


def test_an_explicit_backend_never_falls_back(no_fast_backend, monkeypatch):
    with pytest.raises(RuntimeError, match="backend 'cpu': it was not built"):
        ck.lightweight_conv1d(X, W, backend="cpu")
    monkeypatch.setenv("CONVKERNELS_BACKEND", "cpu")
    with pytest.raises(RuntimeError, match="d: environment variable 'CONVKERNELS_BACKEND': backend 'cpu': it was not"):
        ck.lightweight_conv1d(X, W)


def test_auto_steps_down_once_with_the_reason(no_fast_backend):
    """Of the backends for such tensors, and not again for the next function."""
    with pytest.warns(RuntimeWarning, match="no fast backend is usable.*it was not built.*slow reference") as caught:
        y = ck.lightweight_conv1d(X, W)
        ck.lightweight_conv1d(X, W)
        ck.depthwise_conv1d(X.double(), W.new_ones(4, 3).double())
    assert len(caught) == 1
    assert "backend 'cuda'" not in str(caught[0].message)
    assert torch.equal(y, ck.lightweight_conv1d(X, W, backend="reference"))


def test_the_warning_points_at_the_users_line(no_fast_backend):
    """However many frames of the package and of torch lie between."""
    for call in (
        lambda: ck.lightweight_conv1d(X, W),
        lambda: ck.lightweight_conv1d_step(X[:, 0], X.new_zeros(len(X), W.shape[1] - 1, X.shape[2]), W),
        lambda: ck.composite_attention(X[:, :, None], X[:, :, None], X[:, :, None]),
        lambda: ck.nn.GatedConv(4, ck.nn.DepthwiseConv1d(4, 3))(torch.randn(1, 5, 4)),
    ):
        _select.reset()
        with pytest.warns(RuntimeWarning, match="slow reference") as caught:
            call()
        assert {warning.filename for warning in caught} == {__file__}


@pytest.fixture
def lagging(monkeypatch):
    """A backend that has the convolutions and not yet attention."""
    without = {"attention", "attention_grad"}
    monkeypatch.setattr(_select, "_implements", lambda name, op: name == "reference" or op not in without)
    monkeypatch.setattr(_select, "_load", lambda name: None)
    _select.reset()


Q = torch.randn(1, 5, 2, 4)
MISSING = "it does not implement attention yet"


def test_an_operator_that_a_backend_does_not_have(lagging):
    assert ck.why_not("cpu", op="attention") == [MISSING] and ck.why_not("cpu", op="tap_conv") == []
    assert ck.why_not("reference", op="attention_grad") == []
    with pytest.raises(RuntimeError, match=f"^composite_attention: backend 'cpu': {MISSING}"):
        ck.composite_attention(Q, Q, Q, backend="cpu")
    ck.composite_attention(Q, Q, Q, backend="reference")


def test_auto_steps_down_for_one_operator_alone(lagging):
    with pytest.warns(RuntimeWarning, match=f"composite_attention .*{MISSING}.*slow reference") as caught:
        ck.composite_attention(Q, Q, Q)
        ck.composite_attention(Q, Q, Q)
    assert len(caught) == 1
    assert _select.choose("auto", "lightweight_conv1d", "cpu", torch.float32) == "cpu"


def test_strict_holds_for_one_operator(lagging, monkeypatch):
    monkeypatch.setenv("CONVKERNELS_STRICT", "1")
    with pytest.raises(RuntimeError, match="CONVKERNELS_STRICT=1 forbids"):
        ck.composite_attention(Q, Q, Q)


def test_a_backend_may_have_only_the_forward_pass(lagging, monkeypatch):
    monkeypatch.setattr(_select, "_implements", lambda name, op: name == "reference" or op != "attention_grad")
    _select.reset()
    assert ck.why_not("cpu", op="attention") == []
    with pytest.raises(RuntimeError, match="backend 'cpu': it does not implement attention_grad yet"):
        ck.composite_attention(Q.clone().requires_grad_(), Q, Q, backend="cpu")


def test_what_is_implemented_is_read_from_the_registrations():
    for name in ck.backends.BACKENDS:
        assert _select._implements(name, "lightweight_conv1d"), "not the name of an operator"
    assert _select._implements("reference", "attention") and _select._implements("reference", "tap_step")


def test_asking_for_the_reference_does_not_warn(no_fast_backend, monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ck.lightweight_conv1d(X, W, backend="reference")
        monkeypatch.setenv("CONVKERNELS_BACKEND", "reference")
        ck.lightweight_conv1d(X, W)


def test_strict_makes_it_an_error(no_fast_backend, monkeypatch):
    monkeypatch.setenv("CONVKERNELS_STRICT", "1")
    with pytest.raises(RuntimeError, match="CONVKERNELS_STRICT=1 forbids the slow reference"):
        ck.lightweight_conv1d(X, W)
    ck.lightweight_conv1d(X, W, backend="reference")


def test_a_switch_is_0_or_1(monkeypatch):
    """Other values are errors, so that "true" does not read as off."""
    for value, on in ("", False), ("0", False), ("1", True):
        monkeypatch.setenv("CONVKERNELS_STRICT", value)
        assert switch("CONVKERNELS_STRICT") is on
    monkeypatch.setenv("CONVKERNELS_STRICT", "true")
    with pytest.raises(ValueError, match="environment variable 'CONVKERNELS_STRICT': expected 0 or 1, got 'true'"):
        ck.lightweight_conv1d(X, W)


def test_environment_names_what_auto_means(monkeypatch):
    monkeypatch.setenv("CONVKERNELS_BACKEND", "reference")
    assert _select.choose("auto", "lightweight_conv1d", "cpu", torch.float32) == "reference"
    monkeypatch.setenv("CONVKERNELS_BACKEND", "abacus")
    _select.reset()
    with pytest.raises(ValueError, match="variable 'CONVKERNELS_BACKEND': expected one of .*, got 'abacus'"):
        ck.lightweight_conv1d(X, W)
    with pytest.raises(ValueError, match="argument 'backend': expected one of .*, got 'abacus'"):
        ck.lightweight_conv1d(X, W, backend="abacus")


def test_auto_is_the_first_usable_fast_backend(backend):
    entry = ck.backends.BACKENDS[backend]
    if not entry.fast:
        pytest.skip("auto does not choose it by itself")
    assert _select.choose("auto", "lightweight_conv1d", X.device.type, torch.float32) in ck.backends.BACKENDS
    for name in ck.backends.names():
        if not ck.why_not(name) and ck.backends.BACKENDS[name].fast:
            assert _select.choose("auto", "lightweight_conv1d", "cpu", torch.float32) == name
            break


@pytest.fixture
def gpu(monkeypatch):
    """A machine with an "X100" and two backends for it, both usable; returns those to break, to measure and to
    estimate."""
    broken, table, estimates = set(), {}, {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "X100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(_select, "_load", lambda name: "it is broken" if name in broken else None)
    monkeypatch.setattr(_select, "_implements", lambda name, op: True)
    monkeypatch.setattr(_select, "importlib", SimpleNamespace(import_module=lambda name: None))
    monkeypatch.setattr(_select, "FASTEST", table)
    monkeypatch.setattr(_select, "ESTIMATED", estimates)
    for name in ("triton", "cuda"):
        usual = ck.backends.BACKENDS[name]._replace(devices=("cuda",), fast=True)
        monkeypatch.setitem(ck.backends.BACKENDS, name, usual)
    _select.reset()
    return broken, table, estimates


def shown(op="lightweight_conv1d"):
    """Backend and reason in the table of `convkernels info`."""
    rows = environment.automatic(torch.device("cuda"))
    return next(row[3:] for row in rows if row[:3] == ("cuda", "bfloat16", op))


def test_auto_on_a_gpu_follows_measurements(gpu):
    broken, table, _ = gpu

    def chosen(op="lightweight_conv1d", dtype=torch.bfloat16, backend="auto", operator=None):
        _select.reset()
        return _select.choose(backend, op, "cuda", dtype, operator)

    assert chosen() == "triton"
    table["Y100", "lightweight_conv1d", torch.bfloat16] = "cuda"
    assert chosen() == "triton"
    table["X100", "lightweight_conv1d", torch.bfloat16] = "cuda"
    table["X100", "attention", torch.bfloat16] = "cuda"
    assert chosen() == chosen(op="composite_attention", operator="attention") == "cuda"
    assert chosen(op="composite_attention", operator="attention_grad") == "triton"
    assert chosen(dtype=torch.float32) == chosen(op="dynamic_conv1d") == chosen(backend="triton") == "triton"

    assert shown() == ("cuda", "the fastest, measured on X100")
    broken.add("cuda")
    assert chosen() == "triton"
    assert shown() == ("triton", "the first usable one (cuda, the fastest, measured on X100, is not)")
    broken.symmetric_difference_update({"cuda", "triton"})
    assert chosen(op="dynamic_conv1d") == "cuda"
    with pytest.raises(RuntimeError, match="backend 'triton': it is broken"):
        chosen(backend="triton")


def test_auto_on_a_gpu_without_measurements_follows_the_estimate(gpu, monkeypatch):
    broken, table, estimates = gpu
    unknown = ("triton", "the first usable one (which is the fastest is not known)")
    assert shown() == unknown
    estimates["lightweight_conv1d", torch.bfloat16] = "cuda"
    assert shown() == ("cuda", "the fastest, estimated for an H100")
    assert _select.choose("auto", "lightweight_conv1d", "cuda", torch.bfloat16) == "cuda"
    assert shown("dynamic_conv1d") == unknown
    broken.add("cuda")
    assert shown() == ("triton", "the first usable one (cuda, the fastest, estimated for an H100, is not)")
    broken.clear()
    table["Y100", "lightweight_conv1d", torch.bfloat16] = "triton"
    assert shown()[0] == "cuda"
    table["X100", "lightweight_conv1d", torch.bfloat16] = "triton"
    assert shown() == ("triton", "the fastest, measured on X100")
    table.clear()
    for other in ((8, 0), (8, 9), (10, 0), (12, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda other=other: other)
        _select.reset()
        assert shown() == unknown
        assert _select.choose("auto", "lightweight_conv1d", "cuda", torch.bfloat16) == "triton"


def test_calls_of_functions_find_the_estimates(gpu, monkeypatch):
    """Those that are committed, by the names that functions ask with."""
    monkeypatch.setattr(_select, "ESTIMATED", ESTIMATED)
    asked = set()

    def pick(backend, function, device_type, dtype, operator=None):
        asked.add((operator or function, dtype, _select.choose(backend, function, "cuda", dtype, operator)))
        return "reference"

    monkeypatch.setattr(_select, "pick", pick)
    for dtype in (torch.bfloat16, torch.float16):
        x, q = torch.ones(1, 5, 4, dtype=dtype), torch.ones(1, 5, 2, 4, dtype=dtype)
        ck.lightweight_conv1d(x, torch.ones(2, 3, dtype=dtype))
        ck.dynamic_conv1d(x, torch.ones(1, 5, 2, 3, dtype=dtype))
        for requires_grad in (False, True):
            ck.composite_attention(q.detach().requires_grad_(requires_grad), q, q)
    assert {(op, dtype): name for op, dtype, name in asked if (op, dtype) in ESTIMATED} == ESTIMATED


def test_nothing_is_estimated_for_a_cpu():
    assert _select.fastest("lightweight_conv1d", "cpu", torch.bfloat16) == (None, "")
    reasons = {row[-1] for row in environment.automatic(torch.device("cpu"))}
    assert reasons <= {"the first usable one", "no fast backend is usable"}


def test_what_is_estimated_is_what_the_tables_say():
    """By a geometric mean over the problems that both tables have, both directions together. Memory and instructions
    take their time side by side; of equal estimates the first backend of the order wins."""
    text = (ROOT / "docs" / "cuda-without-a-gpu.md").read_text()
    head = "| problem | kernel | memory, us | instructions, us |"
    cuda, triton = (estimates_of(part.split("\n\n")[0]) for part in text.split(head)[1:])
    balance = {}
    for problem in cuda.keys() & triton.keys():
        op = "dynamic_conv1d" if problem.startswith("dynamic") else "lightweight_conv1d"
        dtype = torch.float32 if "float32" in problem else torch.bfloat16
        ratios = [math.log(a / b) for a, b in zip(cuda[problem], triton[problem], strict=True)]
        balance[op, dtype] = balance.get((op, dtype), 0) + sum(ratios)
    assert len(cuda.keys() & triton.keys()) >= 10 and ("dynamic_conv1d", torch.float32) in balance
    assert ck.backends.names().index("triton") < ck.backends.names().index("cuda")
    convolutions = {key: name for key, name in _select.ESTIMATED.items() if not key[0].startswith("attention")}
    assert convolutions == {key: "cuda" for key, total in balance.items() if total < 0}


def estimates_of(table):
    """Forward and backward by problem."""
    found = {}
    for line in table.splitlines()[2:]:
        problem, _, memory, instructions = line.strip("| ").split(" | ")[:4]
        pairs = zip(memory.split(", "), instructions.split(", "), strict=True)
        found[problem] = [max(map(int, pair)) for pair in pairs]
    return found


def test_what_is_preferred_exists_and_was_measured():
    """By a geometric mean over the cases of the committed results, and by less than the other."""
    for (device, op, dtype), name in _select.FASTEST.items():
        assert name in ck.backends.BACKENDS and (op in _spec.OPERATORS or callable(getattr(ck, op)))
        files = [json.loads(path.read_text()) for path in (ROOT / "benchmarks" / "results").glob("*.json")]
        (content,) = (c for c in files if any(s["environment"]["device"] == device for s in c.values()))
        times = {backend: times_of(content[f"streaming {backend}"], op, dtype) for backend in ("triton", "cuda")}
        assert times["cuda"].keys() == times["triton"].keys() and times["cuda"]
        other = "triton" if name == "cuda" else "cuda"
        assert sum(math.log(times[name][case] / times[other][case]) for case in times[name]) < 0


def times_of(section, op, dtype):
    """Times of ours by case and direction."""
    assert section["shape"]["dtype"] == str(dtype).removeprefix("torch.")
    records = [r for r in section["records"] if r["case"].split()[0] == op.removesuffix("_conv1d")]
    return {(r["case"], r["direction"]): r["seconds"]["convkernels"] for r in records}


def run_python(code, **environment):
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)


CALL = """
import torch, convkernels as ck
print(ck.lightweight_conv1d(torch.ones(1, 3, 2), torch.zeros(1, 3), backend="cpu")[0, 1, 0].item())
"""


def test_instruction_set_variable():
    """CONVKERNELS_CPU_ISA forces a lower instruction set; an unknown name is refused with the known ones. Empty, as in
    `VARIABLE= command`, it chooses nothing."""
    if ck.why_not("cpu"):
        pytest.skip("; ".join(ck.why_not("cpu")))
    for name in ("portable", ""):
        assert run_python(CALL, CONVKERNELS_CPU_ISA=name).stdout.strip() == "1.0"
    refused = run_python(CALL, CONVKERNELS_CPU_ISA="mmx")
    assert refused.returncode != 0
    assert re.search("CONVKERNELS_CPU_ISA: expected one of .*portable.*got 'mmx'", refused.stderr), refused.stderr


def test_variables_are_listed_once_in_the_documentation_and_by_info():
    """docs/semantics.md and `convkernels info` have the same list, of all variables that the sources read."""
    sources = [*(ROOT / "convkernels").rglob("*.py"), *(ROOT / "csrc").rglob("*.cpp"), ROOT / "setup.py"]
    read = {name for path in sources for name in re.findall(r"CONVKERNELS_[A-Z_]+[A-Z]", path.read_text())}
    text = (ROOT / "docs" / "semantics.md").read_text()
    listed = re.findall(r"^\| `([A-Z_]+)` \|", text, re.MULTILINE)
    assert listed == list(environment.VARIABLES) and set(listed) == read | {"TRITON_INTERPRET"}
