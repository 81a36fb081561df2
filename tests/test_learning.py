"""Learning: a shortened run in every test run, the published budget as a study of its own."""

from pathlib import Path

import pandas as pd
import pytest

from sgrl.envs.registry import make_vector
from sgrl.nn.registry import make_policy
from sgrl.reinforce.loop import train
from sgrl.reinforce.update import UpdateSettings
from sgrl.tuning.experiment.load import load_experiment
from sgrl.tuning.sweep import run_sweep

ROOT = Path(__file__).parent.parent
RANDOM_SUCCESS = 0.16


def test_sgprop_learns_to_escape() -> None:
    """The quickstart's sparse network, without Ray: from chance to three times that."""
    experiment = load_experiment(ROOT / "tune_configs" / "quickstart.yaml")
    trial = next(t for t in experiment.trials if t.method == "sparsenet_sgprop" and t.seed == 0)
    sections, model = trial.config.sections, dict(trial.config.model)
    env = make_vector(
        sections["environment"]["env"],
        sections["env_runners"]["num_envs_per_env_runner"],
        sections["environment"]["env_config"],
    )
    policy = make_policy(model.pop("policy"), env.observation_size, env.num_actions, **model)
    iterations = trial.config.stop.training_iteration
    lr = sections["training"]["lr"]
    rates = [row["success_rate"] for row in train(policy, env, iterations, lr=lr)]
    assert sum(rates[:5]) / 5 < 2 * RANDOM_SUCCESS
    assert sum(rates[-10:]) / 10 >= 3 * RANDOM_SUCCESS


def test_sgprop_learns_to_tell_digits() -> None:
    """The bandit's quickstart, without Ray: from chance to five times that, from noisy rewards."""
    experiment = load_experiment(ROOT / "tune_configs" / "mnist_quickstart.yaml")
    trial = next(t for t in experiment.trials if t.method == "sparse_sgprop")
    training, model = dict(trial.config.sections["training"]), dict(trial.config.model)
    env = make_vector("mnist_bandit", 64, trial.config.sections["environment"]["env_config"])
    policy = make_policy(model.pop("policy"), env.observation_size, env.num_actions, **model)
    rates = {name: training.pop(name) for name in ("lr", "predictor_lr")}
    updates, _ = training.pop("total_updates"), training.pop("total_iterations")
    rows = train(policy, env, updates, **rates, settings=UpdateSettings(**training))
    right = [row["success_rate"] for row in rows]
    assert sum(right[:40]) / 40 < 2 / 9
    assert sum(right[-40:]) / 40 >= 5 / 9


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    """The published comparison on labyrinth_escape: seed, method, mean success rate at the end."""
    experiment = load_experiment(ROOT / "tune_configs" / "labyrinth_comparison.yaml")
    directory = run_sweep(experiment, tmp_path_factory.mktemp("study"))
    rows = [
        {
            "method": trial.method,
            "seed": trial.seed,
            "success_rate": pd.read_csv(directory / trial.name / "metrics.csv")["success_rate"]
            .tail(20)
            .mean(),
        }
        for trial in experiment.trials
    ]
    return pd.DataFrame(rows)


@pytest.mark.slow
def test_published_budget(study: pd.DataFrame) -> None:
    """Adaptive sgprop reaches 0.85 over the last 20 of 300 batches on at least three of six seeds.

    Not on all: within this budget about every second one has learned (docs/learning.md).
    """
    print(study.pivot_table(index="seed", columns="method", values="success_rate").round(3))
    sgprop = study[study["method"] == "sparsenet_sgprop"]["success_rate"]
    assert (sgprop >= 0.85).sum() >= 3


@pytest.mark.slow
def test_published_budget_of_the_bandit(tmp_path: Path) -> None:
    """Adaptive sgprop ends at a test reward of 0.70 or more on each of two seeds."""
    experiment = load_experiment(ROOT / "tune_configs" / "mnist_bandit.yaml", ["seeds=[0, 1]"])
    trials = pd.read_csv(run_sweep(experiment, tmp_path) / "summary.csv")
    print(trials.pivot_table(index="seed", columns="method", values="final_eval_reward"))
    sgprop = trials[trials["method"] == "sparse_sgprop"]["final_eval_reward"]
    assert len(sgprop) == 2
    assert (sgprop >= 0.70).all()


@pytest.mark.slow
def test_ppo_learns_what_needs_memory(tmp_path: Path) -> None:
    """Answers of whole episodes, from -1 (all wrong) to 1: by chance -0.5, which is about all that
    can be had without memory."""
    experiment = load_experiment(ROOT / "tune_configs" / "ppo_memory.yaml", ["seeds=[0]"])
    trials = pd.read_csv(run_sweep(experiment, tmp_path) / "summary.csv")
    print(trials.pivot_table(index="seed", columns="method", values="final_episode_return_mean"))
    final = trials.set_index("method")["final_episode_return_mean"]
    assert (final[["gru", "sparsenet_sgprop", "sparsenet_backprop"]] >= 0.9).all()
    assert final["mlp"] <= -0.3
