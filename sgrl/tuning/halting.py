"""Stopping early: schedulers of Tune's, told of configurations round by round."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ray.tune.schedulers import TrialScheduler

from sgrl.reinforce.generators import generators_aside
from sgrl.tuning.experiment.schedules import scheduler_of
from sgrl.tuning.rounds import JUDGES, Configuration, Decide, Leg, Results, Rounds


@dataclass(frozen=True)
class _TuneTrial:
    """What Tune's schedulers see of a trial: here a configuration."""

    trial_id: str


class _TuneController:
    """What they see of the sweep: nothing else runs."""

    def get_live_trials(self) -> list[Any]:
        return []


@dataclass
class Halting:
    """Rounds of some iterations each, after which a scheduler of Tune's may stop configurations.

    It is told of every iteration, as Tune would tell it, and of each iteration beginning with
    another configuration, so that none is always the first.
    """

    results: Results
    decide: Decide
    schedule: dict[str, Any]
    search: dict[str, Any] | None
    told: int = 0
    scheduler: Any = field(init=False)

    def __post_init__(self) -> None:
        self.scheduler = scheduler_of(self.schedule)

    def rounds(self, configurations: Sequence[Configuration]) -> Rounds:
        """Train configurations until they are complete or stopped."""
        for configuration in configurations:
            # Brackets are drawn at random.
            with generators_aside([self.told]):
                self.scheduler.on_trial_add(_TuneController(), _TuneTrial(configuration.name))
            self.told += 1
        live, end = list(configurations), 0
        while live:
            start, end = end, end + self.schedule["every"]
            yield [
                Leg(trial, min(end, configuration.last_iteration))
                for configuration in live
                for trial in configuration.trials
            ]
            live = self._judge(live, start, end)

    def _judge(self, live: list[Configuration], start: int, end: int) -> list[Configuration]:
        """Tell the scheduler of some iterations; return what is trained on."""
        curves = {c.name: self._curve(c) for c in live}
        if not any(map(len, curves.values())):
            trials = [trial for c in live for trial in c.trials]
            self.results.complain(self.schedule["metric"], trials, "schedule")
        stopped: dict[str, str] = {
            c.name: "another seed failed" for c in live if not self._is_sound(c)
        }
        for iteration in range(start + 1, end + 1):
            turn = iteration % len(live)
            for configuration in (*live[turn:], *live[:turn]):
                name = configuration.name
                value = curves[name].get(iteration)
                if (
                    name not in stopped
                    and value is not None
                    and self._stops(name, iteration, value)
                ):
                    metric = self.schedule["metric"]
                    stopped[name] = f"{metric} {value:.3g} at iteration {iteration}"
        for configuration in live:
            if configuration.name in stopped and end < configuration.last_iteration:
                for trial in configuration.trials:
                    if not self.results.has_failed(trial):
                        reason = f"{self.schedule['name']}: {stopped[configuration.name]}"
                        self.decide(trial, "stopped", reason)
        return [c for c in live if c.name not in stopped and end < c.last_iteration]

    def _stops(self, name: str, iteration: int, value: float) -> bool:
        result = {"iteration": iteration, self.schedule["metric"]: value}
        decision = self.scheduler.on_trial_result(_TuneController(), _TuneTrial(name), result)
        return decision == TrialScheduler.STOP

    def _is_sound(self, configuration: Configuration) -> bool:
        return not any(map(self.results.has_failed, configuration.trials))

    def _curve(self, configuration: Configuration) -> dict[int, float]:
        """The judgement on the seeds at each iteration at which all of them have the metric."""
        metric, judge = self.schedule["metric"], JUDGES[(self.search or {}).get("judge", "mean")]
        seeds = [
            [row.get(metric, math.nan) for row in self.results.rows(trial)]
            for trial in configuration.trials
        ]
        values = {i: list(at) for i, at in enumerate(zip(*seeds, strict=False), 1)}
        return {i: judge(at) for i, at in values.items() if not any(map(math.isnan, at))}
