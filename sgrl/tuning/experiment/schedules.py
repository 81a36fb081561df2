"""The section `schedule`: what decides during a sweep which trials are trained on."""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from sgrl.annotations import accepts, in_words
from sgrl.errors import UserError, one_line
from sgrl.results.metrics import COLUMNS, EVALUATION_COLUMNS, INTEGER_COLUMNS
from sgrl.results.plan import Problem, points_of
from sgrl.tuning.experiment.file import check_known, unknown_key
from sgrl.tuning.racing import Race

#: What all schedules take, and what it is by default.
COMMON = {"metric": "success_rate", "mode": "max"}
MODES = ("max", "min")
#: Columns of metrics.csv that tell how well a trial does.
METRICS = tuple(
    column for column in (*COLUMNS[:-1], *EVALUATION_COLUMNS) if column not in INTEGER_COLUMNS
)


def complete_schedule(schedule: Mapping[str, Any]) -> dict[str, Any]:
    """Return a schedule with the settings that it leaves to defaults."""
    defaults = {
        name: parameter.default
        for name, parameter in _arguments(schedule["name"]).items()
        if parameter.default is not parameter.empty
    }
    plain = {key: list(v) if isinstance(v, tuple) else v for key, v in defaults.items()}
    return {"name": schedule["name"], **COMMON, **plain, **schedule}


def schedule_problems(content: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield what is wrong with the schedule of an experiment.

    Args:
        content: of the experiment file; without a schedule there is nothing wrong.
    """
    schedule = content.get("schedule")
    if schedule is None:
        return
    if "name" not in schedule:
        yield Problem("schedule.name", f"missing; one of {', '.join(SCHEDULES)}")
        return
    try:
        check_known("schedule.name", "schedule", schedule["name"], list(SCHEDULES))
    except Problem as problem:
        yield problem
        return
    found = [
        *metric_problems("schedule", schedule, content),
        *argument_problems("schedule", schedule, _arguments(schedule["name"]), ("name", *COMMON)),
    ]
    if not found:
        found += _race_problems(schedule, content)
    yield from found


def metric_problems(
    place: str, section: Mapping[str, Any], content: Mapping[str, Any]
) -> Iterator[Problem]:
    """Yield what is wrong with the metric and the mode of a section."""
    metric, mode = section.get("metric", COMMON["metric"]), section.get("mode", COMMON["mode"])
    try:
        check_known(f"{place}.metric", "column of metrics.csv", metric, METRICS)
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
    parameters = inspect.signature(kind, eval_str=True).parameters
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


def _race_problems(schedule: Mapping[str, Any], content: Mapping[str, Any]) -> Iterator[Problem]:
    metric = schedule.get("metric", COMMON["metric"])
    if "bounds" not in schedule and "success_rate" not in metric:
        yield Problem(
            "schedule.bounds",
            f"missing: between which values {metric} lies, as in [0, 1], or null to let only the "
            "order of two runs count",
        )
        return
    try:
        race = race_of(complete_schedule(schedule), content)
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


#: By their names.
SCHEDULES: dict[str, Callable[..., Any]] = {"race": Race}
#: Arguments that are set for each.
OWN = {"race": ("configurations", "seeds")}


@functools.cache
def _arguments(name: str) -> dict[str, inspect.Parameter]:
    return arguments_of(SCHEDULES[name], OWN[name])
