"""Environments as tensor code against the vectorised ones, step for step and bitwise."""

from typing import Any

import numpy as np
import pytest
import torch
from torch.autograd.profiler import profile

from sgrl.envs.device import DEVICE_ENVIRONMENTS, DeviceEnv
from sgrl.envs.registry import make_device, make_vector

DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    ),
]


def labyrinths(name: str, *cases: tuple[list[int], int], **settings: Any) -> list[tuple]:
    return [
        (name, {"maze_dims": dims, "episode_length": length, **settings}) for dims, length in cases
    ]


# 168 episodes each: over 500 of each kind.
CASES = [
    *labyrinths("labyrinth_escape", ([6, 6], 80), ([8, 12], 150), ([14, 6], 2), ([6, 10], 31)),
    *labyrinths("labyrinth_explore", ([6, 6], 40), ([6, 6], 200)),
    *labyrinths("labyrinth_explore", ([10, 6], 150), zero_reward_probability=0),
    *labyrinths("labyrinth_explore", ([6, 8], 2), ([8, 8], 90), zero_reward_probability=0.3),
    ("mnist_bandit", {}),
    ("mnist_bandit", {"p_flip": 0.0, "split": "test"}),
    ("mnist_bandit", {"classes": [7, 2], "p_flip": 1}),
    ("mnist_bandit", {"classes": [1, 2, 3]}),
]


def some_seeds(env: DeviceEnv, batch: int) -> list[list[int]]:
    """Of runs that share environments, and of some that do not."""
    runs = [0, 1, 2**30 - 1, 1, 5, 77, 123456][: env.num_runs]
    first = batch * env.num_envs
    return [[run * env.seed_spacing + first + e for e in range(env.num_envs)] for run in runs]


def some_actions(env: DeviceEnv, batch: int) -> torch.Tensor:
    """Actions [T + 1, S, B]; one more than there are steps."""
    shape = (env.episode_length + 1, env.num_runs, env.num_envs)
    return torch.from_numpy(np.random.default_rng(batch).integers(env.num_actions, size=shape))


def assert_same_bits(actual: torch.Tensor, expected: np.ndarray) -> None:
    array = actual.numpy(force=True)
    assert (array.dtype, array.shape) == (expected.dtype, expected.shape)
    assert array.tobytes() == expected.tobytes()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("name", "config"), CASES, ids=str)
def test_equal_the_vectorised_ones(name: str, config: dict, device: str) -> None:
    """Observations, rewards, ends and success of random episodes of runs stacked, by batches."""
    env = make_device(name, 7, 8, config, device)
    vectors = [make_vector(name, 8, config) for _ in range(7)]
    succeeded = 0
    for batch in range(3):
        seeds, actions = some_seeds(env, batch), some_actions(env, batch)
        env.load(seeds)
        first = [vector.reset(of_run) for vector, of_run in zip(vectors, seeds, strict=True)]
        assert_same_bits(env.reset(), np.stack(first))
        assert env.running.all()
        running = np.ones((7, 8), bool)
        for t, now in enumerate(actions):
            step = env.step(now.to(device))
            each = [vector.step(a.numpy()) for vector, a in zip(vectors, now, strict=True)]
            observations, rewards, terminated, truncated, success = (
                np.stack(column) for column in zip(*each, strict=True)
            )
            assert_same_bits(step.observations, observations)
            assert_same_bits(step.rewards, rewards)
            assert_same_bits(step.terminated, terminated)
            assert_same_bits(step.success, success)
            running &= ~(terminated | truncated)
            assert_same_bits(env.running, running)
            assert running.any() <= (t + 1 < env.max_steps)
            succeeded += success.sum()
    # Large mazes are too much for random actions.
    assert succeeded or env.max_steps < 50 or config["maze_dims"] != [6, 6]


def run_batch(env: DeviceEnv, actions: torch.Tensor) -> list[torch.Tensor]:
    """All that the steps of a batch give, one after the other, from the first observations on."""
    return [env.reset(), *(part for now in actions for part in env.step(now))]


@pytest.mark.parametrize("name", DEVICE_ENVIRONMENTS)
def test_a_batch_may_be_run_again_and_earlier_results_stay(name: str) -> None:
    """`reset` starts the same episodes anew; nothing that was given is written to."""
    env = make_device(name, 2, 3)
    actions = some_actions(env, 0)
    env.load(some_seeds(env, 0))
    once = run_batch(env, actions)
    kept = [part.clone() for part in once]
    for again in (run_batch(env, actions), once):
        assert all(torch.equal(a, b) for a, b in zip(again, kept, strict=True))
    env.load(some_seeds(env, 1))
    assert not torch.equal(run_batch(env, actions)[0], kept[0])
    assert all(torch.equal(a, b) for a, b in zip(once, kept, strict=True))


# What waits for the device: values for Python, and shapes that depend on values.
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "index", "unique"}
VIEWS = {"flatten", "unflatten", "select", "slice", "squeeze", "unsqueeze", "view"}


@pytest.mark.parametrize(
    ("name", "operations"),
    [("labyrinth_escape", 9), ("labyrinth_explore", 13), ("mnist_bandit", 3)],
)
def test_a_step_is_a_few_operations_that_wait_for_nothing(name: str, operations: int) -> None:
    env = make_device(name, 2, 3)
    env.load(some_seeds(env, 0))
    actions = some_actions(env, 0)
    with profile() as first:
        env.reset()
    with profile() as step:
        env.step(actions[0])
    events = [*first.function_events, *step.function_events]
    assert not WAITING & {event.name.removeprefix("aten::") for event in events}
    called = [event.name for event in step.function_events if event.cpu_parent is None]
    assert len([name for name in called if name.removeprefix("aten::") not in VIEWS]) == operations


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", DEVICE_ENVIRONMENTS)
def test_a_batch_is_captured_in_a_cuda_graph(name: str) -> None:
    """Replayed after another `load`, it gives what the CPU gives."""
    graph = torch.cuda.CUDAGraph()
    env, oracle = make_device(name, 3, 8, device="cuda"), make_device(name, 3, 8)
    actions = some_actions(env, 0)

    on_gpu = actions.cuda()
    env.load(some_seeds(env, 0))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run_batch(env, on_gpu)
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        captured = run_batch(env, on_gpu)
    for batch in range(3):
        env.load(some_seeds(env, batch))
        graph.replay()
        oracle.load(some_seeds(oracle, batch))
        for actual, expected in zip(captured, run_batch(oracle, actions), strict=True):
            assert_same_bits(actual, expected.numpy())


def test_what_cannot_run_on_a_device_is_refused() -> None:
    with pytest.raises(ValueError, match="CartPole-v1 does not run on a device; there are lab"):
        make_device("CartPole-v1", 2, 3)
    with pytest.raises(ValueError, match="must be at least 1, got 0, 3"):
        make_device("labyrinth_escape", 0, 3)
    with pytest.raises(ValueError, match=r"needs 2 lists of 3 seeds, .*\[3, 2\]"):
        make_device("labyrinth_escape", 2, 3).load([[1, 2, 3], [4, 5]])
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no GPU for the device 'cuda': leave it at cpu"):
            make_device("labyrinth_escape", 2, 3, device="cuda")
