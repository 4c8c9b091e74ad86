"""Which backend runs, why another does not, and the environment variables that decide."""

import contextlib
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
from convkernels.backends import cuda as cuda_backend
from convkernels.backends import triton as triton_backend
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
    """Whoever wrote "true" meant it."""
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
    """A machine with an "X100" and two backends for it, both usable; returns those to break and to measure."""
    broken, table = set(), {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "X100")
    monkeypatch.setattr(_select, "_load", lambda name: "it is broken" if name in broken else None)
    monkeypatch.setattr(_select, "_implements", lambda name, op: True)
    monkeypatch.setattr(_select, "importlib", SimpleNamespace(import_module=lambda name: None))
    monkeypatch.setattr(_select, "FASTEST", table)
    for name in ("triton", "cuda"):
        usual = ck.backends.BACKENDS[name]._replace(devices=("cuda",), fast=True)
        monkeypatch.setitem(ck.backends.BACKENDS, name, usual)
    _select.reset()
    return broken, table


def test_auto_on_a_gpu_follows_measurements(gpu):
    broken, table = gpu

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

    def shown():
        rows = environment.automatic(torch.device("cuda"))
        return next(row[3:] for row in rows if row[:3] == ("cuda", "bfloat16", "lightweight_conv1d"))

    assert shown() == ("cuda", "measured to be the fastest on this device")
    broken.add("cuda")
    assert chosen() == "triton"
    assert "cuda, measured to be faster, is not" in shown()[-1]
    broken.symmetric_difference_update({"cuda", "triton"})
    assert chosen(op="dynamic_conv1d") == "cuda"
    with pytest.raises(RuntimeError, match="backend 'triton': it is broken"):
        chosen(backend="triton")


def test_what_is_preferred_exists_and_was_measured():
    """By a geometric mean over the cases of the committed results, and by less than the first of the table."""
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
    """CONVKERNELS_CPU_ISA forces a lower instruction set; an unknown name is refused with the known ones."""
    if ck.why_not("cpu"):
        pytest.skip("; ".join(ck.why_not("cpu")))
    assert run_python(CALL, CONVKERNELS_CPU_ISA="portable").stdout.strip() == "1.0"
    refused = run_python(CALL, CONVKERNELS_CPU_ISA="mmx")
    assert refused.returncode != 0
    assert re.search("expected one of .*portable.*got 'mmx'", refused.stderr), refused.stderr


def test_variables_are_listed_once_in_the_documentation_and_by_info():
    """docs/semantics.md and `convkernels info` have the same list, of all variables that the sources read."""
    sources = [*(ROOT / "convkernels").rglob("*.py"), *(ROOT / "csrc").rglob("*.cpp"), ROOT / "setup.py"]
    read = {name for path in sources for name in re.findall(r"CONVKERNELS_[A-Z_]+[A-Z]", path.read_text())}
    text = (ROOT / "docs" / "semantics.md").read_text()
    listed = re.findall(r"^\| `([A-Z_]+)` \|", text, re.MULTILINE)
    assert listed == list(environment.VARIABLES) and set(listed) == read | {"TRITON_INTERPRET"}


def test_triton_takes_an_assembler_that_makes_right_code(tmp_path, monkeypatch):
    """ptxas before 12.9 does not, for compute capability 9.x."""

    def assembler(path, release):
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.1'\n")
        path.chmod(0o755)
        return str(path)

    def choose(own, newer=None, given=None, toolkit=None):
        folder = tmp_path / f"{own} {newer} {given} {toolkit}"
        folder.mkdir()
        assembler(folder / "ptxas", own)
        monkeypatch.setenv("TRITON_PTXAS_PATH", "")  # so that it is put back
        monkeypatch.delenv("TRITON_PTXAS_PATH")
        monkeypatch.setenv("CUDA_HOME", str(folder / "none"))
        monkeypatch.setattr(triton_backend.shutil, "which", lambda name: str(folder / "nowhere"))
        if newer:
            assembler(folder / "ptxas-blackwell", newer)
        if given:
            monkeypatch.setenv("TRITON_PTXAS_PATH", assembler(folder / "given", given))
        if toolkit:
            monkeypatch.setenv("CUDA_HOME", str(folder / "cuda"))
            (folder / "cuda").mkdir()
            assembler(folder / "cuda" / "bin" / "ptxas", toolkit)
        reason = triton_backend.choose_assembler(folder)
        chosen = os.environ.get("TRITON_PTXAS_PATH")
        return reason, chosen and str(Path(chosen).relative_to(folder))

    assert choose("12.9") == (None, None)
    assert choose("12.8", newer="12.9") == (None, "ptxas-blackwell")
    assert choose("12.8", toolkit="13.0") == (None, "cuda/bin/ptxas")
    assert choose("12.8", newer="12.9", given="13.1") == (None, "given")
    reason, chosen = choose("12.8", newer="12.9", given="12.4")
    assert "given is older than 12.9" in reason and "set TRITON_PTXAS_PATH" in reason and chosen == "given"
    assert "ptxas is older than 12.9" in choose("12.8", newer="12.8")[0]


@pytest.mark.parametrize(
    ("capability", "later"),
    [((8, 0), False), ((8, 9), False), ((9, 0), False), ((10, 3), False), ((11, 0), True), ((12, 1), True)],
)
def test_who_waits_for_the_drivers_compiler(capability, later):
    """A GPU for which the library holds no machine code, but what the driver makes it from."""
    build = SimpleNamespace(cuda_archs=["80", "90a", "100+PTX"])
    said = cuda_backend.describe(capability, build)
    assert said.startswith(".".join(map(str, capability))) and ("first used" in said) == later
    build.cuda_archs.append("120")
    assert ("first used" in cuda_backend.describe(capability, build)) == (later and capability[0] != 12)
    for too_new in (["130+PTX"], ["90a"] if capability != (9, 0) else ["80a"]):
        said = cuda_backend.describe(capability, SimpleNamespace(cuda_archs=too_new))
        assert said.endswith(": this build has no CUDA kernels for it")
    for unknown in (None, SimpleNamespace(cuda_archs=[])):
        assert cuda_backend.describe(capability, unknown) == ".".join(map(str, capability))


@pytest.fixture
def fresh_gpu(monkeypatch):
    """A machine with a GPU and the CUDA library; the capability and what the library finds are to be filled in."""
    found = SimpleNamespace(capability=(9, 0), support=(13000, 13000, None), asked=[])
    monkeypatch.delenv("CONVKERNELS_SIMT", raising=False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: found.capability)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device", lambda index: found.asked.append(index) or contextlib.nullcontext())
    monkeypatch.setattr(cuda_backend, "load_library", lambda name: None)
    monkeypatch.setattr(cuda_backend, "support", lambda name: found.support)
    monkeypatch.setattr(_select, "_load", lambda name: cuda_backend.load())
    monkeypatch.setattr(_select, "_implements", lambda name, op: True)
    entry = ck.backends.BACKENDS["cuda"]
    monkeypatch.setitem(ck.backends.BACKENDS, "cuda", entry._replace(devices=("cuda",)))  # simulated or not
    cuda_backend.load.cache_clear()
    _select.reset()
    yield found
    cuda_backend.load.cache_clear()


@pytest.mark.parametrize(
    ("support", "reason"),
    [
        ((13000, 13000, None), None),
        ((13010, 13000, None), None),
        ((12040, 12080, None), None),  # any driver of the same major version
        (
            (12040, 13000, "CUDA driver version is insufficient for CUDA runtime version"),
            "its library was built with CUDA 13.0: expected an NVIDIA driver for CUDA 13.0 (580 or newer), got one for "
            "CUDA 12.4; update the driver, or build with nvcc 12.x",
        ),
        (
            (11080, 12090, "insufficient"),
            "driver for CUDA 12.0 (525.60 or newer), got one for CUDA 11.8; update the driver",
        ),
        (
            (13000, 14020, "insufficient"),
            "built with CUDA 14.2: expected an NVIDIA driver for CUDA 14.0, got one for CUDA",
        ),
        ((13000, 13000, "no kernel image is available"), "does not run on this GPU: no kernel image is available"),
    ],
)
def test_a_driver_or_a_gpu_that_cannot_run_the_library(fresh_gpu, support, reason):
    """Said before the first launch, once, by why_not and by the error alike."""
    fresh_gpu.support = support
    reasons = ck.why_not("cuda", device="cuda")
    assert fresh_gpu.asked == [1] and ck.why_not("cuda", device="cuda") == reasons and fresh_gpu.asked == [1]
    if reason is None:
        assert reasons == []
        return
    assert len(reasons) == 1 and reason in reasons[0]
    with pytest.raises(RuntimeError, match=f"backend 'cuda': {re.escape(reasons[0])}"):
        _select.choose("cuda", "lightweight_conv1d", "cuda", torch.float32)


def test_an_old_gpu_is_not_asked(fresh_gpu):
    fresh_gpu.capability = (7, 5)
    assert ck.why_not("cuda", device="cuda") == ["this GPU's compute capability is 7.5, expected 8.0 or newer"]
    assert fresh_gpu.asked == []


def test_the_simulated_library_answers_too():
    if cuda_backend.load_library("simt"):
        pytest.skip("the simulated library was not built")
    assert cuda_backend.support("simt") == (0, 0, None) and cuda_backend.reason_of(0, 0, None) is None
