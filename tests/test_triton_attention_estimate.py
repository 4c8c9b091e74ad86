"""What the estimate takes Triton's attention kernels to do, against sums that are simple to make by hand."""

import os
from collections import Counter
from math import prod

import pytest

from benchmarks.machine_code.instructions import instructions_of

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels are not compiled", allow_module_level=True)

from benchmarks.machine_code import triton_attention as attention
from benchmarks.machine_code import triton_estimate as estimate
from benchmarks.machine_code.estimate import PRODUCT

KERNELS = ("attention_forward", "grad_queries", "grad_keys")


def launches(name):
    passes = attention.CASES[name].passes(90)
    for kernel, grid, arguments in passes["fwd"] + passes["bwd"]:
        if kernel.__name__ in KERNELS:
            yield kernel, grid, arguments


@pytest.mark.parametrize("name", [name for name in attention.CASES if name != "banded"])
def test_every_pair_is_met_once(name):
    variant = attention.CASES[name]
    for kernel, _, arguments in launches(name):
        way = attention.walk(kernel.__name__, arguments)
        assert way.slots * way.own == variant.time
        assert way.near * arguments["TILE"].NEAR + way.far * way.others == variant.time
        assert (way.near > 0) == variant.bias
        multiplications = attention.needed(kernel.__name__, arguments) * PRODUCT
        assert multiplications == attention.PRODUCTS[kernel.__name__] * variant.channels * variant.time**2


def test_banded_tiles_are_those_on_one_side_of_the_diagonal():
    variant = attention.CASES["banded"]
    pairs = variant.time * (variant.time + 1) / 2
    for kernel, _, arguments in launches("banded"):
        way = attention.walk(kernel.__name__, arguments)
        near, far = (n * way.slots * way.own for n in (way.near * arguments["TILE"].NEAR, way.far * way.others))
        assert pairs < near + far < 1.02 * pairs
        beyond = (variant.time - 1024) * (variant.time - 1023) / 2  # pairs before the window
        assert 0.97 * beyond < far < beyond


@pytest.mark.parametrize("name", attention.CASES)
def test_bytes_are_those_of_the_tensors_at_least(name):
    variant = attention.CASES[name]
    rows = variant.batch * variant.time * variant.channels * 2
    own, met = variant.heads * rows, variant.shared * rows
    least = {"attention_forward": 2 * own + 2 * met, "grad_queries": 3 * own + 2 * met, "grad_keys": 2 * own + 4 * met}
    for kernel, _, arguments in launches(name):
        once, moved = attention.traffic(variant, kernel.__name__, arguments)
        assert least[kernel.__name__] < once < 1.3 * least[kernel.__name__]
        way = attention.walk(kernel.__name__, arguments)
        assert once <= moved < (way.slots + 1) * once * max(1, variant.heads // variant.shared)


def test_wavefronts_are_those_of_128_bytes():
    code = """
        /*0000*/ @!PT LDS RZ, [RZ] ;
        /*0010*/ LDS.128 R4, [R2] ;
        /*0020*/ STS.64 [R2], R4 ;
        /*0030*/ SHFL.BFLY PT, R4, R5, 0x1, 0x1f ;
        /*0040*/ LDSM.16.M88.4 R4, [R2] ;
        /*0050*/ LDGSTS.E.BYPASS.128 [R4], desc[UR4][R2.64], P5 ;
        /*0060*/ HGMMA.64x32x16.F32.BF16 R24, gdesc[UR4], RZ, !UPT, gsb0 ;
        /*0070*/ HGMMA.64x64x16.F32.BF16 R56, R24, gdesc[UR4].tnspB, R56, gsb0 ;
    """
    names = Counter(i.name for i in instructions_of(code))
    assert names["LDS.never"] == 1 and names["HGMMA.64x64x16.F32.BF16.left"] == 1
    assert estimate.wavefronts(names) == 4 + 2 + 1 + 4 + 4 + (4 + 2) + 4


@pytest.mark.slow
def test_loops_count_as_often_as_programs_pass_them():
    """The products in the machine code are those that are needed, and the few of the tables: no two warps of a program
    of 128 rows make the same."""
    name = "attention-d64-t512"
    variant = attention.CASES[name]
    for kernel, grid, arguments in launches(name):
        _, _, code = attention.compiled(kernel, arguments, 90)
        names = attention.executed(kernel.__name__, arguments, code)
        made = sum(estimate.products(names)) * prod(grid) * arguments["num_warps"]
        needed = variant.batch * variant.heads * attention.needed(kernel.__name__, arguments)
        assert needed < made < 1.15 * needed, kernel.__name__
        exponentials = Counter({n: c for n, c in names.items() if n.startswith("MUFU.EX2")}).total()
        pairs = variant.batch * variant.heads * variant.time**2
        assert pairs / 32 <= exponentials * prod(grid) * arguments["num_warps"] < 1.3 * pairs / 32


def test_only_cases_with_the_name():
    assert attention.rows("no such case") == []
