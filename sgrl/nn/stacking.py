"""Policies of several runs as one: every tensor has a leading axis of S runs.

    stacked = stack_policies([make_policy("sparsenet", 56, 4, seed=s) for s in range(30)])
    logits = stacked(observations, mask).logits       # [T, S, B, F] -> [T, S, B, A]
    stacked.unstack(policies)                         # the runs' parameters, back into policies

One run computes what its policy would by itself, but many take hardly longer than one where time
goes into launching small operations, as on a GPU. The runs share connectivity sizes and settings
and differ in their numbers: parameters, which neurons are connected, mixing weights, and of the
settings those in `PER_RUN`.
"""

import dataclasses
from collections.abc import Sequence

import torch

from sgrl.nn.feedforward_policies import DensePolicy, MLPPolicy, SparseMLPPolicy
from sgrl.nn.kernels.plain import is_plain
from sgrl.nn.policy import Policy
from sgrl.nn.recurrent_policies import GRUPolicy, LSTMPolicy, SparseNetPolicy
from sgrl.nn.stacked import Stacked, StackedGRU, StackedLSTM, StackedSparseNet
from sgrl.nn.stacked_feedforward import StackedDense, StackedMLP, StackedSparseMLP

STACKED: dict[type[Policy], type[Stacked]] = {
    GRUPolicy: StackedGRU,
    LSTMPolicy: StackedLSTM,
    MLPPolicy: StackedMLP,
    SparseNetPolicy: StackedSparseNet,
    DensePolicy: StackedDense,
    SparseMLPPolicy: StackedSparseMLP,
}
#: Settings in which stacked runs may differ. (Lambda's initial value is a number of the policy.)
PER_RUN = ("mixing_weight", "mixing_momentum", "schedule_beta")
#: Those that say how one policy is run by itself.
IGNORED = ("backend",)


def stack_policies(policies: Sequence[Policy], device: torch.device | str = "cpu") -> Stacked:
    """Stack policies, which stay as they are.

    Args:
        policies: S of one kind, size and type, as their class makes them, with all parameters
            trained; see `PER_RUN` for what may differ.
        device: where the stacked tensors are.

    Raises:
        ValueError: they cannot be stacked; one line that says why.
    """
    if not policies:
        raise ValueError("there are no policies to stack")
    first = policies[0]
    kind = STACKED.get(type(first))
    if kind is None:
        names = ", ".join(policy.name for policy in STACKED)
        raise ValueError(f"policy {first.name!r} does not stack; those that do: {names}")
    for policy in policies:
        differs = _difference(first, policy)
        if differs is not None:
            raise ValueError(f"runs that are stacked must have the same {differs}")
    if getattr(first.settings, "shuffle_predictions", False):
        raise ValueError("shuffle_predictions does not stack: draw each run's by itself")
    if first.noise_size:
        raise ValueError("neuron_noise does not stack: train such runs by themselves")
    if first.normalizer is not None:
        raise ValueError("normalize_observations does not stack: train such runs by themselves")
    if len(first.observation_shape) > 1:
        raise ValueError("policies of images do not stack: train such runs by themselves")
    dtype = next(first.parameters()).dtype
    sizes = first.observation_size, first.action_space
    fresh = type(first)(*sizes, first.settings, torch.Generator(), dtype)
    for policy in policies:
        changed = _change(fresh, policy)
        if changed is not None:
            raise ValueError(f"policy {policy.name!r} does not stack: {changed}")
    return kind(policies, torch.device(device))


def _difference(one: Policy, other: Policy) -> str | None:
    """Name of what keeps two policies from being stacked."""
    if type(other) is not type(one):
        return "policy"
    a, b = (dataclasses.asdict(policy.settings) for policy in (one, other))
    for name, value in a.items():
        if name not in (*PER_RUN, *IGNORED) and b[name] != value:
            return name
    for name in ("observation_size", "action_space"):
        if getattr(one, name) != getattr(other, name):
            return name
    shapes = (
        {name: (v.shape, v.dtype) for name, v in p.state_dict().items()} for p in (one, other)
    )
    return "sizes and type of numbers" if len({str(of_one) for of_one in shapes}) > 1 else None


def _change(fresh: Policy, policy: Policy) -> str | None:
    """What of a policy is not as its class makes it: the stacked ones compute only that."""
    made = dict(fresh.named_modules())
    for name, module in policy.named_modules():
        same = name in made and is_plain(module, type(made[name]))
        is_leaf = next(module.children(), None) is None
        if not same or (is_leaf and module.extra_repr() != made[name].extra_repr()):
            return f"{name or 'it'} was replaced or changed, or has hooks"
    frozen = [name for name, value in policy.named_parameters() if not value.requires_grad]
    return (
        f"{frozen[0]} requires no gradient, and all parameters would be trained" if frozen else None
    )
