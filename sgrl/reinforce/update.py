"""One training step: returns, loss, one backward pass, two optimizers clipped separately.

Synthetic-gradient propagation happens inside the network's own backward pass, so this is the
same code for every policy; predictors merely have an optimizer of their own.
"""

import ctypes
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from sgrl.nn.mixing import backward_phase, split_parameters
from sgrl.nn.policy import given
from sgrl.nn.registry import Policy, mixing_statistics
from sgrl.reinforce.batch import EpisodeBatch
from sgrl.reinforce.loss import (
    LossTerms,
    discounted_returns,
    normalize_returns,
    reinforce_loss,
    subtract_batch_mean,
    value_loss,
)
from sgrl.reinforce.predictors import LeastSquares, make_predictor_optimizer
from sgrl.reinforce.schedules import Schedule, value_at

#: Updates between two calls of `release_freed_memory`; at full size the heap grows by some 8 MB
#: an update.
TRIM_EVERY = 20
BASELINES = ("none", "batch_mean", "value_head")
_updates = itertools.count(1)


class NonFiniteLoss(FloatingPointError):
    """The loss or its gradient is NaN or infinite; nothing was changed by that step.

    (In the two-phase step the predictors may have taken theirs.)
    """


@dataclass(frozen=True)
class UpdateSettings:
    """Settings of one training step.

    Attributes:
        gamma: discount of the returns.
        entropy_coeff: weight of the entropy bonus.
        grad_clip: greatest global norm, of each parameter group; None leaves gradients alone.
        normalize_returns: whether returns are normalised over the batch's valid steps.
        two_phase: first the predictors take their step, then the policy, whose backward pass over
            the same forward mixes in what they predict now (paper, Section H.3). Otherwise one
            backward pass serves both (H.4). Without predictors there is no difference.
    """

    gamma: float = 0.95
    entropy_coeff: float = 0.01
    grad_clip: float | None = 0.5
    normalize_returns: bool = True
    two_phase: bool = False
    baseline: Literal["none", "batch_mean", "value_head"] = "none"
    value_coeff: float = 0.5

    def __post_init__(self) -> None:
        if self.baseline not in BASELINES:
            known = ", ".join(BASELINES)
            raise ValueError(f"baseline must be one of {known}, got {self.baseline!r}")

    @classmethod
    def of(cls, config: Any, env_steps: int = 0) -> Self:
        """Take the settings from an object that has them among its attributes.

        Args:
            config: its entropy_coeff may be a schedule.
            env_steps: learned from so far.
        """
        given = {field.name: getattr(config, field.name) for field in fields(cls)}
        return cls(**given | {"entropy_coeff": value_at(config.entropy_coeff, env_steps)})


def make_optimizers(
    policy: Policy,
    lr: Schedule,
    predictor_lr: Schedule,
    predictor_optimizer: str = "adam",
    predictor_memory: float = 0.95,
) -> dict[str, Optimizer]:
    """Adam (betas 0.9 and 0.999, eps 1e-8) for "policy", and where there are any "predictor".

    Args:
        policy: to train.
        lr: learning rate of all parameters but the predictors'; of a schedule, its first.
        predictor_lr: learning rate of the predictors, as `lr`.
        predictor_optimizer: how these learn, a name of `PREDICTOR_OPTIMIZERS`.
        predictor_memory: weight of the past in what that averages.

    Raises:
        ValueError: an unknown optimizer of predictors, or one that is not for this policy.
    """
    optimizers: dict[str, Optimizer] = {}
    if parameters := split_parameters(policy)[0]:
        optimizers["policy"] = Adam(parameters, lr=value_at(lr, 0), fused=True)
    predictor = make_predictor_optimizer(
        policy, predictor_optimizer, value_at(predictor_lr, 0), predictor_memory
    )
    return optimizers if predictor is None else {**optimizers, "predictor": predictor}


def optimizers_of(policy: Policy, config: Any) -> dict[str, Optimizer]:
    """`make_optimizers` with the settings that an object has among its attributes."""
    names = ("lr", "predictor_lr", "predictor_optimizer", "predictor_memory")
    return make_optimizers(policy, **{name: getattr(config, name) for name in names})


def clip_gradients(parameters: Iterable[Tensor], max_norm: float | None) -> Float[Tensor, ""]:
    """Scale the gradients of one parameter group in place by min(1, max_norm / (norm + 1e-6)).

    Args:
        parameters: of the group; those without gradient are passed over.
        max_norm: greatest global norm; None only measures.

    Returns:
        The global norm before clipping, 0-dim.
    """
    trained = [parameter for parameter in parameters if parameter.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
    if max_norm is not None:
        nn.utils.clip_grads_with_norm_(trained, max_norm, norm)
    return norm


def batch_loss(policy: Policy, batch: EpisodeBatch, settings: UpdateSettings) -> LossTerms:
    """Forward pass over the batch, padding included, and its loss.

    Raises:
        NonFiniteLoss: the loss is NaN or infinite.
    """
    dtype = next(policy.parameters()).dtype
    returns = discounted_returns(batch.rewards, batch.mask, settings.gamma)
    observations = batch.observations.to(dtype)
    if batch.acted is None:
        output = policy(observations, mask=batch.mask, **given(batch.noise))
    else:
        output = batch.acted.replay(policy, observations, batch.mask, batch.noise)
    advantages = returns
    if settings.baseline == "batch_mean":
        advantages = subtract_batch_mean(returns, batch.mask)
    elif settings.baseline == "value_head":
        if output.values is None:
            raise ValueError('baseline "value_head" needs a policy with value_head true')
        advantages = torch.where(batch.mask, returns - output.values.detach(), 0.0)
    if settings.normalize_returns:
        advantages = normalize_returns(advantages, batch.mask)
    terms = reinforce_loss(
        output.logits,
        batch.actions,
        advantages.to(dtype),
        batch.mask,
        settings.entropy_coeff,
        policy.action_space,
    )
    if settings.baseline == "value_head" and output.values is not None:
        error = value_loss(output.values, returns.to(dtype), batch.mask)
        terms = terms._replace(loss=terms.loss + settings.value_coeff * error)
    if not torch.isfinite(terms.loss):
        raise NonFiniteLoss(f"the loss is {terms.loss.item()}; try a smaller learning rate")
    return terms


def update(
    policy: Policy,
    optimizers: Mapping[str, Optimizer],
    batch: EpisodeBatch,
    settings: UpdateSettings,
) -> dict[str, float]:
    """One training step on one batch.

    Args:
        policy: to train.
        optimizers: from `make_optimizers`.
        batch: whole episodes, on the policy's device.
        settings: of the step.

    Returns:
        policy_loss, entropy, grad_norm (of the policy group, before clipping), and under sgprop
        `mixing_statistics`.

    Raises:
        NonFiniteLoss: the policy is left as it was.
    """
    for optimizer in optimizers.values():
        optimizer.zero_grad(set_to_none=True)
    terms = batch_loss(policy, batch, settings)
    batch.acted = None
    buffers = [(buffer, buffer.clone()) for buffer in policy.buffers()]
    try:
        if settings.two_phase and "predictor" in optimizers:
            with backward_phase(policy, "predictor"):
                inputs = _parameters(optimizers["predictor"])
                _backward(terms.loss, inputs=inputs, retain_graph=True)
            _observe(optimizers, policy, batch)
            _clip(optimizers["predictor"], settings.grad_clip)
            optimizers["predictor"].step()
            with backward_phase(policy, "policy"):
                _backward(terms.loss, inputs=_parameters(optimizers["policy"]))
            grad_norm = _clip(optimizers["policy"], settings.grad_clip)
            optimizers["policy"].step()
        else:
            _backward(terms.loss)
            _observe(optimizers, policy, batch)
            norms = {name: _clip(o, settings.grad_clip) for name, o in optimizers.items()}
            grad_norm = norms["policy"]
            for optimizer in optimizers.values():
                optimizer.step()
    except NonFiniteLoss:
        for buffer, before in buffers:  # the backward pass has moved the mixing weights
            buffer.copy_(before)
        raise
    policy.observe(batch.observations, batch.mask)
    if next(_updates) % TRIM_EVERY == 0:
        release_freed_memory()
    return {
        "policy_loss": terms.policy_loss.item(),
        "entropy": terms.entropy.item(),
        "grad_norm": grad_norm.item(),
        **mixing_statistics(policy),
    }


def _observe(optimizers: Mapping[str, Optimizer], policy: Policy, batch: EpisodeBatch) -> None:
    """Show the batch to predictors that are fitted to what their neurons saw in it."""
    predictor = optimizers.get("predictor")
    if isinstance(predictor, LeastSquares):
        observations = batch.observations.to(next(policy.parameters()).dtype)
        predictor.observe(observations, batch.mask, batch.noise)


def _backward(loss: Tensor, **how: Any) -> None:
    """Go back from a loss in the precision of the forward pass, also within `torch.autocast`."""
    with torch.autocast(loss.device.type, enabled=False):
        torch.autograd.backward(loss, **how)


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _clip(optimizer: Optimizer, max_norm: float | None) -> Tensor:
    """Clip the gradients of an optimizer's parameters; returns their norm before."""
    for parameter in _parameters(optimizer):
        # Fused Adam takes the elements of others in the wrong order, silently (torch 2.13, CPU).
        if parameter.grad is not None and not parameter.grad.is_contiguous():
            parameter.grad = parameter.grad.contiguous()
    if isinstance(optimizer, LeastSquares):
        max_norm = None  # its gradients stand for sums
    norm = clip_gradients(_parameters(optimizer), max_norm)
    if not torch.isfinite(norm):
        raise NonFiniteLoss(f"the gradient's norm is {norm.item()}; try a smaller learning rate")
    return norm


def release_freed_memory() -> None:
    """Hand memory that was freed back to the system, where the C library can.

    Before version 2.38 glibc often cannot use again what an aligned allocation, such as a
    tensor's, has freed (its bug 14581), and a training process would grow for hours.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        return
