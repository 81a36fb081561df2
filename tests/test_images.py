"""Images: how policies read them, and that one with convolutions learns from them."""

import json
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from sweeps import make_experiment

from sgrl import load_policy
from sgrl.envs.registry import make_single, make_vector, observation_shape
from sgrl.envs.vector import observation_shape as shape_of
from sgrl.nn.encoder import Convolutions
from sgrl.nn.policy import Policy
from sgrl.nn.registry import make_policy, recorded_settings, save_policy
from sgrl.nn.stacking import stack_policies
from sgrl.reinforce import UpdateSettings, train
from sgrl.results.evaluation import evaluate
from sgrl.results.plan import ExperimentError
from sgrl.rllib import PPOConfig, ReinforceConfig, register_environment

SHAPE = (9, 8, 3)
#: Small networks.
SIZES = {"feature_size": 16, "embedding_size": 16, "conv_layers": 2, "conv_channels": 8}
MODELS = {
    "mlp": {**SIZES, "hidden_size": 16},
    "gru": {**SIZES, "hidden_size": 16},
    "sparsenet": {**SIZES, "num_neurons": 8, "num_parents": 3, "num_input_neurons": 4},
    "dense": {"num_layers": 1, "hidden_size": 16},
    "sparse_mlp": {"num_neurons": 8, "neuron_size": 2, "num_parents": 2},
}
ENCODED = ("mlp", "gru", "sparsenet")
STEPS = 5


class Quadrants(gym.Env):
    """Shows at each step a bright square in noise; the action is to name its quadrant."""

    observation_space = gym.spaces.Box(0, 255, SHAPE, np.uint8)
    action_space = gym.spaces.Discrete(4)

    def _show(self) -> Any:
        self.where = int(self.np_random.integers(4))
        image = self.np_random.integers(0, 90, SHAPE, np.uint8)
        top, left = self.np_random.integers(0, 3, 2) + 4 * np.array(divmod(self.where, 2))
        image[top : top + 2, left : left + 2] += 150
        return image

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        return self._show(), {}

    def step(self, action: Any) -> Any:
        reward = float(action == self.where)
        return self._show(), reward, False, False, {}


ENV = "Quadrants-v0"
gym.register(ENV, entry_point=Quadrants, max_episode_steps=STEPS)
register_environment(ENV)
CHANCE = STEPS / 4


def make(name: str, shape: Any = SHAPE, **settings: Any) -> Policy:
    return make_policy(name, shape, 4, seed=1, **{**MODELS[name], **settings})


def images(*batch: int) -> torch.Tensor:
    return torch.randint(256, (*batch, *SHAPE)).float()


def test_images_keep_their_shape() -> None:
    assert observation_shape(ENV) == SHAPE
    single, vector = make_single(ENV), make_vector(ENV, 2)
    assert (single.observation_space.dtype, single.observation_space.shape) == (np.uint8, SHAPE)
    assert (vector.observation_shape, vector.observation_size) == (SHAPE, 216)
    first, _ = single.reset(seed=7)
    np.testing.assert_array_equal(vector.reset([7, 8])[0].reshape(SHAPE), first)
    second = single.step(1)[0]
    stepped = vector.step(np.array([1, 1]))
    np.testing.assert_array_equal(stepped.observations[0].reshape(SHAPE), second)
    # Beside a previous action there is nothing but a row of numbers.
    assert observation_shape(ENV, {"previous_action": True}) == (216 + 4,)
    for space in (
        gym.spaces.Box(0, 1, SHAPE, np.float32),
        gym.spaces.Box(0, 255, (9, 24), np.uint8),
    ):
        assert shape_of(space) == (int(np.prod(space.shape)),)


@pytest.mark.parametrize("name", MODELS)
def test_steps_equal_the_unroll(name: str) -> None:
    policy = make(name, value_head=True)
    assert isinstance(policy.encoder, torch.nn.Sequential) == (name in ENCODED)
    observations = images(3, 2).flatten(2)
    whole = policy(observations)
    state = policy.initial_state(2)
    acting = policy.acting(3, 2, keep=True)
    for t, now in enumerate(observations):
        step = policy.step(now, state)
        state = step.state
        torch.testing.assert_close(step.logits, whole.logits[t])
        if name != "sparse_mlp":  # which keeps one step
            with torch.inference_mode():
                torch.testing.assert_close(acting.step(now), whole.logits[t])
    if name != "sparse_mlp":
        torch.testing.assert_close(
            acting.replay(policy, observations, None).logits, whole.logits, atol=1e-6, rtol=1e-5
        )
    assert whole.values is not None
    (whole.logits.sum() + whole.values.sum()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in policy.parameters())


def test_convolutions_by_hand() -> None:
    """Sums over the nine cells around every second cell, those beyond the border zero."""
    policy = make("mlp", conv_layers=1, conv_channels=2, dtype=torch.float64)
    convolutions = policy.encoder[0]
    assert isinstance(convolutions, Convolutions)
    [layer] = convolutions.layers
    with torch.no_grad():
        layer.bias.copy_(torch.tensor([0.1, -0.2], dtype=torch.float64))
    seen = images(1)[0].double().numpy() / 255
    padded = np.pad(seen, ((1, 1), (1, 1), (0, 0)))
    weight = layer.weight.detach().numpy()
    expected = np.zeros((2, 5, 4))
    for row in range(5):
        for column in range(4):
            cells = padded[2 * row : 2 * row + 3, 2 * column : 2 * column + 3]
            sums = np.einsum("ijc,kcij->k", cells, weight) + np.array([0.1, -0.2])
            expected[:, row, column] = np.where(sums > 0, sums, 0.01 * sums)
    assert convolutions.num_features == expected.size
    found = convolutions(policy.prepare(torch.from_numpy(seen * 255).flatten()))
    np.testing.assert_allclose(found.detach(), expected.ravel(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_a_dense_encoder_reads_them_as_a_row_of_numbers(name: str) -> None:
    settings = {"encoder": "dense"} if name in ENCODED else {}
    scaled, raw = make(name, **settings), make(name, scale_images=False, **settings)
    flat = make(name, 216, **settings)
    observations = images(3, 2).flatten(2)
    assert torch.equal(raw(observations).logits, flat(observations).logits)
    assert torch.equal(scaled(observations).logits, flat(observations / 255).logits)
    scaled = make(name, normalize_observations=True, **settings)
    scaled.observe(observations)
    assert scaled.normalizer is not None
    mean = (observations / 255).flatten(0, 1).double().mean(0)
    torch.testing.assert_close(scaled.normalizer.mean, mean, rtol=1e-6, atol=1e-9)


def test_saved_with_their_shape(tmp_path: Path) -> None:
    environment = {"env": ENV, "env_config": {}}
    policy = make("gru")
    save_policy(policy, tmp_path, environment=environment)
    loaded = load_policy(tmp_path)
    assert loaded.observation_shape == SHAPE
    assert loaded.settings == policy.settings
    observations = images(2, 2).flatten(2)
    assert torch.equal(loaded(observations).logits, policy(observations).logits)
    assert evaluate(tmp_path, episodes=2)["episode_length_mean"] == STEPS

    # Of a version that knew neither shapes nor these settings.
    policy = make("gru", 216)
    save_policy(policy, tmp_path, environment=environment)
    description = json.loads((tmp_path / "policy.json").read_text())
    del description["observation_shape"]
    new = ("encoder", "conv_layers", "conv_channels", "scale_images", "normalize_observations")
    for key in new:
        del description["settings"][key]
    (tmp_path / "policy.json").write_text(json.dumps(description))
    loaded = load_policy(tmp_path)
    assert torch.equal(loaded(observations).logits, policy(observations).logits)
    assert evaluate(tmp_path, episodes=2)["episodes"] == 2
    # A trial of that version goes on with the network that it has, now that images have a shape.
    settings = recorded_settings("gru", description["settings"])
    resumed = make_policy("gru", SHAPE, 4, seed=1, **settings)
    assert torch.equal(resumed(observations).logits, policy(observations).logits)


def test_what_cannot_be_read_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"encoder must be 'auto' or 'dense', got 'conv': it is"):
        make("mlp", 216, encoder="conv")
    with pytest.raises(ValueError, match=r"\[height, width, channels\] of images, got \[3, 4\]"):
        make("mlp", (3, 4))
    for name in ("conv_layers", "conv_channels"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            make("mlp", **{name: 0})
    with pytest.raises(ValueError, match="policies of images do not stack"):
        stack_policies([make("mlp"), make("mlp")])
    model = {"policy": "gru", "encoder": "conv"}
    with pytest.raises(ExperimentError, match=r"model: encoder must be 'auto' or 'dense', got"):
        make_experiment(tmp_path / "bad.yaml", methods={"gru": {"model": model}})


def learned(returns: list[float]) -> bool:
    """From chance to nearly all that there is."""
    early, late = np.mean(returns[:3]), np.mean(returns[-3:])
    return bool(early < 2 * CHANCE and late > 0.9 * STEPS)


def test_reinforce_learns_from_images() -> None:
    env = make_vector(ENV, 16)
    policy = make_policy("mlp", env.observation_shape, env.num_actions, **MODELS["mlp"])
    settings = UpdateSettings(gamma=0.0)
    rows = train(policy, env, 60, lr=5e-3, settings=settings)
    assert learned([row["episode_return_mean"] for row in rows])


@pytest.mark.usefixtures("ray_session")
# RLlib makes its vector of environments under one id, again and again.
@pytest.mark.filterwarnings("ignore:.*Overriding environment rllib-:UserWarning")
def test_ppo_learns_from_images() -> None:
    config = (
        PPOConfig()
        .environment(ENV)
        .env_runners(num_env_runners=0, num_envs_per_env_runner=8, batch_mode="complete_episodes")
        .rl_module(model_config={"policy": "mlp", **MODELS["mlp"]})
        .training(
            train_batch_size_per_learner=40 * STEPS,
            minibatch_size=10 * STEPS,
            num_epochs=4,
            lr=5e-3,
            gamma=0.0,
        )
        .debugging(seed=0)
    )
    algorithm = config.build_algo()
    policy = algorithm.get_module().policy
    assert isinstance(policy.encoder[0], Convolutions)
    returns = [algorithm.train()["env_runners"]["episode_return_mean"] for _ in range(12)]
    algorithm.stop()
    assert learned(returns)


@pytest.mark.usefixtures("ray_session")
def test_reinforce_resumes_exactly(tmp_path: Path) -> None:
    """With convolutions and normalisation, the numbers of the plain loop."""
    model = {**MODELS["gru"], "normalize_observations": True}
    config = (
        ReinforceConfig()
        .environment(ENV)
        .env_runners(num_envs_per_env_runner=3)
        .rl_module(model_config={"policy": "gru", **model})
        .debugging(seed=2)
    )
    algorithm = config.build_algo()
    rows = []
    for iteration in range(4):
        if iteration == 2:
            algorithm.save_to_path(tmp_path)
        rows.append(algorithm.train()["sgrl"])
    after = algorithm.policy.state_dict()
    env = make_vector(ENV, 3)
    policy = make_policy("gru", env.observation_shape, env.num_actions, seed=2, **model)
    for row, expected in zip(rows, train(policy, env, 4, seed=2), strict=True):
        assert row == {key: expected[key] for key in expected if key != "iteration"}
    algorithm.stop()
    restored = type(algorithm).from_checkpoint(tmp_path)
    assert [restored.train()["sgrl"] for _ in range(2)] == rows[2:]
    assert int(after["normalizer.count"]) == 4 * 3 * STEPS
    for state in (policy.state_dict(), restored.policy.state_dict()):
        for name, value in after.items():
            assert torch.equal(state[name], value), name
    restored.stop()
