"""The rollout cases of tests/golden: forced actions through both kinds of environments."""

import json
from pathlib import Path

import numpy as np
import pytest

from sgrl.envs.registry import VectorEnv, make_vector

GOLDEN = Path(__file__).parent / "golden"
CASES = sorted(GOLDEN.glob("rollout_*.npz"))
assert CASES, f"no rollout_*.npz in {GOLDEN}"


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
        observations, batch["rewards"][t], terminated, truncated = env.step(actions[t])
        batch["dones"][t] = terminated | truncated
        batch["success"] |= terminated
        running &= ~batch["dones"][t]
    batch["lengths"] = batch["valid_mask"].sum(0)
    return batch


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
@pytest.mark.parametrize("vectorized", [True, False], ids=["vectorised", "popgym"])
def test_environments_give_the_golden_rollouts(path: Path, vectorized: bool) -> None:
    with np.load(path) as arrays:
        golden = dict(arrays)
    config = json.loads(str(golden["config"]))
    B = config["num_envs"]

    def env_of_length(length: int) -> VectorEnv:
        env_config = {
            "maze_dims": config["maze_dims"],
            "episode_length": length,
            "vectorized": vectorized,
        }
        if config["env"] == "labyrinth_explore":
            env_config["zero_reward_probability"] = config["zero_reward_probability"]
        return make_vector(config["env"], B, env_config)

    env = env_of_length(config["episode_length"])
    rollouts = {f"batch{k}": (env, k) for k in range(3)}
    rollouts["long_batch0"] = env_of_length(config["long_episode_length"]), 0
    assert {name.split("/")[0] for name in golden} == {*rollouts, "config"}
    for name, (env, k) in rollouts.items():
        seeds = [config["seed"] + e + k * B for e in range(B)]
        batch = forced_rollout(env, seeds, golden[f"{name}/actions"].astype(np.int64))
        for key in ("obs", "dones", "valid_mask", "success", "lengths"):
            np.testing.assert_array_equal(batch[key], golden[f"{name}/{key}"], err_msg=key)
        np.testing.assert_allclose(batch["rewards"], golden[f"{name}/rewards"], rtol=0, atol=1e-7)
    assert golden["long_batch0/success"].any()
