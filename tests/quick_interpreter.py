"""Triton's interpreter, quicker: it prepares its language modules anew for every call of a device function, and a table
of types for every operation; that is most of its time. Here the launch prepares them all. The kernels run as before.

It replaces private functions of Triton, and so only those that it knows.
"""

import functools
import warnings

# The names that a function refers to, in order, of Triton 3.9.
CALL = ("_patch_lang", "fn", "rewrite", "Exception", "InterpreterError", "repr")


def unknown(interpreter):
    """Names of the functions of triton.runtime.interpreter that are not those that `quicken` knows how to replace."""

    def code(*path):
        return getattr(functools.reduce(lambda at, name: getattr(at, name, None), path, interpreter), "__code__", None)

    patch, type_of, call = code("_patch_lang"), code("_get_np_dtype"), code("InterpretedFunction", "__call__")
    known = {
        "_patch_lang": patch and patch.co_argcount == 1,
        "_get_np_dtype": type_of and type_of.co_argcount == 1,
        "InterpretedFunction.__call__": call and call.co_names == CALL,
    }
    return [name for name, right in known.items() if not right]


def quicken(interpreter):
    """Whether it did; where it does not know this Triton it warns and leaves it as it is."""
    if others := unknown(interpreter):
        warnings.warn(f"Triton's interpreter stays slow: {', '.join(others)} changed", stacklevel=2)
        return False
    import triton.language.standard as library

    patch, type_of = interpreter._patch_lang, interpreter._get_np_dtype
    of_scalar = functools.cache(type_of)

    def patch_for_launch(kernel):
        scope = patch(kernel)
        patch(library.zeros.fn)
        return scope

    def call(self, *arguments, **named):
        return self.rewrite()(*arguments, **named)

    interpreter._patch_lang = patch_for_launch
    interpreter.InterpretedFunction.__call__ = call
    interpreter._get_np_dtype = lambda t: type_of(t) if t.is_ptr() else of_scalar(t.scalar)
    return True
