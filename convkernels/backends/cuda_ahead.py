"""Reads what each kernel of the CUDA library costs, for all the architectures it was compiled for, without a GPU."""

import re
import subprocess
from pathlib import Path

from . import library, machine_code

LIBRARY = library.path_of("cuda")
# By kernel, without its template arguments: the families that were written to move memory, and to use matrix units.
ATTENTION = ("attention_forward", "attention_backward_queries", "attention_backward_keys")
BANDED = ("band_forward", "band_backward", *ATTENTION)
STREAMING = (*(f"{f}_{d}" for f in ("stream", "time", "rows") for d in ("forward", "backward")), *BANDED)
# The sums for two gradients of 128 channels do not all fit into registers; the forward pass, which may walk over the
# keys twice, keeps 16 bytes on sm_100. The budget holds each to what it has.
SPILLING = ("attention_backward_keys", "attention_forward")


def compiler_version() -> str:
    """The version of nvcc that compiled the library, as far as the information module says."""
    try:
        from convkernels._C import compilers
    except ImportError:
        return "unknown"
    return compilers.get("cuda", "unknown").split()[-1]


def missing() -> str | None:
    """Why the kernels cannot be read here; None if they can."""
    if machine_code.tools() is None:
        return "cuobjdump is neither in a CUDA toolkit nor in an installed Triton"
    return library.missing("cuda")


def rules() -> machine_code.Rules:
    budget = Path(__file__).parent / "cuda_budget.json"
    return machine_code.Rules(budget, "nvcc", compiler_version(), STREAMING, BANDED, spilling=SPILLING)


def _kernels(text: str, marker: str) -> dict[tuple[str, str], str]:
    """What cuobjdump says of each kernel, by (mangled name, architecture)."""
    found = {}
    for part in re.split(r"\n(?=Fatbin elf code:)", text):
        architecture = re.search(r"^arch = sm_(\w+)$", part, re.MULTILINE)
        for block in re.split(marker, part)[1:]:
            name, _, rest = block.partition("\n")
            found[name.strip(" :"), architecture.group(1)] = rest
    return found


def _short_name(mangled: str) -> tuple[str, str]:
    """(kernel, template arguments), both without namespaces."""
    demangled = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout.strip()
    kernel, arguments = re.fullmatch(r"(?:void )?([\w:]+)(?:<(.*)>)?\(.*\)", demangled).groups()
    return kernel.split("::")[-1], re.sub(r"\b(?:\w+::)+|\(\w+\)(?=\d)", "", arguments or "")


def measure_all(architectures: tuple[str, ...] = (), only: str | None = None) -> list[machine_code.Resources]:
    """Every kernel of the library; of these architectures if any are given, and with `only` in its key."""
    usage = _kernels(machine_code.run_tool("cuobjdump", "--dump-resource-usage", LIBRARY), r"\n Function ")
    compiled = sorted({architecture for _, architecture in usage}, key=lambda name: int(name.rstrip("af")))
    names = {mangled: _short_name(mangled) for mangled in {mangled for mangled, _ in usage}}

    def wanted(mangled: str, architecture: str) -> bool:
        kernel, variant = names[mangled]
        key = f"{variant} / {kernel} / sm_{architecture}"
        return (not architectures or architecture.rstrip("af") in architectures) and (not only or only in key)

    results = []
    for architecture in compiled:
        if not any(wanted(*one) for one in usage if one[1] == architecture):
            continue  # to disassemble takes by far the longest
        code = machine_code.run_tool("cuobjdump", "-sass", "-arch", f"sm_{architecture}", LIBRARY)
        for (mangled, _), instructions in _kernels(code, r"\n\t\tFunction ").items():
            if wanted(mangled, architecture):
                kernel, variant = names[mangled]
                figures = machine_code.read_usage(usage[mangled, architecture]) | machine_code.read_code(instructions)
                results.append(machine_code.Resources(variant, kernel, architecture, **figures))
    return sorted(results, key=lambda r: (r.kernel, r.variant))
