"""The section `search`, and the distributions that it draws from."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from ray import tune
from ray.tune.search import SEARCH_ALG_IMPORT, Searcher

from sgrl.errors import one_line
from sgrl.results.grids import distributions_in, misspelled_grids, place_of, wrong_values
from sgrl.results.plan import Point, Problem, suggested_points
from sgrl.tuning.experiment.schedules import argument_problems, arguments_of, metric_problems

#: Arguments of Tune's searchers that are set for them, the last three if they have one.
OWN = ("space", "metric", "mode", "seed", "random_state_seed", "random_state")
#: Digits of a suggested number: more would only make names longer.
DIGITS = 6


class RandomSearch(Searcher):
    """Draws each configuration by itself.

    Args:
        space: distributions of Tune's by key.
        seed: of the draws.
    """

    def __init__(self, space: Mapping[str, Any], seed: int = 0) -> None:
        super().__init__()
        self.space, self.seed = dict(space), seed

    def suggest(self, trial_id: str) -> dict[str, Any]:
        """Draw the configuration of that number."""
        generator = np.random.default_rng([self.seed, int(trial_id)])
        return {key: d.sample(random_state=generator) for key, d in self.space.items()}

    def on_trial_complete(
        self, trial_id: str, result: dict | None = None, error: bool = False
    ) -> None:
        """Learn nothing."""


def space_of(point: Point) -> dict[str, Any]:
    """Return the distributions of a point by their keys, as Tune's."""
    nodes = dict(distributions_in(point.content))
    return {
        ".".join(path): tune.choice(values) if name == "choice" else getattr(tune, name)(*values)
        for path, (name, values) in nodes.items()
    }


def searcher_of(search: Mapping[str, Any], point: Point) -> Searcher:
    """Return the searcher for one point, before its first suggestion.

    Args:
        search: the section, with all defaults.
        point: where it searches.

    Raises:
        Problem: the searcher is not installed, or cannot search there.
    """
    name, space = search["name"], space_of(point)
    if name == "random":
        return RandomSearch(space, search["seed"])
    kind = _kind(name)
    arguments = dict(search["arguments"])
    for seed in OWN[3:]:
        if seed in arguments_of(kind, ()):
            arguments[seed] = search["seed"]
    try:
        searcher = kind(**arguments)
        if searcher.set_search_properties(search["metric"], search["mode"], space) is False:
            raise Problem("search.name", f"{name} does not search such distributions")
    except (AssertionError, ImportError) as error:
        if "install" not in str(error):
            raise Problem("search", one_line(error)) from None
        how = "pip install 'sgrl[search]'" if name == "optuna" else one_line(error)
        raise Problem("search.name", f"{name} is not installed: {how}") from None
    except (ValueError, TypeError, NotImplementedError) as error:
        raise Problem("search", one_line(error)) from None
    return searcher


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return suggested values as YAML holds them, numbers rounded to `DIGITS` digits."""
    return {key: _plain(value) for key, value in values.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def concurrent(search: Mapping[str, Any]) -> int:
    """Return how many configurations a search suggests before results of any are known."""
    most: int = search["num_samples"]
    default = most if search["name"] == "random" else min(4, most)
    return min(search["concurrent"] or default, most)


def example_points(points: Sequence[Point], search: Mapping[str, Any] | None) -> list[Point]:
    """Return points as a search may suggest them: drawn at random, as many as there will be."""
    count = range(search["num_samples"] if search else 0)
    draws = {
        point.name: [plain(RandomSearch(space_of(point)).suggest(str(i))) for i in count]
        for point in points
    }
    return suggested_points(points, draws)


def extreme_points(points: Sequence[Point]) -> list[Point]:
    """Return the points at the ends of all distributions, and at every choice."""
    found = []
    for point in points:
        ends = {
            ".".join(path): values if name == "choice" else _ends(name, values)
            for path, (name, values) in distributions_in(point.content)
        }
        for i in range(max(map(len, ends.values()), default=1)):
            found.append(point.at({key: values[i % len(values)] for key, values in ends.items()}))
    return found


def _ends(name: str, values: Sequence[Any]) -> tuple[Any, Any]:
    low, high = values[:2]
    if "randint" in name:
        # Tune's whole numbers end before the upper one, unless they are rounded.
        return (low, high) if name.startswith("q") else (low, high - 1)
    return float(low), float(high)


# Checks ---------------------------------------------------------------------------------------


def distribution_problems(
    content: Mapping[str, Any], points: Sequence[Point], has_search: bool
) -> Iterator[Problem]:
    """Yield what is wrong with the distributions of an experiment.

    Args:
        content: of the experiment file.
        points: those of its grids.
        has_search: whether it has a section `search`, sound or not.
    """
    for point in points:
        for path, (name, values) in distributions_in(point.content):
            key = place_of(content, point.method, ".".join(path))
            if path[0] == "stop" or path == ("model", "policy"):
                yield Problem(key, "cannot be searched for: expected a value or a grid")
            elif message := wrong_values(name, values):
                yield Problem(f"{key}.{name}", message)
            elif not has_search:
                yield Problem(
                    f"{key}.{name}",
                    "takes a section search, as in search: {name: random, num_samples: 10}",
                )


def search_problems(content: Mapping[str, Any], points: Sequence[Point]) -> Iterator[Problem]:
    """Yield what is wrong with the search of an experiment; its distributions are sound.

    Args:
        content: of the experiment file.
        points: those of its grids.
    """
    search = content.get("search")
    if search is None:
        return
    yield from metric_problems("search", search, content)
    searched = [point for point in points if point.searched]
    if not searched and any(misspelled_grids(content)):
        return
    if not searched:
        yield Problem(
            "search", "nothing to search for: set a value to {uniform: [low, high]} or the like"
        )
        return
    try:
        known = {} if search["name"] == "random" else arguments_of(_kind(search["name"]), OWN)
        found = list(argument_problems("search.arguments", search["arguments"], known))
        if found:
            yield from found
            return
        searcher_of(search, searched[0])
    except Problem as problem:
        yield problem


def _kind(name: str) -> Any:
    kind = SEARCH_ALG_IMPORT[name]()
    logging.getLogger("optuna").setLevel(logging.WARNING)  # it tells of every study
    return kind
