"""scripts/gpu_smoke.py: its cases pass, and what goes wrong is seen."""

import json
import sys
import time

import pytest
import torch
from conftest import device_of

gpu_smoke = pytest.importorskip("gpu_smoke", reason="a copy of the tests without the scripts")


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["gpu_smoke.py", *arguments])
    return int(gpu_smoke.main())


@pytest.mark.parametrize("group", ["band-bfloat16", "step", "attention-bfloat16-64"])
def test_a_group_passes(group, backend, monkeypatch, tmp_path):
    if backend != "cuda":
        pytest.skip("for the cuda backend")
    results = tmp_path / "results"
    with torch.device("cpu"):
        failed = run(monkeypatch, "--group", group, "--device", device_of(backend), "--json", str(results))
    cases = [json.loads(line) for line in results.read_text().splitlines()]
    assert not failed and len(cases) == sum(case.group == group for case in gpu_smoke.all_cases())


def test_errors_are_seen():
    expected = torch.tensor([3.0, -4.0, -torch.inf], dtype=torch.float64)
    assert gpu_smoke.error_of(expected.float(), expected) == 0
    assert gpu_smoke.error_of(torch.tensor([3.0, -3.5, -torch.inf]), expected) == pytest.approx(0.1)
    for wrong in ([3.0, torch.nan, -torch.inf], [3.0, -4.0, 0.0], [3.0, torch.inf, -torch.inf], [3.0, -4.0]):
        assert gpu_smoke.error_of(torch.tensor(wrong), expected) == float("inf")


def test_a_process_that_ends_badly_or_is_too_slow_fails(monkeypatch, capfd):
    reduce = ("--only", "reduce-float32", "--device", "cpu", "--backend", "cpu")
    assert run(monkeypatch, *reduce) == 0
    assert run(monkeypatch, *reduce, "--timeout", "0.5", "--under", "sh -c 'sleep 60; true'") == 1
    assert run(monkeypatch, *reduce, "--under", "false") == 1
    assert run(monkeypatch, *reduce, "--expect", "0 errors", "--under", "env") == 1
    assert run(monkeypatch, *reduce, "--expect", "0 errors", "--under", "sh -c '\"$@\"; echo 0 errors' sh") == 0
    said = capfd.readouterr().out
    assert "stopped after 0.5 s" in said and "exit status 1" in said and "has not said '0 errors'" in said


def test_what_has_been_found_is_there_when_the_rest_is_stopped(monkeypatch, tmp_path):
    """A group writes its results as soon as it has ended."""
    results, started = tmp_path / "results", gpu_smoke.start_group

    def stop(group, *others):
        deadline = time.monotonic() + 60
        while group == "reduce-float32" and time.monotonic() < deadline:
            if results.read_text():
                raise KeyboardInterrupt
            time.sleep(0.05)
        return started(group, *others)

    monkeypatch.setattr(gpu_smoke, "start_group", stop)
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, "--only", "reduce", "--device", "cpu", "--backend", "cpu", "--json", str(results))
    assert json.loads(results.read_text())["group"] == "reduce-bfloat16"
