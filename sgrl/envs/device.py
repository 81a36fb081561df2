"""Environments as tensor code: S runs x B episodes each, stepped on a device.

    env = make_device("labyrinth_escape", 30, 20, {}, "cuda")  # sgrl.envs.registry
    env.load(seeds)                          # S lists of B
    observations = env.reset()               # [S, B, F]
    for _ in range(env.max_steps):
        observations, *outcome = env.step(policy(observations))

They equal the vectorised environments bitwise, step for step: these draw and lay out the episodes
on the CPU, and their tables are what is stepped through here. `reset` and `step` are tensor
operations that never wait for the device, with neither shapes nor branches that depend on values,
so a batch (`reset` and `max_steps` steps) can be captured in a CUDA graph, to be replayed after
each `load`.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from numpy.typing import NDArray
from popgym.core.maze import Actions, Cell
from torch import Tensor

from sgrl.envs.labyrinth import (
    ACTION_BLOCKS,
    CELL_ONE_HOT,
    VIEW_SIZE,
    VectorEscape,
    VectorExplore,
    VectorLabyrinth,
)
from sgrl.envs.mnist_bandit import VectorMNISTBandit
from sgrl.envs.vector import VectorEnv


class DeviceStep(NamedTuple):
    """What one step of S x B environments gives; as `sgrl.envs.vector.StepResult`.

    Attributes:
        observations: float32 [S, B, F].
        rewards: float32 [S, B].
        terminated: bool [S, B], the episode ended by itself at this step.
        success: bool [S, B], it ended in success.
    """

    observations: Float[Tensor, "S B F"]
    rewards: Float[Tensor, "S B"]
    terminated: Bool[Tensor, "S B"]
    success: Bool[Tensor, "S B"]


class DeviceEnv(ABC):
    """S x B independent environments that start together and run one episode each per reset.

    N = S * B counts them run by run. A finished environment behaves as `VectorEnv` has it.

    Args:
        vector: N vectorised environments, which lay out the episodes.
        num_runs: S.
        device: where the tensors are.

    Attributes:
        num_envs: B.
        episode_length, observation_size, num_actions, seed_spacing: as of `VectorEnv`.
        max_steps: every episode has ended after so many steps; further ones change nothing.
        running: bool [S, B], whether the episode has not ended yet. What it is before a step is
            the step's mask in an episode batch.
    """

    running: Bool[Tensor, "S B"]

    def __init__(self, vector: VectorEnv, num_runs: int, device: torch.device | str) -> None:
        self.num_runs, self.num_envs = num_runs, vector.num_envs // num_runs
        self.episode_length = self.max_steps = vector.episode_length
        self.observation_size = vector.observation_size
        self.num_actions = vector.num_actions
        self.seed_spacing = vector.seed_spacing
        self.device = torch.device(device)
        self._vector = vector
        self._loaded = {name: self._constant(value) for name, value in self._episodes().items()}
        shape = num_runs, self.num_envs
        self._all = torch.ones(shape, dtype=torch.bool, device=device)
        self._none = torch.zeros(shape, dtype=torch.bool, device=device)
        self._nothing = torch.zeros(shape, dtype=torch.float32, device=device)
        self._steps = 0

    def _constant(self, array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(array.copy()).to(self.device)

    def load(self, seeds: Sequence[Sequence[int]]) -> None:
        """Lay out one episode for every environment and copy it to the device.

        The tensors keep their addresses. Copies to a GPU are queued, so the next batch may be
        loaded while the last one is still being computed.

        Args:
            seeds: of each run B integers, as of `VectorEnv.reset`.

        Raises:
            ValueError: not S times B of them.
        """
        if len(seeds) != self.num_runs or any(len(run) != self.num_envs for run in seeds):
            raise ValueError(
                f"load needs {self.num_runs} lists of {self.num_envs} seeds, one per run, got "
                f"lists of {[len(run) for run in seeds]}"
            )
        self._vector.reset([seed for run in seeds for seed in run])
        for name, array in self._episodes().items():
            source = torch.from_numpy(array)
            if self.device.type == "cuda":
                source = source.pin_memory()
            self._loaded[name].copy_(source, non_blocking=True)

    def reset(self) -> Float[Tensor, "S B F"]:
        """Start the episodes that were loaded last, and return the first observations."""
        self._steps = 0
        self.running = self._all
        self._observations = self._begin().unflatten(0, self._all.shape)
        return self._observations

    def step(self, actions: Int64[Tensor, "S B"]) -> DeviceStep:
        """Advance every unfinished environment by one step.

        Args:
            actions: each in [0, num_actions); ignored where finished.

        Returns:
            What the step gave; its tensors may be kept, but not written to.
        """
        if self._steps == self.max_steps:
            return DeviceStep(self._observations, self._nothing, self._none, self._none)
        stepped = self._advance(actions.flatten(), self.running.flatten())
        step = DeviceStep(*(values.unflatten(0, self._all.shape) for values in stepped))
        self._steps += 1
        self._observations = step.observations
        ended = self._steps == self.max_steps
        self.running = self._none if ended else self.running ^ step.terminated
        return step

    @abstractmethod
    def _episodes(self) -> dict[str, NDArray[Any]]:
        """What the vectorised environments laid out, by name."""

    @abstractmethod
    def _begin(self) -> Float[Tensor, "N F"]:
        """Start the loaded episodes and return the first observations."""

    @abstractmethod
    def _advance(self, actions: Int64[Tensor, " N"], running: Bool[Tensor, " N"]) -> DeviceStep:
        """One step of all, as `DeviceStep` but without the axis of runs; some may be finished."""


class DeviceLabyrinth(DeviceEnv):
    """Labyrinths as tables of moves.

    A move is a cell of a maze and one of the five `Actions`, the last of which stays: move
    5 * (C * n + cell) + action for environment n. An environment's state is its last move.
    """

    _vector: VectorLabyrinth

    def __init__(self, vector: VectorLabyrinth, num_runs: int, device: torch.device | str) -> None:
        super().__init__(vector, num_runs, device)
        self.max_steps = vector.max_steps
        cells, moves = vector.neighbours.shape
        self._stays = self._constant(np.arange(cells).repeat(moves))
        self._neighbours = self._constant(vector.neighbours.ravel())
        self._views = self._constant(vector.views.ravel())
        self._first_cells = self._constant(np.arange(vector.num_envs) * cells)
        self._one_hot = self._constant(CELL_ONE_HOT)
        self._action_blocks = self._constant(ACTION_BLOCKS)

    def _episodes(self) -> dict[str, NDArray[Any]]:
        return {"cells": self._vector.cells, "positions": self._vector.positions}

    def _begin(self) -> Float[Tensor, "N F"]:
        codes, first_cells = self._loaded["cells"], self._first_cells
        blocked = codes.index_select(1, self._neighbours) == Cell.OBSTACLE
        arrivals = torch.where(blocked, self._stays, self._neighbours)
        self._lay_out(codes.gather(1, arrivals))
        seen = codes.index_select(1, self._views).flatten().long()
        views = self._one_hot.index_select(0, seen).view(-1, VIEW_SIZE)
        arrivals = (arrivals + first_cells[:, None]).flatten()
        blocks = self._action_blocks.repeat(len(views), 1)
        # By move: what is observed after it, and the first move of the cell that it leads to.
        self._observed = torch.cat([views.index_select(0, arrivals), blocks], 1)
        self._leads_to = arrivals * len(Actions)
        self._here = (self._loaded["positions"] + first_cells) * len(Actions)
        self._moves = self._here + Actions.NONE
        return self._observed.index_select(0, self._moves)

    def _advance(self, actions: Int64[Tensor, " N"], running: Bool[Tensor, " N"]) -> DeviceStep:
        self._moves = torch.where(running, self._here + actions, self._moves)
        self._here = self._leads_to.index_select(0, self._moves)
        rewards, terminated = self._judge(running)
        observations = self._observed.index_select(0, self._moves)
        return DeviceStep(observations, rewards, terminated, terminated)

    @abstractmethod
    def _lay_out(self, reached: Tensor) -> None:
        """Prepare goals and rewards.

        Args:
            reached: `Cell` code of the cell that a move leads to, int8 [N, 5 * C].
        """

    @abstractmethod
    def _judge(self, running: Bool[Tensor, " N"]) -> tuple[Float[Tensor, " N"], Bool[Tensor, " N"]]:
        """Rewards and terminated after the moves made, of those that were running before."""


class DeviceEscape(DeviceLabyrinth):
    """`VectorEscape` on a device."""

    _vector: VectorEscape

    def __init__(self, vector: VectorEscape, num_runs: int, device: torch.device | str) -> None:
        super().__init__(vector, num_runs, device)
        rewards = vector.rewards.astype(np.float32)
        self._step_reward, self._goal_reward = self._constant(rewards).unbind()
        self._zero = torch.zeros_like(self._step_reward)

    def _lay_out(self, reached: Tensor) -> None:
        self._at_goal = (reached == Cell.GOAL).flatten()

    def _judge(self, running: Bool[Tensor, " N"]) -> tuple[Float[Tensor, " N"], Bool[Tensor, " N"]]:
        terminated = self._at_goal.index_select(0, self._moves) & running
        rewards = torch.where(running, self._step_reward, self._zero)
        return torch.where(terminated, self._goal_reward, rewards), terminated


class DeviceExplore(DeviceLabyrinth):
    """`VectorExplore` on a device."""

    _vector: VectorExplore

    def _episodes(self) -> dict[str, NDArray[Any]]:
        return super()._episodes() | {
            "rewards": self._vector.rewards.astype(np.float32),
            "pays": self._vector.pays,
            "cells_left": self._vector.cells_left,
        }

    def _lay_out(self, reached: Tensor) -> None:
        pays, rewards = self._loaded["pays"], self._loaded["rewards"]
        self._cells_left = self._loaded["cells_left"]
        # By the first move of a cell; a number, since it is counted with.
        free = self._loaded["cells"] == Cell.FREE
        self._unvisited = free.index_select(1, self._stays).flatten().long()
        # What a step earns: [T, N, outcome], where the outcome is 0 of a finished environment,
        # 1 of a cell visited before, 2 of a new one, 3 of the last one.
        new = torch.where(pays.T[:, :, None], rewards[:, 1], rewards[:, 0])
        old = rewards[:, 0, :1].expand(len(new), -1, -1)
        self._earned = torch.cat([torch.zeros_like(old), old, new], 2)

    def _judge(self, running: Bool[Tensor, " N"]) -> tuple[Float[Tensor, " N"], Bool[Tensor, " N"]]:
        new = self._unvisited.index_select(0, self._here)
        self._unvisited.index_fill_(0, self._here, 0)
        self._cells_left = self._cells_left - new
        # Finished environments stay on their last cell, with none left.
        terminated = (self._cells_left == 0) & running
        outcomes = new + running + terminated
        rewards = self._earned[self._steps].gather(1, outcomes[:, None]).squeeze(1)
        return rewards, terminated


class DeviceMNISTBandit(DeviceEnv):
    """`VectorMNISTBandit` on a device."""

    _vector: VectorMNISTBandit

    def _episodes(self) -> dict[str, NDArray[Any]]:
        vector = self._vector
        return {"images": vector.images, "right": vector.right, "flipped": vector.flipped}

    def _begin(self) -> Float[Tensor, "N F"]:
        return self._loaded["images"].clone()

    def _advance(self, actions: Int64[Tensor, " N"], running: Bool[Tensor, " N"]) -> DeviceStep:
        right = actions == self._loaded["right"]
        rewards = (right ^ self._loaded["flipped"]).float()
        return DeviceStep(self._observations.flatten(0, 1), rewards, running, right)


#: By the names of `sgrl.envs.registry.ENVIRONMENTS`.
DEVICE_ENVIRONMENTS: dict[str, Any] = {
    "labyrinth_escape": DeviceEscape,
    "labyrinth_explore": DeviceExplore,
    "mnist_bandit": DeviceMNISTBandit,
}
