"""What compiled kernels cost, read from their machine code, and the rules they have to keep."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class LoopCost:
    """Instructions of a thread in a main loop, all and by class, per output of the thread or per tile of its warp; 0
    where `fault` says why they could not be counted."""

    kernel: str
    variant: str
    case: str
    per: str
    instructions: float
    classes: dict[str, float]
    fault: str = ""


@dataclass(frozen=True)
class Resources:
    """What one kernel takes. spills: bytes of stack per thread. wide and narrow: loads and stores of global memory of
    16 bytes per thread or more, and of fewer. matrix: matrix instructions. unit: the matrix unit they are for, by the
    name of its instruction in PTX, where that is known. loops: its main loops, those that are described."""

    variant: str
    kernel: str
    architecture: str
    registers: int
    spills: int
    shared: int
    wide_loads: int
    narrow_loads: int
    wide_stores: int
    narrow_stores: int
    matrix: int
    unit: str = ""
    loops: tuple[LoopCost, ...] = ()

    @property
    def key(self) -> str:
        return f"{self.variant} / {self.kernel} / sm_{self.architecture}"

    def counts(self) -> dict[str, float]:
        """Instructions of the main loops that could be counted, as a budget has them."""
        return {loop.case: round(loop.instructions, 2) for loop in self.loops if not loop.fault}


def tools() -> Path | None:
    """The folder of cuobjdump and nvdisasm: a CUDA toolkit's, or that of the Triton package; None without either."""
    homes = [f"{os.environ[name]}/bin" for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    spec = importlib.util.find_spec("triton")
    packaged = [str(Path(spec.origin).parent / "backends" / "nvidia" / "bin")] if spec and spec.origin else []
    found = shutil.which("cuobjdump", path=os.pathsep.join([*homes, os.environ.get("PATH", ""), *packaged]))
    return Path(found).parent if found else None


def run_tool(name: str, *arguments: str | Path) -> str:
    """The output of one of these tools; they find each other on PATH."""
    folder = tools()
    if folder is None:
        raise FileNotFoundError(f"{name} is neither in a CUDA toolkit nor in an installed Triton")
    path = os.pathsep.join([str(folder), os.environ.get("PATH", "")])
    command, environment = [folder / name, *arguments], {**os.environ, "PATH": path}
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout


def read_usage(usage: str) -> dict[str, int]:
    """The figures of one kernel in the words of `cuobjdump --dump-resource-usage`."""
    registers, stack, local, shared = (
        int(re.search(rf"\b{name}:(\d+)", usage).group(1)) for name in ("REG", "STACK", "LOCAL", "SHARED")
    )  # fmt: skip
    return {"registers": registers, "spills": stack + local, "shared": shared}


def read_code(code: str) -> dict[str, int]:
    """The instructions of one kernel that matter here, counted."""
    # Asynchronous copies to shared memory (LDGSTS) are loads as well; they name their width in the same way.
    loads, stores = (re.findall(rf"{name}\b((?:\.\w+)*)", code) for name in ("LDG(?:STS)?", "STG"))
    wide_loads, wide_stores = (sum(".128" in a or ".256" in a for a in accesses) for accesses in (loads, stores))
    return {
        "wide_loads": wide_loads,
        "narrow_loads": len(loads) - wide_loads,
        "wide_stores": wide_stores,
        "narrow_stores": len(stores) - wide_stores,
        # By its end, since a pattern that begins with a literal is found many times faster.
        "matrix": sum(code[found.start() - 1].isalnum() for found in re.finditer(r"MMA\b", code)),
    }


# Instructions of a main loop may grow by this much: the compiler orders them anew after any change.
GROWTH = 1.01


def _grown(loops: tuple[LoopCost, ...], limits: dict[str, float]) -> list[str]:
    """Loops that have more instructions than these limits, or none to compare."""
    found = []
    for loop in loops:
        allowed = limits.get(loop.case)
        if loop.fault:
            found.append(f"{loop.case}: {loop.fault}")
        elif allowed is None:
            found.append(f"{loop.case}: instructions are not in the budget")
        elif loop.instructions > allowed * GROWTH:
            found.append(f"{loop.case}: {loop.instructions:.2f} instructions per {loop.per}, the budget has {allowed}")
    return found


@dataclass(frozen=True)
class Rules:
    """What the kernels of a backend keep to. Budgets are those of one compiler version and hold for no other."""

    budget: Path
    compiler: str
    version: str
    streaming: tuple[str, ...] = ()
    """Kernels that move whole tensors, 16 bytes at a time."""
    banded: tuple[str, ...] = ()
    """Kernels that multiply on matrix units."""
    multiplying: tuple[str, ...] = ()
    """Kernels that multiply on the newest matrix unit of their architecture, one of ``units``."""
    units: dict[str, str] = field(default_factory=dict)
    spilling: tuple[str, ...] = ()
    """Kernels that may keep as many bytes on the stack as the budget says; the others none."""

    def limits(self) -> dict[str, dict[str, int]]:
        """The committed budget by key; empty for another version of the compiler."""
        budget = json.loads(self.budget.read_text())
        return budget["limits"] if budget[self.compiler] == self.version else {}

    def violations(self, results: list[Resources]) -> list[str]:
        """What breaks a rule or takes more registers or shared memory than the committed budget allows. Another
        version of the compiler may keep some bytes on the stack."""
        limits, found = self.limits(), []
        for result in results:
            budgeted = result.kernel in self.spilling
            if limits and result.spills and not budgeted:
                found.append(f"{result.key}: {result.spills} bytes of stack, expected none")
            if result.kernel in self.streaming and not (result.wide_loads and result.wide_stores):
                found.append(f"{result.key}: no 16-byte loads and stores")
            if result.kernel in self.banded and not result.matrix:
                found.append(f"{result.key}: no matrix instructions")
            if result.kernel in self.multiplying and result.unit != self.units[result.architecture]:
                found.append(f"{result.key}: multiplies by {result.unit or 'nothing'}, not on its matrix unit")
            if limits:
                allowed = limits.get(result.key)
                if allowed is None:
                    found.append(f"{result.key}: not in the budget")
                else:
                    found += [
                        f"{result.key}: {name} {getattr(result, name)}, the budget has {allowed[name]}"
                        for name in ("registers", "shared", *(("spills",) if budgeted else ()))
                        if getattr(result, name) > allowed[name]
                    ]
                    found += [f"{result.key}, {text}" for text in _grown(result.loops, allowed.get("instructions", {}))]
        return found

    def to_budget(self, results: list[Resources]) -> str:
        """The text of the budget file that these results just meet."""
        limits = {
            result.key: {"registers": result.registers, "shared": result.shared}
            | ({"spills": result.spills} if result.kernel in self.spilling else {})
            | ({"instructions": counts} if (counts := result.counts()) else {})
            for result in results
        }
        return json.dumps({self.compiler: self.version, "limits": limits}, indent=1) + "\n"

    def to_json(self, results: list[Resources]) -> str:
        """All figures, as benchmarks/report.py reads them."""
        content = {"compiler": f"{self.compiler} {self.version}", "kernels": [asdict(result) for result in results]}
        return json.dumps(content, indent=1) + "\n"
