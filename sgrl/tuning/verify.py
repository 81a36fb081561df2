"""Check an archive by training some of its trials again.

On the kind of processor, with the versions, the threads and the build of the compiled core that a
trial was trained with, every number must come out the same. Elsewhere single precision rounds
differently: rows agree closely at first, until an action differs and the runs part.
"""

import dataclasses
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from sgrl.names import did_you_mean
from sgrl.results.archive import ArchivedTrial, ArchiveError, in_archive, read_archive
from sgrl.results.folder import SweepFolder
from sgrl.results.metrics import Row, read_metrics
from sgrl.results.plan import Trial
from sgrl.results.provenance import describe, what_rounds_otherwise
from sgrl.results.storage import is_archive
from sgrl.tuning.experiment.load import load_experiment
from sgrl.tuning.experiment.method import as_recorded, asks_for_gpus
from sgrl.tuning.sweep import run_sweep

#: Algorithms of which no run repeats, see docs/rllib.md.
NEVER_REPEAT = {"APPO", "IMPALA"}
#: Columns that differ from run to run.
TIMES = {"iteration_seconds"}
#: Elsewhere, so many iterations must agree ...
ROUNDED_ITERATIONS = 3
#: ... to this share of the column's largest value.
ROUNDING = 1e-3


class Verdict(NamedTuple):
    """What training a trial again showed.

    Attributes:
        trial: its name.
        passed: whether its rows are those of the archive, as far as they must be.
        text: in one line.
    """

    trial: str
    passed: bool
    text: str


def verify_archive(
    archive: Path,
    results: Path,
    trials: int = 3,
    iterations: int = 20,
    seed: int = 0,
    names: Sequence[str] = (),
) -> list[Verdict]:
    """Train trials of an archive again, chosen at random or by name, and compare their rows.

    Args:
        archive: its folder.
        results: an empty folder for the sweep that trains them.
        trials: how many, at most.
        iterations: of each, at most.
        seed: of the choice.
        names: trials to take instead.

    Returns:
        One verdict a trial.

    Raises:
        ArchiveError: the archive cannot be read or has no such trial, or its algorithm never
            repeats.
        ExperimentError, SweepError: its trials cannot be run here.
    """
    plan = SweepFolder(archive).experiment
    if is_archive(archive) and not plan.is_file():
        raise ArchiveError(
            f"{archive} holds no {plan.name}, as results of a Tuner script do not: what its trials "
            "would be trained with again is not known"
        )
    experiment = load_experiment(plan, name="verify", track="none", begun=True)
    if experiment.file.algorithm in NEVER_REPEAT:
        raise ArchiveError(
            f"{archive}: no run of {experiment.resolved['algorithm']} repeats (it learns in a "
            "thread of its own), so there is nothing to compare"
        )
    if (experiment.file.schedule or {}).get("name") == "pbt":
        raise ArchiveError(
            f"{archive}: its trials took over each other's weights, so none repeats by itself"
        )
    archived = [trial for trial in read_archive(archive) if trial.rows]
    by_name = {trial.name: trial for trial in archived}
    if unknown := next((name for name in names if name not in by_name), None):
        raise ArchiveError(f"{archive}: no trial {unknown}; {did_you_mean(unknown, by_name)}")
    chosen = random.Random(seed).sample(archived, min(trials, len(archived)))
    chosen = [by_name[name] for name in names] or chosen
    again = [_shortened(trial, min(iterations, len(trial.rows))) for trial in chosen]
    # Whatever decided on them then, these are trained now.
    changes = {"stop": {"training_iteration": iterations}, "search": None, "schedule": None}
    file = experiment.file.model_copy(update=changes)
    experiment = dataclasses.replace(experiment, trials=again, examples=again, file=file)
    sweep = SweepFolder(run_sweep(experiment, results))
    here = describe()
    verdicts = []
    for trial in chosen:
        rows = read_metrics(sweep.trial(trial.name).metrics)
        expected = min(iterations, len(trial.rows))
        on_gpus = asks_for_gpus(trial.config["config"]) is True
        compiled = trial.config["model"].get("backend") in ("native", "auto") and not on_gpus
        exact = bool(trial.starts) and not any(
            what_rounds_otherwise(start, here, compiled, on_gpus) for start in trial.starts
        )
        verdicts.append(compare_rows(trial.name, trial.rows[:expected], rows, exact))
    return verdicts


def _shortened(trial: ArchivedTrial, iterations: int) -> Trial:
    model = as_recorded(trial.config["model"])
    changes = {"model": model, "stop": {"training_iteration": iterations}}
    return Trial.from_dict(trial.config | changes)


def compare_rows(trial: str, archived: Sequence[Row], again: Sequence[Row], exact: bool) -> Verdict:
    """Compare rows in the precision of the archive.

    Args:
        trial: name in the verdict.
        archived: rows of the archive.
        again: rows of the trial as trained again.
        exact: whether all must be equal; otherwise `ROUNDED_ITERATIONS` must agree closely.
    """
    if len(again) < len(archived):
        return Verdict(trial, False, f"{trial}: stopped after iteration {len(again)}")
    columns = dict.fromkeys(name for row in archived for name in row)
    largest = {
        name: max(
            (abs(value) for row in archived if (value := row.get(name, 0)) == value), default=0
        )
        for name in columns
    }
    for iteration, (before, now) in enumerate(zip(archived, again, strict=False), start=1):
        for column in columns:
            one = before.get(column, math.nan)
            other = in_archive(column, now.get(column, math.nan))
            if column in TIMES or one == other or (math.isnan(one) and math.isnan(other)):
                continue
            where = f"{column} at iteration {iteration} is {other:.9g}, archived is {one:.9g}"
            if exact:
                return Verdict(trial, False, f"{trial}: {where}")
            close = abs(one - other) <= ROUNDING * largest[column]
            if not close and iteration <= ROUNDED_ITERATIONS:
                return Verdict(trial, False, f"{trial}: {where}: more than rounding explains")
            if not close:
                text = f"{trial}: equal but for rounding before iteration {iteration}"
                return Verdict(trial, True, f"{text}, where rounding separates the runs ({where})")
    how = "equal" if exact else "equal but for rounding"
    return Verdict(trial, True, f"{trial}: {len(archived)} iterations {how}")
