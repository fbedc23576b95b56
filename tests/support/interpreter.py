"""Triton's interpreter as the tests use it: faster, and as strict as the compiler's front end."""

from __future__ import annotations

import dataclasses
from typing import Any


def patch_once_a_launch() -> None:
    """The interpreter patches its language again for every function a kernel calls: 40 % of a kernel's time."""
    from triton.runtime import interpreter

    patch, patched = interpreter._patch_lang, set()

    class Nothing:
        def restore(self) -> None:
            pass

    def once(fn: Any) -> Any:
        module = id(fn.__globals__)
        if module in patched:
            return Nothing()
        scope = patch(fn)
        if not patched:  # the launch itself; of the functions it calls, Triton takes back nothing either
            restore = scope.restore

            def end() -> None:
                patched.clear()
                restore()

            scope.restore = end
        patched.add(module)
        return scope

    interpreter._patch_lang = once


def refuse_what_the_compiler_refuses() -> None:
    """The interpreter drops arguments that a kernel does not have and takes any option; a real launch raises."""
    from triton.backends.nvidia.compiler import CUDAOptions
    from triton.runtime.interpreter import GridExecutor

    options = {field.name for field in dataclasses.fields(CUDAOptions)}
    call = GridExecutor.__call__

    def strict(self: Any, *arguments: Any, **keywords: Any) -> Any:
        for name in keywords.keys() - set(self.arg_names) - options:
            raise KeyError(f"Keyword argument {name} was specified but unrecognised")
        chosen = {name: value for name, value in keywords.items() if name in options}
        CUDAOptions(**chosen, arch="sm80")  # raises for a number of warps that is no power of two
        return call(self, *arguments, **keywords)

    GridExecutor.__call__ = strict
