"""What scripts/launch_counters.py makes of counts; with the counted library, that they are always the same."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.machine_code import counters
from benchmarks.machine_code.budgets import format_counts, parse_counts
from benchmarks.machine_code.loops import BEGINNING, NEAR
from benchmarks.machine_code.rules import LoopCost
from benchmarks.machine_code.tiles import backward_passes, near_parts
from convkernels.backends import library

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts" / "launch_counters.py"
launch_counters = pytest.importorskip("launch_counters", reason="a copy of the tests without the scripts")

needs_library = pytest.mark.skipif(library.missing("counted") is not None, reason="needs make counted-build")
NAMES = ("blocks", "bytes_read", "bytes_written", "barriers", "warp_barriers", "shuffles", "votes", "matrix_products",
         "warpgroup_products",
         *(f"{access}_{what}" for access in counters.GLOBAL for what in ("requests", "sectors")),
         *(f"{access}_{what}" for access in counters.SHARED for what in ("wavefronts", "conflicts")))  # fmt: skip


def launch(kernel="stream_forward", instructions=(), **figures):
    return counters.Launch(kernel, "bf16", dict.fromkeys(NAMES, 0) | figures, instructions)


def test_totals_of_a_launch():
    one = launch(load_sectors=1, copy_read_sectors=2, store_sectors=3, bytes_read=60, bytes_written=4,
                 shared_load_wavefronts=5, matrix_load_wavefronts=4, operand_read_wavefronts=3,
                 copy_write_conflicts=2)  # fmt: skip
    assert (one.moved, one.least, one.wavefronts, one.conflicts) == (192, 64, 12, 2)


def test_more_than_the_budget_is_named_and_less_is_not():
    now = {"a": {"k": {"bytes": 1000, "conflicts": 1}, "new": {"bytes": 1}}}
    budget = {"a": {"k": {"bytes": 995, "conflicts": 0}}}
    assert launch_counters.violations(now, budget) == ["a k: conflicts 1, budget 0", "a new: no budget"]
    assert launch_counters.violations(now, {"a": now["a"] | {"k": {"bytes": 980, "conflicts": 1}}}) == [
        "a k: bytes 1000, budget 980"
    ]
    assert launch_counters.improvements(now, {"a": {"k": {"bytes": 1001, "conflicts": 1}}}) == 1


def test_a_kernel_that_is_no_longer_launched_is_named():
    budget = {"a": {"k": {"bytes": 1}, "old": {"bytes": 1}}, "not measured": {"k": {"bytes": 1}}}
    now = {"a": {"k": {"bytes": 1}}}
    assert launch_counters.violations(now, budget) == ["a old: no longer launched, --update takes it out"]


def test_copies_that_become_loads_and_stores_are_more():
    def held(**figures):
        return launch_counters.held({"a": {"k": launch(**figures)}})

    copied = held(copy_read_requests=4, copy_write_wavefronts=16, votes=1)
    loaded = held(load_requests=4, shared_store_wavefronts=16, warp_barriers=1)
    assert launch_counters.violations(loaded, copied) == [
        f"a k: {name}, budget 0" for name in ("load requests 4", "shared store wavefronts 16", "warp barriers 1")
    ]


@pytest.mark.parametrize("before", [8, 10, 12])
def test_a_new_budget_says_what_it_raises(before, tmp_path, monkeypatch, capsys):
    (name, case), *_ = launch_counters.CASES.items()
    monkeypatch.setattr(launch_counters, "CASES", {name: case})
    monkeypatch.setattr(launch_counters, "measure", lambda case: {"k": launch(blocks=1, votes=10)})
    budget = tmp_path / "budget.txt"
    budget.write_text(format_counts(launch_counters.held({name: {"k": launch(votes=before)}})))
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--update", "--budget", str(budget)])
    assert launch_counters.main() == 0
    said = capsys.readouterr().out.splitlines()[-1]
    assert said == (f"{name}, k, votes: from 8 to 10" if before == 8 else "nothing goes up")
    assert parse_counts(budget.read_text())[name]["k"]["votes"] == 10


def test_the_budget_is_of_the_cases():
    budget = parse_counts(launch_counters.BUDGET.read_text())
    assert list(budget) == list(launch_counters.CASES)
    assert format_counts(budget) == launch_counters.BUDGET.read_text()
    for launches in budget.values():
        assert all(list(figures) == list(launch_counters.HELD) for figures in launches.values())


def test_each_count_that_grows_is_found_in_the_committed_budget():
    budget = parse_counts(launch_counters.BUDGET.read_text())
    for name, launches in budget.items():
        for kernel, figures in launches.items():
            for what, value in figures.items():
                more = {name: launches | {kernel: figures | {what: int(value * 1.02) + 1}}}
                (text,) = launch_counters.violations(more, budget)
                assert text.startswith(f"{name} {kernel}: {what} ")


@pytest.mark.parametrize("name, beginning, per_row, per_pair", [
    ("stream-k7-fwd", 5, 3, 0), ("attention-d64-fwd", 0, 7, 2)
])  # fmt: skip
def test_counts_grow_as_the_program_does(name, beginning, per_row, per_pair, monkeypatch):
    case = launch_counters.CASES[name]

    def rows(settings):
        return case.outputs(settings) // 64

    def measured(of, settings=None):
        settings = settings or of.small
        length = settings.lengths[0] if of.is_attention else 0
        count = beginning + rows(settings) * (per_row + per_pair * length)
        return {"stream_forward": launch(load_sectors=count, bytes_read=beginning + rows(settings))}

    monkeypatch.setattr(launch_counters, "measure", measured)
    found = launch_counters.extrapolate(case)["stream_forward"]
    length = case.large.lengths[0] if case.is_attention else 0
    once = beginning * launch_counters.PROCESSORS
    assert found["load_sectors"] == once + rows(case.large) * (per_row + per_pair * length)
    assert found["bytes_read"] == once + rows(case.large)


def test_lines_that_touch_too_much_are_named(monkeypatch):
    monkeypatch.setattr(
        launch_counters, "source_lines", lambda places: {place: f"line {place // 10}" for place in places}
    )
    conflicts = {"shared_load_requests": 4, "shared_load_bytes": 512, "shared_load_wavefronts": 64}
    accesses = [
        {"place": 10, **conflicts, "shared_load_conflicts": 60},
        {"place": 11, **conflicts, "shared_load_conflicts": 60},
        {"place": 20, **conflicts, "shared_load_conflicts": 0},
        {"place": 30, "load_requests": 1, "load_bytes": 128, "load_sectors": 4},
        {"place": 40, "load_requests": 1, "load_bytes": 128, "load_sectors": 32},
    ]
    one = launch(instructions=accesses, load_sectors=36, shared_load_wavefronts=192)
    assert launch_counters.lines("case", "k", one) == [
        ("case", "k", "line 1", "shared_load", "8", "128", "16.00", "120"),
        ("case", "k", "line 4", "load", "1", "128", "32.00", "0"),
    ]


def test_the_slowest_unit_is_the_bound():
    one = launch(bytes_read=3 * 10**9, shared_load_wavefronts=10**6, matrix_products=10**3)
    assert launch_counters.estimate(one).bound() == ("memory", 1e-3)
    a_millisecond = 4 * 132 * 1.755e6
    unit, seconds = launch_counters.estimate(one, (2 * a_millisecond, 0.9 * a_millisecond, 0)).bound()
    assert (unit, seconds) == ("issue", pytest.approx(2e-3))
    unit, seconds = launch_counters.estimate(one, (2 * a_millisecond, 1.5 * a_millisecond, 0)).bound()
    assert (unit, seconds) == ("integers", pytest.approx(3e-3))
    unit, seconds = launch_counters.estimate(one, (2 * a_millisecond, 0, 0.5 * a_millisecond)).bound()
    assert (unit, seconds) == ("special", pytest.approx(4e-3))
    for name, rate in (("matrix_products", 0.62), ("warpgroup_products", 0.83)):
        unit, seconds = launch_counters.estimate(launch(**{name: 10**9})).bound()
        assert (unit, seconds) == ("matrix", pytest.approx(10**9 / (132 * 1.755e9 * rate)))
    case = launch_counters.CASES["stream-k7-fwd"]
    assert launch_counters.reached(case, one, 2e-3) == "0.50 of a copy"


def test_instructions_are_those_of_the_main_loop_of_the_problem():
    loops = [
        LoopCost("stream_forward", "bf16", "3 taps", "output", 20.0, {"alu": 5.0, "special": 1.0}),
        LoopCost("stream_forward", "bf16", "7 taps", "output", 30.0, {"alu": 6.0, "special": 2.0}),
        LoopCost("attention_forward", "bf16", "32 x 16 pairs", "tile", 500.0, {"alu": 100.0, "special": 18.0}),
    ]
    rows, pairs = launch_counters.CASES["stream-k7-fwd"], launch_counters.CASES["attention-d64-fwd"]
    outputs, tiles = 16 * 4096 * 1024, 8 * 12 * 2048**2 / 512
    assert launch_counters.instructions(rows, launch(), loops) == tuple(n * outputs / 32 for n in (30.0, 6.0, 2.0))
    found = launch_counters.instructions(pairs, launch("attention_forward"), loops)
    assert found == (500.0 * tiles, 100.0 * tiles, 18.0 * tiles)
    assert launch_counters.instructions(rows, launch("band_forward"), loops) is None


def test_tiles_that_the_window_crosses():
    """Every pair is counted once; the window and the diagonal are in near parts, of one to four."""
    for length, window, causal in ((512, None, False), (512, (8, 8), False), (640, (300, 0), True)):
        found = near_parts(length, 16, 128, 128, window, causal)
        blocks = length // 128
        met = blocks * (blocks + 1) / 2 if causal else blocks**2
        assert sum(found.values()) == 8 * met
        parts = 0
        for i in range(0, length, 16):
            columns = [j - (i + r) for j in range(length) for r in range(16)]
            for k in range(0, i // 128 * 128 + 128 if causal else length, 32):
                here = columns[k * 16 : (k + 32) * 16]
                crossed = window is not None and min(here) <= window[1] and max(here) >= -window[0]
                parts += crossed or (causal and max(here) > 0)
        assert sum(near * count for near, count in found.items()) == parts


def test_keys_meet_the_tiles_that_queries_meet():
    for length, window, causal in ((512, None, False), (512, (8, 3), False), (640, (300, 0), True)):
        found = near_parts(length, 16, 32, 128, window, causal, by_keys=True)
        parts = 0
        for j in range(0, length, 16):
            for i in range(j // 128 * 128 if causal else 0, length, 32):
                columns = [j + r - (i + m) for r in range(16) for m in range(32)]
                crossed = window is not None and min(columns) <= window[1] and max(columns) >= -window[0]
                parts += crossed or (causal and max(columns) > 0)
        blocks = length // 128
        assert found.total() == 8 * 4 * (blocks * (blocks + 1) / 2 if causal else blocks**2)
        assert found[1] == parts


def test_passes_of_the_backward_loops():
    """Each tile of pairs is passed once; near parts of keys are counted besides."""
    for window, causal in ((None, False), ((8, 8), False), ((300, 0), True)):
        tiles = near_parts(512, 16, 64, 128, window, causal)
        queries = backward_passes(False, 64, 512, window, causal)
        assert sum(queries.values()) == tiles.total()
        keys = backward_passes(True, 64, 512, window, causal)
        near = near_parts(512, 16, 64, 128, window, causal, by_keys=True)
        assert list(keys.values()) == [near.total() - near[1] - 2 * near[2], near[1] + 2 * near[2]]


def test_near_tiles_of_warpgroups_take_more():
    """Of 16 queries, 512 keys and a window of 17: tiles of one to three near parts, and the strip of their columns."""
    costs = {"16 x 128 pairs": 100.0, NEAR[0].format(1): 200.0, NEAR[0].format(4): 500.0, NEAR[1].format(4): 1e9,
             BEGINNING[0]: 1.0, BEGINNING[1]: 3.0}  # fmt: skip
    loops = [
        LoopCost("attention_forward_warpgroups", "bf16", case, "tile", cost, {"alu": cost / 2, "special": cost / 4})
        for case, cost in costs.items()
    ]
    for name, beginning in (("attention-d64-t512-plain-fwd", 1.0), ("attention-d64-t512-fwd", 3.0)):
        case = launch_counters.ESTIMATED[name]
        tiles = near_parts(512, 16, 128, 128, case.window, False)
        expected = sum(count * 100 * (near + 1) for near, count in tiles.items()) + 32 * beginning
        all_of_them = tuple(pytest.approx(32 * 32 * expected * share) for share in (1, 1 / 2, 1 / 4))
        assert launch_counters.instructions(case, launch("attention_forward_warpgroups"), loops) == all_of_them


@needs_library
@pytest.mark.slow
@pytest.mark.parametrize("name", ["stream-k7-bwd", "attention-d64-fwd"])
def test_counts_are_those_of_the_budget_in_any_order(name, tmp_path):
    for seed in ("1", "2"):
        environment = os.environ | {"CONVKERNELS_SIMT_SEED": seed, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, SCRIPT, "--only", name, "--budget", tmp_path / "none.txt"]
        output = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
        (tmp_path / seed).write_text(output.stdout)
        assert output.returncode == 1 and "no budget" in output.stdout, output.stderr
    assert (tmp_path / "1").read_text() == (tmp_path / "2").read_text()


@pytest.mark.parametrize("left_out", ["CONVKERNELS_SIMT", "CONVKERNELS_SIMT_COUNTED"])
def test_nothing_is_counted_in_another_library(left_out, monkeypatch):
    for name in ("CONVKERNELS_SIMT", "CONVKERNELS_SIMT_COUNTED"):
        monkeypatch.setenv(name, "0" if name == left_out else "1")
    with pytest.raises(RuntimeError, match=f"expected the environment variable {left_out}=1"):
        with counters.counted():
            pass


@needs_library
def test_calls_are_counted():
    program = """
import torch, convkernels as ck
from benchmarks.machine_code.counters import counted, source_lines
with counted() as none:
    try:
        with counted():
            pass
    except RuntimeError as error:
        print(error)
x, weight = torch.ones(2, 64, 128, dtype=torch.bfloat16), torch.ones(2, 3, dtype=torch.bfloat16)
with counted() as launches:
    ck.lightweight_conv1d(x, weight, backend="cuda")
ck.lightweight_conv1d(x, weight, backend="cuda")
print([(one.kernel, one["bytes_written"]) for one in launches])
stores = [one["place"] for one in launches[0].instructions if "store_sectors" in one]
print([line.split(":")[0] for line in source_lines(stores).values()])
"""
    environment = os.environ | {"CONVKERNELS_SIMT": "1", "CONVKERNELS_SIMT_COUNTED": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines() == [
        "counted(): expected one at a time, got one within another",
        str([("stream_forward", 2 * 64 * 128 * 2)]),
        str(["conv/quads.cuh"]),
    ], done.stderr
