"""FLOP formulas for ``torch.utils.flop_counter``, handed over when somebody imports it.

That module imports Triton where Triton is installed, which takes long and which ``import convkernels`` must not do. So
formulas wait here until the module is loaded for another reason, which it must be before anybody can count.
"""

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable

_COUNTER = "torch.utils.flop_counter"
_waiting: list[tuple[list, Callable]] = []


def register(packets: list, formula: Callable) -> None:
    """Register ``formula`` for operator packets, now or as soon as the flop counter is imported."""
    _waiting.append((packets, formula))
    if _COUNTER in sys.modules:
        _hand_over()


def _hand_over() -> None:
    while _waiting:
        packets, formula = _waiting.pop()
        sys.modules[_COUNTER].register_flop_formula(packets)(formula)


class _Hook(importlib.abc.MetaPathFinder):
    """Runs ``_hand_over`` once after the flop counter has been imported."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        execute = spec.loader.exec_module

        def execute_and_hand_over(module):
            execute(module)
            _hand_over()

        spec.loader.exec_module = execute_and_hand_over
        return spec


if _COUNTER not in sys.modules:
    sys.meta_path.insert(0, _Hook())
