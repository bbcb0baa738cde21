"""Triton's interpreter, made fit for tests."""

from __future__ import annotations

from typing import Any


def prepare() -> None:
    """Make the interpreter quicker, let it run loops of a computed length with any numpy, and make products exact.

    It exchanges `triton.language` for itself at every call of a device function and back again, which takes most of the
    time; once per process is enough. And it turns arrays of one element into integers in a way that numpy 2.4 refuses. Its
    products are numpy's, which on some processors add up the last rows of a matrix in another order than the others.
    """
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    exchange = interpreter._patch_lang
    done: set[Any] = set()
    exchanged: set[tuple[bool, bool]] = set()

    def once(fn: Any) -> Any:
        if fn not in done:
            values = fn.__globals__.values()
            modules = (any(v is tl for v in values), any(v is tl.core for v in values))
            if modules not in exchanged:
                exchange(fn)
                exchanged.add(modules)
                tl.core.tensor.__index__ = lambda self: int(self.handle.data.item())
            done.add(fn)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = once
    multiply = interpreter.InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, d: Any, *precision: Any) -> Any:
        if d.data.dtype != np.float32 or a.dtype.primitive_bitwidth == 8:
            return multiply(self, a, b, d, *precision)
        # In float64 the order makes no difference that is left in float32.
        with np.errstate(all="ignore"):
            product = np.matmul(a.data.astype(np.float64), b.data.astype(np.float64)).astype(np.float32)
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = create_dot
