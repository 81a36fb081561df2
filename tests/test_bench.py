"""`sgrl bench`: a row for every backend, policy and experiment, as text and as JSON."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sgrl import bench
from sgrl.cli import app
from sgrl.nn.kernels.backends import BACKENDS


def test_every_backend_policy_and_experiment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "IMAGES", 64)
    monkeypatch.setattr(bench, "LABYRINTHS", {"labyrinth_explore": 40})
    monkeypatch.setattr(bench, "load_plain", lambda *arguments: None)
    file = tmp_path / "bench.json"
    arguments = ["bench", "--num-envs", "1", "--rounds", "1", "--json", str(file)]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    rows = json.loads(file.read_text())["rows"]
    measured = [(row["experiment"], row["policy"], row["implementation"]) for row in rows]
    sparse = ("sgprop adaptive", "sgprop fixed", "backprop")
    expected = [
        *(("labyrinth_explore", policy, b) for policy in sparse for b in BACKENDS),
        *(("labyrinth_explore", policy, "torch") for policy in ("gru", "lstm")),
        *(("mnist_bandit", policy, b) for policy in sparse for b in BACKENDS),
        ("mnist_bandit", "dense", "torch"),
    ]
    assert sorted(measured) == sorted(expected)
    for row in rows:
        for quartiles in row["milliseconds"].values():
            assert 0 < quartiles["p25"] <= quartiles["median"] <= quartiles["p75"]
        assert row["policy"] in result.output
