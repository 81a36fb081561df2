"""Finished sweeps made longer and wider: new iterations, new seeds, new values."""

import shutil
from pathlib import Path

import pandas as pd
import pytest
import yaml
from sweeps import METHODS, SPARSE, make_experiment, make_older, metrics_without_times, summary
from typer.testing import CliRunner

from sgrl.cli import app
from sgrl.results.checkpoints import open_policy
from sgrl.results.metrics import count_rows
from sgrl.results.plan import ExperimentError
from sgrl.results.runs import load_results
from sgrl.tuning import sweep
from sgrl.tuning.experiment.load import extend_experiment, load_experiment
from sgrl.tuning.sweep import resume_sweep, run_sweep

#: A sweep in float64 as the revision before `sgrl.results` left it when it was killed: four rows,
#: and a checkpoint of the second iteration.
OLDER = Path(__file__).parent / "older"
BANDIT = {
    "environment": {"env": "mnist_bandit", "env_config": {"classes": [0, 1, 7]}},
    "env_runners": {"num_envs_per_env_runner": 8},
    "training": {
        "grad_clip": None,
        "two_phase": True,
        "lr": {"grid": [1e-3]},
        # Eight iterations of 1, 3, 3, ... updates, and more at the same spacing after them.
        "total_updates": 22,
        "total_iterations": 8,
    },
    "evaluation": {
        "evaluation_interval": 2,
        "evaluation_duration": 60,
        "evaluation_config": {"num_envs_per_env_runner": 60},
    },
}
BANDITS = {"sparse": {"model": {"policy": "sparse_mlp", "num_layers": 2, **SPARSE}}}


def tree(directory):
    """Every file's content and time, except what any start of a sweep writes."""
    changing = {".lock", "sweep.log"}
    return {
        str(path.relative_to(directory)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in Path(directory).rglob("*")
        if path.is_file() and path.name not in changing
    }


def last_policies(directory):
    return {
        path.parent.parent.parent.name: path.read_bytes()
        for path in Path(directory).glob("*/checkpoints/000009/policy.safetensors")
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory, ray_session):
    """A sweep of five iterations, checkpoints at 2, 4 and its end, one method diverging."""
    folder = tmp_path_factory.mktemp("extend")
    return run_sweep(make_experiment(folder / "small.yaml", tuple(METHODS)), folder)


@pytest.fixture
def copied(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "copied"))


def test_an_extended_sweep_is_the_longer_and_wider_sweep(copied, tmp_path):
    # One trial is unfinished, and one lost its last checkpoint.
    shutil.rmtree(copied / "gru_seed=1" / "checkpoints" / "000005")
    shutil.rmtree(copied / "sparsenet_sgprop_seed=1")
    # Some were started by a version that counted padding as env_steps.
    make_older(copied / "gru_seed=0")
    make_older(copied / "sparsenet_sgprop_seed=0")
    diverged = tree(copied / "diverging_seed=0")
    resume_sweep(copied, 9, ["seeds=2..3"])

    experiment = make_experiment(
        tmp_path / "whole.yaml",
        seeds=[0, 1, 2, 3],
        stop={"training_iteration": 9},
        checkpoint={"every": 3, "keep": 2},
    )
    whole = run_sweep(experiment, tmp_path, "whole")
    expected = metrics_without_times(whole)
    assert set(expected) == {f"{m}_seed={s}" for m in list(METHODS)[:2] for s in range(4)}
    found = metrics_without_times(copied)
    assert {name: found[name] for name in expected} == expected
    policies = last_policies(copied)
    assert {name: policies[name] for name in expected} == last_policies(whole)
    assert set(summary(copied).loc[list(expected), "state"]) == {"completed"}
    # A loss that diverged is left as it is but for the new end in config.yaml.
    after = tree(copied / "diverging_seed=0")
    changed = {name for name in after if after[name] != diverged.get(name)}
    assert changed == {"config.yaml"}
    # The same command again, as after an interruption, finds nothing left to do.
    before = tree(copied)
    plan = CliRunner().invoke(
        app, ["resume", str(copied), "--iterations", "9", "--add", "seeds=[2,3]", "--dry-run"]
    )
    assert plan.output == f"{copied}: 12 trials, 0 to run\n"
    assert tree(copied) == before


def test_a_sweep_of_an_older_revision_is_read_and_goes_on(tmp_path, ray_session):
    directory = Path(shutil.copytree(OLDER, tmp_path / "older"))
    (trial,) = load_results(directory).trials.to_dict("records")
    assert (trial["state"], trial["iterations"]) == ("interrupted", 4)
    policy, environment = open_policy(directory / trial["trial"] / "checkpoints" / "000002")
    assert (policy.name, environment["env"]) == ("sparsenet", "labyrinth_escape")
    resume_sweep(directory)
    before, after = (
        pd.read_csv(folder / trial["trial"] / "metrics.csv").drop(columns="iteration_seconds")
        for folder in (OLDER, directory)
    )
    # On every processor: rounding errors of two iterations in double precision are small.
    pd.testing.assert_frame_equal(after, before, rtol=1e-9, atol=0)


def test_an_older_sweep_that_tells_too_little_is_refused(copied):
    """In one line, before anything is started."""
    trial = copied / "gru_seed=0"
    make_older(trial)
    path = trial / "metrics.csv"
    lines = path.read_text().splitlines()
    column = lines[0].split(",").index("episode_length_mean")
    fields = lines[2].split(",")
    lines[2] = ",".join([*fields[:column], "", *fields[column + 1 :]])
    path.write_text("\n".join(lines) + "\n")
    for command in (["resume", str(copied)], ["status", str(copied)], ["report", str(copied)]):
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 2
        (said,) = result.output.splitlines()
        assert f"{path} is of an older version" in said
        assert "move this trial out of the results" in said


def test_added_trials_leave_the_finished_ones_alone(copied, monkeypatch):
    before = tree(copied)
    options = ["--add", "seeds=7", "--dry-run"]
    plan = CliRunner().invoke(app, ["resume", str(copied), *options])
    assert plan.output == (
        f"{copied}: 9 trials, 3 to run\n"
        "  sparsenet_sgprop_seed=7: from 0 to 5\n"
        "  gru_seed=7: from 0 to 5\n"
        "  diverging_seed=7: from 0 to 5\n"
    )
    assert tree(copied) == before
    started = []
    monkeypatch.setattr(sweep, "_run_trials", lambda d, e, course, legs, *_: started.extend(legs))
    with pytest.raises(KeyboardInterrupt):  # nothing was run, so the sweep is not over
        resume_sweep(copied, additions=["seeds=7"])
    assert [leg.trial.name for leg in started] == [
        f"{method}_seed=7" for method in ("sparsenet_sgprop", "gru", "diverging")
    ]
    after = tree(copied)
    old = {name for name in before if "/" in name}
    assert {name: after[name] for name in old} == {name: before[name] for name in old}
    assert load_experiment(copied / "experiment.yaml").resolved["seeds"] == [0, 1, 7]


def test_evaluation_points_go_on_at_their_spacing(tmp_path, ray_session):
    """An iteration count and a grid value more, where updates are spread over iterations."""
    changes = {"config": BANDIT, "methods": BANDITS, "seeds": [0]}
    stop = {"training_iteration": 5}
    directory = run_sweep(make_experiment(tmp_path / "b.yaml", **changes, stop=stop), tmp_path)
    resume_sweep(directory, 11, ["config.training.lr=[4e-3]"])

    training = BANDIT["training"] | {"lr": {"grid": [1e-3, 4e-3]}}
    changes["config"] = BANDIT | {"training": training}
    experiment = make_experiment(
        tmp_path / "w.yaml", **changes, stop={"training_iteration": 11}, name="whole"
    )
    whole = run_sweep(experiment, tmp_path)
    expected = metrics_without_times(whole)
    assert list(map(len, expected.values())) == [12, 12]
    assert metrics_without_times(directory) == expected
    updates = [int(row.split(b",")[1]) // 8 for row in expected["sparse_lr=0.001_seed=0"][1:]]
    assert updates == [int(1 + 3 * i) for i in range(11)]


@pytest.fixture
def grids(tmp_path):
    """An experiment file that sweeps a base value, a method's value and lists."""
    path = tmp_path / "grids.yaml"
    gru = METHODS["gru"]["model"]
    make_experiment(
        path,
        {
            "gru": {"model": gru},
            "own": {"model": gru, "config": {"training": {"lr": {"grid": [3e-3]}}}},
        },
        config={
            "environment": {
                "env": "labyrinth_escape",
                "env_config": {"maze_dims": {"grid": [[6, 6], [8, 8]]}},
            },
            "training": {"lr": {"grid": [1e-3, 2e-3]}},
        },
        seeds=[0],
    )
    return path


def names(experiment):
    return [trial.name for trial in experiment.trials]


@pytest.mark.parametrize(
    ("additions", "more"),
    [
        (["seeds=1"], ["gru_maze_dims=6x6_lr=0.001_seed=1"]),
        (["seeds=0..2"], ["own_maze_dims=8x8_lr=0.003_seed=2"]),
        (["config.training.lr=5e-3"], ["gru_maze_dims=6x6_lr=0.005_seed=0"]),
        (["methods.own.config.training.lr=[5e-3]"], ["own_maze_dims=8x8_lr=0.005_seed=0"]),
        (
            ["config.environment.env_config.maze_dims=[10, 10]", "seeds=[0, 3]"],
            ["own_maze_dims=10x10_lr=0.003_seed=3"],
        ),
        (["config.environment.env_config.maze_dims=[[10, 10]]"], ["gru_maze_dims=10x10_lr="]),
        (["seeds=0", "config.training.lr=[2e-3, 1e-3]"], []),
    ],
)
def test_every_trial_keeps_its_name(grids, additions, more):
    before = load_experiment(grids)
    after = extend_experiment(grids, additions=additions)
    assert set(names(before)) <= set(names(after))
    assert (len(names(after)) > len(names(before))) == bool(more)
    for name in more:
        assert any(found.startswith(name) for found in set(names(after)) - set(names(before)))
    configs = {trial.name: trial for trial in after.trials}
    assert [configs[trial.name] for trial in before.trials] == before.trials
    # Asked for again, nothing changes.
    grids.write_text(yaml.safe_dump(after.resolved, sort_keys=False))
    assert extend_experiment(grids, additions=additions) == load_experiment(grids)


@pytest.mark.parametrize(
    ("iterations", "addition", "message"),
    [
        (None, "seeds", "--add seeds: expected KEY=VALUES"),
        (None, "seeds=", "--add seeds: seeds: no value given"),
        (None, "seeds=[]", "--add seeds: seeds: no value given"),
        (None, "seeds=9..4", "9..4 is no range"),
        (None, "seeds=0..99999999999", "is no range"),
        (None, "seeds=[3, 3]", "3 is given twice"),
        (None, "seeds=many", "expected a whole number, got 'many'"),
        (None, "seeds=[", "--add seeds: seeds: "),
        (None, "config.training.lr=-1", "--add config.training.lr: config.training.lr: must be"),
        (None, "config.training.gamma=0.9", "gamma: not swept here (seeds, config.environment"),
        (None, "config.training.gamma=0.9", "--name NAME --set config.training.gamma=VALUE"),
        (None, "config.trainin.lr=1", "config.trainin.lr: not swept here"),
        (None, "config..lr=1", "config..lr: not swept here"),
        (0, "seeds=1", "stop.training_iteration: must be at least 1"),
    ],
)
def test_what_cannot_be_added_is_refused(grids, iterations, addition, message):
    with pytest.raises(ExperimentError) as error:
        extend_experiment(grids, iterations, [addition])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_values_that_no_method_takes_are_refused(grids):
    experiment = load_experiment(grids, ["methods.gru.config.training.lr=1e-3"])
    grids.write_text(yaml.safe_dump(experiment.resolved, sort_keys=False))
    with pytest.raises(ExperimentError, match=r"lr: every method sets this itself"):
        extend_experiment(grids, additions=["config.training.lr=5e-3"])


def test_iterations_that_are_swept_are_refused(grids):
    experiment = load_experiment(grids, ["stop.training_iteration={grid: [2, 3]}"])
    grids.write_text(yaml.safe_dump(experiment.resolved, sort_keys=False))
    with pytest.raises(ExperimentError, match=r"stop\.training_iteration: is swept"):
        extend_experiment(grids, 9)
    assert len(names(extend_experiment(grids, additions=["stop.training_iteration=9"]))) > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--iterations", "4"], "has trained for 5 iterations already: --iterations must be at"),
        (["--add", "config.training.gamma=0.9"], "not swept here"),
        (["--add", "config.training.lr=1", "--dry-run"], "not swept here"),
        (["--iterations", "4", "--dry-run"], "--iterations must be at least 5"),
    ],
)
def test_a_refused_extension_changes_nothing(copied, monkeypatch, options, message):
    monkeypatch.setattr(sweep, "_run", None)
    before = tree(copied)
    result = CliRunner().invoke(app, ["resume", str(copied), *options])
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert tree(copied) == before


def test_an_end_moved_nearer_needs_no_more_than_was_trained(copied):
    assert count_rows(copied / "gru_seed=0" / "metrics.csv") == 5
    assert extend_experiment(copied / "experiment.yaml", 5).trials
    resume_sweep(copied, 5)
    assert "training_iteration: 5" in (copied / "experiment.yaml").read_text()
