"""RLlib's own algorithms around the policies: PPO, APPO and IMPALA (new API stack)."""

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from ray.rllib.algorithms import Algorithm
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns
from ray.rllib.core.learner.utils import update_target_network
from ray.rllib.core.rl_module import RLModule
from ray.rllib.models.torch.torch_distributions import TorchCategorical
from ray.rllib.policy.sample_batch import MultiAgentBatch
from sweeps import SPARSENET as SPARSE
from sweeps import make_experiment, metrics_without_times, summary
from typer.testing import CliRunner

import sgrl
from sgrl.cli import app
from sgrl.nn.mixing import split_parameters
from sgrl.results.checkpoints import newest_valid_checkpoint
from sgrl.results.evaluation import evaluate
from sgrl.results.plan import ExperimentError
from sgrl.results.rllib_metrics import metrics_row
from sgrl.rllib import APPOConfig, IMPALAConfig, PPOConfig, register_environment
from sgrl.rllib.learner import PolicyLearner
from sgrl.rllib.settings import STOCK_IGNORES, setting_names
from sgrl.rllib.stock import PPOLearner
from sgrl.tuning.sweep import resume_sweep, run_sweep

pytestmark = [
    pytest.mark.usefixtures("ray_session"),
    # RLlib makes its vector of environments under one id, again and again.
    pytest.mark.filterwarnings("ignore:.*Overriding environment rllib-:UserWarning"),
]

FEED_FORWARD = {
    "policy": "sparse_mlp",
    "num_layers": 3,
    "num_neurons": 8,
    "neuron_size": 3,
    "num_parents": 3,
    "num_slots": 2,
}
#: An environment of each kind, its settings, and how long its episodes are.
MEMORY = "popgym-RepeatPreviousEasy-v0"
TASKS = {"labyrinth_escape": ({"episode_length": 12}, 12), MEMORY: ({}, 51)}
register_environment(MEMORY)


def ppo(env: str = "labyrinth_escape", seed: int = 5, **model: Any) -> PPOConfig:
    env_config, length = TASKS[env]
    return (
        PPOConfig()
        .environment(env, env_config=env_config)
        .env_runners(num_env_runners=0, num_envs_per_env_runner=4, batch_mode="complete_episodes")
        .rl_module(model_config={**SPARSE, **model})
        .training(
            train_batch_size_per_learner=4 * length,
            minibatch_size=2 * length + 2,
            num_epochs=2,
            lr=1e-3,
            predictor_lr=2e-4,
            grad_clip=0.5,
        )
        .debugging(seed=seed)
    )


def asynchronous(kind: type[APPOConfig | IMPALAConfig], env: str) -> APPOConfig | IMPALAConfig:
    env_config, length = TASKS[env]
    return (
        kind()
        .environment(env, env_config=env_config)
        .env_runners(num_env_runners=0, num_envs_per_env_runner=4, rollout_fragment_length=length)
        .learners(num_learners=0)
        .rl_module(model_config={**SPARSE, "normalize_observations": True})
        .training(train_batch_size_per_learner=4 * length, lr=1e-3, predictor_lr=2e-4)
        .reporting(min_time_s_per_iteration=0)
        .debugging(seed=5)
    )


def learner_of(algorithm: Algorithm) -> PolicyLearner:
    return algorithm.learner_group._learner


def policy_state(algorithm: Algorithm) -> dict[str, torch.Tensor]:
    policy = learner_of(algorithm).module[DEFAULT_MODULE_ID].policy
    return {key: value.clone() for key, value in policy.state_dict().items()}


def schedules(algorithm: Algorithm) -> tuple[list[float], float]:
    """The learning rates and the entropy coefficient as they are."""
    learner = learner_of(algorithm)
    optimizers = learner.get_optimizers_for_module(DEFAULT_MODULE_ID)
    scheduler = learner.entropy_coeff_schedulers_per_module[DEFAULT_MODULE_ID]
    rates = [float(optimizer.param_groups[0]["lr"]) for _, optimizer in optimizers]
    return rates, float(scheduler.get_current_value())


#: Schedules that end before and after the runs below: (learning rate, entropy coefficient).
SCHEDULES = ([[0, 1e-2], [640, 1e-5]], [[0, 0.1], [10_000, 0.0]])


def test_ppo_measures_valid_steps_alone() -> None:
    """Against formulas by hand, with a padded step that would change all of them."""
    generator = torch.Generator().manual_seed(0)
    before, now = (torch.randn(2, 3, 4, generator=generator) for _ in range(2))
    actions = torch.randint(4, (2, 3), generator=generator)
    values, targets = torch.randn(2, 2, 3, generator=generator)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    old, new = (logits.log_softmax(-1) for logits in (before, now))
    chosen = [p.gather(-1, actions.unsqueeze(-1)).squeeze(-1) for p in (old, new)]
    values[0, 2], targets[0, 2], now[0, 2] = 1e6, -1e6, torch.tensor([90.0, 0, 0, 0])
    module = SimpleNamespace(
        unwrapped=lambda: module,
        get_exploration_action_dist_cls=lambda: TorchCategorical,
        get_train_action_dist_cls=lambda: TorchCategorical,
        compute_values=lambda batch, embeddings: embeddings,
    )
    learner = object.__new__(PPOLearner)
    learner._module = {"module": module}
    batch = {
        Columns.ACTION_DIST_INPUTS: before,
        Columns.ACTIONS: actions,
        Columns.ACTION_LOGP: chosen[0],
        Columns.LOSS_MASK: mask,
        Columns.VALUE_TARGETS: targets,
    }
    outputs = {Columns.ACTION_DIST_INPUTS: now, Columns.EMBEDDINGS: values}
    config = SimpleNamespace(clip_param=0.3, use_critic=True)
    measured = learner._measured("module", config, batch, outputs)
    ratio = (chosen[1] - chosen[0]).exp()[mask]
    error = (targets - values)[mask]
    expected = {
        "kl": (old.exp() * (old - new)).sum(-1)[mask].mean(),
        "clip_fraction": ((ratio < 0.7) | (ratio > 1.3)).double().mean(),
        "value_loss": error.square().mean(),
        "explained_variance": 1 - error.var(correction=0) / targets[mask].var(correction=0),
    }
    assert measured.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(measured[key], value)


CASES = [("PPO", env) for env in TASKS] + [("APPO", env) for env in TASKS]
CASES += [("IMPALA", "labyrinth_escape")]


@pytest.mark.parametrize(("name", "env"), CASES)
def test_trains_saves_and_restores(name: str, env: str, tmp_path: Path) -> None:
    kinds = {"APPO": APPOConfig, "IMPALA": IMPALAConfig}
    config = ppo(env) if name == "PPO" else asynchronous(kinds[name], env)
    rate, entropy_coeff = SCHEDULES
    config.training(lr=rate, entropy_coeff=entropy_coeff)
    algorithm = config.build_algo()
    learner = learner_of(algorithm)
    module = learner.module[DEFAULT_MODULE_ID]
    # RLlib adds a step to each episode.
    assert module.model_config["max_seq_len"] == TASKS[env][1] + 1
    before = policy_state(algorithm)
    while learner._weights_seq_no < 3:
        result = algorithm.train()
        row = metrics_row(result, algorithm.iteration, 0.0)
    of_rllib = result["learners"]["default_policy"]
    assert row["value_loss"] >= 0
    if name == "PPO":
        assert row["value_loss"] == pytest.approx(of_rllib["vf_loss_unclipped"], rel=1e-5)
        assert row["kl"] == pytest.approx(of_rllib["mean_kl_loss"], rel=1e-4, abs=1e-8)
        assert 0 <= row["clip_fraction"] <= 1
        assert row["explained_variance"] <= 1
    assert ("kl" in row) == (name != "IMPALA")
    algorithm.stop()
    after = policy_state(algorithm)
    assert {key for key in before if torch.equal(before[key], after[key])} == {"core.parents"}
    assert all(p.grad.abs().max() > 0 for p in split_parameters(module.policy)[1])
    mixing_weight = after["core.neurons.mixing_weight"]
    assert ((mixing_weight >= 0) & (mixing_weight <= 1)).all()
    for column in ("policy_loss", "entropy", "grad_norm", "predictor_loss", "mixing_weight_mean"):
        assert np.isfinite(row[column]), column
    assert row["episode_length_mean"] == TASKS[env][1] - (env == "labyrinth_escape")
    # Its episodes end, but nothing says whether they were a success.
    assert np.isnan(row["success_rate"]) == (env == MEMORY)
    (policy_rate, predictor_rate), coefficient = schedules(algorithm)
    assert policy_rate < 1e-2
    assert predictor_rate == pytest.approx(2e-4)
    assert 0 < coefficient < 0.1

    algorithm.save_to_path(tmp_path)
    restored = type(algorithm).from_checkpoint(tmp_path)
    assert schedules(restored) == schedules(algorithm)
    saved = RLModule.from_checkpoint(
        tmp_path / "learner_group" / "learner" / "rl_module" / DEFAULT_MODULE_ID
    )
    policy = sgrl.load_policy(tmp_path)
    for state in (policy_state(restored), saved.policy.state_dict(), policy.state_dict()):
        assert state.keys() == after.keys()
        for key, value in after.items():
            assert torch.equal(state[key], value), key
    assert evaluate(tmp_path, episodes=2)["episodes"] == 2
    restored.train()
    restored.stop()


@pytest.mark.parametrize("model", [SPARSE, FEED_FORWARD], ids=lambda model: model["policy"])
@pytest.mark.parametrize("grad_clip", [None, 0.05])
def test_lambda_one_is_backprop(grad_clip: float | None, model: dict[str, Any]) -> None:
    """Three iterations of several minibatches: the same weights to 1e-9, clipped or not."""
    states, predictors = [], []
    for propagation in ("sgprop", "backprop"):
        settings = {"propagation": propagation, "mixing_weight": 1.0, "adaptive": False}
        config = ppo().training(grad_clip=grad_clip)
        config.rl_module(model_config={**model, **settings, "dtype": "float64"})
        algorithm = config.build_algo()
        before = policy_state(algorithm)
        for _ in range(3):
            algorithm.train()
        states.append(policy_state(algorithm))
        policy = learner_of(algorithm).module[DEFAULT_MODULE_ID].policy
        predictors.append(len(split_parameters(policy)[1]))
        algorithm.stop()
    sgprop, backprop = states
    still = {key for key in backprop if key.endswith(("parents", "pixels", "mixing_weight"))}
    assert predictors[0] > 0 == predictors[1]
    for key, value in backprop.items():
        assert value.dtype in (torch.float64, torch.int64)
        torch.testing.assert_close(sgprop[key], value, rtol=0, atol=1e-9)
    moved = [key for key in backprop if not torch.equal(before[key], backprop[key])]
    assert {key for key in backprop if key not in moved} <= still


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_ppo_continues_to_the_last_bit(dtype: str, tmp_path: Path) -> None:
    normalized = dtype == "float32"
    config = ppo(dtype=dtype, normalize_observations=normalized)
    config.evaluation(evaluation_interval=2, evaluation_duration=4)
    # The checkpoint, after 264 steps, is in the middle of both.
    rate, entropy_coeff = SCHEDULES
    config.training(lr=rate, entropy_coeff=entropy_coeff)
    algorithm = config.build_algo()
    rows = []
    for iteration in range(1, 6):
        rows.append(metrics_row(algorithm.train(), iteration, 0.0))
        if iteration == 3:
            algorithm.save_to_path(tmp_path)
            saved = schedules(algorithm)
    expected = policy_state(algorithm)
    algorithm.stop()
    assert [np.isnan(row["eval_reward"]) for row in rows] == [True, False, True, False, True]
    assert [row["env_steps"] for row in rows] == [4 * 11 * 2 * i for i in range(1, 6)]
    if normalized:  # each step once, and none of an evaluation or that RLlib adds
        assert expected["normalizer.count"] == rows[-1]["env_steps"]

    restored = type(algorithm).from_checkpoint(tmp_path)
    assert schedules(restored) == saved
    assert 1e-5 < saved[0][0] < 1e-2
    for iteration in (4, 5):
        np.testing.assert_equal(metrics_row(restored.train(), iteration, 0.0), rows[iteration - 1])
    for key, value in policy_state(restored).items():
        assert torch.equal(value, expected[key]), key
    restored.stop()


def test_a_sweep_of_ppo_resumes_to_the_last_bit(tmp_path: Path) -> None:
    model = {key: value for key, value in SPARSE.items() if key != "policy"}
    experiment = make_experiment(
        tmp_path / "ppo.yaml",
        algorithm="PPO",
        config={
            "environment": {"env": "labyrinth_escape", "env_config": {"episode_length": 12}},
            "env_runners": {
                "num_env_runners": 0,
                "num_envs_per_env_runner": 4,
                "batch_mode": "complete_episodes",
            },
            "training": {
                "train_batch_size_per_learner": 44,
                "minibatch_size": 26,
                "num_epochs": 2,
                "predictor_lr": 2e-4,
                "lr": [[0, 1e-2], [160, 1e-5]],
                "entropy_coeff": [[0, 0.1], [100, 0.01]],
            },
            "evaluation": {"evaluation_interval": 2, "evaluation_duration": 4},
        },
        methods={"sparse": {"model": {"policy": "sparsenet", **model}}},
        seeds=[3],
        stop={"training_iteration": 4},
        checkpoint={"every": 1, "keep": 4},
    )
    directory = run_sweep(experiment, tmp_path, "ppo")
    trial = directory / "sparse_seed=3"
    before = metrics_without_times(directory)
    metrics = pd.read_csv(trial / "metrics.csv")
    assert metrics["success_rate"].notna().all()
    assert metrics["mixing_weight_mean"].is_monotonic_decreasing
    assert list(metrics["eval_reward"].notna()) == [False, True, False, True]
    assert list(summary(directory)["final_eval_reward"]) == [metrics["eval_reward"].iloc[-1]]
    weights = (trial / "checkpoints" / "000004" / "policy.safetensors").read_bytes()

    for name in ("000003", "000004"):
        (trial / "checkpoints" / name / "policy.json").unlink()
    resume_sweep(directory)
    assert metrics_without_times(directory) == before
    newest, _ = newest_valid_checkpoint(trial / "checkpoints")
    assert (newest / "policy.safetensors").read_bytes() == weights
    result = CliRunner().invoke(app, ["evaluate", str(newest), "--episodes", "4"])
    assert result.exit_code == 0, result.output
    assert "success_rate" in result.output


def test_every_sample_has_new_episodes_and_every_evaluation_the_same() -> None:
    algorithm = ppo().evaluation(evaluation_interval=1, evaluation_duration=4).build_algo()
    runners = (algorithm.env_runner, algorithm.eval_env_runner_group.local_env_runner)
    seeds: list[list[int]] = []
    for runner in runners:
        drawn = []
        for _ in range(3):
            runner.sample(num_episodes=4)
            drawn.append(runner._seed)
        seeds.append(drawn)
    training, evaluation = seeds
    assert len(set(training)) == 3
    assert len(set(evaluation)) == 1
    assert max(training) + 4 <= 2**31 <= min(evaluation)
    algorithm.stop()


def test_a_minibatch_holds_a_sequence() -> None:
    """RLlib would wait for ever for one that holds less."""
    algorithm = ppo().training(minibatch_size=3).build_algo()
    sizes = []
    learner = learner_of(algorithm)
    update = learner._update

    def spy(batch: MultiAgentBatch, **kwargs: Any) -> Any:
        sizes.append(batch[DEFAULT_MODULE_ID]["obs"].shape[0])
        return update(batch, **kwargs)

    learner._update = spy
    algorithm.train()
    # Two epochs over the episodes, one by one.
    assert set(sizes) == {1}
    assert len(sizes) >= 8
    algorithm.stop()


def test_truncated_bptt_is_a_setting() -> None:
    algorithm = ppo(max_seq_len=5).training(minibatch_size=None, num_epochs=1).build_algo()
    shapes = []
    learner = learner_of(algorithm)
    update = learner._update

    def spy(batch: MultiAgentBatch, **kwargs: Any) -> Any:
        shapes.append(copy.copy(batch[DEFAULT_MODULE_ID]["obs"].shape))
        return update(batch, **kwargs)

    learner._update = spy
    algorithm.train()
    # Episodes of 11 steps and the one that RLlib adds, in pieces of 5.
    assert {(s[0] % 3, s[1]) for s in shapes} == {(0, 5)}
    algorithm.stop()


def test_the_target_network_keeps_its_connections() -> None:
    """RLlib averages buffers too, and would round indices down."""
    algorithm = asynchronous(APPOConfig, "labyrinth_escape").build_algo()
    module = learner_of(algorithm).module[DEFAULT_MODULE_ID]
    algorithm.stop()
    [(main, target)] = module.get_target_network_pairs()
    assert module.target.normalizer is module.policy.normalizer
    with torch.no_grad():
        for parameter in module.policy.parameters():
            parameter.add_(1.0)
    update_target_network(main_net=main, target_net=target, tau=0.005)
    assert torch.equal(module.target.core.parents, module.policy.core.parents)
    for followed, following in zip(
        module.policy.parameters(), module.target.parameters(), strict=True
    ):
        torch.testing.assert_close(followed - following, torch.full_like(followed, 0.995))
    # Runners have no such copy; learners' checkpoints do.
    assert any(key.startswith("target.") for key in module.get_state())
    assert not any(key.startswith("target.") for key in module.get_state(inference_only=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.training(predictor_lr=-1.0), "predictor_lr must be a number at least 0"),
        (lambda c: c.training(lr=0), "lr must be a number greater than 0, got 0"),
        (lambda c: c.rl_module(model_config={"hidden_size": 3}), "model_config names no policy"),
        (lambda c: c.rl_module(model_config={**SPARSE, "value_head": False}), "value_head must"),
        (lambda c: c.rl_module(model_config={**SPARSE, "max_seq_len": 0}), "max_seq_len must be"),
        (
            lambda c: c.rl_module(model_config={**SPARSE, "neuron_noise": 0.1}),
            "neuron_noise must be 0 for PPO",
        ),
        (lambda c: c.learners(num_learners=2), "num_learners must be 0 or 1 under sgprop"),
        (
            lambda c: c.rl_module(
                model_config={"policy": "mlp", "normalize_observations": True}
            ).learners(num_learners=2),
            "num_learners must be 0 or 1 with normalize_observations",
        ),
        (lambda c: c.environment("my_env"), "max_seq_len is missing"),
        (lambda c: c.training(num_epochs=0), "num_epochs must be a whole number of at least 1"),
        (lambda c: c.env_runners(observation_filter="MeanSdFilter"), "observation_filter does"),
        (lambda c: c.environment(clip_rewards=True), "environment.clip_rewards does nothing"),
        (lambda c: c.training(model={"fcnet_hiddens": [2]}), "training.model does nothing"),
        (lambda c: c.training(optimizer={"eps": 1e-5}), "training.optimizer does nothing"),
        (lambda c: c.training(use_gae=False), "advantages are always GAE's"),
        (lambda c: c.resources(num_gpus=1), "set num_gpus_per_learner under learners"),
        (lambda c: c.multi_agent(policies=["a"]), "multi_agent.policies does nothing under PPO"),
        (lambda c: c.offline_data(input_="dataset"), "offline_data.input_ does nothing"),
        (lambda c: c.framework("tf2"), "framework.framework does nothing under PPO"),
        (
            lambda c: c.training(train_batch_size=99, train_batch_size_per_learner=80),
            "training.train_batch_size does nothing beside train_batch_size_per_learner",
        ),
        (
            lambda c: c.training(grad_clip=None, grad_clip_by="value"),
            "training.grad_clip_by does nothing without grad_clip",
        ),
        (lambda c: c.environment(clip_actions=True), "clip_actions does nothing where actions are"),
        (
            lambda c: c.environment("CartPole-v1", env_config={}, normalize_actions=False),
            "environment.normalize_actions does nothing where actions are discrete",
        ),
        (
            lambda c: c.env_runners(episode_lookback_horizon=5),
            "env_runners.episode_lookback_horizon does nothing without connectors",
        ),
        (lambda c: c.rl_module(model_config={"policy": "mlp", "max_seq_len": 3}), "without memory"),
        (
            lambda c: c.evaluation(evaluation_config={"clip_rewards": True}),
            "evaluation_config.clip_rewards does nothing",
        ),
        (
            lambda c: c.evaluation(evaluation_parallel_to_training=True),
            "evaluation.evaluation_parallel_to_training does nothing",
        ),
    ],
)
def test_bad_settings_are_refused_in_one_line(change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        change(ppo()).validate()
    assert "\n" not in str(error.value)


def test_settings_that_do_something_beside_others_are_taken() -> None:
    config = PPOConfig().rl_module(model_config={"policy": "mlp"})
    config.environment("Pendulum-v1", clip_actions=True, normalize_actions=False)
    config.training(train_batch_size=256, grad_clip=0.5, grad_clip_by="value").validate()


@pytest.mark.parametrize("kind", [PPOConfig, APPOConfig, IMPALAConfig])
def test_what_the_new_api_stack_ignores_is_refused(kind: type[PPOConfig]) -> None:
    names = setting_names(kind)
    for name in (STOCK_IGNORES & vars(kind()).keys()) - {"evaluation_parallel_to_training"}:
        bad = kind().environment("labyrinth_escape").rl_module(model_config=SPARSE)
        value = getattr(bad, name)
        setattr(bad, name, not value if isinstance(value, bool) else "something")
        if name in names:
            section, argument = names[name]
            expected = rf"^{section}.{argument} does nothing under .*: leave it out$"
            with pytest.raises(ValueError, match=expected):
                bad.validate()
    known = {"observation_filter", "clip_rewards", "num_gpus", "model"}
    assert known <= STOCK_IGNORES & names.keys()
    if kind is not PPOConfig:  # it shuffles by default
        bad = kind().environment("labyrinth_escape").rl_module(model_config=SPARSE)
        with pytest.raises(ValueError, match="shuffle_batch_per_epoch does nothing"):
            bad.training(shuffle_batch_per_epoch=True).validate()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"algorithm": "DQN"},
            "algorithm: DQN does not train these policies here; use Reinforce, PPO, APPO, IMPALA",
        ),
        ({"config": {"api_stack": {}}}, "config.api_stack: experiments run on RLlib's new API"),
        (
            {"config": {"training": {"predictor_rl": 1}}},
            "config.training.predictor_rl: unknown key; did you mean 'predictor_lr'",
        ),
        ({"config": {"training": {"predictor_lr": -1}}}, "predictor_lr: must be at least 0"),
    ],
)
def test_bad_experiments_are_refused_in_one_line(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    changes = copy.deepcopy(changes)
    if "config" in changes:
        changes["config"]["environment"] = {"env": "labyrinth_escape"}
    with pytest.raises(ExperimentError, match=message) as error:
        make_experiment(tmp_path / "bad.yaml", **{"algorithm": "PPO", **changes})
    assert "\n" not in str(error.value)


def test_a_runner_keeps_its_own_generators() -> None:
    """RLlib hands the local runner's state to remote ones, which must not draw alike."""
    algorithm = ppo().build_algo()
    runner = algorithm.env_runner
    state = runner.get_state()
    before = torch.rand(3)
    runner.set_state(copy.deepcopy(state))
    assert torch.equal(torch.rand(3), before)
    state["episodes"]["worker_index"] = 1
    runner.set_state(state)
    assert not torch.equal(torch.rand(3), before)
    # Nor do they get it where weights alone are asked for.
    assert "episodes" not in runner.get_state(components="rl_module")
    algorithm.stop()
