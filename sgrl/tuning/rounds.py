"""What rounds are made of: legs of trials, and the results that decide on the next round."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import scipy.stats

from sgrl.errors import UserError
from sgrl.results.folder import SweepFolder
from sgrl.results.metrics import Row, final_of, read_metrics
from sgrl.results.plan import Trial
from sgrl.results.status import read_progress


@dataclass(frozen=True)
class Leg:
    """A part of a trial's training.

    Attributes:
        trial: which one.
        until: the leg's last iteration.
    """

    trial: Trial
    until: int

    @property
    def is_last(self) -> bool:
        """Whether the trial is complete after it."""
        return self.until >= self.trial.config.stop.training_iteration


@dataclass(frozen=True)
class Configuration:
    """A method at a point, trained with all seeds.

    Attributes:
        name: of the point.
        trials: one for each seed.
    """

    name: str
    trials: list[Trial]

    @property
    def last_iteration(self) -> int:
        """The iteration after which its trials are complete."""
        return self.trials[0].config.stop.training_iteration


Rounds = Iterator[list[Leg]]
#: Takes a trial that is not trained further, the state that says so, and why.
Decide = Callable[[Trial, str, str], None]
#: Of the scores of a configuration's seeds.
JUDGES: dict[str, Callable[[list[float]], float]] = {
    "mean": lambda scores: sum(scores) / len(scores),
    "iqm": lambda scores: float(scipy.stats.trim_mean(scores, 0.25)),
}


class Results:
    """What the trials of a sweep have reached, from their files.

    Args:
        sweep: its folder.
    """

    def __init__(self, sweep: SweepFolder) -> None:
        self.sweep = sweep

    def rows(self, trial: Trial) -> list[Row]:
        """The rows that a trial has written."""
        return read_metrics(self.sweep.trial(trial.name).metrics)

    def has_failed(self, trial: Trial) -> bool:
        """Whether a trial has failed."""
        return read_progress(self.sweep, trial).state == "failed"

    def judge(self, trials: Sequence[Trial], section: Mapping[str, Any]) -> float:
        """How well a configuration does: NaN where one of its trials failed or does not say."""
        scores = [final_of(self.rows(trial), section["metric"]) for trial in trials]
        if any(map(self.has_failed, trials)) or any(map(math.isnan, scores)):
            return math.nan
        return JUDGES[section.get("judge", "mean")](scores)

    def complain(self, metric: str, trials: Sequence[Trial], section: str) -> None:
        """Raise UserError if there are trials that did not fail, as they lack the metric."""
        if not all(map(self.has_failed, trials)):
            raise UserError(
                f"no trial of this round has {metric}, by which the {section} is to decide: set "
                f"{section}.metric to a column of its metrics that is not empty"
            )
