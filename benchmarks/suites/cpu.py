"""The goals of the CPU kernels: what `cpu_tables.GOALS` compares, timed side by side, for the kernels in use.

Attention: B = 4, 12 heads of 64, a learnable bias and a learnable term of the query per head, window 8; SDPA knows no
positions. Convolutions: B = 8, T = 512, C = 768, softmax included. What a call costs is measured with one thread.

A copy is `x.clone()`. Results of convolutions and copies land in fresh memory, which is there, and in no cache.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch._functorch.config as functorch_config
import torch.nn.functional as F
from torch import Tensor

import convkernels
from benchmarks import timing
from benchmarks.peers import DYNAMIC, LIGHTWEIGHT, PEERS, Problem, ours
from benchmarks.suites import COPY, OURS, RECORDING, attention
from benchmarks.suites.acceptance import Group, call_overhead
from benchmarks.suites.acceptance_tables import BATCH, CHANNELS
from benchmarks.suites.attention_tables import SDPA
from benchmarks.suites.cpu_tables import (
    ATTENTION,
    CALL,
    CAUSAL,
    COMPILE,
    DTYPES,
    GOALS,
    LENGTHS,
    WIDE,
    Key,
    key_of,
    served,
)
from convkernels.cli import environment
from convkernels.cli.console import Mistake, progress

NAME = "cpu"  # of the suite
REMARKS = ("notes", "errors")
SETS = ("amx", "avx512", "avx2", "portable")  # best first


def usable() -> list[str]:
    """The sets of kernels that were compiled and that this processor has, the best first."""
    native = environment.native_module()
    if native is None:
        raise Mistake("which kernels run here is not known without convkernels._C: `make bench-cpu` builds it")
    return [name for name in SETS if name in environment.usable_isas(native)]


@dataclass(frozen=True)
class Settings:
    """`lengths` of attention. `seconds`: for the timed repeats of one row of what is compared."""

    lengths: tuple[int, ...] = LENGTHS
    dtypes: tuple[str, ...] = DTYPES
    compiled: bool = True
    seconds: float = 1.0

    def keys(self, active: str) -> list[Key]:
        """What is to be timed for the goals of the active kernels."""
        keys = dict.fromkeys(goal.key for goal in GOALS if served(goal.kernels, active))
        return [key for key in keys if key.dtype in self.dtypes and (not _attends(key) or key.length in self.lengths)]


def _attends(key: Key) -> bool:
    return key.case in (ATTENTION, WIDE, CAUSAL)


def _causal(n: attention.Inputs, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, query_rel: Tensor) -> Tensor:
    return convkernels.composite_attention(
        q, k, v, bias=bias, query_rel=query_rel, window=(n.window, n.window), causal=True, backend=n.backend
    )


def _causal_sdpa(n: attention.Inputs, q: Tensor, k: Tensor, v: Tensor, *tables: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def _keep(results: deque, call: Callable[[], object]) -> None:
    results.append(call())


class Suite:
    def __init__(self, settings: Settings, device: torch.device) -> None:
        self.settings, self.device = settings, device
        self.clock = timing.clock_for(device)
        self.active, sets = environment.active_isa(), usable()
        # The table of the best kernels names the goals that are out of reach here.
        self.lacking = [name for name in SETS if name not in sets] if self.active == sets[0] else []
        self.records: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self.errors: list[str] = []

    def _failed(self, key: Key, name: str, error: Exception | str) -> None:
        message = f"{type(error).__name__}: {error}" if isinstance(error, Exception) else error
        failed = self.errors if name == OURS else self.notes
        failed.append(f"{name}, {key.name}: {(message.splitlines() or [''])[0]}")

    def _attention(self, key: Key) -> dict[str, Callable[[], object]]:
        settings = attention.Settings(heads=key.heads, head_size=128 if key.case == WIDE else 64)
        inputs = attention.make_inputs(settings, key.length, getattr(torch, key.dtype), self.device)
        forms = {OURS: attention.composite, SDPA: attention.sdpa}
        if key.case == CAUSAL:
            forms = {OURS: _causal, SDPA: _causal_sdpa}
        return attention.Suite(settings, self.device).calls(forms, inputs, key.direction, key.name)

    def _convolution(self, key: Key) -> dict[str, Callable[[], object]]:
        problem = Problem(key.case, BATCH, key.length, CHANNELS, key.heads, key.taps, getattr(torch, key.dtype))
        forms = {OURS: ours}
        if key.case == DYNAMIC and self.settings.compiled:
            forms[COMPILE] = PEERS["compile"].build()
        group = Group(problem, self.device, forms)
        calls = group.calls(key.direction, list(forms), partial(self._failed, key))
        if key.case == LIGHTWEIGHT:
            calls = {COPY: group.x.clone, **calls}
        # As many results are kept as push memory out of the caches before the allocator hands it out again.
        kept = -(-timing.FLUSH_BYTES // problem.x_bytes)
        results = deque((group.x.clone() for _ in range(kept)), maxlen=kept)
        return {name: partial(_keep, results, call) for name, call in calls.items()}

    def _call(self, key: Key) -> dict[str, timing.Timing]:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return call_overhead(key.direction == RECORDING, self.device, self.clock, self.settings.seconds)
        finally:
            torch.set_num_threads(threads)

    def _times(self, key: Key) -> dict[str, timing.Timing]:
        if key.case == CALL:
            return self._call(key)
        calls = self._attention(key) if _attends(key) else self._convolution(key)
        return timing.interleaved(calls, self.clock, self.settings.seconds, on_error=partial(self._failed, key))

    def measure(self, key: Key) -> None:
        try:
            times = self._times(key)
        except Exception as error:
            return self._failed(key, OURS, error)
        record = {
            **asdict(key),
            "runs": [{name: t.median for name, t in times.items()}],
            "timed": sum(t.repeats + t.left_out for t in times.values()),
            "left_out": sum(t.left_out for t in times.values()),
            "disturbed": [[name for name, t in times.items() if t.disturbed]],
        }
        self.records.append(record)

    def run(self, saved: Callable[[dict[str, Any]], None] = lambda section: None) -> None:
        """Measure; `saved` is given the section whenever there is more in it."""
        keys = self.settings.keys(self.active)
        # Compiled graphs are walked more than once, so their buffers must outlive the first backward pass. Whether
        # results land in pages that are there would else depend on what the process has allocated before.
        with (
            functorch_config.patch(donated_buffer=False),
            timing.resident_heap() as resident,
            progress(len(keys)) as step,
        ):
            if not resident:
                self.notes.append("outputs may land in pages that are not there yet: this C library decides")
            for key in keys:
                self.measure(key)
                saved(self.section())
                step(f"{self.active}: {key.name}", 1)

    def section(self) -> dict[str, Any]:
        """What has been measured so far, as the results file holds it."""
        s = self.settings
        return {
            "environment": environment.describe(self.device),
            "settings": {"lengths": list(s.lengths), "dtypes": list(s.dtypes), "lacking": self.lacking},
            "records": self.records,
            "notes": self.notes,
            "errors": self.errors,
        }


def combined(sections: list[dict[str, Any]]) -> dict[str, Any]:
    """The section of several processes, in which the same was measured."""
    last, records = sections[-1], {}
    for record in (record for section in sections for record in section["records"]):
        old = records.setdefault(key_of(record), {**record, "runs": [], "timed": 0, "left_out": 0, "disturbed": []})
        for name in ("runs", "timed", "left_out", "disturbed"):
            old[name] += record[name]
    samples: Counter[str] = sum((Counter(section["environment"]["samples"]) for section in sections), Counter())
    remarks = {name: list(dict.fromkeys(r for section in sections for r in section[name])) for name in REMARKS}
    environment = {**last["environment"], "samples": {name: samples[name] for name in last["environment"]["samples"]}}
    return {**last, "environment": environment, "records": list(records.values()), **remarks}
