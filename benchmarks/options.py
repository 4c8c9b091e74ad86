"""What each suite makes of the options of `bench`."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

import torch

import convkernels
from benchmarks import text
from convkernels.cli.console import Mistake, need

FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}

# What each suite takes of the options that not all take.
OPTIONS = {
    "sweep": {"lengths", "max_length", "dtypes", "channels", "heads", "taps", "tokens", "all_peers", "slow_call",
              "stop_call", "no_plots"},
    "attention": {"lengths", "max_length", "dtypes", "channels", "heads", "batch", "backend", "slow_call", "stop_call",
                  "no_plots"},
    "acceptance": {"lengths", "max_length", "dtypes", "slow_call"},
    "cpu": {"lengths", "dtypes"},
    "streaming": {"lengths", "batch", "backend"},
    "models": {"lengths", "max_length", "dtypes", "tokens", "models", "size", "layers", "all_peers", "backend",
               "slow_call", "stop_call", "no_plots"},
}  # fmt: skip


def check(arguments: argparse.Namespace) -> None:
    """Mistake for an option that has no effect on the suite."""
    name = arguments.suite
    for option in set.union(*OPTIONS.values()) - OPTIONS[name]:
        if getattr(arguments, option) not in (None, False):
            takers = ", ".join(suite for suite, options in OPTIONS.items() if option in options)
            raise Mistake(f"--{option.replace('_', '-')} has no effect on the suite {name}; it is for: {takers}")
    if name != "sweep" and arguments.compile_seconds:
        raise Mistake(f"--compile-seconds: the suite {name} takes 0 only, which leaves torch.compile out")


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
    from benchmarks.suites import sweep

    dtypes = tuple(FLOATS[name] for name in arguments.dtypes or ("float32", "bfloat16"))
    lengths = _lengths(arguments, sweep.Settings.lengths)
    settings = _settings(sweep.Settings, arguments, lengths=lengths, dtypes=dtypes)
    _divides(settings.heads, settings.channels)
    return sweep, sweep.Sweep(settings, device)


def _divides(heads: int, channels: int) -> None:
    if channels % heads:
        raise Mistake(f"--heads {heads}: expected a divisor of the channels, --channels {channels}")


def _attention(arguments: argparse.Namespace, device: torch.device) -> tuple:
    from benchmarks.suites import attention, attention_tables

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
    return attention_tables, attention.Suite(settings, device)


def _usable(backend: str, op: str, device: torch.device, dtype: torch.dtype) -> None:
    reasons = convkernels.why_not(backend, op=op, device=device, dtype=dtype)
    if reasons:
        raise Mistake(f"--backend {backend}: {'; '.join(reasons)}")


def _acceptance(arguments: argparse.Namespace, device: torch.device) -> tuple:
    from benchmarks.suites import acceptance, acceptance_tables

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
    return acceptance_tables, acceptance.Acceptance(settings, device)


def _cpu(arguments: argparse.Namespace, device: torch.device) -> tuple:
    from benchmarks.suites import cpu, cpu_tables

    if device.type != "cpu":
        raise Mistake(f"--device {device}: the goals of the suite cpu are for the device cpu")
    if reasons := convkernels.why_not("cpu", op="attention_grad", dtype=torch.bfloat16):
        raise Mistake(f"no CPU kernels to measure: {'; '.join(reasons)}; `make bench-cpu` compiles them")
    for option, known in (("lengths", cpu_tables.LENGTHS), ("dtypes", cpu_tables.DTYPES)):
        unknown = [str(value) for value in getattr(arguments, option) or () if value not in known]
        if unknown:
            raise Mistake(f"--{option} {','.join(unknown)}: the goals are for {', '.join(map(str, known))}")
    given = {option: tuple(getattr(arguments, option) or getattr(cpu.Settings, option)) for option in OPTIONS["cpu"]}
    settings = _settings(cpu.Settings, arguments, compiled=arguments.compile_seconds != 0, **given)
    return cpu_tables, cpu.Suite(settings, device)


def _streaming(arguments: argparse.Namespace, device: torch.device) -> tuple:
    from benchmarks.suites import streaming

    lengths = arguments.lengths or [streaming.Settings.length]
    if len(lengths) > 1:
        raise Mistake("--lengths: the suite streaming measures one length")
    settings = _settings(streaming.Settings, arguments, length=lengths[0], compiled=arguments.compile_seconds != 0)
    _usable(settings.backend, "tap_conv", device, settings.dtype)
    return streaming, streaming.Streaming(settings, device)


def _models(arguments: argparse.Namespace, device: torch.device) -> tuple:
    need("transformers", "the suite models")
    from benchmarks.suites import models, models_tables

    # The models' own lengths differ: those that are not given are left to each.
    settings = _settings(
        models.Settings,
        arguments,
        models=tuple(arguments.models or models.Settings.models),
        dtypes=tuple(arguments.dtypes or ("float32" if device.type == "cpu" else "bfloat16",)),
    )
    for case in settings.models:
        known = models.layers(case, settings.shape(case).size)
        if settings.shape(case).layers > known:
            raise Mistake(f"--layers {settings.layers}: {case}, {settings.shape(case).size}, has {known}")
    if arguments.lengths or arguments.max_length:
        defaults = {length for case in settings.models for length in settings.lengths_of(case)}
        settings = dataclasses.replace(settings, lengths=_lengths(arguments, tuple(defaults)))
    shortest = min(min(settings.lengths_of(case)) for case in settings.models)
    if shortest < text.SHORTEST:
        raise Mistake(f"--lengths {shortest}: expected {text.SHORTEST} or more, for a span to denoise")
    for dtype in settings.dtypes:
        for op in ("dynamic_conv1d", "attention_grad"):
            _usable(settings.backend, op, device, FLOATS[dtype])
    return models_tables, models.Suite(settings, device)


PREPARE = {"acceptance": _acceptance, "attention": _attention, "cpu": _cpu, "models": _models,
           "streaming": _streaming, "sweep": _sweep}  # fmt: skip
