"""The noise of a policy's neurons: every step of a sample draws it from a seed of its own.

So a sample is kept in a few numbers, and a replicate can share the noise of some steps.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from sgrl.nn.policy import Policy


def noise_seeds(
    policy: Policy, shape: tuple[int, ...], entropy: Sequence[int]
) -> Int64[Tensor, "..."]:
    """Draw seeds of this shape from `entropy`; zeros for a policy whose neurons have no noise."""
    if not policy.noise_size:
        return torch.zeros(shape, dtype=torch.int64)
    return torch.from_numpy(np.random.default_rng(entropy).integers(2**63, size=shape))


def noise_of(policy: Policy, seeds: Int64[Tensor, "T K"]) -> Float[Tensor, "T K noise"] | None:
    """The noise that these seeds stand for; None where the neurons have none."""
    if not policy.noise_size:
        return None
    drawn = [
        np.random.default_rng(seed).standard_normal(policy.noise_size, dtype=np.float32)
        for seed in seeds.flatten().tolist()
    ]
    noise = torch.from_numpy(np.stack(drawn)).to(next(policy.parameters()))
    return noise.view(*seeds.shape, policy.noise_size)
