"""Some of a sweep's trials, as `--methods gru,lstm` and `--seeds 0..5` name them."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from sgrl.errors import UserError
from sgrl.names import did_you_mean
from sgrl.results.plan import Problem, Trial, expand_range
from sgrl.yaml_files import YAMLFileError, parse_yaml


class OfTrial(Protocol):
    """What is of a trial."""

    @property
    def trial(self) -> Trial: ...


T = TypeVar("T", bound=OfTrial)


class SelectionError(UserError):
    """No trial is meant; the message is one line."""


@dataclass(frozen=True)
class Selection:
    """The trials that are meant.

    Attributes:
        methods: of these; of all where there is none.
        seeds: with these; with all where there is none.
    """

    methods: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()

    @classmethod
    def of(cls, methods: str | None, seeds: str | None) -> "Selection":
        """Read what options say.

        Args:
            methods: as in gru,lstm.
            seeds: as in 0..5 or 0,2,7..9.

        Raises:
            SelectionError: they are not of that form.
        """
        try:
            chosen = [] if seeds is None else parse_seeds(seeds)
        except Problem as problem:
            raise SelectionError(f"--seeds {seeds}: {problem.message}") from None
        for seed in chosen:
            if type(seed) is not int:
                raise SelectionError(f"--seeds {seeds}: expected a whole number, got {seed!r}")
        return cls(tuple(methods.split(",")) if methods is not None else (), tuple(chosen))

    def holds(self, method: str, seed: Any) -> bool:
        """Return whether a trial is meant."""
        return not (
            (self.methods and method not in self.methods) or (self.seeds and seed not in self.seeds)
        )

    def takes(self, trial: Trial) -> bool:
        """Return whether a trial of an experiment is meant."""
        return self.holds(trial.config.method, trial.config.seed)

    def among(self, legs: Iterable[T]) -> list[T]:
        """Return those legs, each of a trial, that are meant."""
        return [leg for leg in legs if self.takes(leg.trial)]

    def check(self, trials: Iterable[tuple[str, Any]]) -> None:
        """Check that all that is named is there.

        Args:
            trials: method and seed of each.

        Raises:
            SelectionError: it is not; the nearest name.
        """
        there = list(trials)
        methods = dict.fromkeys(method for method, _ in there)
        for name in self.methods:
            if name not in methods:
                raise SelectionError(
                    f"--methods: unknown method {name!r}; {did_you_mean(name, methods)}"
                )
        if there and not any(self.holds(*trial) for trial in there):
            raise SelectionError("no trial has such a method and seed")


ALL = Selection()


def parse_seeds(text: str) -> list[Any]:
    """Return the seeds of a text such as 0..5 or 0,2,7..9.

    Raises:
        Problem: it is not YAML, or a range is none.
    """
    seeds: list[Any] = []
    for part in text.split(","):
        try:
            value = expand_range(parse_yaml(part))
        except YAMLFileError as error:
            raise Problem("seeds", str(error)) from None
        seeds += value if isinstance(value, list) else [value]
    return seeds
