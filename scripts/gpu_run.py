"""Runs everything that needs a GPU, most valuable first: python scripts/gpu_run.py [--part 1] [--only NAME ...].

Every step is a process of its own with its own time limit: one that fails, hangs, crashes or writes without end does
not affect the others. After each step its log and all results so far are in the output folder (--output, else $OUT,
else build/gpu), as a few files that are small enough to carry away: steps.json, logs.tar.gz, results.tar.gz. A step
that has passed is not run again by the next call with the same files and GPU; results of other files or another GPU
are kept apart. The exit status is 1 where a step did not pass or the output could not be saved.
docs/gpu.md says what each result decides. With --device cpu the same commands are rehearsed, on less and with the
kernels simulated.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import fcntl
import hashlib
import io
import json
import os
import shlex
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

from gpu_steps import AMOUNTS, SLOWER, STEPS, Step, file_of

ROOT = Path(__file__).resolve().parent.parent
GRACE = 10.0  # seconds from SIGINT, on which pytest and the benchmarks write their results, to SIGKILL
PASSED = "passed"
PART = 540.0  # seconds that a part may take, where a command may take ten minutes
REQUESTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # ask this process to end
LONGEST_LOG = 256 << 20  # bytes; a step that writes more is ended
SHOWN = 256 << 10  # bytes of the beginning and of the end of a log, which the archive keeps
LARGEST_ARCHIVE = 15 << 20  # bytes


def words_for(step: Step, arguments: argparse.Namespace, work: Path) -> dict[str, str]:
    """The values of the words in braces of a step's command."""
    results = work / "results"
    return {
        "python": shlex.quote(sys.executable),
        "results": shlex.quote(str(results)),
        "result": shlex.quote(str(results / file_of(step))),
        "device": arguments.device,
        "workers": str(arguments.workers),
        **{word: amounts[arguments.device == "cpu"] for word, amounts in AMOUNTS.items()},
    }


def environment_for(step: Step, device: str) -> dict[str, str]:
    """In a rehearsal both backends run on the CPU, and scripts/rehearsal replaces programs that need a GPU."""
    found = {**os.environ, "PYTHONUNBUFFERED": "1", **step.environment}
    if device == "cpu":
        found |= {"CONVKERNELS_SIMT": "1", "TRITON_INTERPRET": "1"}
        found["PATH"] = f"{ROOT / 'scripts' / 'rehearsal'}{os.pathsep}{found['PATH']}"
    return found


def look_for_a_gpu() -> tuple[str, str]:
    """(the GPU and the version of torch, "") or ("", why torch finds no GPU)."""
    ask = "import torch; torch.zeros(1, device='cuda'); print(torch.cuda.get_device_name(), torch.__version__)"
    try:
        asked = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        return "", "torch has not found one within 120 s"
    return (asked.stdout.strip(), "") if asked.returncode == 0 else ("", asked.stderr.strip().rpartition("\n")[2])


def version_of(device: str) -> str:
    """A hash of the device, the interpreter and all files that results depend on."""
    digest = hashlib.sha256(f"{device} {sys.executable}".encode())
    for folder in ("benchmarks", "convkernels", "scripts", "tests"):
        for file in files_in(ROOT / folder):
            if "__pycache__" not in file.parts:
                digest.update(f"{file.relative_to(ROOT)} {file.stat().st_size} ".encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def log_of(step: Step, work: Path) -> Path:
    return work / "logs" / f"{file_of(step)}.log"


def run(step: Step, seconds: float, words: dict[str, str], environment: dict[str, str], work: Path) -> str:
    """Run one step after removing its earlier results; returns PASSED or how it failed."""
    results, log = work / "results", log_of(step, work)
    for old in results.glob(f"{file_of(step)}.*"):
        old.unlink()
    others, before = descendants(), written_in(results)
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["bash", "-c", step.command.format(**words)],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that a signal reaches all its children
        )
        try:
            ended = watch(process, seconds, log)
        finally:
            with undisturbed():
                end(process, others)
    return "left no result" if ended == PASSED and not written_in(results) - before else ended


def watch(process: subprocess.Popen, seconds: float, log: Path) -> str:
    """Wait until the process has ended or exceeds a limit; returns PASSED or the reason."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            status = process.wait(max(min(deadline - time.monotonic(), 0.5), 0.0))
            return PASSED if status == 0 else f"status {status}"
        except subprocess.TimeoutExpired:
            if time.monotonic() >= deadline:
                return f"longer than {seconds:.0f} s"
            if log.stat().st_size > LONGEST_LOG:
                return f"over {LONGEST_LOG >> 20} MB of output"


def end(process: subprocess.Popen, others: set[int]) -> None:
    """End a process, by SIGINT first, and then all its descendants, except the processes `others`. A process that hangs
    in the kernel, as it can in the GPU's driver, is not waited for."""
    for wish in (signal.SIGINT, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, wish)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
    for pid in descendants() - others:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Ignore further requests to end."""
    handlers = {request: signal.signal(request, signal.SIG_IGN) for request in REQUESTS}
    try:
        yield
    finally:
        for request, handler in handlers.items():
            signal.signal(request, handler)


def adopt_orphans() -> None:
    """Make the orphans of a step, in any session, children of this process, so that `end` finds them."""
    pr_set_child_subreaper = 36
    ctypes.CDLL(None).prctl(pr_set_child_subreaper, 1, 0, 0, 0)


def descendants() -> set[int]:
    """The ids of all processes below this one."""
    parents = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(file.parent.name)] = int(file.read_text().rpartition(")")[2].split()[1])
    found, size = {os.getpid()}, 0
    while len(found) > size:
        size = len(found)
        found |= {pid for pid, parent in parents.items() if parent in found}
    return found - {os.getpid()}


def files_in(folder: Path) -> list[Path]:
    return [file for file in sorted(folder.rglob("*")) if file.is_file()]


def written_in(folder: Path) -> set[tuple[Path, int]]:
    """The files of a folder and the time at which each was written."""
    return {(file, file.stat().st_mtime_ns) for file in files_in(folder)}


def replace_file(file: Path, write: Callable[[Path], object]) -> list[str]:
    """Replace a file at once, so that a crash leaves its old or its new content; returns errors."""
    part = file.with_name(f".{file.name}.part")
    try:
        write(part)
        os.replace(part, file)
    except OSError as error:
        return [f"{file}: {error.strerror or error}"]
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
    return []


def ends_of(file: Path) -> bytes:
    """The content, of a long file the first and last SHOWN bytes."""
    size = file.stat().st_size
    if size <= 2 * SHOWN:
        return file.read_bytes()
    with file.open("rb") as content:
        first = content.read(SHOWN)
        content.seek(size - SHOWN)
        return first + f"\n... {size - 2 * SHOWN} bytes are left out here ...\n".encode() + content.read()


def pack(folder: Path, archive: Path, read: Callable[[Path], bytes]) -> list[Path]:
    """Archive the files of a folder; returns the largest ones, which are left out to keep LARGEST_ARCHIVE."""
    files, left_out = sorted(files_in(folder), key=lambda file: file.stat().st_size), []
    while True:
        with tarfile.open(archive, "w:gz") as packed:
            for file in files:
                content, entry = read(file), tarfile.TarInfo(str(file.relative_to(folder.parent)))
                entry.size, entry.mtime = len(content), int(file.stat().st_mtime)
                packed.addfile(entry, io.BytesIO(content))
        if archive.stat().st_size <= LARGEST_ARCHIVE or not files:
            return left_out
        left_out.append(files.pop())


def record(folder: Path, outcomes: dict[str, dict]) -> list[str]:
    return replace_file(folder / "steps.json", lambda file: file.write_text(json.dumps(outcomes, indent=1) + "\n"))


def save(folder: Path, work: Path, outcomes: dict[str, dict]) -> list[str]:
    """Write all results so far to the output folder; returns errors."""
    reasons = record(work, outcomes)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return [*reasons, f"{folder}: {error.strerror or error}"]
    reasons += record(folder, outcomes)
    left_out: list[Path] = []
    for name, read in (("results", Path.read_bytes), ("logs", ends_of)):
        reasons += replace_file(
            folder / f"{name}.tar.gz", lambda file, name=name, read=read: left_out.extend(pack(work / name, file, read))
        )
    return reasons + [f"{file}: too large for the archive" for file in left_out]


def passed_before(work: Path) -> dict[str, dict]:
    try:
        found = json.loads((work / "steps.json").read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def last_line(log: Path) -> str:
    """The last line that is not empty: a pytest summary, an error, an exception."""
    lines = ends_of(log).decode(errors="replace").strip().splitlines() if log.exists() else []
    return "".join(filter(str.isprintable, lines[-1])).strip("= ")[:300] if lines else ""


def say(text: str, to: TextIO | None = None) -> None:
    """Print; a closed pipe is no error."""
    to = to or sys.stdout
    try:
        print(text, file=to, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), to.fileno())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--part", type=int, action="append", choices=(1, 2, 3), help="only the steps of this part")
    parser.add_argument("--only", action="append", default=[], help="only steps whose name contains this")
    parser.add_argument("--again", action="store_true", help="also what has passed before")
    parser.add_argument("--seconds", type=float, help=f"what is left over is not begun (default: {PART:.0f} a part)")
    parser.add_argument("--output", type=Path, default=os.environ.get("OUT") or None)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: a rehearsal")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 4) - 2))
    parser.add_argument("--list", action="store_true")
    arguments = parser.parse_args()
    wanted = [name.lower().replace("-", " ") for name in arguments.only] or [""]
    for name in wanted:
        if not any(name in step.name for step in STEPS):
            parser.error(f"--only {name}: expected part of one of {', '.join(map(file_of, STEPS))}")
    steps = [
        step
        for step in STEPS
        if step.part in (arguments.part or (1, 2, 3)) and any(name in step.name for name in wanted)
    ]
    if not steps:
        parser.error(f"--only {', '.join(wanted)}: no such step in part {', '.join(map(str, arguments.part))}")
    if arguments.list:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` is no error
        print("\n".join(f"{step.part}  {step.name:18} {step.seconds:5.0f} s  {step.command}" for step in steps))
        return 0
    # A process that a shell starts in the background ignores SIGINT, and its children inherit that.
    for request in REQUESTS:
        signal.signal(request, signal.default_int_handler)
    adopt_orphans()
    rehearsed = arguments.device == "cpu"
    device, reason = ("cpu", "") if rehearsed else look_for_a_gpu()
    if reason:
        left_out = ", ".join(step.name for step in steps if step.name != "environment")
        say(
            f"gpu_run: torch of {sys.executable} finds no GPU that works: {reason}. docs/gpu.md has a rehearsal"
            + (f"; not run: {left_out}" if left_out else ""),
            sys.stderr,
        )
        steps = [step for step in steps if step.name == "environment"]
        if not steps:
            return 2
    if arguments.seconds is None:
        arguments.seconds = PART * len({step.part for step in steps}) * (SLOWER if rehearsed else 1)
    kind = "gpu-rehearsal" if rehearsed else "gpu"
    work, output = ROOT / "build" / f"{kind}-work" / version_of(device), arguments.output or ROOT / "build" / kind
    try:
        for name in ("logs", "results"):
            (work / name).mkdir(parents=True, exist_ok=True)
        with (work.parent / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return run_all(steps, arguments, work, output) or (2 if reason else 0)
    except BlockingIOError:
        say("gpu_run: another one is at work in this checkout", sys.stderr)
    except OSError as error:
        say(f"gpu_run: {error}", sys.stderr)
    except KeyboardInterrupt:
        say(f"gpu_run: interrupted; what there is until then: {output}", sys.stderr)
        return 130
    return 2


def run_all(steps: list[Step], arguments: argparse.Namespace, work: Path, output: Path) -> int:
    began, outcomes, reasons, saved = time.monotonic(), passed_before(work), [], None
    for step in steps:
        if outcomes.get(step.name, {}).get("ended") == PASSED and not arguments.again:
            say(f"{step.name:18} passed before, with the same files; --again runs it once more")
            continue
        left = arguments.seconds - (time.monotonic() - began) - 2 * GRACE
        if left < 5:
            outcomes[step.name] = {"ended": "not begun", "seconds": 0.0}
            say(f"{step.name:18} not begun: too little is left of --seconds {arguments.seconds:.0f}")
            continue
        log, start = log_of(step, work), time.monotonic()
        limit = min(step.seconds * (SLOWER if arguments.device == "cpu" else 1), left)
        ended = "stopped"
        # Recorded first: this remains if this process is killed during the step.
        outcomes[step.name] = {"ended": ended, "seconds": 0.0}
        record(work, outcomes)
        try:
            ended = run(step, limit, words_for(step, arguments, work), environment_for(step, arguments.device), work)
        except OSError as error:
            ended = f"not begun: {error.strerror}"
        finally:
            seconds = time.monotonic() - start
            outcomes[step.name] = {"ended": ended, "seconds": round(seconds, 1), "last": last_line(log)}
            reasons, saved = save(output, work, outcomes), dict(outcomes)
        say(f"{step.name:18} {ended:20} {seconds:6.1f} s  {outcomes[step.name]['last']}")
        if ended != PASSED:
            say(f"{'':18} its output: {log}")
        for reason in reasons:
            say(f"gpu_run: not saved: {reason}", sys.stderr)
    if outcomes != saved:  # steps were not begun, or none was run and the output folder may be new
        reasons = save(output, work, outcomes)
    failed = [step.name for step in steps if outcomes[step.name]["ended"] != PASSED]
    say(
        f"{len(steps) - len(failed)} of {len(steps)} steps passed"
        + (f"; not: {', '.join(failed)}" if failed else "")
        + (f"; not saved: {'; '.join(reasons)}" if reasons else f"; results: {output}")
    )
    return 1 if failed or reasons else 0


if __name__ == "__main__":
    sys.exit(main())
