"""Evaluation apart from training: it changes nothing, and says what `sgrl evaluate` says."""

import random
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from sweeps import make_experiment, metrics_without_times
from typer.testing import CliRunner

from sgrl.analysis.figures import write_figures
from sgrl.cli import app
from sgrl.nn.registry import make_policy, save_policy
from sgrl.results.checkpoints import open_policy
from sgrl.results.evaluation import evaluate, play
from sgrl.results.metrics import EVALUATION_COLUMNS
from sgrl.results.plan import ExperimentError
from sgrl.results.rllib_metrics import metrics_row
from sgrl.results.runs import load_results
from sgrl.tuning.evaluation import Evaluation
from sgrl.tuning.experiment.sections import build_algorithm_config
from sgrl.tuning.sweep import resume_sweep, run_sweep

pytestmark = pytest.mark.filterwarnings("ignore:.*Overriding environment rllib-:UserWarning")

GRU = {"policy": "gru", "feature_size": 8, "embedding_size": 8, "hidden_size": 8}
SPARSE = {
    "policy": "sparsenet",
    "num_neurons": 12,
    "neuron_size": 2,
    "num_parents": 2,
    "num_slots": 2,
    "num_input_neurons": 4,
}
PPO = {
    "env_runners": {
        "num_env_runners": 0,
        "num_envs_per_env_runner": 2,
        "batch_mode": "complete_episodes",
    },
    "training": {"train_batch_size_per_learner": 24, "minibatch_size": 13, "num_epochs": 2},
}
LABYRINTH = {"env": "labyrinth_escape", "env_config": {"episode_length": 12}}


class Noise(gym.Env):
    """Rewards are drawn from the generators that the process shares."""

    observation_space = gym.spaces.Box(-1, 1, (3,))
    action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        return self._observation(), {}

    def step(self, action: int) -> Any:
        reward = np.random.random() + random.random() + torch.rand(()).item()  # noqa: NPY002
        return self._observation(), reward, False, False, {}

    def _observation(self) -> Any:
        return np.random.uniform(-1, 1, 3).astype(np.float32)  # noqa: NPY002


gym.register("SgrlNoise-v0", Noise, max_episode_steps=6)
NOISE = {"env": "SgrlNoise-v0"}
CASES = [
    ("Reinforce", LABYRINTH, {**SPARSE, "backend": "native"}),
    ("Reinforce", NOISE, GRU),
    ("PPO", LABYRINTH, SPARSE),
    ("PPO", NOISE, {**GRU, "max_seq_len": 7}),
]


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize(("algorithm", "environment", "model"), CASES)
def test_training_is_not_touched_by_a_bit(
    algorithm: str, environment: dict[str, Any], model: dict[str, Any], tmp_path: Path
) -> None:
    """Neither by ours nor by RLlib's own, in the process that trains."""
    sections = {"environment": environment, **(PPO if algorithm == "PPO" else {})}
    evaluation = {"evaluation_interval": 1, "evaluation_duration": 5}
    runs, found = [], []
    for section, evaluate_ in (
        ({}, None),
        ({}, {"every": 2, "episodes": 5}),
        ({"evaluation": evaluation}, None),
    ):
        experiment = make_experiment(
            tmp_path / "file.yaml",
            {"one": {"model": model}},
            algorithm=algorithm,
            config={**sections, **section},
            evaluate=evaluate_,
        )
        trial = experiment.trials[1].config
        trained = build_algorithm_config(trial).build_algo()
        apart = Evaluation(trial)
        rows = []
        for iteration in range(1, 5):
            rows.append(metrics_row(trained.train(), iteration, 0.0))
            if columns := apart.columns(trained, iteration):
                assert columns == apart.columns(trained, iteration)
                found.append(columns)
            rewarded = not np.isnan(rows[-1].pop("eval_reward"))
            assert rewarded == bool(section)
        state = trained.learner_group.get_weights()["default_policy"]
        runs.append((rows, state))
        trained.stop()
    for rows, state in runs[1:]:
        np.testing.assert_equal(rows, runs[0][0])
        np.testing.assert_equal(state, runs[0][1])
    assert len(found) == 2
    names = set(EVALUATION_COLUMNS)
    assert set(found[0]) == {n for n in names if environment is LABYRINTH or "success" not in n}


@pytest.mark.usefixtures("ray_session")
def test_a_sweep_evaluates_what_the_command_evaluates(tmp_path: Path) -> None:
    sweeps = {}
    for name, evaluate_ in (("plain", None), ("evaluated", {"every": 2, "episodes": 30})):
        experiment = make_experiment(
            tmp_path / "file.yaml",
            ["gru"],
            config={
                "environment": {"env": "labyrinth_explore", "env_config": {"episode_length": 10}},
                "env_runners": {"num_envs_per_env_runner": 4},
                "training": {"lr": 0.02},
            },
            seeds=[3],
            evaluate=evaluate_,
            checkpoint={"every": 1, "keep": 9},
        )
        sweeps[name] = run_sweep(experiment, tmp_path, name)
    directory = sweeps["evaluated"]
    tables = {name: pd.read_csv(path / "gru_seed=3/metrics.csv") for name, path in sweeps.items()}
    table = tables["evaluated"]
    columns = list(EVALUATION_COLUMNS)
    assert list(table.columns[-5:-1]) == columns
    pd.testing.assert_frame_equal(
        table.drop(columns=[*columns, "iteration_seconds"]),
        tables["plain"].drop(columns="iteration_seconds"),
    )
    assert [*table[columns].notna().all(axis=1)] == [False, True, False, True, False]
    assert table["eval_return"].nunique() == 2
    checkpoint = directory / "gru_seed=3/checkpoints/000004"
    for prefix, greedy in (("eval", False), ("eval_greedy", True)):
        played = evaluate(checkpoint, 30, seed=3, greedy=greedy)
        assert table[f"{prefix}_success_rate"][3] == played["success_rate"]
        assert table[f"{prefix}_return"][3] == played["episode_return_mean"]

    figures = [figure.path.name for figure in write_figures(load_results(directory), tmp_path)]
    assert figures[1:3] == ["eval_success_rate.png", "eval_greedy_success_rate.png"]
    plain = write_figures(load_results(sweeps["plain"]), tmp_path)
    assert len(plain) == len(figures) - 2

    before = metrics_without_times(directory)
    (directory / "gru_seed=3/checkpoints/000005/policy.json").unlink()
    (directory / "gru_seed=3/checkpoints/000004/policy.json").unlink()
    resume_sweep(directory)
    assert metrics_without_times(directory) == before


def test_intervals_of_evaluate(tmp_path: Path) -> None:
    policy = make_policy("dense", 784, 9, seed=3, num_layers=2, hidden_size=16)
    save_policy(policy, tmp_path, environment={"env": "mnist_bandit", "env_config": {}})
    found = evaluate(tmp_path, 40)
    played = play(*open_policy(tmp_path), 40, 0)
    rate = played.success.double().mean().item()
    # Wilson (1927): the rates whose normal test the one found does not fail.
    low, high = found["success_rate_low"], found["success_rate_high"]
    for limit in (low, high):
        distance = abs(rate - limit) / np.sqrt(limit * (1 - limit) / 40)
        assert distance == pytest.approx(stats.norm.ppf(0.975), rel=1e-6)
    assert low < rate < high
    expected = stats.ttest_1samp(played.returns.numpy(), 0).confidence_interval()
    limits = found["episode_return_mean_low"], found["episode_return_mean_high"]
    assert limits == pytest.approx((expected.low, expected.high))

    shown = CliRunner().invoke(app, ["evaluate", str(tmp_path), "--episodes", "40"]).output
    assert f"success_rate: {rate:g} (95% interval {low:.4g} to {high:.4g})" in shown.splitlines()
    greedy = CliRunner().invoke(app, ["evaluate", str(tmp_path), "--episodes", "40", "--greedy"])
    assert greedy.exit_code == 0
    assert greedy.output != shown
    one = CliRunner().invoke(app, ["evaluate", str(tmp_path), "--episodes", "1"]).output
    assert "episode_return_mean: " in one
    assert "nan" not in one


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"evry": 5}, "evaluate.evry: unknown key; did you mean 'every'"),
        (7, "evaluate: expected a mapping"),
        ({"episodes": 0}, "evaluate.episodes: must be at least 1"),
        (
            {"every": 6},
            "evaluate.every: must be at most 5, the trials' number of iterations, got 6",
        ),
    ],
)
def test_bad_evaluations_are_refused_in_one_line(given: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ExperimentError, match=message) as error:
        make_experiment(tmp_path / "bad.yaml", evaluate=given)
    assert "\n" not in str(error.value)
