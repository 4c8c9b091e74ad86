"""What a measurement ran on: recorded with every result, printed by `convkernels info`."""

from __future__ import annotations

import datetime
import importlib
import os
import platform
import re
from pathlib import Path
from typing import Any

import torch

import convkernels
from convkernels import backends
from convkernels.ops import _select
from convkernels.ops._dtypes import dtype_name

from .console import Mistake

VARIABLES = {
    "CONVKERNELS_BACKEND": "what backend='auto' means",
    "CONVKERNELS_STRICT": "1: an error instead of a warning when only the slow reference is left",
    "CONVKERNELS_CPU_ISA": "portable, avx2 or avx512: no newer CPU instructions; amx: AMX too; amx-emulated: for tests",
    "CONVKERNELS_BUILD": "at build time: auto, cpu, cuda or none (pure Python)",
    "CONVKERNELS_POISON": "1: the CPU kernels fill memory with NaN when they allocate it, for tests",
    "TRITON_INTERPRET": "1: the triton backend runs on CPU tensors, in Triton's interpreter, for tests",
    "CONVKERNELS_SIMT": "1: the cuda backend runs on CPU tensors, for tests",
    "CONVKERNELS_SIMT_SEED": "order in which it runs the threads of a block",
    "CONVKERNELS_SIMT_SHARED": "bytes of shared memory of a block there",
    "CONVKERNELS_SIMT_ARCH": "which GPU it simulates: 80, or 90 and more, where some kernels copy in another way",
    "CONVKERNELS_SIMT_PROCESSORS": "how many multiprocessors that GPU has",
    "CONVKERNELS_SIMT_COUNTED": "1: it can count what launches move, slowly",
    "CONVKERNELS_GOLDEN": "folder with the recorded results that the tests compare with",
}


def native_module() -> Any | None:
    """The compiled information module, or None in a pure-Python installation."""
    try:
        return importlib.import_module("convkernels._C")
    except ImportError:
        return None


def active_isa() -> str:
    """The instruction set of the C++ kernels; "unknown" where only the information module is missing."""
    native = native_module()
    if native:
        return native.active_isa()
    return "no native kernels" if convkernels.why_not("cpu") else "unknown"


def usable_isas(native) -> list[str]:
    """The instruction sets that this machine has kernels for and can run."""
    return [name for name in native.compiled_isas() if native.isa_supported(name)]


def isa_chosen() -> str:
    """How the instruction set of the C++ kernels was chosen."""
    return "by CONVKERNELS_CPU_ISA" if os.environ.get("CONVKERNELS_CPU_ISA") else "automatically"


def with_checkout(**variables: str) -> dict[str, str]:
    """Environment variables of a Python process that is to import the modules beside this package before others."""
    folder = str(Path(convkernels.__file__).resolve().parents[1])
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([folder, *filter(None, [os.environ.get("PYTHONPATH")])]),
        **variables,
    }


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo") as info:
            names = re.findall(r"^model name\s*:\s*(.+)$", info.read(), re.MULTILINE)
        return names[0] if names else platform.machine()
    except OSError:
        return platform.processor() or platform.machine()


def describe(device: torch.device) -> dict[str, Any]:
    """Device, versions, threads and instruction set, as written into every results file."""
    return {
        "device": device_name(device),
        "device_type": device.type,
        "isa": active_isa() if device.type == "cpu" else None,
        "chosen": isa_chosen() if device.type == "cpu" else None,
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "convkernels": convkernels.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "date": datetime.date.today().isoformat(),
    }


def title(environment: dict[str, Any]) -> str:
    """One line for tables and plots."""
    if environment["device_type"] != "cpu":
        return f"{environment['device']}, torch {environment['torch']}"
    isa, threads = environment["isa"], environment["threads"]
    plural = "thread" if threads == 1 else "threads"
    busy = f", {environment['busy_cpus']:.1f} CPUs busy with other work" if environment.get("busy_cpus") else ""
    torch_isa = f" on {environment['torch_isa']}" if _torch_is_wider(environment) else ""
    return f"{environment['device']} ({isa}, {threads} {plural}), torch {environment['torch']}{torch_isa}{busy}"


def _torch_is_wider(environment: dict[str, Any]) -> bool:
    """Whether torch uses wider vectors than these kernels: CONVKERNELS_CPU_ISA keeps those of the machine from them.
    Some logs do not say what torch uses."""
    torch_isa = environment.get("torch_isa", "")
    return environment["isa"] in ("portable", "avx2", "amx-emulated") and torch_isa.startswith("AVX512")


def file_stem(environment: dict[str, Any]) -> str:
    """A file name for results of this device: one file per device, instruction set and number of threads."""
    parts = [environment["device"]]
    if environment["device_type"] == "cpu":
        torch_isa = [f"torch {environment['torch_isa']}"] if _torch_is_wider(environment) else []
        parts += [environment["isa"], *torch_isa, f"{environment['threads']}threads"]
    return re.sub(r"[^a-z0-9]+", "-", " ".join(parts).lower()).strip("-")


def usable_backends(device: torch.device, dtype: torch.dtype = torch.float32) -> dict[str, list[str]]:
    """Backend name -> reasons why it cannot run there (none: it can)."""
    return {name: convkernels.why_not(name, device=device, dtype=dtype) for name in backends.names()}


def automatic(device: torch.device) -> list[tuple[str, str, str, str, str]]:
    """(device type, dtype, op, backend, reason) of what backend='auto' takes, without CONVKERNELS_BACKEND."""
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for op in ("depthwise_conv1d", "lightweight_conv1d", "dynamic_conv1d", "attention", "attention_grad"):
            name, _ = _select.first_fast(op, device.type, dtype)
            fastest, source = _select.fastest(op, device.type, dtype)
            if name is None:
                reason = "no fast backend is usable"
            elif name == fastest:
                reason = f"the fastest, {source}"
            else:
                note = f"{fastest}, the fastest, {source}, is not" if fastest else source
                reason = f"the first usable one{f' ({note})' if note else ''}"
            rows.append((device.type, dtype_name(dtype), op, name or "reference", reason))
    return rows


def variables() -> list[tuple[str, str, str]]:
    """(name, value or a dash, meaning) of every environment variable of the package."""
    return [(name, os.environ.get(name, "-"), meaning) for name, meaning in VARIABLES.items()]


def check_variables() -> None:
    """Mistake for variables that every call of the package would stumble over."""
    native, known = native_module(), {"CONVKERNELS_BACKEND": (("auto", *backends.names()), "")}
    if native:
        known["CONVKERNELS_CPU_ISA"] = usable_isas(native), ", which this machine can run"
    for name, (values, why) in known.items():
        value = os.environ.get(name)
        if value and value not in values:
            raise Mistake(f"environment variable '{name}': expected one of {', '.join(values)}{why}, got {value!r}")
