"""`Reinforce` on RLlib: the plain loop's numbers, determinism, exact restore, remote actors."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from ray.rllib import _register_all
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.learner.torch import torch_learner
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.tune.registry import get_trainable_cls
from sweeps import SPARSENET as SPARSE

from sgrl.envs.registry import make_vector
from sgrl.nn.registry import make_policy
from sgrl.reinforce import NonFiniteLoss, UpdateSettings, train
from sgrl.reinforce.rollout import EVALUATION_SEED_OFFSET
from sgrl.results.checkpoints import open_policy
from sgrl.rllib import PolicyModule, Reinforce, ReinforceConfig
from sgrl.rllib.settings import REINFORCE_READS, setting_names
from sgrl.rllib.stock import STOCK_ALGORITHMS

ENV_CONFIG = {"episode_length": 12}
NUM_ENVS = 3
MODELS = {
    **{
        name: {"policy": name, "feature_size": 16, "embedding_size": 16, "hidden_size": 16}
        for name in ("gru", "lstm", "mlp")
    },
    "sgprop": SPARSE,
    "backprop": {**SPARSE, "propagation": "backprop"},
    "noisy": {**SPARSE, "neuron_noise": 0.2, "normalize_observations": True},
    "dense": {"policy": "dense", "num_layers": 2, "hidden_size": 16},
    "feed-forward": {
        "policy": "sparse_mlp",
        "num_layers": 3,
        "num_neurons": 8,
        "neuron_size": 3,
        "num_parents": 3,
        "num_slots": 2,
    },
}
BANDIT = {
    "lr": 5e-3,
    "predictor_lr": 5e-3,
    "entropy_coeff": 0.0,
    "grad_clip": None,
    "normalize_returns": False,
    "two_phase": True,
}


def config(model: str = "sgprop", seed: int = 5, **extra: Any) -> ReinforceConfig:
    return (
        ReinforceConfig()
        .environment("labyrinth_escape", env_config=ENV_CONFIG)
        .env_runners(num_envs_per_env_runner=NUM_ENVS)
        .rl_module(model_config={**MODELS[model], **extra})
        .debugging(seed=seed)
    )


def rows(algorithm: Reinforce, iterations: int) -> list[dict[str, float]]:
    return [algorithm.train()["sgrl"] for _ in range(iterations)]


def learner_state(algorithm: Reinforce) -> dict[str, Any]:
    """Weights, buffers and optimizers by flat name."""
    state = {f"policy/{k}": v.clone() for k, v in algorithm.policy.state_dict().items()}
    for name, optimizer in algorithm.learner_group._learner._named_optimizers.items():
        for index, moments in optimizer.state_dict()["state"].items():
            state |= {f"{name}/{index}/{k}": v.clone() for k, v in moments.items()}
        state[f"{name}/groups"] = copy.deepcopy(optimizer.state_dict()["param_groups"])
    return state


def assert_same(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert actual[key].dtype == value.dtype, key
            assert torch.equal(actual[key], value), key
        else:
            assert actual[key] == value, key


pytestmark = pytest.mark.usefixtures("ray_session")


def steps_learned(result: dict[str, Any]) -> int:
    return result["learners"]["__all_modules__"]["num_env_steps_trained_lifetime"]


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
        ),
    ],
)
@pytest.mark.parametrize("model", MODELS)
def test_same_numbers_as_the_plain_loop(model: str, device: str) -> None:
    settings = config(model).training(lr=1e-3, entropy_coeff=0.02, gamma=0.9)
    algorithm = settings.learners(num_gpus_per_learner=int(device == "cuda")).build_algo()
    env = make_vector("labyrinth_escape", NUM_ENVS, ENV_CONFIG)
    arguments = {key: value for key, value in MODELS[model].items() if key != "policy"}
    policy = make_policy(
        MODELS[model]["policy"], env.observation_size, env.num_actions, seed=5, **arguments
    ).to(device)
    settings = UpdateSettings(gamma=0.9, entropy_coeff=0.02)
    for expected in train(policy, env, 4, lr=1e-3, seed=5, settings=settings):
        result = algorithm.train()
        assert result["training_iteration"] == expected.pop("iteration")
        assert result["sgrl"] == expected
    assert expected["padded_env_steps"] == 4 * NUM_ENVS * ENV_CONFIG["episode_length"]
    assert expected["env_steps"] == result["num_env_steps_sampled_lifetime"]
    assert expected["env_steps"] == steps_learned(result)
    assert expected["episodes"] == 4 * NUM_ENVS
    for actual in (algorithm.policy, algorithm.get_module().policy):
        assert_same(actual.state_dict(), policy.state_dict())
    algorithm.stop()


def test_the_local_runner_acts_on_the_learners_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if that were a GPU: torch says of this device that it is another than "cpu"."""
    elsewhere = torch.device("cpu", 0)
    monkeypatch.setattr(torch_learner, "get_device", lambda *arguments: elsewhere)
    algorithm = config().build_algo()
    learner, runner = algorithm.learner_group._learner, algorithm.env_runner
    assert learner._device == elsewhere != torch.device("cpu")
    assert runner.module is learner.module[DEFAULT_MODULE_ID]
    monkeypatch.setattr(PolicyModule, "get_state", None)  # no weights are copied
    actual = rows(algorithm, 2)
    monkeypatch.undo()
    algorithm.stop()
    algorithm = config().build_algo()
    assert actual == rows(algorithm, 2)
    algorithm.stop()


@pytest.mark.parametrize("baseline", ["batch_mean", "value_head"])
def test_same_numbers_as_the_plain_loop_with_a_baseline(baseline: str) -> None:
    weight = {"value_coeff": 0.2} if baseline == "value_head" else {}
    algorithm = config().training(baseline=baseline, **weight).build_algo()
    env = make_vector("labyrinth_escape", NUM_ENVS, ENV_CONFIG)
    arguments = {key: value for key, value in SPARSE.items() if key != "policy"}
    arguments["value_head"] = baseline == "value_head"
    policy = make_policy("sparsenet", env.observation_size, env.num_actions, seed=5, **arguments)
    settings = UpdateSettings(baseline=baseline, **weight)
    before = rows(config().build_algo(), 1)[0]
    for expected in train(policy, env, 2, seed=5, settings=settings):
        iteration, result = expected.pop("iteration"), algorithm.train()
        assert result["sgrl"] == expected
        if iteration == 1:
            assert expected["policy_loss"] != before["policy_loss"]
    assert_same(algorithm.policy.state_dict(), policy.state_dict())
    algorithm.stop()


def test_tune_knows_the_algorithms_by_name() -> None:
    _register_all()  # as Tune does where it finds no algorithm of a name
    assert get_trainable_cls("Reinforce") is Reinforce
    for name, kind in STOCK_ALGORITHMS.items():
        assert get_trainable_cls(f"sgrl_{name}") is kind
        assert get_trainable_cls(name) is not kind


def test_a_plain_dict_is_a_config() -> None:
    """As RLlib's YAML files and Tune's `param_space` have it."""
    text = f"""
        env: labyrinth_escape
        env_config: {{episode_length: 12}}
        num_envs_per_env_runner: {NUM_ENVS}
        model_config: {json.dumps(MODELS["gru"])}
        seed: 5
        """
    made = ReinforceConfig().update_from_dict(yaml.safe_load(text))
    assert made.to_dict() == config("gru").to_dict()
    assert Reinforce(config=yaml.safe_load(text)).config.model_config["policy"] == "gru"


def test_same_seed_same_numbers() -> None:
    runs = []
    for seed in (5, 5, 6):
        algorithm = config(seed=seed).build_algo()
        runs.append(rows(algorithm, 3))
        algorithm.stop()
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


@pytest.mark.parametrize(
    ("model", "dtype", "rule"),
    [
        ("sgprop", "float32", "published"),
        ("sgprop", "float64", "published"),
        ("noisy", "float32", "running"),
    ],
)
def test_restored_from_any_checkpoint_continues_exactly(
    model: str, dtype: str, rule: str, tmp_path: Path
) -> None:
    algorithm = config(model, dtype=dtype, mixing_rule=rule).build_algo()
    results, states = [], []
    for iteration in range(5):
        algorithm.save_to_path(tmp_path / f"after_{iteration}")
        states.append(learner_state(algorithm))
        checkpoint = tmp_path / f"after_{iteration}"
        policy, environment = open_policy(checkpoint)
        assert_same(policy.state_dict(), algorithm.policy.state_dict())
        assert environment == {"env": "labyrinth_escape", "env_config": ENV_CONFIG}
        assert json.loads((checkpoint / "policy.json").read_text())["iteration"] == iteration
        results.append(algorithm.train())
    final = learner_state(algorithm)
    assert final["policy/core.neurons.mixing_weight"].dtype == getattr(torch, dtype)
    for iteration in (0, 2, 4):
        # In a new algorithm, and in one that is further on.
        restored = Reinforce.from_checkpoint(tmp_path / f"after_{iteration}")
        algorithm.restore_from_path(tmp_path / f"after_{iteration}")
        for other in (restored, algorithm):
            assert_same(learner_state(other), states[iteration])
            for expected in results[iteration:]:
                result = other.train()
                assert result["sgrl"] == expected["sgrl"]
                for counter in ("training_iteration", "num_env_steps_sampled_lifetime"):
                    assert result[counter] == expected[counter]
                assert steps_learned(result) == steps_learned(expected)
                assert steps_learned(result) == result["sgrl"]["env_steps"]
            assert_same(learner_state(other), final)
        restored.stop()
    algorithm.stop()


def bandit(seed: int = 5, **training: Any) -> ReinforceConfig:
    return (
        ReinforceConfig()
        .environment("mnist_bandit")
        .env_runners(num_envs_per_env_runner=16)
        .rl_module(model_config=MODELS["feed-forward"])
        .training(**BANDIT, **training)
        .debugging(seed=seed)
    )


def test_bandit_iterations_end_at_evaluation_points(tmp_path: Path) -> None:
    """Updates spread over iterations, each with an evaluation; restored from between, exactly."""
    config = bandit(total_updates=10, total_iterations=4).evaluation(
        evaluation_interval=1,
        evaluation_duration=100,
        evaluation_config={"num_envs_per_env_runner": 50},
    )
    algorithm = config.build_algo()
    results = rows(algorithm, 2)
    assert [row["env_steps"] for row in results] == [16, 4 * 16]
    assert [row["episodes"] for row in results] == [16, 4 * 16]
    algorithm.save_to_path(tmp_path)
    results += rows(algorithm, 3)
    # Beyond the planned end the spacing stays.
    assert [row["env_steps"] / 16 for row in results] == [1, 4, 7, 10, 13]
    assert [row["padded_env_steps"] for row in results] == [row["env_steps"] for row in results]
    assert all(0 <= row["eval_reward"] <= 1 for row in results)
    final = learner_state(algorithm)
    algorithm.stop()
    restored = Reinforce.from_checkpoint(tmp_path)
    assert rows(restored, 3) == results[2:]
    assert_same(learner_state(restored), final)
    other = bandit(seed=6, total_updates=10, total_iterations=4).build_algo()
    assert rows(other, 1)[0]["policy_loss"] != results[0]["policy_loss"]
    # Without runners of its own, an evaluation still sees test images and unflipped rewards.
    metrics = other.evaluate()["env_runners"]
    assert metrics["success_rate"] == metrics["episode_return_mean"]
    other.stop()
    restored.stop()

    env = make_vector("mnist_bandit", 16)
    arguments = {k: v for k, v in MODELS["feed-forward"].items() if k != "policy"}
    policy = make_policy("sparse_mlp", 784, 9, seed=5, **arguments)
    settings = UpdateSettings(
        entropy_coeff=0.0, grad_clip=None, normalize_returns=False, two_phase=True
    )
    plain = list(train(policy, env, 13, lr=5e-3, predictor_lr=5e-3, seed=5, settings=settings))
    for name in ("policy_loss", "predictor_loss", "grad_norm", "success_rate"):
        mean = sum(row[name] for row in plain[4:7]) / 3
        assert results[2][name] == pytest.approx(mean, rel=1e-12)
    assert results[-1]["layer2_mixing_weight_p25"] == plain[-1]["layer2_mixing_weight_p25"]
    for name, value in policy.state_dict().items():
        assert torch.equal(final[f"policy/{name}"], value), name


def test_state_in_memory_is_a_copy() -> None:
    algorithm = config().build_algo()
    rows(algorithm, 1)
    state = algorithm.get_state()
    expected = rows(algorithm, 2)
    algorithm.set_state(state)
    assert rows(algorithm, 2) == expected
    # As it was when env_steps were padded.
    counts = state["reinforce"]
    counts["env_steps"] = counts.pop("padded_env_steps")
    del counts["episodes"]
    algorithm.set_state(state)
    assert rows(algorithm, 2) == expected
    algorithm.stop()


def test_a_changed_learning_rate_outlives_restore(tmp_path: Path) -> None:
    algorithm = config().build_algo()
    rows(algorithm, 1)
    algorithm.save_to_path(tmp_path)
    algorithm.stop()
    changed = config().training(lr=7e-4, predictor_lr=3e-5).build_algo()
    changed.restore_from_path(tmp_path)
    for _ in range(2):
        optimizers = changed.learner_group._learner._named_optimizers.values()
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        assert [group["lr"] for group in groups] == [7e-4, 3e-5]
        assert all(group["betas"] == (0.9, 0.999) for group in groups)
        assert all(type(beta) is float for group in groups for beta in group["betas"])
        changed.train()
    changed.stop()


def test_remote_runners(tmp_path: Path) -> None:
    algorithm = config("noisy").env_runners(num_env_runners=2).build_algo()
    batch = algorithm._sample()
    # The environments are those of one big runner.
    env = make_vector("labyrinth_escape", 2 * NUM_ENVS, ENV_CONFIG)
    first = env.reset([5 + e for e in range(2 * NUM_ENVS)])
    assert np.array_equal(batch.observations[0].numpy(), first)
    for drawn in (batch.actions, batch.noise):
        assert not torch.equal(drawn[:, :NUM_ENVS], drawn[:, NUM_ENVS:])
    rows(algorithm, 2)
    algorithm.save_to_path(tmp_path)
    results = [algorithm.train() for _ in range(2)]
    last = results[-1]["sgrl"]
    assert last["padded_env_steps"] == 4 * 2 * NUM_ENVS * ENV_CONFIG["episode_length"]
    assert last["env_steps"] == steps_learned(results[-1])
    # The learner's alone: runners only act with them.
    assert algorithm.policy.normalizer.count == last["env_steps"]
    algorithm.stop()

    restored = Reinforce.from_checkpoint(tmp_path)
    for expected in results:
        result = restored.train()
        assert result["sgrl"] == expected["sgrl"]
        for counter in ("training_iteration", "num_env_steps_sampled_lifetime"):
            assert result[counter] == expected[counter]
    restored.stop()


@pytest.mark.parametrize(("before", "after"), [(1, 0), (0, 1)])
def test_the_only_runner_may_move(before: int, after: int, tmp_path: Path) -> None:
    """The same episodes go on, up to rounding (see `test_remote_learner`)."""
    algorithm = config().env_runners(num_env_runners=before).build_algo()
    rows(algorithm, 2)
    algorithm.save_to_path(tmp_path)
    expected = rows(algorithm, 2)
    algorithm.stop()
    moved = config().env_runners(num_env_runners=after).build_algo()
    moved.restore_from_path(tmp_path)
    for row, other in zip(rows(moved, 2), expected, strict=True):
        assert row == pytest.approx(other, rel=1e-4)
    moved.stop()


def test_remote_learner() -> None:
    local = config("noisy").build_algo()
    remote = config("noisy").learners(num_learners=1).build_algo()
    # Not to the last bit: what the local one has computed while acting, the remote one computes
    # anew, in other products.
    for row, expected in zip(rows(remote, 3), rows(local, 3), strict=True):
        assert row == pytest.approx(expected, rel=1e-4)
    weights, expected_weights = remote.policy.state_dict(), local.policy.state_dict()
    for name, value in expected_weights.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=1e-6)
    state = remote.get_state()
    weights = state["learner_group"]["learner"]["rl_module"][DEFAULT_MODULE_ID]
    weights["policy.actor.b"] = np.full_like(weights["policy.actor.b"], np.nan)
    remote.set_state(state)
    with pytest.raises(NonFiniteLoss):
        remote.train()
    remote.stop()
    local.stop()


def test_non_finite_loss_changes_nothing() -> None:
    algorithm = config().build_algo()
    rows(algorithm, 2)
    with torch.no_grad():
        algorithm.policy.actor.b[0, 0] = float("nan")
    before = learner_state(algorithm)
    with pytest.raises(NonFiniteLoss, match="nan"):
        algorithm.train()
    after = learner_state(algorithm)
    assert torch.isnan(after.pop("policy/actor.b")[0, 0])
    del before["policy/actor.b"]
    assert_same(after, before)
    algorithm.stop()


def test_evaluation_neither_disturbs_training_nor_sees_its_mazes() -> None:
    plain = config("noisy").build_algo()
    expected = rows(plain, 4)
    evaluated = (
        config("noisy")
        .evaluation(evaluation_interval=2, evaluation_duration=2 * NUM_ENVS)
        .build_algo()
    )
    results = [evaluated.train() for _ in range(4)]
    metrics = results[-1]["evaluation"]["env_runners"]
    rewards = [result["sgrl"].pop("eval_reward", None) for result in results]
    assert rewards == [None, rewards[1], None, pytest.approx(metrics["episode_return_mean"])]
    assert [result["sgrl"] for result in results] == expected
    assert "evaluation" not in results[0]
    assert metrics["num_episodes"] == 2 * NUM_ENVS
    # The same mazes each time, also on the training runner of an algorithm without evaluation.
    for algorithm in (evaluated, plain):
        again = algorithm.evaluate()["env_runners"]
        for name in ("success_rate", "episode_return_mean", "episode_len_mean"):
            assert again[name] == metrics[name]
    assert rows(plain, 2) == [
        {k: v for k, v in row.items() if k != "eval_reward"} for row in rows(evaluated, 2)
    ]

    runner = plain.env_runner
    first = runner.sample(num_episodes=1)[0].observations[0].numpy()
    env = make_vector("labyrinth_escape", NUM_ENVS, ENV_CONFIG)
    assert np.array_equal(first, env.reset([EVALUATION_SEED_OFFSET + 5 + e for e in range(3)]))
    plain.stop()
    evaluated.stop()


def test_stock_ppo_trains_the_module() -> None:
    algorithm = (
        PPOConfig()
        .environment("labyrinth_escape", env_config=ENV_CONFIG)
        .env_runners(num_env_runners=0, num_envs_per_env_runner=2, batch_mode="complete_episodes")
        .rl_module(
            rl_module_spec=RLModuleSpec(module_class=PolicyModule),
            model_config={**SPARSE, "value_head": True, "max_seq_len": 12},
        )
        .training(train_batch_size=24, minibatch_size=12, num_epochs=1)
        .debugging(seed=0, log_level="ERROR")
        .build_algo()
    )
    policy = algorithm.learner_group._learner.module[DEFAULT_MODULE_ID].policy
    before = {key: value.clone() for key, value in policy.state_dict().items()}
    algorithm.train()
    after = policy.state_dict()
    unchanged = {key for key in before if torch.equal(after[key], before[key])}
    assert unchanged == {"core.parents"}
    algorithm.stop()


@pytest.mark.parametrize(
    ("section", "settings", "message"),
    [
        ("training", {"lr": -1e-3}, "lr must be a number greater than 0, got -0.001"),
        ("training", {"lr": -1}, "lr must be a number greater than 0, got -1"),
        ("training", {"lr": "fast"}, "lr must be a number greater than 0, got 'fast'"),
        ("training", {"lr": 0}, "lr must be a number greater than 0, got 0"),
        ("training", {"predictor_lr": -1.0}, "predictor_lr must be"),
        ("training", {"gamma": 1.5}, "gamma must be a number from 0 to 1, got 1.5"),
        ("training", {"grad_clip": -0.5}, "grad_clip must be"),
        ("training", {"entropy_coeff": float("nan")}, "entropy_coeff must be"),
        ("training", {"normalize_returns": 1}, "normalize_returns must be true or false"),
        ("training", {"two_phase": 1}, "two_phase must be true or false"),
        ("training", {"two_phase": True}, "two_phase must be false for the policy 'sparsenet'"),
        ("training", {"baseline": "mean"}, "baseline must be one of none, batch_mean, value_head"),
        ("training", {"value_coeff": -1}, "value_coeff must be a number at least 0"),
        ("training", {"value_coeff": 0.1}, "value_coeff does nothing without baseline: value_head"),
        ("training", {"total_updates": 9}, "total_updates and total_iterations belong together"),
        (
            "training",
            {"total_updates": 9, "total_iterations": 10},
            "total_iterations must be from 2 to total_updates (9), got 10",
        ),
        ("learners", {"num_learners": 2}, "num_learners must be 0 or 1, got 2"),
        ("env_runners", {"num_envs_per_env_runner": 0}, "`num_envs_per_env_runner`"),
        ("environment", {"env": "labyrinth_escpe"}, "labyrinth_escape"),
        ("environment", {"env_config": {"maze_dims": [7, 7]}}, "maze_dims"),
        ("rl_module", {"model_config": {"policy": "grru"}}, "did you mean 'gru'"),
        ("rl_module", {"model_config": {"hidden": 3}}, "no setting 'hidden'"),
        ("rl_module", {"model_config": {"num_parents": 200}}, "num_parents"),
        ("rl_module", {"model_config": {"dtype": "float16"}}, "dtype must be"),
        ("debugging", {"seed": None}, "seed must be"),
        ("fault_tolerance", {"restart_failed_env_runners": True}, "restart_failed_env_runners"),
        ("training", {"num_epochs": 0}, "num_epochs must stay 1"),
        ("training", {"train_batch_size": 64}, "set num_envs_per_env_runner"),
        ("env_runners", {"rollout_fragment_length": 5}, "set num_envs_per_env_runner"),
        ("env_runners", {"batch_mode": "truncate_episodes"}, "env_runners.batch_mode does nothing"),
        ("rl_module", {"model_config": {"max_seq_len": 7}}, "model.max_seq_len does nothing"),
        ("multi_agent", {"policies": ["a", "b"]}, "multi_agent.policies does nothing"),
        ("offline_data", {"input_": "dataset"}, "offline_data.input_ does nothing"),
        ("resources", {"num_gpus": 1}, "set num_gpus_per_learner"),
        ("framework", {"framework": "tf2"}, "framework.framework does nothing"),
        ("reporting", {"min_time_s_per_iteration": 1}, "an iteration is one update"),
        ("evaluation", {"evaluation_config": {"exlore": False}}, "evaluation_config.exlore does"),
        ("evaluation", {"evaluation_config": {"num_env_runners": 1}}, "evaluation_num_env_runners"),
        ("evaluation", {"evaluation_parallel_to_training": True}, "take place between iterations"),
        ("evaluation", {"evaluation_duration": "auto"}, "evaluation_duration must be a number"),
        ("experimental", {"_validate_config": False}, "_validate_config must stay true"),
    ],
)
def test_bad_settings_are_refused_in_one_line(
    section: str, settings: dict[str, Any], message: str
) -> None:
    bad = ReinforceConfig().environment("labyrinth_escape")
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        getattr(bad, section)(**settings).build_algo()
    assert "\n" not in str(error.value)


def other_value(value: Any) -> Any:
    """A value of the same kind where that is known."""
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, int | float) else {"some": "thing"}


def test_no_setting_is_ignored() -> None:
    """Whatever Reinforce does not read is refused by name."""
    refused = set()
    for name, (section, argument) in setting_names(ReinforceConfig).items():
        if name in REINFORCE_READS or name not in vars(ReinforceConfig()):
            continue
        bad = ReinforceConfig().environment("labyrinth_escape")
        setattr(bad, name, other_value(getattr(bad, name)))
        expected = rf"^{section}.{argument} does nothing under Reinforce.*leave it out$"
        with pytest.raises(ValueError, match=expected):
            bad.validate()
        refused.add(argument)
    assert refused >= {"observation_filter", "clip_rewards", "model", "optimizer"}
    assert refused >= {"shuffle_batch_per_epoch", "normalize_actions", "observation_space"}


def test_without_exploration_actions_are_the_likeliest() -> None:
    """In training and in evaluations, each by itself."""

    def greedily(algorithm: Reinforce, batch: Any) -> bool:
        with torch.no_grad():
            logits = algorithm.policy(batch.observations, mask=batch.mask).logits
        return torch.equal(logits.argmax(-1)[batch.mask], batch.actions[batch.mask])

    evaluation = {"evaluation_interval": 1, "evaluation_config": {"explore": False}}
    algorithm = config().evaluation(**evaluation).build_algo()
    runner = algorithm.eval_env_runner_group.local_env_runner
    assert greedily(algorithm, runner.sample(num_episodes=1)[0])
    assert not greedily(algorithm, algorithm.env_runner.sample()[0])
    algorithm.stop()
    algorithm = config().env_runners(explore=False).build_algo()
    assert greedily(algorithm, algorithm.env_runner.sample()[0])
    algorithm.train()
    algorithm.stop()


def test_more_runners_than_processors_are_refused() -> None:
    with pytest.raises(ValueError, match="need 99 CPU, the Ray cluster has"):
        config().env_runners(num_env_runners=99).build_algo()
