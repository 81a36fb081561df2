"""Changes of an experiment file's content from the command line.

They are `--set`, `--methods`, `--seeds` and `--add`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sgrl.commands import command
from sgrl.names import did_you_mean
from sgrl.results.grids import grids_in, is_open, place_of
from sgrl.results.plan import Problem, expand_range
from sgrl.yaml_files import YAMLFileError, parse_yaml


def override(content: dict[str, Any], setting: str) -> None:
    """Set the value of a key, in the place of what methods set there; null drops a method.

    Args:
        content: of the experiment file, changed in place.
        setting: KEY=VALUE, the value in YAML.

    Raises:
        Problem: it is not of that form, or there can be no such key.
    """
    key, equals, text = setting.partition("=")
    path = key.split(".")
    if not equals or not all(path):
        raise Problem("", f"--set {setting}: expected KEY=VALUE, as in config.training.lr=1e-3")
    if key.startswith("x-"):
        raise Problem(key, "only helps to write the file: set the keys that repeat it")
    value = _value(key, text)
    if value is None and text.strip() not in ("null", "~"):
        raise Problem(key, "no value given")
    if path[0] == "methods" and (len(path) > 2 or (len(path) == 2 and value is None)):
        _check_method(content, path[1], key)
    if path[0] == "methods" and len(path) == 2 and value is None:
        del content["methods"][path[1]]
        return
    parent = content
    for depth, step in enumerate(path[:-1], 1):
        if parent.get(step) is None:
            parent[step] = {}
        parent = parent[step]
        if not isinstance(parent, dict) or is_open(parent):
            raise Problem(key, f"{'.'.join(path[:depth])} holds no keys; set it as a whole")
    parent[path[-1]] = value

    if path[0] == "config" and isinstance(content.get("methods"), dict):
        for method, entry in content["methods"].items():
            _forget(entry, path, f"methods.{method}")


def _forget(entry: Any, path: Sequence[str], where: str) -> None:
    """Drop what a method sets at an overridden key."""
    for depth, step in enumerate(path):
        if not isinstance(entry, dict):
            return
        if is_open(entry):
            key = ".".join([where, *path[:depth]])
            raise Problem(path, f"{key} is a grid or a distribution; set that key instead")
        if depth == len(path) - 1:
            entry.pop(step, None)
        entry = entry.get(step)


def keep_methods(content: dict[str, Any], names: Sequence[str]) -> None:
    """Drop all methods but those named.

    Args:
        content: of the experiment file, changed in place.
        names: at least one.

    Raises:
        Problem: there is no such method.
    """
    for name in names:
        _check_method(content, name, "--methods")
    methods = content["methods"]
    content["methods"] = {name: methods[name] for name in methods if str(name) in names}


def _check_method(content: Mapping[str, Any], name: str, key: str) -> None:
    methods = content.get("methods")
    if isinstance(methods, dict) and name not in map(str, methods):
        hint = did_you_mean(name, methods) if methods else "there are none"
        raise Problem(key, f"unknown method {name!r}; {hint}")


def add(content: dict[str, Any], addition: str, path: Path) -> None:
    """Add values to the seeds, or to the grid at a key; those that are there already stay.

    Args:
        content: of the experiment file, changed in place.
        addition: KEY=VALUES, the values in YAML.
        path: the file's, for commands in messages.

    Raises:
        Problem: it is not of that form, or the key is not swept.
    """
    key, equals, text = addition.partition("=")
    if not equals or not key:
        raise Problem("", f"--add {addition}: expected KEY=VALUES, as in seeds=6..11")
    values = expand_range(_value(key, text), key)
    if values is None or values == []:
        raise Problem(key, "no value given")

    there = content["seeds"] if key == "seeds" else _grid_at(content, key, path)
    # A list beside values that are lists, such as maze_dims, is one of them.
    one = not isinstance(values, list) or (
        isinstance(there[0], list) and not isinstance(values[0], list)
    )
    there += [value for value in ([values] if one else values) if value not in there]


def _grid_at(content: Mapping[str, Any], key: str, path: Path) -> list[Any]:
    """The values that are swept at a key of the file."""
    roots = {root: content[root] for root in ("config", "methods", "stop")}
    grids = {".".join(steps): node["grid"] for steps, node in grids_in(roots)}
    if key.startswith("methods."):
        _check_method(content, key.split(".")[1], key)
    if key not in grids:
        others = "".join(f", {grid}" for grid in grids)
        # Its value would have to enter the names of trials that are there already.
        raise Problem(
            key,
            f"not swept here (seeds{others} can be added to); compare other values in another "
            f"sweep: {command('sgrl', 'sweep', path, '--name', 'NAME', '--set', f'{key}=VALUE')}",
        )
    if key.startswith("config.") and all(
        place_of(content, method, key) != key for method in content["methods"]
    ):
        raise Problem(key, f"every method sets this itself: add to methods.NAME.{key}")
    return grids[key]


def _value(key: str, text: str) -> Any:
    try:
        return parse_yaml(text)
    except YAMLFileError as error:
        raise Problem(key, str(error)) from None
