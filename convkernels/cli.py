"""The command line: `convkernels info | check | bench | plot`."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import math
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

import convkernels

from ._bench import environment, timing
from ._bench.console import progress, say, table
from ._bench.results import Mistake, Store, is_section, read, reason_of, understood, writable_folder, write
from .backends import cuda

FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
INTERRUPTED = 130  # what a shell says of a program that Ctrl-C ended
PIPE_CLOSED = 141


def _need(module: str, reason: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise Mistake(f"{reason} needs {module}, which is not installed: pip install {module}")


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


def _triton_kernels(arguments: argparse.Namespace) -> tuple | str:
    """The rules and the figures of the Triton kernels, or why there are none."""
    try:
        from .backends.triton import ahead
    except ImportError as error:
        return f"needs {error.name}: pip install {error.name}"
    variants = [
        v for v in (*ahead.VARIANTS, *ahead.ATTENTION_VARIANTS) if not arguments.only or arguments.only in v.name
    ]
    architectures = [a for a in ahead.ARCHITECTURES if a in (arguments.architectures or ahead.ARCHITECTURES)]
    results = []
    if variants and architectures:
        with progress(len(variants)) as step:
            for variant in variants:
                results += ahead.measure_all(variant, tuple(architectures))
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
        raise Mistake("--update-budget replaces the whole budget: leave out --only and --architectures")
    if (arguments.update_budget or arguments.json) and not arguments.backend:
        raise Mistake("--update-budget and --json write what one backend's kernels take: add --backend")
    if arguments.backend not in (None, *KERNELS):
        raise Mistake(f"--kernels --backend {arguments.backend}: expected one of {', '.join(KERNELS)}")
    if arguments.json:
        writable_folder(arguments.json.parent, "--json: folder")
        if arguments.json.is_dir():
            raise Mistake(f"--json {arguments.json}: expected a file, got a folder")
    outcomes = {name: KERNELS[name](arguments) for name in ([arguments.backend] if arguments.backend else KERNELS)}
    measured = {name: outcome for name, outcome in outcomes.items() if not isinstance(outcome, str)}
    for name in outcomes.keys() - measured.keys():
        print(f"convkernels check --kernels: {name}: {outcomes[name]}", file=sys.stderr)
    if not measured:
        return 2
    found = {name: outcome for name, outcome in measured.items() if outcome[1]}
    if not found:
        chosen = [f"--only {arguments.only}"] if arguments.only else []
        chosen += [f"--architectures {','.join(map(str, arguments.architectures))}"] if arguments.architectures else []
        raise Mistake(f"{' '.join(chosen)}: no kernel of {' or '.join(measured)} is meant by that")
    return max(_show_kernels(name, *outcome, arguments) for name, outcome in found.items())


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
    loops = [(r, loop) for r in results for loop in r.loops if not loop.fault]
    if loops:
        kinds = list(loops[0][1].classes)
        rows = [
            (loop.variant, loop.kernel, loop.case, f"sm_{r.architecture}", f"{loop.instructions:.1f} / {loop.per}",
             str(loop.body), *(f"{loop.classes[kind]:.1f}" for kind in kinds))
            for r, loop in loops
        ]  # fmt: skip
        table(f"instructions of main loops, {name}", ("variant", "kernel", "case", "for", "all", "body", *kinds), rows)
    if arguments.json:
        write(arguments.json, rules.to_json(results))
        say(f"wrote {arguments.json}")
    if arguments.update_budget:
        up = rules.update(results)
        say(f"wrote {rules.budget}: {'these go up' if up else 'nothing goes up'}")
        for line in up:
            say(line)
    if (why := rules.not_compared()) is not None:
        print(f"convkernels check --kernels: {name}: {why}", file=sys.stderr)
    violations = rules.violations(results, everything=not arguments.only)
    for violation in violations:
        say(violation)
    return 1 if violations else 0


def check(arguments: argparse.Namespace) -> int:
    """Compare every usable backend with float64: convolutions and attention on every instruction set of this CPU, and
    models; exit status 1 when an error exceeds its bound."""
    if arguments.kernels:
        return _check_kernels(arguments)
    for name in ("architectures", "only", "json", "update_budget"):
        if getattr(arguments, name):
            raise Mistake(f"--{name.replace('_', '-')} is about compiled kernels: add --kernels")
    _need("numpy", "check")
    from ._bench import selfcheck

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
        say(f"CPU instruction sets checked: {', '.join(isas)}{selfcheck.why_not_all()}")
    if not selfcheck.models_here():
        say("not checked: models: transformers is not installed (pip install 'transformers>=5.17')")
    for name, reasons in environment.usable_backends(torch.device("cpu")).items():
        if reasons and name not in {o.backend for o in outcomes} and not arguments.backend:
            say(f"not checked: {name}: {'; '.join(reasons)}")
    return 1 if failures else 0


def _draw(results: Path, suite: str, section: dict[str, Any], folder: Path, dtypes: list[str] | None) -> None:
    from ._bench import figures

    with understood(f"{results}: its part {suite}"):
        paths = figures.draw(suite, section, folder, dtypes)
    for path in paths:
        say(f"wrote {path}")


# What each suite takes of the options that not all take.
OPTIONS = {
    "sweep": {"lengths", "max_length", "dtypes", "channels", "heads", "taps", "tokens", "all_peers", "slow_call",
              "stop_call", "no_plots"},
    "attention": {"lengths", "max_length", "dtypes", "channels", "heads", "batch", "backend", "slow_call", "stop_call",
                  "no_plots"},
    "acceptance": {"lengths", "max_length", "dtypes", "slow_call"},
    "streaming": {"lengths", "batch", "backend"},
}  # fmt: skip


def bench(arguments: argparse.Namespace) -> int:
    """Measure, print tables, write JSON and plots. Results are saved as they come, so that Ctrl-C loses only what is
    being measured. Lengths and dtypes that the file has already are replaced, its others kept."""
    name, plotted = arguments.suite, "no_plots" in OPTIONS[arguments.suite] and not arguments.no_plots
    for option in set.union(*OPTIONS.values()) - OPTIONS[name]:
        if getattr(arguments, option) not in (None, False):
            takers = ", ".join(suite for suite, options in OPTIONS.items() if option in options)
            raise Mistake(f"--{option.replace('_', '-')} has no effect on the suite {name}; it is for: {takers}")
    if name != "sweep" and arguments.compile_seconds:
        raise Mistake(f"--compile-seconds: the suite {name} takes 0 only, which leaves torch.compile out")
    if plotted:
        _need("matplotlib", "plotting (--no-plots does without it)")
    if arguments.threads:
        cpus = len(timing.own_cpus())
        if arguments.threads > cpus:
            raise Mistake(f"--threads {arguments.threads}: this process has {cpus} CPUs")
        torch.set_num_threads(arguments.threads)
    prepare = {"acceptance": _acceptance, "attention": _attention, "streaming": _streaming, "sweep": _sweep}
    module, suite = prepare[name](arguments, arguments.device)
    backend = arguments.backend or "auto"
    empty = suite.section()
    path = arguments.output / f"{environment.file_stem(empty['environment'])}.json"
    store = Store(path, name if backend == "auto" else f"{name} {backend}", empty, arguments.overwrite)
    busy, interrupted, no_memory = _disturbance(arguments.device), False, ""
    try:
        suite.run(store.save)
        busy = max(busy, _disturbance(arguments.device))
    except KeyboardInterrupt:
        interrupted = True
    except (MemoryError, RuntimeError) as error:
        known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if not known and not any(sign in str(error) for sign in ("can't allocate", "size calculation overflowed")):
            raise
        no_memory = f"there is not enough memory for these sizes: {str(error).strip().splitlines()[-1]}"
    section = suite.section()
    if busy:
        section["environment"]["busy_cpus"] = round(busy, 1)
    errors = [*section.get("errors", ()), *filter(None, [no_memory])]
    if not section["records"] and errors and not interrupted:
        print("bench: nothing could be measured", *errors, sep="\n", file=sys.stderr)
        return 1
    if not section["records"]:
        print("bench: interrupted before anything was measured", file=sys.stderr)
        return INTERRUPTED
    module.print_tables(section)
    store.save(section)
    if store.error:
        print(f"bench: {path} could not be written: {store.error}", file=sys.stderr)
        return INTERRUPTED if interrupted else 1
    say(f"wrote {path}")
    saved = read(path)[store.name]
    if name == "acceptance":
        report = path.with_suffix(".md")
        write(report, module.markdown(saved) + "\n")
        say(f"wrote {report}")
    if plotted:
        _draw(path, name, saved, arguments.output, None)
    if interrupted:
        print("bench: interrupted; the tables show what was measured until then", file=sys.stderr)
    if no_memory:
        print(f"bench: {no_memory}; the tables show what was measured before", file=sys.stderr)
    return INTERRUPTED if interrupted else 1 if errors else 0


def _disturbance(device: torch.device) -> float:
    """The CPUs that other processes keep busy, with a warning, where that leaves too few for the threads; else 0."""
    threads, cpus = torch.get_num_threads(), len(timing.own_cpus())
    busy = timing.busy_cpus() if device.type == "cpu" else 0.0
    if busy < max(0.5, cpus - threads + 0.5):
        return 0.0
    print(
        f"bench: warning: other processes keep {busy:.1f} of {cpus} CPUs busy, and {threads} threads are measured: "
        "times can be many times too long. Measure when they have ended, or with fewer --threads.",
        file=sys.stderr,
    )
    return busy


def _lengths(arguments: argparse.Namespace, default: tuple[int, ...]) -> tuple[int, ...]:
    lengths = set(arguments.lengths or default)
    if arguments.max_length:
        length = max(lengths)
        while (length := 2 * length) <= arguments.max_length:
            lengths.add(length)
        shortest, lengths = min(lengths), {n for n in lengths if n <= arguments.max_length}
        if not lengths:
            raise Mistake(
                f"--max-length {arguments.max_length}: nothing would be measured, the shortest length is {shortest}; "
                "--lengths gives others"
            )
    return tuple(sorted(lengths))


def _settings(kind: type, arguments: argparse.Namespace, **changes) -> Any:
    """Settings of a suite from the options that were given, and these."""
    given = {field.name: getattr(arguments, field.name, None) for field in dataclasses.fields(kind)}
    return kind(**{name: value for name, value in given.items() if value is not None} | changes)


def _sweep(arguments: argparse.Namespace, device: torch.device) -> tuple:
    from ._bench import sweep

    dtypes = tuple(FLOATS[name] for name in arguments.dtypes or ("float32", "bfloat16"))
    lengths = _lengths(arguments, sweep.Settings.lengths)
    settings = _settings(sweep.Settings, arguments, lengths=lengths, dtypes=dtypes)
    _divides(settings.heads, settings.channels)
    return sweep, sweep.Sweep(settings, device)


def _divides(heads: int, channels: int) -> None:
    if channels % heads:
        raise Mistake(f"--heads {heads}: expected a divisor of the channels, --channels {channels}")


def _attention(arguments: argparse.Namespace, device: torch.device) -> tuple:
    from ._bench import attention

    defaults = attention.Settings()
    heads = arguments.heads or defaults.heads
    channels = arguments.channels or defaults.heads * defaults.head_size
    _divides(heads, channels)
    settings = _settings(
        attention.Settings,
        arguments,
        lengths=_lengths(arguments, defaults.lengths),
        dtypes=tuple(arguments.dtypes or defaults.dtypes),
        head_size=channels // heads,
        compiled=arguments.compile_seconds != 0,
    )
    for dtype in settings.dtypes:
        _usable(settings.backend, "attention_grad", device, FLOATS[dtype])
    return attention, attention.Suite(settings, device)


def _usable(backend: str, op: str, device: torch.device, dtype: torch.dtype) -> None:
    reasons = convkernels.why_not(backend, op=op, device=device, dtype=dtype)
    if reasons:
        raise Mistake(f"--backend {backend}: {'; '.join(reasons)}")


def _acceptance(arguments: argparse.Namespace, device: torch.device) -> tuple:
    from ._bench import acceptance

    unknown = [name for name in arguments.dtypes or () if name not in acceptance.DTYPES]
    if unknown:
        raise Mistake(f"--dtypes {','.join(unknown)}: the targets are for {', '.join(acceptance.DTYPES)}")
    defaults = acceptance.Settings()
    settings = _settings(
        acceptance.Settings,
        arguments,
        lengths=_lengths(arguments, defaults.lengths),
        dtypes=tuple(arguments.dtypes or defaults.dtypes),
        compiled=arguments.compile_seconds != 0,
    )
    return acceptance, acceptance.Acceptance(settings, device)


def _streaming(arguments: argparse.Namespace, device: torch.device) -> tuple:
    from ._bench import streaming

    lengths = arguments.lengths or [streaming.Settings.length]
    if len(lengths) > 1:
        raise Mistake("--lengths: the suite streaming measures one length")
    settings = _settings(streaming.Settings, arguments, length=lengths[0], compiled=arguments.compile_seconds != 0)
    _usable(settings.backend, "tap_conv", device, settings.dtype)
    return streaming, streaming.Streaming(settings, device)


def _only_results(folder: Path) -> Path:
    found = sorted(folder.glob("*.json"))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "no .json"
        raise Mistake(f"{folder}: expected a results file, or a folder that holds one, got {names} in the folder")
    return found[0]


def plot(arguments: argparse.Namespace) -> int:
    """Draw the plots of a results file again."""
    if arguments.results.is_dir():
        arguments.results = _only_results(arguments.results)
    results = read(arguments.results)
    _need("matplotlib", "plot")
    from ._bench import figures

    suites = [suite for suite in figures.PLOTS if is_section(results.get(suite))]
    if not suites:
        raise Mistake(f"{arguments.results} holds no measurements to draw: run `convkernels bench` first")
    folder = arguments.output or arguments.results.parent
    writable_folder(folder, "--output")
    for suite in suites:
        _draw(arguments.results, suite, results[suite], folder, arguments.dtypes)
    return 0


LARGEST = 2**24  # of a number that makes sizes: products of two fit into what torch can count


def _positive(value: str) -> int:
    if not value.strip().isdecimal() or not 1 <= int(value) <= LARGEST:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 to {LARGEST}, got {value!r}")
    return int(value)


def _seconds(value: str, least: float = math.ulp(0.0)) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not least <= number < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number of seconds {'from 0 on' if least == 0 else 'above 0'}, "
                                         f"got {value!r}")  # fmt: skip
    return number


def _seconds_or_none(value: str) -> float:
    return _seconds(value, 0.0)


def _device(value: str) -> torch.device:
    try:
        device = torch.device(value)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"expected cpu or cuda, got {value!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(f"torch sees {torch.cuda.device_count()} GPUs, got {value!r}")
    return device


def _distinct(values: list) -> list:
    twice = [value for value in values if values.count(value) > 1]
    if twice:
        raise argparse.ArgumentTypeError(f"{twice[0]} is given twice")
    return values


def _names(value: str) -> list[str]:
    names = value.split(",")
    unknown = [name for name in names if name not in FLOATS]
    if unknown:
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(FLOATS)}, got {', '.join(unknown) or 'nothing'}")
    return _distinct(names)


def _numbers(value: str) -> list[int]:
    return _distinct([_positive(part) for part in value.split(",")])


def _check_variables() -> None:
    """Mistake for variables that every call of the package would stumble over."""
    native, known = environment.native_module(), {"CONVKERNELS_BACKEND": ("auto", *convkernels.backends.names())}
    if native:
        known["CONVKERNELS_CPU_ISA"] = tuple(native.compiled_isas())
    for name, values in known.items():
        value = os.environ.get(name)
        if value and value not in values:
            raise Mistake(f"environment variable '{name}': expected one of {', '.join(values)}, got {value!r}")


def _first_sentence(command) -> str:
    return " ".join(command.__doc__.split()).split(". ")[0]


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="convkernels", description="Fused sequence convolutions and composite attention for PyTorch."
    )
    top.add_argument("--version", action="version", version=convkernels.__version__)
    commands = top.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help=_first_sentence(info), description=info.__doc__).set_defaults(run=info)

    command = commands.add_parser("check", help=_first_sentence(check), description=check.__doc__)
    command.set_defaults(run=check)
    add = command.add_argument
    add(
        "--kernels",
        action="store_true",
        help="instead show what the kernels for GPUs cost: those of the CUDA library, and Triton's compiled here",
    )
    add("--backend", choices=convkernels.backends.names(), help="only this one (default: all that are usable)")
    add("--architectures", type=_numbers, help="compute capabilities (default: 80,90,100)")
    add("--only", help="variants whose name contains this")
    add("--json", type=Path, help="also write the table here")
    add("--update-budget", action="store_true", help="make these figures the committed budget")

    command = commands.add_parser("bench", help=_first_sentence(bench), description=bench.__doc__)
    command.set_defaults(run=bench)
    add = command.add_argument
    add(
        "--suite",
        choices=("sweep", "attention", "acceptance", "streaming"),
        default="sweep",
        help="speed against length of convolutions or of attention, the target table, or the fraction of memory speed "
        "on tensors of 64 MB and more",
    )
    add(
        "--backend",
        choices=("auto", *convkernels.backends.names()),
        help="of the streaming and attention suites; its results are kept apart (default: auto)",
    )
    add("--batch", type=_positive, help="rows of the batch in the streaming (default: 16) and attention (4) suites")
    add(
        "--output",
        type=Path,
        default=Path("convkernels-bench"),
        help="folder for JSON, PNG and Markdown files (default: convkernels-bench)",
    )
    add(
        "--overwrite",
        action="store_true",
        help="replace all of this suite's results in the file; without it, results of other settings are refused and "
        "other lengths and dtypes kept",
    )
    add("--no-plots", action="store_true", help="no PNG files, and no matplotlib needed")
    add("--device", type=_device, default="cpu", help="cpu or cuda (default: cpu)")
    add("--threads", type=_positive, help="CPU threads (default: what torch takes)")
    add("--lengths", type=_numbers, help="sequence lengths, e.g. 64,512,4096 (default: those of the suite)")
    add("--max-length", type=_positive, help="go on doubling up to this length, or stop before the default's end")
    add("--dtypes", type=_names, help="default: float32,bfloat16")
    add(
        "--seconds",
        type=_seconds,
        help="time for timed repeats, of the whole sweep (default: 10) or of each group of another suite (attention 6, "
        "acceptance 1, streaming 1)",
    )
    add(
        "--slow-call",
        type=_seconds,
        help="seconds; a slower call is not repeated (default: sweep 0.25, attention 4, acceptance 0.1)",
    )
    add(
        "--stop-call",
        type=_seconds,
        help="seconds; what takes longer in a call is not run at longer sequences (default: sweep 0.7, attention 20)",
    )
    add(
        "--compile-seconds",
        type=_seconds_or_none,
        help="time for torch.compile in the sweep (default: 20); 0, in every suite: without it",
    )
    add("--channels", type=_positive, help="default: 768")
    add("--heads", type=_positive, help="distinct filters, and attention heads (default: 12)")
    add("--taps", type=_positive, help="filter width (default: 7)")
    add("--tokens", type=_positive, help="tokens per batch (default: 2048)")
    add(
        "--all-peers",
        action="store_true",
        default=None,
        help="also conv2d channels-last, unfold, band matrix, compiled dynamic",
    )

    command = commands.add_parser("plot", help=_first_sentence(plot), description=plot.__doc__)
    command.set_defaults(run=plot)
    command.add_argument("results", type=Path, help="JSON file written by `convkernels bench`, or its folder")
    command.add_argument("--output", type=Path, help="folder for the PNG files (default: beside the results)")
    command.add_argument("--dtypes", type=_names, help="draw only these")
    return top


def main(arguments: list[str] | None = None) -> int:
    parsed = parser().parse_args(arguments)
    if sys.stdout is None:  # closed by the shell
        sys.stdout = open(os.devnull, "w")
    try:
        _check_variables()
        status = parsed.run(parsed)
        sys.stdout.flush()
        return status
    except Mistake as error:
        print(f"convkernels {parsed.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"convkernels {parsed.command}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except OSError as error:
        # Python would fail once more, when it closes the stream.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return PIPE_CLOSED
        print(f"convkernels {parsed.command}: {reason_of(error)}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
