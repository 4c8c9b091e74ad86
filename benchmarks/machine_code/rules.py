"""What compiled kernels cost, read from their machine code, and the rules they have to keep."""

import importlib.util
import os
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.machine_code.budgets import FIGURES, format_limits, parse_limits


@dataclass(frozen=True)
class LoopCost:
    """Instructions of a thread in a main loop, all and by class, per output of the thread or per tile of its warp; 0
    where `fault` says why they could not be counted. body: those of the whole loop, needed or not."""

    kernel: str
    variant: str
    case: str
    per: str
    instructions: float
    classes: dict[str, float]
    fault: str = ""
    body: int = 0


@dataclass(frozen=True)
class Resources:
    """What one kernel takes. spills: bytes of stack per thread. wide and narrow: loads and stores of global memory of
    16 bytes per thread or more, and of fewer; vector: those of 8 or more. matrix: matrix instructions. unit: the matrix
    unit they are for, by the name of its instruction in PTX, where that is known. loops: its main loops, those that are
    described."""

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
    vector_loads: int = 0
    vector_stores: int = 0

    @property
    def key(self) -> str:
        return f"{self.variant} / {self.kernel} / sm_{self.architecture}"

    def counts(self) -> dict[str, dict[str, float]]:
        """Instructions of the main loops that could be counted, of a pass and of the body, as a budget has them."""
        loops = [loop for loop in self.loops if not loop.fault]
        passes = {loop.case: round(loop.instructions, 2) for loop in loops}
        return {"instructions": passes, "bodies": {loop.case: loop.body for loop in loops}} if loops else {}


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


def short_name(demangled: str) -> tuple[str, str] | None:
    """(function, template arguments), both without namespaces and types of numbers; None for what is no function."""
    found = re.match(r"(?:void )?(?:\w+::)*(\w+)(?:<(.*?)>)?\(", demangled)
    return found and (found[1], re.sub(r"\b(?:\w+::)+|\([\w:]+\)(?=\d)", "", found[2] or ""))


def read_usage(usage: str) -> dict[str, int]:
    """The figures of one kernel in the words of `cuobjdump --dump-resource-usage`."""
    registers, stack, local, shared = (
        int(re.search(rf"\b{name}:(\d+)", usage).group(1)) for name in ("REG", "STACK", "LOCAL", "SHARED")
    )  # fmt: skip
    return {"registers": registers, "spills": stack + local, "shared": shared}


def read_code(code: str) -> dict[str, int]:
    """The instructions of one kernel that matter here, counted."""
    # Asynchronous copies to shared memory (LDGSTS) are loads as well; they name their width in the same way. Bulk
    # copies, those of boxes too, are of 16 bytes and more.
    loads, stores = (re.findall(rf"{name}\b((?:\.\w+)*)", code) for name in ("LDG(?:STS)?", "STG"))
    wide_loads, wide_stores = (sum(".128" in a or ".256" in a for a in accesses) for accesses in (loads, stores))
    pairs = [sum(".64" in a for a in accesses) for accesses in (loads, stores)]
    return {
        "vector_loads": wide_loads + pairs[0],
        "vector_stores": wide_stores + pairs[1],
        "wide_loads": wide_loads + code.count("UBLKCP.S.G") + code.count("UTMALDG"),
        "narrow_loads": len(loads) - wide_loads,
        "wide_stores": wide_stores,
        "narrow_stores": len(stores) - wide_stores,
        # By its end, since a pattern that begins with a literal is found many times faster.
        "matrix": sum(code[found.start() - 1].isalnum() for found in re.finditer(r"MMA\b", code)),
    }


# Instructions of a main loop may grow by this much: the compiler orders them anew after any change.
GROWTH = 1.01
# Their bodies by more: what a pass leaves out, edges and masks, is often there twice or merged, as branches fall.
BODY_GROWTH = 1.03


def _grown(loops: tuple[LoopCost, ...], limits: dict[str, dict]) -> list[str]:
    """Loops that have more instructions than these limits, or none to compare."""
    found = []
    for loop in loops:
        allowed, body = (limits.get(name, {}).get(loop.case) for name in ("instructions", "bodies"))
        if loop.fault:
            found.append(f"{loop.case}: {loop.fault}")
        elif allowed is None or body is None:
            found.append(f"{loop.case}: instructions are not in the budget")
        else:
            if loop.instructions > allowed * GROWTH:
                per = f"instructions per {loop.per}"
                found.append(f"{loop.case}: {loop.instructions:.2f} {per}, the budget has {allowed}")
            if loop.body > body * BODY_GROWTH:
                found.append(f"{loop.case}: {loop.body} instructions in the loop's body, the budget has {body}")
    return found


def raised(before: dict, after: dict, name: str = "") -> list[str]:
    """What goes up from one budget to the next, and what is new there, by the keys that lead to it."""
    found = []
    for key, value in after.items():
        here, old = f"{name}, {key}" if name else key, before.get(key)
        if old is None:
            found.append(f"{here}: new")
        elif isinstance(value, dict):
            found += raised(old, value, here)
        elif value > old:
            found.append(f"{here}: from {old} to {value}")
    return found


@dataclass(frozen=True)
class Rules:
    """What the kernels of a backend keep to. Budgets are those of one compiler version and hold for no other."""

    budget: Path
    compiler: str
    version: str
    streaming: tuple[str, ...] = ()
    """Kernels that move whole tensors, 16 bytes at a time."""
    vectors: tuple[str, ...] = ()
    """Kernels that move whole tensors, 8 bytes at a time or more."""
    scattered: frozenset[tuple[str, str]] = frozenset()
    """(kernel, variant) of those of either kind that cannot."""
    banded: tuple[str, ...] = ()
    """Kernels that multiply on matrix units."""
    multiplying: tuple[str, ...] = ()
    """Kernels that multiply on the newest matrix unit of their architecture, one of ``units``."""
    units: dict[str, str] = field(default_factory=dict)
    described: frozenset[tuple[str, str]] = frozenset()
    """(kernel, variant) of those whose main loops are described, which have to be there."""

    def _budget(self) -> tuple[str, dict[str, dict]]:
        return parse_limits(self.budget.read_text())

    def limits(self) -> dict[str, dict]:
        """The committed budget by key; empty for another version of the compiler."""
        version, limits = self._budget()
        return limits if version == self.version else {}

    def not_compared(self) -> str | None:
        """That the budget is of another version of the compiler; None if it is of this one."""
        of, _ = self._budget()
        if of == self.version:
            return None
        return (
            f"registers, stack, shared memory and instructions were not compared: {self.budget.name} is of "
            f"{self.compiler} {of}, these kernels of {self.compiler} {self.version}; the other rules were checked"
        )

    def violations(self, results: list[Resources], everything: bool = False) -> list[str]:
        """What breaks a rule or takes more registers or shared memory than the committed budget allows. Another
        version of the compiler may keep some bytes on the stack. everything: the results are of all kernels."""
        limits, found = self.limits(), []
        if everything:
            absent = self.described - {(result.kernel, result.variant) for result in results}
            found += [f"{v} / {k}: its main loop is described, but no kernel is this one" for k, v in sorted(absent)]
        for result in results:
            if limits and result.spills:
                found.append(f"{result.key}: {result.spills} bytes of stack, expected none")
            if (result.kernel, result.variant) not in self.scattered:
                if result.kernel in self.streaming and not (result.wide_loads and result.wide_stores):
                    found.append(f"{result.key}: no 16-byte loads and stores")
                if result.kernel in self.vectors and not (result.vector_loads and result.vector_stores):
                    found.append(f"{result.key}: no 8-byte loads and stores")
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
                        for name in FIGURES
                        if getattr(result, name) > allowed[name]
                    ]
                    found += [f"{result.key}, {text}" for text in _grown(result.loops, allowed)]
        return found

    def update(self, results: list[Resources]) -> list[str]:
        """Write the budget that these results just meet; returns what it raises."""
        (_, before), text = self._budget(), self.to_budget(results)
        self.budget.write_text(text)
        return raised(before, parse_limits(text)[1])

    def to_budget(self, results: list[Resources]) -> str:
        """The text of the budget file that these results just meet."""
        limits = {result.key: {name: getattr(result, name) for name in FIGURES} | result.counts() for result in results}
        return format_limits(self.compiler, self.version, limits)
