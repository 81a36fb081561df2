"""Population-based training: the worse trials of a population go on from the better ones.

A population is the trials of one method with one seed. After every `perturbation_interval`
iterations the worst ones take over weights and settings of the best ones, and train on with other
values, as Tune's `PopulationBasedTraining` has it with `synch: true`. Sources: Jaderberg et al.,
Population based training of neural networks, 2017.
"""

import dataclasses
import math
import random
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.schedulers.pbt import _explore

from sgrl.files import read_json, write_json
from sgrl.reinforce.generators import generators_aside
from sgrl.results.checkpoints import MANIFEST, write_checkpoint
from sgrl.results.folder import SweepFolder
from sgrl.results.metrics import final_of
from sgrl.results.plan import Trial, TrialConfig
from sgrl.tuning.experiment.searches import plain
from sgrl.tuning.rounds import Configuration, Leg, Results, Rounds

#: Of a trial: where it went on from, as in {"iteration": 50, "trial": "gru_lr=0.01_seed=0",
#: "values": {"config.training.lr": 0.012}}.
Origin = dict[str, Any]


class Population:
    """Rounds of a population, or of several that have nothing to do with each other.

    Args:
        results: of the sweep's trials.
        schedule: the section, with all defaults.
        origins: of each trial that took over another one's weights, by its name, in order; what is
            decided is added.
    """

    def __init__(
        self, results: Results, schedule: Mapping[str, Any], origins: dict[str, list[Origin]]
    ) -> None:
        self.results, self.schedule, self.origins = results, schedule, origins
        self.mutations = {
            key: values if isinstance(values, list) else _domain(values)
            for key, values in schedule["hyperparam_mutations"].items()
        }

    def rounds(self, configurations: Sequence[Configuration]) -> Rounds:
        """Train all trials to their ends."""
        trials = [trial for configuration in configurations for trial in configuration.trials]
        last = max(configuration.last_iteration for configuration in configurations)
        groups: dict[tuple[str, int], list[Trial]] = {}
        for trial in trials:
            groups.setdefault((trial.method, trial.seed), []).append(trial)
        interval = int(self.schedule["perturbation_interval"])
        for start in range(0, last, interval):
            end = min(start + interval, last)
            yield [
                Leg(trial, min(end, trial.config.stop.training_iteration))
                for trial in trials
                if trial.config.stop.training_iteration > start
                and (start == 0 or not self.results.has_failed(trial))
            ]
            if self.schedule["burn_in_period"] <= end < last:
                for number, group in enumerate(groups.values()):
                    self._exploit(group, start, end, number)

    def _exploit(self, trials: Sequence[Trial], start: int, end: int, number: int) -> None:
        """Have the worst ones go on from the best ones, unless that is decided already."""
        if any(o["iteration"] == end for t in trials for o in self.origins.get(t.name, ())):
            return
        scores = {}
        for trial in trials:
            rows = self.results.rows(trial)
            if len(rows) >= end and not self.results.has_failed(trial):
                score = final_of(rows[start:end], self.schedule["metric"])
                scores[trial.name] = -score if self.schedule["mode"] == "min" else score
        known = {trial.name: trial for trial in trials}
        ranked = sorted(
            (name for name in scores if not math.isnan(scores[name])), key=lambda n: scores[n]
        )
        if not ranked:
            self.results.complain(self.schedule["metric"], trials, "schedule")
        count = math.ceil(len(ranked) * self.schedule["quantile_fraction"])
        count = min(count, len(ranked) // 2)
        before = {name: self._values(known[name]) for name in ranked}
        with generators_aside([trials[0].seed, number, end]):
            for name in ranked[:count]:
                donor = random.choice(ranked[len(ranked) - count :])
                values, _operations = _explore(
                    before[donor],
                    self.mutations,
                    self.schedule["resample_probability"],
                    tuple(self.schedule["perturbation_factors"]),
                    None,
                )
                origin = {"iteration": end, "trial": donor, "values": plain(values)}
                self.origins.setdefault(name, []).append(origin)

    def _values(self, trial: Trial) -> dict[str, Any]:
        """The settings that may change, as a trial has them now."""
        if origins := self.origins.get(trial.name):
            return dict(origins[-1]["values"])
        training = trial.config.sections["training"]
        return {key: training[key.rpartition(".")[2]] for key in self.mutations}


def hand_over(sweep: SweepFolder, origins: Mapping[str, Sequence[Origin]], keep: int) -> None:
    """Give trials the checkpoints that they go on from, as far as they do not have them.

    No trial of the next round may have begun. Each trial's own file says last what it was given.

    Args:
        sweep: its folder.
        origins: of each trial, by its name.
        keep: checkpoints that stay.
    """
    for name, all_of_them in origins.items():
        folder = sweep.trial(name)
        given = read_json(folder.origins) or []
        for origin in all_of_them[len(given) :]:
            checkpoint = sweep.trial(origin["trial"]).checkpoint(origin["iteration"])

            def save(directory: Path, checkpoint: Path = checkpoint) -> None:
                without = shutil.ignore_patterns(MANIFEST)
                shutil.copytree(checkpoint, directory, ignore=without, dirs_exist_ok=True)

            write_checkpoint(folder.checkpoints, origin["iteration"], save, keep=keep)
            given = [*given, origin]
            write_json(folder.origins, given)


def with_values(config: TrialConfig, values: Mapping[str, Any]) -> TrialConfig:
    """Return what a trial is trained with under other values of `training`, by their keys."""
    training = {key.rpartition(".")[2]: value for key, value in values.items()}
    sections = {**config.sections, "training": {**config.sections["training"], **training}}
    return dataclasses.replace(config, sections=sections)


def _domain(distribution: Mapping[str, Any]) -> Any:
    ((name, values),) = distribution.items()
    return tune.choice(values) if name == "choice" else getattr(tune, name)(*values)
