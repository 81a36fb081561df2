"""Some of a sweep's trials, by their methods and seeds."""

import json
import re
from pathlib import Path

import pytest
import yaml
from test_status import write_sweep
from typer.testing import CliRunner

from sgrl.cli import app
from sgrl.results.runs import load_results
from sgrl.results.selection import Selection, SelectionError

EXPERIMENT = """
name: small
config: {environment: {env: labyrinth_escape}}
methods:
  gru: {model: {policy: gru}}
  lstm: {model: {policy: lstm}}
  mlp: {model: {policy: mlp}}
seeds: 0..3
stop: {training_iteration: 3}
"""
CHOSEN = ["gru_seed=1", "gru_seed=2", "lstm_seed=1", "lstm_seed=2"]


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return write_sweep(tmp_path / "results", EXPERIMENT)


def run(*words: object) -> str:
    said = CliRunner().invoke(app, list(map(str, words)))
    assert said.exit_code == 0, said.output
    return said.output


def test_every_command_that_reads_results_takes_them(results: Path, tmp_path: Path) -> None:
    options = ["--methods", "gru,lstm", "--seeds", "1..2"]
    status = json.loads(run("status", results, "--json", *options))
    assert [trial["trial"] for trial in status["trials"]] == CHOSEN
    assert list(load_results(results, only=Selection.of("gru,lstm", "1,2")).trials["trial"]) == (
        CHOSEN
    )
    [pair] = json.loads(run("compare", results, "--json", *options))["rows"]
    assert {pair["first"], pair["second"]} == {"gru", "lstm"}

    before = sorted(results.rglob("*"))
    page = tmp_path / "page.html"
    run("report", results, "--out", page, *options)
    named = set(re.findall(r"\w+_seed=\d", page.read_text()))
    assert named == set(CHOSEN)
    # Figures and tables of some trials do not take the place of those of all.
    assert sorted(results.rglob("*")) == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--methods", "gruu"], "--methods: unknown method 'gruu'; did you mean 'gru'?"),
        (["--seeds", "7"], "no trial has such a method and seed"),
        (["--seeds", "one"], "--seeds one: expected a whole number, got 'one'"),
        (["--seeds", "3..1"], "--seeds 3..1: 3..1 is no range: the lower number comes first, and"),
    ],
)
@pytest.mark.parametrize("command", ["status", "compare"])
def test_mistakes(results: Path, command: str, options: list[str], words: str) -> None:
    said = CliRunner().invoke(app, [command, str(results), *options])
    assert said.exit_code == 2
    (line,) = said.stderr.splitlines()
    assert line.startswith(f"sgrl: {words}")


def test_a_report_on_some_needs_a_place(results: Path) -> None:
    said = CliRunner().invoke(app, ["report", str(results), "--seeds", "0"])
    assert said.stderr == "sgrl: say with --out where the report on some of the trials goes\n"


def test_all_are_meant_by_default() -> None:
    everything = Selection.of(None, None)
    assert everything.holds("anything", None)
    everything.check([])
    with pytest.raises(SelectionError):
        Selection.of("a", None).check([("b", 0)])


def test_resume_runs_what_is_selected(tmp_path: Path, ray_session: None) -> None:
    """The others stay as they are, and can be resumed later."""
    config = {"environment": {"env": "labyrinth_escape", "env_config": {"episode_length": 12}}}
    config["env_runners"] = {"num_envs_per_env_runner": 2}
    content = yaml.safe_load(EXPERIMENT) | {"config": config, "seeds": [0, 1]}
    content["methods"] = {"gru": {"model": {"policy": "gru"}}, "mlp": {"model": {"policy": "mlp"}}}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(content))
    directory = tmp_path / "small"
    directory.mkdir()
    (directory / "experiment.yaml").write_text(yaml.safe_dump(content))

    def states() -> dict[str, str]:
        status = json.loads(run("status", directory, "--json"))
        return {trial["trial"]: trial["state"] for trial in status["trials"]}

    options = ["--methods", "mlp", "--seeds", "1"]
    assert "4 trials, 1 to run" in run("resume", directory, "--dry-run", *options)
    run("resume", directory, *options)
    assert states().pop("mlp_seed=1") == "completed"
    assert list(states().values()).count("completed") == 1
    run("resume", directory)
    assert set(states().values()) == {"completed"}
    said = CliRunner().invoke(app, ["resume", str(directory), "--methods", "lstm"])
    assert (said.exit_code, said.stderr) == (
        2,
        "sgrl: --methods: unknown method 'lstm'; known: gru, mlp\n",
    )
