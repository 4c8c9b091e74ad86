"""Registrations with modules that are too heavy to import along with this package, done when somebody else imports
them.

``torch.utils.flop_counter`` imports Triton where Triton is installed, and the compiler takes more than a second;
neither is needed before the user asks for it.
"""

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable

_waiting: dict[str, list[Callable]] = {}


def when_imported(name: str, action: Callable) -> None:
    """Run ``action(module)`` now if the module is loaded, otherwise right after its first import."""
    module = sys.modules.get(name)
    if module is not None:
        action(module)
    else:
        _waiting.setdefault(name, []).append(action)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds nothing itself; lets the modules waited for be found by the others and adds the actions to their
    loading."""

    def find_spec(self, fullname, path=None, target=None):
        actions = _waiting.pop(fullname, None)
        if actions is None:
            return None
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_act(module):
            execute(module)
            for action in actions:
                action(module)

        spec.loader.exec_module = execute_and_act
        return spec


sys.meta_path.insert(0, _Finder())
