"""What every policy and every environment promises; a new one is tested by being registered.

Every policy trains on every kind of action, under REINFORCE and under RLlib's PPO, and continues
from a checkpoint.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sgrl.envs.by_id import POPGYM_IDS
from sgrl.envs.registry import make_single, make_vector
from sgrl.nn import SparseRNN, SyntheticGradient
from sgrl.nn.feedforward_policies import SparseMLPPolicy
from sgrl.nn.policy import Policy, PolicyOutput, State, make_linear
from sgrl.nn.recurrent_policies import DenseRecurrentPolicy, SlotActor, SparseNetPolicy
from sgrl.nn.registry import POLICIES, load_policy, make_policy, save_policy
from sgrl.reinforce import Rollout, UpdateSettings, action_space_of, train
from sgrl.reinforce.batch import EpisodeBatch
from sgrl.reinforce.update import make_optimizers, update
from sgrl.results.plan import Stop, TrialConfig
from sgrl.tuning.experiment.sections import build_algorithm_config

# RLlib makes its vector of environments under one id, again and again.
pytestmark = pytest.mark.filterwarnings("ignore:.*Overriding environment rllib-:UserWarning")

EPISODE_LENGTH = 4


class Tiny(gym.Env):
    """Rewards actions that are large where the first observation is."""

    observation_space = gym.spaces.Box(-1, 1, (6,), np.float32)
    action_space: gym.Space = gym.spaces.Discrete(3)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.seen = self.np_random.uniform(-1, 1, 6).astype(np.float32)
        return self.seen, {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        assert self.action_space.contains(action)
        reward = float(self.seen[0] * np.sum(action))
        self.seen = self.np_random.uniform(-1, 1, 6).astype(np.float32)
        return self.seen, reward, False, False, {}


class TinyParts(Tiny):
    action_space = gym.spaces.MultiDiscrete([2, 3])


class TinyBox(Tiny):
    action_space = gym.spaces.Box(-1, 1, (2,), np.float32)


SPACES = {"discrete": Tiny, "multi_discrete": TinyParts, "box": TinyBox}
for _name, _class in SPACES.items():
    gym.register(f"sgrl-contract/{_name}-v0", entry_point=_class)

# Settings that make a policy small, of those that it has.
SMALL = {
    "feature_size": 6,
    "embedding_size": 6,
    "hidden_size": 6,
    "num_layers": 2,
    "num_neurons": 6,
    "neuron_size": 2,
    "num_parents": 2,
    "num_slots": 2,
    "num_input_neurons": 3,
    "actor_slots": 2,
}
TRAINING: dict[str, dict[str, Any]] = {
    "Reinforce": {"lr": 1e-3},
    "PPO": {
        "lr": 1e-3,
        "train_batch_size_per_learner": 4 * EPISODE_LENGTH,
        "minibatch_size": 4 * EPISODE_LENGTH,
        "num_epochs": 1,
    },
}
COMBINATIONS = list(itertools.product(POLICIES, SPACES, TRAINING))
# Every policy once, with all kinds of actions and both algorithms among them.
SAMPLE = [
    (policy, list(SPACES)[index % 3], list(TRAINING)[index // 3 % 2])
    for index, policy in enumerate(POLICIES)
]


def build(policy: str, space: str, algorithm: str) -> Any:
    fields = {field.name for field in dataclasses.fields(POLICIES[policy].Settings)}
    model = {"policy": policy} | {key: SMALL[key] for key in SMALL if key in fields}
    environment = {
        "env": f"sgrl-contract/{space}-v0",
        "env_config": {"episode_length": EPISODE_LENGTH},
    }
    trial = TrialConfig(
        algorithm=algorithm,
        method=policy,
        seed=0,
        sections={
            "environment": environment,
            "env_runners": {"num_env_runners": 0, "num_envs_per_env_runner": 2},
            "training": TRAINING[algorithm],
        },
        model=model,
        stop=Stop(training_iteration=1),
    )
    return build_algorithm_config(trial).build_algo()


@pytest.fixture
def algorithms(ray_session: None) -> Iterator[list[Any]]:
    """Those in the list are stopped at the test's end."""
    started: list[Any] = []
    yield started
    for algorithm in started:
        algorithm.stop()


def weights(algorithm: Any) -> dict[str, np.ndarray]:
    """A copy of what the learner holds."""
    module = algorithm.learner_group._learner.module["default_policy"]
    return {name: np.array(value) for name, value in module.get_state().items()}


@pytest.mark.parametrize(("policy", "space", "algorithm"), COMBINATIONS)
def test_every_policy_trains_on_every_kind_of_action(
    policy: str, space: str, algorithm: str, algorithms: list[Any]
) -> None:
    trained = build(policy, space, algorithm)
    algorithms.append(trained)
    before = weights(trained)
    trained.train()
    after = weights(trained)
    assert all(np.isfinite(value).all() for value in after.values())
    actor = [name for name in after if ".actor." in name and "predictor" not in name]
    assert any((after[name] != before[name]).any() for name in actor)


@pytest.mark.parametrize(
    ("name", "space"), [*(("gru", space) for space in SPACES), ("own_block", "discrete")]
)
def test_the_plain_loop_gives_the_numbers_of_the_algorithm(
    name: str, space: str, algorithms: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of a policy of one's own, with a second layer that mixes."""
    monkeypatch.setitem(POLICIES, "own_block", Block)
    algorithm = build(name, space, "Reinforce")
    algorithms.append(algorithm)
    env = make_vector(f"sgrl-contract/{space}-v0", 2, {"episode_length": EPISODE_LENGTH})
    fields = {field.name for field in dataclasses.fields(POLICIES[name].Settings)}
    settings = {key: SMALL[key] for key in SMALL if key in fields}
    actions = action_space_of(env.action_space)
    policy = make_policy(name, env.observation_size, actions, seed=0, **settings)
    for row in train(policy, env, 2, lr=1e-3, seed=0):
        reported = algorithm.train()["sgrl"]
        columns = ["env_steps", "episode_return_mean", "policy_loss", "entropy", "grad_norm"]
        mixing = [column for column in row if "mixing" in column or "predict" in column]
        assert len(mixing) == (20 if name == "own_block" else 0)
        for column in columns + mixing:
            assert reported[column] == row[column], column


@pytest.mark.parametrize(("space", "best"), [("discrete", 2), ("multi_discrete", 3), ("box", 4)])
def test_reinforce_learns_every_kind_of_action(space: str, best: float) -> None:
    """To more than half of what the best actions earn on average, from nothing."""
    env = make_vector(f"sgrl-contract/{space}-v0", 20, {"episode_length": EPISODE_LENGTH})
    actions = action_space_of(env.action_space)
    policy = make_policy("mlp", env.observation_size, actions, hidden_size=16)
    settings = UpdateSettings(gamma=0.0)
    returns = [
        row["episode_return_mean"] for row in train(policy, env, 60, lr=1e-3, settings=settings)
    ]
    assert abs(returns[0]) < 0.25 * best
    assert np.mean(returns[-5:]) > 0.6 * best


# ------------------------------------------------------------------ networks act as written


class TanhEncoder(SparseNetPolicy):
    def _build_encoder(self, generator: torch.Generator, dtype: torch.dtype) -> nn.Module:
        layers = super()._build_encoder(generator, dtype)
        return nn.Sequential(*layers[:3], nn.Tanh())


class DeepEncoder(SparseNetPolicy):
    def _build_encoder(self, generator: torch.Generator, dtype: torch.dtype) -> nn.Module:
        size = self.settings.embedding_size
        more = make_linear(size, size, generator, dtype)
        return nn.Sequential(super()._build_encoder(generator, dtype), more, nn.Tanh())


class SameEncoder(SparseNetPolicy):
    """The published one, built by the subclass."""

    def _build_encoder(self, generator: torch.Generator, dtype: torch.dtype) -> nn.Module:
        return nn.Sequential(*super()._build_encoder(generator, dtype))


class SkippedCore(SparseNetPolicy):
    def run_core(self, embeddings: Tensor, state: State, mask: Tensor | None) -> Any:
        features, state = super().run_core(embeddings, state, mask)
        size = min(features.shape[-1], embeddings.shape[-1])
        return features + nn.functional.pad(embeddings, (0, features.shape[-1] - size)), state


class FadingRNN(SparseRNN):
    """Another input and another schedule of lambda."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().forward(x.tanh(), *args, **kwargs)


class FadingCore(SparseNetPolicy):
    def _build_core(self, generator: torch.Generator, dtype: torch.dtype) -> int:
        size = super()._build_core(generator, dtype)
        self.core.__class__ = FadingRNN
        return size


class FirstState(SparseNetPolicy):
    def initial_state(self, batch_size: int) -> State:
        return {"h": self.core.initial_state(batch_size) + 0.5}


class DenseActor(SparseNetPolicy):
    def _build_actor(
        self, core_size: int, generator: torch.Generator, dtype: torch.dtype
    ) -> nn.Module:
        return make_linear(core_size, self.num_outputs, generator, dtype)


class SharpActor(SparseNetPolicy):
    class Actor(SlotActor):
        def forward(self, h: Tensor, stacked: Tensor | None = None) -> Tensor:
            return 3 * super().forward(h, stacked)

    def _build_actor(
        self, core_size: int, generator: torch.Generator, dtype: torch.dtype
    ) -> nn.Module:
        actor = super()._build_actor(core_size, generator, dtype)
        actor.__class__ = SharpActor.Actor
        return actor


class TanhValues(SparseNetPolicy):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.value_head = nn.Sequential(self.value_head, nn.Tanh())


class OwnForward(SparseNetPolicy):
    """Which knows nothing of what acting keeps."""

    def forward(
        self, observations: Tensor, state: State | None = None, mask: Tensor | None = None
    ) -> PolicyOutput:
        output = super().forward(observations, state, mask)
        return output._replace(logits=output.logits.tanh())


class Block(SparseNetPolicy):
    """A second layer that mixes."""

    def _build_core(self, generator: torch.Generator, dtype: torch.dtype) -> int:
        size = super()._build_core(generator, dtype)
        self.block = SyntheticGradient(size, context_size=size, mixing_weight=0.5, dtype=dtype)
        return size

    def run_core(self, embeddings: Tensor, state: State, mask: Tensor | None) -> Any:
        features, state = super().run_core(embeddings, state, mask)
        return self.block(features.tanh(), features, mask), state


class EncodedMLP(SparseMLPPolicy):
    def _build_encoder(self, generator: torch.Generator, dtype: torch.dtype) -> nn.Module:
        size = self.observation_size
        return nn.Sequential(make_linear(size, size, generator, dtype), nn.Tanh())


class RememberingMLP(SparseMLPPolicy):
    """Adds up what it has computed."""

    def initial_state(self, batch_size: int) -> State:
        size = self.core.num_neurons * self.core.neuron_size
        return {"sum": self.actor.keys.new_zeros(batch_size, size)}

    def run_core(self, embeddings: Tensor, state: State, mask: Tensor | None) -> Any:
        features = super().run_core(embeddings, {}, mask)[0].cumsum(0) + state["sum"]
        return features, {"sum": features[-1]}


class DenseHeadMLP(SparseMLPPolicy):
    def _build_actor(
        self, core_size: int, generator: torch.Generator, dtype: torch.dtype
    ) -> nn.Module:
        return make_linear(core_size, self.num_outputs, generator, dtype)


def halve(_module: nn.Module, _inputs: Any, output: Any) -> Any:
    """A forward hook."""
    if isinstance(output, PolicyOutput):
        return output._replace(logits=output.logits / 2)
    return (output[0] / 2, *output[1:]) if isinstance(output, tuple) else output / 2


class Doubled(nn.Module):
    """A parametrization."""

    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def replace_encoder_method(policy: Policy) -> None:
    encoder = policy.encoder
    encoder.forward = lambda observations: 2 * nn.Sequential.forward(encoder, observations)


Change = Callable[[Policy], object]
AFTERWARDS: dict[str, dict[str, Change]] = {
    "sparsenet": {
        "activation": lambda p: setattr(p.encoder, "3", nn.Tanh()),
        "slope": lambda p: setattr(p.encoder[3], "negative_slope", 0.3),
        "norm": lambda p: setattr(p.encoder[1], "eps", 0.5),
        "affine_norm": lambda p: setattr(p.encoder, "1", nn.LayerNorm(6).double()),
        "no_bias": lambda p: setattr(p.encoder[0], "bias", None),
        "encoder_hook": lambda p: p.encoder[2].register_forward_hook(halve),
        "encoder_method": replace_encoder_method,
        "parametrization": lambda p: parametrize.register_parametrization(
            p.encoder[0], "weight", Doubled()
        ),
        "core_hook": lambda p: p.core.register_forward_hook(halve),
        "actor_hook": lambda p: p.actor.register_forward_hook(halve),
        "policy_hook": lambda p: p.register_forward_hook(halve),
        "scale": lambda p: setattr(p.actor, "scale", 0.7),
    },
    "gru": {"activation": lambda p: setattr(p.encoder, "3", nn.Tanh())},
    "sparse_mlp": {
        "encoder": lambda p: setattr(p, "encoder", nn.Tanh()),
        "core_hook": lambda p: p.core.register_forward_hook(halve),
        "actor_hook": lambda p: p.actor.register_forward_hook(halve),
        "policy_hook": lambda p: p.register_forward_hook(halve),
    },
}
SUBCLASSES = {
    kind.__name__: kind
    for kind in (*SparseNetPolicy.__subclasses__(), *SparseMLPPolicy.__subclasses__())
    if kind.__module__ == __name__  # not those of other test files
}
#: What compiled code computes all the same.
STILL_PUBLISHED = {"sparsenet", "SameEncoder", "TanhValues", "sparsenet/scale"}
STILL_PUBLISHED |= {"sparse_mlp", "DenseHeadMLP", "sparse_mlp/actor_hook", "gru", "lstm"}
NETWORKS = [
    *POLICIES,
    *SUBCLASSES,
    *(f"{name}/{change}" for name, changes in AFTERWARDS.items() for change in changes),
]


def network(name: str, backend: str) -> Policy:
    """One of `NETWORKS`, all of its parameters other than 0."""
    base, _, change = name.partition("/")
    kind = SUBCLASSES.get(base) or POLICIES[base]
    fields = {field.name for field in dataclasses.fields(kind.Settings)}
    chosen = SMALL | {"backend": backend, "value_head": True, "mixing_weight": 0.5}
    settings = kind.Settings(**{key: chosen[key] for key in chosen if key in fields})
    generator = torch.Generator().manual_seed(0)
    policy = kind(6, 3, settings, generator, torch.float64)
    if change:
        AFTERWARDS[base][change](policy)
    with torch.no_grad():
        for parameter in policy.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(0.3 * noise)
    return policy


def made_up_batch(length: int) -> EpisodeBatch:
    """Episodes of all lengths up to T."""
    generator = torch.Generator().manual_seed(1)
    shape, num_envs = (length, 5), 5
    lengths = 1 + torch.arange(num_envs) % length
    return EpisodeBatch(
        observations=torch.randn(*shape, 6, generator=generator),
        actions=torch.randint(0, 3, shape, generator=generator),
        rewards=torch.randn(shape, generator=generator),
        mask=torch.arange(length).unsqueeze(1) < lengths,
        success=torch.zeros(num_envs, dtype=torch.bool),
        lengths=lengths,
    )


def after_update(policy: Policy, batch: EpisodeBatch) -> dict[str, Tensor]:
    """Gradients, parameters and mixing weights after one training step, and what it measured."""
    settings = UpdateSettings(baseline="value_head", two_phase=policy.two_phase)
    measured = update(policy, make_optimizers(policy, 1e-3, 1e-3), batch, settings)
    gradients = {f"grad of {n}": p.grad for n, p in policy.named_parameters() if p.grad is not None}
    numbers = {name: torch.tensor(value) for name, value in measured.items()}
    return gradients | numbers | policy.state_dict()


def close(actual: Tensor, expected: Tensor, what: str) -> None:
    torch.testing.assert_close(
        actual, expected, rtol=1e-9, atol=1e-11, msg=lambda message: f"{what}: {message}"
    )


@pytest.mark.parametrize("length", [1, 4])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_acts_and_learns_as_written(name: str, length: int) -> None:
    """By single steps as over whole episodes, and with every backend as with eager."""
    has_backend = hasattr(network(name, "eager").settings, "backend")
    observations = made_up_batch(length).observations.double()
    with torch.no_grad():
        expected = network(name, "eager")(observations)
    learned = after_update(network(name, "eager"), made_up_batch(length))
    for backend in ("eager", "torch", "native", "auto") if has_backend else ("",):
        for keep in (False, True):
            policy, batch = network(name, backend), made_up_batch(length)
            acting = policy.acting(length, 5, keep)
            with torch.inference_mode():
                for t, now in enumerate(observations):
                    close(acting.step(now), expected.logits[t], f"{backend} {keep=} step {t}")
            kept = acting.is_of(policy, observations)
            assert kept == (
                keep
                and name in STILL_PUBLISHED
                and backend in ("native", "auto")
                and (length == 1 or isinstance(policy, SparseNetPolicy | DenseRecurrentPolicy))
            )
            batch.acted = acting if kept else None
            close(policy(observations).values, expected.values, f"{backend} values")
            results = after_update(policy, batch)
            assert results.keys() == learned.keys()
            for key, value in results.items():
                close(value, learned[key], f"{backend} {keep=} {key}")


@pytest.mark.parametrize(
    ("base", "change"), [(base, change) for base in AFTERWARDS for change in AFTERWARDS[base]]
)
def test_what_was_kept_is_not_used_after_a_change(base: str, change: str) -> None:
    policy, observations = network(base, "auto"), made_up_batch(1).observations.double()
    acting = policy.acting(1, 5, keep=True)
    with torch.inference_mode():
        acting.step(observations[0])
    AFTERWARDS[base][change](policy)
    assert acting.is_of(policy, observations) == (f"{base}/{change}" in STILL_PUBLISHED)


def check_restored(
    policy: str, space: str, algorithm: str, algorithms: list[Any], tmp_path: Path
) -> None:
    trained = build(policy, space, algorithm)
    algorithms.append(trained)
    trained.train()
    saved = weights(trained)
    trained.save_checkpoint(str(tmp_path))
    restored = build(policy, space, algorithm)
    algorithms.append(restored)
    restored.load_checkpoint(str(tmp_path))
    for name, value in weights(restored).items():
        np.testing.assert_array_equal(value, saved[name])
    if algorithm == "Reinforce":  # which also continues exactly
        trained.train()
        restored.train()
        going_on = weights(trained)
        for name, value in weights(restored).items():
            np.testing.assert_array_equal(value, going_on[name])
    else:
        restored.train()

    # What acts without Ray is the same policy.
    module = trained.learner_group._learner.module["default_policy"]
    save_policy(module.policy, tmp_path)
    loaded = load_policy(tmp_path)
    assert loaded.action_space == module.policy.action_space
    env = make_vector(f"sgrl-contract/{space}-v0", 2, {"episode_length": EPISODE_LENGTH})
    batches = [Rollout(env, acting, seed=3).collect() for acting in (module.policy, loaded)]
    torch.testing.assert_close(batches[0].actions, batches[1].actions, atol=0, rtol=0)


@pytest.mark.parametrize(("policy", "space", "algorithm"), SAMPLE)
def test_a_policy_of_each_kind_is_saved_and_restored(
    policy: str, space: str, algorithm: str, algorithms: list[Any], tmp_path: Path
) -> None:
    check_restored(policy, space, algorithm, algorithms, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("policy", "space", "algorithm"), [one for one in COMBINATIONS if one not in SAMPLE]
)
def test_every_policy_is_saved_and_restored(
    policy: str, space: str, algorithm: str, algorithms: list[Any], tmp_path: Path
) -> None:
    check_restored(policy, space, algorithm, algorithms, tmp_path)


@pytest.mark.parametrize("env", POPGYM_IDS)
def test_every_popgym_environment_is_made_and_steps(env: str) -> None:
    """One by one and side by side, to the end of its episodes."""
    single = make_single(env, {"previous_action": True})
    single.action_space.seed(0)
    single.reset(seed=0)
    size = single.observation_space.shape
    observation, reward, *_ = single.step(single.action_space.sample())
    assert observation.shape == size
    assert np.isfinite(reward)

    vector = make_vector(env, 2)
    current, ends = vector.reset([0, 1]), np.zeros(2, int)
    for _ in range(vector.episode_length):
        assert current.shape == (2, vector.observation_size)
        action = np.stack([single.action_space.sample() for _ in range(2)])
        step = vector.step(action)
        current = step.observations
        assert np.isfinite(step.rewards).all()
        ends += step.terminated | step.truncated
    assert ends.tolist() == [1, 1]
