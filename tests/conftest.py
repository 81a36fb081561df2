"""Fixtures of all tests."""

import os
from collections.abc import Iterator

import pytest
import torch

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
# At Ray's own 15 its workers would wait for whatever tests run beside them.
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - so spelt by Ray
# Bitwise comparisons hold for one thread count; Ray's actors have one thread too.
torch.set_num_threads(1)

#: Files that mostly wait, on sweeps in processes of their own; the longest first. Workers take
#: whole files in the order of collection, so that none of these is begun last.
LONG_FILES = (
    "test_readme",
    "test_cluster",
    "test_sweep",
    "test_faults",
    "test_storage",
    "test_tracking",
    "test_extend",
    "test_cluster_sweep",
    "test_chaos",
    "test_foreign_environments",
    "test_stock_algorithms",
    "test_report",
    "test_evaluation",
    "test_archive",
    "test_learning",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the long files first, in the order of `LONG_FILES`."""
    rank = {name: place for place, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One Ray instance for all tests that need one; its processors are only a count."""
    import ray

    ray.init(
        "local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="error"
    )
    yield
    ray.shutdown()
