"""Grids and distributions in an experiment's content: where they stand, and what their values are.

In the place of a value may stand `{"grid": [...]}`, every value of which is a point of its own, or
a distribution such as `{"uniform": [0, 1]}`, which a search draws values from.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from sgrl.names import is_close, nearest

#: Distributions that a search draws values from, and how many numbers each takes; `choice` takes
#: any values.
DISTRIBUTIONS = {
    **dict.fromkeys(("uniform", "loguniform", "randint", "lograndint"), 2),
    **dict.fromkeys(("quniform", "qloguniform", "qrandint", "qlograndint"), 3),
    "choice": None,
}
#: Names of swept values in trial names and in summary.csv, where the key itself is too long.
SHORT_NAMES = {"num_envs_per_env_runner": "envs"}


def misspelled_grids(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield the path to each key that may be misspelled, as in ``{"gird": [1, 2]}``.

    That is a `grid`, or a distribution.
    """
    known = ("grid", *DISTRIBUTIONS)
    for key, value in tree.items() if isinstance(tree, dict) else ():
        here = (*path, str(key))
        alone = len(tree) == 1 and isinstance(value, list) and key not in known
        if alone and is_close(key, nearest(key, known)):
            yield here
        yield from misspelled_grids(value, here)


def repeated(values: list[Any]) -> str:
    """Return what is wrong with values that are to differ; nothing is an empty text."""
    twice = [value for index, value in enumerate(values) if value in values[:index]]
    if twice:
        return f"{twice[0]!r} is given twice"
    return "" if values else "empty list; give at least one value"


def grids_in(
    tree: Any, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """Yield the path to each ``{"grid": [...]}`` in a tree, and the grid."""
    if isinstance(tree, dict):
        if "grid" in tree:
            yield path, tree
        else:
            for key, value in tree.items():
                yield from grids_in(value, (*path, str(key)))


def distributions_in(
    tree: Any, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], tuple[str, Any]]]:
    """Yield the path to each distribution in a tree, its name and its values."""
    if isinstance(tree, dict) and "grid" not in tree:
        if is_open(tree):
            yield path, next(iter(tree.items()))
            return
        for key, value in tree.items():
            yield from distributions_in(value, (*path, str(key)))


def leaves_of(tree: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield the path to each value in a tree that holds no further keys, and the value."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from (((str(key), *path), leaf) for path, leaf in leaves_of(value))
        else:
            yield (str(key),), value


def put(tree: dict[str, Any], path: Sequence[str], value: Any) -> None:
    """Set the value at the end of a path in a tree, making the steps that are not there."""
    for step in path[:-1]:
        tree = tree.setdefault(step, {})
    tree[path[-1]] = value


def is_open(tree: Mapping[str, Any]) -> bool:
    """Return whether a mapping is a grid or a distribution, in the place of a value."""
    return "grid" in tree or (len(tree) == 1 and next(iter(tree)) in DISTRIBUTIONS)


def wrong_values(name: str, values: Any) -> str:
    """Return what is wrong with the values of a distribution; nothing is an empty text."""
    if not isinstance(values, list):
        return f"expected a list, got {values!r}"
    count = DISTRIBUTIONS[name]
    if count is None:
        return repeated(values)
    kind = int if "randint" in name else float
    words = "whole numbers" if kind is int else "numbers"
    numbers = [v for v in values if isinstance(v, (int, kind)) and not isinstance(v, bool)]
    if len(numbers) != len(values) or len(values) != count or not all(map(math.isfinite, numbers)):
        steps = ", step" if count == 3 else ""
        return f"expected {count} {words}, [low, high{steps}], got {values!r}"
    if not numbers[0] < numbers[1]:
        return f"the lower number comes first, got {values!r}"
    if "log" in name and numbers[0] <= 0:
        return f"must be greater than 0 to be drawn by its logarithm, got {numbers[0]}"
    if count == 3 and numbers[2] <= 0:
        return f"the step must be greater than 0, got {numbers[2]}"
    if count == 3 and any(abs(v / numbers[2] - round(v / numbers[2])) > 1e-9 for v in numbers[:2]):
        return f"low and high must be multiples of the step, got {values!r}"
    return ""


def place_of(experiment: Mapping[str, Any], method: str, key: str) -> str:
    """Return a key of a method's point as it stands in the file: a method's own or a common one."""
    if key.partition(".")[0] == "model":
        return f"methods.{method}.{key}"
    tree = experiment["methods"][method]
    for step in key.split("."):
        if not isinstance(tree, dict) or step not in tree:
            return key
        tree = tree[step]
    return f"methods.{method}.{key}"


def short_names(
    paths: Iterable[tuple[str, ...]], taken: Callable[[str], bool]
) -> dict[tuple[str, ...], str]:
    """Shorten each path to the steps that tell it from all others.

    The last step is kept in any case. The result differs from what is taken, too.
    """
    paths = list(paths)
    depth = dict.fromkeys(paths, 1)
    while True:
        short = {
            path: ".".join([*path[-depth[path] : -1], SHORT_NAMES.get(path[-1], path[-1])])
            for path in paths
        }
        names = list(short.values())
        clashing = [path for path in paths if names.count(short[path]) > 1 or taken(short[path])]
        if not clashing:
            return short
        for path in clashing:
            depth[path] += 1


def label(value: Any) -> str:
    """Return a value as it stands in a trial's name."""
    if isinstance(value, dict):
        return "+".join(f"{key}={label(item)}" for key, item in value.items())
    if isinstance(value, list):
        return "x".join(label(item) for item in value)
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return re.sub(r"[^A-Za-z0-9_.+=-]", "-", text)
