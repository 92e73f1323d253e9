"""Checks of arguments that a Python program gives, whose types nothing else has checked."""

from numbers import Integral, Real
from typing import Any

from pipelines.console import UserError, nearest


def check_from_one(**numbers: int) -> None:
    """Raises UserError for an argument, by its name, that is no whole number from 1 up."""
    for name, number in numbers.items():
        check_whole(name, number, " from 1 up")
        if number < 1:
            raise UserError(f"{name} is a whole number from 1 up, not {number!r}")


def check_whole(name: str, number: int, more: str = "") -> None:
    """Raises UserError for an argument that is no whole number. more: what else it has to be, in words."""
    if not isinstance(number, Integral) or isinstance(number, bool):
        raise UserError(f"{name} is a whole number{more}, not {number!r}")


def check_numbers(**numbers: float) -> None:
    """Raises UserError for an argument, by its name, that is no number."""
    for name, number in numbers.items():
        if not isinstance(number, Real) or isinstance(number, bool):
            raise UserError(f"{name} is a number, not {number!r}")


def check_choice(asked: str, names: tuple[str, ...], what: str) -> None:
    """Raises UserError for what is none of the names. what: they are of, in words."""
    if asked not in names:
        raise UserError(f"there is no {what} {asked!r}{nearest(str(asked), names)}")


def what_is(given: Any) -> str:
    """A value of the wrong type, in words."""
    kind = "None" if given is None else type(given).__name__
    return f"a list of {type(given[0]).__name__}" if isinstance(given, list) and given else kind
