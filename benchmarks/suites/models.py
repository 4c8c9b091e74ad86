"""Training steps of whole models against sequence length, as in Figures 1 and 2 of Tay et al. 2021: examples per
second, FLOPs and memory of ConvSeq2Seq with convolutions and with attention, and of CompositeBert beside BERT."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks import networks, timing
from benchmarks.networks import Network
from benchmarks.peers import TOLERANCE, disagreement
from benchmarks.suites import BOTH
from benchmarks.suites.models_tables import (
    COMPOSITE_BERT,
    LENGTHS,
    LINES,
    MORE_LINES,
    OWN_LINES,
    PUBLISHED,
    SHAPES,
    Shape,
)
from convkernels.cli import environment
from convkernels.cli.console import progress, quantity


@dataclass(frozen=True)
class Settings:
    """`models`: which; `size`, `tokens`, `layers`, `lengths`: of all of these, by default those of SHAPES and LENGTHS,
    and all layers of another size. `seconds`: shared by the timed repeats of all lines at one length and dtype. A line
    whose step takes longer than `slow_call` is not repeated, longer than `stop_call` not run at longer sequences."""

    models: tuple[str, ...] = tuple(LINES)
    dtypes: tuple[str, ...] = ("float32",)
    lengths: tuple[int, ...] | None = None
    size: str | None = None
    layers: int | None = None
    tokens: int | None = None
    seconds: float = 10.0
    slow_call: float = 60.0
    stop_call: float = 60.0
    all_peers: bool = False
    backend: str = "auto"

    def shape(self, case: str) -> Shape:
        given = {"size": self.size, "tokens": self.tokens, "layers": self.layers}
        if self.size is not None and self.layers is None:
            given["layers"] = layers(case, self.size)
        return replace(SHAPES[case], **{name: value for name, value in given.items() if value is not None})

    def lengths_of(self, case: str) -> tuple[int, ...]:
        return self.lengths or LENGTHS[case]

    def networks(self, case: str) -> dict[str, Network]:
        shape, longest = self.shape(case), max(self.lengths_of(case))
        lines = LINES[case] + (MORE_LINES[case] if self.all_peers else ())
        return {line: Network(case, line, shape.size, shape.layers, longest, self.backend) for line in lines}


def layers(case: str, size: str) -> int:
    """How many a model of this size has in each stack."""
    return Network(case, LINES[case][0], size, None, 1).config.num_hidden_layers


class Suite:
    """Times every model. What fails is recorded: a peer in `notes`, ours in `errors`."""

    def __init__(self, settings: Settings, device: torch.device) -> None:
        self.settings, self.device = settings, device
        self.records: list[dict[str, Any]] = []
        self.work: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self.errors: list[str] = []
        self.counts: dict[tuple[Network, int], int | None] = {}
        self.stopped: set[tuple[str, str]] = set()

    def _failed(self, subject: str, line: str, error: Exception) -> None:
        failed = self.errors if line in OWN_LINES else self.notes
        failed.append(f"{line}, {subject}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}")

    def _make(self, network: Network, dtype: str) -> nn.Module:
        return network.build().to(self.device, getattr(torch, dtype))

    def _flops(self, network: Network, inputs: dict[str, torch.Tensor], subject: str) -> int | None:
        """Of a step. The model is made anew, of shapes alone; the dtype does not matter."""

        def run(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
            with self.device:
                model = network.build()
            return networks.training_step(model, dict(zip(inputs, tensors, strict=True)))

        key = network, inputs["input_ids"].shape[1]
        if key not in self.counts:
            try:
                self.counts[key] = timing.flops(run, *inputs.values())
            except Exception as error:
                self.counts[key] = self._failed(f"FLOPs, {subject}", network.line, error)
        return self.counts[key]

    def _wrong(self, line: str, models: dict[str, nn.Module], inputs: dict[str, torch.Tensor], subject: str) -> bool:
        """Whether a model cannot be timed: for want of memory, or because its loss is not that of ours, with a note."""
        if line != PUBLISHED or COMPOSITE_BERT not in models:
            return False
        model, (batch, length) = models[line], inputs["input_ids"].shape
        tensor = batch * model.config.num_attention_heads * length**2 * next(model.parameters()).itemsize
        # Of each layer the weights are kept for the backward pass; in a layer some more are alive.
        needed = (model.config.num_hidden_layers + 8) * tensor
        if needed > timing.available_bytes(self.device) // 2:
            self.notes.append(f"{line}, {subject}: would need {quantity(needed, 'B')} of memory")
            return True
        with torch.no_grad():
            losses = [models[name](**inputs).loss for name in (line, COMPOSITE_BERT)]
        off = disagreement(losses[:1], losses[1:])
        if off > TOLERANCE[next(model.parameters()).dtype]:
            self.notes.append(f"{line}, {subject}: its loss differs from ours by {off:.1e}")
            return True
        return False

    def measure(self, case: str, models: dict[str, nn.Module], length: int, dtype: str, clock: timing.Clock) -> None:
        s, subject = self.settings, f"T={length} {dtype}"
        inputs = networks.batch(case, s.shape(case).batch(length), length, self.device)
        shape = {"case": case, "direction": BOTH, "dtype": dtype, "batch": len(inputs["input_ids"]), "length": length}
        known = {line: model for line, model in models.items() if (line, dtype) not in self.stopped}
        known = {line: model for line, model in known.items() if not self._wrong(line, known, inputs, subject)}
        calls = {line: partial(networks.training_step, model, inputs) for line, model in known.items()}
        memory: dict[str, int | None] = {}

        def first_call(line: str) -> None:
            # Lazy initialisation is over after the shortest sequence's extra step; later first steps count exactly.
            if length == min(s.lengths_of(case)):
                calls[line]()
            memory[line] = timing.peak_extra_bytes(calls[line], self.device)

        failed = partial(self._failed, subject)
        times = timing.interleaved(calls, clock, s.seconds, s.slow_call, first_call=first_call, on_error=failed)
        work = {line: self._flops(network, inputs, subject) for line, network in s.networks(case).items()}
        self.work += [{"line": line, **shape, "flops": count} for line, count in work.items()]
        for line, t in times.items():
            self.records.append(
                {
                    "line": line,
                    **shape,
                    "seconds": t.median,
                    "host_seconds": t.host,
                    "host_bound": t.host_bound,
                    "flops": work[line],
                    "peak_extra_bytes": memory[line],
                }
            )
            if t.median > s.stop_call and length < max(s.lengths_of(case)):
                self.stopped.add((line, dtype))
                self.notes.append(f"{line}, {dtype}: stops at T={length}, where a step takes {quantity(t.median, 's')}")

    def run(self, saved: Callable[[dict[str, Any]], None] = lambda section: None) -> None:
        """Measure; `saved` is given the section whenever there is more in it."""
        s, clock = self.settings, timing.clock_for(self.device)
        with progress(sum(len(s.lengths_of(case)) for case in s.models) * len(s.dtypes)) as step:
            for case in s.models:
                for dtype in s.dtypes:
                    step(f"make the models, {case} {dtype}", 0)
                    makers = {line: partial(self._make, network, dtype) for line, network in s.networks(case).items()}
                    models = timing.prepared(makers, partial(self._failed, dtype))
                    for length in s.lengths_of(case):
                        step(f"training step, {case} T={length} {dtype}", 0)
                        self.measure(case, models, length, dtype, clock)
                        saved(self.section())
                        step(f"training step, {case} T={length} {dtype}", 1)

    def section(self) -> dict[str, Any]:
        """What has been measured so far, as the results file holds it."""
        s = self.settings
        return {
            "environment": environment.describe(self.device),
            "settings": {
                "lengths": sorted({length for case in s.models for length in s.lengths_of(case)}),
                "dtypes": list(s.dtypes),
                "shapes": {case: asdict(s.shape(case)) for case in s.models},
                "backend": s.backend,
                "device": self.device.type,
            },
            "records": self.records,
            "work": self.work,
            "notes": self.notes,
            "errors": self.errors,
        }
