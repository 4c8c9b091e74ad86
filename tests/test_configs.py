"""Launch configurations of the triton backend: pure data, right for every shape; tuning only where it is asked for."""

import itertools
import json

import pytest
import torch
from conftest import interpreted

import convkernels as ck
from convkernels.backends.triton import tuning
from convkernels.backends.triton.conv import configs
from convkernels.backends.triton.conv.configs import Band, Shape, Tile, Window

SHAPES = [
    Shape(2, time, heads * head_channels, heads, taps, dilation, dtype, per_row, gate, packed, state)
    for time, (heads, head_channels), taps, dilation, dtype, (per_row, gate, packed, state) in itertools.product(
        (1, 33, 4096),
        ((1, 1), (768, 1), (12, 64), (100, 8), (2, 24), (3, 333)),
        (1, 2, 3, 17, 18, 65, 66, 255),
        (1, 3),
        ("bfloat16", "float16", "float32", "float64"),
        (
            (False, False, False, False),
            (True, False, False, False),
            (True, True, False, True),
            (False, False, True, True),
        ),
    )
]


def is_power_of_2(n):
    return n > 0 and n & (n - 1) == 0


@pytest.mark.parametrize("backward", [False, True])
def test_every_shape_gets_a_fitting_configuration(backward):
    for shape in SHAPES:
        config = configs.choose(shape, backward)
        assert config == configs.choose(shape, backward)
        if isinstance(config, Window):
            # Rows of its own; heads and filters that fit; no more than 64 elements of a tile for a thread.
            elements = config.BT * config.BH * config.RP * config.KP
            assert backward and shape.per_row and not shape.state, (shape, config)
            assert all(is_power_of_2(n) for n in (config.BT, config.BH, config.RP, config.KP)), (shape, config)
            assert config.BT >= shape.taps and config.KP >= shape.taps, (shape, config)
            assert config.RP >= shape.head_channels and elements <= 64 * 32 * config.num_warps, (shape, config)
            continue
        assert all(is_power_of_2(n) for n in (config.BT, config.BC, config.KP, config.num_warps)), (shape, config)
        if isinstance(config, Band):
            # Least operand of a matrix unit; a window that holds every row; filters that fit.
            assert min(config.BT, config.HALO, config.BC) >= 16, (shape, config)
            assert config.HALO >= shape.taps - 1 and config.KP >= shape.taps, (shape, config)
            assert shape.dtype != "float64" and not (shape.packed and shape.state), (shape, config)
            assert is_power_of_2(config.HALO) and config.BC < 2 * shape.head_channels, (shape, config)
        else:
            assert config.BC < 2 * shape.channels and 1 <= config.UNROLL <= shape.taps, (shape, config)
        elements = config.BT * config.BC
        assert elements >= 32 * config.num_warps or elements < 128, (shape, config)


def test_the_paths_people_use():
    def name(backward, **changes):
        fields = {"batch": 8, "time": 512, "channels": 768, "heads": 12, "taps": 7, "dtype": "bfloat16"} | changes
        return type(configs.choose(Shape(**fields), backward)).__name__

    assert name(False) == "Tile" and name(True) == "Band"
    assert name(False, taps=31) == name(False, gate=True) == name(False, per_row=True) == "Band"
    assert name(False, heads=768) == name(True, heads=768) == name(True, taps=127) == "Tile"
    assert name(True, heads=768, per_row=True, taps=4) == name(True, heads=96, per_row=True) == "Window"
    assert name(True, heads=768, per_row=True, taps=63) == name(False, heads=768, per_row=True) == "Tile"
    assert name(True, heads=768, per_row=True, state=True) == "Tile"
    assert name(True, dtype="float64") == name(True, packed=True, state=True) == "Tile"


def test_programs_share_their_tiles():
    assert configs.groups(tiles=10, units=4) == 10
    assert configs.groups(tiles=10**6, units=4) == configs.PROGRAMS // 4
    assert configs.groups(tiles=5, units=10**6) == 1


def test_tuning_is_off(monkeypatch):
    monkeypatch.delenv("CONVKERNELS_TUNE", raising=False)
    monkeypatch.delenv("CONVKERNELS_TUNED", raising=False)

    def run(config):
        raise AssertionError("nothing may be timed")

    for shape in SHAPES[:50]:
        assert tuning.config(shape, False, torch.device("cpu"), run) == configs.choose(shape, False)


def test_tuning_keeps_the_fastest(monkeypatch, tmp_path):
    path, shape, cpu = tmp_path / "tuned.json", SHAPES[0], torch.device("cpu")
    monkeypatch.setenv("CONVKERNELS_TUNED", str(path))
    monkeypatch.setenv("CONVKERNELS_TUNE", "1")
    offered = list(tuning.candidates(shape, False))
    assert offered[0] == configs.choose(shape, False) and len(set(offered)) == len(offered) > 3
    best, broken = offered[2], offered[1]
    clock = {"now": 0.0}
    monkeypatch.setattr(tuning.time, "perf_counter", lambda: clock["now"])
    calls = []

    def run(config):
        calls.append(config)
        if config == broken:
            raise RuntimeError("too much shared memory")
        clock["now"] += 1.0 if config == best else 2.0

    with pytest.warns(RuntimeWarning, match="too much shared memory"):
        assert tuning.config(shape, False, cpu, run) == best
    assert set(calls) == set(offered)
    # From the file, also in another process that does not tune.
    calls.clear()
    monkeypatch.delenv("CONVKERNELS_TUNE")
    tuning._files.clear()
    assert tuning.config(shape, False, cpu, run) == best and not calls
    assert tuning.config(SHAPES[-1], False, cpu, run) == configs.choose(SHAPES[-1], False) and not calls


@pytest.mark.skipif(not interpreted("triton") or bool(ck.why_not("triton")), reason="needs the interpreter")
def test_a_pinned_configuration_runs(monkeypatch, tmp_path):
    """A call takes the file's choice, and gives the same result with it."""
    x, weight = torch.randn(1, 40, 32), torch.randn(2, 5)
    expected = ck.lightweight_conv1d(x, weight, backend="triton")
    shape = Shape(1, 40, 32, 2, 5)
    assert isinstance(configs.choose(shape, False), Tile)
    pinned = {"kind": "Band", **vars(configs.band(shape))}
    path = tmp_path / "pinned.json"
    path.write_text(json.dumps({"interpreter": {tuning.key(shape, False): pinned}}))
    monkeypatch.setenv("CONVKERNELS_TUNED", str(path))
    tuning._files.clear()
    taken = []
    original = tuning.config
    monkeypatch.setattr(tuning, "config", lambda *a: taken.append(original(*a)) or taken[-1])
    torch.testing.assert_close(ck.lightweight_conv1d(x, weight, backend="triton"), expected, rtol=1e-5, atol=1e-5)
    assert taken == [Band(**{k: v for k, v in pinned.items() if k != "kind"})]
