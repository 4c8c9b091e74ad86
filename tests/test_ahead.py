"""Kernels for GPUs, compiled without one, keep to their rules and to the committed budget."""

import dataclasses
import os
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.machine_code import __main__ as command_line
from benchmarks.machine_code import budgets, nvcc
from benchmarks.machine_code.rules import LoopCost, Resources, Rules, read_code, read_usage, short_name
from convkernels.backends import triton as triton_backend
from convkernels.ops.attention.schema import INPUTS, Attention

ROOT = Path(__file__).resolve().parents[1]


def triton_ahead():
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("interpreted kernels are not compiled")
    from benchmarks.machine_code import triton as ahead

    return ahead


def variants(name="VARIANTS"):
    try:
        from benchmarks.machine_code import triton as ahead
    except ImportError:
        return []
    return getattr(ahead, name)


@pytest.mark.slow
@pytest.mark.thin(3)
@pytest.mark.parametrize("variant", variants(), ids=lambda v: v.name)
def test_triton_budget(variant):
    """One architecture on every run; `python -m benchmarks.machine_code` compiles for all of them."""
    ahead = triton_ahead()
    results = ahead.measure_all(variant, (90,))
    assert not ahead.RULES.violations(results)
    kernels = {result.kernel for result in results}
    assert kernels & {"conv_tile", "conv_band"}
    assert kernels & {"grad_tile", "grad_band", "grad_heads", "grad_window"}
    for result in results:
        assert (result.matrix > 0) == result.kernel.endswith("_band"), result


@pytest.mark.slow
@pytest.mark.thin(3)
@pytest.mark.parametrize("variant", variants("ATTENTION_VARIANTS"), ids=lambda v: v.name)
def test_triton_budget_of_attention(variant):
    """On the matrix unit of the architecture, without spilling; the older ones for the kernels that do the work."""
    ahead = triton_ahead()
    results = ahead.measure_all(variant, (90,))
    for kernel, arguments in variant.launches(80):
        if kernel.__name__ == "attention_forward":
            results.append(ahead.measure(variant.name, kernel, arguments, 80))
    assert not ahead.RULES.violations(results)
    units = {(result.kernel, result.architecture): result.unit for result in results}
    assert units["attention_forward", "80"] == "mma.sync"
    for kernel in ("attention_forward", "grad_queries", "grad_keys"):
        assert units[kernel, "90"] == "wgmma.mma_async"


@pytest.mark.slow
@pytest.mark.parametrize("window", [(8, 8), (70, 8)], ids=str)
def test_all_terms_of_attention_at_once(window):
    """Compiled types are stricter than interpreted ones: tiles that are not square tell the terms' sides apart."""
    ahead = triton_ahead()
    left, right = window
    variant = ahead.AttentionVariant(
        "everything", left=left, right=right, dropout=0.1, bias=True, query_rel=True, rank=24, key_rel=True,
        value_conv=True, mask=True, packed=True,
    )  # fmt: skip
    units = {result.kernel: result.unit for result in ahead.measure_all(variant, (90,))}
    assert {"find_key_edges", "prepare_rows", "sum_taps", "finish_taps"} <= set(units)
    for kernel in ("attention_forward", "grad_queries", "grad_keys"):
        assert units[kernel] == "wgmma.mma_async"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("channels", "sides", "dtype"), [(256, 128, torch.bfloat16), (128, 32, torch.float32)], ids=str
)
def test_attention_fits_into_little_shared_memory(channels, sides, dtype):
    """A block has 99 KB of it with compute capability 8.6, 8.9 and 12.0."""
    ahead = triton_ahead()
    variant = ahead.AttentionVariant(
        "large", channels=channels, left=sides, right=sides - 1, bias=True, query_rel=True, key_rel=True, dtype=dtype
    )
    for kernel, arguments in variant.launches(80):
        if kernel.__name__ in ("attention_forward", "grad_queries", "grad_keys"):
            assert ahead.measure(variant.name, kernel, arguments, 80).shared <= 99 << 10, kernel.__name__


def test_attention_is_compiled_once_for_all_lengths():
    """What a launch is specialised for does not depend on the length, the window within its width, or the scale."""
    ahead = triton_ahead()
    from convkernels.backends.triton.attention import launch as attention_launch

    def specialisations(length, left, scale, cu_seqlens=None):
        q = torch.empty(2 if cu_seqlens is None else 1, length, 4, 64, dtype=torch.bfloat16, device="meta")
        empty = q.new_empty
        args = Attention(
            q, q, q, left, 3, 0, True, True, scale, scale, 0.1, torch.empty(1, dtype=torch.int64, device="meta"),
            empty(4, left + 4), empty(64, left + 4), None, empty(64, left + 4), empty(4, 64, left + 4), None, None,
            empty(q.shape[0], length, dtype=torch.bool), cu_seqlens, cu_seqlens,
        )  # fmt: skip
        call = attention_launch.Call(args)
        lse = empty(q.shape[0], 4, length, dtype=torch.float32)
        given = {name: getattr(call, name) for name in INPUTS.names}
        results = {name: empty(0) if value is None else empty(value.shape) for name, value in given.items()}
        launches = [
            *attention_launch.forward_launches(call, q, lse),
            *attention_launch.gradient_launches(call, q, None, q, lse, results),
        ]
        found = []
        for kernel, _, arguments in launches:
            what, options = ahead.source(kernel, arguments)
            found.append((kernel.__name__, what.signature, what.constants, what.attrs, options))
        return found

    first = specialisations(512, 12, 0.125)
    assert {name for name, *_ in first} >= {"attention_forward", "grad_queries", "grad_keys", "sum_taps"}
    for length, left, scale in ((1, 12, 0.125), (129, 12, 0.125), (8192, 12, 0.125), (512, 9, 0.3)):
        assert specialisations(length, left, scale) == first
    boundaries = [torch.empty(n, dtype=torch.int32, device="meta") for n in (2, 9, 18)]
    packed = [specialisations(500 * n, 12, 0.125, cu) for n, cu in zip((1, 3, 7), boundaries, strict=True)]
    assert packed[0] == packed[1] == packed[2] != first


def test_every_variant_has_a_budget():
    ahead = triton_ahead()
    budgeted = set(ahead.RULES.limits())
    if not budgeted:
        pytest.skip("the budget is that of another version of Triton")
    for variant in (*ahead.VARIANTS, *ahead.ATTENTION_VARIANTS, *ahead.STEP_VARIANTS):
        for architecture in ahead.ARCHITECTURES:
            assert any(key.startswith(f"{variant.name} /") and key.endswith(f"sm_{architecture}") for key in budgeted)


@pytest.mark.slow
def test_cuda_budget():
    """One architecture on every run, as above."""
    if nvcc.missing():
        pytest.skip(nvcc.missing())
    (measure,) = nvcc.parts(("90",)).values()
    results = measure()
    assert {"plain_forward", "plain_weight", "reduce_weight", "step"} <= {result.kernel for result in results}
    assert {"bf16", "f16", "float", "double"} <= {result.variant for result in results}
    assert not nvcc.RULES.violations(results, everything=True)
    described = {(loop.kernel, loop.variant, loop.case) for loop in nvcc.MAIN_LOOPS}
    assert described == {(loop.kernel, loop.variant, loop.case) for result in results for loop in result.loops}


@pytest.mark.slow
def test_main_loops_alone():
    """What counts them for other purposes reads only their kernels."""
    if nvcc.missing():
        pytest.skip(nvcc.missing())
    if not nvcc.RULES.limits():
        pytest.skip("another version of nvcc compiled the library")
    costs = nvcc.main_loops("90a")  # those of warpgroups are for it alone
    assert [cost.case for cost in costs] == [loop.case for loop in nvcc.MAIN_LOOPS]
    for cost in costs:
        assert cost.instructions == pytest.approx(sum(cost.classes.values()))
        # The plain kernels copy nothing to shared memory.
        assert (cost.classes["copies"] > 0) == (cost.kernel in nvcc.STREAMING)
        assert (cost.classes["matrix"] > 0) == (cost.kernel in nvcc.BANDED)
    with pytest.raises(ValueError, match="no such kernel for sm_35"):
        nvcc.main_loops("35")


def test_what_breaks_a_rule_is_found(tmp_path):
    budget = tmp_path / "budget.txt"
    rules = Rules(budget, "nvcc", "13.0", streaming=("stream",), banded=("band",))
    good = Resources("bf16", "stream", "90", 64, 0, 0, 1, 0, 1, 0, 0)
    band = dataclasses.replace(good, kernel="band", matrix=1)
    budget.write_text(rules.to_budget([good, band]))
    assert rules.violations([good, band]) == []

    def found(kernel, **changes):
        (text,) = rules.violations([dataclasses.replace(kernel, **changes)])
        return text

    assert "8 bytes of stack" in found(good, spills=8)
    assert "no 16-byte" in found(good, wide_stores=0)
    assert "no matrix instructions" in found(band, matrix=0)
    halves = dataclasses.replace(
        rules, streaming=(), vectors=("stream",), scattered=frozenset({("stream", "per channel")})
    )
    budget.write_text(halves.to_budget([good, dataclasses.replace(good, variant="per channel")]))
    assert halves.violations([dataclasses.replace(good, vector_loads=1, vector_stores=1)]) == []
    assert halves.violations([dataclasses.replace(good, variant="per channel")]) == []
    (text,) = halves.violations([dataclasses.replace(good, vector_loads=1)])
    assert "no 8-byte loads and stores" in text
    budget.write_text(rules.to_budget([good, band]))
    newest = dataclasses.replace(rules, multiplying=("stream",), units={"90": "wgmma"})
    assert newest.violations([dataclasses.replace(good, unit="wgmma")]) == []
    assert "multiplies by mma, not" in newest.violations([dataclasses.replace(good, unit="mma")])[0]
    assert "registers 65, the budget has 64" in found(good, registers=65)
    assert "not in the budget" in found(good, variant="f16")
    loop = LoopCost("stream", "bf16", "7 taps", "output", 24.0, {"alu": 24.0}, body=1000)
    budget.write_text(rules.to_budget([dataclasses.replace(good, loops=(loop,))]))
    more = dataclasses.replace(loop, instructions=24.2, body=1030)
    assert rules.violations([dataclasses.replace(good, loops=(more,))]) == []
    more = dataclasses.replace(loop, instructions=24.3)
    assert "7 taps: 24.30 instructions per output, the budget has 24.0" in found(good, loops=(more,))
    more = dataclasses.replace(loop, body=1031)
    assert "7 taps: 1031 instructions in the loop's body, the budget has 1000" in found(good, loops=(more,))
    other = dataclasses.replace(loop, case="3 taps")
    assert "3 taps: instructions are not in the budget" in found(good, loops=(other,))
    assert "7 taps: unreadable" in found(good, loops=(dataclasses.replace(loop, fault="unreadable"),))
    described = dataclasses.replace(rules, described=frozenset({("stream", "bf16"), ("stream", "f16")}))
    assert described.violations([good]) == []
    (text,) = described.violations([good], everything=True)
    assert text == "f16 / stream: its main loop is described, but no kernel is this one"
    # The figures of another compiler are not comparable.
    assert rules.not_compared() is None
    other = dataclasses.replace(rules, version="13.1")
    assert other.violations([dataclasses.replace(good, registers=65, spills=8)]) == []
    assert "budget.txt is of nvcc 13.0, these kernels of nvcc 13.1;" in other.not_compared()


COMMITTED = [ROOT / "benchmarks" / "machine_code" / name for name in ("nvcc.txt", "triton.txt")]


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_one_register_more_than_a_committed_budget_is_found(path):
    version, limits = budgets.parse_limits(path.read_text())
    assert budgets.format_limits(path.stem, version, limits) == path.read_text()
    assert len(limits) > 400
    rules = Rules(path, path.stem, version)
    for key, figures in limits.items():
        variant, kernel, architecture = key.split(" / ")
        passes, bodies = figures.get("instructions", {}), figures.get("bodies", {})
        loops = tuple(LoopCost(kernel, variant, case, "output", passes[case], {}, body=bodies[case]) for case in passes)
        one = Resources(
            variant, kernel, architecture.removeprefix("sm_"), figures["registers"], 0, figures["shared"], 1, 0, 1, 0,
            1, loops=loops,
        )  # fmt: skip
        assert rules.violations([one]) == []
        for name in ("registers", "shared", "spills"):
            (text,) = rules.violations([dataclasses.replace(one, **{name: getattr(one, name) + 1})])
            assert text.startswith(key)
        for loop in loops:
            slower = dataclasses.replace(loop, instructions=1.02 * loop.instructions, body=2 * loop.body)
            assert len(rules.violations([dataclasses.replace(one, loops=(slower,))])) == 2


def test_a_new_budget_says_what_it_raises(tmp_path):
    budget = tmp_path / "budget.txt"
    rules = Rules(budget, "nvcc", "13.0")
    loop = LoopCost("stream", "bf16", "7 taps", "output", 24.0, {}, body=1000)
    good = Resources("bf16", "stream", "90", 64, 0, 512, 1, 0, 1, 0, 0, loops=(loop,))
    budget.write_text(rules.to_budget([good]))
    assert rules.update([dataclasses.replace(good, registers=63)]) == []
    more = dataclasses.replace(loop, instructions=24.5, body=999)
    assert rules.update([dataclasses.replace(good, loops=(more,)), dataclasses.replace(good, variant="f16")]) == [
        "bf16 / stream / sm_90, registers: from 63 to 64",
        "bf16 / stream / sm_90, instructions, 7 taps: from 24.0 to 24.5",
        "f16 / stream / sm_90: new",
    ]
    assert rules.limits()["bf16 / stream / sm_90"]["bodies"] == {"7 taps": 999}


def test_the_command_says_what_it_does_not_compare_and_what_it_raises(tmp_path, monkeypatch, capsys):
    rules = Rules(tmp_path / "budget.txt", "nvcc", "13.0", described=frozenset({("stream", "f16")}))
    good = Resources("bf16", "stream", "90", 64, 0, 512, 1, 0, 1, 0, 0)
    rules.budget.write_text(rules.to_budget([dataclasses.replace(good, registers=60)]))
    made = SimpleNamespace(parts=lambda architectures, only: {"sm_90": lambda: [good]})
    monkeypatch.setattr(command_line, "backend", lambda name: made)
    command = ["--backend", "cuda"]
    made.RULES = dataclasses.replace(rules, version="unknown", described=frozenset())
    assert command_line.main(command) == 0
    said = capsys.readouterr()
    assert "is of nvcc 13.0, these kernels of nvcc unknown" in said.err and "sm_90" in said.err
    assert said.out.endswith("cuda: 1 kernels keep to the rules\n")
    made.RULES = rules
    assert command_line.main(command) == 1
    said = capsys.readouterr()
    assert "f16 / stream: its main loop is described" in said.out and "registers 64" in said.out
    assert said.out.endswith("cuda: 2 excesses, listed above, among 1 kernels\n") and "budget" not in said.err
    assert command_line.main([*command, "--only", "bf16"]) == 1
    assert "is described" not in capsys.readouterr().out
    made.RULES = dataclasses.replace(rules, described=frozenset())
    for expected in ("these go up\nbf16 / stream / sm_90, registers: from 60 to 64", "nothing goes up"):
        assert command_line.main([*command, "--update-budget"]) == 0
        said = capsys.readouterr().out
        assert expected in said and said.endswith("cuda: 1 kernels are within their budget\n")


def test_machine_code_is_counted():
    code = """
        LDG.E.128 R4, [R2.64] ; LDG.E.U16 R0, [R2.64] ; LDGSTS.E.BYPASS.128 [R9], [R2.64] ;
        LDG.E.64 R4, [R2.64] ; STG.E.64 [R2.64], R4 ;
        STG.E.128 [R2.64], R4 ; STG.E [R2.64], R0 ; HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
    """
    assert read_code(code) == {
        "wide_loads": 2, "narrow_loads": 2, "wide_stores": 1, "narrow_stores": 2, "matrix": 1,
        "vector_loads": 3, "vector_stores": 2,
    }  # fmt: skip
    usage = "REG:52 STACK:8 SHARED:2048 LOCAL:16 CONSTANT[0]:816"
    assert read_usage(usage) == {"registers": 52, "spills": 24, "shared": 2048}


def test_names_of_kernels_are_short():
    for demangled, expected in (
        ("void ck::cuda::f<ck::bf16, (ck::Kind)1, 3>(ck::Call<ck::bf16>)", ("f", "bf16, 1, 3")),
        ("void f<__half, (int)3, (bool)1>(A<__half>, int (*)(int))", ("f", "__half, 3, 1")),
        ("ck::f(int)", ("f", "")),
        ("ck::value", None),
    ):
        assert short_name(demangled) == expected


def test_ptx_among_the_machine_code_is_passed_over():
    parts = (
        ("elf", "90a", "\n Function f:\n  REG:1\n"),
        ("ptx", "100", "ptxasOptions =\n"),
        ("elf", "100", "\n Function f:\n  REG:2\n"),
    )
    text = "".join(f"\nFatbin {kind} code:\n================\narch = sm_{name}\n{rest}" for kind, name, rest in parts)
    found = nvcc._kernels(text, r"\n Function ")
    assert {key: rest.split()[0] for key, rest in found.items()} == {("f", "90a"): "REG:1", ("f", "100"): "REG:2"}


def test_parameter_lists_stay_short():
    """Records carry tensors' strides and flags: at most 40 parameters of a kernel, 10 of a device function."""
    triton_ahead()
    import importlib

    folder = Path(triton_backend.__file__).parent
    counts = {}
    for path in (folder / "device.py", *folder.glob("conv/*.py"), *folder.glob("attention/*.py")):
        name = ".".join(path.relative_to(folder).with_suffix("").parts)
        module = importlib.import_module(f"{triton_backend.__name__}.{name}")
        for function in vars(module).values():
            if hasattr(function, "arg_names") and function.fn.__module__ == module.__name__:
                counts[function.__name__] = len(function.arg_names)
    launched = {"attention_forward", "find_key_edges", "prepare_rows", "sum_taps", "finish_taps", "sum_partials"}
    launched |= {name for name in counts if name.startswith(("conv_", "grad_", "reduce_"))} | {
        "filter_sums",
        "sum_rows",
    }
    assert launched < set(counts)
    for name, count in counts.items():
        assert count <= (40 if name in launched else 10), (name, count)


def test_launches_of_one_kernel_are_held_to_one_budget():
    ahead = triton_ahead()
    loop = LoopCost("grad_tile", "long", "whole kernel", "thread", 24.0, {}, body=1000)
    first = Resources("long", "grad_tile", "90", 64, 0, 512, 0, 4, 0, 2, 0, "", (loop,), 4, 2)
    sums = dataclasses.replace(first, registers=80, shared=0, vector_loads=3, vector_stores=0)
    both = ahead.together(first, sums)
    assert (both.registers, both.shared, both.vector_loads, both.vector_stores) == (80, 512, 3, 2)
    assert [one.case for one in both.loops] == ["whole kernel", "whole kernel, launch 2"]


def test_what_the_estimate_of_triton_takes_a_launch_to_move():
    triton_ahead()
    from benchmarks.machine_code import triton_estimate as estimate

    assert estimate.products(Counter({"HMMA.16816.F32.BF16": 3, "HGMMA.64x64x16.F32.BF16": 2})) == (3, 2 * 8)
    x = 2 * 16 * 4096 * 1024
    for name, forward, backward in (("k7", 2, 3), ("gate-k7", 3, 5), ("dynamic-k7", 2 + 7 / 64, 3 + 14 / 64)):
        variant = estimate.CASES[name]
        for direction, least in (("fwd", forward), ("bwd", backward)):
            assert estimate.least(variant, direction) == least * x
            launches = variant.passes(90)[direction]
            moved = sum(estimate.moved(variant, kernel.__name__, arguments) for kernel, _, arguments in launches)
            assert 1 < moved / (least * x) < 1.2
    assert estimate.rows("no such case") == []
