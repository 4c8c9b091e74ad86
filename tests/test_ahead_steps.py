"""Steps of servers, compiled without a GPU, keep to their budgets, and are compiled once."""

import pytest
from test_ahead import triton_ahead, variants


@pytest.mark.slow
@pytest.mark.thin(3)
@pytest.mark.parametrize("variant", variants("STEP_VARIANTS"), ids=lambda v: v.name)
def test_triton_budget_of_a_step_of_servers(variant):
    """One kernel, whatever it is asked for."""
    ahead = triton_ahead()
    results = ahead.measure_all(variant, (90,))
    assert not ahead.RULES.violations(results)
    assert [result.kernel for result in results] == ["conv_step"]


@pytest.mark.parametrize("saves", [False, True])
def test_a_step_is_compiled_once_for_all_batches(saves):
    """What a launch is specialised for does not depend on how many sequences, positions and slots there are."""
    ahead = triton_ahead()
    from benchmarks.machine_code.triton_steps import StepVariant

    def specialisation(time, sequences, slots):
        step = StepVariant("step", time=time, packed=True, saves=saves, sequences=sequences, slots=slots)
        ((kernel, arguments),) = step.launches(90)
        what, options = ahead.source(kernel, arguments)
        return what.signature, what.constants, what.attrs, options

    first = specialisation(4096, 256, 1024)
    for batch in ((17, 1, 1), (129, 3, 5), (8191, 16, 100), (1 << 20, 700, 4096)):
        assert specialisation(*batch) == first
