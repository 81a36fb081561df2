"""Hints for names that are not known."""

import difflib
from collections.abc import Iterable
from typing import Any

#: Where no known name is close, so many at most are all listed.
LISTED = 8


def nearest(name: Any, known: Iterable[Any]) -> str:
    """Return the known name closest in spelling, ignoring case, however far it is."""
    lowered = {str(other).lower(): str(other) for other in known}
    return lowered[difflib.get_close_matches(str(name).lower(), lowered, n=1, cutoff=0)[0]]


def is_close(name: Any, known: Any, cutoff: float = 0.7) -> bool:
    """Return whether two names are spelled alike, ignoring case."""
    pair = str(name).lower(), [str(known).lower()]
    return bool(difflib.get_close_matches(*pair, n=1, cutoff=cutoff))


def did_you_mean(name: Any, known: Iterable[Any]) -> str:
    """Return the end of an error message about a name that is not known.

    Args:
        name: what was given.
        known: all valid names, at least one.

    Returns:
        As in ``did you mean 'gru'?``, or where none is close and there are few, ``known: a, b``.
    """
    known = list(map(str, known))
    best = nearest(name, known)
    if is_close(name, best, cutoff=0.5) or len(known) > LISTED:
        return f"did you mean {best!r}?"
    return f"known: {', '.join(known)}"
