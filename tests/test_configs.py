"""Launch configurations of the triton backend: pure data, right for every shape."""

import itertools

import pytest

from convkernels.backends.triton.conv import configs
from convkernels.backends.triton.conv.configs import Band, Heads, Shape, Window

SHAPES = [
    Shape(2, time, heads * channels, heads, taps, dilation, dtype, *flags, architecture=architecture)
    for architecture, time, (heads, channels), taps, dilation, dtype, flags in itertools.product(
        (80, 90),
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
        if isinstance(config, Heads):
            # Whole heads, within a warp; a vector of a head for each thread.
            sides = (config.ROWS, config.BG, config.BH, config.RV, config.V)
            assert backward and shape.per_row and shape.phased and not shape.state, (shape, config)
            assert all(is_power_of_2(n) for n in sides) and shape.taps <= configs.FEW_TAPS, (shape, config)
            assert shape.head_channels % config.V == 0 and config.RV <= 32, (shape, config)
            assert config.RV * config.V >= shape.head_channels, (shape, config)
            assert config.BG * config.BH * config.RV == 32 * config.num_warps, (shape, config)
            continue
        if isinstance(config, Window):
            # Rows of its own; heads and filters that fit; no more than 64 elements of a tile for a thread.
            elements = config.BT * config.BH * config.RP * config.KP
            assert backward and shape.per_row and not shape.state and shape.taps > configs.FEW_TAPS, (shape, config)
            assert all(is_power_of_2(n) for n in (config.BT, config.BH, config.RP, config.KP)), (shape, config)
            assert config.BT >= shape.taps and config.KP >= shape.taps, (shape, config)
            assert config.RP >= shape.head_channels and elements <= 64 * 32 * config.num_warps, (shape, config)
            continue
        assert all(is_power_of_2(n) for n in (config.BT, config.BC, config.num_warps)), (shape, config)
        if isinstance(config, Band):
            # Least operand of a matrix unit; a window that holds every row; filters that fit.
            assert min(config.BT, config.HALO, config.BC) >= 16, (shape, config)
            assert config.HALO >= shape.taps - 1 and config.KP >= shape.taps, (shape, config)
            assert shape.dtype != "float64" and not (shape.packed and shape.state), (shape, config)
            assert is_power_of_2(config.HALO) and is_power_of_2(config.KP), (shape, config)
            assert config.BC < 2 * shape.head_channels and config.BT * config.BC >= 32 * config.num_warps, config
        else:
            # A vector for each thread; positions of a group that share rows; vectors with a filter of one position.
            assert config.BG * config.BV <= 32 * config.num_warps and config.V <= 16, (shape, config)
            assert config.BC < 2 * shape.channels and 1 <= config.TAPS <= shape.taps, (shape, config)
            assert config.ROWS == 1 or (shape.phased and not shape.packed), (shape, config)
            assert not shape.per_row or shape.head_channels % config.V == 0, (shape, config)


def test_the_paths_people_use():
    def name(backward, **changes):
        fields = {"batch": 8, "time": 512, "channels": 768, "heads": 12, "taps": 7, "dtype": "bfloat16"} | changes
        return type(configs.choose(Shape(**fields), backward)).__name__

    assert name(False) == name(True) == name(False, gate=True) == name(False, per_row=True) == "Tile"
    assert name(False, taps=31) == name(True, taps=31) == name(True, packed=True) == "Band"
    assert name(True, per_row=True, taps=31) == name(True, per_row=True, packed=True) == "Band"
    assert name(True, per_row=True, heads=1) == name(True, per_row=True, state=True) == "Band"
    assert name(True, state=True) == name(False, gate=True, packed=True) == "Band"
    assert name(False, heads=768) == name(True, heads=768) == name(True, taps=127) == "Tile"
    assert name(True, heads=768, per_row=True, taps=4) == name(True, heads=96, per_row=True) == "Heads"
    assert name(True, per_row=True) == name(True, heads=96, per_row=True, packed=True) == "Heads"
    assert name(True, heads=768, per_row=True, taps=9) == name(True, heads=96, per_row=True, taps=16) == "Window"
    assert name(True, heads=768, per_row=True, taps=63) == name(False, heads=768, per_row=True) == "Tile"
    assert name(True, heads=768, per_row=True, state=True) == "Tile"
    assert name(True, dtype="float64") == name(True, packed=True, state=True) == "Tile"


def test_programs_share_their_tiles():
    assert configs.groups(tiles=10, units=4) == 10
    assert configs.groups(tiles=10**6, units=4) == configs.PROGRAMS // 4
    assert configs.groups(tiles=5, units=10**6) == 1
