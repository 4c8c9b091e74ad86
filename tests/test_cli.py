"""The command line: a mistake is one line and costs no measurement; results survive an interruption."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import convkernels
from benchmarks import cores, store, timing
from benchmarks.cli import main as measuring
from benchmarks.machine_code.__main__ import MODULES
from benchmarks.machine_code.__main__ import main as machine_code
from convkernels import cli
from convkernels.cli import console, environment, selfcheck

ROOT = Path(convkernels.__file__).parents[1]
QUICK = "bench --lengths 8,16 --dtypes float32 --channels 24 --heads 4 --tokens 32 --seconds 0.01 --compile-seconds 0"
COMMAND = (sys.executable, "-m", "convkernels.cli")


def start(*arguments, **options):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.PIPE, text=True, env=env, cwd=ROOT, **options)


def main(arguments):
    """`convkernels`; its bench and plot here, where it would become another program."""
    return (measuring if arguments[0] in cli.MEASURING else cli.main)(arguments)


def refused(capsys, command, program=main):
    """What the command line says on the way to exit status 2, without having printed a result."""
    try:
        status = program(command.split(" ") if isinstance(command, str) else command)
    except SystemExit as error:
        status = error.code
    printed = capsys.readouterr()
    assert status == 2 and not printed.out
    return printed.err


@pytest.fixture
def nothing_runs(monkeypatch):
    from benchmarks.suites import acceptance, attention, cpu, streaming, sweep

    def run(*rest):
        raise AssertionError("something was measured")

    suites = [acceptance.Acceptance, attention.Suite, cpu.Suite, streaming.Streaming, sweep.Sweep]
    if importlib.util.find_spec("transformers"):
        suites.append(importlib.import_module("benchmarks.suites.models").Suite)
    for suite in suites:
        monkeypatch.setattr(suite, "run", run)
    monkeypatch.setattr(selfcheck, "run", run)


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("bench --device nonsense", "--device: expected cpu or cuda, got 'nonsense'"),
        ("bench --device mps", "expected cpu or cuda, got 'mps'"),
        ("bench --device meta", "expected cpu or cuda, got 'meta'"),
        ("bench --heads 7 --no-plots", "--heads 7: expected a divisor of the channels, --channels 768"),
        ("bench --suite attention --heads 7 --no-plots", "--heads 7: expected a divisor of the channels"),
        ("bench --seconds -1", "--seconds: expected a number of seconds above 0, got '-1'"),
        ("bench --slow-call nan", "expected a number of seconds above 0"),
        ("bench --compile-seconds -1", "expected a number of seconds from 0 on"),
        ("bench --dtypes float32,float32", "--dtypes: float32 is given twice"),
        ("bench --dtypes int8", "expected some of float32"),
        ("bench --lengths ", "--lengths: expected a whole number from 1 to 16777216, got ''"),
        ("bench --taps 99999999999999999999", "--taps: expected a whole number from 1 to 16777216, got '999"),
        ("bench --threads 100000", "--threads 100000: this process has "),
        ("bench --lengths 8,8", "8 is given twice"),
        ("bench --max-length 32 --no-plots", "--max-length 32: nothing would be measured, the shortest length is 64"),
        ("bench --backend cpu", "--backend has no effect on the suite sweep; it is for: attention, streaming"),
        ("bench --suite streaming --lengths 8,16", "the suite streaming measures one length"),
        ("bench --suite streaming --heads 4", "--heads has no effect on the suite streaming"),
        ("bench --suite acceptance --compile-seconds 5", "takes 0 only"),
        ("bench --models seq2seq --no-plots", "--models has no effect on the suite sweep; it is for: models"),
        ("bench --suite models --heads 4", "--heads has no effect on the suite models"),
        ("bench --suite models --models t5", "--models: expected some of seq2seq, bert, got t5"),
        ("bench --suite acceptance --dtypes float16", "the targets are for float32, bfloat16"),
        ("bench --suite cpu --lengths 512,64", "--lengths 64: the goals are for 128, 512, 2048"),
        ("bench --suite cpu --dtypes float16", "--dtypes float16: the goals are for bfloat16, float32"),
        ("bench --suite cpu --batch 2", "--batch has no effect on the suite cpu"),
        ("plot /nonexistent.json", "/nonexistent.json: expected a results file"),
        (f"plot {ROOT}", "expected a results file"),
        (f"plot {ROOT}/README.md", "expected a results file"),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_measured(capsys, nothing_runs, command, said):
    message = refused(capsys, command)
    assert said in message and "Traceback" not in message


@pytest.mark.parametrize("name", ["CONVKERNELS_BACKEND", "CONVKERNELS_CPU_ISA"])
def test_variables_are_named(capsys, nothing_runs, monkeypatch, name):
    if name == "CONVKERNELS_CPU_ISA" and environment.native_module() is None:
        pytest.skip("nothing reads it without native kernels")
    monkeypatch.setenv(name, "sse")
    for command in ("info", "check", QUICK):
        assert f"environment variable '{name}': expected one of" in refused(capsys, command)


def test_instruction_sets_of_other_machines_are_refused(capsys, monkeypatch):
    native = environment.native_module()
    missing = [name for name in native.compiled_isas() if not native.isa_supported(name)] if native else []
    for name in missing:
        monkeypatch.setenv("CONVKERNELS_CPU_ISA", name)
        said = refused(capsys, "info")
        assert "'CONVKERNELS_CPU_ISA': expected one of" in said and f"which this machine can run, got '{name}'" in said


def test_bench_checks_where_it_writes_first(capsys, nothing_runs, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    for folder in (file, "/proc/convkernels"):
        assert "expected a folder that can be written to" in refused(capsys, f"{QUICK} --no-plots --output {folder}")


RECORD = {"line": "x", "op": "y", "direction": "forward", "dtype": "float32", "length": 8, "batch": 1, "flops": 1}


@pytest.mark.parametrize(
    "broken",
    [
        {"records": [1, 2]},
        {"records": [{}]},
        {"records": [{**RECORD, "length": [1]}]},
        {"records": [RECORD], "settings": {}},
        {"records": [RECORD], "settings": {"lengths": 5}},
        {"records": [RECORD], "notes": 5},
        {"records": [RECORD], "work": 3},
    ],
    ids=str,
)
def test_results_that_no_suite_wrote(capsys, monkeypatch, nothing_runs, tmp_path, broken):
    """Are said before anything is measured, and when they are drawn."""
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(environment, "file_stem", lambda environment: "here")
    monkeypatch.setattr(store, "differences", lambda old, new: [])
    covered = {"lengths": [8], "dtypes": ["float32"], "padding": {}}
    section = {"environment": {}, "settings": covered, "work": [], "notes": [], **broken}
    path = tmp_path / "here.json"
    path.write_text(json.dumps({"sweep": section}))
    if broken["records"] != [{}]:
        message = refused(capsys, f"{QUICK} --no-plots --output {tmp_path}")
        assert f"{path}: its part sweep (--overwrite replaces it): expected what" in message
    assert f"{path}: its part sweep: expected what" in refused(capsys, f"plot {path}")


def test_sizes_for_which_there_is_no_memory(capsys, monkeypatch, tmp_path):
    from benchmarks.suites import sweep

    measure = sweep.Sweep.measure

    def later(suite, length, *rest):
        return measure(suite, length, *rest) if length == 8 else torch.empty(2**50)

    monkeypatch.setattr(sweep.Sweep, "measure", later)
    assert main(f"{QUICK} --no-plots --output {tmp_path}".split()) == 1
    printed = capsys.readouterr()
    assert "not enough memory for these sizes" in printed.err and re.search("^lightweight +8 ", printed.out, re.M)


def test_output_that_cannot_be_written():
    for shell in ("exec {} info > /dev/full", "exec {} info >&-"):
        command = shell.format(" ".join(COMMAND))
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        ended = subprocess.run(["bash", "-c", command], env=env, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        full = "full" in shell
        assert ended.stderr == ("convkernels info: No space left on device\n" if full else "")
        assert ended.returncode == int(full)


@pytest.mark.parametrize("content", ["{", "[1]"])
def test_bench_does_not_touch_a_broken_file(capsys, nothing_runs, monkeypatch, tmp_path, content):
    monkeypatch.setattr(environment, "file_stem", lambda environment: "here")
    path = tmp_path / "here.json"
    path.write_text(content)
    assert "here.json: expected a results file" in refused(capsys, f"{QUICK} --no-plots --output {tmp_path}")
    assert path.read_text() == content


def test_missing_modules_are_said_first(capsys, nothing_runs, monkeypatch, tmp_path):
    found = console.importlib.util.find_spec
    monkeypatch.setattr(
        console.importlib.util, "find_spec", lambda name: None if name in ("matplotlib", "numpy") else found(name)
    )
    message = refused(capsys, f"{QUICK} --output {tmp_path}")
    assert "needs matplotlib, which is not installed: pip install matplotlib" in message and "--no-plots" in message
    assert "check needs numpy" in refused(capsys, "check")


def test_interrupted_bench_keeps_and_prints_what_it_has(tmp_path):
    options = "bench --lengths 64,128 --compile-seconds 0 --seconds 30 --tokens 1024 --no-plots --output"

    def listens():
        """What a shell starts in the background ignores Ctrl-C, and so does all that this starts."""
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    process = start(*options.split(), str(tmp_path), stderr=subprocess.PIPE, preexec_fn=listens)
    try:
        end = time.monotonic() + 300
        while not list(tmp_path.glob("*.json")) and process.poll() is None and time.monotonic() < end:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        printed, said = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130, said
    assert "Traceback" not in said and "interrupted" in said
    (path,) = tmp_path.iterdir()
    section = json.loads(path.read_text())["sweep"]
    assert {record["length"] for record in section["records"]} >= {64}
    assert re.search(r"^forward, float32, C=768", printed, re.MULTILINE) and re.search(
        r"^lightweight +64 ", printed, re.M
    )


def test_a_shorter_sweep_keeps_the_longer_one(capsys, tmp_path):
    def run(options=""):
        status = main(f"{QUICK} --no-plots --output {tmp_path} {options}".split())
        (path,) = tmp_path.iterdir()
        return status, json.loads(path.read_text())["sweep"]

    status, before = run()
    assert status == 0 and before["settings"]["lengths"] == [8, 16]
    status, after = run("--lengths 16")
    assert status == 0 and after["settings"]["lengths"] == [8, 16]

    def of(section, length):
        return [record for record in section["records"] if record["length"] == length]

    assert of(after, 8) == of(before, 8) and of(after, 16) != of(before, 16)
    assert len(of(after, 16)) == len(of(before, 16)) and len(after["work"]) == len(before["work"])
    capsys.readouterr()
    message = refused(capsys, f"{QUICK} --no-plots --output {tmp_path} --taps 3")
    assert "taps: 7, not 3" in message and "--overwrite" in message
    status, after = run("--taps 3 --lengths 16 --overwrite")
    assert status == 0 and after["settings"]["taps"] == 3 and not of(after, 8)


def test_results_are_written_whole_or_not_at_all(monkeypatch, tmp_path):
    path = tmp_path / "results.json"
    store.write(path, "{}")

    def fail(*rest):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store.os, "replace", fail)
    section = store.Store(path, "sweep", {}, True)
    section.save({"records": [1]})
    assert "No space left" in section.error
    assert path.read_text() == "{}" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("content", [{"sweep": {}}, {}, {"sweep": "x"}])
def test_plot_of_nothing(capsys, tmp_path, content):
    pytest.importorskip("matplotlib")
    path = tmp_path / "results.json"
    path.write_text(json.dumps(content))
    assert "holds no measurements to draw" in refused(capsys, f"plot {path}")


def test_plot_takes_a_folder_that_holds_one_file(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    assert "got no .json in the folder" in refused(capsys, f"plot {tmp_path}")
    (tmp_path / "one.json").write_text("{}")
    assert "one.json holds no measurements" in refused(capsys, f"plot {tmp_path}")
    (tmp_path / "two.json").write_text("{}")
    assert "got one.json, two.json in the folder" in refused(capsys, f"plot {tmp_path}")


def test_bench_warns_of_a_busy_machine(capsys, monkeypatch, tmp_path):
    def warned(threads, busy):
        monkeypatch.setattr(timing, "busy_cpus", lambda: busy)
        options = f"{QUICK} --lengths 8 --threads {threads} --no-plots --overwrite --output {tmp_path}"
        assert main(options.split()) == 0
        (path,) = tmp_path.glob(f"*{threads}threads.json")
        recorded = json.loads(path.read_text())["sweep"]["environment"].get("busy_cpus")
        printed = capsys.readouterr()
        assert ("CPUs busy" in printed.out) == bool(recorded) == ("other processes keep" in printed.err)
        return recorded

    before, cpus = torch.get_num_threads(), len(cores.own())
    try:
        assert warned(cpus, 0.1) is None and warned(cpus, 0.7) == 0.7 and warned(1, cpus - 0.2) == cpus - 0.2
        assert cpus == 1 or warned(1, 0.7) is None
    finally:
        torch.set_num_threads(before)


def test_busy_cpus_counts_others():
    idle = timing.busy_cpus()
    assert 0 <= idle <= len(cores.own())
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:
        time.sleep(0.2)
        busy = timing.busy_cpus()
        other.kill()
    assert not Path("/proc/stat").exists() or busy > 0.5


def test_help_names_the_defaults(capsys, monkeypatch):
    from benchmarks.suites import acceptance, attention, cpu, streaming, sweep

    monkeypatch.setenv("COLUMNS", "200")  # no name is cut at its hyphen
    with pytest.raises(SystemExit):
        main(["bench", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    kinds = {"sweep": sweep, "attention": attention, "acceptance": acceptance, "cpu": cpu}
    kinds["streaming"] = streaming
    defaults = {name: module.Settings() for name, module in kinds.items()}
    assert f"(default: {defaults['sweep'].seconds:g})" in text
    for name, settings in defaults.items():
        for option in ("seconds", "slow_call", "stop_call"):
            if hasattr(settings, option) and (name, option) != ("sweep", "seconds"):
                assert re.search(rf"{name} {getattr(settings, option):g}[,)]", text), (name, option)
    assert f"(default: {defaults['sweep'].compile_seconds:g})" in text and "(default: convkernels-bench)" in text


def test_plot_of_a_dtype_that_was_not_measured(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    section = {"environment": {}, "settings": {}, "records": [{"dtype": "float32"}]}
    (tmp_path / "results.json").write_text(json.dumps({"sweep": section}))
    message = refused(capsys, f"plot {tmp_path / 'results.json'} --dtypes float16")
    assert "--dtypes float16: the results are for float32" in message


def test_a_closed_pipe_is_no_traceback():
    process = start("info", stderr=subprocess.PIPE)
    process.stdout.close()
    said = process.stderr.read()
    process.stderr.close()
    assert process.wait(60) == console.PIPE_CLOSED and not said


@pytest.mark.parametrize("backend", MODULES)
def test_kernels_that_do_not_exist_are_said_at_once(capsys, backend):
    begin = time.monotonic()
    message = refused(capsys, f"--backend {backend} --only zzz", machine_code)
    assert "--only zzz: no kernel" in message or "not" in message
    assert time.monotonic() - begin < 60


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("--backend cpu", "invalid choice: 'cpu'"),
        ("--backend cuda --only x --update-budget", "replaces the whole budget: leave out --only"),
        ("--update-budget", "add --backend"),
        ("--architectures ninety", "expected a whole number"),
    ],
)
def test_mistakes_about_machine_code_are_one_line(capsys, command, said):
    assert said in refused(capsys, command, machine_code)


def test_an_installed_package_says_where_the_benchmarks_are(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(cli, "ROOT", tmp_path)
    for command in ("bench", "plot results.json"):
        message = refused(capsys, command, cli.main)
        assert "the benchmarks are not installed: run `make bench`" in message
    assert "benchmarks" not in {path.name for path in tmp_path.iterdir()}


def test_nothing_but_the_reference_is_not_measured(capsys, monkeypatch, nothing_runs):
    monkeypatch.delenv("CONVKERNELS_BACKEND", raising=False)
    monkeypatch.setattr(convkernels, "why_not", lambda *_, **__: ["not compiled"])
    assert "no kernels to measure: not compiled; `make bench` compiles them" in refused(capsys, "bench")


def test_benchmarks_of_the_current_folder_are_not_taken(tmp_path):
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "__init__.py").touch()
    command = [sys.executable, "-m", "convkernels", "bench", "--help"]
    ended = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=tmp_path, capture_output=True, text=True
    )
    assert ended.returncode == 0 and "--suite" in ended.stdout, ended.stderr


def test_check_names_its_parts_and_instruction_sets(capsys):
    assert main(["check", "--backend", "cpu"] if not convkernels.why_not("cpu") else ["check"]) == 0
    printed = capsys.readouterr().out
    assert "FAIL" not in printed and "convolutions" in printed and "attention" in printed
    assert "models" in printed
    native = environment.native_module()
    if native and "CONVKERNELS_CPU_ISA" not in os.environ:
        (line,) = re.findall(r"^CPU instruction sets checked: (.*)$", printed, re.MULTILINE)
        assert set(line.split(", ")) == {name for name in native.compiled_isas() if native.isa_supported(name)}
        assert f"CPU instruction set in use: {native.active_isa()} (chosen automatically)" in printed
