"""Numbers that callers give: refused by name where they are none, or beyond what can be."""

from __future__ import annotations

import math
from numbers import Integral, Real

# Of a patch, a side in output pixels; of an exponent, its size. Larger ones overflow on the way, and nobody means them.
LARGEST_SPAN, LARGEST_EXPONENT = 1 << 20, 1e6
# Values of an image that is held at once.
LARGEST_IMAGE = 1 << 40


def whole(op: str, name: str, value: object, most: int, least: int = 1) -> int:
    """`value` as an integer from `least` to `most`.

    Raises:
        TypeError: it is none.
        ValueError: it is smaller or larger.
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
    """`value` as a float; whether it is finite is for others to judge unless `most` is.

    Raises:
        TypeError: it is no number.
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
