"""What a field of a recipe may hold: its type, its bound and its meaning, which stand in its annotation."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args, get_origin

from fastokd.errors import UserError, wrong_type

# What a value of each kind of field is, for the error.
KINDS: dict[Any, tuple[Any, str]] = {
    bool: (bool, "true or false"),
    int: (numbers.Integral, "a whole number"),
    float: (numbers.Real, "a number"),
    str: (str, "a word"),
    dict: (dict, "an object of names and values"),
    int | float: (numbers.Real, "a number of images or a fraction below 1"),
    tuple[int, ...]: (tuple, "a list of whole numbers such as [10,15]"),
    tuple[float, ...]: (tuple, "a list of numbers such as [0.08,1.0]"),
}


class Bound(NamedTuple):
    """The values that a field may have, and the words for them after "it must be".

    Where a field has several, the first that isn't met is named.
    """

    allows: Callable[[Any], bool]
    words: str


def at_least(least: float) -> Bound:
    """Numbers of at least ``least``."""
    return Bound(lambda value: value >= least, f"at least {least}")


def between(least: float, most: float) -> Bound:
    """Numbers from ``least`` to ``most``."""
    return Bound(lambda value: least <= value <= most, f"between {least} and {most}")


def at_most(most: float) -> Bound:
    """Numbers up to a limit that catches typing errors, before memory or time runs out."""
    return Bound(lambda value: value <= most, f"at most {most}")


POSITIVE = Bound(lambda value: math.isfinite(value) and value > 0, "a finite number above 0")
NOT_NEGATIVE = Bound(
    lambda value: math.isfinite(value) and value >= 0, "a finite number, at least 0"
)
BELOW_ONE = Bound(lambda value: 0 <= value < 1, "at least 0 and below 1")
IMAGES = Bound(
    lambda value: not isinstance(value, float) or value < 1,
    "a whole number of images, such as 500, or a fraction below 1, such as 0.1",
)


@dataclass(frozen=True)
class Setting:
    """A field of a recipe."""

    type: Any
    meaning: str
    bounds: tuple[Bound, ...] = ()

    @staticmethod
    def of(annotated: Any) -> Setting:
        """From ``Annotated[type, meaning, *bounds]``."""
        kind, meaning, *bounds = get_args(annotated)
        return Setting(kind, meaning, tuple(bounds))

    def checked(self, name: str, value: Any) -> Any:
        """``value`` converted to the field's type.

        Raises:
            UserError: it has another type.
        """
        kind = str if get_origin(self.type) is Literal else self.type
        fits_in, what = KINDS[dict if get_origin(kind) is dict else kind]
        if fits_in is tuple and isinstance(value, list):
            value = tuple(value)
        fits = isinstance(value, fits_in) and (kind is bool or not isinstance(value, bool))
        if fits_in is tuple:
            entry = get_args(kind)[0]
            entries = (int,) if entry is int else (int, float)
            fits = fits and all(type(one) in entries for one in value)
        if fits_in is dict:
            fits = fits and all(isinstance(key, str) for key in value)
        if not fits:
            raise wrong_type(name, value, what)
        if kind is float:
            return as_float(name, value)
        if kind == tuple[float, ...]:
            return tuple(as_float(name, one) for one in value)
        if kind is int:
            return int(value)
        return int(value) if kind == int | float and value == value // 1 else value

    def check(self, name: str, value: Any) -> None:
        """Raises UserError if ``value`` has another type, is no word of a Literal, or out of bounds."""
        self.checked(name, value)
        if get_origin(self.type) is Literal and value not in get_args(self.type):
            *words, last = get_args(self.type)
            raise UserError(f"{name} is {value!r}: choose {', '.join(words)} or {last}")
        for bound in self.bounds:
            if not bound.allows(value):
                raise UserError(f"{name} is {value}: it must be {bound.words}")


def as_float(name: str, value: Any) -> float:
    """A number as a float; UserError if it is too large for one."""
    try:
        return float(value)
    except OverflowError:
        raise wrong_type(name, value, "a finite number") from None
