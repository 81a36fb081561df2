"""Sweeps in which results decide on what is trained, with stand-ins for algorithms."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from stand_ins import stand_in_runner, success_rates
from sweeps import METHODS, make_experiment, metrics_without_times, summary

from sgrl.results.plan import ExperimentError
from sgrl.results.runs import load_results
from sgrl.results.status import sweep_status
from sgrl.tuning import sweep
from sgrl.tuning.experiment.load import load_experiment
from sgrl.tuning.racing import Race
from sgrl.tuning.sweep import resume_plan, resume_sweep, run_sweep

TWO = {
    "gru": {"model": {"policy": "gru", "hidden_size": 8}},
    "lstm": {"model": {"policy": "lstm", "hidden_size": 8}},
}


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch):
    monkeypatch.setattr(sweep, "TrialRunner", stand_in_runner())


def states(directory):
    return {row.trial.name: row.state for row in sweep_status(directory).rows}


# Races ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def raced(tmp_path_factory, ray_session):
    """A race of a good and a bad method."""
    folder = tmp_path_factory.mktemp("race")
    experiment = make_experiment(
        folder / "race.yaml",
        TWO,
        name="race",
        seeds="0..19",
        schedule={"name": "race", "first": 4, "every": 2},
        concurrency="auto",
    )
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sweep, "TrialRunner", stand_in_runner())
        return experiment, run_sweep(experiment, folder / "results")


def test_a_sweep_runs_what_the_race_alone_asks_for(raced, capsys):
    experiment, directory = raced
    scores = {
        (trial.method, trial.seed): np.mean(success_rates(trial)) for trial in experiment.trials
    }
    race, runs = Race(["gru", "lstm"], range(20), first=4, every=2), set()
    while asked := race.next_runs():
        runs |= set(asked)
        for run in asked:
            race.add(*run, scores[run])
    assert race.racing == ["gru"]
    # At least 30% fewer than the grid.
    assert len(runs) <= 0.7 * len(scores)
    table = summary(directory)
    expected = {
        f"{method}_seed={seed}": "completed" if (method, seed) in runs else "skipped"
        for method, seed in scores
    }
    assert table["state"].to_dict() == expected == states(directory)
    assert set(metrics_without_times(directory)) == {
        name for name, state in expected.items() if state == "completed"
    }
    stopped = race.out["lstm"]
    reasons = set(table["reason"][table["state"] == "skipped"])
    assert reasons == {
        "race: the last one left",
        f"race: worse than gru by {stopped.difference:.3g}, {stopped.seeds} seeds, "
        f"p = {stopped.p:.2g}",
    }


def test_skipped_trials_are_none_that_lack(raced):
    _, directory = raced
    results = load_results(directory)
    assert results.problems == ()
    assert set(results.trials["state"]) == {"completed", "skipped"}
    status = sweep_status(directory)
    assert status.problems == status.lines == []
    counts = status.as_dict()["counts"]
    assert counts["completed"] + counts["skipped"] == 40
    assert all(row.is_over for row in status.rows)


def test_a_race_goes_on_from_wherever_it_was(raced, tmp_path, monkeypatch):
    _, directory = raced
    whole, decided = metrics_without_times(directory), states(directory)
    _, todo = resume_plan(directory)
    assert todo == []
    monkeypatch.setattr(sweep, "_run_trials", None)
    assert resume_sweep(directory) == directory
    monkeypatch.undo()
    monkeypatch.setattr(sweep, "TrialRunner", stand_in_runner())

    # As it was in the second round, where one run had not begun and another had half ended.
    back = Path(shutil.copytree(directory, tmp_path / "back"))
    for trial in back.glob("*_seed=*"):
        if int(trial.name.partition("=")[2]) > 5 or trial.name == "gru_seed=5":
            shutil.rmtree(trial)
    (back / "rounds.json").write_text('{"over": 1}')
    half = back / "lstm_seed=5"
    (half / "status.json").write_text('{"state": "running", "notes": []}')
    shutil.rmtree(half / "checkpoints" / "000005")
    before = {path: path.read_bytes() for path in back.rglob("*") if path.is_file()}
    trials, todo = resume_plan(back)
    assert len(trials) == 40
    assert [(row.trial.name, row.iteration, end) for row, end in todo] == [
        ("gru_seed=5", 0, 5),
        ("lstm_seed=5", 4, 5),
    ]
    assert before == {path: path.read_bytes() for path in before}
    resume_sweep(back)
    assert metrics_without_times(back) == whole
    assert states(back) == decided
    assert json.loads((back / "rounds.json").read_text())["over"] > 1


def test_a_failure_that_has_been_decided_by_stays_one(raced, tmp_path, monkeypatch):
    _, directory = raced
    copied = Path(shutil.copytree(directory, tmp_path / "copied"))
    status = {"state": "failed", "reason": "out of memory", "notes": []}
    (copied / "gru_seed=0" / "status.json").write_text(json.dumps(status))
    _, todo = resume_plan(copied)
    assert "gru_seed=0" not in {row.trial.name for row, _ in todo}


def test_a_race_cannot_be_changed_but_for_its_seeds(raced):
    _, directory = raced
    trials, _ = resume_plan(directory, additions=["seeds=20..24"])
    assert len(trials) == 50
    with pytest.raises(ExperimentError, match="the race has decided by what there is so far"):
        resume_plan(directory, iterations=9)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ({"name": "rase"}, "schedule.name: unknown schedule 'rase'; did you mean 'race'?"),
        ({"error_rate": 0.1}, "schedule.name: missing; one of race"),
        ({"name": "race", "errorrate": 0.1}, "schedule.errorrate: unknown key; did you mean 'er"),
        ({"name": "race", "error_rate": 2}, "schedule: error_rate 2 is not between 0 and 1"),
        ({"name": "race", "first": "5"}, "schedule.first: expected a whole number, got '5'"),
        ({"name": "race", "first": 2}, "schedule.first: must be less than the number of seeds, 2"),
        ({"name": "race", "mode": "maximum"}, "schedule.mode: unknown mode 'maximum'; did you me"),
        ({"name": "race", "metric": "sucess_rate"}, "did you mean 'success_rate'?"),
        ({"name": "race", "metric": "episode_return_mean"}, "schedule.bounds: missing: between wh"),
        ({"name": "race", "metric": "eval_success_rate"}, "takes evaluations: set evaluate, too"),
    ],
)
def test_mistakes_in_a_schedule(tmp_path, schedule, message):
    with pytest.raises(ExperimentError) as error:
        make_experiment(tmp_path / "small.yaml", TWO, schedule=schedule)
    (line,) = str(error.value).splitlines()
    assert message in line


def test_a_race_takes_two(tmp_path):
    with pytest.raises(ExperimentError, match="takes at least two methods or values of a grid"):
        make_experiment(tmp_path / "small.yaml", ("gru",), seeds="0..9", schedule={"name": "race"})


def test_without_a_schedule_there_is_none_in_the_folder(tmp_path):
    make_experiment(tmp_path / "small.yaml", {"gru": METHODS["gru"]})
    assert "schedule" not in load_experiment(tmp_path / "small.yaml").resolved
