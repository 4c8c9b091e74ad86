"""The numeric tests once more on every instruction set of the native library that this machine can run, each in its
own process because the choice is made once.
"""

import pytest
import torch
from instruction_sets import digest, run_on, run_tests_on

SHOW = "import sys; sys.path.insert(0, 'tests'); from instruction_sets import digest; print(digest())"


@pytest.mark.slow
def test_suite_on_every_instruction_set(lower_isa):
    run_tests_on(lower_isa, "not grow and not any_strides and not degenerate",
                 "tests/test_fuzz.py", "tests/test_memory.py", "tests/test_equivalences.py")  # fmt: skip


@pytest.mark.slow
def test_attention_on_every_instruction_set(lower_isa):
    run_tests_on(lower_isa, "not instruction_set", "tests/test_attention_blocks.py", "tests/test_attention_fuzz.py")


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["amx-emulated"], indirect=True)
def test_attention_on_emulated_tiles(isa):
    run_tests_on(isa, "not instruction_set", "tests/test_attention_hidden.py", "tests/test_attention_tiles.py",
                 "tests/test_attention_golden.py", "tests/test_attention_costs.py",
                 "tests/test_attention_wide_heads.py", "tests/test_determinism.py")  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["amx-emulated"], indirect=True)
def test_convolutions_on_emulated_tiles(isa):
    run_tests_on(isa, "not instruction_set", "tests/test_conv_bands.py", "tests/test_golden.py",
                 "tests/test_gradients.py", "tests/test_decoding.py")  # fmt: skip


def test_instruction_sets_agree(isa):
    """Sums over whole results, to the rounding of the types; bitwise equality between instruction sets is not
    promised.
    """
    numbers = torch.tensor([float(v) for v in run_on(isa, "-c", SHOW).split()])
    expected = torch.tensor([float(v) for v in digest().split()])
    torch.testing.assert_close(numbers, expected, rtol=2e-3, atol=0)
    torch.testing.assert_close(numbers[:4], expected[:4], rtol=1e-6, atol=0)
