"""Everything that only a GPU can show, most valuable first: python scripts/gpu_run.py [--part 1] [--only NAME ...].

Every step is a process of its own with its own time limit: one that fails, hangs or crashes costs only itself. After
each step its log and what has been measured so far are in the output folder (--output, else $OUT, else build/gpu), as a
few files that are small enough to carry away: steps.json, logs.tar.gz, results.tar.gz. A step that has passed is not
run again by the next call in this checkout. The exit status is 1 where a step did not pass. docs/gpu.md says what each
result decides.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GRACE = 10.0  # seconds between the request to end, on which pytest and the benchmarks write what they have, and the end
PASSED = "passed"
SLOWER = 10  # times as long a step may take in a rehearsal


@dataclass(frozen=True)
class Step:
    """command: of the shell; {python} is the interpreter, {results} the folder of results, {device} what it runs on."""

    name: str
    part: int
    seconds: float
    command: str
    environment: dict[str, str] = field(default_factory=dict)


PYTEST = "{python} -m pytest -q -p no:cacheprovider --timeout=120 --timeout-method=thread -rfE --tb=short"
BENCH = "{python} -m convkernels.cli bench --device {device} --overwrite --output {results}"
ATTENTION = BENCH + " --suite attention --dtypes bfloat16 --batch 8 --seconds 1"
# Without torch's memory pool, so that every tensor has an end that can be overrun. Other kernels than these are neither
# slowed nor reported, but initcheck has to see who else writes, and memory must not be filled before.
SMOKE = "{python} scripts/gpu_smoke.py --device {device} --jobs {workers}"
UNDER = (
    "PYTORCH_NO_CUDA_MEMORY_CACHING=1 " + SMOKE + " --timeout 150 --under 'compute-sanitizer --error-exitcode 1 --tool "
)
OURS = " --kernel-name kns=ck'"
STEPS = (
    Step("environment", 1, 40, "nvidia-smi; nvcc --version; {python} -m convkernels.cli info"),
    Step("smoke", 1, 90, SMOKE + " --json {results}/smoke.jsonl"),
    Step("gpu tests cuda", 1, 90, PYTEST + " -m gpu -k cuda -n 4"),
    Step("streaming cuda", 1, 90, BENCH + " --suite streaming --backend cuda --compile-seconds 0 --seconds 0.4"),
    Step("attention cuda", 1, 120, ATTENTION + " --backend cuda --lengths 512,2048,4096 --compile-seconds 0"),
    Step("counters cuda", 1, 150, "{python} scripts/gpu_counters.py --output {results}"),
    Step("cuda tests", 1, 240, PYTEST + " -k cuda -m 'not gpu and not slow' -n {workers}"),
    Step("streaming triton", 2, 120, BENCH + " --suite streaming --backend triton --seconds 0.4"),
    Step("attention triton", 2, 180, ATTENTION + " --backend triton --lengths 512,2048,4096"),
    Step("gpu tests triton", 2, 120, PYTEST + " -m gpu -k triton -n {workers}"),
    Step("triton tests", 2, 240, PYTEST + " -k triton -m 'not gpu and not slow' -n {workers} --every 24"),
    Step("memcheck", 3, 120, UNDER + "memcheck --report-api-errors no" + OURS),
    Step("racecheck", 3, 120, UNDER + "racecheck" + OURS),
    Step("synccheck", 3, 120, UNDER + "synccheck" + OURS),
    Step("initcheck", 3, 120, "CONVKERNELS_POISON=0 " + UNDER + "initcheck'"),
    Step("sweep", 3, 120, BENCH),
    Step("slow cuda tests", 3, 300, PYTEST + " -k cuda -m 'slow and not gpu' -n {workers}"),
)


def sees_a_gpu() -> bool:
    command = [sys.executable, "-c", "import torch; torch.zeros(1, device='cuda')"]
    return subprocess.run(command, stderr=subprocess.DEVNULL).returncode == 0


def run(step: Step, seconds: float, words: dict[str, str], log: Path) -> str:
    """Run one step, its output in `log`. How it ended: passed, or in what way not."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["bash", "-c", step.command.format(**words)],
            cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **step.environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that a signal reaches all that it has started
        )
        ended = "stopped"
        try:
            status = process.wait(seconds)
            ended = PASSED if status == 0 else f"status {status}"
        except subprocess.TimeoutExpired:
            ended = f"longer than {seconds:.0f} s"
        finally:
            end(process)
    return ended


def end(process: subprocess.Popen) -> None:
    """End a process and all that it has started, asking first."""
    for wish, wait in ((signal.SIGINT, GRACE), (signal.SIGKILL, None)):
        try:
            os.killpg(process.pid, wish)
        except ProcessLookupError:
            break
        try:
            process.wait(wait)
        except subprocess.TimeoutExpired:
            continue


def save(folder: Path, work: Path, outcomes: dict[str, dict]) -> str:
    """Put all that there is so far into the output folder; the reason where that cannot be done."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (work / "steps.json").write_text(json.dumps(outcomes, indent=1) + "\n")
        shutil.copy(work / "steps.json", folder)
        for name in ("results", "logs"):
            with tarfile.open(folder / f"{name}.tar.gz", "w:gz") as archive:
                archive.add(work / name, name)
    except OSError as error:
        return f"{folder}: {error.strerror or error}"
    return ""


def last_line(log: Path) -> str:
    """The last line that says something: a pytest summary, a mistake, an exception."""
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1].strip("= ") if lines else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--part", type=int, action="append", choices=(1, 2, 3), help="only the steps of this part")
    parser.add_argument("--only", action="append", default=[], help="only steps whose name contains this")
    parser.add_argument("--again", action="store_true", help="also what has passed before")
    parser.add_argument("--seconds", type=float, default=3600.0, help="for everything; what is left over is not begun")
    parser.add_argument("--output", type=Path, default=os.environ.get("OUT") or ROOT / "build" / "gpu")
    parser.add_argument("--device", default="cuda", help="cpu: a rehearsal, with the kernels simulated")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 4) - 2))
    parser.add_argument("--list", action="store_true")
    arguments = parser.parse_args()
    steps = [
        step
        for step in STEPS
        if step.part in (arguments.part or (1, 2, 3))
        and (not arguments.only or any(name in step.name for name in arguments.only))
    ]
    if not steps:
        parser.error("no step is meant by that; --list shows them")
    if arguments.list:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` is no error
        print("\n".join(f"{step.part}  {step.name:18} {step.seconds:5.0f} s  {step.command}" for step in steps))
        return 0
    if arguments.device == "cuda" and any(step.name != "environment" for step in steps) and not sees_a_gpu():
        print(
            "gpu_run: torch finds no GPU that works. --only environment says more; docs/gpu.md has a rehearsal",
            file=sys.stderr,
        )
        return 2
    # What a shell starts in the background ignores it, and so would the steps when they are asked to end.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    began = time.monotonic()
    work = ROOT / "build" / "gpu-work"
    for name in ("logs", "results"):
        (work / name).mkdir(parents=True, exist_ok=True)
    outcomes: dict[str, dict] = {}
    if (work / "steps.json").exists():
        outcomes = json.loads((work / "steps.json").read_text())
    where = arguments.device + (" simulated" if os.environ.get("CONVKERNELS_SIMT") == "1" else "")
    words = {
        "python": sys.executable,
        "results": str(work / "results"),
        "device": arguments.device,
        "workers": str(arguments.workers),
    }
    for step in steps:
        before = outcomes.get(step.name, {})
        if before.get("ended") == PASSED and before.get("on") == where and not arguments.again:
            print(f"{step.name:18} passed before, in this checkout; --again runs it once more", flush=True)
            continue
        left = arguments.seconds - (time.monotonic() - began) - 2 * GRACE
        if left < 5:
            outcomes[step.name] = {"ended": "not begun", "seconds": 0.0}
            continue
        log, start = work / "logs" / f"{step.name.replace(' ', '-')}.log", time.monotonic()
        try:
            ended = run(step, min(step.seconds * (SLOWER if arguments.device == "cpu" else 1), left), words, log)
        except OSError as error:
            ended = f"not begun: {error.strerror}"
        seconds = time.monotonic() - start
        outcomes[step.name] = {"ended": ended, "on": where, "seconds": round(seconds, 1), "last": last_line(log)}
        print(f"{step.name:18} {ended:20} {seconds:6.1f} s  {outcomes[step.name]['last']}", flush=True)
        if ended != PASSED:
            print(f"{'':18} its output: {log}", flush=True)
        reason = save(arguments.output, work, outcomes)
        if reason:
            print(f"gpu_run: nothing saved: {reason}", file=sys.stderr, flush=True)
    save(arguments.output, work, outcomes)
    failed = [step.name for step in steps if outcomes[step.name]["ended"] != PASSED]
    print(
        f"{len(steps) - len(failed)} of {len(steps)} steps passed" + (f"; not: {', '.join(failed)}" if failed else "")
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
