"""From an experiment file to an `Experiment`: a checked list of trials.

    experiment = load_experiment("tune_configs/quickstart.yaml", ["config.training.lr=1e-3"])
    [trial.name for trial in experiment.trials]

Ray is imported but never started.
"""

import functools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sgrl.names import did_you_mean
from sgrl.results.grids import DISTRIBUTIONS, misspelled_grids, place_of
from sgrl.results.plan import (
    ExperimentError,
    Point,
    Problem,
    Trial,
    grid_problems,
    points_of,
    read_experiment,
    read_suggestions,
    suggested_points,
    trials_of,
)
from sgrl.results.selection import parse_seeds
from sgrl.tuning.experiment.checks import point_problems
from sgrl.tuning.experiment.edits import add, keep_methods, override
from sgrl.tuning.experiment.file import ExperimentFile, validate_file
from sgrl.tuning.experiment.method import as_recorded, complete_model
from sgrl.tuning.experiment.places import places_of
from sgrl.tuning.experiment.schedules import complete_schedule, schedule_problems
from sgrl.tuning.experiment.searches import (
    distribution_problems,
    example_points,
    extreme_points,
    search_problems,
)
from sgrl.tuning.experiment.sections import config_class_of

# Written out in every experiment. A baseline is so only where it is set: sweeps that were started
# before there was one go on.
TRAINING: tuple[str, ...] = ("lr", "predictor_lr", "gamma", "entropy_coeff", "grad_clip")
TRAINING += ("normalize_returns", "two_phase", "total_updates", "total_iterations")


@dataclass(frozen=True)
class Experiment:
    """A checked experiment.

    Attributes:
        path: of its file.
        file: what the file says, with every default, override and backend written out.
        trials: one for each method, grid point and seed; of a search, those it has suggested so
            far.
        examples: the trials; of a search, as many as it will suggest at most, and alike.
    """

    path: Path
    file: ExperimentFile
    trials: list[Trial]
    examples: list[Trial]

    @property
    def first_examples(self) -> list[Trial]:
        """Of the examples that differ in nothing but their seeds, the first ones."""
        first: dict[str, Trial] = {}
        for trial in self.examples:
            first.setdefault(trial.point, trial)
        return list(first.values())

    @property
    def name(self) -> str:
        """The experiment's name, and its results folder's."""
        return self.file.name

    @property
    def resolved(self) -> dict[str, Any]:
        """The content of the file as YAML holds it; written, it loads as the same experiment."""
        return self.file.as_dict()


def load_experiment(
    path: str | Path,
    overrides: Sequence[str] = (),
    name: str | None = None,
    track: str | None = None,
    *,
    methods: Sequence[str] = (),
    seeds: str | None = None,
    concurrency: int | None = None,
    begun: bool = False,
) -> Experiment:
    """Read, override and check an experiment file.

    Args:
        path: the file.
        overrides: KEY=VALUE, the value in YAML. One of `config.*` also wins over what a method
            sets at the same key.
        name: in the place of the experiment's own.
        track: in the place of the experiment's own.
        methods: those to keep; all by default.
        seeds: as in 0..5 or 0,2,7..9, in the place of the experiment's own.
        concurrency: in the place of the experiment's own.
        begun: whether it is the file of a sweep that has begun, in its folder.

    Raises:
        ExperimentError: it cannot run; all that is wrong with it.
    """
    path = Path(path)
    changed = {_key(setting): f"--set {_key(setting)}" for setting in overrides}

    def edit(content: dict[str, Any]) -> None:
        if begun:
            _as_recorded(content)
        for setting in overrides:
            override(content, setting)
        if methods:
            keep_methods(content, methods)
        options: dict[str, Any] = {"name": name, "track": track, "concurrency": concurrency}
        options["seeds"] = None if seeds is None else parse_seeds(seeds)
        content |= {key: value for key, value in options.items() if value is not None}

    return _load(path, edit, changed | ({} if seeds is None else {"seeds": "--seeds"}))


def extend_experiment(
    path: str | Path,
    iterations: int | None = None,
    additions: Sequence[str] = (),
    track: str | None = None,
    *,
    concurrency: int | None = None,
    begun: bool = False,
) -> Experiment:
    """Read an experiment file and make it longer, or wider.

    Every trial of the file is still one, under the same name. Values that are there already
    change nothing, so the same extension can be asked for again.

    Args:
        path: the file.
        iterations: the trials' new last one.
        additions: KEY=VALUES: more seeds, as in seeds=6..11, or more values of a key that is
            swept.
        track: in the place of the experiment's own.
        concurrency: in the place of the experiment's own.
        begun: as of `load_experiment`.

    Raises:
        ExperimentError: it cannot run, or not be extended so; all that is wrong with it.
    """
    path = Path(path)
    experiment = _load(path, _as_recorded if begun else lambda content: None)
    options = {"track": track, "concurrency": concurrency}
    options = {key: value for key, value in options.items() if value is not None}
    if iterations is None and not additions and not options:
        return experiment

    def edit(content: dict[str, Any]) -> None:
        content |= experiment.resolved
        _check_extension(experiment.file, iterations, additions)
        for addition in additions:
            add(content, addition, path)
        if iterations is not None:
            key = "stop.training_iteration"
            if isinstance(content["stop"]["training_iteration"], dict):
                raise Problem(key, "is swept: the trials' names say when they end")
            content["stop"]["training_iteration"] = iterations
        content |= options

    return _load(path, edit, {_key(addition): f"--add {_key(addition)}" for addition in additions})


def _as_recorded(content: dict[str, Any]) -> None:
    """Write into the methods of a sweep that has begun what older revisions did not."""
    methods = content.get("methods")
    for method in methods.values() if isinstance(methods, dict) else ():
        if isinstance(method, dict) and isinstance(method.get("model"), dict):
            method["model"] = as_recorded(method["model"])


def _check_extension(
    file: ExperimentFile, iterations: int | None, additions: Sequence[str]
) -> None:
    """Refuse what would change results on which a sweep has decided already."""
    if file.schedule is None and file.search is None:
        return
    name = file.search.name if file.search else file.schedule["name"] if file.schedule else ""
    what = f"{name} has decided by what there is so far; start another sweep"
    if iterations is not None:
        raise Problem("stop.training_iteration", f"cannot change: {what}")
    for addition in additions:
        if name != "race" or _key(addition) != "seeds":
            raise Problem(_key(addition), f"cannot be added to: {what}")


def _key(setting: str) -> str:
    return setting.partition("=")[0]


def _load(
    path: Path,
    edit: Callable[[dict[str, Any]], None] = lambda content: None,
    changed: Mapping[str, str] | None = None,
) -> Experiment:
    try:
        content = read_experiment(path)
        edit(content)
    except Problem as problem:
        raise ExperimentError(path, [problem], changed) from None
    config_class: Any = None
    problems: list[Problem] = []
    try:
        config_class = config_class_of(content.get("algorithm") or "Reinforce")
    except Problem as problem:
        problems.append(problem)
    places = functools.cache(lambda: places_of(content, config_class))
    file, found = validate_file(content, places)
    problems += found
    trials: list[Trial] = []
    examples: list[Trial] = []
    if file is not None:
        problems += _complete(file)
        resolved = file.as_dict()
        points = points_of(resolved)
        problems += grid_problems(resolved)
        unsound = list(distribution_problems(resolved, points, bool(content.get("search"))))
        problems += unsound
        if not unsound:
            extremes = extreme_points(points)
            problems += _point_problems(resolved, extremes, config_class, places)
            problems += search_problems(resolved, points)
        if not problems:
            problems += schedule_problems(resolved, points)
        if not problems:
            trials = trials_of(resolved, suggested_points(points, read_suggestions(path)))
            examples = trials
            if file.search is not None:
                examples = trials_of(resolved, example_points(points, resolved["search"]))
            problems += _trial_problems(file, examples)
            if file.schedule is not None:
                file.schedule = complete_schedule(file.schedule, resolved, points)
    if problems:
        problems = _with_whole_keys(_with_grids_meant(content, problems), changed or {})
        raise ExperimentError(path, problems, changed)
    assert file is not None
    return Experiment(path, file, trials, examples)


def _with_grids_meant(content: Mapping[str, Any], problems: list[Problem]) -> list[Problem]:
    """The problems, with a misspelled `grid` in the place of what is wrong because of it."""
    known = ["grid", *DISTRIBUTIONS]
    for key in misspelled_grids(content):
        start, got = ".".join(key), f"got {{{key[-1]!r}: "
        others = [p for p in problems if not (start.startswith(p.key) and got in p.message)]
        if len(others) < len(problems):
            problems = [*others, Problem(key, f"unknown key; {did_you_mean(key[-1], known)}")]
    return problems


def _with_whole_keys(problems: Iterable[Problem], changed: Iterable[str]) -> list[Problem]:
    """The problems; where an option made an unknown section, with the whole key that was meant."""
    found = []
    for problem in problems:
        meant = re.fullmatch(r"(unknown key; did you mean '.*)'\?", problem.message)
        for key in changed if meant else ():
            if meant and key.startswith(f"{problem.key}."):
                rest = key[len(problem.key) :]
                problem = Problem(key, f"{meant[1]}{rest}'?")
        found.append(problem)
    return found


def _complete(file: ExperimentFile) -> Iterator[Problem]:
    """Write into an experiment what it leaves to defaults.

    A model for which that cannot be done is emptied and reported.
    """
    for name, method in file.methods.items():
        try:
            configs, packed = (file.config, method.config), file.pack is not None
            complete_model(name, method.model, configs, packed)
        except Problem as problem:
            method.model.clear()
            yield problem
    training = file.config.setdefault("training", {})
    if file.algorithm == "Reinforce" and isinstance(training, dict) and "grid" not in training:
        defaults = config_class_of("Reinforce")()
        for key in TRAINING:
            training.setdefault(key, getattr(defaults, key))


def _point_problems(
    resolved: Mapping[str, Any],
    points: Iterable[Point],
    config_class: Any,
    places: Callable[[], Mapping[str, str]],
) -> Iterator[Problem]:
    """What is wrong with the grid points, each key as it stands in the file."""
    said = set()
    for point in points:
        for problem in point_problems(resolved["algorithm"], config_class, point, places):
            # RLlib does not say which key it means: that is once enough, for whatever methods.
            if problem.key != "config" or problem.message not in said:
                place = place_of(resolved, point.method, problem.key)
                yield Problem(place, problem.message)
            said.add(problem.message)


def _trial_problems(file: ExperimentFile, trials: Sequence[Trial]) -> Iterator[Problem]:
    """What is wrong with the trials as a whole."""
    for name, count in Counter(trial.name for trial in trials).items():
        if count > 1:
            yield Problem("methods", f"two trials would share the folder {name!r}")
        if len(name) > 200:
            yield Problem("methods", f"the trial name {name[:40]!r}... is too long for a folder")
    shortest = min(trial.config.stop.training_iteration for trial in trials)
    if file.evaluate is not None and file.evaluate.every > shortest:
        most = f"must be at most {shortest}, the trials' number of iterations"
        yield Problem("evaluate.every", f"{most}, got {file.evaluate.every}")
