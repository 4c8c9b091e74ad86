"""The ways to record a derivative. Which one is taken matters for speed and for what composes (all measured).

Nothing to differentiate -> the raw operator; eager autograd -> ``recorded``, an autograd.Function with everything in
``forward``, the cheapest; torch.func and torch.compile -> ``transformable``, with ``setup_context`` and ``vmap``;
torch.ops called directly -> ``hooks``, for torch.library.register_autograd. No ``jvp``: it would break compiled graphs.

In all of them ``save(ctx, args, outputs)`` keeps what the derivative needs of the arguments, of which trailing defaults
may be left out, and ``backward(ctx, backend, *grads)`` returns one gradient per argument of the call.
"""

from collections.abc import Callable

from torch import Tensor
from torch.autograd import Function

from ._arguments import Saved
from ._on_import import when_imported
from ._spec import Autograd


def save_gradients(saved: Saved, kind: type) -> Callable:
    """The ``save`` of a gradient operator; its record says in ``wanted`` which outputs were asked for."""

    def save(ctx, args: tuple, outputs: tuple[Tensor, ...]) -> None:
        saved.keep(ctx, *args)
        ctx.set_materialize_grads(False)
        wanted = kind(*args).wanted
        ctx.mark_non_differentiable(*[value for value, asked in zip(outputs, wanted, strict=True) if not asked])

    return save


def _function(prefix: str, kind: type, **methods: Callable) -> type[Function]:
    """An autograd.Function named after the operator, as error messages and profiles show it."""
    name = prefix + kind.__name__.title().replace("_", "")
    return type(name, (Function,), {method: staticmethod(code) for method, code in methods.items()})


def recorded(
    kind: type, backend: str, raw: Callable, save: Callable, backward: Callable, *, unwrapped: bool = False
) -> Callable:
    """For eager autograd; takes as many arguments as are given. unwrapped: only such as no transform has left behind,
    for which Function.apply looks through all of them; a sixth of what it takes."""

    def forward(ctx, *args):
        outputs = raw(*args)
        save(ctx, args, outputs)
        return outputs

    def gradients(ctx, *grads):
        return backward(ctx, backend, *grads)

    function = _function("Recorded", kind, forward=forward, backward=gradients)
    return super(Function, function).apply if unwrapped else function.apply


def hooks(backend: str, save: Callable, backward: Callable) -> Autograd:
    """For the public operator."""
    return Autograd(
        lambda ctx, inputs, output: save(ctx, inputs, output),
        lambda ctx, *grads: backward(ctx, backend, *grads),
    )


def transformable(kind: type, raw: Callable, save: Callable, backward: Callable, vmap: Callable) -> Callable:
    """For torch.func and torch.compile: a function of a backend's name and of the arguments. raw: backend -> its
    operator; vmap(function, size, dims, args): dims and args are records."""

    def forward(*args):
        return raw(args[-1])(*args[:-1])

    def setup_context(ctx, inputs, output):
        ctx.backend = inputs[-1]
        save(ctx, inputs[:-1], output)

    def gradients(ctx, *grads):
        return backward(ctx, ctx.backend, *grads)

    def map_batch(info, in_dims, *args):
        def inner(*inner_args):
            return call(args[-1], *inner_args)

        return vmap(inner, info.batch_size, kind(*in_dims[:-1]), kind(*args[:-1]))

    function = _function("", kind, forward=forward, setup_context=setup_context, backward=gradients, vmap=map_batch)

    def call(backend: str, *args, **named):
        return function.apply(*kind(*args, **named), backend)

    # The compiler calls the Function instead of tracing into it. Inside torch.func.grad it takes its inputs for
    # constants, skips the Function, and every gradient is silently zero (seen with torch 2.13).
    when_imported("torch._dynamo", lambda dynamo: dynamo.allow_in_graph(function))
    return call
