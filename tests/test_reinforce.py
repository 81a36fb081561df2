"""Returns, loss, update, rollout and the plain loop, against their definitions."""

import copy
import itertools

import numpy as np
import pytest
import torch

from sgrl.envs.registry import make_vector
from sgrl.nn.kernels.backends import BACKENDS
from sgrl.nn.mixing import split_parameters
from sgrl.nn.registry import make_policy
from sgrl.reinforce.batch import concatenate
from sgrl.reinforce.loop import train
from sgrl.reinforce.loss import (
    discounted_returns,
    normalize_returns,
    reinforce_loss,
    subtract_batch_mean,
)
from sgrl.reinforce.rollout import EVALUATION_SEED_OFFSET, Rollout
from sgrl.reinforce.update import (
    NonFiniteLoss,
    UpdateSettings,
    batch_loss,
    clip_gradients,
    make_optimizers,
    update,
)

SPARSE = {"num_neurons": 12, "num_parents": 3, "num_slots": 2, "num_input_neurons": 4}


def make_env(num_envs: int = 3, episode_length: int = 20) -> object:
    return make_vector("labyrinth_escape", num_envs, {"episode_length": episode_length})


def make_sparse(env: object, seed: int = 0, **settings: object) -> torch.nn.Module:
    return make_policy(
        "sparsenet", env.observation_size, env.num_actions, seed=seed, **(SPARSE | settings)
    )


def test_returns_by_hand() -> None:
    rewards = torch.tensor([[1.0, 1.0], [2.0, 5.0], [4.0, 7.0]])
    mask = torch.tensor([[True, True], [True, False], [True, False]])
    expected = torch.tensor([[1 + 0.5 * (2 + 0.5 * 4), 1.0], [2 + 0.5 * 4, 0.0], [4.0, 0.0]])
    returns = discounted_returns(rewards, mask, 0.5)
    assert torch.equal(returns, expected)
    normalized = normalize_returns(returns, mask)
    valid = expected[mask].numpy()
    np.testing.assert_allclose(
        normalized[mask].numpy(), (valid - valid.mean()) / (valid.std() + 1e-8), rtol=1e-6
    )
    assert not normalized[~mask].any()


def test_loss_by_hand() -> None:
    logits = torch.randn(3, 2, 4, dtype=torch.float64)
    actions, returns = torch.randint(0, 4, (3, 2)), torch.randn(3, 2, dtype=torch.float64)
    mask = torch.tensor([[True, True], [True, False], [True, False]])
    policy_loss = entropy = 0.0
    for t, b in mask.nonzero().tolist():
        probabilities = np.exp(logits[t, b].numpy())
        probabilities /= probabilities.sum()
        policy_loss -= np.log(probabilities[actions[t, b]]) * returns[t, b].item() / 4
        entropy -= (probabilities * np.log(probabilities)).sum() / 4
    terms = reinforce_loss(logits, actions, returns, mask, 0.01)
    assert terms.policy_loss.item() == pytest.approx(policy_loss, rel=1e-12)
    assert terms.entropy.item() == pytest.approx(entropy, rel=1e-12)
    assert terms.loss.item() == pytest.approx(policy_loss - 0.01 * entropy, rel=1e-12)


def test_batch_mean_by_hand() -> None:
    returns = torch.tensor([[1.0, 2.0, 6.0], [3.0, 5.0, 9.0], [4.0, 8.0, 9.0]])
    mask = torch.tensor([[True, True, True], [True, True, False], [True, False, False]])
    # The mean of the other episodes that are still running; the last one has none.
    expected = torch.tensor([[1 - 4.0, 2 - 3.5, 6 - 1.5], [3 - 5.0, 5 - 3.0, 0], [4.0, 0, 0]])
    torch.testing.assert_close(subtract_batch_mean(returns, mask), expected)


def test_batch_mean_leaves_the_expected_gradient() -> None:
    """Two episodes of one step, action 1 with probability 0.7 for a reward of 3, action 0 for 1."""
    probability, rewards = 0.7, torch.tensor([1.0, 3.0], dtype=torch.float64)
    mask = torch.ones(1, 2, dtype=torch.bool)
    expected, mean = 0.0, 0.0
    for actions in itertools.product((0, 1), repeat=2):
        chance = np.prod([probability if action else 1 - probability for action in actions])
        returns = rewards[list(actions)][None]
        # Of log pi(action), with respect to the logit of action 1.
        scores = torch.tensor(actions, dtype=torch.float64) - probability
        expected += chance * (scores * returns).mean().item()
        mean += chance * (scores * subtract_batch_mean(returns, mask)).mean().item()
    assert mean == pytest.approx(expected, rel=1e-12)


def test_value_head_by_hand() -> None:
    env = make_env(episode_length=10)
    policy = make_sparse(env, value_head=True, propagation="backprop")
    batch = Rollout(env, policy, seed=0).collect()
    settings = UpdateSettings(baseline="value_head", value_coeff=0.3, normalize_returns=False)
    terms = batch_loss(policy, batch, settings)
    output = policy(batch.observations, mask=batch.mask)
    returns, valid = discounted_returns(batch.rewards, batch.mask, 0.95), batch.mask
    error = (output.values - returns)[valid].square().mean()
    plain = reinforce_loss(
        output.logits, batch.actions, returns - output.values.detach(), valid, 0.01
    )
    torch.testing.assert_close(terms.policy_loss, plain.policy_loss)
    torch.testing.assert_close(terms.loss, plain.loss + 0.3 * error)
    optimizers = make_optimizers(policy, 5e-3, 0.0)
    for _ in range(30):
        update(policy, optimizers, copy.copy(batch), settings)
    output = policy(batch.observations, mask=batch.mask)
    assert (output.values - returns)[valid].square().mean() < 0.5 * error


def test_baselines_without_what_they_need() -> None:
    with pytest.raises(ValueError, match="baseline must be one of none, batch_mean, value_head"):
        UpdateSettings(baseline="mean")
    env = make_env(episode_length=4)
    policy = make_sparse(env)
    with pytest.raises(ValueError, match="needs a policy with value_head true"):
        batch_loss(policy, Rollout(env, policy, 0).collect(), UpdateSettings(baseline="value_head"))


def test_clipping() -> None:
    gradients = [torch.tensor([3.0, 0.0]), None, torch.tensor([[4.0]])]
    parameters = [torch.zeros(2), torch.zeros(3), torch.zeros(1, 1)]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    assert clip_gradients(parameters, None).item() == 5.0
    assert parameters[0].grad[0] == 3.0
    assert clip_gradients(parameters, 0.5).item() == 5.0
    assert parameters[0].grad[0].item() == pytest.approx(3 * 0.5 / (5 + 1e-6))
    small = torch.zeros(1)
    small.grad = torch.tensor([0.1])
    clip_gradients([small], 0.5)
    assert small.grad[0].item() == pytest.approx(0.1)
    assert clip_gradients([], 0.5).item() == 0.0


def test_a_batch_holds_one_episode_of_each_environment() -> None:
    env = make_env(num_envs=5, episode_length=60)
    rollout = Rollout(env, make_sparse(env), seed=11)
    for _ in range(3):
        batch = rollout.collect()
        assert batch.observations.shape == (60, 5, 56)
        assert (batch.num_padded_steps, batch.num_episodes) == (300, 5)
        assert batch.num_steps == batch.mask.sum()
        assert torch.equal(batch.mask.sum(0), batch.lengths)
        assert (batch.lengths[~batch.success] == 59).all()  # popgym ends one step early
        longest = int(batch.lengths.max())
        assert not batch.observations[longest:][1:].any()
        assert not batch.rewards[~batch.mask].any()
        for b, length in enumerate(batch.lengths.tolist()):
            assert batch.mask[:length, b].all()
            held = batch.observations[length:longest, b]
            assert (held == held[:1]).all()


def test_environments_follow_the_published_seeds() -> None:
    """Batch k of environment e is that of a fresh environment with seed + e + k * num_envs."""
    env = make_env(num_envs=4)
    rollout = Rollout(env, make_sparse(env), seed=100)
    rollout.collect()
    second = rollout.collect()
    fresh = make_env(num_envs=4)
    first_observations = fresh.reset([100 + 4 + e for e in range(4)])
    assert torch.equal(second.observations[0], torch.from_numpy(first_observations))


def test_split_rollouts_see_the_same_mazes() -> None:
    policy = make_sparse(make_env())
    whole = Rollout(make_env(4), policy, seed=5)
    halves = [Rollout(make_env(2), policy, seed=5, first_env=f, total_envs=4) for f in (0, 2)]
    for _ in range(2):
        batch = whole.collect()
        joined = concatenate([half.collect() for half in halves])
        assert torch.equal(batch.observations[0], joined.observations[0])
        assert joined.actions.shape == batch.actions.shape
        assert joined.lengths.shape == batch.lengths.shape
    assert not torch.equal(joined.actions[:, :2], joined.actions[:, 2:])


def test_rollout_continues_from_its_state() -> None:
    env = make_env()
    policy = make_sparse(env)
    rollout = Rollout(env, policy, seed=5)
    rollout.collect()
    state = copy.deepcopy(rollout.get_state())
    expected = rollout.collect()
    resumed = Rollout(make_env(), policy, seed=5)
    resumed.set_state(state)
    batch = resumed.collect()
    assert torch.equal(batch.actions, expected.actions)
    assert torch.equal(batch.observations, expected.observations)


def test_actions_are_drawn_from_the_policy() -> None:
    env = make_vector("labyrinth_escape", 200, {"episode_length": 20})
    policy = make_sparse(env)
    batch = Rollout(env, policy, seed=0).collect()
    with torch.no_grad():
        probabilities = policy(batch.observations).logits.softmax(-1)
    drawn = torch.nn.functional.one_hot(batch.actions, 4).double()
    # Mean of (drawn - expected) over 4000 samples: standard error below 0.5 / 63 = 0.008.
    running = batch.mask
    assert (drawn[running] - probabilities[running]).mean(0).abs().max() < 0.03


def test_optimizers_step_their_own_parameters() -> None:
    env = make_env(num_envs=4, episode_length=30)
    policy = make_sparse(env)
    batch = Rollout(env, policy, seed=0).collect()
    optimizers = make_optimizers(policy, lr=1e-2, predictor_lr=1e-3)
    before = copy.deepcopy(policy)
    metrics = update(policy, optimizers, batch, UpdateSettings())
    for parameters, old, lr in (
        (split_parameters(policy)[0], split_parameters(before)[0], 1e-2),
        (split_parameters(policy)[1], split_parameters(before)[1], 1e-3),
    ):
        change = max((p - o).abs().max().item() for p, o in zip(parameters, old, strict=True))
        assert change == pytest.approx(lr, rel=0.05)  # Adam's first step has the size of lr
    assert {"policy_loss", "entropy", "grad_norm", "predictor_loss", "mixing_weight_mean"} <= set(
        metrics
    )


def test_a_loss_that_is_not_finite_changes_nothing() -> None:
    env = make_env()
    policy = make_sparse(env)
    optimizers = make_optimizers(policy, lr=1e-2, predictor_lr=1e-3)
    batch = Rollout(env, policy, seed=0).collect()
    batch.rewards[0, 0] = float("nan")
    before = copy.deepcopy(policy.state_dict())
    with pytest.raises(NonFiniteLoss, match="smaller learning rate"):
        update(policy, optimizers, batch, UpdateSettings())
    assert all(torch.equal(before[key], value) for key, value in policy.state_dict().items())


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    env = make_env()
    policy = make_sparse(env, mixing_weight=0.5)
    optimizers = make_optimizers(policy, lr=1e-2, predictor_lr=1e-3)
    batch = Rollout(env, policy, seed=0).collect()
    policy.encoder[0].weight.register_hook(lambda gradient: gradient * float("inf"))
    before = copy.deepcopy(policy.state_dict())
    with pytest.raises(NonFiniteLoss, match="smaller learning rate"):
        update(policy, optimizers, batch, UpdateSettings())
    assert all(torch.equal(before[key], value) for key, value in policy.state_dict().items())


@pytest.mark.parametrize(("one", "other"), [(0, 4096), (3, EVALUATION_SEED_OFFSET + 3)])
def test_seeds_far_apart_draw_other_actions(one: int, other: int) -> None:
    env = make_env()
    policy = make_sparse(env)
    with torch.no_grad():  # a uniform policy: actions tell the noise
        policy.actor.A.zero_()
    batches = [Rollout(env, policy, seed).collect() for seed in (one, other)]
    assert not torch.equal(batches[0].actions, batches[1].actions)


@pytest.mark.parametrize(
    ("name", "backend", "two_phase"),
    [
        ("gru", None, False),
        ("mlp", None, True),
        *itertools.product(["sparsenet"], BACKENDS, [False]),
        *itertools.product(["sparse_mlp"], BACKENDS, [False, True]),
    ],
)
def test_an_update_within_autocast(name: str, backend: str | None, two_phase: bool) -> None:
    """The forward pass is run narrower, and nothing else."""
    env = make_env(episode_length=8)
    settings = {"hidden_size": 16} if backend is None else {"backend": backend, **SPARSE}
    if name == "sparse_mlp":
        settings.pop("num_input_neurons")
    policies = [make_policy(name, env.observation_size, 4, **settings) for _ in range(2)]
    batch = Rollout(env, policies[0], seed=0).collect()
    how = UpdateSettings(grad_clip=None, two_phase=two_phase)
    with torch.autocast("cpu", torch.bfloat16):
        loss = batch_loss(policies[1], batch, how).loss
        # Predictors' steps come first: at a rate of 0 they change nothing.
        update(policies[0], make_optimizers(policies[0], 0.0, 0.0), batch, how)
    loss.backward()
    for actual, expected in zip(policies[0].parameters(), policies[1].parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["gru", "lstm", "mlp", "sparsenet"])
def test_the_plain_loop_on_cuda(name: str) -> None:
    env = make_env()
    policy = make_policy(name, env.observation_size, env.num_actions).cuda()
    rows = list(train(policy, env, 2))
    assert all(row["grad_norm"] > 0 for row in rows)


@pytest.mark.parametrize("name", ["gru", "lstm", "mlp", "sparsenet"])
def test_the_plain_loop_repeats_itself(name: str) -> None:
    def run(seed: int) -> list[dict[str, float]]:
        env = make_env()
        settings = SPARSE if name == "sparsenet" else {"hidden_size": 16}
        policy = make_policy(name, env.observation_size, env.num_actions, seed=seed, **settings)
        return list(train(policy, env, 3, seed=seed))

    rows = run(0)
    assert rows == run(0)
    assert rows != run(1)
    assert [row["iteration"] for row in rows] == [1, 2, 3]
    assert [row["padded_env_steps"] for row in rows] == [60, 120, 180]
    assert [row["episodes"] for row in rows] == [3, 6, 9]
    assert rows[0]["env_steps"] == round(3 * rows[0]["episode_length_mean"])


def test_backends_train_alike() -> None:
    """Ten full updates on recorded batches, float64: eager and torch end at the same weights."""
    env = make_env(num_envs=4, episode_length=15)
    policies = {
        backend: make_sparse(env, backend=backend, dtype=torch.float64, mixing_weight=0.5)
        for backend in ("eager", "torch")
    }
    recorder = Rollout(env, policies["torch"], seed=0)
    batches = [recorder.collect() for _ in range(10)]
    for policy in policies.values():
        optimizers = make_optimizers(policy, lr=2e-3, predictor_lr=1e-3)
        for batch in batches:
            update(policy, optimizers, batch, UpdateSettings())
    expected = policies["eager"].state_dict()
    for key, value in policies["torch"].state_dict().items():
        torch.testing.assert_close(value, expected[key], rtol=1e-8, atol=1e-9)
