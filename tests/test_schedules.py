"""Learning rates and entropy bonuses that change with the environment steps."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from sweeps import SPARSENET
from test_rllib_reinforce import ENV_CONFIG, NUM_ENVS, assert_same, config, learner_state, rows

from sgrl.envs.registry import make_vector
from sgrl.nn.registry import make_policy
from sgrl.reinforce import UpdateSettings, train
from sgrl.reinforce.rollout import Rollout
from sgrl.reinforce.schedules import is_schedule, value_at
from sgrl.reinforce.update import make_optimizers, update

LR = [[0, 1e-2], [60, 2e-3], [100, 1e-3]]
PREDICTOR_LR = [[0, 1e-3], [80, 0.0]]
ENTROPY = [[0, 0.5], [50, 0.0]]


def small_policy():
    env = make_vector("labyrinth_escape", NUM_ENVS, ENV_CONFIG)
    arguments = {key: value for key, value in SPARSENET.items() if key != "policy"}
    return env, make_policy("sparsenet", env.observation_size, env.num_actions, seed=5, **arguments)


def test_values():
    assert value_at(0.3, 10) == 0.3
    steps = [0, 30, 60, 80, 100, 1000]
    at = [value_at(LR, s) for s in steps]
    np.testing.assert_allclose(at, [1e-2, 6e-3, 2e-3, 1.5e-3, 1e-3, 1e-3], rtol=1e-12)
    assert is_schedule(LR)
    wrong = (0.1, [], [0, 1e-3], [[0, 1e-3], [0, 1e-4]], [[5, 1e-3]], [[0, "fast"]], [[0, 1, 2]])
    assert not any(map(is_schedule, wrong))


@pytest.mark.parametrize("predictor_optimizer", ["adam", "scaled", "averaged"])
def test_the_plain_loop_takes_each_update_at_its_steps(predictor_optimizer):
    """Against updates whose optimizers are given their rates by hand, in float32 bitwise."""
    env, policy = small_policy()
    rates = {"lr": LR, "predictor_lr": PREDICTOR_LR, "predictor_optimizer": predictor_optimizer}
    for _ in train(policy, env, 6, seed=5, entropy_coeff=ENTROPY, **rates):
        pass
    env, expected = small_policy()
    rollout, taken, state = Rollout(env, expected, 5, keep=True), 0, {}
    for _ in range(6):
        lr, predictor_lr = value_at(LR, taken), value_at(PREDICTOR_LR, taken)
        optimizers = make_optimizers(expected, lr, predictor_lr, predictor_optimizer)
        for name, optimizer in optimizers.items():
            if state:  # the past of each parameter, and nothing of the rates
                groups = optimizer.state_dict()["param_groups"]
                optimizer.load_state_dict(copy.deepcopy(state[name]) | {"param_groups": groups})
        settings = dataclasses.replace(UpdateSettings(), entropy_coeff=value_at(ENTROPY, taken))
        batch = rollout.collect()
        update(expected, optimizers, batch, settings)
        state = {name: optimizer.state_dict() for name, optimizer in optimizers.items()}
        taken += batch.num_steps
    assert taken > 100
    for name, value in expected.state_dict().items():
        assert torch.equal(policy.state_dict()[name], value), name


def test_reinforce_is_the_plain_loop_and_goes_on_exactly(tmp_path, ray_session):
    training = {"lr": LR, "predictor_lr": PREDICTOR_LR, "entropy_coeff": ENTROPY}
    algorithm = config("sgprop").training(**training).build_algo()
    env, policy = small_policy()
    plain = train(policy, env, 6, seed=5, **training)
    for number, (row, expected) in enumerate(zip(rows(algorithm, 6), plain, strict=True), 1):
        assert {name: row[name] for name in expected if name in row} == {
            name: value for name, value in expected.items() if name in row
        }, number
        if number == 3:
            before = copy.deepcopy(policy.state_dict())
    expected_state = learner_state(algorithm)
    algorithm.stop()
    assert not all(torch.equal(before[k], v) for k, v in policy.state_dict().items())
    first = config("sgprop").training(**training).build_algo()
    rows(first, 3)
    first.save_to_path(tmp_path / "checkpoint")
    first.stop()
    restored = config("sgprop").training(**training).build_algo()
    restored.restore_from_path(tmp_path / "checkpoint")
    rows(restored, 3)
    assert_same(learner_state(restored), expected_state)
    restored.stop()


@pytest.mark.parametrize(
    ("training", "words"),
    [
        ({"lr": [[0, 1e-3], [100, 0.0]]}, "lr must be a number, or .* greater than 0; got"),
        ({"predictor_lr": [[10, 1e-3]]}, "predictor_lr must be a number, or .* from step 0 on"),
        ({"entropy_coeff": [[0, 0.1], [0, 0.2]]}, "entropy_coeff must be a number, or "),
    ],
)
def test_mistakes(training, words):
    with pytest.raises(ValueError, match=words):
        config("sgprop").training(**training).validate()
