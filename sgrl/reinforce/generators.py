"""The random generators that a process shares: Python's, NumPy's and torch's."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from sgrl.envs.wrappers import preserved_random_state


@contextmanager
def generators_aside(seed: Sequence[int] | None) -> Iterator[None]:
    """Run a block with random generators of its own.

    Whatever it draws, the process-wide generators are put back as they were.

    Args:
        seed: numbers that the generators start from; None: anything.
    """
    drawn = np.random.SeedSequence(seed).generate_state(3)
    with torch.random.fork_rng(devices=_gpus()), preserved_random_state():
        random.seed(int(drawn[0]))
        np.random.seed(drawn[1])  # noqa: NPY002
        torch.manual_seed(int(drawn[2]))
        yield


def get_random_state() -> dict[str, Any]:
    """The states of Python's, NumPy's and torch's generators (of the GPUs too), picklable."""
    return {
        "random": random.getstate(),
        "numpy": np.random.get_state(),  # noqa: NPY002
        "torch": torch.get_rng_state().numpy(),
        "cuda": [torch.cuda.get_rng_state(gpu).numpy() for gpu in _gpus()],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Continue from `get_random_state`, as far as this process has such generators."""
    random.setstate(state["random"])
    np.random.set_state(state["numpy"])  # noqa: NPY002
    torch.set_rng_state(torch.tensor(state["torch"], dtype=torch.uint8))
    # Checkpoints from before hold none of a GPU's.
    for gpu, saved in zip(_gpus(), state.get("cuda", ()), strict=False):
        torch.cuda.set_rng_state(torch.tensor(saved, dtype=torch.uint8), gpu)


def _gpus() -> list[int]:
    """The GPUs whose generators this process may have drawn from."""
    return [*range(torch.cuda.device_count())] if torch.cuda.is_initialized() else []
