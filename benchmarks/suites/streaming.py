"""How near the kernels come to the speed of memory: tensors of 64 MB and more, against a copy of as few bytes.

    fraction of a copy = time of y.copy_(x) * (bytes moved at least) / (bytes of that copy) / time of the kernel

At least means: every input read once, every output written once. In units of x: 2 forward and 3 backward, one more
forward and two more backward with a gate, rho = K * H / C more forward and 2 * rho more backward for dynamic filters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

import convkernels
from benchmarks import timing
from benchmarks.peers import DYNAMIC, LIGHTWEIGHT, PEERS, Problem
from benchmarks.suites import BACKWARD, COPY, FORWARD, OURS
from convkernels.cli import environment
from convkernels.cli.console import progress, say, table
from convkernels.ops._dtypes import dtype_name


@dataclass(frozen=True)
class Settings:
    batch: int = 16
    length: int = 4096
    channels: int = 1024
    heads: int = 16
    dtype: torch.dtype = torch.bfloat16
    compiled: bool = True
    seconds: float = 1.0
    backend: str = "auto"


@dataclass(frozen=True)
class Case:
    """An op and the fractions of a copy that it should reach, forward and backward."""

    op: str
    taps: int
    targets: tuple[float, float]
    gate: bool = False
    peers: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.op}{' gate mask' if self.gate else ''} K={self.taps}"

    def passes(self, settings: Settings) -> tuple[float, float]:
        """Least traffic of the forward and of the backward pass in units of the bytes of x."""
        rho = self.taps * settings.heads / settings.channels if self.op == DYNAMIC else 0.0
        return 2 + self.gate + rho, 3 + 2 * self.gate + 2 * rho


CASES = (
    Case(LIGHTWEIGHT, 3, (0.93, 0.90)),
    Case(LIGHTWEIGHT, 7, (0.93, 0.90), peers=("conv1d", "compile")),
    Case(LIGHTWEIGHT, 15, (0.90, 0.87)),
    Case(LIGHTWEIGHT, 31, (0.88, 0.85), peers=("conv1d", "compile", "unfold")),
    Case(LIGHTWEIGHT, 7, (0.88, 0.85), gate=True),
    Case(LIGHTWEIGHT, 31, (0.88, 0.85), gate=True),
    Case(DYNAMIC, 7, (0.88, 0.80)),
    Case(DYNAMIC, 31, (0.88, 0.80)),
)


class Streaming:
    """Times every case. What fails is recorded: a peer in `failures`, ours in `errors`."""

    def __init__(self, settings: Settings, device: torch.device) -> None:
        self.settings, self.device = settings, device
        self.records: list[dict[str, Any]] = []
        self.failures: list[str] = []
        self.errors: list[str] = []

    def _failed(self, subject: str, name: str, error: Exception) -> None:
        if name == COPY:
            raise error
        failed = self.errors if name == OURS else self.failures
        failed.append(f"{name}, {subject}: {type(error).__name__}: {error}")

    def calls(self, case: Case) -> Iterator[tuple[str, dict[str, Callable[[], Callable[[], object]]]]]:
        """Per direction what makes the calls to time."""
        s = self.settings
        problem = Problem(case.op, s.batch, s.length, s.channels, s.heads, case.taps, s.dtype)
        generator = torch.Generator(self.device).manual_seed(0)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device=self.device).to(s.dtype)

        x, grad = (normal(s.batch, s.length, s.channels) for _ in range(2))
        weight, target = normal(*problem.weight_shape), torch.empty_like(x)
        extra: dict[str, torch.Tensor] = {}
        if case.gate:
            lengths = torch.arange(s.batch, device=self.device)[:, None] * 7 % (s.length // 4)
            extra = {"gate": normal(*x.shape), "mask": torch.arange(s.length, device=self.device) < s.length - lengths}
        function = convkernels.dynamic_conv1d if case.op == DYNAMIC else convkernels.lightweight_conv1d
        forms = {
            OURS: lambda x, weight, gate=None: function(
                x, weight, **extra | ({"gate": gate} if case.gate else {}), backend=s.backend
            )
        }
        for name in case.peers:
            if self.settings.compiled or not PEERS[name].compiled:
                form = PEERS[name].build()
                forms[name] = lambda x, weight, gate=None, form=form: form(x, weight, problem)

        def forward(form):
            def call():
                with torch.no_grad():
                    return form(x, weight, extra.get("gate"))

            return call

        def backward(form):
            leaves = [t.detach().requires_grad_() for t in (x, weight, *([extra["gate"]] if case.gate else []))]
            y = form(*leaves)
            return lambda: torch.autograd.grad(y, leaves, grad, retain_graph=True)

        for direction, prepare in ((FORWARD, forward), (BACKWARD, backward)):
            makers = {name: partial(prepare, form) for name, form in forms.items()}
            yield direction, {COPY: lambda: lambda: target.copy_(x), **makers}

    def run(self, saved: Callable[[dict[str, Any]], None] = lambda section: None) -> None:
        """Measure; `saved` is given the section whenever there is more in it."""
        import torch._functorch.config as functorch_config

        clock = timing.clock_for(self.device)
        with functorch_config.patch(donated_buffer=False), progress(2 * len(CASES)) as step:
            for case in CASES:
                for (direction, makers), passes, aim in zip(
                    self.calls(case), case.passes(self.settings), case.targets, strict=True
                ):
                    failed = partial(self._failed, f"{case.name} {direction}")
                    calls = timing.prepared(makers, failed)
                    times = timing.interleaved(calls, clock, self.settings.seconds, slow_s=0.5, on_error=failed)
                    if OURS in times:
                        seconds = {name: t.median for name, t in times.items()}
                        record = {"case": case.name, "direction": direction, "passes": passes, "target": aim}
                        record |= {"seconds": seconds, "host_seconds": times[OURS].host}
                        record["host_bound"] = [name for name, t in times.items() if t.host_bound]
                        self.records.append(record)
                    saved(self.section())
                    step(f"{case.name} {direction}", 1)

    def section(self) -> dict[str, Any]:
        """What has been measured so far, as the results file holds it."""
        s = self.settings
        return {
            "environment": environment.describe(self.device),
            "backend": s.backend,
            "shape": {"batch": s.batch, "length": s.length, "channels": s.channels, "heads": s.heads,
                      "dtype": dtype_name(s.dtype)},
            "records": self.records,
            "failures": self.failures,
            "errors": self.errors,
        }  # fmt: skip


COLUMNS = ("case", "direction", "times x moved at least", "us", "host us", "of a copy", "target", "verdict",
           "times faster than")  # fmt: skip


def fraction(record: dict[str, Any]) -> float:
    """Of the speed of a copy."""
    return record["passes"] / 2 * record["seconds"][COPY] / record["seconds"][OURS]


def rows(section: dict[str, Any]) -> list[tuple[str, ...]]:
    result = []
    for r in section["records"]:
        seconds, host = r["seconds"], r["host_seconds"]
        against = ", ".join(
            f"{name} {time / seconds[OURS]:.2f}" for name, time in seconds.items() if name not in (COPY, OURS)
        )
        result.append(
            (
                r["case"], r["direction"], f"{r['passes']:.2f}", f"{seconds[OURS] * 1e6:.0f}",
                "-" if host is None else f"{host * 1e6:.0f}", f"{fraction(r):.2f}", f">= {r['target']:.2f}",
                "PASS" if fraction(r) >= r["target"] else "miss", against,
            )
        )  # fmt: skip
    return result


def print_tables(section: dict[str, Any]) -> None:
    shape = section["shape"]
    size = f"B={shape['batch']} T={shape['length']} C={shape['channels']} H={shape['heads']} {shape['dtype']}"
    table(
        f"fraction of a copy, backend {section['backend']}, {size}, {environment.title(section['environment'])}",
        COLUMNS,
        rows(section),
    )
    for r in section["records"]:
        if r["host_bound"]:
            say(f"note: the host was not ahead of the GPU: {r['case']} {r['direction']}: {', '.join(r['host_bound'])}")
    for failure in (*section["errors"], *section["failures"]):
        say(f"failed: {failure}")
