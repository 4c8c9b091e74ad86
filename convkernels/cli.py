"""The command line: `convkernels info | check | bench | plot`."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from pathlib import Path
from typing import Any

import torch

import convkernels

from ._bench import environment
from ._bench.console import progress, say, table

FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
NEEDS_EXTRA = "{} needs {}, which is not installed: pip install 'convkernels[bench]'"


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
        ("instruction set", environment.active_isa()),
    ]
    if native:
        rows += [
            ("compiled for", ", ".join(native.compiled_isas())),
            ("compilers", ", ".join(f"{name}: {version}" for name, version in native.compilers.items())),
            ("oldest torch", native.torch_target),
            ("CUDA architectures", ", ".join(native.cuda_archs) or "none"),
        ]
    if torch.cuda.is_available():
        rows.append(("GPU", torch.cuda.get_device_name()))
    table("versions", ("what", "value"), rows)
    devices = [cpu] + ([torch.device("cuda")] if torch.cuda.is_available() else [])
    rows = []
    for device in devices:
        for name, reasons in environment.usable_backends(device).items():
            rows.append((name, device.type, "no" if reasons else "yes", "; ".join(reasons)))
    table("backends", ("backend", "device", "usable", "why not"), rows)
    rows = [row for device in devices for row in environment.automatic(device)]
    table("what backend='auto' takes", ("device", "dtype", "op", "backend", "because"), rows)
    table("environment variables", ("name", "value", "meaning"), environment.variables())
    return 0


def _triton_kernels(arguments: argparse.Namespace) -> tuple | str:
    """The rules and the figures of the Triton kernels, or why there are none."""
    try:
        from .backends.triton import ahead
    except ImportError as error:
        return f"needs {error.name}: pip install 'convkernels[triton]'"
    variants = [
        v for v in (*ahead.VARIANTS, *ahead.ATTENTION_VARIANTS) if not arguments.only or arguments.only in v.name
    ]
    results = []
    with progress(len(variants)) as step:
        for variant in variants:
            results += ahead.measure_all(variant, tuple(arguments.architectures or ahead.ARCHITECTURES))
            step(variant.name, 1)
    return ahead.RULES, results


def _cuda_kernels(arguments: argparse.Namespace) -> tuple | str:
    """The rules and the figures of the kernels in the CUDA library, or why there are none."""
    from .backends import cuda_ahead as ahead

    missing = ahead.missing()
    if missing:
        return missing
    return ahead.rules(), ahead.measure_all(tuple(map(str, arguments.architectures or ())), arguments.only)


KERNELS = {"triton": _triton_kernels, "cuda": _cuda_kernels}


def _check_kernels(arguments: argparse.Namespace) -> int:
    """Show what compiled kernels cost; exit status 1 where they break a rule or exceed their budget."""
    if arguments.update_budget and (arguments.only or arguments.architectures):
        print("check: --update-budget replaces the whole budget: leave out --only and --architectures", file=sys.stderr)
        return 2
    if (arguments.update_budget or arguments.json) and not arguments.backend:
        print("check: --update-budget and --json write what one backend's kernels take: add --backend", file=sys.stderr)
        return 2
    outcomes = {name: KERNELS[name](arguments) for name in ([arguments.backend] if arguments.backend else KERNELS)}
    measured = {name: outcome for name, outcome in outcomes.items() if not isinstance(outcome, str)}
    for name in outcomes.keys() - measured.keys():
        print(f"convkernels check --kernels: {name}: {outcomes[name]}", file=sys.stderr)
    if not measured:
        return 2
    return max(_show_kernels(name, *outcome, arguments) for name, outcome in measured.items())


def _show_kernels(name: str, rules, results: list, arguments: argparse.Namespace) -> int:
    rows = [
        (
            r.variant,
            r.kernel,
            f"sm_{r.architecture}",
            str(r.registers),
            str(r.spills),
            str(r.shared),
            f"{r.wide_loads} / {r.narrow_loads}",
            f"{r.wide_stores} / {r.narrow_stores}",
            str(r.matrix),
        )
        for r in results
    ]
    columns = ("variant", "kernel", "for", "registers", "spilled bytes", "shared bytes", "loads 16 B / less",
               "stores 16 B / less", "matrix instructions")  # fmt: skip
    table(f"ahead-of-time compiled kernels, {name}", columns, rows)
    if arguments.json:
        arguments.json.write_text(rules.to_json(results))
        say(f"wrote {arguments.json}")
    if arguments.update_budget:
        rules.budget.write_text(rules.to_budget(results))
        say(f"wrote {rules.budget}")
    violations = rules.violations(results)
    for violation in violations:
        say(violation)
    return 1 if violations else 0


def check(arguments: argparse.Namespace) -> int:
    """Compare every usable backend with float64; exit status 1 when an error exceeds its bound."""
    if arguments.kernels:
        return _check_kernels(arguments)
    try:
        from ._bench import selfcheck
    except ImportError as error:
        print(NEEDS_EXTRA.format("convkernels check", error.name), file=sys.stderr)
        return 2
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    outcomes = list(selfcheck.run(devices))
    rows = [
        (
            o.backend,
            o.device,
            str(o.dtype)[6:],
            str(o.checks),
            f"{o.worst:.2f}",
            f"{o.seconds:.1f}",
            "FAIL" if o.failures else "ok",
        )
        for o in outcomes
    ]
    columns = ("backend", "device", "dtype", "tensors", "error/bound", "seconds", "result")
    table("largest error as a fraction of its a-priori bound", columns, rows)
    failures = [failure for o in outcomes for failure in o.failures]
    for failure in failures[:20]:
        say(failure)
    for name, reasons in environment.usable_backends(torch.device("cpu")).items():
        if reasons:
            say(f"not checked: {name}: {'; '.join(reasons)}")
    return 1 if failures else 0


def _save(path: Path, section: str, content: dict[str, Any]) -> None:
    """Write one section of a results file and keep the others."""
    results = json.loads(path.read_text()) if path.exists() else {}
    results[section] = content
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    say(f"wrote {path}")


def _draw(section: dict[str, Any], folder: Path, dtypes: list[str] | None) -> int:
    try:
        from ._bench import figures

        for path in figures.draw(section, folder, dtypes):
            say(f"wrote {path}")
    except ModuleNotFoundError as error:
        print(NEEDS_EXTRA.format("plotting", error.name), file=sys.stderr)
        return 2
    return 0


def bench(arguments: argparse.Namespace) -> int:
    """Measure, print tables, write JSON and plots."""
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("bench: --device cuda: torch sees no GPU", file=sys.stderr)
        return 2
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    path = arguments.output / f"{environment.file_stem(environment.describe(device))}.json"
    return {"acceptance": _acceptance, "streaming": _streaming, "sweep": _sweep}[arguments.suite](
        arguments, device, path
    )


def _lengths(arguments: argparse.Namespace, default: tuple[int, ...]) -> tuple[int, ...]:
    lengths = set(arguments.lengths or default)
    if arguments.max_length:
        length = max(lengths)
        while (length := 2 * length) <= arguments.max_length:
            lengths.add(length)
        lengths = {n for n in lengths if n <= arguments.max_length}
    return tuple(sorted(lengths))


def _sweep(arguments: argparse.Namespace, device: torch.device, path: Path) -> int:
    from ._bench import sweep

    defaults = sweep.Settings()
    settings = sweep.Settings(
        lengths=_lengths(arguments, defaults.lengths),
        dtypes=tuple(FLOATS[name] for name in arguments.dtypes),
        channels=arguments.channels,
        heads=arguments.heads,
        taps=arguments.taps,
        tokens=arguments.tokens,
        seconds=arguments.seconds or defaults.seconds,
        slow_call=arguments.slow_call or defaults.slow_call,
        stop_call=arguments.stop_call or defaults.stop_call,
        compile_seconds=defaults.compile_seconds if arguments.compile_seconds is None else arguments.compile_seconds,
        all_peers=arguments.all_peers,
    )
    section = sweep.Sweep(settings, device).run()
    sweep.print_tables(section)
    _save(path, "sweep", section)
    return _draw(section, arguments.output, None)


def _acceptance(arguments: argparse.Namespace, device: torch.device, path: Path) -> int:
    from ._bench import acceptance

    unknown = [name for name in arguments.dtypes if name not in acceptance.DTYPES]
    if unknown:
        print(
            f"bench: --dtypes {','.join(unknown)}: the targets are for {', '.join(acceptance.DTYPES)}", file=sys.stderr
        )
        return 2
    defaults = acceptance.Settings()
    settings = acceptance.Settings(
        lengths=_lengths(arguments, defaults.lengths),
        dtypes=tuple(arguments.dtypes),
        compiled=arguments.compile_seconds != 0,
        seconds=arguments.seconds or defaults.seconds,
        slow_call=arguments.slow_call or defaults.slow_call,
    )
    section = acceptance.Acceptance(settings, device).run()
    acceptance.print_tables(section)
    _save(path, "acceptance", section)
    report = path.with_suffix(".md")
    report.write_text(acceptance.markdown(section) + "\n")
    say(f"wrote {report}")
    return 0


def _streaming(arguments: argparse.Namespace, device: torch.device, path: Path) -> int:
    from ._bench import streaming

    defaults = streaming.Settings()
    settings = streaming.Settings(
        batch=arguments.batch or defaults.batch,
        length=max(arguments.lengths) if arguments.lengths else defaults.length,
        compiled=arguments.compile_seconds != 0,
        seconds=arguments.seconds or defaults.seconds,
        backend=arguments.backend,
    )
    reasons = convkernels.why_not(settings.backend, device=device, dtype=settings.dtype)
    if reasons:
        print(f"bench: --backend {settings.backend}: {'; '.join(reasons)}", file=sys.stderr)
        return 2
    section = streaming.Streaming(settings, device).run()
    streaming.print_tables(section)
    for failure in section["failures"]:
        say(failure)
    _save(path, "streaming" if settings.backend == "auto" else f"streaming {settings.backend}", section)
    return 0


def plot(arguments: argparse.Namespace) -> int:
    """Draw the plots of a results file again."""
    section = json.loads(arguments.results.read_text()).get("sweep")
    if section is None:
        print(f"plot: {arguments.results} holds no sweep; run `convkernels bench` first", file=sys.stderr)
        return 2
    return _draw(section, arguments.output or arguments.results.parent, arguments.dtypes)


def _positive(value: str) -> int:
    number = int(value)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {value}")
    return number


def _names(value: str) -> list[str]:
    names = value.split(",")
    unknown = [name for name in names if name not in FLOATS]
    if unknown:
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(FLOATS)}, got {', '.join(unknown)}")
    return names


def _numbers(value: str) -> list[int]:
    return [_positive(part) for part in value.split(",")]


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="convkernels", description="Fused sequence convolutions for PyTorch.")
    top.add_argument("--version", action="version", version=convkernels.__version__)
    commands = top.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help=info.__doc__).set_defaults(run=info)

    command = commands.add_parser("check", help=check.__doc__)
    command.set_defaults(run=check)
    add = command.add_argument
    add(
        "--kernels",
        action="store_true",
        help="instead show what the kernels for GPUs cost: those of the CUDA library, and Triton's compiled here",
    )
    add("--backend", choices=KERNELS, help="only the kernels of this one (default: both)")
    add("--architectures", type=_numbers, help="compute capabilities (default: 80,90,100)")
    add("--only", help="variants whose name contains this")
    add("--json", type=Path, help="also write the table here")
    add("--update-budget", action="store_true", help="make these figures the committed budget")

    command = commands.add_parser("bench", help=bench.__doc__)
    command.set_defaults(run=bench)
    add = command.add_argument
    add(
        "--suite",
        choices=("sweep", "acceptance", "streaming"),
        default="sweep",
        help="speed against length, the target table, or the fraction of memory speed on tensors of 64 MB and more",
    )
    add(
        "--backend",
        choices=("auto", *convkernels.backends.names()),
        default="auto",
        help="of the streaming suite; its results are kept apart (default: auto)",
    )
    add("--batch", type=_positive, help="rows of the batch in the streaming suite (default: 16)")
    add("--output", type=Path, default=Path("convkernels-bench"), help="folder for JSON, PNG and Markdown files")
    add("--device", default="cpu", help="cpu or cuda (default: cpu)")
    add("--threads", type=_positive, help="CPU threads (default: what torch takes)")
    add("--lengths", type=_numbers, help="sequence lengths, e.g. 64,512,4096")
    add("--max-length", type=_positive, help="go on doubling up to this length, or stop before the default's end")
    add("--dtypes", type=_names, default=["float32", "bfloat16"], help="default: float32,bfloat16")
    add("--seconds", type=float, help="time for timed repeats: of the whole sweep, or of each acceptance group")
    add("--slow-call", type=float, help="seconds; a slower call is not repeated")
    add("--stop-call", type=float, help="seconds; a peer with a slower call is not run at longer sequences")
    add("--compile-seconds", type=float, help="time for torch.compile (0: without; acceptance: no limit)")
    add("--channels", type=_positive, default=768)
    add("--heads", type=_positive, default=12, help="distinct filters, and attention heads (default: 12)")
    add("--taps", type=_positive, default=7, help="filter width (default: 7)")
    add("--tokens", type=_positive, default=2048, help="tokens per batch (default: 2048)")
    add("--all-peers", action="store_true", help="also conv2d channels-last, unfold, band matrix, compiled dynamic")

    command = commands.add_parser("plot", help=plot.__doc__)
    command.set_defaults(run=plot)
    command.add_argument("results", type=Path, help="JSON file written by `convkernels bench`")
    command.add_argument("--output", type=Path, help="folder for the PNG files (default: beside the results)")
    command.add_argument("--dtypes", type=_names, help="draw only these")
    return top


def main(arguments: list[str] | None = None) -> int:
    parsed = parser().parse_args(arguments)
    return parsed.run(parsed)


if __name__ == "__main__":
    sys.exit(main())
