"""Runs every family of kernels once on small tensors, forward and backward, and compares with the reference backend in
float64 on the CPU: python scripts/gpu_smoke.py

The first thing to run on a new GPU, and the program that compute-sanitizer watches (make gpu-sanitize). One line per
case. Each group of cases runs in a process of its own, so that an illegal access ends only its group. Exit status 1 if
anything failed. On a machine without a GPU: CONVKERNELS_SIMT=1 python scripts/gpu_smoke.py --device cpu
"""

import argparse
import contextlib
import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

# What a kernel leaves unwritten is NaN, and fails.
os.environ.setdefault("CONVKERNELS_POISON", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import convkernels
from convkernels.testing.attention import INPUTS, AttentionProblem
from convkernels.testing.inputs import Problem, StepProblem

try:
    from convkernels._C import cuda_attention_plan, cuda_plan
except ImportError:  # built without it, or for another Python
    cuda_attention_plan = cuda_plan = None

OPS = torch.ops.convkernels
F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
# Of the norm of a result. A convolution rounds once; attention also rounds probabilities before products.
CONVOLUTION_BOUND = {F64: 1e-12, F32: 1e-5, F16: 1e-3, BF16: 6e-3}
ATTENTION_BOUND = {F64: 1e-12, F32: 2e-5, F16: 5e-3, BF16: 2e-2}
CONVOLUTION_INPUTS = ("x", "weight", "bias", "gate", "initial_state")


@dataclass(frozen=True)
class Case:
    """families: those of the kernels forward and backward, which the case is there for; None: any."""

    group: str
    name: str
    problem: object
    families: tuple


def short(dtype):
    return str(dtype).removeprefix("torch.")


# Times and channels are no multiples of what a block computes.

CONVOLUTIONS = {
    "k1 gate": {"taps": 1, "gate": True},
    "k3": {"taps": 3},
    "k7 bias softmax": {"taps": 7, "bias": True, "softmax": True},
    "k15": {"taps": 15},
    "k31": {"taps": 31},
    "k3 gate+mask": {"taps": 3, "gate": True, "padding_mask": 2},
    "k15 gate+mask bias": {"taps": 15, "gate": True, "padding_mask": 1, "bias": True},
    "k31 gate softmax dropout": {"taps": 31, "gate": True, "softmax": True, "dropout": 0.3},
    "k7 packed": {"taps": 7, "lengths": (40, 0, 1, 31)},
    "k31 packed": {"taps": 31, "lengths": (40, 0, 1, 31)},
    "k15 packed gate+mask": {"taps": 15, "lengths": (7, 65), "gate": True, "padding_mask": 2},
    "k7 dilation 3 dropout": {"taps": 7, "dilation": 3, "dropout": 0.3},
    "k31 dilation 2": {"taps": 31, "dilation": 2, "bias": True},
    "k3 state": {"taps": 3, "state": True},
    "k15 state dilation 2": {"taps": 15, "dilation": 2, "state": True, "bias": True},
    "k15 filters per row": {"taps": 15, "kind": "row"},
}  # fmt: skip


# Rows that are read 2, 4 or 8 bytes at a time in 16-bit types, and a slice of wider rows.
PIECES = {
    " C=135": {"heads": 135, "head_size": 1},
    " C=134": {"heads": 67, "head_size": 2},
    " C=140": {"heads": 35, "head_size": 4},
    " sliced": {"heads": 17, "head_size": 8, "layout": "sliced"},
}


def convolution(group, name, families, dtype, length=77, **options):
    if "lengths" in options:
        options["batch"] = 1
    if options.get("layout"):
        options["grad_layout"] = options["layout"]
    span = (options["taps"] - 1) * options.get("dilation", 1)
    problem = Problem(**{
        "batch": 2, "length": length, "left": span if options.get("state") else span // 2, "dtype": dtype,
        "weight_dtype": dtype, "seed": len(name), **options,
    })  # fmt: skip
    return Case(f"{group}-{short(dtype)}", name, problem, families)


def convolutions(group, family, dtype, possible=lambda own: True, backward=lambda own: True, suffix="", **options):
    """One case for each entry of CONVOLUTIONS that is `possible`. The family computes the backward pass of those that
    `backward` says."""
    for name, own in CONVOLUTIONS.items():
        if possible(own):
            families = (family, family if backward(own) else None)
            yield convolution(group, name + suffix, families, dtype, **{**own, **options})


def convolution_cases():
    for dtype in (BF16, F16, F32):
        # What does not fit in shared memory is left to others.
        wide = dtype == F32
        yield from convolutions(
            "stream", "stream", dtype, heads=17, head_size=8,
            backward=lambda own, wide=wide: not (wide and own.get("gate") and own["taps"] > 1),
        )  # fmt: skip
        for suffix, channels in PIECES.items():
            few = [CONVOLUTIONS[name] for name in ("k7 packed", "k3 gate+mask", "k3 state")]
            yield from convolutions(
                "stream", "stream", dtype, suffix=suffix, possible=lambda own, few=few: own in few,
                backward=lambda own, wide=wide: not (wide and own.get("gate")), **channels,
            )  # fmt: skip
            if channels["head_size"] % 4 == 0:
                yield from convolutions(
                    "rows", "rows", dtype, suffix=suffix, possible=lambda own, few=few: own in few,
                    backward=lambda own, wide=wide: not (wide and own.get("gate")), kind="dynamic", **channels,
                )  # fmt: skip
        for taps, gate in ((3, False), (15, False), (31, False), (7, True)):
            families = ("stream", None if wide and (gate or taps == 31) else "stream")
            name = f"k{taps} depthwise{' gate' if gate else ''}"
            yield convolution("stream", name, families, dtype, taps=taps, gate=gate, heads=136, head_size=1)
        yield from convolutions(
            "rows", "rows", dtype, heads=5, head_size=32, kind="dynamic",
            backward=lambda own, wide=wide: not (wide and own.get("gate")),
        )  # fmt: skip
        for name, options in {
            "mask": {"padding_mask": 2},
            "state": {"state": True, "padding_mask": 2},
            "packed": {"lengths": (90, 0, 7, 120), "bias": True},
            "filters per row, dropout": {"kind": "row", "head_size": 160, "dropout": 0.3},
            "dynamic": {"kind": "dynamic", "padding_mask": 2},
        }.items():
            yield convolution(
                "rows", f"k7 renormalize, {name}", ("rows",) * 2, dtype,
                **{"taps": 7, "heads": 2, "head_size": 64, "softmax": True, "renormalize": True, **options},
            )  # fmt: skip
        for head_size in (24, 48, 96, 256):
            yield convolution(
                "rows", f"k7 heads of {head_size}", ("rows",) * 2, dtype, taps=7, heads=3, head_size=head_size,
                kind="dynamic", softmax=True, bias=True,
            )  # fmt: skip
        yield from convolutions(
            "time", "time", dtype, length=72, heads=5, head_size=8, layout="swap_last",
            possible=lambda own: not own.get("state"),
        )  # fmt: skip
        for length, name in itertools.product((77, 66, 68), ("k7 bias softmax", "k3 gate+mask")):
            yield convolution(
                "time", f"{name} T={length}", ("time",) * 2, dtype, heads=5, head_size=8, layout="swap_last",
                **{"length": length, **CONVOLUTIONS[name]},
            )  # fmt: skip
        yield from convolutions("plain", "plain", dtype, heads=3, head_size=3, layout="step2")
    yield from convolutions("plain", "plain", F64, heads=2, head_size=8)
    for dtype in (F32, F64):
        yield from convolutions("plain-dynamic", "plain", dtype, heads=3, head_size=3, kind="dynamic", softmax=True)
    for dtype in (BF16, F16):
        yield from convolutions("band", "band", dtype, heads=3, head_size=24, possible=lambda own: own["taps"] >= 12)
        yield convolution("band", "k31 wide", ("band",) * 2, dtype, length=140, taps=31, heads=1, head_size=72)
        yield convolution("band", "k63", ("band",) * 2, dtype, length=140, taps=63, heads=2, head_size=24)
        yield convolution(
            "band", "k63 gate", ("band",) * 2, dtype, length=140, taps=63, gate=True, heads=2, head_size=24
        )
        for name in ("k15 gate+mask bias", "k31", "k15 state dilation 2"):
            yield convolution(
                "band", f"{name} sliced", ("band",) * 2, dtype, heads=3, head_size=24, layout="sliced",
                **CONVOLUTIONS[name],
            )  # fmt: skip
    for dtype in (BF16, F32):
        # Few channels and many rows: sums of several pieces.
        yield convolution("reduce", "k7", ("stream",) * 2, dtype, length=300, batch=4, taps=7, heads=2, head_size=8)


def step_cases():
    for dtype in (BF16, F16, F32, F64):
        for name, options in {
            "k3": {"taps": 3},
            "k7 bias gate": {"taps": 7, "bias": True, "gate": True},
            "k15 state_index": {"taps": 15, "indexed": True},
            "k31 state_index softmax": {"taps": 31, "indexed": True, "softmax": True, "gate": True},
            "k7 dynamic dilation 2": {"taps": 7, "kind": "dynamic", "dilation": 2},
            "k7 dynamic position state_index": {
                "taps": 7, "kind": "dynamic", "softmax": True, "renormalize": True, "position": 2, "indexed": True,
            },
        }.items():  # fmt: skip
            for head_size in (25, 32):  # that can be read in vectors, or not
                problem = StepProblem(
                    batch=5, heads=6, head_size=head_size, dtype=dtype, weight_dtype=dtype, seed=len(name), **options
                )
                yield Case("step", f"{name} {short(dtype)} {6 * head_size} channels", problem, ())


ATTENTIONS = {
    "no terms": {},
    "many keys": {"length": 40, "keys": 300, "groups": 1},
    "bias+query_rel": {"bias": True, "query_rel": 2},
    "query_rel+key_rel": {"query_rel": 1, "key_rel": 1},
    "key_rel per head, wide": {"bias": True, "query_rel": 2, "key_rel": 2, "left": 40, "right": 40},
    "rel_query": {"query_rel": 2, "rank": 20, "bias": True},
    "value_conv": {"value_conv": 3, "bias": True, "padding": 1},
    "causal": {"causal": True, "bias": True, "query_rel": 2},
    "outside zero": {"outside": 1, "query_rel": 1, "key_rel": 1},
    "outside mask": {"outside": 2, "bias": True, "query_rel": 1},
    "key_mask": {"padding": 2, "batch": 2, "length": 100, "keys": 100, "bias": True, "key_rel": 1, "query_rel": 1},
    "dropout": {"dropout": 0.3},
    "dropout, terms": {"dropout": 0.3, "bias": True, "query_rel": 2, "key_rel": 2},
    "packed": {"lengths": (70, 0, 1, 33), "key_lengths": (33, 5, 64, 40), "bias": True, "query_rel": 1},
    "packed causal, value_conv": {"lengths": (20, 65), "causal": True, "value_conv": 1, "key_rel": 2, "query_rel": 2},
    "shared keys": {"sharing": 2, "groups": 1, "bias": True, "query_rel": 2, "key_rel": 2, "value_conv": 2},
}


def attentions(group, family, dtype, head_size, names=tuple(ATTENTIONS), **options):
    for number, name in enumerate(names):
        # Tables come in the tensors' type, and in float32; a gradient of lse with every third seed.
        problem = AttentionProblem(**{
            "batch": 1, "length": 140, "keys": 140, "groups": 2, "left": 6, "right": 6, "head_size": head_size,
            "dtype": dtype, "table_dtype": dtype if number % 2 else torch.promote_types(dtype, F32), "seed": number,
            **ATTENTIONS[name], **options,
        })  # fmt: skip
        yield Case(group, f"d{head_size} {short(dtype)} {name}", problem, (family,) * 2)


def attention_cases():
    for dtype in (BF16, F16):
        for head_size in (64, 96, 128):
            yield from attentions(f"attention-{short(dtype)}-{head_size}", "tensor", dtype, head_size)
        few = ("bias+query_rel", "query_rel+key_rel", "dropout, terms", "packed")
        yield from attentions("attention-others", "tensor", dtype, 20, few)
        yield from attentions("attention-others", "tensor", dtype, 80, few)
        yield from attentions("attention-others", "plain", dtype, 160, few)
    yield from attentions("attention-plain", "plain", F32, 64)
    yield from attentions("attention-plain", "plain", F32, 40, ("packed", "packed causal, value_conv"))
    yield from attentions("attention-plain", "plain", F64, 64, ("dropout, terms", "packed", "value_conv"))


def all_cases():
    return [*convolution_cases(), *step_cases(), *attention_cases()]


def call_convolution(backend, problem, tensors):
    y = getattr(OPS._tap_conv, backend)(*problem.op_arguments(tensors))
    found = getattr(OPS._tap_grad, backend)(*problem.grad_arguments(tensors))
    return {"y": y, **{f"grad of {name}": g for name, g in zip(CONVOLUTION_INPUTS, found, strict=True)}}


def call_step(backend, problem, tensors):
    y = getattr(OPS._tap_step, backend)(*problem.op_arguments(tensors))
    return {"y": y, "state": tensors["state"]}


def call_attention(backend, problem, tensors):
    out, lse = getattr(OPS._attention, backend)(*problem.op_arguments(tensors))
    found = getattr(OPS._attention_grad, backend)(*problem.grad_arguments(tensors, out, lse))
    return {"out": out, "lse": lse, **{f"grad of {name}": g for name, g in zip(INPUTS, found, strict=True)}}


CALLS = {Problem: call_convolution, StepProblem: call_step, AttentionProblem: call_attention}


def error_of(found, expected):
    """Relative, of norms; infinite where a shape differs or a number is not finite."""
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
    """Families of the kernels forward and backward, None where this build does not tell, or where a block has too
    little shared memory for some kernels."""
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
    return tuple(plan(backward, **facts)["family"] for backward, facts in enumerate(both))


def run_case(case, backend, device):
    """What there is to say about a case: its errors, and why it failed."""
    problem = case.problem
    tensors = problem.tensors()
    call = CALLS[type(problem)]
    # Copies, as a step changes its state.
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
        if wanted not in (None, family):
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
    """All cases of a group, in this process; the number of failures."""
    failed = 0
    for place, case in enumerate(cases):
        start = time.perf_counter()
        try:
            said = run_case(case, arguments.backend, arguments.device)
        except Exception as error:
            said = {"families": [], "failure": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        said = {"group": case.group, "case": case.name, **said, "seconds": round(time.perf_counter() - start, 3)}
        failed += bool(said["failure"])
        # With a question mark where the build does not tell.
        wanted = [f"{family or 'any'}?" for family in case.families if arguments.backend == "cuda"]
        family = "/".join(dict.fromkeys(said["families"] or wanted)) or "-"
        worst = f"{said['worst']:.1e} of {said['bound']:.0e}" if "worst" in said else "-"
        verdict = f"FAIL: {said['failure']}" if said["failure"] else "ok"
        print(f"{case.group:22} {case.name:42} {family:13} {worst:16} {said['seconds']:6.2f} s  {verdict}", flush=True)
        if arguments.json:
            with open(arguments.json, "a") as file:
                file.write(json.dumps(said) + "\n")
        if said["failure"] and not device_works(arguments.device):
            print(f"{case.group}: the GPU has ended this process's work; {len(cases) - place - 1} cases are not run")
            break
    return failed


RUNNING = set()
WRITING = Lock()  # the file of results


def kill(process):
    """With what it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def read_what_is_left(process):
    """Of a process that was ended, unless the kernel holds it back, which a GPU can bring about."""
    try:
        return process.communicate(timeout=10)[0]
    except subprocess.TimeoutExpired as error:
        return (error.output or b"").decode(errors="replace")


def start_group(group, cases, arguments):
    """Runs a group in a process; how it ended in a few words ("" for well), and its results."""
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results"
        command = [
            *shlex.split(arguments.under), sys.executable, __file__, "--group", group, "--only", arguments.only,
            "--device", arguments.device, "--backend", arguments.backend, "--json", str(results),
        ]  # fmt: skip
        start = time.perf_counter()
        # In a session of its own, so that a program under another one is stopped with it.
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
    said = [json.loads(line) for line in lines]
    if arguments.json:
        with WRITING, open(arguments.json, "a") as file:
            file.writelines(f"{line}\n" for line in lines)
    if not ending and len(said) < len(cases):
        ending = "ended early"
    return {"group": group, "seconds": time.perf_counter() - start, "ending": ending, "cases": said}


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
        said = end["cases"]
        shares = [case["worst"] / case["bound"] for case in said if "worst" in case]
        failures = sum(bool(case["failure"]) for case in said)
        failed = failed or bool(failures or end["ending"])
        print(
            f"{end['group']:22} {len(groups[end['group']]):5} {len(said):5} {failures:6} "
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
