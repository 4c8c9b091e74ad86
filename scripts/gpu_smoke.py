"""Runs every family of kernels once on small tensors, forward and backward, and compares with the reference backend in
float64 on the CPU: python scripts/gpu_smoke.py

The first thing to run on a new GPU, and the program that compute-sanitizer watches (make gpu-sanitize). One line per
case. Each group of cases runs in a process of its own, so that an illegal access ends only its group. Exit status 1 if
anything failed. On a machine without a GPU: CONVKERNELS_SIMT=1 python scripts/gpu_smoke.py --device cpu
"""

import argparse
import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

# Outputs start as NaN, so that elements that a kernel does not write fail.
os.environ.setdefault("CONVKERNELS_POISON", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from gpu_smoke_cases import BF16, F16, F32, F64, all_cases

import convkernels
from convkernels.testing.attention import INPUTS, AttentionProblem
from convkernels.testing.inputs import Problem, StepProblem

try:
    from convkernels._C import cuda_attention_plan, cuda_plan
except ImportError:  # built without it, or for another Python
    cuda_attention_plan = cuda_plan = None

OPS = torch.ops.convkernels
# Shares of the norm of a result. A convolution rounds once; attention also rounds probabilities before products.
CONVOLUTION_BOUND = {F64: 1e-12, F32: 1e-5, F16: 1e-3, BF16: 6e-3}
ATTENTION_BOUND = {F64: 1e-12, F32: 2e-5, F16: 5e-3, BF16: 2e-2}
CONVOLUTION_INPUTS = ("x", "weight", "bias", "gate", "initial_state")


def call_convolution(backend, problem, tensors):
    y = getattr(OPS._tap_conv, backend)(*problem.op_arguments(tensors))
    found = getattr(OPS._tap_grad, backend)(*problem.grad_arguments(tensors))
    results = {"y": y, **{f"grad of {name}": g for name, g in zip(CONVOLUTION_INPUTS, found, strict=True)}}
    if problem.activation or problem.out_gate:
        found = getattr(OPS._tap_activation_grad, backend)(*problem.activation_grad_arguments(tensors))
        results |= {f"grad of {name}": g for name, g in zip(("sum", "out_gate"), found, strict=True)}
    return results


def call_step(backend, problem, tensors):
    y = getattr(OPS._tap_step, backend)(*problem.op_arguments(tensors))
    return {"y": y, "state": tensors["state"]}


def call_attention(backend, problem, tensors):
    out, lse = getattr(OPS._attention, backend)(*problem.op_arguments(tensors))
    found = getattr(OPS._attention_grad, backend)(*problem.grad_arguments(tensors, out, lse))
    return {"out": out, "lse": lse, **{f"grad of {name}": g for name, g in zip(INPUTS, found, strict=True)}}


# Where a GPU has both families, one takes the place of the other.
OTHERWISE = {"warpgroup": "tensor"}
CALLS = {Problem: call_convolution, StepProblem: call_step, AttentionProblem: call_attention}


def error_of(found, expected):
    """The norm of the error over that of the result; infinite where a shape differs or a number is not finite."""
    found = found.detach().cpu().double()
    if found.shape != expected.shape:
        return float("inf")
    infinite = expected.isinf()  # the lse of a query without keys
    if not torch.equal(found[infinite], expected[infinite]):
        return float("inf")
    found, expected = found.masked_fill(infinite, 0.0), expected.masked_fill(infinite, 0.0)
    if not found.isfinite().all():
        return float("inf")
    size = expected.norm().item()
    return (found - expected).norm().item() / (size or 1.0)


def planned(problem, device):
    """Families of the kernels forward and backward; None where this build has no `_C`, or where the GPU has too little
    shared memory per block for some kernels."""
    plan = {Problem: cuda_plan, AttentionProblem: cuda_attention_plan}.get(type(problem))
    if plan is None:
        return None
    convolution = isinstance(problem, Problem)
    both = [problem.plan_facts(backward) if convolution else problem.plan_facts() for backward in (False, True)]
    if device == "cuda":
        about = torch.cuda.get_device_properties(torch.cuda.current_device())
        if about.shared_memory_per_block_optin < 160 << 10:
            return None
        for facts in both:
            facts["multiprocessors"] = about.multi_processor_count
            if not convolution:
                facts["warpgroups"] = (about.major, about.minor) == (9, 0)
    return tuple(plan(backward, **facts)["family"] for backward, facts in enumerate(both))


def run_case(case, backend, device):
    """Run a case; returns its errors, their bound and why it failed."""
    problem = case.problem
    tensors = problem.tensors()
    call = CALLS[type(problem)]
    # Copies, because a step updates its state in place.
    exact = {n: v.to(F64, copy=True) if v is not None and v.is_floating_point() else v for n, v in tensors.items()}
    expected = call("reference", problem, exact)
    on_device = {name: None if value is None else value.to(device) for name, value in tensors.items()}
    found = call(backend, problem, on_device)
    if device == "cuda":
        torch.cuda.synchronize()
    errors = {name: error_of(value, expected[name]) for name, value in found.items()}
    attention = isinstance(problem, AttentionProblem)
    bounds = ATTENTION_BOUND if attention else CONVOLUTION_BOUND
    bound = max(bounds[problem.dtype], bounds[problem.table_dtype] if attention else 0.0)
    failures = [f"{name} is off by {error:.2e}" for name, error in errors.items() if not error <= bound]
    families = planned(problem, device) if backend == "cuda" else None
    for way, family, wanted in zip(("forward", "backward"), families or (), case.families, strict=False):
        if wanted not in (None, family, OTHERWISE.get(family)):
            failures.append(f"{way}: planned for the family {family} instead of {wanted}")
    return {
        "families": list(families or ()), "errors": errors, "worst": max(errors.values()), "bound": bound,
        "failure": "; ".join(failures),
    }  # fmt: skip


def device_works(device):
    if device != "cuda":
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def run_group(cases, arguments):
    """Run all cases of a group in this process; returns the number of failures."""
    failed = 0
    for place, case in enumerate(cases):
        start = time.perf_counter()
        try:
            outcome = run_case(case, arguments.backend, arguments.device)
        except Exception as error:
            outcome = {"families": [], "failure": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        outcome = {"group": case.group, "case": case.name, **outcome, "seconds": round(time.perf_counter() - start, 3)}
        failed += bool(outcome["failure"])
        # With a question mark where the build cannot tell the family.
        wanted = [f"{family or 'any'}?" for family in case.families if arguments.backend == "cuda"]
        family = "/".join(dict.fromkeys(outcome["families"] or wanted)) or "-"
        worst = f"{outcome['worst']:.1e} of {outcome['bound']:.0e}" if "worst" in outcome else "-"
        verdict = f"FAIL: {outcome['failure']}" if outcome["failure"] else "ok"
        print(
            f"{case.group:22} {case.name:42} {family:13} {worst:16} {outcome['seconds']:6.2f} s  {verdict}", flush=True
        )
        if arguments.json:
            with open(arguments.json, "a") as file:
                file.write(json.dumps(outcome) + "\n")
        if outcome["failure"] and not device_works(arguments.device):
            print(f"{case.group}: the GPU has ended this process's work; {len(cases) - place - 1} cases are not run")
            break
    return failed


RUNNING = set()
WRITING = Lock()  # for the file of results


def kill(process):
    """Kill a process and its children."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def read_what_is_left(process):
    """The output of a killed process, as far as it was read where it hangs in the kernel, as it can in the driver."""
    try:
        return process.communicate(timeout=10)[0]
    except subprocess.TimeoutExpired as error:
        return (error.output or b"").decode(errors="replace")


def start_group(group, cases, arguments):
    """Run a group in a process; returns how it ended ("" for well) and its results."""
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results"
        command = [
            *shlex.split(arguments.under), sys.executable, __file__, "--group", group, "--only", arguments.only,
            "--device", arguments.device, "--backend", arguments.backend, "--json", str(results),
        ]  # fmt: skip
        start = time.perf_counter()
        # In a session of its own, so that the group's process is killed together with `--under`.
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, errors="replace", start_new_session=True,
            env={**os.environ, "CUDA_LAUNCH_BLOCKING": "1"},
        )  # fmt: skip
        RUNNING.add(process)
        try:
            output, _ = process.communicate(timeout=arguments.timeout)
            ending = f"exit status {process.returncode}" if process.returncode else ""
            if arguments.expect not in output:
                ending = ending or f"has not said '{arguments.expect}'"
        except subprocess.TimeoutExpired:
            kill(process)
            output = read_what_is_left(process)
            ending = f"stopped after {arguments.timeout:g} s"
        RUNNING.discard(process)
        print(output, end="", flush=True)
        lines = results.read_text().splitlines() if results.exists() else []
    outcomes = [json.loads(line) for line in lines]
    if arguments.json:
        with WRITING, open(arguments.json, "a") as file:
            file.writelines(f"{line}\n" for line in lines)
    if not ending and len(outcomes) < len(cases):
        ending = "ended early"
    return {"group": group, "seconds": time.perf_counter() - start, "ending": ending, "cases": outcomes}


def run_groups(groups, arguments):
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    if arguments.json:
        open(arguments.json, "w").close()
    pool = ThreadPoolExecutor(arguments.jobs)
    try:
        futures = [pool.submit(start_group, group, cases, arguments) for group, cases in groups.items()]
        ended = [future.result() for future in futures]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in list(RUNNING):
            kill(process)
    failed = False
    print(f"\n{'group':22} {'cases':>5} {'ran':>5} {'failed':>6} {'worst/bound':>11} {'seconds':>8}")
    for end in ended:
        outcomes = end["cases"]
        shares = [case["worst"] / case["bound"] for case in outcomes if "worst" in case]
        failures = sum(bool(case["failure"]) for case in outcomes)
        failed = failed or bool(failures or end["ending"])
        print(
            f"{end['group']:22} {len(groups[end['group']]):5} {len(outcomes):5} {failures:6} "
            f"{max(shares, default=float('nan')):11.2f} {end['seconds']:8.1f}  {end['ending'] or 'ok'}"
        )
    return failed


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="TEXT", help="cases with this text in their group and name")
    parser.add_argument("--list", action="store_true", help="print the groups and cases, and run nothing")
    parser.add_argument("--group", metavar="NAME", help="run this group, in this process")
    parser.add_argument("--device", default="cuda", help="where the tensors are (cpu: with the kernels simulated)")
    parser.add_argument("--backend", default="cuda", help="whose kernels run (default: cuda)")
    parser.add_argument("--json", metavar="FILE", help="also write the results there, a line of JSON for each case")
    parser.add_argument("--jobs", type=int, default=6, help="groups that run at a time (default: 6)")
    parser.add_argument("--timeout", type=float, default=60, help="seconds that a group may take (default: 60)")
    parser.add_argument("--under", default="", metavar="COMMAND", help="run each group's process under this command")
    parser.add_argument("--expect", default="", metavar="TEXT", help="what each group's process has to print")
    arguments = parser.parse_args()

    groups = {}
    for case in all_cases():
        if arguments.only in f"{case.group} {case.name}" and arguments.group in (None, case.group):
            groups.setdefault(case.group, []).append(case)
    if not groups:
        parser.error("no case has this name; see --list")
    if arguments.list:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` is no error
        for group, cases in groups.items():
            print(*(f"{group:22} {case.name}" for case in cases), sep="\n")
        return 0
    reasons = convkernels.why_not(arguments.backend, device=arguments.device)
    if reasons:
        sys.exit(f"gpu_smoke: --backend {arguments.backend} --device {arguments.device}: {'; '.join(reasons)}")
    if arguments.group:
        torch.set_num_threads(1)
        return run_group(groups[arguments.group], arguments) > 0
    gpu = torch.cuda.get_device_name() if arguments.device == "cuda" else "no GPU"
    print(f"convkernels {convkernels.__version__}, torch {torch.__version__}, backend {arguments.backend}, {gpu}")
    return run_groups(groups, arguments)


if __name__ == "__main__":
    sys.exit(int(main()))
