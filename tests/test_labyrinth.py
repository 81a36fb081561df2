"""The vectorised labyrinths against popgym's own, and what keeps popgym's random state apart."""

import random
from collections.abc import Sequence

import numpy as np
import pytest
from gymnasium.utils.seeding import np_random
from mazelib import Maze
from mazelib.generate.HuntAndKill import HuntAndKill
from popgym.envs.labyrinth_escape import LabyrinthEscape
from popgym.envs.labyrinth_explore import LabyrinthExplore
from popgym.wrappers import Antialias, Flatten, PreviousAction

from sgrl.envs.labyrinth import make_layout
from sgrl.envs.registry import (
    VectorEnv,
    evaluation_config,
    make_device,
    make_single,
    make_vector,
    validate_env_config,
)
from sgrl.envs.wrappers import preserved_random_state

LABYRINTHS = {"labyrinth_escape": LabyrinthEscape, "labyrinth_explore": LabyrinthExplore}
PUBLISHED_LENGTH = {"labyrinth_escape": 80, "labyrinth_explore": 40}
# One tuple an episode: observations [n + 1, F], rewards [n], terminated [n], truncated [n].
Episode = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def popgym_env(name: str, dims: Sequence[int], length: int):
    """popgym's environment with popgym's wrappers and nothing of ours."""
    return Flatten(
        Antialias(PreviousAction(LABYRINTHS[name](tuple(dims), length))), flatten_action=False
    )


def popgym_episode(env, seed: int, actions: np.ndarray, probability: float | None) -> Episode:
    """One episode of popgym's own; explore's reward rule (probability) written out here."""
    generator = np_random(seed)[0]
    length = env.unwrapped.max_episode_length
    observation, _ = env.reset(seed=seed)
    observations, rewards, terminated, truncated = [observation], [], [], []
    for action in actions:
        observation, reward, success, cut, _ = env.step(int(action))
        if probability is not None:
            if generator.random() < probability:
                reward = -1 / length
            if success:
                reward += 1.0
        observations.append(observation)
        rewards.append(reward)
        terminated.append(success)
        truncated.append(cut)
        if success or cut:
            break
    return (
        np.array(observations, np.float32),
        np.array(rewards, np.float32),
        np.array(terminated),
        np.array(truncated),
    )


def play(env: VectorEnv, seeds: Sequence[int], actions: np.ndarray) -> list[Episode]:
    """Step all environments through actions [T, B] and check what follows each one's end."""
    observations = [env.reset(seeds)]
    steps = []
    for step_actions in actions:
        observation, *outcome, success = env.step(step_actions)
        np.testing.assert_array_equal(success, outcome[1])
        observations.append(observation)
        steps.append(outcome)
    stacked = np.stack(observations, 1)
    rewards, terminated, truncated = (np.stack(column, 1) for column in zip(*steps, strict=True))
    episodes = []
    for e in range(env.num_envs):
        ends = np.flatnonzero(terminated[e] | truncated[e])
        assert len(ends) == 1
        n = ends[0] + 1
        assert not rewards[e, n:].any()
        assert (stacked[e, n:] == stacked[e, n]).all()
        episodes.append((stacked[e, : n + 1], rewards[e, :n], terminated[e, :n], truncated[e, :n]))
    return episodes


def assert_equal_episodes(actual: list[Episode], expected: list[Episode]) -> None:
    for one, other in zip(actual, expected, strict=True):
        for array, oracle in zip(one, other, strict=True):
            assert array.dtype == oracle.dtype
            np.testing.assert_array_equal(array, oracle)


def config_for(name: str, dims: Sequence[int], length: int, probability: float | None) -> dict:
    config = {"maze_dims": list(dims), "episode_length": length}
    return config if probability is None else {**config, "zero_reward_probability": probability}


def check_against_popgym(
    name: str,
    dims: Sequence[int],
    length: int,
    probability: float | None,
    seeds: Sequence[int],
    actions: np.ndarray,
) -> list[Episode]:
    """popgym's own episodes, after finding both of our versions equal to them."""
    oracle = popgym_env(name, dims, length)
    expected = [
        popgym_episode(oracle, seed, actions[:, e], probability) for e, seed in enumerate(seeds)
    ]
    config = config_for(name, dims, length, probability)
    for vectorized in (True, False):
        env = make_vector(name, len(seeds), {**config, "vectorized": vectorized})
        assert_equal_episodes(play(env, seeds, actions), expected)
    return expected


KINDS = [("labyrinth_escape", None), ("labyrinth_explore", 0), ("labyrinth_explore", 0.75)]


# Over 500 episodes of each kind. popgym's view mixes height and width up, so some mazes are
# far from square.
@pytest.mark.parametrize(
    ("dims", "episodes"),
    [((6, 6), 240), ((6, 14), 90), ((14, 6), 90), ((8, 10), 60), ((12, 8), 60)],
    ids=str,
)
@pytest.mark.parametrize(("name", "probability"), KINDS)
def test_random_episodes_equal_popgym(
    name: str, probability: float | None, dims: tuple[int, int], episodes: int
) -> None:
    if name == "labyrinth_explore":
        episodes //= 2  # two probabilities
    length = PUBLISHED_LENGTH[name]
    rng = np.random.default_rng(sum(dims))
    actions = rng.integers(4, size=(length, episodes))
    seeds = rng.integers(2**32, size=episodes)
    check_against_popgym(name, dims, length, probability, seeds.tolist(), actions)


MOVES = {0: (0, -1), 1: (0, 1), 2: (-1, 0), 3: (1, 0)}
OPPOSITE = {0: 1, 1: 0, 2: 3, 3: 2}


def _neighbours(grid: np.ndarray, cell: tuple[int, int]) -> list[tuple[int, tuple[int, int]]]:
    """(action, cell) pairs open from a cell."""
    reached = [(a, (cell[0] + dy, cell[1] + dx)) for a, (dy, dx) in MOVES.items()]
    return [
        (action, (y, x))
        for action, (y, x) in reached
        if 0 <= y < grid.shape[0] and 0 <= x < grid.shape[1] and grid[y, x] != 1
    ]


def escape_actions(grid: np.ndarray, cell: tuple[int, int], came_from=None) -> list[int] | None:
    """The way from a cell to the goal (the maze is a tree)."""
    if grid[cell] == 3:
        return []
    for action, following in _neighbours(grid, cell):
        if following != came_from:
            rest = escape_actions(grid, following, cell)
            if rest is not None:
                return [action, *rest]
    return None


def _depth(grid: np.ndarray, cell: tuple[int, int], came_from=None) -> int:
    """Steps from a cell to the farthest cell behind it."""
    ahead = [next_cell for _, next_cell in _neighbours(grid, cell) if next_cell != came_from]
    return max((1 + _depth(grid, next_cell, cell) for next_cell in ahead), default=0)


def explore_actions(
    grid: np.ndarray, cell: tuple[int, int], came_from=None, come_back=False
) -> list[int]:
    """The shortest tour of all free cells: depth first, the deepest branch last."""
    branches = [step for step in _neighbours(grid, cell) if step[1] != came_from]
    branches.sort(key=lambda step: _depth(grid, step[1], cell))
    tour = []
    for i, (action, next_cell) in enumerate(branches):
        return_here = come_back or i < len(branches) - 1
        tour += [action, *explore_actions(grid, next_cell, cell, return_here)]
        if return_here:
            tour.append(OPPOSITE[action])
    return tour


def solver_actions(name: str, dims: Sequence[int], seed: int) -> list[int]:
    env = popgym_env(name, dims, 80)
    env.reset(seed=seed)
    maze = env.unwrapped.maze
    solve = escape_actions if name == "labyrinth_escape" else explore_actions
    actions = solve(maze.grid, maze.start)
    assert actions is not None
    return actions


@pytest.mark.parametrize(("name", "probability"), KINDS)
def test_solved_episodes_equal_popgym(name: str, probability: float | None) -> None:
    length, seeds = PUBLISHED_LENGTH[name], range(60)
    rng = np.random.default_rng(0)
    actions = rng.integers(4, size=(length, len(seeds)))
    for e, seed in enumerate(seeds):
        solution = solver_actions(name, (6, 6), seed)
        actions[: len(solution), e] = solution
    episodes = check_against_popgym(name, (6, 6), length, probability, seeds, actions)
    successes = sum(terminated[-1] for _, _, terminated, _ in episodes)
    assert successes >= 50


@pytest.mark.parametrize(("name", "probability"), KINDS)
@pytest.mark.parametrize("spare_steps", [-1, 0, 1])
def test_success_around_the_last_step_equals_popgym(
    name: str, probability: float | None, spare_steps: int
) -> None:
    """An episode may end by success and by its length in one step; both flags are then set."""
    for seed in range(8):
        solution = solver_actions(name, (6, 10), seed)
        length = len(solution) + 1 + spare_steps
        actions = np.zeros((length, 1), np.int64)
        actions[: len(solution), 0] = solution[:length]
        ((_, _, terminated, truncated),) = check_against_popgym(
            name, (6, 10), length, probability, [seed], actions
        )
        assert terminated[-1] == (spare_steps >= 0)
        assert truncated[-1] == (spare_steps <= 0)


@pytest.mark.parametrize("dims", [(6, 6), (6, 14), (14, 6), (10, 12)], ids=str)
def test_layouts_equal_mazelib(dims: tuple[int, int]) -> None:
    for seed in [*range(1500), 2**31, 2**32 - 1]:
        with preserved_random_state():
            maze = Maze(seed)
            maze.generator = HuntAndKill(dims[0] // 2, dims[1] // 2)
            maze.generate()
            maze.generate_entrances(start_outer=True)
        layout = make_layout(*dims, seed)
        np.testing.assert_array_equal(layout.cells.reshape(maze.grid.shape), maze.grid)
        assert divmod(layout.start, dims[1] + 1) == maze.start
        assert divmod(layout.end, dims[1] + 1) == maze.end


@pytest.mark.parametrize("name", LABYRINTHS)
def test_single_env_episodes_follow_from_the_last_seed(name: str) -> None:
    """Resets without a seed repeat, whatever other environments or the process draw between."""

    def mazes(disturb: bool) -> list[str]:
        env, other = make_single(name), make_single(name)
        infos = [env.reset(seed=3)[1]]
        for _ in range(4):
            if disturb:
                random.random()
                np.random.random()  # noqa: NPY002
                other.reset(seed=8)
            infos.append(env.reset()[1])
        return [info["maze"] for info in infos]

    assert mazes(disturb=False) == mazes(disturb=True)
    assert len(set(mazes(disturb=False))) == 5


@pytest.mark.parametrize("name", ["labyrinth_escape", "labyrinth_explore"])
def test_noisy_rewards(name: str) -> None:
    """The same episodes; each step's reward has noise of its own on it, none in evaluation."""
    rng = np.random.default_rng(0)
    seeds, actions = rng.integers(2**32, size=60).tolist(), rng.integers(4, size=(40, 60))
    clean, *noisy = (
        play(make_vector(name, 60, {"episode_length": 40, **config}), seeds, actions)
        for config in (
            {},
            {"reward_noise": 0.5},
            {"reward_noise": 0.5, "vectorized": False},
        )
    )
    assert_equal_episodes(noisy[0], noisy[1])
    added = []
    for (observations, rewards, *ends), (same, other, *same_ends) in zip(
        clean, noisy[0], strict=True
    ):
        np.testing.assert_array_equal(observations, same)
        assert all((a == b).all() for a, b in zip(ends, same_ends, strict=True))
        added.append(other - rewards)
    everything = np.concatenate(added)
    assert len(set(everything.round(4))) > 0.9 * len(everything)
    assert everything.mean() == pytest.approx(0, abs=4 * 0.5 / len(everything) ** 0.5)
    assert everything.std() == pytest.approx(0.5, rel=0.1)
    assert evaluation_config(name, {"reward_noise": 0.5})["reward_noise"] == 0


@pytest.mark.parametrize(
    ("name", "config", "words"),
    [
        ("labyrinth_escpae", {}, ["'labyrinth_escpae'", "did you mean 'labyrinth_escape'"]),
        ("labyrinth_escape", {"maze_dim": [6, 6]}, ["'maze_dim'", "did you mean 'maze_dims'"]),
        ("labyrinth_escape", {"zero_reward_probability": 0.5}, ["zero_reward_probability"]),
        ("labyrinth_escape", {"maze_dims": [5, 6]}, ["maze_dims", "even", "[5, 6]"]),
        ("labyrinth_escape", {"maze_dims": [4, 8]}, ["maze_dims", "at least 6", "[4, 8]"]),
        ("labyrinth_escape", {"maze_dims": 6}, ["maze_dims", "got 6"]),
        ("labyrinth_escape", {"maze_dims": [6, 6, 6]}, ["maze_dims", "[6, 6, 6]"]),
        ("labyrinth_escape", {"maze_dims": ["6", 6]}, ["maze_dims", "['6', 6]"]),
        ("labyrinth_explore", {"episode_length": 0}, ["episode_length", "got 0"]),
        ("labyrinth_explore", {"episode_length": 40.0}, ["episode_length", "got 40.0"]),
        ("labyrinth_explore", {"episode_length": True}, ["episode_length", "got True"]),
        ("labyrinth_explore", {"zero_reward_probability": 1.5}, ["zero_reward", "got 1.5"]),
        ("labyrinth_explore", {"zero_reward_probability": "a"}, ["zero_reward", "got 'a'"]),
        ("labyrinth_explore", {"reward_noise": -1}, ["reward_noise", "got -1"]),
        ("labyrinth_explore", {"reward_noise": float("inf")}, ["reward_noise", "got inf"]),
        ("labyrinth_explore", [6, 6], ["env_config", "got [6, 6]"]),
        ("labyrinth_explore", {"vectorized": "no"}, ["vectorized", "got 'no'"]),
    ],
)
def test_bad_settings_are_one_clear_line(name: str, config: dict, words: list[str]) -> None:
    for build in (
        lambda: validate_env_config(name, config),
        lambda: make_single(name, config),
        lambda: make_vector(name, 2, config),
    ):
        with pytest.raises(ValueError, match="labyrinth") as caught:
            build()
        message = str(caught.value)
        assert "\n" not in message
        assert all(word in message for word in words), message


def test_settings_come_back_with_their_defaults() -> None:
    assert validate_env_config("labyrinth_escape", {"maze_dims": [8, 6]}) == {
        "maze_dims": [8, 6],
        "episode_length": 80,
        "reward_noise": 0.0,
        "vectorized": True,
    }
    assert validate_env_config("labyrinth_explore") == {
        "maze_dims": [6, 6],
        "episode_length": 40,
        "zero_reward_probability": 0.75,
        "reward_noise": 0.0,
        "vectorized": True,
    }


def test_no_noise_on_a_device() -> None:
    with pytest.raises(ValueError, match="labyrinth_escape has no reward_noise on a device"):
        make_device("labyrinth_escape", 1, 2, {"reward_noise": 0.1})
