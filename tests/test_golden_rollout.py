"""The rollout cases of the golden folder: forced actions through both kinds of environments,
and through the real `Rollout`."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_cases import golden_files

from sgrl.envs.registry import VectorEnv, make_vector
from sgrl.nn.policy import Acting, PolicyOutput
from sgrl.reinforce.loss import discounted_returns, normalize_returns
from sgrl.reinforce.rollout import Rollout

CASES = golden_files("rollout_*.npz")


def forced_rollout(env: VectorEnv, seeds: list[int], actions: np.ndarray) -> dict[str, np.ndarray]:
    """A padded batch of one episode per environment under given actions [T, B].

    obs [T, B, F] is what each action was chosen on. A finished environment's terminal
    observation is repeated while others run; zeros once all are done.
    """
    T, B = actions.shape
    batch = {
        "obs": np.zeros((T, B, env.observation_size), np.float32),
        "rewards": np.zeros((T, B), np.float32),
        "dones": np.zeros((T, B), bool),
        "valid_mask": np.zeros((T, B), bool),
        "success": np.zeros(B, bool),
    }
    observations = env.reset(seeds)
    running = np.ones(B, bool)
    for t in range(T):
        if not running.any():
            break
        batch["obs"][t] = observations
        batch["valid_mask"][t] = running
        step = env.step(actions[t])
        observations, batch["rewards"][t] = step.observations, step.rewards
        batch["dones"][t] = step.terminated | step.truncated
        batch["success"] |= step.success
        running &= ~batch["dones"][t]
    batch["lengths"] = batch["valid_mask"].sum(0)
    return batch


class ForcedPolicy(torch.nn.Module):
    """Takes given actions [T, B], step after step, episode batch after episode batch."""

    num_actions = 4

    def __init__(self) -> None:
        super().__init__()
        self.parameter = torch.nn.Parameter(torch.zeros(()))

    def force(self, actions: np.ndarray) -> None:
        self.actions = iter(torch.from_numpy(actions.astype(np.int64)))

    def initial_state(self, batch_size: int) -> dict[str, torch.Tensor]:
        return {}

    def acting(self, length: int, batch_size: int, keep: bool) -> Acting:
        return Acting(self, batch_size)

    def step(self, observations: torch.Tensor, state: dict[str, torch.Tensor]) -> PolicyOutput:
        forced = torch.nn.functional.one_hot(next(self.actions), self.num_actions)
        return PolicyOutput(forced * 1e9, None, {})


def load(path: Path) -> tuple[dict[str, np.ndarray], dict]:
    with np.load(path) as arrays:
        golden = dict(arrays)
    return golden, json.loads(str(golden["config"]))


def golden_rollouts(golden: dict, config: dict, vectorized: bool) -> dict:
    """Environment and number of batches before, by the name of each recorded batch."""

    def env_of_length(length: int) -> VectorEnv:
        env_config = {
            "maze_dims": config["maze_dims"],
            "episode_length": length,
            "vectorized": vectorized,
        }
        if config["env"] == "labyrinth_explore":
            env_config["zero_reward_probability"] = config["zero_reward_probability"]
        return make_vector(config["env"], config["num_envs"], env_config)

    env = env_of_length(config["episode_length"])
    recorded = {name.split("/")[0] for name in golden} - {"config"}
    rollouts = {
        name: (env, int(name.removeprefix("batch")))
        for name in sorted(recorded)
        if name.startswith("batch")
    }
    if "long_batch0" in recorded:
        rollouts["long_batch0"] = env_of_length(config["long_episode_length"]), 0
    assert rollouts.keys() == recorded
    return rollouts


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
@pytest.mark.parametrize("vectorized", [True, False], ids=["vectorised", "popgym"])
def test_environments_give_the_golden_rollouts(path: Path, vectorized: bool) -> None:
    golden, config = load(path)
    B = config["num_envs"]
    for name, (env, k) in golden_rollouts(golden, config, vectorized).items():
        seeds = [config["seed"] + e + k * B for e in range(B)]
        batch = forced_rollout(env, seeds, golden[f"{name}/actions"].astype(np.int64))
        for key in ("obs", "dones", "valid_mask", "success", "lengths"):
            np.testing.assert_array_equal(batch[key], golden[f"{name}/{key}"], err_msg=key)
        np.testing.assert_allclose(batch["rewards"], golden[f"{name}/rewards"], rtol=0, atol=1e-7)


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
@pytest.mark.parametrize("vectorized", [True, False], ids=["vectorised", "popgym"])
def test_the_real_rollout_gives_the_golden_batches(path: Path, vectorized: bool) -> None:
    golden, config = load(path)
    for name, (env, k) in golden_rollouts(golden, config, vectorized).items():
        policy = ForcedPolicy()
        policy.force(golden[f"{name}/actions"])
        rollout = Rollout(env, policy, config["seed"])
        rollout.batches = k
        batch = rollout.collect()
        returns = discounted_returns(batch.rewards, batch.mask, config["gamma"])
        exact = {
            "obs": batch.observations,
            "valid_mask": batch.mask,
            "success": batch.success,
            "lengths": batch.lengths,
        }
        for key, value in exact.items():
            np.testing.assert_array_equal(value, golden[f"{name}/{key}"], err_msg=key)
        close = {
            "rewards": (batch.rewards, 1e-7),
            "returns": (returns, 1e-6),
            "normalized_returns": (normalize_returns(returns, batch.mask), 5e-6),
        }
        for key, (value, atol) in close.items():
            np.testing.assert_allclose(
                value, golden[f"{name}/{key}"], rtol=0, atol=atol, err_msg=f"{name}/{key}"
            )
