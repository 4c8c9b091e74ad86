"""Times, memory and FLOPs of callables, measured the same way on every device.

Times are medians of repeats that are interleaved in one process, so that a change of clock or load meets every
callable alike. On a CPU the caches hold what the callable before left there, and repeats in which a thread waited for
a core are left out: it shared one with another thread or process. On a GPU the L2 cache is overwritten before every
repeat and the time is that between two events, the work between which the host has enqueued before the device comes to
the first.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import platform
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count, sdpa_backward_flop_count, sdpa_flop_count

from benchmarks import cores

WARMUP = 5
WARMUP_SECONDS = 0.5
MIN_REPEATS = 3
MAX_REPEATS = 60
FLUSH_BYTES = 256 << 20
# About 1 ms on a GPU of 2 GHz, per call that is timed, up to about 50 ms.
SLEEP_CYCLES = 2_000_000
MAX_SLEEP_CYCLES = 100_000_000
# Of a repeat: less than threads wait that are woken on an idle core, far less than a turn of another process there.
MAX_WAITED = 0.02
TIMED, LEFT_OUT, DISTURBED = "timed", "left_out", "disturbed"
# Of all that this process has timed: the repeats, those left out, and the callables that had too few others.
counts: Counter[str] = Counter()


@dataclass(frozen=True)
class Timing:
    """Median and quartiles in seconds of one call. `slow` marks a callable that was not repeated.

    CPU: `left_out` counts repeats in which a thread waited for a core; `disturbed` marks a callable that had too few
    others, so that they all count.

    GPU: `host` is what the host takes to enqueue a call (median), and `host_bound` marks a callable that the host could
    not enqueue ahead in most repeats, so that the time may be the host's.
    """

    median: float
    low: float
    high: float
    repeats: int
    slow: bool = False
    host: float | None = None
    host_bound: bool = False
    left_out: int = 0
    disturbed: bool = False


class Sample(NamedTuple):
    """Seconds of one call, and as in `Timing` what the host did meanwhile, and whether a thread waited for a core."""

    seconds: float
    host: float | None = None
    host_bound: bool = False
    waited: bool = False


def _host_seconds(fn: Callable[[], object], calls: int) -> float:
    start = time.perf_counter_ns()
    for _ in range(calls):
        fn()
    return (time.perf_counter_ns() - start) * 1e-9


class CpuClock:
    def sample(self, fn: Callable[[], object], calls: int = 1) -> Sample:
        before = cores.waited()
        seconds = _host_seconds(fn, calls)
        return Sample(seconds / calls, waited=cores.waited() - before > MAX_WAITED * seconds)


class CudaClock:
    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.dirty, self.clean = (torch.zeros(FLUSH_BYTES // 8, dtype=torch.int64, device=device) for _ in range(2))

    def sample(self, fn: Callable[[], object], calls: int = 1) -> Sample:
        """A repeat that the host could not enqueue ahead is made again with a longer head start."""
        cycles = min(SLEEP_CYCLES * calls, MAX_SLEEP_CYCLES)
        sample = self._once(fn, calls, cycles)
        while sample.host_bound and cycles < MAX_SLEEP_CYCLES:
            cycles = min(8 * cycles, MAX_SLEEP_CYCLES)
            sample = self._once(fn, calls, cycles)
        return sample

    def _once(self, fn: Callable[[], object], calls: int, cycles: int) -> Sample:
        with torch.cuda.device(self.device):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(cycles)
            self.dirty.zero_()
            # Reading takes the place of lines that the device would have to write back inside the timed part.
            self.clean.sum()
            start.record()
            host = _host_seconds(fn, calls)
            end.record()
            host_bound = start.query()
            end.synchronize()
        return Sample(start.elapsed_time(end) * 1e-3 / calls, host / calls, host_bound)


Clock = CpuClock | CudaClock
Key = TypeVar("Key", bound=Hashable)


def clock_for(device: torch.device) -> Clock:
    return CudaClock(device) if device.type == "cuda" else CpuClock()


def _summary(samples: list[Sample], slow: bool = False) -> Timing:
    alone = [s for s in samples if not s.waited]
    disturbed = len(alone) < min(MIN_REPEATS, len(samples))
    left_out = 0 if disturbed else len(samples) - len(alone)
    counts.update({TIMED: len(samples), LEFT_OUT: left_out, DISTURBED: disturbed})
    samples = samples if disturbed else alone
    seconds = [s.seconds for s in samples]
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3
    hosts = [s.host for s in samples if s.host is not None]
    host = statistics.median(hosts) if hosts else None
    host_bound = 2 * sum(s.host_bound for s in samples) > len(samples)
    return Timing(median, low, high, len(samples), slow, host, host_bound, left_out, disturbed)


def _warm_up(fn: Callable[[], object], clock: Clock, calls: int, slow_s: float) -> list[Sample]:
    samples = [clock.sample(fn, calls)]
    # A second look at a slow call, unless no disturbance could explain it.
    if slow_s < samples[0].seconds < 4 * slow_s:
        samples.append(clock.sample(fn, calls))
    while (
        min(s.seconds for s in samples) <= slow_s
        and len(samples) < WARMUP
        and (len(samples) < 2 or sum(s.seconds for s in samples) < WARMUP_SECONDS)
    ):
        samples.append(clock.sample(fn, calls))
    return samples


def prepared(
    makers: Mapping[Key, Callable[[], Callable[[], object]]], on_error: Callable[[Key, Exception], None]
) -> dict[Key, Callable[[], object]]:
    """What the makers make; one that fails is reported and left out."""
    made = {}
    for name, make in makers.items():
        try:
            made[name] = make()
        except Exception as error:
            on_error(name, error)
    return made


def interleaved(
    fns: Mapping[Key, Callable[[], object]],
    clock: Clock,
    budget_s: float = 1.0,
    slow_s: float = math.inf,
    calls: int = 1,
    first_call: Callable[[Key], object] | None = None,
    on_error: Callable[[Key, Exception], None] | None = None,
) -> dict[Key, Timing]:
    """Time every callable; one that fails is reported to `on_error` (or raises) and left out.

    Every callable gets one untimed first call (which may compile; `first_call(name)` can make it instead), `WARMUP`
    warm-up calls (at least two, no more once they have taken `WARMUP_SECONDS`), and an equal part of `budget_s`, but at
    least `MIN_REPEATS` and at most `MAX_REPEATS` repeats, spread evenly over rounds in random order. A callable slower
    than `slow_s` is not interleaved: one or two warm-up calls are its result. `calls` > 1 times a loop of that many
    calls, for callables too short for the clock.
    """
    done: dict[Key, Timing] = {}
    repeats: dict[Key, int] = {}
    for name, fn in fns.items():
        try:
            first_call(name) if first_call else fn()
            samples = _warm_up(fn, clock, calls, slow_s)
        except Exception as error:
            if on_error is None:
                raise
            on_error(name, error)
            continue
        fastest = min(s.seconds for s in samples)
        if fastest > slow_s:
            done[name] = _summary(samples, slow=True)
        else:
            share = budget_s / len(fns) / calls
            repeats[name] = round(min(max(share / fastest, MIN_REPEATS), MAX_REPEATS))
    rounds = max(repeats.values(), default=0)
    samples_of: dict[Key, list[Sample]] = {name: [] for name in repeats}
    order, shuffle = list(repeats), random.Random(0).shuffle
    for i in range(rounds):
        shuffle(order)
        for name in order:
            if (i + 1) * repeats[name] // rounds > i * repeats[name] // rounds:
                samples_of[name].append(clock.sample(fns[name], calls))
    done.update({name: _summary(samples) for name, samples in samples_of.items()})
    return {name: done[name] for name in fns if name in done}


def _process_status(key: str) -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(key + ":"))


def _cpu_seconds() -> tuple[float, float]:
    """Busy and all seconds, since the machine started, of the CPUs that this process may use."""
    mine = {f"cpu{n}" for n in cores.own()}
    with open("/proc/stat") as status:
        lines = [line.split() for line in status]
    ticks = [[int(n) for n in line[1:9]] for line in lines if line[0] in mine]  # user nice system idle iowait ...
    total = sum(map(sum, ticks))
    return total - sum(t[3] + t[4] for t in ticks), total


def busy_cpus(seconds: float = 0.2) -> float:
    """How many of this process's CPUs others keep busy, seen while it sleeps; 0 where the system does not tell."""
    try:
        before = _cpu_seconds()
        time.sleep(seconds)
        busy, total = (after - b for after, b in zip(_cpu_seconds(), before, strict=True))
        return busy / total * len(cores.own()) if total else 0.0
    except (OSError, IndexError, ValueError):
        return 0.0


def available_bytes(device: torch.device) -> int:
    """Memory that the device can still give to this process."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def peak_extra_bytes(fn: Callable[[], object], device: torch.device) -> int | None:
    """Most memory in use during one call, minus what was in use before it; results count.

    CUDA: the caching allocator's peak. Linux: the peak resident set of the process (`VmHWM`, reset through
    /proc/self/clear_refs after the C heap has been trimmed), which, unlike the CPU allocator's own statistics, also
    sees scratch memory that libraries take past torch. Elsewhere None. Call `fn` once before, so that caches and
    compilation do not count.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        fn()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    try:
        ctypes.CDLL(None).malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as refs:
            refs.write("5")
        before = _process_status("VmRSS")
        fn()
        return max(0, _process_status("VmHWM") - before)
    except (OSError, AttributeError):
        return None


@contextlib.contextmanager
def resident_heap() -> Iterator[bool]:
    """Inside, freed memory stays with the process and is handed out again, so large outputs land in pages that are
    already there. By default glibc maps and unmaps anything over 32 MB at every call, and the call pays for the page
    faults. Yields False where the C library offers no such switch.
    """
    if platform.libc_ver()[0] != "glibc":
        yield False
        return
    m_trim_threshold, m_mmap_max = -1, -4
    libc = ctypes.CDLL(None)
    switched = bool(libc.mallopt(m_mmap_max, 0) and libc.mallopt(m_trim_threshold, -1))
    try:
        yield switched
    finally:
        libc.mallopt(m_mmap_max, 65536)
        libc.mallopt(m_trim_threshold, 128 << 10)
        libc.malloc_trim(0)


def _attention_flops(query, key, value, *args, **kwargs) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_grad_flops(grad, query, key, value, *args, **kwargs) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


def _conv_grad_flops(
    grad, x, weight, _bias, _stride, _padding, _dilation, transposed, _out_pad, _groups, mask, **_
) -> int:
    return (mask[0] + mask[1]) * conv_flop_count(x, weight, grad, transposed)


# FlopCounterMode counts the CPU attention kernel as nothing, and the weight gradient of a grouped convolution as if it
# had one group. Its own formulas, applied to these cases:
_CORRECTIONS = {
    torch.ops.aten.convolution_backward: _conv_grad_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_grad_flops,
}


def flops(fn: Callable[..., object], *tensors: torch.Tensor) -> int:
    """FLOPs of fn(*tensors) as torch's FlopCounterMode counts them: multiplications and additions of matrix products,
    convolutions and attention; elementwise work counts as nothing. Only shapes are computed, so it takes no time.
    """
    shapes_only = FakeTensorMode()
    fakes = [shapes_only.from_tensor(t) for t in tensors]
    with shapes_only, FlopCounterMode(display=False, custom_mapping=_CORRECTIONS) as counter:
        fn(*fakes)
    return counter.get_total_flops()
