"""Monte-Carlo returns and the REINFORCE loss (paper, Section H.4)."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from sgrl.nn.actions import ActionSpace, Discrete
from sgrl.nn.policy import Mask

#: One number for each step of each episode.
PerStep = Float[Tensor, "T B"]


def discounted_returns(
    rewards: Float[Tensor, "T ..."],
    mask: Bool[Tensor, "T ..."],
    gamma: float | Float[Tensor, "..."],
) -> Float[Tensor, "T ..."]:
    """R_t = r_t + gamma R_{t+1} within each episode; 0 at padded steps.

    Args:
        rewards: [T, B], or with more axes of episodes.
        mask: bool of that shape, True at the steps of the episode.
        gamma: discount, or one for every episode.

    Returns:
        [T, B], of the rewards' shape and type.
    """
    returns: list[Tensor] = []
    ahead = zeros = torch.zeros_like(rewards[0])
    for reward, valid in zip(reversed(rewards.unbind()), reversed(mask.unbind()), strict=True):
        ahead = torch.where(valid, reward + gamma * ahead, zeros)
        returns.append(ahead)
    return torch.stack(returns[::-1])


def normalize_returns(returns: PerStep, mask: Mask) -> PerStep:
    """Mean 0 and standard deviation 1 over the valid steps; 0 at padded steps.

    Args:
        returns: [T, B].
        mask: bool [T, B].

    Returns:
        (returns - mean) / (population standard deviation + 1e-8), [T, B].
    """
    valid = returns[mask]
    normalized = (returns - valid.mean()) / (valid.std(correction=0) + 1e-8)
    return torch.where(mask, normalized, 0.0)


def subtract_batch_mean(returns: PerStep, mask: Mask) -> PerStep:
    """From every return the mean of the other episodes' returns at the same time step.

    The others' alone, so that the policy gradient's expectation stays what it is; where no other
    episode has got that far, nothing is subtracted.

    Args:
        returns: [T, B].
        mask: bool [T, B].

    Returns:
        [T, B], 0 at padded steps.
    """
    valid = torch.where(mask, returns, 0.0)
    others = mask.sum(1, keepdim=True) - 1
    mean = (valid.sum(1, keepdim=True) - valid) / others.clamp(min=1)
    return torch.where(mask & (others > 0), returns - mean, valid)


def value_loss(values: PerStep, returns: PerStep, mask: Mask) -> Float[Tensor, ""]:
    """Masked mean of (value - return)^2; all [T, B], the result 0-dim."""
    return torch.where(mask, (values - returns).square(), 0.0).sum() / mask.sum().clamp(min=1)


class LossTerms(NamedTuple):
    """loss = policy_loss - entropy_coeff * entropy, 0-dim tensors."""

    loss: Float[Tensor, ""]
    policy_loss: Float[Tensor, ""]
    entropy: Float[Tensor, ""]


def reinforce_loss(
    logits: Float[Tensor, "T B A"],
    actions: Shaped[Tensor, "T B ..."],
    returns: PerStep,
    mask: Mask,
    entropy_coeff: float,
    space: ActionSpace | None = None,
) -> LossTerms:
    """-masked mean(log pi(a) * return) - entropy_coeff * masked mean(entropy of pi).

    Args:
        logits: [T, B, A].
        actions: [T, B], or [T, B, number of parts].
        returns: [T, B].
        mask: bool [T, B].
        entropy_coeff: weight of the entropy bonus.
        space: what the logits say of the actions; Discrete if None.
    """
    space = Discrete(logits.shape[-1]) if space is None else space
    chosen, entropies = space.log_prob_and_entropy(logits, actions)
    count = mask.sum().clamp(min=1)
    policy_loss = -torch.where(mask, chosen * returns, 0.0).sum() / count
    entropy = torch.where(mask, entropies, 0.0).sum() / count
    return LossTerms(policy_loss - entropy_coeff * entropy, policy_loss, entropy)
