"""What takes the place of methods and functions of transformers in the classes that ``optimize`` gives to modules."""

import __future__

import ast
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn


class Unreachable(Exception):
    """Why a class cannot be replaced."""


def _nothing(module: nn.Module) -> None:
    return None


@dataclass(frozen=True)
class Adapter:
    """How a class of transformers comes to compute with this package."""

    methods: type = object  # whose methods stand before those of the class
    functions: dict = field(default_factory=dict)  # what global names in its ``forward`` mean
    attention: bool = True  # changes only together with all other attention: modules share masks and positions
    masks: bool = False  # needs the masks of ``attention.padding_mask``
    unneeded: Callable[[nn.Module], str | None] = _nothing  # why a module of the class has nothing to change
    why_not: Callable[[nn.Module], str | None] = _nothing  # why a module of the class must stay as it is


def rebound(forward: Callable, functions: dict[str, Callable]) -> Callable:
    """forward with other meanings of some of its global names: its source, decorators too, within a function that has
    them as arguments. All other globals stay those of its file, and lines have their numbers there."""
    function = inspect.unwrap(forward)
    if not function.__module__.startswith("transformers."):
        raise Unreachable(f"its forward is written in {function.__module__}, not in transformers")
    if function.__code__.co_freevars:
        raise Unreachable("its forward uses variables of a function around it")
    try:
        lines, first = inspect.getsourcelines(function)
    except OSError:
        raise Unreachable("the source of its forward is not installed") from None
    tree = ast.parse("if True:\n" + "".join(lines) if lines[0][0].isspace() else "".join(lines))
    (definition,) = tree.body[0].body if isinstance(tree.body[0], ast.If) else tree.body
    ast.increment_lineno(definition, first - min(node.lineno for node in (definition, *definition.decorator_list)))
    around = ast.parse(f"def bind({', '.join(functions)}):\n return {definition.name}")
    around.body[0].body.insert(0, definition)
    flags = function.__code__.co_flags & __future__.annotations.compiler_flag
    scope: dict[str, Callable] = {}
    code = compile(around, inspect.getsourcefile(function), "exec", flags, dont_inherit=True)
    exec(code, function.__globals__, scope)
    new = scope["bind"](**functions)
    if _wrappers(new) != _wrappers(forward):
        raise Unreachable("other code has wrapped its forward")
    return new


def _wrappers(function: Callable) -> list:
    """The code of what decorators have put around a function."""
    found = []
    while hasattr(function, "__wrapped__"):
        found.append(getattr(function, "__code__", type(function)))
        function = function.__wrapped__
    return found
