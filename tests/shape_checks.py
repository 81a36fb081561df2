"""Shapes of tensors, checked against annotations for as long as tests run; see conftest.py."""

from collections.abc import Callable
from typing import Any

from beartype import beartype


def check_shapes(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make beartype check those annotations that hold shapes; all others are for mypy."""
    hints = function.__annotations__
    function.__annotations__ = {n: hint for n, hint in hints.items() if "jaxtyping" in repr(hint)}
    return beartype(function) if function.__annotations__ else function
