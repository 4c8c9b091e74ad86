"""The command line: `convkernels info | check`, and in a checkout `bench | plot`, which `benchmarks` has."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from pathlib import Path
from typing import NoReturn

import torch

import convkernels
from convkernels.backends import cuda

from . import environment
from .console import Mistake, first_sentence, guarded, need, say, table

ROOT = Path(convkernels.__file__).resolve().parents[1]
MEASURING = ("bench", "plot")


def info(arguments: argparse.Namespace) -> int:
    """Versions, backends with the reasons against them, instruction sets, threads, environment variables."""
    native = environment.native_module()
    cpu = torch.device("cpu")
    rows = [
        ("convkernels", convkernels.__version__),
        ("torch", torch.__version__),
        ("python", platform.python_version()),
        ("device", environment.device_name(cpu)),
        ("threads", str(torch.get_num_threads())),
        ("instruction set", f"{environment.active_isa()} (chosen {environment.isa_chosen()})"),
    ]
    if native:
        rows += [
            ("compiled for", ", ".join(native.compiled_isas())),
            ("usable here", ", ".join(environment.usable_isas(native))),
            ("compilers", ", ".join(f"{name}: {version}" for name, version in native.compilers.items())),
            ("oldest torch", native.torch_target),
            ("CUDA architectures", ", ".join(native.cuda_archs) or "none"),
        ]
    if torch.cuda.is_available():
        rows.append(("GPU", torch.cuda.get_device_name()))
        rows.append(("compute capability", cuda.describe(torch.cuda.get_device_capability(), native)))
    table("versions", ("what", "value"), rows)
    devices = [cpu] + ([torch.device("cuda")] if torch.cuda.is_available() else [])
    rows = []
    for device in devices:
        for name, reasons in environment.usable_backends(device).items():
            rows.append((name, device.type, "no" if reasons else "yes", "; ".join(reasons)))
    table("backends", ("backend", "device", "usable", "why not"), rows)
    rows = [row for device in devices for row in environment.automatic(device)]
    means = os.environ.get("CONVKERNELS_BACKEND") or "auto"
    without = "" if means == "auto" else f" (CONVKERNELS_BACKEND is {means}: nothing but that is taken)"
    table(f"what backend='auto' takes{without}", ("device", "dtype", "op", "backend", "because"), rows)
    table("environment variables", ("name", "value", "meaning"), environment.variables())
    return 0


def check(arguments: argparse.Namespace) -> int:
    """Compare every usable backend with float64: convolutions and attention on every instruction set of this CPU, and
    models; exit status 1 when an error exceeds its bound."""
    need("numpy", "check")
    from . import selfcheck

    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    if arguments.backend and not selfcheck.dtypes_of(arguments.backend, devices):
        reasons = {
            reason: None
            for device in devices
            for reason in convkernels.why_not(arguments.backend, device=device, dtype=torch.float32)
        }
        raise Mistake(f"--backend {arguments.backend}: {'; '.join(reasons)}")
    outcomes = []
    for outcome in selfcheck.run(devices, arguments.backend):
        print(f"checked {outcome.part}, {outcome.where}, {outcome.dtype}", file=sys.stderr, flush=True)
        outcomes.append(outcome)
    rows = [
        (
            o.part,
            o.backend,
            o.device if o.device != "cpu" or not o.isa else f"cpu, {o.isa}",
            o.dtype,
            str(o.checks),
            "-" if o.worst is None else f"{o.worst:.2f}",
            f"{o.seconds:.1f}",
            "FAIL" if o.failures else "ok",
        )
        for o in outcomes
    ]
    columns = ("part", "backend", "device", "dtype", "tensors", "error/bound", "seconds", "result")
    table("largest error as a fraction of its a-priori bound", columns, rows)
    failures = [failure for o in outcomes for failure in o.failures]
    for failure in failures[:20]:
        say(failure)
    isas = dict.fromkeys(o.isa for o in outcomes if o.isa)
    if isas:
        say(f"CPU instruction set in use: {environment.active_isa()} (chosen {environment.isa_chosen()})")
        say(f"CPU instruction sets checked: {', '.join(isas)}{selfcheck.why_not_all()}")
    if not selfcheck.models_here():
        say("not checked: models: transformers is not installed (pip install 'transformers>=5.17')")
    for name, reasons in environment.usable_backends(torch.device("cpu")).items():
        if reasons and name not in {o.backend for o in outcomes} and not arguments.backend:
            say(f"not checked: {name}: {'; '.join(reasons)}")
    return 1 if failures else 0


def benchmarks(arguments: list[str]) -> NoReturn:
    """Become a command of the checkout's benchmarks, which are not installed: a new program, since they place threads
    before torch is imported."""
    if not (ROOT / "benchmarks" / "cli.py").exists():
        raise Mistake(
            "the benchmarks are not installed: run `make bench`, and then `python -m benchmarks`, in a clone or an "
            "unpacked source distribution of convkernels"
        )
    # -P: the current folder may have benchmarks of its own.
    command = [sys.executable, "-P", "-m", "benchmarks", *arguments]
    os.execve(sys.executable, command, environment.with_checkout())


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="convkernels", description="Fused sequence convolutions and composite attention for PyTorch."
    )
    top.add_argument("--version", action="version", version=convkernels.__version__)
    commands = top.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help=first_sentence(info), description=info.__doc__).set_defaults(run=info)
    command = commands.add_parser("check", help=first_sentence(check), description=check.__doc__)
    command.set_defaults(run=check)
    command.add_argument("--backend", choices=convkernels.backends.names(), help="only this one (default: all usable)")
    for name in MEASURING:
        commands.add_parser(name, help=f"in a checkout: python -m benchmarks {name}")
    return top


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] in MEASURING:
        return guarded(f"convkernels {arguments[0]}", lambda: benchmarks(arguments))
    parsed = parser().parse_args(arguments)

    def run() -> int:
        environment.check_variables()
        return parsed.run(parsed)

    return guarded(f"convkernels {parsed.command}", run)
