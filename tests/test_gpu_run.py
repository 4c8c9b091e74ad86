"""The steps of a run on a GPU: none costs another anything."""

import importlib.util
import json
import signal
import tarfile
import time
from pathlib import Path

import pytest


@pytest.fixture
def gpu_run(tmp_path, monkeypatch):
    """scripts/gpu_run.py with its working folder elsewhere."""
    path = Path(__file__).parents[1] / "scripts" / "gpu_run.py"
    spec = importlib.util.spec_from_file_location("gpu_run", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(__import__("sys").modules, "gpu_run", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "GRACE", 0.2)
    monkeypatch.setattr(module, "sees_a_gpu", lambda: True)
    return module


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
        step("works", 1, 20, "echo all is well"),
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
    monkeypatch.setattr(gpu_run, "sees_a_gpu", lambda: False)
    steps = [gpu_run.Step("environment", 1, 20, "true"), gpu_run.Step("other", 1, 20, "true")]
    assert execute(gpu_run, monkeypatch, steps, "--output", tmp_path / "out") == 2
    assert "no GPU" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert execute(gpu_run, monkeypatch, steps, "--output", tmp_path / "out", "--only", "environment") == 0
    assert execute(gpu_run, monkeypatch, steps, "--output", tmp_path / "out", "--device", "cpu") == 0


def test_what_has_passed_is_not_run_again(gpu_run, monkeypatch, tmp_path):
    steps = [gpu_run.Step("counts", 1, 20, "echo x >> {results}/count"), gpu_run.Step("fails", 1, 20, "exit 1")]
    assert execute(gpu_run, monkeypatch, steps, "--output", tmp_path / "out", "--device", "cpu") == 1  # elsewhere
    (tmp_path / "build" / "gpu-work" / "results" / "count").unlink()
    for arguments, expected in ((), 1), ((), 1), (("--again",), 2):
        assert execute(gpu_run, monkeypatch, steps, "--output", tmp_path / "out", *arguments) == 1
        assert len((tmp_path / "build" / "gpu-work" / "results" / "count").read_text().split()) == expected


def test_a_step_that_does_not_exist(gpu_run, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        execute(gpu_run, monkeypatch, [gpu_run.Step("smoke", 1, 20, "true")], "--only", "smok1")
    assert "no step is meant by that" in capsys.readouterr().err


def test_an_output_folder_that_cannot_be_written_to_stops_nothing(gpu_run, monkeypatch, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    steps = [gpu_run.Step("one", 1, 20, "true"), gpu_run.Step("two", 1, 20, "true")]
    assert execute(gpu_run, monkeypatch, steps, "--output", tmp_path / "file") == 0
    printed = capsys.readouterr()
    assert "nothing saved" in printed.err and "2 of 2 steps passed" in printed.out


def test_steps_for_which_no_time_is_left_are_named(gpu_run, monkeypatch, tmp_path):
    steps = [gpu_run.Step("late", 1, 20, "true")]
    assert execute(gpu_run, monkeypatch, steps, "--output", tmp_path / "out", "--seconds", 1) == 1
    assert json.loads((tmp_path / "out" / "steps.json").read_text())["late"]["ended"] == "not begun"
