"""A batch of whole episodes, dense in time: one episode per environment."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor

from sgrl.nn.policy import Acting, Mask, Noise


@dataclass
class EpisodeBatch:
    """One episode of every environment, padded to the configured episode length T.

    Attributes:
        observations: float32 [T, B, F]. After an episode's end its terminal observation is
            repeated while others run; zeros once all are done.
        actions: int64 [T, B], of actions in parts [T, B, number of parts] (float32 if real
            numbers, as sampled: the environment clips them); after an episode's end without
            effect: sampled from the policy while others run, zeros once all are done.
        rewards: float32 [T, B], 0 at padded steps.
        mask: bool [T, B], True at the steps of the episode.
        lengths: int64 [B], steps of each episode.
        success: bool [B], whether the episode ended in success; None where the environment knows
            no success.
        noise: [T, B, noise_size], what the policy's noisy neurons were given while it
            acted, and the update gives them again; None where they have no noise.
        acted: what the policy kept while it acted, for `Acting.replay`; one update uses it up.

    Source: the paper, Section H.4.
    """

    observations: Float[Tensor, "T B F"]
    actions: Shaped[Tensor, "T B ..."]
    rewards: Float[Tensor, "T B"]
    mask: Mask
    lengths: Int64[Tensor, " B"]
    success: Bool[Tensor, " B"] | None = None
    noise: Noise | None = None
    acted: Acting | None = None

    def tensors(self) -> dict[str, Tensor]:
        """The tensors there are, by name; `acted` is none."""
        names = [field.name for field in dataclasses.fields(EpisodeBatch)]
        values = {name: getattr(self, name) for name in names}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    @property
    def num_steps(self) -> int:
        """Steps that the environments really took."""
        return int(self.lengths.sum())

    @property
    def num_padded_steps(self) -> int:
        """T x B, padding included: the published count."""
        return self.mask.numel()

    @property
    def num_episodes(self) -> int:
        """B: every environment runs one."""
        return len(self.lengths)

    def to(self, device: torch.device | str) -> "EpisodeBatch":
        """Return the batch with its tensors on a device; `acted` stays as it is."""
        values = {name: value.to(device) for name, value in self.tensors().items()}
        return EpisodeBatch(**values, acted=self.acted)

    def statistics(self) -> dict[str, float]:
        """success_rate (where known), episode_return_mean (undiscounted), episode_length_mean."""
        success = {}
        if self.success is not None:
            success["success_rate"] = self.success.double().mean().item()
        return success | {
            "episode_return_mean": self.rewards.double().sum(0).mean().item(),
            "episode_length_mean": self.lengths.double().mean().item(),
        }


def concatenate(batches: Sequence[EpisodeBatch]) -> EpisodeBatch:
    """Batches of the same T side by side along B."""
    if len(batches) == 1:
        return batches[0]
    values = {
        name: torch.cat(
            [getattr(batch, name) for batch in batches],
            dim=0 if name in ("success", "lengths") else 1,
        )
        for name in batches[0].tensors()
    }
    return EpisodeBatch(**values, acted=None)


@dataclass
class StepCounts:
    """What training has taken of its environments so far; evaluation counts nowhere.

    Attributes:
        env_steps: steps really taken.
        padded_env_steps: batches x environments x T, the published axis.
        episodes: episodes that ended.
    """

    env_steps: int = 0
    padded_env_steps: int = 0
    episodes: int = 0

    def add(self, batch: EpisodeBatch) -> None:
        """Count a batch."""
        self.env_steps += batch.num_steps
        self.padded_env_steps += batch.num_padded_steps
        self.episodes += batch.num_episodes
