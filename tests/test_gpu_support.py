"""What a GPU, its driver and its tools must be for the backends that run on it."""

import contextlib
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import convkernels as ck
from convkernels.backends import cuda as cuda_backend
from convkernels.backends import triton as triton_backend
from convkernels.ops import _select


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
def test_which_gpus_wait_for_the_drivers_compiler(capability, later):
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
    _select.reset()


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


def test_no_gpu_is_the_reason_against_the_backends_that_need_one(monkeypatch):
    """Also with a PyTorch that was built for them."""
    for name in ("TRITON_INTERPRET", "CONVKERNELS_SIMT", "CONVKERNELS_SIMT_COUNTED"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for backend in (triton_backend, cuda_backend):
        assert "PyTorch finds no" in backend.load.__wrapped__()
