"""Instructions of a kernel's machine code, and what they take."""

import re
from collections import Counter
from dataclasses import dataclass

# Names of instructions without what follows the first dot, by what they take: memory and its pipes, the integer pipe
# (alu), the one for multiplications (imad and float), and so on. What is in none is "other".
CLASSES = {
    "global": "LDG STG LD ST RED ATOM ATOMG LDL STL",
    "shared": "LDS STS LDSM STSM ATOMS SHFL",
    "copies": "LDGSTS LDGDEPBAR DEPBAR ARRIVES SYNCS UBLKCP UBLKRED UTMALDG UTMASTG UTMACMDFLUSH",
    "alu": "IADD3 IADD LEA LOP3 LOP SHF SHL SHR ISETP SEL PRMT IMNMX IABS VIADD VIADDMNMX VIMNMX MOV BMSK SGXT PLOP3 "
    "P2R R2P FSETP FSEL FMNMX FMNMX3 FCHK VABSDIFF",
    "imad": "IMAD IDP",
    "float": "FFMA FMUL FADD FFMA2 FMUL2 FADD2 HFMA2 HADD2 HMUL2 HSETP2 HMNMX2 DADD DMUL DFMA DSETP",
    "special": "MUFU POPC FLO BREV",
    "matrix": "HMMA IMMA DMMA QMMA HGMMA WGMMA UTCHMMA",
    "conversions": "F2F F2FP I2F F2I I2FP F2IP I2I FRND",
    "control": "BRA BRX JMP JMX CALL RET EXIT BSSY BSYNC BREAK BMOV BAR WARPSYNC WARPGROUP NANOSLEEP YIELD NOP KILL "
    "MEMBAR ERRBAR ACQBULK",
}
# Added to names: of products of warpgroups whose left factor is not in shared memory, and of what no thread executes.
LEFT_IN_REGISTERS, NEVER = "left", "never"
MATRIX = ("HMMA", "HGMMA", "UTCHMMA")
CLASS_OF = {name: kind for kind, names in CLASSES.items() for name in names.split()}
COUNTED = (*CLASSES, "other")

_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?(\w[\w.]*)([^;]*);")
_TARGET = re.compile(r"\b0x([0-9a-f]+)\s*$")
_LEFT = re.compile(r"\s*R\d+,\s*R\d+,\s*gdesc")
_SECOND = re.compile(r"\bU?P\d\b")  # a branch may have a condition among its operands


def classes_of(names: Counter) -> Counter:
    """Counts of instructions by what they take, from those by name."""
    found: Counter = Counter()
    for base, count in by_base(names).items():
        found[CLASS_OF.get(base, "other")] += count
    return found


def by_base(names: Counter) -> Counter:
    """Counts of instructions by name without what follows the first dot."""
    found: Counter = Counter()
    for name, count in names.items():
        found[name.partition(".")[0]] += count
    return found


class Unreadable(ValueError):
    """Machine code that does not look as expected."""


@dataclass(frozen=True)
class Instruction:
    address: int
    name: str  # with all that follows its dots, LEFT_IN_REGISTERS and NEVER
    target: int | None  # of a jump
    conditional: bool

    @property
    def base(self) -> str:
        return self.name.partition(".")[0]


def instructions_of(code: str) -> list[Instruction]:
    """Those of one kernel as `cuobjdump -sass` writes them."""
    found = []
    for address, guard, name, operands in _INSTRUCTION.findall(code):
        jumps = name.startswith(("BRA", "CALL.REL", "BSSY", "JMP"))
        target = _TARGET.search(operands) if jumps else None
        if jumps and not target:
            raise Unreadable(f"{name}{operands}: expected an address")
        if name.startswith("HGMMA") and _LEFT.match(operands):
            name += f".{LEFT_IN_REGISTERS}"
        if guard == "!PT":
            name += f".{NEVER}"
        conditional = bool(guard and guard != "PT") or ".DIV" in name or bool(jumps and _SECOND.search(operands))
        found.append(Instruction(int(address, 16), name, int(target[1], 16) if target else None, conditional))
    return found
