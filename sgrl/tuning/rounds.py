"""Rounds: which trials are trained, and how far, where results decide on that.

A round is a list of legs, and a leg is a trial and the iteration up to which it is to be trained.
Nothing is decided before all legs of a round are over, and then from the trials' files alone, in
the order of the trials. So decisions depend neither on which trial happened to be faster nor on
how often the sweep was killed: a restarted sweep goes through all rounds again, finds those before
the last one over, and comes to the same decisions.

A plain sweep is one round. A race has one for every decision (`sgrl.tuning.racing`).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sgrl.errors import UserError
from sgrl.files import read_json, write_json
from sgrl.results.metrics import Row, final_of, read_metrics
from sgrl.results.plan import Trial, points_of, trials_of
from sgrl.results.status import Progress, read_progress
from sgrl.results.storage import Store
from sgrl.tuning.experiment.load import Experiment
from sgrl.tuning.experiment.schedules import race_of
from sgrl.tuning.racing import Race, Stopped


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


Rounds = Iterator[list[Leg]]
#: Takes a trial that is not trained further, the state that says so, and why.
Decide = Callable[[Trial, str, str], None]


class Course:
    """The rounds of a sweep, as far as its folder has got.

    Args:
        store: of the sweep.
        experiment: what is run.
        decide: told of each trial that is not trained further; it may be told again.
        dry: whether nothing may be written.
    """

    def __init__(
        self,
        store: Store,
        experiment: Experiment,
        decide: Decide = lambda trial, state, reason: None,
        dry: bool = False,
    ) -> None:
        self.store, self.experiment, self.dry = store, experiment, dry
        self.decide = decide
        self._rounds = self._plan()
        self._round: list[Leg] | None = None
        self._number = -1
        record = read_json(store.sweep.rounds) if self.decides else None
        self._record: dict[str, Any] = record if isinstance(record, dict) else {"over": 0}

    @property
    def decides(self) -> bool:
        """Whether results decide on what is trained."""
        return self.experiment.file.schedule is not None

    def next_legs(self) -> list[Leg]:
        """Return the legs of the next round that are not over; none once the last round is.

        To be called again when all of them have ended. Where one has been interrupted there are
        no more rounds.
        """
        if self._round is not None and not all(self._is_over(leg) for leg in self._round):
            return []
        while True:
            try:
                self._round = next(self._rounds)
            except StopIteration:
                return []
            self._number += 1
            self._remember()
            if legs := [leg for leg in self._round if not self._is_settled(leg)]:
                return legs

    def rows(self, trial: Trial) -> list[Row]:
        """The rows that a trial has written."""
        return read_metrics(self.store.sweep.trial(trial.name).metrics)

    def _remember(self) -> None:
        """Note that the rounds before this one are over, whatever in them has failed."""
        if self.decides and not self.dry and self._record["over"] < self._number:
            self._record["over"] = self._number
            write_json(self.store.sweep.rounds, self._record)
            self.store.push(self.store.sweep.rounds)

    def _is_over(self, leg: Leg) -> bool:
        row = read_progress(self.store.sweep, leg.trial)
        if row.state == "failed":
            return True
        return row.iteration >= leg.until and row.state != "running"

    def _is_settled(self, leg: Leg) -> bool:
        """Whether a leg need not be run, also where an earlier process has begun it."""
        row = read_progress(self.store.sweep, leg.trial)
        if self._number < self._record["over"]:
            return row.state == "failed" or row.iteration >= leg.until
        if leg.is_last or row.state == "failed":
            return is_settled(self.store, row)
        name = leg.trial.name
        return self.store.newest_checkpoint(name, at_most=row.iteration) >= leg.until

    # The kinds of rounds ----------------------------------------------------------------------

    def _plan(self) -> Rounds:
        schedule = self.experiment.file.schedule
        if schedule is None:
            yield self._to_their_ends(self.experiment.trials)
        else:
            yield from self._race(schedule)

    def _to_their_ends(self, trials: Sequence[Trial]) -> list[Leg]:
        return [Leg(trial, trial.config.stop.training_iteration) for trial in trials]

    def _race(self, schedule: dict[str, Any]) -> Rounds:
        content = self.experiment.resolved
        trials = {
            (point.name, trial.seed): trial
            for point in points_of(content)
            for trial in trials_of(content, [point])
        }
        race = race_of(schedule, content)
        while runs := race.next_runs():
            yield self._to_their_ends([trials[run] for run in runs])
            scores = {run: self._score(trials[run], schedule) for run in runs}
            if all(math.isnan(score) for score in scores.values()):
                raise UserError(
                    f"no trial of this round has {schedule['metric']}, by which the race is to "
                    "decide: set schedule.metric to a column of metrics.csv that is not empty"
                )
            for run, score in scores.items():
                race.add(*run, score)
            self._drop(race, trials, schedule)

    def _score(self, trial: Trial, schedule: dict[str, Any]) -> float:
        """How well a trial does, higher being better; NaN where it failed or does not say."""
        if read_progress(self.store.sweep, trial).state == "failed":
            return math.nan
        final = final_of(self.rows(trial), schedule["metric"])
        return -final if schedule["mode"] == "min" else final

    def _drop(
        self, race: Race, trials: dict[tuple[str, int], Trial], schedule: dict[str, Any]
    ) -> None:
        """Say which runs a race does not need."""
        needed = set() if race.over else set(race.racing)
        for (name, seed), trial in trials.items():
            if name not in needed and not race.has_run(name, seed):
                self.decide(trial, "skipped", _why_dropped(name, race.out.get(name)))


def _why_dropped(name: str, stopped: Stopped | None) -> str:
    if stopped is None:
        return "race: the last one left"
    return (
        f"race: worse than {stopped.against} by {abs(stopped.difference):.3g}, "
        f"{stopped.seeds} seeds, p = {stopped.p:.2g}"
    )


def is_settled(store: Store, progress: Progress) -> bool:
    """Return whether a resumed sweep leaves a trial alone.

    It does where the loss diverged, or where the trial is completed and its last checkpoint is
    whole.
    """
    name = progress.trial.name
    if progress.state == "failed":
        return store.sweep.trial(name).read_status().get("diverged", False)
    if progress.state != "completed" or progress.iteration < progress.last_iteration:
        return False
    return store.has_checkpoint(name, progress.iteration)
