"""Trials: which ones an experiment plans, and what each is trained with.

    for trial in planned_trials("results/quickstart/experiment.yaml"):
        trial.name, trial.swept, trial.config.stop.training_iteration

This needs neither RLlib nor pydantic nor the environment, and checks no more than it needs;
`sgrl.tuning.experiment` checks everything, before a sweep starts.
"""

import copy
import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from sgrl.errors import UserError
from sgrl.files import read_json
from sgrl.names import did_you_mean, nearest
from sgrl.results.folder import SweepFolder
from sgrl.results.grids import (
    distributions_in,
    grids_in,
    is_open,
    label,
    place_of,
    put,
    repeated,
    short_names,
)
from sgrl.results.metrics import is_taken
from sgrl.yaml_files import YAMLFileError, parse_yaml

#: Values of a range such as 0..9, at most.
MAX_RANGE = 100_000


class Problem(ValueError):
    """What is wrong with one key of an experiment.

    Attributes:
        key: where it stands, as in config.training.lr; empty for the file as a whole.
        message: what is wrong and what to do.
    """

    def __init__(self, key: str | Sequence[str], message: str) -> None:
        super().__init__(message)
        self.key = key if isinstance(key, str) else ".".join(key)
        self.message = message


class ExperimentError(UserError):
    """An experiment cannot run; one line for each problem, with the file, the key and what to do.

    Args:
        path: the experiment file.
        problems: what is wrong, at least one.
        changed: what of the command line changed the experiment, by the key that it changed, as in
            ``{"seeds": "--seeds"}``; a problem with such a key is said to stand there.
    """

    def __init__(
        self, path: Path, problems: Iterable[Problem], changed: Mapping[str, str] | None = None
    ) -> None:
        lines = []
        for problem in problems:
            place = [
                f" with {option}"
                for key, option in (changed or {}).items()
                if f"{problem.key}.".startswith(f"{key}.")
            ]
            where = f"{path}{''.join(place[-1:])}: " + (f"{problem.key}: " if problem.key else "")
            lines.append(where + problem.message)
        super().__init__("\n".join(dict.fromkeys(lines)))


# What a trial is ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stop:
    """When a trial is complete: after the first iteration at which any of these is so.

    Attributes:
        training_iteration: its last iteration; 0 where something else ends it.
        env_steps: so many have been taken.
        episode_return_mean: the iteration's was at least this.
        hours: its iterations have taken so many.
    """

    training_iteration: int = 0
    env_steps: int | None = None
    episode_return_mean: float | None = None
    hours: float | None = None

    def reached(self, rows: Sequence[Mapping[str, float]]) -> str:
        """What makes a trial complete before its last iteration, in words; "" where nothing does.

        Args:
            rows: of its metrics.csv, which is all that this depends on: resumed or not, a trial
                ends at the same row.
        """
        if not rows:
            return ""
        for name in ("env_steps", "episode_return_mean"):
            least, value = getattr(self, name), rows[-1].get(name, math.nan)
            if least is not None and value >= least:
                return f"{name} {value:,.6g} (at least {least:,.6g})"
        if self.hours is None:
            return ""
        hours = sum(row["iteration_seconds"] for row in rows) / 3600
        if hours >= self.hours:
            return f"{hours:.3g} hours (at least {self.hours:.3g})"
        return ""


@dataclass(frozen=True)
class Checkpointing:
    """How often a trial is saved.

    Attributes:
        every: iterations between two checkpoints.
        keep: how many of the newest ones stay.
    """

    every: int = 25
    keep: int = 2


@dataclass(frozen=True)
class Evaluating:
    """Evaluations apart from training.

    Attributes:
        every: iterations between two evaluations.
        episodes: of each.
    """

    every: int = 10
    episodes: int = 100


@dataclass(frozen=True)
class TrialConfig:
    """What one trial is trained with.

    Attributes:
        algorithm: Reinforce, or one of RLlib's.
        method: the one of the experiment's methods that it belongs to.
        seed: of everything random in it.
        sections: methods of RLlib's AlgorithmConfig and their arguments, as in
            ``{"training": {"lr": 1e-3}}``; `config` in YAML.
        model: the policy's name and settings.
        stop: when it is complete.
        checkpoint: how often it is saved.
        evaluate: how often it is evaluated apart from training, if at all.
        num_threads: torch threads.
        max_failures: restarts without a new checkpoint in between.
        iteration_timeout: seconds after which an iteration counts as hung; None is any.
        callbacks: what of the user's own follows it, as in my_package:MyCallbacks, if anything.
        pack: how many such trials are trained as one, or auto; None: each by itself.
    """

    algorithm: str
    method: str
    seed: int
    sections: dict[str, dict[str, Any]]
    model: dict[str, Any]
    stop: Stop
    checkpoint: Checkpointing = Checkpointing()
    evaluate: Evaluating | None = None
    num_threads: int = 1
    max_failures: int = 2
    iteration_timeout: float | None = None
    callbacks: str | None = None
    pack: int | str | None = None

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "TrialConfig":
        """Return the content of a config.yaml; what an older version lacks is at its default."""
        known = {field.name for field in dataclasses.fields(cls)}
        given = {k: copy.deepcopy(v) for k, v in content.items() if k in known and v is not None}
        kinds = {"stop": Stop, "checkpoint": Checkpointing, "evaluate": Evaluating}
        given |= {key: kind(**given[key]) for key, kind in kinds.items() if key in given}
        return cls(sections=copy.deepcopy(content["config"]), **given)

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain YAML holds it."""
        content = dataclasses.asdict(self)
        content["stop"] = {key: v for key, v in content["stop"].items() if v is not None}
        if self.pack is None:
            del content["pack"]
        return {"config" if key == "sections" else key: content[key] for key in content}


@dataclass(frozen=True)
class Trial:
    """One method at one grid point with one seed.

    Attributes:
        name: of its folder.
        swept: the swept values, by their short names (as in `name`).
        config: what it is trained with.
    """

    name: str
    swept: dict[str, Any]
    config: TrialConfig

    @property
    def method(self) -> str:
        """The method's name."""
        return self.config.method

    @property
    def seed(self) -> int:
        """The seed of everything random in it."""
        return self.config.seed

    @property
    def point(self) -> str:
        """The name of its point: trials that share it differ in nothing but their seeds."""
        return self.name.removesuffix(f"_seed={self.seed}")

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "Trial":
        """Return the trial that a config.yaml describes."""
        return cls(content["name"], content["swept"], TrialConfig.from_dict(content))

    def as_dict(self) -> dict[str, Any]:
        """Return what its config.yaml holds."""
        return {"name": self.name, "swept": self.swept, **self.config.as_dict()}


class Point(NamedTuple):
    """One method at one grid point.

    Attributes:
        method: its name.
        swept: the swept values, by their short names.
        content: its `config`, `model` and `stop`, without grids.
        searched: where a search puts values: the path to each, and its short name.
    """

    method: str
    swept: dict[str, Any]
    content: dict[str, Any]
    searched: dict[tuple[str, ...], str] = {}

    @property
    def name(self) -> str:
        """Method and swept values, as trials' names begin."""
        return "_".join([self.method, *(f"{name}={label(v)}" for name, v in self.swept.items())])

    def at(self, values: Mapping[str, Any]) -> "Point":
        """Return the point at suggested values, given by their keys such as config.training.lr."""
        content = copy.deepcopy(self.content)
        given = {path: copy.deepcopy(values[".".join(path)]) for path in self.searched}
        for path, value in given.items():
            put(content, path, value)
        swept = self.swept | {self.searched[path]: value for path, value in given.items()}
        return Point(self.method, swept, content)


# Reading --------------------------------------------------------------------------------------


def planned_trials(path: str | Path) -> list[Trial]:
    """Return the trials of a results folder's experiment.yaml, without checking it again.

    Raises:
        ExperimentError: it is no experiment.
    """
    path = Path(path)
    try:
        content = read_experiment(path)
        for key in ("name", "methods", "stop"):
            if content.get(key) is None:
                raise Problem(key, "missing")
        if not content["methods"]:
            raise Problem("methods", "empty; name at least one method")
        try:
            points = suggested_points(points_of(content), read_suggestions(path))
            trials = trials_of(content, points)
            if not all((path.parent / trial.name).is_dir() for trial in trials):
                # As they were called before names of columns of ours were kept out of theirs.
                older = trials_of(content, points_of(content, taken=lambda name: False))
                if any((path.parent / t.name).is_dir() for t in older if t not in trials):
                    return older
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise Problem("", f"not an experiment as sgrl writes it ({error})") from None
    except Problem as problem:
        raise ExperimentError(path, [problem]) from None
    return trials


def read_experiment(path: Path) -> dict[str, Any]:
    """Return the content of an experiment file as it stands there.

    Raises:
        Problem: it cannot be read, or holds no keys.
    """
    try:
        content = parse_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        found = [str(other) for other in path.parent.glob("*.yaml")]
        hint = f"; did you mean {nearest(path, found)}?" if found else ""
        hint = hint or "; sgrl list experiments shows those that sgrl brings along"
        raise Problem("", f"no such file{hint}") from None
    except UnicodeDecodeError:
        raise Problem("", "not a text file") from None
    except OSError as error:
        raise Problem("", f"cannot be read: {error.strerror}") from None
    except YAMLFileError as error:
        raise Problem("", f"line {error.line}: {error}" if error.line else str(error)) from None
    if content is None:
        raise Problem("", "empty; sgrl list experiments quickstart prints an example to start from")
    if not isinstance(content, dict):
        raise Problem("", "not an experiment: expected 'key: value' lines")
    # Sections of helpers hold what aliases repeat.
    return {key: value for key, value in content.items() if not str(key).startswith("x-")}


def expand_range(value: Any, key: str = "seeds") -> Any:
    """Return the whole numbers of a range such as 6..11; any other value as it is.

    Raises:
        Problem: the range is empty, or too long.
    """
    span = re.fullmatch(r"(\d+)\.\.(\d+)", value.strip()) if isinstance(value, str) else None
    if span is None:
        return value
    first, last = map(int, span.groups())
    if not first <= last < first + MAX_RANGE:
        raise Problem(
            key,
            f"{value.strip()} is no range: the lower number comes first, and there are at most "
            f"{MAX_RANGE} values",
        )
    return list(range(first, last + 1))


# From grids to trials -------------------------------------------------------------------------


def points_of(
    experiment: Mapping[str, Any], taken: Callable[[str], bool] = is_taken
) -> list[Point]:
    """Return every grid point of every method of an experiment.

    Args:
        experiment: the content of its file.
        taken: whether a name is one of our own columns; those of swept values then get longer.
    """
    merged = _merged(experiment)
    grids = {method: dict(grids_in(tree)) for method, tree in merged.items()}
    searched = {method: dict(distributions_in(tree)) for method, tree in merged.items()}
    open_ = [path for group in (grids, searched) for nodes in group.values() for path in nodes]
    short = short_names(dict.fromkeys(open_), taken)
    points = []
    for method, nodes in grids.items():
        lists = [n["grid"] if isinstance(n["grid"], list) else [n["grid"]] for n in nodes.values()]
        for values in itertools.product(*lists):
            content = copy.deepcopy(merged[method])
            for path, value in zip(nodes, values, strict=True):
                put(content, path, copy.deepcopy(value))
            swept = {short[path]: value for path, value in zip(nodes, values, strict=True)}
            own = {path: short[path] for path in searched[method]}
            points.append(Point(method, swept, content, own))
    return points


def suggested_points(
    points: Iterable[Point], suggestions: Mapping[str, Sequence[Mapping[str, Any]]]
) -> list[Point]:
    """Return the points at which a search has suggested to train.

    Args:
        points: those of the grids.
        suggestions: by the names of points, values by their keys. The same values are one point.
    """
    found: dict[str, Point] = {}
    for point in points:
        for values in suggestions.get(point.name, ()) if point.searched else ({},):
            suggested = point.at(values)
            found.setdefault(suggested.name, suggested)
    return list(found.values())


def read_suggestions(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Return what a search has suggested so far in the folder of an experiment.yaml."""
    record = read_json(SweepFolder(path.parent).rounds)
    return record.get("suggestions", {}) if isinstance(record, dict) else {}


def trials_of(experiment: Mapping[str, Any], points: Iterable[Point]) -> list[Trial]:
    """Return the trials at the points, one for each seed."""
    trials = []
    for point in points:
        for seed in expand_range(experiment.get("seeds", [0])):
            own = {"method": point.method, "seed": seed, **point.content}
            config = TrialConfig.from_dict({"algorithm": "Reinforce", **experiment, **own})
            trials.append(Trial(f"{point.name}_seed={seed}", point.swept, config))
    return trials


def grid_problems(experiment: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield what is wrong with the grids of an experiment."""
    for method, tree in _merged(experiment).items():
        for path, node in grids_in(tree):
            key = place_of(experiment, method, ".".join(path))
            for other in node:
                if other != "grid":
                    message = f"unknown key; {did_you_mean(other, ['grid'])}"
                    yield Problem(f"{key}.{other}", message)
            values = node["grid"]
            if not isinstance(values, list):
                yield Problem(f"{key}.grid", f"expected a list, got {values!r}")
            elif message := repeated(values):
                yield Problem(f"{key}.grid", message)


def _merged(experiment: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Each method's `config`, `model` and `stop`."""
    common = experiment.get("config") or {}
    return {
        method: {
            "config": _merge(common, entry.get("config") or {}),
            "model": entry["model"],
            "stop": experiment["stop"],
        }
        for method, entry in experiment["methods"].items()
    }


def _merge(base: Any, over: Any) -> Any:
    mappings = isinstance(base, dict) and isinstance(over, dict)
    if not mappings or is_open(base) or is_open(over):
        return copy.deepcopy(over)
    merged = {key: _merge(base[key], over[key]) if key in over else base[key] for key in base}
    return copy.deepcopy(merged | {key: over[key] for key in over if key not in base})
