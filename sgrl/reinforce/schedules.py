"""Numbers that change with the environment steps taken: learning rates, the entropy bonus."""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
from torch.optim import Optimizer

from sgrl.reinforce.predictors import ScaledAdam

#: A number, or [env_steps, value] pairs: straight lines between them, the last value after them.
Schedule = float | Sequence[Sequence[float]]


def value_at(schedule: Schedule, env_steps: int) -> float:
    """The value of a schedule once so many steps have been learned from."""
    if isinstance(schedule, int | float):
        return float(schedule)
    steps, values = zip(*schedule, strict=True)
    return float(np.interp(env_steps, steps, values))


def is_schedule(value: object) -> bool:
    """Whether a value holds [env_steps, value] pairs from step 0 on, in ascending order."""
    if not isinstance(value, list | tuple) or not value:
        return False
    pairs = [pair for pair in value if isinstance(pair, list | tuple) and len(pair) == 2]
    numbers = [n for pair in pairs for n in pair if isinstance(n, int | float)]
    if len(pairs) < len(value) or len(numbers) < 2 * len(value):
        return False
    steps = numbers[::2]
    return steps[0] == 0 and all(a < b for a, b in itertools.pairwise(steps))


def set_learning_rates(
    optimizers: Mapping[str, Optimizer], lr: Schedule, predictor_lr: Schedule, env_steps: int
) -> None:
    """Set the learning rates of `make_optimizers`' optimizers for the next update."""
    for name, schedule in (("policy", lr), ("predictor", predictor_lr)):
        if isinstance(schedule, int | float) or name not in optimizers:
            continue
        optimizer, rate = optimizers[name], value_at(schedule, env_steps)
        if isinstance(optimizer, ScaledAdam):
            optimizer.unit_lr = rate
        for group in optimizer.param_groups:
            group["lr"] = rate
