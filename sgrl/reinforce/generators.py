"""The random generators that a process shares: Python's, NumPy's and torch's."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def generators_aside(seed: Sequence[int] | None) -> Iterator[None]:
    """Run something with shared generators of its own: whatever it draws, the ones that were there
    before are put back untouched.

    Args:
        seed: numbers that the generators start from; None: anything.
    """
    drawn = np.random.SeedSequence(seed).generate_state(3)
    before = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=[]):
        random.seed(int(drawn[0]))
        np.random.seed(drawn[1])  # noqa: NPY002
        torch.manual_seed(int(drawn[2]))
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])  # noqa: NPY002
