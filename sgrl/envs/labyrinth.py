"""POPGym's LabyrinthEscape and LabyrinthExplore: its own environments and a vectorised version.

The agent walks a random maze of corridors seeing only the 3x3 cells around it. Escape: find the
exit on the opposite border. Explore: visit every free cell. Observations are Box(56): nine
one-hot cell codes (45), the action that led here (5, the fifth before the first step), the
previous action (4) and the first-step flag (2). The last three blocks come from popgym's
`PreviousAction` and `Antialias` wrappers (paper, Section H.4; Morad et al., "POPGym", ICLR 2023).

`make_escape` and `make_explore` build popgym's own environments. `VectorEscape` and
`VectorExplore` step B mazes at once with NumPy and equal them step for step, quirks included:

- the 3x3 view is padded only at its bottom and right, so at the top and left borders it shifts,
  and it is cut by the maze's height where the width is meant (and the reverse), which shows in
  mazes that are not square;
- an episode is truncated one step early, after episode_length - 1 steps.
"""

import random
import warnings
from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from gymnasium.utils.seeding import np_random
from numpy.typing import NDArray
from popgym.core.maze import Actions, Cell
from popgym.envs.labyrinth_escape import LabyrinthEscape
from popgym.envs.labyrinth_explore import LabyrinthExplore
from popgym.wrappers import Antialias, Flatten, PreviousAction

from sgrl.envs.vector import Observations, StepResult, VectorEnv
from sgrl.envs.wrappers import IsolateRandomState, NoisyReward, reward_noise_of

# ---------------------------------------------------------------- popgym's own environments


class SparseReward(gym.Wrapper):
    """Explore's sparse-reward rule (paper, Section H.4).

    Every step's reward is first replaced by the step penalty -1 / episode_length with
    probability `zero_reward_probability`, drawn from the environment's own `np_random`; then 1
    is added on success.
    """

    def __init__(self, env: gym.Env, zero_reward_probability: float) -> None:
        super().__init__(env)
        self.zero_reward_probability = zero_reward_probability
        self.step_penalty = -1 / env.get_wrapper_attr("max_episode_length")

    def step(self, action: int) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self.env.step(action)
        reward = float(reward)
        if self.np_random.random() < self.zero_reward_probability:
            reward = self.step_penalty
        if terminated:
            reward += 1.0
        return observation, reward, terminated, truncated, info


def _noisy(env: gym.Env, std: float) -> gym.Env:
    return NoisyReward(env, std) if std else env


def _wrap(
    labyrinth: Callable[..., gym.Env], maze_dims: Sequence[int], episode_length: int
) -> gym.Env:
    with warnings.catch_warnings():
        # popgym warns that its mazes can be solved without memory: the reason the MLP is
        # among the methods compared.
        warnings.simplefilter("ignore", DeprecationWarning)
        env = labyrinth(tuple(maze_dims), episode_length)
    return Flatten(Antialias(PreviousAction(env)), flatten_action=False)


def make_escape(
    maze_dims: Sequence[int], episode_length: int, reward_noise: float = 0.0
) -> gym.Env:
    """Make popgym's LabyrinthEscape, wrapped to Box(56, int64) observations and 4 actions.

    Args:
        maze_dims: (height, width) of the maze, even, at least 6; borders add one cell to each.
        episode_length: T; popgym truncates after T - 1 steps.
        reward_noise: standard deviation of the noise on every step's reward.
    """
    env = _wrap(LabyrinthEscape, maze_dims, episode_length)
    return IsolateRandomState(_noisy(env, reward_noise))


def make_explore(
    maze_dims: Sequence[int],
    episode_length: int,
    zero_reward_probability: float,
    reward_noise: float = 0.0,
) -> gym.Env:
    """Make popgym's LabyrinthExplore under the sparse-reward rule; otherwise as `make_escape`.

    Args:
        maze_dims: (height, width) of the maze, even, at least 6; borders add one cell to each.
        episode_length: T; popgym truncates after T - 1 steps.
        zero_reward_probability: how often a step's reward is replaced by the penalty of a step.
        reward_noise: standard deviation of the noise on every step's reward.
    """
    env = SparseReward(_wrap(LabyrinthExplore, maze_dims, episode_length), zero_reward_probability)
    return IsolateRandomState(_noisy(env, reward_noise))


# ---------------------------------------------------------------- maze generation


class Layout(NamedTuple):
    """A maze as mazelib carves it, before popgym marks its start and goal.

    Attributes:
        cells: int8 [H * W], row by row, `Cell.FREE` or `Cell.OBSTACLE`; read-only.
        start, end: indices into cells, on opposite borders (still obstacles in cells).
    """

    cells: NDArray[np.int8]
    start: int
    end: int


def _choice(options: Sequence[Any]) -> Any:
    """`random.choice` of _python_draws, spelled out: most of a maze's time goes into it."""
    count = len(options)
    bits = count.bit_length()
    drawn = _draw_bits(bits)
    while drawn >= count:
        drawn = _draw_bits(bits)
    return options[drawn]


# Module-wide because building a RandomState takes longer than carving a maze; both are reseeded
# for every maze.
_python_draws = random.Random()
_numpy_draws = np.random.RandomState()
_draw_bits = _python_draws.getrandbits


# Runs of one seed that differ in method or learning rate meet the same mazes.
@lru_cache(maxsize=16384)
def make_layout(height: int, width: int, seed: int) -> Layout:
    """The maze that popgym builds in `reset(seed=seed)` for maze_dims (height, width).

    Hunt and kill, with mazelib's draws in mazelib's order: from a carved room walk at random
    into uncarved ones until stuck, then hunt for the next room, (height + 1) * (width + 1) times.
    """
    _python_draws.seed(seed)
    _numpy_draws.seed(seed)
    shuffle = _numpy_draws.shuffle
    rows, columns = range(1, height, 2), range(1, width, 2)

    free = np.zeros((height + 1, width + 1), bool).tolist()
    rooms_left = len(rows) * len(columns)
    for hunt in range((height + 1) * (width + 1) + 1):
        y, x = _choice(rows), _choice(columns)
        if hunt == 0:
            free[y][x] = True
            rooms_left -= 1
        # Once every room is carved a walk draws nothing, but the hunts still do.
        while rooms_left and free[y][x]:
            neighbours = []
            if y > 1 and not free[y - 2][x]:
                neighbours.append((y - 2, x))
            if y < height - 1 and not free[y + 2][x]:
                neighbours.append((y + 2, x))
            if x > 1 and not free[y][x - 2]:
                neighbours.append((y, x - 2))
            if x < width - 1 and not free[y][x + 2]:
                neighbours.append((y, x + 2))
            if not neighbours:
                break
            shuffle(neighbours)
            next_y, next_x = _choice(neighbours)
            free[next_y][next_x] = free[(y + next_y) // 2][(x + next_x) // 2] = True
            rooms_left -= 1
            y, x = next_y, next_x

    side = _choice(("north", "south", "west", "east"))
    line = columns if side in ("north", "south") else rows
    first, second = _choice(line), _choice(line)
    start, end = {
        "north": ((0, first), (height, second)),
        "south": ((height, first), (0, second)),
        "west": ((first, 0), (second, width)),
        "east": ((first, width), (second, 0)),
    }[side]

    cells = np.where(np.array(free).reshape(-1), Cell.FREE, Cell.OBSTACLE).astype(np.int8)
    cells.setflags(write=False)
    return Layout(cells, start[0] * (width + 1) + start[1], end[0] * (width + 1) + end[1])


# ---------------------------------------------------------------- all mazes at once


def _neighbour_table(H: int, W: int) -> NDArray[np.intp]:
    """The cell each of `Actions` (left, right, up, down, none) leads to if free, [H * W, 5]."""
    y, x = np.divmod(np.arange(H * W), W)
    return np.stack(
        [
            y * W + np.maximum(x - 1, 0),
            y * W + np.minimum(x + 1, W - 1),
            np.maximum(y - 1, 0) * W + x,
            np.minimum(y + 1, H - 1) * W + x,
            y * W + x,
        ],
        axis=1,
    )


def _view_table(H: int, W: int) -> NDArray[np.intp]:
    """The nine cells seen from each cell, [H * W, 9]; H * W stands for padding.

    popgym starts the view at (max(y - 1, 0), max(x - 1, 0)) and ends it before column
    min(x + 1, H) + 1 and row min(y + 1, W) + 1: H and W are swapped there.
    """
    table = np.full((H * W, 3, 3), H * W)
    for y, x in np.ndindex(H, W):
        seen = np.arange(H * W).reshape(H, W)[
            max(y - 1, 0) : min(y + 1, W) + 1, max(x - 1, 0) : min(x + 1, H) + 1
        ]
        table[y * W + x, : seen.shape[0], : seen.shape[1]] = seen
    return table.reshape(H * W, 9)


#: A cell's block in an observation, by its `Cell` code, [5, 5]; a view has nine of them.
CELL_ONE_HOT = np.eye(len(Cell), dtype=np.float32)
VIEW_SIZE = 9 * len(Cell)


def _action_blocks() -> Observations:
    steps, flag = len(Actions) - 1, 2
    blocks = np.zeros((len(Actions), len(Actions) + steps + flag), np.float32)
    for action in Actions:
        at_start = action == Actions.NONE
        blocks[action, action] = 1
        # PreviousAction reports action 0 before the first step.
        blocks[action, len(Actions) + (0 if at_start else action)] = 1
        blocks[action, len(Actions) + steps + at_start] = 1
    return blocks


#: What follows the view in an observation, by the action just taken (`Actions.NONE`: reset),
#: [5, 11].
ACTION_BLOCKS = _action_blocks()


class VectorLabyrinth(VectorEnv):
    """B labyrinths stepped together; subclasses say what a step earns and when it succeeds.

    Args:
        num_envs: B.
        maze_dims: (height, width) of the maze, even, at least 6.
        episode_length: T; episodes are truncated after T - 1 steps.
        reward_noise: standard deviation of the noise on every step's reward (`NoisyReward`); none
            in evaluation.

    Attributes:
        max_steps: T - 1.
        neighbours: the cell each action leads to if free, [C, 5]. C = H * W cells are counted row
            by row, borders included.
        views: the nine cells seen from each cell, C where the view is padded, [C, 9].
        cells: `Cell` codes, int8 [B, C + 1]; cell C is an obstacle.
        positions: the cell of each agent, [B].
    """

    num_actions = len(Actions) - 1
    observation_size = VIEW_SIZE + ACTION_BLOCKS.shape[1]

    def __init__(
        self,
        num_envs: int,
        maze_dims: Sequence[int],
        episode_length: int,
        reward_noise: float = 0.0,
    ) -> None:
        self.num_envs = num_envs
        self.reward_noise = reward_noise
        self._noise = np.zeros((num_envs, episode_length))
        self.episode_length = episode_length
        self.max_steps = episode_length - 1
        self.height, self.width = maze_dims
        H, W = self.height + 1, self.width + 1
        self.neighbours = _neighbour_table(H, W)
        self.views = _view_table(H, W)
        self.cells = np.full((num_envs, H * W + 1), Cell.OBSTACLE, np.int8)
        self.positions = np.zeros(num_envs, np.intp)
        self._steps = 0
        self._finished = np.ones(num_envs, bool)
        self._everyone = np.arange(num_envs)
        self._observations = np.zeros((num_envs, self.observation_size), np.float32)

    def reset(self, seeds: Sequence[int]) -> Observations:
        self._check_seeds(seeds)
        layouts = [make_layout(self.height, self.width, int(seed)) for seed in seeds]
        self.cells[:, :-1] = [layout.cells for layout in layouts]
        self.positions[:] = [layout.start for layout in layouts]
        self.cells[self._everyone, self.positions] = Cell.START
        self._begin(layouts, seeds)
        if self.reward_noise:
            shape = self.episode_length
            draws = {seed: reward_noise_of(int(seed)).standard_normal(shape) for seed in set(seeds)}
            self._noise[:] = [self.reward_noise * draws[seed] for seed in seeds]
        self._steps = 0
        self._finished[:] = False
        self._observe(self._everyone, np.full(self.num_envs, Actions.NONE))
        return self._observations.copy()

    def step(self, actions: NDArray[np.int64]) -> StepResult:
        rewards = np.zeros(self.num_envs, np.float32)
        terminated = np.zeros(self.num_envs, bool)
        truncated = np.zeros(self.num_envs, bool)
        running = np.flatnonzero(~self._finished)
        if running.size:
            actions = actions[running]
            here = self.positions[running]
            there = self.neighbours[here, actions]
            here = np.where(self.cells[running, there] == Cell.OBSTACLE, here, there)
            self.positions[running] = here
            earned, terminated[running] = self._judge(running, here)
            rewards[running] = earned + self._noise[running, self._steps]
            self._steps += 1
            truncated[running] = self._steps == self.max_steps
            self._finished |= terminated | truncated
            self._observe(running, actions)
        # A labyrinth ends by itself in success alone.
        success = terminated.copy()
        return StepResult(self._observations.copy(), rewards, terminated, truncated, success)

    def maze(self, env: int) -> NDArray[np.int8]:
        """The `Cell` codes of an environment's maze, [H, W] with the borders."""
        return self.cells[env, :-1].reshape(self.height + 1, self.width + 1).copy()

    def position(self, env: int) -> tuple[int, int]:
        """Row and column of an environment's agent in its maze."""
        row, column = divmod(int(self.positions[env]), self.width + 1)
        return row, column

    def seen(self, env: int) -> NDArray[np.intp]:
        """Indices of the cells that an environment's agent sees, [3, 3].

        They point into the maze row by row; H * W where the view is padded.
        """
        return self.views[self.positions[env]].reshape(3, 3)

    def _observe(self, envs: NDArray[np.intp], actions: NDArray[np.int64]) -> None:
        seen = self.cells[envs[:, None], self.views[self.positions[envs]]]
        self._observations[envs, :VIEW_SIZE] = CELL_ONE_HOT[seen].reshape(len(envs), VIEW_SIZE)
        self._observations[envs, VIEW_SIZE:] = ACTION_BLOCKS[actions]

    @abstractmethod
    def _begin(self, layouts: Sequence[Layout], seeds: Sequence[int]) -> None:
        """Prepare the goals of a new episode in every environment."""

    @abstractmethod
    def _judge(
        self, envs: NDArray[np.intp], positions: NDArray[np.intp]
    ) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Rewards and terminated of the given environments, now at these positions, both [n]."""


class VectorEscape(VectorLabyrinth):
    """popgym's LabyrinthEscape: -1 / T a step, plus 1 for reaching the goal."""

    @cached_property
    def rewards(self) -> NDArray[np.float64]:
        """Of a step, by whether it terminated the episode, [2]."""
        return -1 / self.episode_length + np.array([0.0, 1.0])

    def _begin(self, layouts: Sequence[Layout], seeds: Sequence[int]) -> None:
        self.cells[self._everyone, [layout.end for layout in layouts]] = Cell.GOAL

    def _judge(
        self, envs: NDArray[np.intp], positions: NDArray[np.intp]
    ) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        terminated = self.cells[envs, positions] == Cell.GOAL
        return self.rewards[terminated.astype(int)], terminated


class VectorExplore(VectorLabyrinth):
    """popgym's LabyrinthExplore under the sparse-reward rule (see `SparseReward`).

    1 / (free cells but the start) for a cell not visited before, else -1 / T.

    Attributes:
        rewards: of a step, by whether it was paid for a new cell and whether it terminated the
            episode, float64 [B, 2, 2].
        pays: whether the sparse-reward rule lets a step be paid, bool [B, T].
        cells_left: not visited yet, [B].
    """

    def __init__(
        self,
        num_envs: int,
        maze_dims: Sequence[int],
        episode_length: int,
        zero_reward_probability: float,
        reward_noise: float = 0.0,
    ) -> None:
        super().__init__(num_envs, maze_dims, episode_length, reward_noise)
        self.zero_reward_probability = zero_reward_probability
        self.rewards = np.zeros((num_envs, 2, 2))
        self.pays = np.zeros((num_envs, episode_length), bool)
        self.cells_left = np.zeros(num_envs, np.int64)
        self._visited = np.zeros(self.cells.shape, bool)

    def _begin(self, layouts: Sequence[Layout], seeds: Sequence[int]) -> None:
        self._visited[:] = False
        self._visited[self._everyone, self.positions] = True
        self.cells_left[:] = np.count_nonzero(self.cells == Cell.FREE, axis=1)
        self.rewards[:, 0, 0] = -1 / self.episode_length
        self.rewards[:, 1, 0] = 1 / self.cells_left
        self.rewards[:, :, 1] = self.rewards[:, :, 0] + 1.0
        # The same numbers as one draw a step from gymnasium's generator of each environment.
        draws = {seed: np_random(int(seed))[0].random(self.episode_length) for seed in set(seeds)}
        self.pays[:] = [draws[seed] >= self.zero_reward_probability for seed in seeds]

    def _judge(
        self, envs: NDArray[np.intp], positions: NDArray[np.intp]
    ) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        new = ~self._visited[envs, positions]
        self._visited[envs, positions] = True
        self.cells_left[envs] -= new
        terminated = self.cells_left[envs] == 0
        paid = new & self.pays[envs, self._steps]
        return self.rewards[envs, paid.astype(int), terminated.astype(int)], terminated
