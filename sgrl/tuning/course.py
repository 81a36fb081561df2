"""The course of a sweep: which trials are trained, and how far, where results decide on that.

A round is a list of legs, and a leg is a trial and the iteration up to which it is to be trained.
Nothing is decided before all legs of a round are over, and then from the trials' files alone, in
the order of the trials. So decisions depend neither on which trial happened to be faster nor on
how often the sweep was killed: a restarted sweep goes through all rounds again, finds those before
the last one over, and comes to the same decisions.

A plain sweep is one round. A race has one for every decision (`sgrl.tuning.racing`), a search one
for every few configurations that it suggests, and a schedule of Tune's that stops trials early one
for every so many iterations. Configurations are judged as a whole, by all their seeds.

`rounds.json` in the sweep's folder says how many rounds are over, and what a search has suggested.
It is written before a round's trials begin.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ray.tune.search import Searcher

from sgrl.files import read_json, write_json
from sgrl.reinforce.generators import generators_aside
from sgrl.results.metrics import read_metrics
from sgrl.results.plan import Point, Trial, points_of, trials_of
from sgrl.results.status import Progress, read_progress
from sgrl.results.storage import Store
from sgrl.tuning.experiment.load import Experiment
from sgrl.tuning.experiment.schedules import race_of
from sgrl.tuning.experiment.searches import concurrent, plain, searcher_of
from sgrl.tuning.halting import Halting
from sgrl.tuning.population import Population, hand_over
from sgrl.tuning.racing import Race, Stopped
from sgrl.tuning.rounds import Configuration, Decide, Leg, Results, Rounds


class Course:
    """The rounds of a sweep, as far as its folder has got.

    Args:
        store: of the sweep.
        experiment: what is run.
        decide: told of each trial that is not trained further; it may be told again.
        admit: told of the trials of each round before they begin.
        dry: whether nothing may be written.

    Attributes:
        notes: one line for each thing that is not as it should be.
    """

    def __init__(
        self,
        store: Store,
        experiment: Experiment,
        decide: Decide = lambda trial, state, reason: None,
        admit: Callable[[Sequence[Trial]], None] = lambda trials: None,
        dry: bool = False,
    ) -> None:
        self.store, self.experiment, self.dry = store, experiment, dry
        self.decide, self.admit = decide, admit
        self.notes: list[str] = []
        self.results = Results(store.sweep)
        self._content = experiment.resolved
        self._rounds = self._plan()
        self._round: list[Leg] | None = None
        self._number = -1
        self._record: dict[str, Any] = {"over": 0}
        self._written = read_json(store.sweep.rounds)
        if self.decides:
            self._record |= copy.deepcopy(self._written) or {}

    @property
    def decides(self) -> bool:
        """Whether results decide on what is trained."""
        return "search" in self._content or "schedule" in self._content

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
            if not self.dry:
                keep = self.experiment.file.checkpoint.keep
                hand_over(self.store.sweep, self._record.get("origins", {}), keep)
            self.admit([leg.trial for leg in self._round])
            if legs := [leg for leg in self._round if not self._is_settled(leg)]:
                return legs

    def _remember(self) -> None:
        """Write down that the rounds before this one are over, whatever in them has failed."""
        self._record["over"] = max(self._record["over"], self._number)
        if self.decides and not self.dry and self._record != self._written:
            write_json(self.store.sweep.rounds, self._record)
            self.store.push(self.store.sweep.rounds)
            self._written = copy.deepcopy(self._record)

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
        if not self.decides:
            yield self._to_their_ends(self.experiment.trials)
            return
        search, schedule = self._content.get("search"), self._content.get("schedule")
        train = self._all
        if schedule is not None and schedule["name"] == "race":
            yield from self._race(schedule)
            return
        if schedule is not None and schedule["name"] == "pbt":
            origins = self._record.setdefault("origins", {})
            train = Population(self.results, schedule, origins).rounds
        elif schedule is not None:
            train = Halting(self.results, self.decide, schedule, search).rounds
        points = points_of(self._content)
        fixed = [self._configuration(point) for point in points if not point.searched]
        if search is None:
            yield from train(fixed)
        else:
            yield from self._search(search, points, fixed, train)

    def _configuration(self, point: Point) -> Configuration:
        return Configuration(point.name, trials_of(self._content, [point]))

    def _all(self, configurations: Sequence[Configuration]) -> Rounds:
        yield self._to_their_ends([trial for c in configurations for trial in c.trials])

    def _to_their_ends(self, trials: Sequence[Trial]) -> list[Leg]:
        return [Leg(trial, trial.config.stop.training_iteration) for trial in trials]

    # Searches ---------------------------------------------------------------------------------

    def _search(
        self,
        search: dict[str, Any],
        points: Sequence[Point],
        fixed: list[Configuration],
        train: Callable[[Sequence[Configuration]], Rounds],
    ) -> Rounds:
        """Suggest some configurations for each point, train them, and tell of them in order."""
        searched = [point for point in points if point.searched]
        searchers = {point.name: searcher_of(search, point) for point in searched}
        known: dict[str, Configuration] = {c.name: c for c in fixed}
        worst: dict[str, float] = {}
        most, step = search["num_samples"], concurrent(search)
        for first in range(0, most, step):
            batch, new = [], fixed if first == 0 else []
            for point in searched:
                for number in range(first, min(first + step, most)):
                    values = self._suggestion(point, number, searchers[point.name], search)
                    if values is None:
                        continue
                    configuration = self._configuration(point.at(values))
                    if configuration.name not in known:
                        known[configuration.name] = configuration
                        new = [*new, configuration]
                    batch.append((point.name, number, known[configuration.name]))
            yield from train(new)
            scores = [self.results.judge(c.trials, search) for *_, c in batch]
            if all(math.isnan(score) for score in scores):
                self.results.complain(
                    search["metric"], [t for *_, c in batch for t in c.trials], "search"
                )
            for (name, _, _), score in zip(batch, scores, strict=True):
                if not math.isnan(score):
                    better = max if search["mode"] == "min" else min
                    worst[name] = better(score, worst.get(name, score))
            for (name, number, _), score in zip(batch, scores, strict=True):
                # One that failed is as bad as the worst: it is not to be tried again.
                score = worst.get(name, math.nan) if math.isnan(score) else score
                result = None if math.isnan(score) else {search["metric"]: score}
                with generators_aside([search["seed"], number]):
                    searchers[name].on_trial_complete(str(number), result, error=result is None)

    def _suggestion(
        self, point: Point, number: int, searcher: Searcher, search: Mapping[str, Any]
    ) -> dict[str, Any] | None:
        """The suggestion of that number: the recorded one, else a new one; None at the end."""
        recorded = self._record.setdefault("suggestions", {}).setdefault(point.name, [])
        with generators_aside([search["seed"], number]):
            suggested = searcher.suggest(str(number))
        if suggested is None or suggested == Searcher.FINISHED:
            return recorded[number] if number < len(recorded) else None
        values = plain(suggested)
        if number == len(recorded):
            recorded.append(values)
        elif recorded[number] != values and not self.notes:
            self.notes.append(
                f"{search['name']} no longer suggests what it did when this sweep began (another "
                "version?): what it suggested counts, and what it suggests from here on differs"
            )
        return recorded[number]

    # Races ------------------------------------------------------------------------------------

    def _race(self, schedule: dict[str, Any]) -> Rounds:
        trials = {
            (point.name, trial.seed): trial
            for point in points_of(self._content)
            for trial in trials_of(self._content, [point])
        }
        race = race_of(schedule, self._content)
        while runs := race.next_runs():
            of_round = [trials[run] for run in runs]
            yield self._to_their_ends(of_round)
            scores = [self.results.judge([trial], schedule) for trial in of_round]
            if all(map(math.isnan, scores)):
                self.results.complain(schedule["metric"], of_round, "schedule")
            for run, score in zip(runs, scores, strict=True):
                race.add(*run, -score if schedule["mode"] == "min" else score)
            self._drop(race, trials, schedule)

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
    if progress.state != "completed":
        return False
    if progress.iteration < progress.last_iteration:
        rows = read_metrics(store.sweep.trial(name).metrics)
        if not progress.trial.config.stop.reached(rows):
            return False
    return store.has_checkpoint(name, progress.iteration)
