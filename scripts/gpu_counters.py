"""Hardware counters of the GPU kernels at the shapes of the streaming and attention suites, by Nsight Compute.

    python scripts/gpu_counters.py --output DIR [--backend cuda|triton] [--only NAME]
    python scripts/gpu_counters.py --launch CASE[,CASE...]      # what ncu runs: a few calls, then one that is profiled

Writes DIR/counters-BACKEND.md, .json and .csv.gz (the raw pages of ncu) after every few cases. ncu is given sections
rather than metrics, which differ from one release and GPU to the next; a counter that it does not report stays blank.
Exit status 1 where a case has no counters.
"""

import argparse
import csv
import gzip
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import kernel_cases
import torch

from benchmarks.suites import attention, streaming

ROOT = Path(__file__).resolve().parents[1]
WARM_UP = 3
# Rows and positions of a batch, of convolutions and of attention: on a GPU, and where ncu is only rehearsed.
SIZES = {"cuda": ((16, 4096), (8, 2048)), "cpu": ((1, 32), (1, 64))}
# The kernel of torch.cuda._sleep is launched in front of each case and separates their kernels.
MARKER = "spin_kernel"
FORBIDDEN = "ERR_NVGPUCTRPERM"

SECTIONS = ("LaunchStats", "Occupancy", "SpeedOfLight", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis",
            "MemoryWorkloadAnalysis_Tables", "WarpStateStats", "SchedulerStats", "InstructionStats")  # fmt: skip
METRICS = (
    "gpu__time_duration.sum",
    "dram__bytes_read.sum",
    "dram__bytes_write.sum",
    "smsp__inst_executed.sum",
    "l1tex__data_pipe_lsu_wavefronts_mem_shared_op_ld.sum",
    "l1tex__data_pipe_lsu_wavefronts_mem_shared_op_st.sum",
    "l1tex__data_bank_conflicts_pipe_lsu_mem_shared_op_ld.sum",
    "l1tex__data_bank_conflicts_pipe_lsu_mem_shared_op_st.sum",
    "l1tex__t_bytes_pipe_lsu_mem_local_op_ld.sum",
    "l1tex__t_bytes_pipe_lsu_mem_local_op_st.sum",
)

# Columns of the table: the names under which ncu may report each, and a factor.
COUNTERS: dict[str, tuple[tuple[str, ...], float]] = {
    "registers": (("launch__registers_per_thread",), 1),
    "dynamic shared B": (("launch__shared_mem_per_block_dynamic",), 1),
    "us": (("gpu__time_duration.sum", "gpu__time_duration.avg"), 1e6),
    "DRAM read MB": (("dram__bytes_read.sum",), 1e-6),
    "DRAM written MB": (("dram__bytes_write.sum",), 1e-6),
    "DRAM %": (
        (
            "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",
            "dram__throughput.avg.pct_of_peak_sustained_elapsed",
        ),
        1,
    ),
    "issue %": (
        (
            "sm__inst_issued.avg.pct_of_peak_sustained_active",
            "smsp__issue_active.avg.pct_of_peak_sustained_active",
            "sm__issue_active.avg.pct_of_peak_sustained_elapsed",
        ),
        1,
    ),
    "IPC": (("sm__inst_executed.avg.per_cycle_active",), 1),
    "occupancy %": (("sm__warps_active.avg.pct_of_peak_sustained_active",), 1),
    "its limit %": (("sm__maximum_warps_per_active_cycle_pct",), 1),
    "tensor %": (
        (
            "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
            "sm__pipe_tensor_op_hmma_cycles_active.avg.pct_of_peak_sustained_active",
            "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed",
            "sm__pipe_tensor_op_hmma_cycles_active.avg.pct_of_peak_sustained_elapsed",
            "sm__inst_executed_pipe_tensor_op_hmma.avg.pct_of_peak_sustained_active",
            "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active",
        ),
        1,
    ),
    "shared loads M": (("l1tex__data_pipe_lsu_wavefronts_mem_shared_op_ld.sum",), 1e-6),
    "shared stores M": (("l1tex__data_pipe_lsu_wavefronts_mem_shared_op_st.sum",), 1e-6),
    "load conflicts M": (("l1tex__data_bank_conflicts_pipe_lsu_mem_shared_op_ld.sum",), 1e-6),
    "store conflicts M": (("l1tex__data_bank_conflicts_pipe_lsu_mem_shared_op_st.sum",), 1e-6),
    "L1 %": (("l1tex__throughput.avg.pct_of_peak_sustained_active",), 1),
    "L2 hits %": (("lts__t_sector_hit_rate.pct",), 1),
    "local read MB": (("l1tex__t_bytes_pipe_lsu_mem_local_op_ld.sum",), 1e-6),
    "local written MB": (("l1tex__t_bytes_pipe_lsu_mem_local_op_st.sum",), 1e-6),
    "instructions M": (("smsp__inst_executed.sum", "sm__inst_executed.sum"), 1e-6),
}
STALL = re.compile(r"smsp__average_warps?_(?:latency_)?issue_stalled_(\w+?)(?:_per_issue_active)?\.ratio")
LIMIT = re.compile(r"launch__occupancy_limit_(\w+)")
# What to ask ncu for; the next one where it refuses.
_BY_SECTION = tuple(option for section in SECTIONS for option in ("--section", section))
PLANS = ((*_BY_SECTION, "--metrics", ",".join(METRICS)), _BY_SECTION, ("--set", "full"))
PREFIXES = {"n": 1e-9, "u": 1e-6, "m": 1e-3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}


def _cases() -> dict[str, Callable[[str, str], Callable[[], object]]]:
    """Names of the families that the cuda backend takes for these shapes; other backends get the same problems. What
    makes a call, of a backend and a device."""
    cases: dict[str, Callable[[str, str], Callable[[], object]]] = {}

    def rows(backend: str, device: str) -> streaming.Settings:
        return streaming.Settings(*SIZES[device][0], compiled=False, backend=backend)

    def pairs(head_size: int, backend: str, device: str) -> attention.Settings:
        batch, length = SIZES[device][1]
        return attention.Settings(lengths=(length,), batch=batch, heads=12, head_size=head_size, backend=backend)

    def add(name: str, settings: Callable, make: Callable, *arguments: object, directions=("fwd", "bwd"), **options):
        for short in directions:
            made = make(*arguments, {"fwd": "forward", "bwd": "backward"}[short], **options)
            cases[f"{name}-{short}"] = lambda backend, device, made=made: made(settings(backend, device), device)

    add("stream-k7", rows, kernel_cases.convolution, streaming.LIGHTWEIGHT, 7)
    add("stream-k3", rows, kernel_cases.convolution, streaming.LIGHTWEIGHT, 3, directions=("fwd",))
    add("band-k31", rows, kernel_cases.convolution, streaming.LIGHTWEIGHT, 31)
    add("gate-k7", rows, kernel_cases.convolution, streaming.LIGHTWEIGHT, 7, gate=True)
    add("dynamic-k7", rows, kernel_cases.convolution, streaming.DYNAMIC, 7)
    add("dynamic-k31", rows, kernel_cases.convolution, streaming.DYNAMIC, 31, directions=("fwd",))
    add("time-k7", rows, kernel_cases.time_layout, directions=("fwd",))
    for name, form, head_size in (
        ("attention-d64-plain", attention.PLAIN, 64),
        ("attention-d64", attention.COMPOSITE, 64),
        ("attention-d128", attention.COMPOSITE, 128),
    ):
        add(name, partial(pairs, head_size), kernel_cases.attend, form)
    return cases


CASES = _cases()


def launch(names: list[str], backend: str, device: str) -> int:
    """Run the cases. A case that fails is printed; the others still run, unless the device is lost."""
    status = 0
    for name in names:
        try:
            call = CASES[name](backend, device)
            for _ in range(WARM_UP if device == "cuda" else 0):
                call()
            print(f"launched {name}", flush=True)
            if device == "cpu":
                call()
                continue
            torch.cuda.synchronize()
            with torch.cuda.profiler.profile():
                torch.cuda._sleep(1)
                call()
                torch.cuda.synchronize()
        except Exception as error:
            print(f"failed {name}: {type(error).__name__}: {error}", flush=True)
            status = 1
        call = None
        torch.cuda.empty_cache()
    return status


def _value(text: str, unit: str) -> float | str | None:
    """A number in seconds or bytes where the unit is a multiple of those; other text as it is."""
    text = text.strip()
    try:
        number = float(text.replace(",", ""))
    except ValueError:
        return None if text in ("", "n/a", "nan") else text
    if number != number:
        return None
    unit = unit.split("/")[0].strip()
    base = re.fullmatch(r"([numKMGT]?)(s|sec|second|byte|B)", unit)
    return number * PREFIXES.get(base[1], 1.0) if base else number


def parse(text: str) -> list[dict[str, float | str | None]]:
    """The rows of raw CSV pages: lines of names, of units, and one per kernel, among other output."""
    rows: list[dict[str, float | str | None]] = []
    names: list[str] = []
    units: list[str] = []
    for cells in csv.reader(io.StringIO("".join(f"{line}\n" for line in text.splitlines() if line[:1] == '"'))):
        if "Kernel Name" in cells:
            names, units = cells, []
        elif not names or len(cells) != len(names):
            continue
        elif not cells[0].strip():
            units = cells
        else:
            described = units or [""] * len(names)
            rows.append({name: _value(*pair) for name, *pair in zip(names, cells, described, strict=True)})
    return rows


def by_case(rows: list[dict], names: list[str]) -> dict[str, list[dict]]:
    """The kernels after each marker, in the order in which the cases were launched."""
    found: list[list[dict]] = []
    for row in rows:
        if MARKER in str(row["Kernel Name"]):
            found.append([])
        elif found:
            found[-1].append(row)
    return dict(zip(names, found, strict=False))


def short_name(name: str) -> str:
    """The function without its return type, namespaces, template arguments and parameters."""
    found = re.search(r"(\w+)\s*(?:<|\(|$)", name.replace("(anonymous namespace)::", ""))
    return found[1] if found else name


def _dimensions(row: dict, what: str) -> str:
    size = row.get(f"launch__{what}_size")
    if size is not None:
        return f"{size:.0f}" if isinstance(size, float) else str(size)
    return str(row.get(f"{what.title()} Size") or "")


def counters(row: dict) -> dict[str, float | str | None]:
    """What the table shows of one kernel; None for what was not reported."""
    result: dict[str, float | str | None] = {"kernel": short_name(str(row["Kernel Name"]))}
    result |= {"grid": _dimensions(row, "grid"), "block": _dimensions(row, "block")}
    for title, (names, factor) in COUNTERS.items():
        value = next((row[name] for name in names if isinstance(row.get(name), float)), None)
        result[title] = None if value is None else value * factor
    blocks = {m[1]: v for k, v in row.items() if (m := LIMIT.fullmatch(k)) and isinstance(v, float) and v > 0}
    least = min(blocks, key=blocks.__getitem__, default=None)
    result["limited by"] = f"{least} {blocks[least]:.0f}" if least else None
    stalls = {m[1]: v for k, v in row.items() if (m := STALL.fullmatch(k)) and isinstance(v, float)}
    stalls = {name: value for name, value in stalls.items() if name != "selected" and "not_issued" not in name}
    worst = sorted(stalls, key=stalls.__getitem__, reverse=True)[:3]
    result["stalls, warps per issue"] = ", ".join(f"{name} {stalls[name]:.2f}" for name in worst) or None
    return result


def is_counted(kernel: dict) -> bool:
    """Whether ncu has reported any counter of it."""
    return any(kernel[title] is not None for title in COUNTERS)


def _cell(value: float | str | None) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else f"{value:.0f}" if value == int(value) else f"{value:.4g}"


def markdown(results: dict[str, dict]) -> str:
    from convkernels.cli.console import markdown_table

    rows = [(case, *map(_cell, k.values())) for case, result in results.items() for k in result["kernels"]]
    columns = next((("case", *k) for result in results.values() for k in result["kernels"]), ("case",))
    errors = [f"{case}: {result['error']}" for case, result in results.items() if result["error"]]
    return "\n\n".join([markdown_table(columns, rows), *errors]) + "\n"


def find_ncu() -> str | None:
    places = [Path("/usr/local/cuda/bin/ncu"), *sorted(Path("/opt/nvidia/nsight-compute").glob("*/ncu"), reverse=True)]
    return shutil.which("ncu") or next((str(p) for p in places if p.exists()), None)


def command(ncu: str, log: Path, names: list[str], backend: str, device: str, plan: tuple[str, ...]) -> list[str]:
    options = ["--clock-control", "none", "--profile-from-start", "off", "--target-processes", "all"]
    options += ["--csv", "--page", "raw", "--print-units", "base", "--log-file", str(log), "--force-overwrite"]
    return [
        ncu,
        *options,
        *plan,
        sys.executable,
        str(Path(__file__).resolve()),
        "--launch",
        ",".join(names),
        "--backend",
        backend,
        "--device",
        device,
    ]


def run(arguments: list[str], timeout: float) -> str:
    """Run a command; returns its output. Its children are ended with it."""
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        process = subprocess.Popen(arguments, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True)
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            output.seek(0, os.SEEK_END)
            output.write(f"failed: ended after {timeout:.0f} s\n")
        output.seek(0)
        return output.read()


class Profiler:
    def __init__(self, ncu: str, folder: Path, backend: str, timeout: float, device: str = "cuda") -> None:
        self.ncu, self.backend, self.timeout, self.device = ncu, backend, timeout, device
        self.files = {kind: folder / f"counters-{backend}.{kind}" for kind in ("md", "json", "csv.gz")}
        self.files["csv.gz"].unlink(missing_ok=True)
        self.plans = list(PLANS)
        self.results: dict[str, dict] = {}
        self.forbidden = False

    def _profile(self, names: list[str]) -> tuple[dict[str, list[dict]], str]:
        """Per case its kernels, and what was printed."""
        with tempfile.TemporaryDirectory() as folder:
            log = Path(folder, "log.csv")
            timeout = self.timeout * len(names)
            printed = run(command(self.ncu, log, names, self.backend, self.device, self.plans[0]), timeout)
            text = log.read_text(errors="replace") if log.exists() else ""
        with gzip.open(self.files["csv.gz"], "at") as raw:
            raw.write(text)
        remarks = [line for line in text.splitlines() if line.startswith("==") and "==PROF==" not in line]
        launched = re.findall(r"^(?:==\w+== )?launched (\S+)$", printed, re.M)
        return by_case(parse(text), launched), "\n".join([*remarks, printed])

    def measure(self, names: list[str]) -> None:
        """Profile the cases in one process; those without counters then in one of their own."""
        kernels, printed = self._profile(names)
        self.forbidden = FORBIDDEN in printed
        while not (kernels or self.forbidden or re.search("^failed", printed, re.M)) and len(self.plans) > 1:
            del self.plans[0]
            kernels, printed = self._profile(names)
        del self.plans[1:]
        for name in names:
            if not kernels.get(name) and len(names) > 1 and not self.forbidden:
                self.measure([name])
                continue
            found = kernels.get(name, [])
            shown = [counters(row) for row in found]
            self.results[name] = {
                "kernels": shown,
                "names": [row["Kernel Name"] for row in found],
                "error": None if any(map(is_counted, shown)) else printed[-1500:].strip() or "no output",
            }
        self.files["json"].write_text(json.dumps(self.results, indent=1) + "\n")
        self.files["md"].write_text(markdown(self.results))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--launch", help="cases to call, instead of running ncu")
    parser.add_argument("--backend", choices=("cuda", "triton"), default="cuda")
    parser.add_argument("--device", choices=tuple(SIZES), default="cuda", help="cpu: small tensors, to rehearse")
    parser.add_argument(
        "--only", default="", help="cases whose name contains this, or one of these with commas between"
    )
    parser.add_argument("--output", type=Path, default=Path("build/gpu-counters"))
    parser.add_argument("--together", type=int, default=4, help="cases in one process of ncu")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds per case")
    parser.add_argument("--ncu", default=find_ncu())
    arguments = parser.parse_args()
    if arguments.launch:
        return launch(arguments.launch.split(","), arguments.backend, arguments.device)
    if not arguments.ncu:
        parser.error("ncu is not on PATH, in /usr/local/cuda or in /opt/nvidia/nsight-compute: give --ncu")
    names = [name for name in CASES if any(part in name for part in arguments.only.split(","))]
    if not names:
        parser.error(f"--only {arguments.only}: expected part of one of {', '.join(CASES)}")
    arguments.output.mkdir(parents=True, exist_ok=True)
    profiler = Profiler(arguments.ncu, arguments.output, arguments.backend, arguments.timeout, arguments.device)
    size = max(arguments.together, 1)
    for start in range(0, len(names), size):
        profiler.measure(names[start : start + size])
        print(f"profiled {', '.join(names[start : start + size])}", flush=True)
        if profiler.forbidden:
            print(f"{FORBIDDEN}: the driver does not let this user read counters", file=sys.stderr)
            break
    print(profiler.files["md"].read_text())
    return 0 if all(name in profiler.results and not profiler.results[name]["error"] for name in names) else 1


if __name__ == "__main__":
    sys.exit(main())
