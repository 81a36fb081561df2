"""Experiment files: one YAML in, a validated list of trials out, before Ray is started.

    name: labyrinth_escape               # also the name of the results folder
    algorithm: Reinforce                 # or RLlib's PPO, APPO or IMPALA
    config:                              # sections: AlgorithmConfig methods; keys: their arguments
      environment: {env: labyrinth_escape, env_config: {maze_dims: [6, 6]}}
      training: {lr: {grid: [5.0e-4, 1.0e-3]}}
    methods:                             # the models compared side by side
      gru: {model: {policy: gru}}
      sparsenet: {model: {policy: sparsenet}, config: {training: {lr: 2.0e-3}}}
    seeds: [0, 1, 2]
    stop: {training_iteration: 300}
    checkpoint: {every: 25, keep: 2}
    evaluate: null                       # or {every: 10, episodes: 100}: apart from training
    max_failures: 2                      # restarts of a trial without a new checkpoint in between
    iteration_timeout: null              # seconds after which an iteration counts as hung
    num_threads: 1                       # torch threads of one trial
    concurrency: auto                    # trials at a time: as many as fit, or a number
    track: none                          # where else the curves go: tensorboard, wandb or mlflow

`{grid: [...]}` anywhere under `config`, `stop` or a method's `model` and `config` sweeps that
value; only a policy is not swept, as a method has one. One trial is one method, one grid point and
one seed. Sections that begin with `x-` are ignored: they hold what YAML aliases repeat.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import itertools
import logging
import math
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sgrl.commands import command
from sgrl.names import nearest
from sgrl.results.metrics import is_taken

DEFAULTS: dict[str, Any] = {
    "algorithm": "Reinforce",
    "config": {},
    "seeds": [0],
    "checkpoint": {"every": 25, "keep": 2},
    "evaluate": None,
    "max_failures": 2,
    "iteration_timeout": None,
    "num_threads": 1,
    "concurrency": "auto",
    "track": "none",
}
EVALUATE = {"every": 10, "episodes": 100}
TRACKERS = ("none", "tensorboard", "wandb", "mlflow")
# Written out in every experiment. A baseline is so only where it is set: sweeps that were started
# before there was one go on.
TRAINING: tuple[str, ...] = ("lr", "predictor_lr", "gamma", "entropy_coeff", "grad_clip")
TRAINING += ("normalize_returns", "two_phase", "total_updates", "total_iterations")
KEYS = ["name", "algorithm", "config", "methods", "seeds", "stop", "checkpoint"]
KEYS += ["evaluate", "max_failures", "iteration_timeout", "num_threads", "concurrency", "track"]

# Bounds RLlib does not check before a trial's processes have started: (low, high, low allowed).
BOUNDS: dict[tuple[str, ...], tuple[float, float, bool]] = {
    ("config", "training", "lr"): (0, math.inf, False),
    ("config", "training", "predictor_lr"): (0, math.inf, True),
    ("config", "training", "gamma"): (0, 1, True),
    ("config", "training", "entropy_coeff"): (0, math.inf, True),
    ("config", "training", "grad_clip"): (0, math.inf, False),
    ("config", "training", "value_coeff"): (0, math.inf, True),
    ("config", "env_runners", "num_envs_per_env_runner"): (1, math.inf, True),
    ("config", "env_runners", "num_env_runners"): (0, math.inf, True),
    ("config", "learners", "num_learners"): (0, math.inf, True),
    ("config", "learners", "num_gpus_per_learner"): (0, math.inf, True),
    ("stop", "training_iteration"): (1, math.inf, True),
}

MAX_RANGE = 100_000

#: Sections of the keys that say in which processes a trial computes.
PROCESSES = {
    "num_env_runners": "env_runners",
    "num_cpus_per_env_runner": "env_runners",
    "num_learners": "learners",
    "num_cpus_per_learner": "learners",
}

# Names of swept values in trial names and in summary.csv, where the key itself is too long.
SHORT_NAMES = {"num_envs_per_env_runner": "envs"}
ONE_POLICY = (
    "a method is one policy; compare several as methods of their own, "
    "as in gru: {model: {policy: gru}}"
)
# Keys as RLlib used to call them, or other libraries do.
ALIASES = {
    "batch_size": "train_batch_size_per_learner",
    "clip_range": "clip_param",
    "discount": "gamma",
    "ent_coef": "entropy_coeff",
    "entropy_coef": "entropy_coeff",
    "entropy_cost": "entropy_coeff",
    "env_id": "env",
    "env_name": "env",
    "environment_id": "env",
    "gae_lambda": "lambda_",
    "gradient_clip": "grad_clip",
    "lambda": "lambda_",
    "learning_rate": "lr",
    "max_grad_norm": "grad_clip",
    "n_envs": "num_envs_per_env_runner",
    "n_epochs": "num_epochs",
    "num_envs": "num_envs_per_env_runner",
    "num_envs_per_worker": "num_envs_per_env_runner",
    "num_rollout_workers": "num_env_runners",
    "num_sgd_iter": "num_epochs",
    "num_workers": "num_env_runners",
    "sgd_minibatch_size": "minibatch_size",
    "train_batch_size": "train_batch_size_per_learner",
    "vf_coef": "vf_loss_coeff",
}


class ExperimentError(ValueError):
    """An experiment that cannot run: one line with the file, the key and what to do."""


@dataclass(frozen=True)
class Trial:
    """One method at one grid point with one seed.

    `swept` maps the short names of the swept values (as in `name`) to this trial's values.
    `config` is plain YAML: algorithm, config (its sections), model, seed, method, stop,
    checkpoint, evaluate, num_threads, max_failures and iteration_timeout.
    """

    name: str
    method: str
    seed: int
    swept: dict[str, Any]
    config: dict[str, Any]


@dataclass(frozen=True)
class Experiment:
    """A validated experiment. `resolved` is its YAML with every default, override and
    backend written out; written to a file, it loads as the same experiment."""

    name: str
    path: Path
    trials: list[Trial]
    resolved: dict[str, Any]
    checkpoint: dict[str, int]
    max_failures: int
    num_threads: int
    concurrency: int | str
    track: str


class _Problem(Exception):
    """What is wrong with one key; `_placed` adds where it stands."""

    def __init__(self, key: str | Sequence[str], message: str) -> None:
        self.key = key if isinstance(key, str) else ".".join(key)
        self.message = message


def load_experiment(
    path: str | Path,
    overrides: Sequence[str] = (),
    name: str | None = None,
    track: str | None = None,
) -> Experiment:
    """Read, override (`KEY=VALUE`, the value is YAML) and validate an experiment file.

    An override of `config.*` also wins over what a method sets at the same key. `name` and
    `track` replace the experiment's own. Raises ExperimentError; Ray is imported but never started.
    """
    path = Path(path)
    with _placed(path, "--set", overrides):
        raw = _read(path)
        for override in overrides:
            _override(raw, override)
        if name is not None:
            raw["name"] = name
        if track is not None:
            raw["track"] = track
        return _experiment(path, raw)


def extend_experiment(
    path: str | Path,
    iterations: int | None = None,
    additions: Sequence[str] = (),
    track: str | None = None,
) -> Experiment:
    """Read an experiment file and make it longer (`iterations`: its trials' new last one) or
    wider (`KEY=VALUES`: more seeds, as in seeds=6..11, or more values of a key that is swept).

    Every trial of the file is still one, under the same name. Values that are there already
    change nothing, so the same extension can be asked for again. `track` replaces the tracker.
    Raises ExperimentError.
    """
    path = Path(path)
    with _placed(path, "--add", additions):
        raw = _experiment(path, _read(path)).resolved
        for addition in additions:
            _add(path, raw, addition)
        if iterations is not None:
            if isinstance(raw["stop"]["training_iteration"], dict):
                key = "stop.training_iteration"
                raise _Problem(key, "is swept: the trials' names say when they end")
            raw["stop"]["training_iteration"] = iterations
        if track is not None:
            raw["track"] = track
        return _experiment(path, raw)


def planned_trials(path: str | Path) -> list[Trial]:
    """The trials of a results folder's experiment.yaml, without checking it again: that takes
    neither RLlib nor the environment. Raises ExperimentError where it is no experiment."""
    path = Path(path)
    with _placed(path, "", ()):
        resolved = _filled(_read(path))
        trials = _trials(resolved, check=False)
        if not all((path.parent / trial.name).is_dir() for trial in trials):
            # As they were called before names of columns of ours were kept out of theirs.
            older = _trials(resolved, check=False, taken=lambda name: False)
            if any((path.parent / t.name).is_dir() for t in older if t not in trials):
                return older
        return trials


@contextlib.contextmanager
def _placed(path: Path, option: str, settings: Sequence[str]) -> Iterator[None]:
    """Turn a problem into an ExperimentError that says where it stands: in the file, or in one
    of the `settings` (KEY=VALUE) of the command line."""
    try:
        yield
    except _Problem as problem:
        place = str(path)
        for key in (setting.partition("=")[0] for setting in settings):
            if f"{problem.key}.".startswith(f"{key}."):
                place = f"{path} with {option} {key}"
        where = f"{place}: {problem.key}" if problem.key else place
        raise ExperimentError(f"{where}: {problem.message}") from None
    except RecursionError:
        raise ExperimentError(f"{path}: a YAML alias contains itself") from None


def _filled(raw: dict[str, Any]) -> dict[str, Any]:
    """An experiment's sections with defaults in the place of those that are not there."""
    # Sections of helpers, to be repeated by aliases, are not among them.
    raw = {key: value for key, value in raw.items() if not str(key).startswith("x-")}
    _check_keys((), raw, KEYS, elsewhere=lambda: _places(raw.get("algorithm")))
    for key in ("name", "methods", "stop"):
        if raw.get(key) is None:
            raise _Problem(key, "missing")
    given = {key: value for key, value in raw.items() if value is not None}
    resolved: dict[str, Any] = copy.deepcopy({key: (DEFAULTS | given)[key] for key in KEYS})
    check_name("name", resolved["name"])
    for key in ("config", "methods", "stop", "checkpoint"):
        _check_type(key, resolved[key], dict)
    resolved["seeds"] = _range("seeds", resolved["seeds"])
    if not isinstance(resolved["seeds"], list):
        got = repr(given["seeds"])
        raise _Problem("seeds", f"expected a list, got {got}; write [0, 1, 2] or 0..2")
    for seed in resolved["seeds"]:
        _check_whole("seeds", seed, 0)
    _check_values("seeds", resolved["seeds"])
    if not resolved["methods"]:
        raise _Problem("methods", "empty; name at least one method")
    for method, entry in resolved["methods"].items():
        check_name(f"methods.{method}", method)
        _check_type(f"methods.{method}", entry, dict)
        _check_keys(("methods", method), entry, ("model", "config"))
        if entry.get("model") is None:
            raise _Problem(f"methods.{method}.model", "missing, as in model: {policy: gru}")
    return resolved


def _experiment(path: Path, raw: dict[str, Any]) -> Experiment:
    from sgrl.reinforce.rollout import MAX_SEED

    resolved = _filled(raw)
    resolved["checkpoint"] = DEFAULTS["checkpoint"] | resolved["checkpoint"]
    _check_keys(("checkpoint",), resolved["checkpoint"], DEFAULTS["checkpoint"])
    for key in ("every", "keep"):
        _check_whole(f"checkpoint.{key}", resolved["checkpoint"][key], 1)
    if resolved["evaluate"] is not None:
        _check_type("evaluate", resolved["evaluate"], dict)
        _check_keys(("evaluate",), resolved["evaluate"], EVALUATE)
        resolved["evaluate"] = EVALUATE | resolved["evaluate"]
        for key, value in resolved["evaluate"].items():
            _check_whole(f"evaluate.{key}", value, 1)
    _check_whole("max_failures", resolved["max_failures"], 0)
    timeout = resolved["iteration_timeout"]
    if timeout is not None:
        _check_type("iteration_timeout", timeout, float)
        _check_bounds(("iteration_timeout",), resolved, 0, 1e9, False)
    _check_whole("num_threads", resolved["num_threads"], 1)
    if resolved["concurrency"] != "auto":
        _check_whole("concurrency", resolved["concurrency"], 1, "auto or ")
    _check_known("track", "tracker", resolved["track"], TRACKERS)
    for seed in resolved["seeds"]:
        if seed >= MAX_SEED:
            raise _Problem("seeds", f"must be less than {MAX_SEED}, got {seed}")
    for method, entry in resolved["methods"].items():
        _resolve_model(method, entry, resolved["config"])
    _resolve_training(resolved)

    trials = _trials(resolved)
    _check_evaluate(resolved, trials)
    return Experiment(
        name=resolved["name"],
        path=path,
        trials=trials,
        resolved=resolved,
        checkpoint=resolved["checkpoint"],
        max_failures=resolved["max_failures"],
        num_threads=resolved["num_threads"],
        concurrency=resolved["concurrency"],
        track=resolved["track"],
    )


def _check_evaluate(resolved: dict[str, Any], trials: Sequence[Trial]) -> None:
    if resolved["evaluate"] is None:
        return
    every = resolved["evaluate"]["every"]
    shortest = min(trial.config["stop"]["training_iteration"] for trial in trials)
    if every > shortest:
        raise _Problem(
            "evaluate.every",
            f"must be at most {shortest}, the trials' number of iterations, got {every}",
        )


# Reading and writing ------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """YAML 1.2's scalars: 1e-3 is a number, 017 is 17, and 1:30 and 2024-01-01 are text. (YAML
    1.1, PyYAML's own, has them as text, 15, 90 and a date.) A key given twice, of which PyYAML
    would silently keep the last, is refused."""

    yaml_implicit_resolvers: dict[str, list[Any]] = {}

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    problem = f"key '{key.value}' is given twice"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                seen.add(key.value)
                if key.tag == _UNCERTAIN:
                    key.tag = "tag:yaml.org,2002:str"
        return node

    def construct_whole_number(self, node: yaml.ScalarNode) -> int:
        text = self.construct_scalar(node).replace("_", "")
        digits = text.lstrip("+-")
        base = {"0o": 8, "0x": 16}.get(digits[:2], 10)
        return int(text, base)

    def construct_uncertain(self, node: yaml.ScalarNode) -> str:
        value = self.construct_scalar(node)
        problem = f"{value} is true or false to some and a word to others: write true or false, or"
        raise yaml.constructor.ConstructorError(
            None, None, f"{problem} '{value}' in quotes for the word", node.start_mark
        )


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes whatever YAML 1.1 or 1.2 would read as other than text, and writes
    every value out where it stands."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


# Words that YAML 1.1 reads as true or false, and 1.2 as text.
_UNCERTAIN = "tag:uncertain"
for _tag, _pattern, _first in (
    ("tag:yaml.org,2002:null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    (_UNCERTAIN, r"(?i:yes|no|on|off)", list("yYnNoO")),
    (
        "tag:yaml.org,2002:int",
        r"[-+]?[0-9][0-9_]*|0o[0-7]+|0x[0-9a-fA-F]+",
        list("-+0123456789"),
    ),
    (
        "tag:yaml.org,2002:float",
        r"[-+]?([0-9][0-9_]*\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+|[-+]?([0-9][0-9_]*\.[0-9]*|\.[0-9]+)"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    ("tag:yaml.org,2002:merge", r"<<", ["<"]),
):
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_tag, re.compile(rf"(?:{_pattern})$"), _first)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_whole_number)
_Loader.add_constructor(_UNCERTAIN, _Loader.construct_uncertain)


def dump_yaml(content: Mapping[str, Any]) -> str:
    """YAML that `load_experiment` reads back as the same content, without anchors."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False)


def _unshared(value: Any) -> Any:
    """A copy in which every alias is a value of its own, as it reads: to override one is not to
    write through to the others. Raises RecursionError where one contains itself."""
    if isinstance(value, dict):
        return {key: _unshared(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_unshared(item) for item in value]
    return value


def _parse(text: str, key: str = "") -> Any:
    try:
        # _Loader is a SafeLoader.
        return _unshared(yaml.load(text, _Loader))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = "" if mark is None or key else f"line {mark.line + 1}: "
        raise _Problem(key, f"{line}{error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise _Problem(key, f"not YAML: {str(error).splitlines()[0]}") from None


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        found = [str(other) for other in path.parent.glob("*.yaml")]
        hint = f"; did you mean {nearest(str(path), found)}?" if found else ""
        raise _Problem("", f"no such file{hint}") from None
    except UnicodeDecodeError:
        raise _Problem("", "not a text file") from None
    except OSError as error:
        raise _Problem("", f"cannot be read: {error.strerror}") from None
    raw = _parse(text)
    if raw is None:
        raise _Problem("", "empty; tune_configs/quickstart.yaml is an example to start from")
    if not isinstance(raw, dict):
        raise _Problem("", "not an experiment: expected 'key: value' lines")
    return raw


def _override(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    path = key.split(".")
    if not equals or not all(path):
        raise _Problem("", f"--set {override}: expected KEY=VALUE, as in config.training.lr=1e-3")
    if key.startswith("x-"):
        raise _Problem(key, "only helps to write the file: set the keys that repeat it")
    value = _parse(text, key)
    if value is None and text.strip() not in ("null", "~"):
        raise _Problem(key, "no value given")
    parent = raw
    for depth, step in enumerate(path[:-1], 1):
        if parent.get(step) is None:
            parent[step] = {}
        parent = parent[step]
        if not isinstance(parent, dict) or "grid" in parent:
            raise _Problem(key, f"{'.'.join(path[:depth])} holds no keys; set it as a whole")
    parent[path[-1]] = value

    if path[0] == "config" and isinstance(raw.get("methods"), dict):
        for method, entry in raw["methods"].items():
            _forget(entry, path, f"methods.{method}")


def _forget(entry: Any, path: Sequence[str], where: str) -> None:
    """Drop what a method sets at an overridden key."""
    for depth, step in enumerate(path):
        if not isinstance(entry, dict):
            return
        if "grid" in entry:
            key = ".".join([where, *path[:depth]])
            raise _Problem(path, f"{key} is a grid; set that key instead")
        if depth == len(path) - 1:
            entry.pop(step, None)
        entry = entry.get(step)


def _add(path: Path, raw: dict[str, Any], addition: str) -> None:
    """Add the values of `KEY=VALUES` to the seeds, or to the grid at that key."""
    key, equals, text = addition.partition("=")
    if not equals or not key:
        raise _Problem("", f"--add {addition}: expected KEY=VALUES, as in seeds=6..11")
    values = _range(key, _parse(text, key))
    if values is None or values == []:
        raise _Problem(key, "no value given")

    there = raw["seeds"] if key == "seeds" else _grid_at(path, raw, key)
    # A list beside values that are lists, such as maze_dims, is one of them.
    one = not isinstance(values, list) or (
        isinstance(there[0], list) and not isinstance(values[0], list)
    )
    there += [value for value in ([values] if one else values) if value not in there]


def _range(key: str, value: Any) -> Any:
    """The whole numbers of a range, as in 6..11; any other value as it is."""
    span = re.fullmatch(r"(\d+)\.\.(\d+)", value.strip()) if isinstance(value, str) else None
    if span is None:
        return value
    first, last = map(int, span.groups())
    if not first <= last < first + MAX_RANGE:
        raise _Problem(
            key,
            f"{value.strip()} is no range: the lower number comes first, and there are at most "
            f"{MAX_RANGE} values",
        )
    return list(range(first, last + 1))


def _grid_at(path: Path, raw: dict[str, Any], key: str) -> list[Any]:
    """The values that are swept at a key of the file."""
    steps = tuple(key.split("."))
    roots = {root: raw[root] for root in ("config", "methods", "stop")}
    grids = dict(_grids((), roots))
    if steps not in grids:
        others = "".join(f", {'.'.join(grid)}" for grid in grids)
        # Its value would have to enter the names of trials that are there already.
        raise _Problem(
            key,
            f"not swept here (seeds{others} can be added to); compare other values in another "
            f"sweep: {command('sgrl', 'sweep', path, '--name', 'NAME', '--set', f'{key}=VALUE')}",
        )
    if steps[0] == "config" and all(_place(raw, m, key) != key for m in raw["methods"]):
        raise _Problem(key, f"every method sets this itself: add to methods.NAME.{key}")
    return grids[steps]


# Checks of single values ----------------------------------------------------------------------


def check_name(key: str, name: Any) -> None:
    """Names become folders, so only letters, digits and ``_ . + -``."""
    if not isinstance(name, str):
        quotes = f": put it in quotes, as in '{name}'" if isinstance(name, int | float) else ""
        raise _Problem(key, f"{name!r} is no safe name, which is text{quotes}")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,99}", name):
        rule = "start with a letter or digit and hold only letters, digits, '_', '.', '+', '-'"
        raise _Problem(key, f"{name!r} is no safe name: it must {rule}")


def _check_known(key: str | Sequence[str], kind: str, name: Any, names: Iterable[str]) -> None:
    names = list(names)
    if not isinstance(name, str):
        raise _Problem(key, f"expected the {kind}'s name, got {name!r}")
    if name not in names:
        raise _Problem(key, f"unknown {kind} {name!r}; did you mean {nearest(name, names)!r}?")


def _check_keys(
    path: Sequence[str],
    mapping: Mapping[Any, Any],
    names: Iterable[str],
    kind: str = "key",
    elsewhere: Callable[[], Mapping[str, str]] = dict,
) -> None:
    """Refuse keys that are not among the names. `elsewhere` gives the places of others that may
    have been meant."""
    names = list(names)
    for key in mapping:
        if not isinstance(key, str):
            raise _Problem([*path, str(key)], "keys must be text; put it in quotes")
        if key not in names:
            meant = ALIASES.get(key, key)
            if meant not in names:
                meant = elsewhere().get(meant) or nearest(key, names)
            raise _Problem([*path, key], f"unknown {kind}; did you mean {meant!r}?")


def _check_values(key: str | Sequence[str], values: list[Any]) -> None:
    if not values:
        raise _Problem(key, "empty list; give at least one value")
    for index, value in enumerate(values):
        if value in values[:index]:
            raise _Problem(key, f"{value!r} is given twice")


def _check_whole(key: str, value: Any, low: int, alternative: str = "") -> None:
    if not _accepts(int, value):
        raise _Problem(key, f"expected {alternative}a whole number, got {value!r}")
    if value < low:
        raise _Problem(key, f"must be at least {low}, got {value}")


def _check_type(key: str | Sequence[str], value: Any, annotation: Any) -> None:
    if not _accepts(annotation, value):
        raise _Problem(key, f"expected {_in_words(annotation)}, got {value!r}")


def _accepts(annotation: Any, value: Any) -> bool:
    """Whether a YAML value fits a type annotation (True where the annotation is no help)."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return any(_accepts(argument, value) for argument in arguments)
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
        if not isinstance(value, list):
            return False
        if kind is tuple and Ellipsis not in arguments:
            return len(value) == len(items) and all(map(_accepts, items, value))
        return not items or all(_accepts(items[0], item) for item in value)
    # YAML holds no classes and no functions.
    return kind not in (type, Callable)


def _in_words(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        words = [_in_words(a) for a in arguments if a is not types.NoneType]
        return " or ".join(dict.fromkeys(words))
    if origin is typing.Literal:
        return " or ".join(repr(argument) for argument in arguments)
    plain = {float: "a number", int: "a whole number", bool: "true or false", str: "text"}
    plain |= {dict: "a mapping of keys to values", list: "a list", tuple: "a list"}
    return plain.get(origin or annotation, "something a YAML file cannot hold")


# Models ---------------------------------------------------------------------------------------


def _resolve_model(method: str, entry: dict[str, Any], config: Any) -> None:
    """Write into a method's model what it leaves to defaults, and the backend that `auto` stands
    for: a resumed sweep computes with what it was started with."""
    from sgrl.nn.registry import POLICIES

    key = f"methods.{method}.model"
    model = entry["model"]
    _check_type(key, model, dict)
    if "policy" not in model:
        if "grid" in model:
            raise _Problem(key, ONE_POLICY)
        raise _Problem(f"{key}.policy", f"missing; one of {', '.join(POLICIES)}")
    if isinstance(model["policy"], dict):
        raise _Problem(f"{key}.policy", f"expected the policy's name: {ONE_POLICY}")
    _check_known(f"{key}.policy", "policy", model["policy"], POLICIES)
    entry["model"] = model = with_defaults(model)
    backend, configs = model.get("backend"), (config, entry.get("config"))
    if backend == "auto":
        model["backend"] = _automatic_backend(model, configs)
    elif isinstance(backend, dict) and isinstance(backend.get("grid"), list):
        backend["grid"] = [
            _automatic_backend(model, configs) if b == "auto" else b for b in backend["grid"]
        ]


def _automatic_backend(model: Mapping[str, Any], configs: Iterable[Any]) -> str:
    """What `backend: auto` stands for in a model; "auto" itself where only a trial can tell."""
    from sgrl.nn.kernels.backends import resolve_backend
    from sgrl.nn.registry import POLICIES

    # On GPUs not what a runner on a CPU does; and compiled code may not know what is new in a
    # policy from elsewhere.
    if any(map(_asks_for_gpus, configs)) or not POLICIES[model["policy"]].__module__.startswith(
        "sgrl.nn."
    ):
        return "auto"
    return resolve_backend("auto", compiled=not model.get("shuffle_predictions"))


def _asks_for_gpus(config: Any) -> bool:
    """Whether the sections of a configuration put runners or learners on GPUs (or sweep that)."""
    keys = {"learners": "num_gpus_per_learner", "env_runners": "num_gpus_per_env_runner"}
    sections = config if isinstance(config, dict) else {}
    return any(
        isinstance(sections.get(section), dict) and sections[section].get(key)
        for section, key in keys.items()
    )


def with_defaults(model: Mapping[str, Any]) -> dict[str, Any]:
    """A method's model with the settings that it leaves to its policy's defaults."""
    from sgrl.nn.registry import POLICIES

    fields = dataclasses.fields(POLICIES[model["policy"]].Settings)
    defaults = {field.name: field.default for field in fields}
    del defaults["value_head"]  # it depends on the algorithm
    return {**model, **{name: defaults[name] for name in defaults if name not in model}}


def _resolve_training(resolved: dict[str, Any]) -> None:
    """Write into config.training what the experiment leaves to Reinforce's defaults."""
    training = resolved["config"].setdefault("training", {})
    if resolved["algorithm"] != "Reinforce" or not isinstance(training, dict):
        return
    defaults = algorithm_class("Reinforce").get_default_config()
    if "grid" not in training:
        for name in TRAINING:
            training.setdefault(name, getattr(defaults, name))


def _check_model(model: dict[str, Any]) -> None:
    from sgrl.rllib.module import policy_arguments

    try:
        policy_arguments(model)
    except (ValueError, TypeError) as error:
        raise _Problem("model", _one_line(error)) from None


# Trials ---------------------------------------------------------------------------------------


def _trials(
    resolved: dict[str, Any], *, check: bool = True, taken: Callable[[str], bool] = is_taken
) -> list[Trial]:
    """All trials. Names of swept values that are `taken` get longer."""
    merged = {
        method: {
            "config": _merge(resolved["config"], entry.get("config") or {}),
            "model": entry["model"],
            "stop": resolved["stop"],
        }
        for method, entry in resolved["methods"].items()
    }
    grids = {method: dict(_grids((), tree)) for method, tree in merged.items()}
    for method, grid in grids.items():
        for path, values in grid.items():
            key = _place(resolved, method, ".".join(path))
            _check_type([key, "grid"], values, list)
            _check_values([key, "grid"], values)
    paths = dict.fromkeys(path for grid in grids.values() for path in grid)
    short = _short_names(paths, taken)

    trials: list[Trial] = []
    for method, grid in grids.items():
        for values in itertools.product(*grid.values()):
            point = copy.deepcopy(merged[method])
            for path, value in zip(grid, values, strict=True):
                _assign(point, path, copy.deepcopy(value))
            try:
                if check:
                    _check_point(resolved["algorithm"], point)
                elif "training_iteration" not in point["stop"]:
                    raise _Problem("stop.training_iteration", "missing")
            except _Problem as problem:
                key = _place(resolved, method, problem.key)
                raise _Problem(key, problem.message) from None
            swept = {short[path]: value for path, value in zip(grid, values, strict=True)}
            for seed in resolved["seeds"]:
                labels = [f"{name}={_label(value)}" for name, value in swept.items()]
                trials.append(
                    Trial(
                        name="_".join([method, *labels, f"seed={seed}"]),
                        method=method,
                        seed=seed,
                        swept=swept,
                        config={
                            "algorithm": resolved["algorithm"],
                            "method": method,
                            "seed": seed,
                            **copy.deepcopy(point),
                            "checkpoint": resolved["checkpoint"],
                            "evaluate": resolved["evaluate"],
                            "num_threads": resolved["num_threads"],
                            "max_failures": resolved["max_failures"],
                            "iteration_timeout": resolved["iteration_timeout"],
                        },
                    )
                )
    names: set[str] = set()
    for name in (trial.name for trial in trials):
        if name in names:
            raise _Problem("methods", f"two trials would share the folder {name!r}")
        names.add(name)
        if len(name) > 200:
            raise _Problem("methods", f"the trial name {name[:40]!r}... is too long for a folder")
    return trials


def _merge(base: Any, over: Any) -> Any:
    mappings = isinstance(base, dict) and isinstance(over, dict)
    if not mappings or "grid" in base or "grid" in over:
        return copy.deepcopy(over)
    merged = {key: _merge(base[key], over[key]) if key in over else base[key] for key in base}
    return copy.deepcopy(merged | {key: over[key] for key in over if key not in base})


def _grids(path: tuple[str, ...], tree: Any) -> Iterable[tuple[tuple[str, ...], Any]]:
    if isinstance(tree, dict):
        if "grid" in tree:
            _check_keys(path, tree, ("grid",))
            yield path, tree["grid"]
        else:
            for key, value in tree.items():
                yield from _grids((*path, str(key)), value)


def _assign(tree: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for step in path[:-1]:
        tree = tree[step]
    tree[path[-1]] = value


def _place(resolved: dict[str, Any], method: str, key: str) -> str:
    """The key as it stands in the file: a method's own, or the experiment's."""
    path = key.split(".")
    if path[0] == "model":
        return f"methods.{method}.{key}"
    tree = resolved["methods"][method]
    for step in path:
        if not isinstance(tree, dict) or step not in tree:
            return key
        tree = tree[step]
    return f"methods.{method}.{key}"


def _short_names(
    paths: Iterable[tuple[str, ...]], taken: Callable[[str], bool]
) -> dict[tuple[str, ...], str]:
    """The last step of each path, with as many steps before it as tell it from all others, and
    from what is taken."""
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


def _label(value: Any) -> str:
    if isinstance(value, dict):
        return "+".join(f"{key}={_label(item)}" for key, item in value.items())
    if isinstance(value, list):
        return "x".join(_label(item) for item in value)
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return re.sub(r"[^A-Za-z0-9_.+=-]", "-", text)


# The algorithm's configuration ----------------------------------------------------------------


def algorithm_class(name: str) -> Any:
    """The Algorithm subclass of that name: Reinforce, or one of `sgrl.rllib.stock`."""
    from ray.rllib.algorithms.registry import ALGORITHMS

    from sgrl.rllib.algorithm import Reinforce
    from sgrl.rllib.stock import STOCK_ALGORITHMS

    # RLlib greets every stock configuration with a warning about its new API stack.
    logging.getLogger("ray.rllib").setLevel(logging.ERROR)

    known: dict[str, Any] = {"Reinforce": Reinforce, **STOCK_ALGORITHMS}
    _check_known("algorithm", "algorithm", name, [*known, *ALGORITHMS])
    if name not in known:
        raise _Problem(
            "algorithm", f"{name} does not train these policies here; use {', '.join(known)}"
        )
    return known[name]


def build_algorithm_config(trial_config: Mapping[str, Any]) -> Any:
    """The AlgorithmConfig of one trial (`Trial.config`), with the policy's RLModule in place.

    Algorithms other than Reinforce get a policy with a value head unless its settings say no.
    """
    from sgrl.rllib import register_environment

    config = algorithm_class(trial_config["algorithm"]).get_default_config()
    # A trial holds as many CPUs as it computes with.
    config.resources(num_cpus_for_main_process=trial_config["num_threads"])
    for section, arguments in trial_config["config"].items():
        getattr(config, section)(**arguments)
    if trial_config["algorithm"] != "Reinforce":
        register_environment(config.env)
    config.rl_module(model_config=dict(trial_config["model"]))
    return config.debugging(seed=trial_config["seed"])


def user_modules(experiment: Experiment) -> list[str]:
    """The modules of the user's that the experiment's environments come from."""
    from sgrl.envs.by_id import module_of

    envs = (trial.config["config"]["environment"]["env"] for trial in experiment.trials)
    return [module for module in dict.fromkeys(map(module_of, envs)) if module is not None]


def required_resources(trial: Trial) -> dict[str, float]:
    """What one trial holds while it runs, summed over its processes, as in
    ``{"CPU": 1.0, "GPU": 0.0}`` (and any custom resource)."""
    algorithm = algorithm_class(trial.config["algorithm"])
    request = algorithm.default_resource_request(build_algorithm_config(trial.config))
    total = {"CPU": 0.0, "GPU": 0.0}
    for bundle in request.bundles:
        for resource, amount in bundle.items():
            total[resource] = total.get(resource, 0.0) + amount
    return total


def check_resources(
    experiment: Experiment, available: Mapping[str, float], resuming: bool = False
) -> None:
    """Raise ExperimentError if some trial alone asks for more than is available (which Ray
    would answer by waiting for ever)."""
    for trial in experiment.trials:
        for resource, needed in required_resources(trial).items():
            present = available.get(resource, 0.0)
            if needed > present:
                advice = (
                    "lower num_threads, or num_env_runners, num_learners or "
                    f"num_{resource.lower()}s_per_... under config.env_runners and config.learners"
                )
                if resuming:
                    advice = "resume it where there are as many (--address joins a cluster)"
                    lower = _processes(trial.config) | {"num_env_runners": 0, "num_learners": 0}
                    if lower != _processes(trial.config) and may_move(
                        trial.config, _with_processes(trial.config, lower)
                    ):
                        advice += ", or set num_env_runners and num_learners to 0 in that file"
                raise ExperimentError(
                    f"{experiment.path}: trial {trial.name} needs {needed:g} {resource}s and there "
                    f"are {present:g}; {advice}"
                )


def _processes(trial_config: Mapping[str, Any]) -> dict[str, Any]:
    """Where a trial computes, by the keys of `PROCESSES`."""
    defaults = algorithm_class(trial_config["algorithm"]).get_default_config()
    return {
        key: trial_config["config"].get(section, {}).get(key, getattr(defaults, key))
        for key, section in PROCESSES.items()
    }


def _with_processes(
    trial_config: Mapping[str, Any], processes: Mapping[str, Any]
) -> dict[str, Any]:
    config = copy.deepcopy(trial_config["config"])
    for key, section in PROCESSES.items():
        config.setdefault(section, {})[key] = processes[key]
    return {**trial_config, "config": config}


def may_move(before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    """Whether a trial may go on with another `config`: only its processes are others, and the
    environments that each runner of `Reinforce` holds stay what they are."""
    runners, learners = (
        [_processes(trial)[key] for trial in (before, after)]
        for key in ("num_env_runners", "num_learners")
    )
    if before["algorithm"] == "Reinforce" and runners[0] != runners[1] and max(runners) > 1:
        return False
    same = _with_processes(before, _processes(after))["config"]
    return max(learners) <= 1 and same == _with_processes(after, _processes(after))["config"]


def check_backends(experiment: Experiment) -> None:
    """Raise ExperimentError if a trial names compiled code where that cannot run: without a
    compiler on this machine, or on GPUs."""
    from sgrl.nn.kernels import native
    from sgrl.rllib.module import DTYPES

    for trial in experiment.trials:
        model = trial.config["model"]
        if model.get("backend") != "native":
            continue
        reason = native.unavailable(DTYPES[model.get("dtype", "float32")])
        if _asks_for_gpus(trial.config["config"]):
            reason = "it runs on CPUs, and the trial asks for GPUs; leave it at auto"
        if reason is not None:
            raise ExperimentError(
                f"{experiment.path}: backend native of trial {trial.name} cannot run: {reason}"
            )


def _check_point(algorithm: str, point: dict[str, Any]) -> None:
    """Validate one grid point of one method: {"config", "model", "stop"}."""
    config_class = type(algorithm_class(algorithm).get_default_config())
    _check_keys(("stop",), point["stop"], ("training_iteration",))
    if "training_iteration" not in point["stop"]:
        raise _Problem("stop.training_iteration", "missing")
    _check_type("stop.training_iteration", point["stop"]["training_iteration"], int)
    _check_model(point["model"])
    _check_sections(config_class, point["config"])
    for path, bounds in BOUNDS.items():
        _check_bounds(path, point, *bounds)
    _check_environment(point["config"])
    _check_observations(point)
    trial_config = {"algorithm": algorithm, "seed": 0, "num_threads": 1, **point}
    try:
        build_algorithm_config(trial_config).validate()
    except (ValueError, TypeError, KeyError, AttributeError, NotImplementedError) as error:
        raise _Problem("config", _one_line(error)) from None


def _sections(config_class: type) -> list[str]:
    """Methods that return the configuration itself and take only optional arguments."""
    names = []
    for name, function in inspect.getmembers(config_class, inspect.isfunction):
        parameters = inspect.signature(function).parameters.values()
        if not name.startswith("_") and any(
            type(parameter.default).__name__ == "_NotProvided" for parameter in parameters
        ):
            names.append(name)
    return names


def _section_arguments(config_class: type, section: str) -> dict[str, Any]:
    """Keyword arguments and their annotations: a subclass's `training(**kwargs)` takes its
    base's too. RLlib's retired arguments are the ones without annotation."""
    arguments: dict[str, Any] = {}
    for base in config_class.__mro__:
        function = vars(base).get(section)
        if function is None:
            continue
        try:
            signature = inspect.signature(function, eval_str=True)
        except NameError:
            signature = inspect.signature(function)
        for name, parameter in signature.parameters.items():
            if parameter.annotation is not parameter.empty:
                arguments.setdefault(name, parameter.annotation)
    if arguments.get("entropy_coeff") == float | None:
        # RLlib's PPO annotates it as a number and takes schedules, as it does for lr.
        arguments["entropy_coeff"] = arguments["lr"]
    return {name: kind for name, kind in arguments.items() if name not in ("self", "kwargs")}


def _places(algorithm: Any) -> dict[str, str]:
    """As `_places_in`, of the algorithm of that name, or of Reinforce where there is none."""
    try:
        found = algorithm_class(algorithm)
    except _Problem:
        found = algorithm_class("Reinforce")
    return _places_in(type(found.get_default_config()))


def _places_in(config_class: type) -> dict[str, str]:
    """Where in an experiment each argument of an algorithm's configuration stands."""
    order = ["environment", "env_runners", "training", "learners"]
    sections = _sections(config_class)
    others = [section for section in sections if section not in (*order, "api_stack")]
    places: dict[str, str] = {}
    for section in [*order, *others]:
        for name in _section_arguments(config_class, section):
            places.setdefault(name, f"config.{section}.{name}")
    return places


def _check_sections(config_class: type, sections: dict[str, Any]) -> None:
    _check_type("config", sections, dict)
    if "api_stack" in sections:
        raise _Problem("config.api_stack", "experiments run on RLlib's new API stack")
    _check_keys(
        ("config",),
        sections,
        _sections(config_class),
        "section",
        lambda: _places_in(config_class),
    )
    for section, given in sections.items():
        _check_type(("config", section), given, dict)
        arguments = _section_arguments(config_class, section)
        _check_keys(
            ("config", section), given, arguments, elsewhere=lambda: _places_in(config_class)
        )
        if section == "rl_module":
            raise _Problem("config.rl_module", "the model belongs under methods.<name>.model")
        if section == "debugging" and "seed" in given:
            raise _Problem("config.debugging.seed", "seeds belong under 'seeds'")
        for key, value in given.items():
            kind = arguments[key]
            if key.startswith("num_cpus"):
                # RLlib annotates these as whole numbers and takes fractions.
                kind = float | str if "str" in str(kind) else float
            _check_type(("config", section, key), value, kind)


def _check_bounds(
    path: tuple[str, ...], tree: Any, low: float, high: float, low_allowed: bool
) -> None:
    for step in path:
        if not isinstance(tree, dict) or step not in tree:
            return
        tree = tree[step]
    if not _accepts(float, tree):
        return
    if not math.isfinite(tree) or not (low <= tree <= high) or (tree == low and not low_allowed):
        least = f"at least {low:g}" if low_allowed else f"greater than {low:g}"
        most = "" if high == math.inf else f" and at most {high:g}"
        raise _Problem(path, f"must be {least}{most}, got {tree}")


def _check_environment(sections: dict[str, Any]) -> None:
    from sgrl.envs.by_id import is_known, known_ids, unknown_of_module
    from sgrl.envs.registry import ENVIRONMENTS, validate_env_config
    from sgrl.user_code import UserCodeError

    section = sections.get("environment", {})
    key = "config.environment.env"
    if section.get("env") is None:
        ids = "or an id of gymnasium, as in CartPole-v1 or popgym-RepeatPreviousEasy-v0"
        raise _Problem(key, f"missing; one of {', '.join(ENVIRONMENTS)}, {ids}")
    env = section["env"]
    try:
        known = is_known(env)
    except UserCodeError as error:
        raise _Problem(key, str(error)) from None
    if not known:
        missing = unknown_of_module(env)
        if missing is not None:
            raise _Problem(key, missing)
        _check_known(key, "environment", env, [*ENVIRONMENTS, *known_ids()])
    try:
        validate_env_config(env, section.get("env_config") or {})
    except ValueError as error:
        raise _Problem("config.environment.env_config", _one_line(error)) from None


def _check_observations(point: dict[str, Any]) -> None:
    """Whether the policy can read what the environment shows."""
    from sgrl.envs.registry import observation_size
    from sgrl.nn.registry import policy_settings
    from sgrl.rllib.module import policy_arguments

    section = point["config"]["environment"]
    arguments = policy_arguments(point["model"])
    settings = {key: arguments[key] for key in arguments if key not in ("name", "seed", "dtype")}
    try:
        policy_settings(arguments["name"], settings).check_observations(
            observation_size(section["env"], section.get("env_config"))
        )
    except ValueError as error:
        raise _Problem("model", _one_line(error)) from None


def _one_line(error: Exception) -> str:
    # RLlib's advice at the end is to check nothing.
    return " ".join(str(error).split()).partition(" To suppress all validation errors")[0]
