"""The steps of a run on a GPU: none costs another anything."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

import convkernels

ROOT = Path(__file__).resolve().parents[1]
script = pytest.importorskip("gpu_run", reason="a copy of the tests without the scripts")


@pytest.fixture
def gpu_run(tmp_path, monkeypatch):
    """scripts/gpu_run.py with its working folder elsewhere."""
    monkeypatch.setattr(script, "ROOT", tmp_path)
    monkeypatch.setattr(script, "GRACE", 0.2)
    monkeypatch.setattr(script, "look_for_a_gpu", lambda: ("a GPU", ""))
    monkeypatch.setattr(script, "adopt_orphans", lambda: None)  # those of this process are others' too
    return script


def work_of(folder, *names):
    """A file of the only run in it."""
    (found,) = (folder / "build" / "gpu-work").glob("/".join(["*", *names]))
    return found


def execute(module, monkeypatch, steps, *arguments):
    monkeypatch.setattr(module, "STEPS", tuple(steps))
    monkeypatch.setattr("sys.argv", ["gpu_run.py", *map(str, arguments)])
    return module.main()


def test_a_step_that_goes_wrong_costs_only_itself(gpu_run, monkeypatch, tmp_path):
    step = gpu_run.Step
    steps = [
        step("fails", 1, 20, "echo before; exit 3"),
        step("hangs", 1, 0.5, "trap '' INT; echo waiting; sleep 60 & sleep 60"),
        step("crashes", 1, 20, "kill -SEGV $$"),
        step("writes", 1, 20, "echo '{{}}' > {results}/figures.json"),
        step("starts nothing", 1, 20, "no-such-program"),
        step("measures nothing", 1, 20, "true"),
        step("works", 1, 20, "touch {result}; echo all is well"),
    ]
    out, start = tmp_path / "out", time.monotonic()
    assert execute(gpu_run, monkeypatch, steps, "--output", out) == 1
    assert time.monotonic() - start < 10
    ended = {name: outcome["ended"] for name, outcome in json.loads((out / "steps.json").read_text()).items()}
    assert ended == {
        "fails": "status 3",
        "hangs": "longer than 0 s",
        "crashes": "status -11",
        "writes": "passed",
        "starts nothing": "status 127",
        "measures nothing": "left no result",
        "works": "passed",
    }
    with tarfile.open(out / "results.tar.gz") as results:
        assert results.extractfile("results/figures.json").read() == b"{}\n"
    with tarfile.open(out / "logs.tar.gz") as logs:
        assert logs.extractfile("logs/fails.log").read() == b"before\n"
        assert logs.extractfile("logs/hangs.log").read() == b"waiting\n"


def test_steps_are_asked_to_end_in_the_background_too(gpu_run, monkeypatch, tmp_path):
    """Where SIGINT is ignored; a shell cannot trap what was ignored when it began."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    monkeypatch.setattr(gpu_run, "GRACE", 5.0)
    steps = [gpu_run.Step("hangs", 1, 1.0, "trap 'echo asked; exit 1' INT; sleep 60 & wait")]
    try:
        assert execute(gpu_run, monkeypatch, steps, "--output", tmp_path / "out") == 1
    finally:
        signal.signal(signal.SIGINT, before)
    assert json.loads((tmp_path / "out" / "steps.json").read_text())["hangs"]["last"] == "asked"


def test_without_a_gpu_nothing_but_the_environment_is_looked_at(gpu_run, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu_run, "look_for_a_gpu", lambda: ("", "the driver is too old"))
    steps = [gpu_run.Step("environment", 1, 20, "touch {result}"), gpu_run.Step("other", 1, 20, "touch {result}")]
    assert execute(gpu_run, monkeypatch, steps, "--output", tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert "no GPU that works: the driver is too old" in said and "not run: other" in said
    assert set(json.loads((tmp_path / "out" / "steps.json").read_text())) == {"environment"}
    assert execute(gpu_run, monkeypatch, steps, "--output", tmp_path / "out", "--device", "cpu") == 0


def test_what_has_passed_is_not_run_again(gpu_run, monkeypatch, tmp_path):
    steps = [gpu_run.Step("counts", 1, 20, "echo x >> {results}/count"), gpu_run.Step("fails", 1, 20, "exit 1")]
    assert execute(gpu_run, monkeypatch, steps, "--output", tmp_path / "out", "--device", "cpu") == 1  # elsewhere
    for arguments, expected in ((), 1), ((), 1), (("--again",), 2):
        assert execute(gpu_run, monkeypatch, steps, "--output", tmp_path / "out", *arguments) == 1
        assert len(work_of(tmp_path, "results", "count").read_text().split()) == expected


def test_what_others_gave_is_not_taken_over(gpu_run, monkeypatch, tmp_path):
    """Where a file has changed since, or the GPU is another: no step has passed, and no result is there."""
    (tmp_path / "scripts").mkdir()
    steps = [gpu_run.Step("counts", 1, 20, "echo x >> {results}/count")]
    for text, gpu in (("1", "one"), ("2", "one"), ("2", "other"), ("2", "other")):
        (tmp_path / "scripts" / "a.py").write_text(text)
        monkeypatch.setattr(gpu_run, "look_for_a_gpu", lambda gpu=gpu: (gpu, ""))
        assert execute(gpu_run, monkeypatch, steps, "--output", tmp_path / "out") == 0
        with tarfile.open(tmp_path / "out" / "results.tar.gz") as results:
            assert results.extractfile("results/count").read() == b"x\n"
    assert len(list((tmp_path / "build" / "gpu-work").glob("*/steps.json"))) == 3


@pytest.mark.parametrize("more", [(), ("--only", "smoke")])
def test_a_step_that_does_not_exist(gpu_run, monkeypatch, capsys, more):
    with pytest.raises(SystemExit):
        execute(gpu_run, monkeypatch, [gpu_run.Step("smoke test", 1, 20, "touch {result}")], "--only", "smok1", *more)
    assert "--only smok1: expected part of one of smoke-test" in capsys.readouterr().err


def test_names_of_steps_as_files_have_them(gpu_run, monkeypatch, tmp_path):
    steps = [
        gpu_run.Step(name, 1, 20, "touch {result}") for name in ("cuda tests", "slow cuda tests", "streaming cuda")
    ]
    assert execute(gpu_run, monkeypatch, steps, "--output", tmp_path / "out", "--only", "Streaming-cuda") == 0
    assert set(json.loads((tmp_path / "out" / "steps.json").read_text())) == {"streaming cuda"}


def test_an_output_folder_that_cannot_be_written_to_stops_nothing(gpu_run, monkeypatch, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    steps = [gpu_run.Step("one", 1, 20, "touch {result}"), gpu_run.Step("two", 1, 20, "touch {result}")]
    assert execute(gpu_run, monkeypatch, steps, "--output", tmp_path / "file") == 1
    printed = capsys.readouterr()
    assert "not saved" in printed.err and "2 of 2 steps passed; not saved: " in printed.out


def test_steps_for_which_no_time_is_left_are_named(gpu_run, monkeypatch, tmp_path, capsys):
    steps = [gpu_run.Step("late", 1, 20, "touch {result}")]
    assert execute(gpu_run, monkeypatch, steps, "--output", tmp_path / "out", "--seconds", 1) == 1
    assert json.loads((tmp_path / "out" / "steps.json").read_text())["late"]["ended"] == "not begun"
    assert "late               not begun: too little is left of --seconds 1" in capsys.readouterr().out


def test_a_step_that_fails_leaves_no_result_of_a_time_before(gpu_run, monkeypatch, tmp_path):
    for command, ended in (("touch {result}.xml", 0), ("exit 1", 1)):
        steps = [gpu_run.Step("tests", 1, 20, command)]
        assert execute(gpu_run, monkeypatch, steps, "--output", tmp_path / "out", "--again") == ended
        with tarfile.open(tmp_path / "out" / "results.tar.gz") as results:
            assert len(results.getnames()) == 1 - ended


def test_a_record_that_was_cut_off_stops_nothing(gpu_run, monkeypatch, tmp_path):
    steps = [gpu_run.Step("one", 1, 20, "touch {result}")]
    for cut_off in (None, '{"one": {"end', "[1]"):
        if cut_off:
            work_of(tmp_path, "steps.json").write_text(cut_off)
        assert execute(gpu_run, monkeypatch, steps, "--output", tmp_path / "out") == 0
        assert json.loads(work_of(tmp_path, "steps.json").read_text())["one"]["ended"] == "passed"


def test_a_step_that_is_at_work_has_not_passed(gpu_run, monkeypatch, tmp_path):
    """Whatever ends all processes then."""
    steps = [gpu_run.Step("one", 1, 20, "cp {results}/../steps.json {result}")]
    for _ in range(2):
        assert execute(gpu_run, monkeypatch, steps, "--output", tmp_path / "out", "--again") == 0
        assert json.loads(work_of(tmp_path, "results", "one").read_text())["one"]["ended"] == "stopped"


def test_two_at_once(gpu_run, monkeypatch, tmp_path, capsys):
    inner = [gpu_run.Step("inner", 1, 20, "touch {result}")]

    def run_meanwhile(*arguments):
        assert execute(gpu_run, monkeypatch, inner, "--output", tmp_path / "other") == 2
        return gpu_run.PASSED

    monkeypatch.setattr(gpu_run, "run", run_meanwhile)
    assert execute(gpu_run, monkeypatch, [gpu_run.Step("outer", 1, 20, "")], "--output", tmp_path / "out") == 0
    assert "another one is at work" in capsys.readouterr().err and not (tmp_path / "other").exists()


def test_a_folder_with_spaces(gpu_run, monkeypatch, tmp_path):
    (tmp_path / "with a space").mkdir()
    monkeypatch.setattr(gpu_run, "ROOT", tmp_path / "with a space")
    steps = [gpu_run.Step("one", 1, 20, "{python} -c pass && touch {result}.txt {results}/two")]
    assert execute(gpu_run, monkeypatch, steps, "--output", tmp_path / "out") == 0
    with tarfile.open(tmp_path / "out" / "results.tar.gz") as results:
        assert sorted(results.getnames()) == ["results/one.txt", "results/two"]


def test_a_part_fits_its_command(gpu_run, monkeypatch, tmp_path):
    steps = [gpu_run.Step(f"part {n}", n, 1000, "sleep 9") for n in (1, 2)]
    monkeypatch.setattr(gpu_run, "PART", 6.0)
    assert execute(gpu_run, monkeypatch, steps, "--output", tmp_path / "out", "--part", 1) == 1
    assert json.loads((tmp_path / "out" / "steps.json").read_text())["part 1"]["ended"] == "longer than 6 s"


FAULTS = """
import os, time, pytest, torch

@pytest.mark.parametrize("number", range(8))
def test_right(number):
    pass

def test_wrong():
    assert 1 + 1 == 3

def test_crashes():
    os.abort()

def test_hangs():
    time.sleep(60)

def test_leaves_an_error_behind():
    def fail():
        raise RuntimeError("an illegal memory access was encountered")
    torch.cuda.is_initialized, torch.cuda.synchronize = lambda: True, fail
"""


@pytest.mark.slow
def test_a_test_that_goes_wrong_costs_only_itself(gpu_run, monkeypatch, tmp_path):
    from gpu_steps import PYTEST

    (tmp_path / "test_faults.py").write_text(FAULTS)
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    command = PYTEST + " -n 2 --timeout 5 test_faults.py"
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])  # conftest.py imports helpers of the tests
    steps = [
        gpu_run.Step("faults", 1, 400, command, {"PYTHONPATH": paths}),
        gpu_run.Step("next", 1, 20, "touch {result}"),
    ]
    assert execute(gpu_run, monkeypatch, steps, "--output", tmp_path / "out") == 1
    outcomes = json.loads((tmp_path / "out" / "steps.json").read_text())
    log = work_of(tmp_path, "logs", "faults.log").read_text()
    assert (outcomes["faults"]["ended"], outcomes["next"]["ended"]) == ("status 1", "passed"), log
    # One of them has passed before its error is seen.
    assert outcomes["faults"]["last"].startswith("4 failed, 9 passed"), log
    for name in ("crashes", "hangs", "leaves_an_error_behind"):
        assert f"crashed while running 'test_faults.py::test_{name}'" in log
    assert "FAILED test_faults.py::test_wrong" in log
    assert "test_leaves_an_error_behind: an illegal memory access was encountered" in log
    with tarfile.open(tmp_path / "out" / "results.tar.gz") as results:
        assert results.extractfile("results/faults.xml").read().count(b"test_right") == 8


def test_a_full_output_folder_keeps_what_it_has(gpu_run, monkeypatch, tmp_path, capsys):
    """Where no file may be larger than 20 kB, an archive of 100 kB of noise does not get to its end."""
    out, noise = tmp_path / "out", "head -c 100000 /dev/urandom > {results}/noise"
    steps = [gpu_run.Step("small", 1, 20, "touch {result}")]
    assert execute(gpu_run, monkeypatch, steps, "--output", out) == 0
    before = (out / "results.tar.gz").read_bytes()
    pack, limits = gpu_run.pack, resource.getrlimit(resource.RLIMIT_FSIZE)

    def pack_without_space(*arguments):
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        try:
            return pack(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(gpu_run, "pack", pack_without_space)
    steps += [gpu_run.Step("large", 1, 20, noise), gpu_run.Step("next", 1, 20, "touch {result}")]
    assert execute(gpu_run, monkeypatch, steps, "--output", out) == 1
    assert "not saved" in capsys.readouterr().err
    assert {file.name for file in out.iterdir()} == {"steps.json", "results.tar.gz", "logs.tar.gz"}
    assert (out / "results.tar.gz").read_bytes() == before
    assert json.loads((out / "steps.json").read_text())["next"]["ended"] == "passed"


def test_archives_stay_small(gpu_run, monkeypatch, tmp_path, capsys):
    """Of a log the ends are kept, of results the smaller ones, and a step that writes without end is ended."""
    for name, size in (("LARGEST_ARCHIVE", 50_000), ("SHOWN", 1000), ("LONGEST_LOG", 10 << 20)):
        monkeypatch.setattr(gpu_run, name, size)
    steps = [
        gpu_run.Step("large", 1, 20, "head -c 100000 /dev/urandom > {result}; echo few > {results}/few"),
        gpu_run.Step("long", 1, 20, "touch {result}; echo first; seq 10000; echo last"),
        gpu_run.Step("endless", 1, 20, "echo first; yes"),
    ]
    assert execute(gpu_run, monkeypatch, steps, "--output", tmp_path / "out") == 1
    outcomes = json.loads((tmp_path / "out" / "steps.json").read_text())
    assert [outcomes[step.name]["ended"] for step in steps] == ["passed", "passed", "over 10 MB of output"]
    assert "results/large: too large for the archive" in capsys.readouterr().err
    with tarfile.open(tmp_path / "out" / "results.tar.gz") as results:
        assert {Path(name).name for name in results.getnames()} == {"few", "long"}
    with tarfile.open(tmp_path / "out" / "logs.tar.gz") as logs:
        for name, last in (("long", b"last\n"), ("endless", b"y\n")):
            log = logs.extractfile(f"logs/{name}.log").read()
            assert log.startswith(b"first\n") and log.endswith(last) and b"are left out here" in log and len(log) < 2100


MAIN = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import gpu_run
gpu_run.ROOT, gpu_run.GRACE, gpu_run.look_for_a_gpu = Path.cwd(), 0.5, lambda: ("a GPU", "")
gpu_run.STEPS = (gpu_run.Step("leaves", 1, 20, sys.argv[2]), gpu_run.Step("next", 1, 20, "touch {result}"))
sys.argv[1:] = []
sys.exit(gpu_run.main())
"""


def start(command, folder, **options):
    program = [sys.executable, "-c", MAIN, str(ROOT / "scripts"), command]
    return subprocess.Popen(program, cwd=folder, env={**os.environ, "OUT": str(folder / "out")}, **options)


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_nothing_that_a_step_started_is_left(tmp_path):
    """Not what has a session of its own either, and asks not to be ended."""
    command = "setsid bash -c 'trap \"\" INT TERM; echo $$ > pid; touch {result}; sleep 60 & wait' & sleep 1"
    assert start(command, tmp_path).wait(30) == 0
    assert not is_running((tmp_path / "pid").read_text().strip())


@pytest.mark.parametrize("request_", [signal.SIGTERM, signal.SIGHUP])
def test_who_ends_the_run_gets_what_there_is(tmp_path, request_):
    process = start("trap '' INT; echo begun; touch started; sleep 60 & wait", tmp_path)
    deadline = time.monotonic() + 30
    while not (tmp_path / "started").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    for _ in range(2):  # also where the request is repeated
        process.send_signal(request_)
        time.sleep(0.2)
    assert process.wait(30) == 130
    assert json.loads((tmp_path / "out" / "steps.json").read_text())["leaves"]["ended"] == "stopped"
    with tarfile.open(tmp_path / "out" / "logs.tar.gz") as logs:
        assert logs.extractfile("logs/leaves.log").read() == b"begun\n"


def test_nobody_listens_any_more(tmp_path):
    process = start("touch {result}", tmp_path, stdout=subprocess.PIPE)
    process.stdout.close()
    assert process.wait(30) == 0
    assert json.loads((tmp_path / "out" / "steps.json").read_text())["next"]["ended"] == "passed"


@pytest.mark.parametrize(("backend", "status"), [("cpu", 0), ("cuda", 4)])
def test_skipped_tests_of_a_backend_that_must_run_are_no_success(backend, status, tmp_path):
    if convkernels.why_not("cpu") or not convkernels.why_not("cuda", device="cuda"):
        pytest.skip("without cpu, or with cuda")
    (tmp_path / "test_it.py").write_text("def test_it(backend):\n    pass\n")
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", backend, "--require", backend, "."]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "CONVKERNELS_SIMT": "0"}
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.returncode == status, ran.stdout + ran.stderr
    assert ("--require cuda: " in ran.stderr) == (status != 0)
