"""Fixtures of all tests."""

import gc
import inspect
import os
from collections.abc import Iterator
from functools import partial

import jaxtyping
import pytest
import torch
from worker_server import local_ray

# For each of its connectors RLlib asks for all frames above, and uses one: without their lines of
# source, one of its own algorithms is built in a fifth of the time.
inspect.stack = partial(inspect.stack, context=0)
# Imports make no garbage: looking for it would take a quarter of the time of collecting tests.
gc.disable()

# Before sgrl is imported: its shapes are checked while tests run.
jaxtyping.install_import_hook(
    ["sgrl.envs.device", "sgrl.nn", "sgrl.reinforce", "sgrl.theory"], "shape_checks.check_shapes"
)

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
# At Ray's own 15 its workers would wait for whatever tests run beside them.
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - so spelt by Ray
# Bitwise comparisons hold for one thread count; Ray's actors have one thread too.
torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """Collect garbage from here on, among what the tests make."""
    gc.freeze()
    gc.enable()


@pytest.fixture
def unchecked_shapes() -> Iterator[None]:
    """Shapes go unchecked: for what a user is told, who has no such checks."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One Ray instance for all tests that need one; its processors are only a count."""
    with local_ray():
        yield
