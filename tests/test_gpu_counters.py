"""What scripts/gpu_counters.py makes of the output of Nsight Compute, here made up."""

import gzip
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
gpu_counters = pytest.importorskip("gpu_counters", reason="a copy of the tests without the scripts")

STALLED = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
COLUMNS = {
    "ID": "", "Kernel Name": "", "Block Size": "", "Grid Size": "", "launch__block_size": "",
    "launch__registers_per_thread": "register/thread", "launch__shared_mem_per_block_dynamic": "Kbyte/block",
    "gpu__time_duration.sum": "usecond", "dram__bytes_read.sum": "Mbyte", "lts__t_sector_hit_rate.pct": "%",
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active": "%",
    "launch__occupancy_limit_registers": "block", "launch__occupancy_limit_warps": "block",
    **{STALLED.format(name): "inst" for name in ("wait", "selected", "long_scoreboard", "barrier", "math")},
    STALLED.format("wait_not_issued"): "inst",
}  # fmt: skip
SLEEP = "at::cuda::<unnamed>::spin_kernel(long)"
STREAM = "void ck::<unnamed>::stream_forward<__nv_bfloat16, (int)7>(ck::Problem, const float *)"
REDUCE = "ck::reduce_weight(float *)"


def line(cells):
    return ",".join(f'"{cell}"' for cell in cells)


def kernel(number, name):
    values = [number, name, "(128, 1, 1)", "(8,192, 1, 1)", "128", "96", "40.96", "1,234.5", "134.2", "12.5", "n/a"]
    return line([*values, "5", "16", "0.5", "1", "4.25", "0.75", "nan", "9"])


PAGE = "\n".join(
    [
        "==PROF== Connected to process 12", "launched one", line(COLUMNS), line(COLUMNS.values()), kernel(0, SLEEP),
        kernel(1, STREAM), kernel(2, REDUCE), kernel(3, SLEEP), kernel(4, STREAM), "==PROF== Disconnected",
    ]
)  # fmt: skip


def test_kernels_go_to_their_cases():
    found = gpu_counters.by_case(gpu_counters.parse(PAGE), ["one", "two", "three"])
    assert {case: [row["Kernel Name"] for row in rows] for case, rows in found.items()} == {
        "one": [STREAM, REDUCE], "two": [STREAM]
    }  # fmt: skip


def test_counters_of_a_kernel():
    shown = gpu_counters.counters(gpu_counters.parse(PAGE)[1])
    expected = {
        "kernel": "stream_forward", "grid": "(8,192, 1, 1)", "block": "128", "registers": 96, "dynamic shared B": 40960,
        "us": 1234.5, "DRAM read MB": 134.2, "L2 hits %": 12.5, "tensor %": None, "IPC": None,
        "limited by": "registers 5", "stalls, warps per issue": "long_scoreboard 4.25, barrier 0.75, wait 0.50",
    }  # fmt: skip
    assert {name: pytest.approx(shown[name]) for name in expected} == expected


def test_output_without_a_page():
    assert gpu_counters.parse("") == gpu_counters.parse('==ERROR== no\n"x","y"\n"1","2"\n') == []
    assert gpu_counters.markdown({"one": {"kernels": [], "error": "no such GPU"}}).endswith("one: no such GPU\n")


def fake_ncu(folder, body):
    """A program that takes the options of ncu."""
    path = folder / "ncu"
    path.write_text(
        f"#!{sys.executable}\nimport sys, time\na = sys.argv\nlog = a[a.index('--log-file') + 1]\n"
        f"names = a[a.index('--launch') + 1].split(',')\nPAGE = {PAGE!r}\n{body}\n"
    )
    path.chmod(0o755)
    return str(path)


def test_profiles_and_saves(tmp_path):
    """This ncu knows no metrics, and nothing comes of the second case unless it is alone."""
    ncu = fake_ncu(
        tmp_path,
        "if '--metrics' in a: sys.exit('==ERROR== no such metric')\n"
        "if 'two' in names[1:]: names, PAGE = names[:1], PAGE[:PAGE.index('\"3\"')]\n"
        "open(log, 'w').write(PAGE)\n"
        "for name in names: print('launched', name)\n",
    )
    profiler = gpu_counters.Profiler(ncu, tmp_path, "cuda", timeout=30.0)
    profiler.measure(["one", "two"])
    saved = json.loads((tmp_path / "counters-cuda.json").read_text())
    assert [len(saved[case]["kernels"]) for case in ("one", "two")] == [2, 2] and saved["one"]["names"][1] == REDUCE
    assert (tmp_path / "counters-cuda.md").read_text().count("| stream_forward |") == 2
    assert gzip.open(tmp_path / "counters-cuda.csv.gz", "rt").read().count("spin_kernel") == 3


def test_what_hangs_is_ended(tmp_path):
    ncu = fake_ncu(tmp_path, "print('launched one', flush=True)\ntime.sleep(60)")
    profiler = gpu_counters.Profiler(ncu, tmp_path, "cuda", timeout=1.0)
    profiler.measure(["one"])
    assert "ended after 1 s" in profiler.results["one"]["error"]


def test_counters_that_are_not_allowed(tmp_path):
    ncu = fake_ncu(tmp_path, f"open(log, 'w').write('==ERROR== {gpu_counters.FORBIDDEN}\\n')")
    profiler = gpu_counters.Profiler(ncu, tmp_path, "cuda", timeout=30.0)
    profiler.measure(["one", "two"])
    assert profiler.forbidden and gpu_counters.FORBIDDEN in profiler.results["two"]["error"]


def test_a_page_without_counters_is_an_error(tmp_path):
    empty = "\n".join(
        [line(COLUMNS), *(line([n, name, *["n/a"] * (len(COLUMNS) - 2)]) for n, name in enumerate((SLEEP, STREAM)))]
    )
    ncu = fake_ncu(tmp_path, f"open(log, 'w').write({empty!r})\nprint('launched one')\n")
    profiler = gpu_counters.Profiler(ncu, tmp_path, "cuda", timeout=30.0)
    profiler.measure(["one"])
    assert profiler.results["one"]["error"] == "launched one"
