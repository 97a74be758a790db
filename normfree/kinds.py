"""Whether a value is of the type that its key is annotated with, and how to say that it is not."""

import sys
from typing import Any, get_args, get_origin

WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", type(None): "null"}


def fits(value: Any, kind: Any) -> bool:
    """Whether a value is of an annotated type. A whole number may stand for a float; a bool is no number."""
    if get_origin(kind) is list:
        return isinstance(value, list) and all(fits(item, *get_args(kind)) for item in value)
    if get_args(kind):
        return any(fits(value, option) for option in get_args(kind))
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    if kind is float and isinstance(value, int):
        return abs(value) <= sys.float_info.max
    return isinstance(value, kind)


def misfit(name: str, value: Any, kind: Any) -> str:
    """`optim.lr='fast' is not a number.`"""
    options = (kind,) if get_origin(kind) is list else get_args(kind) or (kind,)
    return f"{name}={shown(value)} is not {' or '.join(WORDS.get(option, 'a list of texts') for option in options)}."


def shown(value: Any) -> str:
    """A value in an error message: whole where it is short."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a whole number of thousands of digits, or lists in lists in lists
        return f"(a long {type(value).__name__})"
    return text if len(text) <= 80 else f"{text[:70]}... ({len(text)} characters)"
