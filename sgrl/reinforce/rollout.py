"""Full-episode rollout: every environment is reset and run once to its end, each batch.

No episode is dropped and none favoured: a batch holds exactly one episode of each environment,
padded to the configured episode length.
"""

from typing import Any

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sgrl.envs.guard import EnvironmentFailed, named
from sgrl.envs.registry import VectorEnv
from sgrl.nn.actions import ActionSpace, Box, Discrete, Mixed, MultiDiscrete
from sgrl.nn.policy import Acting, Noise, Policy, given
from sgrl.reinforce.batch import EpisodeBatch
from sgrl.reinforce.generators import get_random_state, set_random_state

#: Added to a seed for evaluation: environments that training never reaches. Environment seeds lie
#: in [0, 2**32), and a run's seed below `MAX_SEED` leaves it a thousand million of them.
EVALUATION_SEED_OFFSET = 2**31
MAX_SEED = 2**30


def action_space_of(space: gym.Space) -> ActionSpace:
    """The kind of actions that a space holds, for `make_policy`.

    Args:
        space: as `VectorEnv.action_space` has it.

    Raises:
        ValueError: it is none of those.
    """
    match space:
        case gym.spaces.Discrete() if space.start == 0:
            return Discrete(int(space.n))
        case gym.spaces.MultiDiscrete() if space.nvec.ndim == 1 and not space.start.any():
            return MultiDiscrete(tuple(space.nvec.tolist()))
        case gym.spaces.Box() if len(space.shape) == 1 and np.issubdtype(space.dtype, np.floating):
            return Box(space.shape[0])
        case gym.spaces.Tuple(spaces=(gym.spaces.MultiDiscrete(), gym.spaces.Box())):
            choices, numbers = map(action_space_of, space.spaces)
            if isinstance(choices, MultiDiscrete) and isinstance(numbers, Box):
                return Mixed(choices.sizes, numbers.size)
    raise ValueError(
        f"action space {space} is not supported: it must be Discrete or MultiDiscrete, counted "
        "from 0, or a Box of real numbers, on one axis, or a Tuple of these last two "
        "(sgrl.envs.registry.make_single sees to it)"
    )


class Rollout:
    """Collects batches of whole episodes from a vector of environments.

    Environment e of batch k is reset with seed * env.seed_spacing + first_env + e +
    k * total_envs, so several rollouts that share `total_envs` see together what one big rollout
    would see.

    Args:
        env: the environments, B of them.
        policy: acts; its parameters may change between batches.
        seed: of the environments and of the actions.
        first_env: index of this rollout's first environment among all.
        total_envs: number of environments over all rollouts (default: B).
        keep: for an update of this very policy: batches carry what it need not compute again.
        greedy: whether actions are the likeliest (of a Box the means) instead of sampled.
    """

    def __init__(
        self,
        env: VectorEnv,
        policy: Policy,
        seed: int,
        first_env: int = 0,
        total_envs: int | None = None,
        keep: bool = False,
        greedy: bool = False,
    ) -> None:
        self.env = env
        self.action_space = action_space_of(env.action_space)
        self.policy = policy
        self.seed = seed
        self.first_env = first_env
        self.total_envs = env.num_envs if total_envs is None else total_envs
        self.keep = keep
        self.greedy = greedy
        self.batches = 0
        # Hashed: torch's generator sees only 32 bits of its seed, and neither rollouts that share
        # a seed nor the policy's initial weights may draw the same numbers.
        mixed = np.random.SeedSequence([seed, first_env]).generate_state(1)
        self.generator = torch.Generator().manual_seed(int(mixed[0]))

    def collect(self, device: torch.device | None = None) -> EpisodeBatch:
        """Run every environment once to its end.

        Args:
            device: of the batch's tensors; the policy's if None.
        """
        env, policy = self.env, self.policy
        length, num_envs = env.episode_length, env.num_envs
        parameter = next(policy.parameters())
        space = self.action_space
        # The noise of a whole batch is drawn at once.
        noise = space.noise(length, num_envs, generator=self.generator).to(parameter)

        observations = np.zeros((length, num_envs, env.observation_size), np.float32)
        actions = torch.zeros(length, num_envs, *space.shape, dtype=space.dtype).numpy()
        rewards = np.zeros((length, num_envs), np.float32)
        mask = np.zeros((length, num_envs), bool)
        success = np.zeros(num_envs, bool)
        running = np.ones(num_envs, bool)
        first = self.seed * env.seed_spacing + self.first_env + self.batches * self.total_envs
        current = env.reset([first + e for e in range(num_envs)])
        neuron_noise = self._neuron_noise(parameter)
        acting = policy.acting(length, num_envs, self.keep, **given(neuron_noise))
        with torch.inference_mode():
            for t, noise_now in enumerate(noise.unbind()):
                observations[t] = current
                logits = acting.step(torch.from_numpy(current).to(parameter))
                chosen = space.greedy(logits) if self.greedy else space.sample(logits, noise_now)
                actions[t] = chosen.numpy(force=True)
                step = env.step(actions[t])
                current, rewards[t] = step.observations, step.rewards
                mask[t] = running
                if step.success is not None:
                    success |= step.success
                running &= ~(step.terminated | step.truncated)
                if not running.any():
                    break
        _check_finite(observations, actions, rewards)
        self.batches += 1
        batch = EpisodeBatch(
            observations=torch.from_numpy(observations),
            actions=torch.from_numpy(actions),
            rewards=torch.from_numpy(rewards),
            mask=torch.from_numpy(mask),
            lengths=torch.from_numpy(mask.sum(0)),
            success=torch.from_numpy(success) if env.has_success else None,
            noise=neuron_noise,
            acted=acting if self.keep and type(acting) is not Acting else None,
        )
        return batch.to(parameter.device if device is None else device)

    def _neuron_noise(self, parameter: Tensor) -> Noise | None:
        """The batch's noise for the policy's neurons, if they are noisy; of the parameter's type.

        Every batch has a stream of its own: nothing has to be kept, and no other stream is moved.
        """
        size = getattr(self.policy, "noise_size", 0)
        if not size:
            return None
        stream = np.random.SeedSequence([self.seed, self.first_env], spawn_key=(self.batches,))
        shape = (self.env.episode_length, self.env.num_envs, size)
        numbers = np.random.default_rng(stream).standard_normal(shape, dtype=np.float32)
        return torch.from_numpy(numbers).to(parameter)

    def get_state(self) -> dict[str, Any]:
        """Return all that the next batch depends on, except the policy.

        That is the batch counter, the generator, what the environments keep, and the process-wide
        generators, from which they may draw.
        """
        return {
            "batches": self.batches,
            "generator": self.generator.get_state().numpy(),
            "environments": self.env.get_state(),
            "process": get_random_state(),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue from `get_state`."""
        self.batches = int(state["batches"])
        self.generator.set_state(torch.tensor(state["generator"], dtype=torch.uint8))
        if "process" in state:  # checkpoints from before have neither
            self.env.set_state(state["environments"])
            set_random_state(state["process"])


def _check_finite(
    observations: NDArray[np.float32], actions: NDArray[Any], rewards: NDArray[np.float32]
) -> None:
    """Check that a batch holds finite numbers only.

    Raises:
        EnvironmentFailed: an observation or reward is NaN or infinite.
        FloatingPointError: an action is.
    """
    columns = {"observation": observations, "action": actions, "reward": rewards}
    finite = {name: np.isfinite(values) for name, values in columns.items()}
    if all(where.all() for where in finite.values()):
        return
    # The observation before step t + 1 came with step t.
    first = [
        (int(place[0]) + (name != "observation"), int(place[1]), name, float(columns[name][place]))
        for name, where in finite.items()
        for place in [tuple(index) for index in np.argwhere(~where)[:1]]
    ]
    step, env, name, value = min(first, key=lambda found: found[0])
    line = f"{name} is {named(value)} at step {step} of environment {env}"
    raise FloatingPointError(line) if name == "action" else EnvironmentFailed(line)
