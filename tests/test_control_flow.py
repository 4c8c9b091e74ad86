"""Paths through machine code: blocks, loops, and what one pass of a loop executes."""

import re

import pytest

from benchmarks.machine_code.control_flow import ControlFlow, Work
from benchmarks.machine_code.instructions import COUNTED, Unreadable, classes_of, instructions_of

COPY, STORE = "LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64]", "STG.E.128 desc[UR4][R2.64], R4"
MULTIPLY, ADD, READ = "FFMA R4, R5, R6, R4", "IADD3 R1, R1, 0x10, RZ", "LDS R5, [R1]"


def assemble(text: str) -> str:
    """A listing like that of cuobjdump; `name:` is a label, `3 INSTRUCTION` stands for three of them."""
    labels, lines = {}, []
    for line in filter(None, map(str.strip, text.splitlines())):
        if line.endswith(":"):
            labels[line[:-1]] = 16 * len(lines)
        else:
            times, instruction = re.fullmatch(r"(?:(\d+) )?(.*)", line).groups()
            lines += [instruction] * int(times or 1)
    for name, address in labels.items():
        lines = [re.sub(rf"\b{name}$", hex(address), line) for line in lines]
    return "".join(
        f"        /*{16 * n:04x}*/                   {line} ;      /* 0x000fe20000000800 */\n"
        f"                                           /* 0x000fe20000000800 */\n"
        for n, line in enumerate(lines)
    )


def flow(text: str) -> ControlFlow:
    return ControlFlow(assemble(text))


def heads(found: ControlFlow) -> list[str]:
    return [hex(found.blocks[head].instructions[0].address) for head in sorted(found.loops)]


def test_instructions_are_read():
    branch, call, store = instructions_of(
        assemble(f"""
        there:
        @!P0 BRA there
        CALL.REL.NOINC there
        @P3 {STORE}
        """)
    )
    assert (branch.base, branch.target, branch.conditional) == ("BRA", 0, True)
    assert (call.name, call.target, call.conditional) == ("CALL.REL.NOINC", 0, False)
    assert (store.name, store.base, store.target) == ("STG.E.128", "STG", None)
    for text in ("BRA P5, there", "BRA.DIV UR4, there"):
        assert instructions_of(assemble(f"there:\n{text}"))[0].conditional
    with pytest.raises(Unreadable, match="expected an address"):
        instructions_of(assemble("BRA somewhere"))
    with pytest.raises(Unreadable, match="no instructions"):
        ControlFlow("")
    with pytest.raises(Unreadable, match="where no instruction begins"):
        flow("BRA 0x8000")


def test_classes_of_instructions():
    (block,) = flow(
        f"""
        {COPY}
        LDGDEPBAR
        LDG.E.U16 R0, desc[UR4][R2.64]
        LDSM.16.M88.4 R8, [R1]
        SHFL.BFLY PT, R1, R2, 0x1, 0x1f
        {ADD}
        PRMT R1, R2, 0x7610, R1
        IMAD.MOV.U32 R1, RZ, RZ, R2
        {MULTIPLY}
        MUFU.EX2 R1, R1
        HMMA.16816.F32.BF16 R4, R8, R12, R4
        F2FP.BF16.F32.PACK_AB R1, R2, R3
        BAR.SYNC.DEFER_BLOCKING 0x0
        ULDC.64 UR4, c[0x0][0x208]
        EXIT
        """
    ).blocks
    assert block.classes == {
        "copies": 2, "global": 1, "shared": 2, "alu": 2, "imad": 1, "float": 1, "special": 1, "matrix": 1,
        "conversions": 1, "control": 2, "other": 1,
    }  # fmt: skip
    assert set(block.classes) == set(COUNTED)


NESTED = f"""
    2 {ADD}
    outer:
    {COPY}
    @P0 BRA masked
    back:
    ULDC UR4, c[0x0][0x208]
    inner:
    {READ}
    4 {MULTIPLY}
    @P1 BRA inner
    @P2 BRA skip
    3 {ADD}
    skip:
    {STORE}
    @P3 BRA outer
    EXIT
    masked:
    LDG.E.U8 R0, desc[UR4][R2.64]
    BRA back
    alone:
    BRA alone
"""


def test_loops_are_found():
    found = flow(NESTED)
    assert heads(found) == ["0x20", "0x50"]  # what cannot be reached is none
    outer, inner = (found.loops[head] for head in sorted(found.loops))
    assert inner < outer and len(inner) == 1
    entry, last = 0, max(outer)
    assert all(found.dominates(entry, block) for block in outer)
    assert found.dominates(min(outer), last) and not found.dominates(last, min(outer))


def test_a_pass_is_the_shortest_that_does_the_work():
    """Inner loops as often as it takes, nothing that is not needed, but an `if` without `else`."""
    found, rest = flow(NESTED), {"LDGSTS": 1, "STG.E.128": 1}
    once = found.cheapest_pass(Work({**rest, "FFMA": 4, "LDG": 0}))
    assert once.instructions == 2 + 1 + 6 + 1 + 3 + 2
    assert once.classes == {"copies": 1, "shared": 1, "float": 4, "alu": 3, "global": 1, "control": 4, "other": 1}
    thrice = found.cheapest_pass(Work({**rest, "FFMA": 12, "LDG": 0}))
    assert thrice.instructions == once.instructions + 2 * 6
    without = found.cheapest_pass(Work({**rest, "FFMA": 4, "LDG": 0, "IADD3": 0}))
    assert without.instructions == once.instructions - 3
    for masked in ({}, {"LDG.E.U8": 1}):
        assert found.cheapest_pass(Work({**rest, "FFMA": 4, **masked})).instructions == once.instructions + 2
    assert found.cheapest_pass(Work({"FFMA": 4})).path == (max(found.loops),)


@pytest.mark.parametrize(("length", "executed"), [(3, True), (30, True), (60, False)])
def test_nested_conditions_are_met(length, executed):
    """`if (a && b)` as well, if it is short; what else leads into it is no `if`."""
    text = f"""
        again:
        {COPY}
        @P0 BRA end
        {READ}
        @P1 BRA end
        {length} {ADD}
        end:
        @P2 BRA again
        EXIT
    """
    assert flow(text).cheapest_pass(Work({"LDGSTS": 1})).instructions == 3 + (2 + length if executed else 0)
    other = text.replace(COPY, f"{COPY}\n@P3 BRA inside").replace(READ, f"inside:\n{READ}")
    assert flow(other).cheapest_pass(Work({"LDGSTS": 1})).instructions == 4


def test_the_body_has_what_a_pass_leaves_out():
    """Branches that are not taken, and inner loops once; not what surrounds the loop, nor subroutines."""
    found = flow(NESTED)
    for work, length in ((Work({"LDGSTS": 1, "FFMA": 4, "LDG": 0}), 17), (Work({"FFMA": 4}), 6)):
        assert found.body_length(found.cheapest_pass(work)) == length
    long = flow(NESTED.replace(f"3 {ADD}", f"2000 {ADD}"))
    one = long.cheapest_pass(Work({"LDGSTS": 1, "FFMA": 4, "LDG": 0}))
    assert (one.instructions, long.body_length(one)) == (12, 17 + 1997)


def test_passes_of_inner_loops_are_counted():
    found, inner = flow(NESTED), Work({"FFMA": 4})
    work = {"LDGSTS": 1, "FFMA": 0, "STG.E.128": 1, "LDG": 0}
    for times, expected in ((3, 9 + 6 * 3), (0.5, 9 + 6 / 2)):
        assert found.cheapest_pass(Work(work, ((times, inner),))).instructions == expected
    assert found.cheapest_pass(Work(work, ((1, inner), (2, inner)))).instructions == 9 + 6 * 3


@pytest.mark.parametrize(
    "work",
    [Work({"LDGSTS": 2, "FFMA": 4}), Work({"LDGSTS": 1, "FFMA": 6}), Work({"HMMA": 1}), Work({"STG.E.64": 1}),
     Work({"LDGSTS": 1}, ((1, Work({"HMMA": 1})),))],
    ids=str,
)  # fmt: skip
def test_another_number_is_an_error(work):
    with pytest.raises(Unreadable, match="no pass of a loop does exactly this"):
        flow(NESTED).cheapest_pass(work)


def test_subroutines_are_counted_where_they_are_called():
    found = flow(f"""
        again:
        {COPY}
        CALL.REL.NOINC divide
        {STORE}
        @P0 BRA again
        @!P1 CALL.REL.NOINC far
        EXIT
        divide:
        5 {ADD}
        RET.REL.NODEC R4 0x0
        far:
        {READ}
        BRA again
    """)
    assert found.cheapest_pass(Work({"LDGSTS": 1, "STG.E.128": 1, "LDS": 0})).instructions == 4 + 6
    # A call of what does not return is a jump.
    assert found.cheapest_pass(Work({"LDGSTS": 1, "STG.E.128": 1, "LDS": 1})).instructions == 4 + 6 + 1 + 2


def test_warps_that_come_apart_are_not_followed():
    found = flow(f"""
        again:
        {COPY}
        BRA.DIV UR4, apart
        SHFL.BFLY PT, R1, R2, 0x1, 0x1f
        back:
        @P0 BRA again
        EXIT
        apart:
        BRA back
    """)
    (only,) = found.loops.values()
    assert len(only) == 3
    assert found.cheapest_pass(Work({"LDGSTS": 1})).instructions == 4


def test_a_whole_kernel_is_its_longest_way_past_all_products():
    """What masks may skip counts; what is there for numbers that are not finite does not; loops as often as asked."""
    found = flow(
        f"""
        @P0 BRA outside
        3 {READ}
        outside:
        tiles:
        2 HMMA.16816.F32.BF16 R4, R8, R12, R4
        @P1 BRA finite
        slow:
        9 {MULTIPLY}
        @P2 BRA slow
        finite:
        {STORE}
        @P3 BRA tiles
        EXIT
        """
    )
    names = found.whole(lambda inside: 5 if inside["HMMA.16816.F32.BF16"] else 0)
    assert names["LDS"] == 3 and names["HMMA.16816.F32.BF16"] == 10 and names["STG.E.128"] == 5
    assert not names["FFMA"] and classes_of(names)["matrix"] == 10 and names["BRA"] == 1 + 5 * 2
    without = flow(f"@P0 BRA end\n{READ}\n{STORE}\nend:\nEXIT").whole(lambda inside: 1)
    assert without == {"BRA": 1, "LDS": 1, "STG.E.128": 1, "EXIT": 1}
    with pytest.raises(Unreadable, match="no way through the kernel meets all its STG"):
        flow(f"@P0 BRA other\n{STORE}\nEXIT\nother:\n{STORE}\nEXIT").whole(lambda inside: 1)
