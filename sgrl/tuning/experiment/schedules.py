"""The section `schedule`: what decides during a sweep which trials are trained on."""

import collections
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from sgrl.annotations import accepts, in_words
from sgrl.errors import UserError, one_line
from sgrl.names import did_you_mean
from sgrl.results.grids import is_open, wrong_values
from sgrl.results.metrics import COLUMNS, EVALUATION_COLUMNS, INTEGER_COLUMNS
from sgrl.results.plan import Point, Problem, points_of
from sgrl.tuning.experiment.file import check_known, unknown_key
from sgrl.tuning.racing import Race

#: What all schedules take, and what it is by default.
COMMON = {"metric": "success_rate", "mode": "max"}
MODES = ("max", "min")
#: Columns of metrics.csv that tell how well a trial does.
METRICS = tuple(
    column for column in (*COLUMNS[:-1], *EVALUATION_COLUMNS) if column not in INTEGER_COLUMNS
)


def complete_schedule(
    schedule: Mapping[str, Any], content: Mapping[str, Any], points: Sequence[Point]
) -> dict[str, Any]:
    """Return a schedule with the settings that it leaves to defaults.

    Args:
        schedule: the section.
        content: of the experiment file, with all other defaults.
        points: of its grids.
    """
    defaults = {
        name: parameter.default
        for name, parameter in _arguments(schedule["name"]).items()
        if parameter.default is not parameter.empty
    }
    plain = {key: list(v) if isinstance(v, tuple) else v for key, v in defaults.items()}
    if schedule["name"] == "pbt":
        plain["perturbation_interval"] = content["checkpoint"]["every"]
    elif schedule["name"] != "race":
        plain["every"] = schedule.get("every", content["checkpoint"]["every"])
        if "max_t" in plain:
            plain["max_t"] = max(point.content["stop"]["training_iteration"] for point in points)
        if schedule["name"] == "median_stopping":
            plain["grace_period"] = plain["every"]  # Tune's own is in seconds
    return {"name": schedule["name"], **COMMON, **plain, **schedule}


def schedule_problems(content: Mapping[str, Any], points: Sequence[Point]) -> Iterator[Problem]:
    """Yield what is wrong with the schedule of an experiment.

    Args:
        content: of the experiment file, all else sound; without a schedule there is nothing wrong.
        points: of its grids.
    """
    schedule = content.get("schedule")
    if schedule is None:
        return
    if "name" not in schedule:
        yield Problem("schedule.name", f"missing; one of {', '.join(SCHEDULES)}")
        return
    name = schedule["name"]
    try:
        check_known("schedule.name", "schedule", name, list(SCHEDULES))
    except Problem as problem:
        yield problem
        return
    halts = name in ("asha", "median_stopping")
    others = ("name", *COMMON, *(("every",) if halts else ()))
    found = [
        *metric_problems("schedule", schedule, content),
        *argument_problems("schedule", schedule, _arguments(name), others),
    ]
    if name != "race":
        for key in {key for point in points for key in point.content["stop"]}:
            if key != "training_iteration":
                said = f"{name} ends trials by their iterations: leave {key} out"
                found.append(Problem(f"stop.{key}", said))
    every = schedule.get("every", 1)
    if halts and (not accepts(int, every) or every < 1):
        found.append(Problem("schedule.every", f"expected a number of iterations, got {every!r}"))
    if not found and name == "race":
        found += _race_problems(schedule, content, points)
    elif not found and name == "pbt":
        found += _population_problems(schedule, content, points)
    elif not found:
        try:
            scheduler_of(complete_schedule(schedule, content, points))
        except (AssertionError, ValueError) as error:
            found.append(Problem("schedule", one_line(error)))
    yield from found


def metric_problems(
    place: str, section: Mapping[str, Any], content: Mapping[str, Any]
) -> Iterator[Problem]:
    """Yield what is wrong with the metric and the mode of a section."""
    metric, mode = section.get("metric", COMMON["metric"]), section.get("mode", COMMON["mode"])
    try:
        check_known(f"{place}.metric", "column of the metrics", metric, METRICS)
        check_known(f"{place}.mode", "mode", mode, MODES)
    except Problem as problem:
        yield problem
        return
    if metric in EVALUATION_COLUMNS and content.get("evaluate") is None:
        yield Problem(f"{place}.metric", f"{metric} takes evaluations: set evaluate, too")


def argument_problems(
    place: str,
    given: Mapping[str, Any],
    known: Mapping[str, inspect.Parameter],
    others: Sequence[str] = (),
) -> Iterator[Problem]:
    """Yield what is wrong with arguments of a class.

    Args:
        place: the key of the section that holds them.
        given: the section.
        known: its arguments.
        others: keys of the section that are none.
    """
    for name, value in given.items():
        if name in others:
            continue
        if name not in known:
            yield Problem(f"{place}.{name}", unknown_key(name, [*others, *known]))
        elif not accepts(known[name].annotation, value):
            expected = in_words(known[name].annotation)
            yield Problem(f"{place}.{name}", f"expected {expected}, got {value!r}")


def arguments_of(kind: Callable[..., Any], own: Sequence[str]) -> dict[str, inspect.Parameter]:
    """Return the arguments of a class that a file may set: all but those that are set for it."""
    try:
        parameters = inspect.signature(kind, eval_str=True).parameters
    except (NameError, TypeError, AttributeError):  # it names what is not installed
        parameters = inspect.signature(kind).parameters
    return {
        name: parameter
        for name, parameter in parameters.items()
        if name not in own and parameter.kind is not parameter.VAR_KEYWORD
    }


# Races ----------------------------------------------------------------------------------------


def race_of(schedule: Mapping[str, Any], content: Mapping[str, Any]) -> Race:
    """Return the race of an experiment's configurations, at its start.

    Args:
        schedule: its section, with all defaults.
        content: of the experiment file, with all defaults.

    Raises:
        UserError: there can be no such race.
    """
    arguments = {name: schedule[name] for name in _arguments("race")}
    if bounds := arguments["bounds"]:
        low, high = bounds
        arguments["bounds"] = (-high, -low) if schedule["mode"] == "min" else (low, high)
    return Race([point.name for point in points_of(content)], content["seeds"], **arguments)


def _race_problems(
    schedule: Mapping[str, Any], content: Mapping[str, Any], points: Sequence[Point]
) -> Iterator[Problem]:
    if content.get("search") is not None:
        yield Problem("schedule.name", "a race takes values of a grid, not of a search; try asha")
        return
    metric = schedule.get("metric", COMMON["metric"])
    if "bounds" not in schedule and "success_rate" not in metric:
        yield Problem(
            "schedule.bounds",
            f"missing: between which values {metric} lies, as in [0, 1], or null to let only the "
            "order of two runs count",
        )
        return
    try:
        race = race_of(complete_schedule(schedule, content, points), content)
    except UserError as error:
        yield Problem("schedule", one_line(error))
        return
    if len(race.configurations) == 1:
        yield Problem("schedule", "a race takes at least two methods or values of a grid")
    if len(race.seeds) <= race.first:
        yield Problem(
            "schedule.first",
            f"must be less than the number of seeds, {len(race.seeds)}, for anything to be "
            f"decided, got {race.first}",
        )


# Populations ----------------------------------------------------------------------------------


def _population_problems(
    schedule: Mapping[str, Any], content: Mapping[str, Any], points: Sequence[Point]
) -> Iterator[Problem]:
    mutations = schedule.get("hyperparam_mutations")
    search = content.get("search") or {}
    members = collections.Counter(point.method for point in points)
    size = min(members.values()) * search.get("num_samples", 1)
    interval = schedule.get("perturbation_interval", 1)
    if search and (search["name"] != "random" or search["concurrent"] is not None):
        message = "pbt takes a grid, or search: {name: random} without concurrent"
        yield Problem("schedule.name", message)
    if size < 2:
        yield Problem("schedule", "a population takes at least two grid points of each method")
    if interval < 1 or interval != int(interval):
        message = f"expected a number of iterations, got {interval}"
        yield Problem("schedule.perturbation_interval", message)
    if not 0 < schedule.get("quantile_fraction", 0.25) <= 0.5:
        message = f"must be greater than 0 and at most 0.5, got {schedule['quantile_fraction']}"
        yield Problem("schedule.quantile_fraction", message)
    place = "schedule.hyperparam_mutations"
    if not mutations:
        message = "missing: what changes, as in {config.training.lr: {loguniform: [1e-4, 1e-2]}}"
        yield Problem(place, message)
        return
    for key, values in mutations.items():
        name = str(key).removeprefix("config.training.")
        known = [
            f"config.training.{other}"
            for other, value in (points[0].content["config"].get("training") or {}).items()
            if isinstance(value, int | float) or is_open(value if isinstance(value, dict) else {})
        ]
        if any(name not in (p.content["config"].get("training") or {}) for p in points) or (
            name == key
        ):
            hint = did_you_mean(key, known) if known else "set it under config.training, too"
            yield Problem(f"{place}.{key}", f"no number that is set; {hint}")
        elif isinstance(values, dict) and len(values) == 1 and is_open(values):
            (kind, given) = next(iter(values.items()))
            if message := "expected a list" if kind == "grid" else wrong_values(kind, given):
                yield Problem(f"{place}.{key}", message)
        elif not isinstance(values, list) or not values:
            yield Problem(f"{place}.{key}", f"expected a distribution or a list, got {values!r}")


# Tune's schedulers ----------------------------------------------------------------------------


def scheduler_of(schedule: Mapping[str, Any]) -> Any:
    """Return Tune's scheduler as it is at its start.

    Args:
        schedule: its section, with all defaults.

    Raises:
        AssertionError: there can be no such scheduler.
    """
    arguments = {key: schedule[key] for key in ("metric", "mode", *_arguments(schedule["name"]))}
    return _kind(schedule["name"])(time_attr="iteration", **arguments)


#: By their names, what they are in Tune; a race is ours.
SCHEDULES = {
    "race": "",
    "asha": "ASHAScheduler",
    "median_stopping": "MedianStoppingRule",
    "pbt": "PopulationBasedTraining",
}
#: Arguments that are set for them.
OWN = (
    *("configurations", "seeds"),
    *("time_attr", *COMMON),
    # What they mean does not arise in rounds.
    *("hard_stop", "min_time_slice", "stop_last_trials"),
    *("custom_explore_fn", "log_config", "require_attrs", "synch"),
)


def _kind(name: str) -> Any:
    if name == "race":
        return Race
    import ray.tune.schedulers

    return getattr(ray.tune.schedulers, SCHEDULES[name])


@functools.cache
def _arguments(name: str) -> dict[str, inspect.Parameter]:
    return arguments_of(_kind(name), OWN)
