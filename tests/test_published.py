"""Trials of the published archives, trained again."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from sgrl.results.archive import ArchivedTrial, is_archive, read_archive
from sgrl.results.checkpoints import open_policy
from sgrl.results.zoo import find_policy, policy_names
from sgrl.tuning.verify import verify_archive

PUBLISHED = Path(__file__).parent.parent / "results" / "published"
ARCHIVES = sorted(path.name for path in PUBLISHED.iterdir() if is_archive(path))
#: Of these a few rows are computed in every run of the tests; of all archives in the slow ones.
FEW = ["labyrinth_escape_20", "labyrinth_explore_20"]


def interrupted(trials: Sequence[ArchivedTrial]) -> list[str]:
    """Names of trials that went on from a checkpoint."""
    later = [
        trial.name for trial in trials if any(start.get("iteration") for start in trial.starts)
    ]
    return sorted(later)


@pytest.mark.parametrize("name", FEW)
def test_first_rows(name: str, tmp_path: Path, ray_session: None) -> None:
    """One trial chosen at random, on any processor."""
    verdicts = verify_archive(PUBLISHED / name, tmp_path, trials=1, iterations=3)
    assert [verdict.passed for verdict in verdicts] == [True], verdicts


@pytest.mark.parametrize("name", policy_names())
def test_the_zoo(name: str) -> None:
    """Each policy loads by its name, and is of the task and the method that the name says."""
    task, method = name.split("/")
    folder = find_policy(f"zoo:{name}")
    assert folder.parts[-3].startswith(f"{method}_")
    policy, environment = open_policy(folder)
    assert environment["env"] == task
    assert all(value.isfinite().all() for value in policy.state_dict().values())


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHIVES)
def test_whole_trials(name: str, tmp_path: Path, ray_session: None) -> None:
    """Two whole trials: of those that were interrupted, where there are any."""
    names = interrupted(read_archive(PUBLISHED / name))[:2]
    verdicts = verify_archive(PUBLISHED / name, tmp_path, trials=2, iterations=1000, names=names)
    assert all(verdict.passed for verdict in verdicts), verdicts
