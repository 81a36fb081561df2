"""Hints for names that are not known."""

import difflib
from collections.abc import Iterable
from typing import Any


def nearest(name: Any, known: Iterable[str]) -> str:
    """The known name that is closest in spelling, however far; upper case counts as lower case."""
    lowered = {other.lower(): other for other in known}
    return lowered[difflib.get_close_matches(str(name).lower(), lowered, n=1, cutoff=0)[0]]


def hint(name: Any, known: Iterable[Any]) -> str:
    """The end of an error message: the known name that was meant, or all where none is close."""
    known = sorted(map(str, known))
    close = difflib.get_close_matches(str(name), known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"


def unknown(kind: str, name: Any, known: Iterable[str]) -> str:
    """An error message: the name, all that are known, and the one that was meant where one is
    close."""
    known = list(known)
    close = difflib.get_close_matches(str(name), known, n=1)
    meant = f"; did you mean {close[0]!r}?" if close else ""
    return f"unknown {kind} {name!r} (known: {', '.join(known)}){meant}"
