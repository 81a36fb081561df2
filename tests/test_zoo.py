"""Policies by name."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import sgrl
from sgrl.cli import app
from sgrl.nn.registry import make_policy, save_policy
from sgrl.results import zoo

ENVIRONMENT = {"env": "labyrinth_escape", "env_config": {"episode_length": 12}}


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A zoo of one policy."""
    folder = tmp_path / "archive" / "gru_seed=1" / "checkpoints" / "policy"
    folder.mkdir(parents=True)
    save_policy(make_policy("gru", 56, 4, hidden_size=8), folder, environment=ENVIRONMENT)
    index = {"labyrinth_escape/gru": folder.relative_to(tmp_path).as_posix()}
    (tmp_path / "zoo.json").write_text(json.dumps(index))
    monkeypatch.setattr(zoo, "PUBLISHED", tmp_path)
    return folder


def test_policies_are_found_by_name(published: Path) -> None:
    assert zoo.policy_names() == ["labyrinth_escape/gru"]
    by_name, by_folder = (
        sgrl.load_policy(place).state_dict() for place in ("zoo:labyrinth_escape/gru", published)
    )
    assert all(torch.equal(value, by_folder[key]) for key, value in by_name.items())
    outputs = [
        CliRunner().invoke(app, ["evaluate", str(place), "--episodes", "6"]).output
        for place in ("zoo:labyrinth_escape/gru", published)
    ]
    assert outputs[0] == outputs[1]
    assert "success_rate" in outputs[0]


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("labyrinth_escape/grü", "did you mean 'labyrinth_escape/gru'?"),
        ("x", "known: labyrinth_escape/gru"),
    ],
)
def test_unknown_names(published: Path, name: str, hint: str) -> None:
    with pytest.raises(zoo.ZooError, match="no such policy"):
        sgrl.load_policy(f"zoo:{name}")
    result = CliRunner().invoke(app, ["evaluate", f"zoo:{name}"])
    assert result.exit_code == 2
    assert result.output == f"sgrl: zoo:{name}: no such policy; {hint}\n"


def test_outside_of_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoo, "PUBLISHED", tmp_path)
    with pytest.raises(
        zoo.ZooError,
        match="the zoo is not in what pip installs: it lies in results/published of a checkout",
    ):
        sgrl.load_policy("zoo:labyrinth_escape/gru")
