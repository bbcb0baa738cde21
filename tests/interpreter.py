"""Triton's interpreter, made fit for tests."""

from __future__ import annotations

from typing import Any


def prepare() -> None:
    """Make the interpreter quicker, and let it run loops of a computed length with any numpy.

    It exchanges `triton.language` for itself at every call of a device function, which takes most of the time; once per
    launch is enough. And it turns arrays of one element into integers in a way that numpy 2.4 refuses.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    exchange = interpreter._patch_lang
    scopes: dict[tuple[bool, bool], Any] = {}
    modules: dict[Any, tuple[bool, bool]] = {}

    class Scope:
        def __init__(self, outermost: bool) -> None:
            self.outermost = outermost

        def restore(self) -> None:
            if self.outermost:
                for scope in reversed(scopes.values()):
                    scope.restore()
                scopes.clear()

    def once(fn: Any) -> Scope:
        if fn not in modules:
            values = fn.__globals__.values()
            modules[fn] = (any(v is tl for v in values), any(v is tl.core for v in values))
        outermost = not scopes
        if modules[fn] not in scopes:
            scopes[modules[fn]] = exchange(fn)
            tl.core.tensor.__index__ = lambda self: int(self.handle.data.item())
        return Scope(outermost)

    interpreter._patch_lang = once
