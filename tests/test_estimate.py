"""What `sgrl sweep --dry-run` says that a sweep will cost; nothing here depends on real times."""

import copy
import itertools
import os
import re
import time
from types import SimpleNamespace

import pytest
import torch
from sweeps import CONFIG, METHODS, make_experiment
from typer.testing import CliRunner

from sgrl.cli import app
from sgrl.envs.registry import make_vector
from sgrl.reinforce import train
from sgrl.tuning import estimate
from sgrl.tuning.estimate import beside_others, estimate_lines, kinds_of, measure, schedule
from sgrl.tuning.experiment.sections import build_algorithm_config

ENVS = {"num_envs_per_env_runner": {"grid": [2, 4]}}
LR = {"lr": {"grid": [1e-3, 2e-3, 4e-3]}}


@pytest.fixture
def a_second_a_call(monkeypatch):
    """Whatever is measured takes a second."""
    clock = SimpleNamespace(perf_counter=itertools.count().__next__)
    monkeypatch.setattr(estimate, "time", clock)


@pytest.fixture
def updates(monkeypatch):
    """Count updates: what each returned, and the policy as it was before the first."""
    seen = SimpleNamespace(rows=[], policy=None)
    real = estimate.update

    def update(policy, *arguments):
        seen.policy = seen.policy or copy.deepcopy(policy)
        seen.rows.append(real(policy, *arguments))

    monkeypatch.setattr(estimate, "update", update)
    return seen


def test_trials_that_cost_the_same(tmp_path):
    config = CONFIG | {"env_runners": ENVS, "training": LR}
    small = {"policy": "gru", "hidden_size": {"grid": [4, 8]}}
    methods = {"sparse": METHODS["sparsenet_sgprop"], "gru": {"model": small}}
    experiment = make_experiment(tmp_path / "e.yaml", methods, config=config)
    kinds = kinds_of(experiment.trials)
    assert {kind.name: len(kind.trials) for kind in kinds} == {
        "sparse envs=2": 6,
        "sparse envs=4": 6,
        "gru envs=2 hidden_size=4": 6,
        "gru envs=2 hidden_size=8": 6,
        "gru envs=4 hidden_size=4": 6,
        "gru envs=4 hidden_size=8": 6,
    }
    assert sorted(t.name for k in kinds for t in k.trials) == sorted(
        t.name for t in experiment.trials
    )
    assert {kind.iterations for kind in kinds} == {30}


def test_trials_of_several_lengths_are_one_kind(tmp_path):
    stop = {"training_iteration": {"grid": [5, 9]}}
    [kind] = kinds_of(make_experiment(tmp_path / "e.yaml", ["gru"], stop=stop).trials)
    assert (kind.name, kind.iterations) == ("gru", 2 * 5 + 2 * 9)


@pytest.mark.parametrize(
    ("trials", "limit", "expected"),
    [
        ([], None, (0, 0)),
        ([(5, 1)] * 4, None, (10, 2)),
        ([(5, 1)] * 3, 1, (15, 1)),
        ([(5, 2), (3, 1), (3, 1)], None, (8, 2)),
        ([(5, 1), (4, 2), (3, 1)], None, (12, 1)),  # in their order
        ([(5, 0.5)] * 5, 4, (10, 4)),
    ],
)
def test_trials_side_by_side(trials, limit, expected):
    trials = [(seconds, {"CPU": cpus, "GPU": 0}) for seconds, cpus in trials]
    assert schedule(trials, {"CPU": 2, "GPU": 0}, limit) == expected


def test_the_estimate_of_known_seconds(tmp_path, monkeypatch):
    monkeypatch.setattr(estimate, "machine_resources", lambda: {"CPU": 4, "GPU": 0})
    monkeypatch.setattr("os.getloadavg", lambda: (1.23, 4.5, 6.7))
    experiment = make_experiment(
        tmp_path / "e.yaml",
        ["sparsenet_sgprop", "gru", "diverging"],
        concurrency=3,
        num_threads=2,
        stop={"training_iteration": 1000},
    )
    asked = []

    def measured(trial, seconds, others):
        asked.append((trial.method, trial.seed, seconds, others))
        if trial.method == "diverging":
            raise FloatingPointError("the loss is nan")
        return {"sparsenet_sgprop": 3.6, "gru": 0.36}[trial.method]

    assert list(estimate_lines(experiment, measured)) == [
        "estimate, from a few iterations of each on this machine as it is now, a load of 1.2 on 4 "
        "CPUs:",
        "                    s/iteration  trials  core hours",
        "  sparsenet_sgprop          3.6       2         4.0",
        "  gru                      0.36       2        0.40",
        "  diverging         not measured: FloatingPointError: the loss is nan",
        "in all 4.4 core hours, 66 min with 2 at a time, without 2 trials not measured",
    ]
    assert asked == [(method, 0, 3.0, 1) for method in ("sparsenet_sgprop", "gru", "diverging")]


def test_what_the_machine_cannot_hold(tmp_path, monkeypatch):
    monkeypatch.setattr(estimate, "machine_resources", lambda: {"CPU": 4, "GPU": 0})
    experiment = make_experiment(tmp_path / "e.yaml", ["gru"], num_threads=8)
    *_, last = estimate_lines(experiment, pytest.fail)
    assert last == "  gru  not measured: needs 8 CPUs and there are 4"


def test_many_kinds_share_the_time(tmp_path):
    config = CONFIG | {"env_runners": {"num_envs_per_env_runner": {"grid": [*range(1, 41)]}}}
    experiment = make_experiment(tmp_path / "e.yaml", ["gru"], config=config)
    asked = []
    list(estimate_lines(experiment, lambda trial, seconds, others: asked.append(seconds) or 1.0))
    assert asked == [0.5] * 40


def test_the_measured_updates_are_those_of_training(tmp_path, a_second_a_call, updates):
    """Five of them after a first one, where all together may take five seconds."""
    config = CONFIG | {"training": {"lr": 3e-3, "predictor_lr": 2e-3, "entropy_coeff": 0.1}}
    experiment = make_experiment(tmp_path / "e.yaml", ["sparsenet_sgprop"], config=config)
    trial = experiment.trials[1].config
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    assert measure(trial, 6.0) == 1.0
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads
    assert len(updates.rows) == 6

    settings = build_algorithm_config(trial)
    rows = train(
        updates.policy,
        make_vector("labyrinth_escape", 4, CONFIG["environment"]["env_config"]),
        6,
        lr=3e-3,
        predictor_lr=2e-3,
        seed=trial.seed,
        settings=estimate.UpdateSettings(
            gamma=settings.gamma, entropy_coeff=0.1, grad_clip=settings.grad_clip
        ),
    )
    for row, measured in zip(rows, updates.rows, strict=True):
        assert measured.items() <= row.items()


def test_a_slow_first_step_is_the_measurement(tmp_path, a_second_a_call, updates):
    trial = make_experiment(tmp_path / "e.yaml", ["gru"]).trials[0].config
    assert measure(trial, 0.5) == 1.0
    assert len(updates.rows) == 1
    assert measure(trial, 1.0) == 1.0
    assert len(updates.rows) == 1 + 3


def test_the_others_are_gone_when_all_is_measured(tmp_path):
    """Each trains in a process of its own, which says so here."""
    file = tmp_path / "others"

    def step():
        with file.open("a") as lines:
            lines.write(f"{os.getpid()}\n")
        time.sleep(0.01)

    with beside_others(step, 2):
        while not file.exists() or len(set(file.read_text().split())) < 2:
            time.sleep(0.01)
    pids = {int(pid) for pid in file.read_text().split()}
    assert len(pids) == 2
    assert os.getpid() not in pids
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_evaluations_count_as_often_as_they_come(tmp_path, a_second_a_call, updates):
    """Beside the updates, of which an iteration may have several."""
    config = CONFIG | {
        "training": {"total_updates": 15, "total_iterations": 6},
        "evaluation": {"evaluation_interval": 4, "evaluation_duration": 6},
    }
    experiment = make_experiment(
        tmp_path / "e.yaml", ["gru"], config=config, evaluate={"every": 5, "episodes": 3}
    )
    assert measure(experiment.trials[0].config, 0.5) == 15 / 6 + 1 / 4 + 1 / 5
    assert len(updates.rows) == 1


@pytest.mark.parametrize("algorithm", ["PPO", "Reinforce"])
def test_other_processes_and_algorithms(tmp_path, ray_session, a_second_a_call, updates, algorithm):
    """These are built and trained as in a trial."""
    runners = {"num_env_runners": int(algorithm == "Reinforce"), "num_envs_per_env_runner": 2}
    config = CONFIG | {"env_runners": runners, "evaluation": {"evaluation_interval": 4}}
    if algorithm == "PPO":
        config["training"] = {"train_batch_size_per_learner": 20, "minibatch_size": 10}
    evaluate = {"every": 5, "episodes": 3}
    experiment = make_experiment(
        tmp_path / "e.yaml", ["gru"], config=config, algorithm=algorithm, evaluate=evaluate
    )
    assert measure(experiment.trials[0].config, 0.5) == 1 + 1 / 4 + 1 / 5
    assert not updates.rows


def test_the_command_ends_with_it(tmp_path, monkeypatch):
    """Without Ray, and in no folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ray.init", lambda *args, **kwargs: pytest.fail("Ray was started"))
    monkeypatch.setattr(estimate, "SECONDS", 0.0)
    make_experiment(tmp_path / "e.yaml", ["gru"])
    words = ["sweep", "e.yaml", "--dry-run"]
    short = CliRunner().invoke(app, [*words, "--no-estimate"], catch_exceptions=False).output
    assert short == "small: 2 trials\n  gru_seed=0\n  gru_seed=1\n"
    said = CliRunner().invoke(app, words, catch_exceptions=False).output
    assert said.startswith(short)
    _, head, row, total = said.removeprefix(short).splitlines()
    assert head.split() == ["s/iteration", "trials", "core", "hours"]
    assert re.fullmatch(r"  gru +[\d.]+ +2 +[\d.]+", row)
    assert re.fullmatch(r"in all [\d.]+ core hours, \d+ s with 1 at a time", total)
    assert [path.name for path in tmp_path.iterdir()] == ["e.yaml"]
