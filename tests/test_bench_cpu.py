"""Measurements on cores: threads keep to theirs, what shared one is left out, and the goals of the CPU kernels."""

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from instruction_sets import ROOT

import convkernels
from benchmarks import bench_cpu, cores, report, store, timing
from benchmarks.suites import BACKWARD, COPY, FORWARD, OURS, cpu, cpu_tables
from benchmarks.suites.attention_tables import SDPA
from benchmarks.suites.cpu_tables import Key
from convkernels.cli import environment, selfcheck
from convkernels.cli.console import INTERRUPTED, MISTAKE, Mistake

CPU = torch.device("cpu")
needs_affinity = pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="threads cannot be bound here")
PLACES = """
from benchmarks import cores
cores.bind()
import json, os, torch
torch.set_num_threads(len(cores.own()))
torch.ones(1 << 20).exp()
asked, own, first = cores.binding(), sorted(cores.own()), sorted(os.sched_getaffinity(0))
threads = [sorted(os.sched_getaffinity(int(task))) for task in os.listdir(cores.TASKS)]
cores.release()
print(json.dumps([asked, own, first, threads, sorted(os.sched_getaffinity(0))]))
"""


def places(cpus=None, **variables):
    """What was asked for, the CPUs of the process, of its first thread, of all threads, and of the first set free."""
    env = {name: value for name, value in os.environ.items() if name not in (*cores.VARIABLES, "OMP_NUM_THREADS")}
    command = [sys.executable, "-P", "-c", PLACES]
    keep = None if cpus is None else lambda: os.sched_setaffinity(0, cpus)
    options = {"env": {**env, "PYTHONPATH": str(ROOT), **variables}, "preexec_fn": keep}
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True, **options).stdout)


@needs_affinity
def test_threads_keep_to_cores_of_their_own():
    asked, own, first, threads, released = places()
    assert asked == "OMP_PROC_BIND=close OMP_PLACES=cores"
    assert own == released == sorted(os.sched_getaffinity(0))
    sets = {tuple(cpus) for cpus in threads}
    assert tuple(first) in sets and sorted(sum(sets, ())) == own, "threads share a core, or leave one out"


@needs_affinity
def test_threads_keep_to_the_cores_that_are_allowed():
    one = max(os.sched_getaffinity(0))
    assert places({one})[1:3] == [[one], [one]]


@needs_affinity
def test_what_the_user_says_of_cores_stays():
    asked, own, _, threads, _ = places(OMP_PROC_BIND="false")
    assert asked == "OMP_PROC_BIND=false" and all(cpus == own for cpus in threads)


@needs_affinity
def test_a_repeat_that_shares_its_core_is_seen():
    own, task = os.sched_getaffinity(0), cores.TASKS / str(os.getpid()) / "schedstat"
    if not task.exists():
        pytest.skip("the system does not tell how long threads wait")
    one = max(own)

    def spin():
        end = time.perf_counter() + 0.3
        while time.perf_counter() < end:
            pass

    command = [sys.executable, "-c", "print(flush=True)\nwhile True: pass"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, preexec_fn=lambda: os.sched_setaffinity(0, {one})) as other:
        os.sched_setaffinity(0, {one})
        try:
            other.stdout.readline()
            assert timing.CpuClock().sample(spin).waited
        finally:
            os.sched_setaffinity(0, own)
            other.kill()


def test_threads_that_ended_or_are_not_told_of_wait_for_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(cores, "TASKS", tmp_path)
    assert cores.waited() == 0
    (tmp_path / "1").mkdir()
    assert cores.waited() == 0
    (tmp_path / "1" / "schedstat").write_text("5 2000000000 7\n")
    assert cores.waited() == pytest.approx(2.0)


class Turns:
    """Every callable returns the samples of its repeats in turn."""

    def sample(self, fn, calls=1):
        seconds, waited = fn()
        return timing.Sample(seconds, waited=waited)


def test_repeats_that_waited_are_left_out():
    timing.counts.clear()
    turns = itertools.cycle([(0.1, False), (0.2, False), (9.0, True)])
    times = timing.interleaved({"x": lambda: next(turns)}, Turns(), budget_s=1.2)["x"]
    assert times == timing.Timing(pytest.approx(0.15), 0.1, 0.2, 4, left_out=2)
    shared = timing.interleaved({"x": lambda: (8.0, True)}, Turns(), budget_s=1.0)["x"]
    assert shared == timing.Timing(8.0, 8.0, 8.0, 3, disturbed=True)
    assert timing.counts == {timing.TIMED: 9, timing.LEFT_OUT: 2, timing.DISTURBED: 1}


def record(key, seconds, **more):
    shape = {"case": key.case, "direction": key.direction, "dtype": key.dtype, "length": key.length,
             "heads": key.heads, "taps": key.taps}  # fmt: skip
    runs = seconds if isinstance(seconds, list) else [seconds]
    return {**shape, "runs": runs, "timed": 40, "left_out": 2, "disturbed": [[]] * len(runs), **more}


def section(isa="avx512", lacking=("amx",), records=()):
    facts = {**environment.describe(CPU), "isa": isa, "binding": "none", "torch_isa": "AVX512"}
    facts["samples"] = {timing.TIMED: 40, timing.LEFT_OUT: 2, timing.DISTURBED: 0}
    settings = {"lengths": [128], "dtypes": ["float32"], "lacking": list(lacking)}
    return {"environment": facts, "settings": settings, "records": list(records), "notes": [], "errors": []}


def verdicts(*arguments, **options):
    found = cpu_tables.rows(section(*arguments, **options))
    assert all(len(row) == len(cpu_tables.COLUMNS) for row in found)
    return {row[0]: row[1:] for row in found}


def test_goals_say_met_missed_and_not_timed():
    attention = Key("attention", FORWARD, "float32", 512)
    light = Key("lightweight", BACKWARD, "float32", 512, 12, 7)
    call = Key("call", "no-grad", "float32", 4, None, 7)
    records = (
        record(
            attention,
            [
                {OURS: ours * 1e-3, SDPA: sdpa * 1e-3}
                for ours, sdpa in ((0.8, 1.0), (0.7, 2.0), (0.9, 0.5), (9.0, 90.0))
            ],
            disturbed=[[], [], [], [SDPA]],
        ),
        record(light, {OURS: 2.1e-3, COPY: 1e-3}, disturbed=[[COPY]]),
        record(call, {"depthwise_conv1d": 4e-6, "lightweight_conv1d": 7e-6, "F.conv1d": 70e-6}),
    )
    found = verdicts(records=records)
    expected = ("avx512", "<= 0.82", "0.8", "met", "800 us", "1 ms", "0.8 / 0.35 / 1.8 / 0.1 !", "2 of 40")
    assert found["attention forward float32 T=512: of SDPA's time"] == expected
    expected = ("avx512", ">= 0.78", "0.714", "cores were shared", "2.1 ms", "1.5 ms", "0.714 !", "2 of 40")
    assert found["lightweight backward float32 T=512 H=12 K=7: of the speed of 1.5 copies"] == expected
    name = "call no-grad float32 T=4 K=7: {}, of F.conv1d's time"
    assert found[name.format("depthwise_conv1d")][1:4] == ("<= 0.063", "0.0571", "met")
    assert found[name.format("lightweight_conv1d")][3] == "missed"
    expected = ("amx", "<= 0.52", "-", "by emulation: not timed", "-", "-", "-", "-")
    assert found["attention forward bfloat16 T=512: of SDPA's time"] == expected
    assert found["attention forward float32 T=128: of SDPA's time"][3] == "not measured"
    assert {row[0] for row in found.values()} == {"any", "avx512", "amx"}


@pytest.mark.parametrize(
    ("isa", "lacking", "expected"),
    [
        ("amx", (), {"any", "amx", "avx512"}),
        ("avx2", (), {"any", "avx2"}),
        ("avx2", ("amx", "avx512"), {"any", "avx2", "amx", "avx512"}),
        ("portable", ("amx", "avx512", "avx2"), {"any", "avx2", "amx", "avx512"}),
    ],
)
def test_goals_are_those_of_the_kernels_in_use(isa, lacking, expected):
    found = verdicts(isa, lacking)
    assert {row[0] for row in found.values()} == expected
    timed = {row[0] for row in found.values() if row[3] == "not measured"}
    assert timed == expected - set(lacking)
    keys = cpu.Settings().keys(isa)
    assert len(keys) == len(set(keys)) and {key.case for key in keys} >= {"call"}


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """A machine with all sets of kernels, on which a process writes results or ends with the status that is given."""
    endings, started, wrong = {}, [], {}

    def status_of(command, variables):
        name = variables.get("CONVKERNELS_CPU_ISA", "avx512")
        started.append(name)
        if endings.get(name, 0) == 0:
            found = section(name, (), [record(Key("call", "no-grad", "float32", 4, None, 7), {})])
            found["environment"]["threads"] = int(command[command.index("--threads") + 1])
            stem = environment.file_stem(found["environment"])
            (Path(command[command.index("--output") + 1]) / f"{stem}.json").write_text(store.dumps({cpu.NAME: found}))
        return endings.get(name, 0)

    facts = section()["environment"]
    monkeypatch.setattr(environment, "describe", lambda device: dict(facts))
    monkeypatch.setattr(environment, "active_isa", lambda: "avx512")
    monkeypatch.setattr(cpu, "usable", lambda: list(cpu.SETS))
    monkeypatch.setattr(bench_cpu, "status_of", status_of)
    monkeypatch.setattr(bench_cpu, "failures", lambda name: wrong.get(name, []))
    return endings, started, wrong


@pytest.mark.parametrize(
    ("endings", "started", "status"),
    [
        ({}, ["amx", "amx", "avx2", "avx2"], 0),
        ({"amx": -4}, ["amx", "avx512", "avx512", "avx2", "avx2"], -4),
        ({"avx2": INTERRUPTED}, ["amx", "amx", "avx2"], INTERRUPTED),
        ({"amx": INTERRUPTED}, ["amx"], INTERRUPTED),
        ({"amx": MISTAKE}, ["amx"], MISTAKE),
    ],
    ids=str,
)
def test_the_best_kernels_are_measured_and_those_for_avx2(measured, tmp_path, capsys, endings, started, status):
    measured[0].update(endings)
    assert bench_cpu.main(["--output", str(tmp_path), "--threads", "2", "--processes", "2"]) == status
    assert measured[1] == started
    good = dict.fromkeys(name for name in started if name not in endings)
    printed = capsys.readouterr()
    assert (tmp_path / "table.md").exists() == bool(good)
    if good:
        table = (tmp_path / "table.md").read_text()
        assert all(f"({name}, 2 threads)" in table for name in good)
        assert "python -m benchmarks.report" in printed.out
    for path in tmp_path.glob("*.json"):
        found = store.read(path)[cpu.NAME]
        (only,) = found["records"]
        assert only["runs"] == [{}, {}] and only["timed"] == found["environment"]["samples"]["timed"] == 80
    assert all(f"{name}: the measurement ended with status {status}" in printed.err for name in endings)


def test_what_is_wrong_is_what_the_check_finds(monkeypatch):
    outcomes = [selfcheck.Outcome("convolutions", "cpu", "cpu", "float32", "amx", failures=found)
                for found in ([], ["x is off"], ["y is off"])]  # fmt: skip
    monkeypatch.setattr(selfcheck, "run_on", lambda isa: iter(outcomes))
    assert bench_cpu.failures("amx") == ["x is off", "y is off"]


def test_kernels_that_compute_something_else_are_not_measured(measured, tmp_path, capsys):
    measured[2]["amx"] = ["x is off"]
    assert bench_cpu.main(["--output", str(tmp_path), "--threads", "2", "--processes", "1"]) == 1
    assert measured[1] == ["avx512", "avx2"]
    assert "not measured, as results are wrong:\nx is off\n" in capsys.readouterr().err


@pytest.mark.parametrize("status", [INTERRUPTED, -signal.SIGINT, 0], ids=["measuring", "importing", "done"])
def test_what_an_interrupted_process_has_measured_is_waited_for(status, monkeypatch):
    class Process(contextlib.nullcontext):
        waits = 0

        def wait(self):
            self.waits += 1
            if self.waits == 1:
                raise KeyboardInterrupt
            return status

    process = Process()
    process.enter_result = process
    monkeypatch.setattr(bench_cpu.subprocess, "Popen", lambda *rest, **options: process)
    assert bench_cpu.status_of(["x"], {}) == INTERRUPTED and process.waits == 2


@pytest.mark.skipif(bool(convkernels.why_not("cpu")) or environment.native_module() is None, reason="not compiled")
def test_a_short_run_of_all(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(selfcheck, "run_on", lambda isa: iter(()))
    quick = "--processes 1 -- --seconds 0.001 --compile-seconds 0 --lengths 128 --dtypes float32".split()
    assert bench_cpu.main(["--output", str(tmp_path), "--threads", "1", *quick]) == 0
    best, *others = cpu.usable()
    paths = sorted(tmp_path.glob("*.json"))
    assert len(paths) == 1 + ("avx2" in others)
    found = {content["environment"]["isa"]: content for content in (json.loads(p.read_text())["cpu"] for p in paths)}
    assert set(found) == {best, *({"avx2"} & set(others))}
    for isa, content in found.items():
        facts = content["environment"]
        assert facts["binding"] == cores.binding() or facts["binding"].startswith("OMP_PROC_BIND=close")
        assert facts["samples"]["timed"] >= 3 * len(content["records"]) and not content["errors"]
        assert {r["case"] for r in content["records"]} >= {"call"}
        timed = [r for r in content["records"] if len(r["runs"][0]) > 1]
        rows = [row for row in cpu_tables.rows(content) if row[4] in ("met", "missed", "cores were shared")]
        assert len(rows) == sum(2 if r["case"] == "call" else 1 for r in timed), isa
    table, printed = (tmp_path / "table.md").read_text(), capsys.readouterr().out
    assert all(f"({isa}, 1 thread)" in table and f"({isa}, 1 thread)" in printed for isa in found)
    assert "by emulation: not timed" in table or best == "amx"


@pytest.mark.skipif(bool(convkernels.why_not("cpu")) or environment.native_module() is None, reason="not compiled")
def test_goals_for_other_kernels_can_be_timed(monkeypatch):
    """What only a processor with AMX times, with the kernels that there are."""
    monkeypatch.setattr(environment, "active_isa", lambda: "amx")
    suite = cpu.Suite(cpu.Settings(lengths=(128,), dtypes=("bfloat16",), compiled=False, seconds=1e-3), CPU)
    suite.run()
    assert not suite.errors and not suite.notes
    assert {r["case"] for r in suite.records} == {"attention", "attention, causal", "attention, D=128", "dynamic",
                                                  "lightweight"}  # fmt: skip
    assert all(len(r["runs"][0]) == 2 for r in suite.records if r["case"] != "dynamic")
    assert {(r["direction"], r["taps"]) for r in suite.records if r["case"] == "lightweight"} == {
        (direction, taps) for direction in (FORWARD, BACKWARD) for taps in (3, 7, 15, 31)
    }


def test_a_failure_of_ours_does_not_end_the_suite(monkeypatch):
    def fails(*rest, **options):
        raise RuntimeError("no such kernel")

    for name in ("lightweight_conv1d", "composite_attention"):
        monkeypatch.setattr(convkernels, name, fails)
    suite = cpu.Suite(cpu.Settings(compiled=False, seconds=1e-3), CPU)
    for key in (Key("attention", FORWARD, "float32", 128), Key("lightweight", FORWARD, "float32", 512, 2, 3),
                Key("call", "no-grad", "float32", 4, None, 7)):  # fmt: skip
        suite.measure(key)
    assert [error.split(", ")[0] for error in suite.errors] == [OURS] * 3
    assert all(error.endswith("RuntimeError: no such kernel") for error in suite.errors)
    assert [set(run) for r in suite.records for run in r["runs"]] == [{SDPA}]
    assert "not measured" in {row[4] for row in cpu_tables.rows(suite.section())}


def test_the_page_of_results_tells_of_times_that_shared_cores():
    section = json.loads((report.RESULTS / "amd-epyc-avx512-2threads.json").read_text())["acceptance"]
    for disturbed, notes in ((0, 0), (7, 1)):
        section["environment"]["samples"] = {timing.DISTURBED: disturbed}
        said = "\n\n".join(report.times({"acceptance": section}))
        assert said.count("Note: threads shared their cores in 7 of the suite's times.") == notes


def test_results_are_put_among_those_of_the_page(monkeypatch, tmp_path, capsys):
    kept, sent = tmp_path / "kept", tmp_path / "sent"
    kept.mkdir(), sent.mkdir()
    monkeypatch.setattr(report, "RESULTS", kept)
    monkeypatch.setattr(report, "PAGE", tmp_path / "page.md")
    old = section(records=[record(Key("call", "no-grad", "float32", 4, None, 7), {"F.conv1d": 1.0})])
    new = section(records=[record(Key("attention", FORWARD, "float32", 512), {OURS: 1.0, SDPA: 1.5})])
    (kept / "here.json").write_text(store.dumps({"sweep": old, "cpu": old}))
    (sent / "here.json").write_text(store.dumps({"cpu": new}))
    assert report.main([str(sent / "here.json")]) == 0
    assert store.read(kept / "here.json") == json.loads(store.dumps({"sweep": old, "cpu": new}))
    assert "| attention forward float32 T=512: of SDPA's time | avx512 | <= 0.82 | 0.667 | met |" in report.page()
    (sent / "other.json").write_text("{}")
    assert report.main([str(sent / "other.json")]) == 2
    assert "expected a results file, with measurements in it" in capsys.readouterr().err
    assert not (kept / "other.json").exists()


def test_which_kernels_run_is_not_known_without_the_module(monkeypatch):
    monkeypatch.setattr(environment, "native_module", lambda: None)
    with pytest.raises(Mistake, match="`make bench-cpu` builds it"):
        cpu.usable()


def test_files_of_kernels_below_those_of_the_machine_have_names_of_their_own():
    facts = {"device": "A CPU", "device_type": "cpu", "threads": 2, "torch": "2.13", "torch_isa": "AVX512"}
    assert environment.file_stem({**facts, "isa": "avx512"}) == "a-cpu-avx512-2threads"
    assert environment.file_stem({**facts, "isa": "amx"}) == "a-cpu-amx-2threads"
    assert environment.file_stem({**facts, "isa": "avx2"}) == "a-cpu-avx2-torch-avx512-2threads"
    assert environment.file_stem({**facts, "isa": "avx2", "torch_isa": "AVX2"}) == "a-cpu-avx2-2threads"
    assert environment.title({**facts, "isa": "avx2"}) == "A CPU (avx2, 2 threads), torch 2.13 on AVX512"
