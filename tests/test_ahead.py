"""The Triton kernels, compiled ahead of time without a GPU, keep to their rules and to the committed budget."""

import os

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels are not compiled", allow_module_level=True)

from convkernels.backends.triton import ahead


@pytest.mark.slow
@pytest.mark.parametrize("variant", ahead.VARIANTS, ids=lambda v: v.name)
def test_budget(variant):
    """One architecture on every run; `convkernels check --kernels` compiles for all of them."""
    results = ahead.measure_all(variant, (90,))
    assert not ahead.violations(results)
    kernels = {result.kernel for result in results}
    assert kernels & {"conv_tile", "conv_band"} and kernels & {"grad_tile", "grad_band", "grad_window"}
    for result in results:
        assert (result.matrix > 0) == result.kernel.endswith("_band"), result


def test_a_spill_is_found():
    good = ahead.Resources("v", "conv_tile", 90, 64, 0, 0, 1, 0, 1, 0, 0)
    assert any("stack" in text for text in ahead.violations([good.__class__(**{**vars(good), "spills": 8})]))
    assert any("16-byte" in text for text in ahead.violations([good.__class__(**{**vars(good), "wide_stores": 0})]))


def test_every_variant_has_a_budget():
    budgeted = set(ahead.json.loads(ahead.BUDGET.read_text())["limits"])
    for variant in ahead.VARIANTS:
        for architecture in ahead.ARCHITECTURES:
            assert any(key.startswith(f"{variant.name} /") and key.endswith(f"sm_{architecture}") for key in budgeted)
