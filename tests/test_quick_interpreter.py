"""The installed Triton is one whose interpreter tests/quick_interpreter.py knows; another one is left alone."""

import types

import pytest
import quick_interpreter
from conftest import QUICK

interpreter = pytest.importorskip("triton.runtime.interpreter")


def test_the_installed_triton_is_known():
    # Where kernels are interpreted its functions have been replaced.
    assert QUICK or not quick_interpreter.unknown(interpreter)


def test_another_triton_is_left_alone():
    class InterpretedFunction:
        def __call__(self, *arguments):
            return arguments

    other = types.SimpleNamespace(_patch_lang=lambda fn, scope: None, InterpretedFunction=InterpretedFunction)
    before = dict(vars(other)), InterpretedFunction.__call__
    with pytest.warns(UserWarning, match="_patch_lang, _get_np_dtype, InterpretedFunction.__call__ changed"):
        assert not quick_interpreter.quicken(other)
    assert before == (vars(other), InterpretedFunction.__call__)
