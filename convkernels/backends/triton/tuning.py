"""Launch configurations measured on this device, for those who ask for it.

Nothing here happens by itself. With ``CONVKERNELS_TUNE=1`` the first call of every shape times the candidates and the
fastest is kept in a file. With ``CONVKERNELS_TUNED=<file>`` (when tuning, by default one in the user's cache) the
choices of that file are used, whoever made it; shapes that it lacks take those of ``configs``. The file is JSON,
{device: {shape: {fields}}}, and may be edited, shortened and committed.
"""

import json
import os
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import get_args

import torch

from ..switches import switch
from .conv import configs
from .conv.configs import Band, Config, Shape

REPEATS = 10
_KINDS = {kind.__name__: kind for kind in get_args(Config)}


def file() -> Path | None:
    """The file of choices, or None if neither variable asks for one."""
    named = os.environ.get("CONVKERNELS_TUNED")
    if named:
        return Path(named)
    if switch("CONVKERNELS_TUNE"):
        return Path.home() / ".cache" / "convkernels" / "triton.json"
    return None


def key(shape: Shape, backward: bool) -> str:
    """What identifies a shape in the file."""
    return f"{'backward' if backward else 'forward'} " + " ".join(f"{k}={v}" for k, v in asdict(shape).items())


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"


_files: dict[Path, dict] = {}


def _read(path: Path) -> dict:
    if path not in _files:
        _files[path] = json.loads(path.read_text()) if path.exists() else {}
    return _files[path]


def _write(path: Path, device: str, name: str, config: Config) -> None:
    content = _read(path)
    content.setdefault(device, {})[name] = {"kind": type(config).__name__, **asdict(config)}
    path.parent.mkdir(parents=True, exist_ok=True)
    # Another process may read at any time: it sees the old file or the new one.
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(path)


def candidates(shape: Shape, backward: bool) -> Iterator[Config]:
    """The default first, then its neighbours."""
    default = configs.choose(shape, backward)
    yield default
    seen = {default}
    starts = [configs.tile(shape, backward)] + ([configs.band(shape, backward)] if configs.band_possible(shape) else [])
    for start in starts:
        least, widest = (16, min(64, start.BC)) if isinstance(start, Band) else (8, start.BC)
        for BT in (start.BT // 2, start.BT, 2 * start.BT):
            for warps in (start.num_warps, 2 * start.num_warps):
                for stages in (1, 2):
                    candidate = replace(start, BT=max(least, BT), BC=widest, num_warps=warps, num_stages=stages)
                    if candidate not in seen:
                        seen.add(candidate)
                        yield candidate


def _seconds(run: Callable[[], None], device: torch.device) -> float:
    run()
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(REPEATS):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / REPEATS


def config(shape: Shape, backward: bool, device: torch.device, run: Callable[[Config], None]) -> Config:
    """The configuration for a call: the file's, the fastest of the candidates if tuning is on, or the default.
    run(config): the call with that configuration."""
    path = file()
    if path is None:
        return configs.choose(shape, backward)
    name, where = key(shape, backward), device_name(device)
    stored = _read(path).get(where, {}).get(name)
    if stored is not None:
        fields = dict(stored)
        return _KINDS[fields.pop("kind")](**fields)
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if not switch("CONVKERNELS_TUNE") or capturing:
        return configs.choose(shape, backward)
    times = {}
    for candidate in candidates(shape, backward):
        try:
            times[candidate] = _seconds(lambda candidate=candidate: run(candidate), device)
        except Exception as error:  # too much shared memory, for example; the default has to work
            if not times:
                raise
            warnings.warn(f"tuning: {candidate} does not run: {error}", RuntimeWarning, stacklevel=2)
    best = min(times, key=times.__getitem__)
    _write(path, where, name, best)
    return best
