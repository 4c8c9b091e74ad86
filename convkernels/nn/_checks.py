"""Checks of the arguments of modules and configurations, over those in ops/_validate.py."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..ops._validate import fail


def expect(name: str, argument: str, good: bool, expected: str, got: Any) -> None:
    """ValueError unless ``good``; ``name`` is the class whose argument it is."""
    if not good:
        fail(name, argument, expected, got if isinstance(got, Tensor) else repr(got))


def each(check: Callable[[str, str, Any], None], name: str, **values: Any) -> None:
    """One check of ops/_validate.py for several arguments of the class ``name``, given by their names."""
    for argument, value in values.items():
        check(name, argument, value)
