"""Episodes of a trained policy, recorded as arrays.

`record_episode` plays exactly the episode that `sgrl evaluate` plays, with the same maze and the
same sampled actions. It does not need Ray.
"""

import contextlib
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray
from popgym.core.maze import Cell

from sgrl.envs.guard import failure
from sgrl.envs.labyrinth import VectorLabyrinth
from sgrl.envs.registry import (
    ENVIRONMENTS,
    evaluation_config,
    make_single,
    make_vector,
    validate_env_config,
)
from sgrl.errors import UserError, one_line
from sgrl.nn.policy import Policy, given
from sgrl.nn.recurrent import SparseRNN
from sgrl.nn.registry import name_of
from sgrl.results.checkpoints import open_policy
from sgrl.results.evaluation import EVALUATION_BATCH, evaluation_rollout
from sgrl.user_code import FAILURES


class RenderError(UserError):
    """An episode cannot be drawn. The message is one line that says what to do."""


@dataclass(frozen=True)
class Episode:
    """S steps of one policy in one environment with A actions.

    Attributes:
        method: the policy's name in experiments.
        env: the environment's name.
        seed: the seed of `sgrl evaluate` that plays this episode.
        number: its number there, from 0.
        observations: float32 [S + 1, F], before each step and after the last.
        actions: int64 [S].
        rewards: float32 [S].
        probabilities: of the policy's actions, float32 [S, A].
        success: whether the episode ended in success.
        mixing_weights: lambda of each neuron [layers, W]; None unless the policy uses sgprop.
    """

    method: str
    env: str
    seed: int
    number: int
    observations: NDArray[np.float32]
    actions: NDArray[np.int64]
    rewards: NDArray[np.float32]
    probabilities: NDArray[np.float32]
    success: bool
    mixing_weights: NDArray[np.float32] | None

    @property
    def title(self) -> str:
        """A line that names the episode and its outcome."""
        end = "success" if self.success else "no success"
        return f"{self.method}, {self.env}, seed {self.seed}, episode {self.number}: {end}"


@dataclass(frozen=True)
class LabyrinthEpisode(Episode):
    """An episode in a maze.

    Attributes:
        maze: `Cell` codes, int8 [H, W], borders included.
        positions: row and column of the agent before each step and after the last [S + 1, 2].
        seen: the cells in its view [S + 1, 3, 3], as row-major indices into the maze; H * W where
            the view is padded.
        views: `Cell` codes of the view as the policy observes them, int8 [S + 1, 3, 3].
        hidden: output of the policy's core at each step, [S, W, N]; [S, H, 1] for a dense core.
        memory: whether the core has memory, so that `hidden` is its state.
    """

    maze: NDArray[np.int8]
    positions: NDArray[np.int64]
    seen: NDArray[np.int64]
    views: NDArray[np.int8]
    hidden: NDArray[np.float32]
    memory: bool


@dataclass(frozen=True)
class BanditEpisode(Episode):
    """The single step of a bandit: an image and a guess.

    Attributes:
        classes: the A digits that the actions stand for.
        right: the correct action.
    """

    classes: list[int]
    right: int


@dataclass(frozen=True)
class FrameEpisode(Episode):
    """An episode of gymnasium's, as the environment draws it.

    Attributes:
        frames: its picture before each step and after the last, uint8 [height, width, 3] each.
    """

    frames: list[NDArray[np.uint8]]

    @property
    def title(self) -> str:
        earned = f"return {float(self.rewards.sum()):g}"
        return f"{self.method}, {self.env}, seed {self.seed}, episode {self.number}: {earned}"


def record_episode(
    checkpoint: str | Path, seed: int = 0, number: int = 0
) -> LabyrinthEpisode | BanditEpisode | FrameEpisode:
    """Play one episode of `sgrl evaluate CHECKPOINT --seed SEED`, without Ray or pickle.

    Evaluation plays 100 episodes side by side and samples their actions together; so does this.

    Args:
        checkpoint: as in `open_policy`.
        seed: as in `evaluate`.
        number: which of evaluation's episodes, from 0.

    Returns:
        The episode.

    Raises:
        CheckpointError: as `open_policy`.
        DataError: the bandit's images are not available.
        RenderError: its environment cannot be drawn.
        EnvironmentFailed: the environment raised.
    """
    policy, environment = open_policy(Path(checkpoint))
    env, place = environment["env"], number % EVALUATION_BATCH
    rollout = evaluation_rollout(policy, environment, seed + number - place)
    with contextlib.closing(rollout.env):
        batch = rollout.collect()
    steps = int(batch.lengths[place])
    actions = batch.actions[:steps, place].numpy()
    observations = batch.observations[:steps, place : place + 1]
    core: Any = getattr(policy, "core", None)
    weights = [values.float().numpy() for values in getattr(core, "mixing_weights", [])]
    environment_seed = rollout.seed * rollout.env.seed_spacing + place
    # The episode once more, alone, for what observations do not show.
    settings = evaluation_config(env, environment["env_config"]) | {"vectorized": True}
    shared: dict[str, Any] = {
        "method": method_name(policy),
        "env": env,
        "seed": seed,
        "number": number,
        "actions": actions,
        "rewards": batch.rewards[:steps, place].numpy(),
        "mixing_weights": np.stack(weights) if weights else None,
    }
    if env not in ENVIRONMENTS:
        observed, frames = _drawn_frames(env, settings, environment_seed, actions)
        none = np.zeros((steps, 0), np.float32)
        return FrameEpisode(
            **shared, observations=observed, probabilities=none, success=False, frames=frames
        )
    with torch.inference_mode():
        dtype = next(policy.parameters()).dtype
        inputs, state = observations.to(dtype), policy.initial_state(1)
        noise = None if batch.noise is None else batch.noise[:steps, place : place + 1]
        hidden, _ = policy.run_core(policy.encode(inputs), state, None, **given(noise))
        probabilities = policy(inputs, **given(noise)).logits.softmax(-1)
    shape = (core.num_neurons, core.neuron_size) if isinstance(core, SparseRNN) else (0, 0)
    if hidden.shape[-1] == shape[0] * shape[1]:
        hidden = hidden.unflatten(-1, shape)
    else:
        hidden = hidden.unsqueeze(-1)

    assert batch.success is not None  # all environments of ours report it
    shared["probabilities"] = probabilities[:, 0].float().numpy()
    shared["success"] = bool(batch.success[place])
    if env == "mnist_bandit":
        vector = make_vector(env, policy.num_actions, settings)
        vector.reset([environment_seed] * policy.num_actions)
        right = vector.step(np.arange(policy.num_actions)).success
        assert right is not None
        return BanditEpisode(
            **shared,
            observations=batch.observations[:1, place].numpy(),
            classes=validate_env_config(env, settings)["classes"],
            right=int(right.argmax()),
        )
    labyrinth = make_vector(env, 1, settings)
    assert isinstance(labyrinth, VectorLabyrinth)
    states = [(labyrinth.reset([environment_seed])[0], labyrinth.position(0), labyrinth.seen(0))]
    for action in actions:
        observed = labyrinth.step(action[None]).observations[0]
        states.append((observed, labyrinth.position(0), labyrinth.seen(0)))
    all_observations, positions, seen = map(np.stack, zip(*states, strict=True))
    one_hot = all_observations[:, : 9 * len(Cell)].reshape(-1, 3, 3, len(Cell))
    return LabyrinthEpisode(
        **shared,
        observations=all_observations,
        maze=labyrinth.maze(0),
        positions=positions,
        seen=seen,
        views=one_hot.argmax(-1).astype(np.int8),
        hidden=hidden[:, 0].float().numpy(),
        memory=bool(state),
    )


def _drawn_frames(
    env: str, settings: dict[str, Any], seed: int, actions: NDArray[Any]
) -> tuple[NDArray[np.float32], list[NDArray[np.uint8]]]:
    """Observations [S + 1, F] and pictures of an episode of gymnasium's, played again."""
    config = {key: value for key, value in settings.items() if key != "vectorized"}
    hint = 'gymnasium draws environments that have render_mode="rgb_array"'
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # gymnasium's own words on render modes
            single = make_single(env, config | {"render_mode": "rgb_array"})
    except ValueError as error:
        raise RenderError(f"{one_line(error)}; {hint}") from None
    with contextlib.closing(single):
        observed, frames = [single.reset(seed=seed)[0]], [_frame(single, env, hint)]
        for action in actions:
            observed.append(single.step(action)[0])
            frames.append(_frame(single, env, hint))
    return np.stack([np.ravel(one) for one in observed]).astype(np.float32), frames


def _frame(single: gym.Env, env: str, hint: str) -> NDArray[np.uint8]:
    try:
        frame: Any = single.render()
    except FAILURES as error:
        raise RenderError(f"{env} cannot be drawn: {failure(error)}; {hint}") from None
    if not (isinstance(frame, np.ndarray) and frame.ndim == 3 and frame.shape[2] == 3):
        raise RenderError(f"{env} cannot be drawn: its render() gives no picture; {hint}")
    return frame.astype(np.uint8)


def method_name(policy: Policy) -> str:
    """Return the name that the shipped experiments give a policy, which determines its colour.

    Args:
        policy: the policy.

    Returns:
        The name of the method.
    """
    own = name_of(policy).rpartition(":")[2]
    name = {"sparse_mlp": "sparse"}.get(own, own)
    propagation = getattr(policy.settings, "propagation", None)
    return f"{name}_{propagation}" if propagation else name
