"""An operator's arguments as one record, made from its schema, the one place of their names and defaults.

What runs in every call is compiled from those names, as namedtuple does it: a loop over them would take longer than
some kernels, and torch.compile follows only plain functions.
"""

from collections import namedtuple
from collections.abc import Callable, Sequence
from operator import itemgetter

import torch


def arguments(name: str, schema: str, inputs: Sequence[str] = ()) -> type:
    """A NamedTuple with the arguments of an operator, by name and with their defaults.

    schema: from the opening parenthesis on.  inputs: of an operator that returns gradients, the names of what they
    belong to, in the order of the bits of its argument ``needs``; ``record.wanted`` then has one bool per name.
    ``record.inputs`` are these names, ``record.schema`` is the schema, ``record.tensors`` the names of the arguments
    that are tensors.
    """
    parsed = torch._C.parse_schema(name + schema).arguments
    defaults = [argument.default_value for argument in parsed if argument.has_default_value()]
    fields = namedtuple(name, [argument.name for argument in parsed], defaults=defaults)
    tensors = tuple(argument.name for argument in parsed if "Tensor" in str(argument.type))
    members = {"__slots__": (), "schema": schema, "tensors": tensors}
    if inputs:
        wanted = namedtuple("Wanted", inputs)

        def read(record):
            return wanted(*(bool(record.needs >> bit & 1) for bit in range(len(inputs))))

        members |= {"wanted": property(read), "inputs": tuple(inputs)}
    return type(name, (fields,), members)


class Inputs:
    """The differentiable arguments of an operator, in the order of the bits of ``needs``."""

    def __init__(self, kind: type, names: Sequence[str]):
        self.names = tuple(names)
        self.bit = {name: 1 << number for number, name in enumerate(names)}
        self._places = tuple(map(kind._fields.index, names))
        self.of = _compiled(f"def of(record): return {', '.join(f'record[{place}]' for place in self._places)}")
        """The values of these arguments of a record."""
        self._plans: dict[tuple[bool, ...], tuple[int, Callable]] = {}

    def plan(self, given: tuple[bool, ...]) -> tuple[int, Callable]:
        """What ``ctx.needs_input_grad``, which ends where the arguments of a call end, asks for: the bits of the inputs
        that need a gradient, and a function that makes, of one gradient per input and a None, what ``backward``
        returns."""
        if torch.compiler.is_compiling():  # a compiler cannot call a function that it has not seen made
            return self._plan(given)
        plan = self._plans.get(given)
        if plan is None:
            plan = self._plans[given] = self._plan(given)
        return plan

    def _plan(self, given):
        bits = {place: bit for bit, place in enumerate(self._places) if place < len(given) and given[place]}
        return sum(1 << bit for bit in bits.values()), itemgetter(*(bits.get(place, -1) for place in range(len(given))))


def replacing(kind: type, *names: str) -> Callable:
    """function(record, *values): the record's arguments as a tuple, those named replaced. Faster than ``_replace``."""
    values = (field if field in names else f"record[{place}]" for place, field in enumerate(kind._fields))
    return _compiled(f"def replaced(record, {', '.join(names)}): return {', '.join(values)}")


class Saved:
    """What a call of one operator keeps for its derivative, and hands on as arguments of another.

    source, target: records of the two.  rest: the arguments of the target that the source does not have, in the order
    in which ``arguments`` takes them.  outputs: those that are outputs of the source, and kept too.  unused:
    arguments of the target that are not kept, and None.

    keep(ctx, *args): of a call of the source; trailing defaults may be left out, outputs are given by name.
    arguments(ctx, *rest): all arguments of the target, a tuple.
    """

    def __init__(
        self, source: type, target: type, outputs: Sequence[str] = (), rest: Sequence[str] = (),
        unused: Sequence[str] = (),
    ):  # fmt: skip
        shared = [name for name in target._fields if name not in (*outputs, *rest, *unused)]
        tensors = [name for name in shared if name in source.tensors]
        others = [name for name in shared if name not in source.tensors]
        defaults = source._field_defaults
        parameters = [f"{name}=defaults['{name}']" if name in defaults else name for name in source._fields]
        if outputs:
            parameters += ["*", *outputs]
        self.keep = _compiled(
            f"def keep(ctx, {', '.join(parameters)}):\n"
            f"    ctx.save_for_backward({', '.join([*tensors, *outputs])})\n"
            f"    ctx.others = ({', '.join(others)},)",
            defaults=defaults,
        )
        self.arguments = _compiled(
            f"def arguments(ctx, {', '.join(rest)}):\n"
            f"    {', '.join([*tensors, *outputs])}, = ctx.saved_tensors\n"
            f"    {', '.join(others)}, = ctx.others\n"
            f"    return {', '.join('None' if name in unused else name for name in target._fields)},"
        )


def _compiled(source: str, **names) -> Callable:
    before = set(names)
    exec(source, names)
    return next(value for name, value in names.items() if name not in before and name != "__builtins__")
