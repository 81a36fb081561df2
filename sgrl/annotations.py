"""Whether a YAML value fits a type annotation, and what would, in words.

Told from the annotation by hand: pydantic would refuse lists where it says tuple, and cannot build
a validator of one that names RLlib's own classes.
"""

import types
import typing
from collections.abc import Callable, Sequence
from typing import Any

MAPPING = "a mapping of keys to values"


def accepts(annotation: Any, value: Any) -> bool:
    """Return whether a YAML value fits a type annotation; True where the annotation is no help."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return any(accepts(argument, value) for argument in arguments)
    if origin is typing.Literal:
        return value in arguments
    kind = origin or annotation
    if kind is types.NoneType:
        return value is None
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if kind in (bool, str, dict):
        return isinstance(value, kind)
    if kind in (list, tuple, Sequence):
        items = [argument for argument in arguments if argument is not Ellipsis]
        if not isinstance(value, list | tuple):
            return False
        if kind is tuple and Ellipsis not in arguments:
            return len(value) == len(items) and all(map(accepts, items, value))
        return not items or all(accepts(items[0], item) for item in value)
    # YAML holds no classes and no functions.
    return kind not in (type, Callable)


def in_words(annotation: Any) -> str:
    """Return the values that fit an annotation in words."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        words = [in_words(a) for a in arguments if a is not types.NoneType]
        return " or ".join(dict.fromkeys(words))
    if origin is typing.Literal:
        return " or ".join(repr(argument) for argument in arguments)
    plain = {float: "a number", int: "a whole number", bool: "true or false", str: "text"}
    plain |= {dict: MAPPING, list: "a list", tuple: "a list"}
    return plain.get(origin or annotation, "something a YAML file cannot hold")
