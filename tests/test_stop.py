"""Trials that are complete before their last iteration."""

import math

import pytest
from stand_ins import TWO, stand_in_runner
from sweeps import make_experiment, metrics_without_times, summary

from sgrl.results.checkpoints import list_checkpoints
from sgrl.results.folder import SweepFolder
from sgrl.results.plan import ExperimentError, Stop
from sgrl.results.runs import load_results
from sgrl.tuning import sweep
from sgrl.tuning.sweep import resume_plan, resume_sweep, run_sweep


def rows(**columns):
    return [
        {"iteration_seconds": 1800.0} | dict(zip(columns, values, strict=True))
        for values in zip(*columns.values(), strict=True)
    ]


def test_what_a_trial_has_reached():
    stop = Stop(9, env_steps=20, episode_return_mean=0.5, hours=1.5)
    assert stop.reached([]) == ""
    nothing = rows(env_steps=[10, 19], episode_return_mean=[0.7, math.nan])
    assert stop.reached(nothing) == ""  # the last row counts
    assert stop.reached(nothing[:1]) == "episode_return_mean 0.7 (at least 0.5)"
    assert stop.reached(rows(env_steps=[10, 20])) == "env_steps 20 (at least 20)"
    assert stop.reached(rows(env_steps=[1, 2, 3])) == "1.5 hours (at least 1.5)"
    assert Stop(9).reached(rows(env_steps=[1e9])) == ""


def test_a_trial_ends_where_it_would_have_ended(tmp_path, ray_session, monkeypatch):
    monkeypatch.setattr(sweep, "TrialRunner", stand_in_runner())
    stop = {"training_iteration": 9, "env_steps": 45}  # a stand-in takes 10 an iteration
    experiment = make_experiment(tmp_path / "short.yaml", TWO, seeds=[0], stop=stop)
    directory = run_sweep(experiment, tmp_path)
    whole, results = metrics_without_times(directory), summary(directory)
    assert results["state"].tolist() == ["completed"] * 2
    assert results["iterations"].tolist() == [5, 5]
    assert results["reason"].tolist() == ["env_steps 50 (at least 45)"] * 2
    assert load_results(directory).problems == ()
    assert resume_plan(directory)[1] == []
    for trial in experiment.trials:
        folder = SweepFolder(directory).trial(trial.name)
        assert int(list_checkpoints(folder.checkpoints)[-1].name) == 5
        folder.write_status(state="running")  # killed before it could say so
    resume_sweep(directory)
    assert metrics_without_times(directory) == whole
    assert summary(directory)["state"].tolist() == ["completed"] * 2


@pytest.mark.parametrize(
    ("stop", "message"),
    [
        ({"env_step": 10}, "stop.env_step: unknown key; did you mean 'env_steps'?"),
        ({"hours": 0}, "stop.hours: must be greater than 0, got 0"),
        ({"env_steps": 2.5}, "stop.env_steps: expected a whole number, got 2.5"),
    ],
)
def test_mistakes(tmp_path, stop, message):
    with pytest.raises(ExperimentError, match=message.replace("?", r"\?")):
        make_experiment(tmp_path / "bad.yaml", TWO, stop={"training_iteration": 3} | stop)


def test_a_schedule_ends_trials_by_itself(tmp_path):
    with pytest.raises(ExperimentError, match=r"stop\.hours: asha ends trials by their iterations"):
        make_experiment(
            tmp_path / "bad.yaml",
            TWO,
            stop={"training_iteration": 3, "hours": 1.0},
            schedule={"name": "asha"},
        )
