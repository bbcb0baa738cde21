"""Checks of numbers that callers give. An error names the argument."""

from __future__ import annotations

import math
from numbers import Integral, Real

# The largest side of a patch in output pixels, and the largest magnitude of an exponent. Larger numbers would overflow.
LARGEST_SPAN, LARGEST_EXPONENT = 1 << 20, 1e6
# The largest number of values of an image that is held at once.
LARGEST_IMAGE = 1 << 40


def whole(op: str, name: str, value: object, most: int, least: int = 1) -> int:
    """`value` as an integer from `least` to `most`.

    Raises:
        TypeError: `value` is not an integer.
        ValueError: `value` is out of range.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{op}: {name} must be an integer; got {value!r}")
    number = int(value)
    if number < least:
        raise ValueError(f"{op}: {name} must be at least {least}; got {value}")
    if number > most:
        raise ValueError(f"{op}: {name} must be at most {most}; got {value}")
    return number


def real(op: str, name: str, value: object, most: float = math.inf) -> float:
    """`value` as a float. It need not be finite unless `most` is.

    Raises:
        TypeError: `value` is not a number.
        ValueError: its magnitude exceeds `most`.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{op}: {name} must be a number; got {value!r}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if math.isfinite(most) and not abs(number) <= most:
        raise ValueError(f"{op}: {name} must be finite and at most {most:g} in magnitude; got {value}")
    return number
