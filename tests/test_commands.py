"""Commands that are printed run as they are printed, whatever is in the paths."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from test_status import EXPERIMENT, write_sweep
from typer.testing import CliRunner

from sgrl.analysis.report import read_section
from sgrl.cli import app
from sgrl.commands import command
from sgrl.results.folder import SweepFolder
from sgrl.results.plan import ExperimentError
from sgrl.tuning import tracking
from sgrl.tuning.experiment.load import extend_experiment
from sgrl.tuning.sweep import SweepError, run_sweep
from sgrl.tuning.tracking import how_to_look, mlflow_uri, prepare_tracker

ODD = 'it\'s a 50%25 "odd" place? #1 & $HOME/*; x=ü'


@pytest.fixture
def odd(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = tmp_path / ODD
    folder.mkdir(parents=True)
    return folder


def words_of(line):
    """As a shell splits it."""
    code = "import sys; print('\\0'.join(sys.argv[1:]), end='')"
    shell = f"{shlex.join([sys.executable, '-c', code])} {line}"
    found = subprocess.run(["sh", "-c", shell], capture_output=True, text=True, check=True)
    return found.stdout.split("\0")


def test_words_are_quoted(odd):
    assert words_of(command("sgrl", "resume", odd)) == ["sgrl", "resume", str(odd)]
    assert command("sgrl", "resume", "results/a") == "sgrl resume results/a"


def test_programs_are_named_as_this_one_was(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Path(".venv/bin")
    folder.mkdir(parents=True)
    for name in ("sgrl", "mlflow"):
        (folder / name).write_text("#!/bin/sh")
        (folder / name).chmod(0o755)
    monkeypatch.setattr(sys, "argv", [".venv/bin/sgrl"])
    assert command("sgrl", "resume", "x") == ".venv/bin/sgrl resume x"
    assert command("mlflow", "ui") == ".venv/bin/mlflow ui"
    assert command("git", "log") == "git log"
    monkeypatch.setenv("PATH", str(folder.resolve()), prepend=os.pathsep)
    assert command("sgrl", "resume", "x") == "sgrl resume x"
    assert command("mlflow", "ui") == "mlflow ui"


def test_how_to_go_on(odd, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    path = odd / "experiment.yaml"
    path.write_text(EXPERIMENT)
    monkeypatch.setattr("sgrl.tuning.sweep.run_sweep", interrupted)
    result = CliRunner().invoke(app, ["sweep", str(path), "--results", str(odd)])
    assert result.exit_code == 130
    expected = ["sgrl", "resume", str(odd / "small")]
    assert words_of(result.stderr.partition("go on with: ")[2].strip()) == expected


def test_what_to_do_instead(odd):
    directory = write_sweep(odd / "small")
    experiment = extend_experiment(directory / "experiment.yaml")
    with pytest.raises(SweepError) as taken:
        run_sweep(experiment, odd)
    assert words_of(str(taken.value).split("`")[1]) == ["sgrl", "resume", str(directory)]
    with pytest.raises(ExperimentError) as fixed:
        extend_experiment(directory / "experiment.yaml", additions=["config.training.lr=1"])
    words = words_of(str(fixed.value).partition("another sweep: ")[2])
    assert words[:3] == ["sgrl", "sweep", str(directory / "experiment.yaml")]
    assert words[3:] == ["--name", "NAME", "--set", "config.training.lr=VALUE"]

    (_, *words) = words_of(read_section(directory).commands[-1])
    again = CliRunner().invoke(app, [*words, "--dry-run", "--no-estimate"], catch_exceptions=False)
    assert again.output.startswith("small_again: 4 trials\n")


def test_how_to_run_again_what_lies_elsewhere(odd, tmp_path, monkeypatch):
    """The copy that was read is gone when the page is."""
    directory = write_sweep(tmp_path / "small")
    page = tmp_path / "page.html"
    said = CliRunner().invoke(app, ["report", f"file://{directory}", "--out", str(page)])
    assert said.exit_code == 0, said.output
    text = page.read_text()
    assert "the commands take the configuration as experiment.yaml" in text
    assert "sgrl sweep experiment.yaml --name small_again" in text


def test_how_to_look_at_tensorboard_and_wandb(odd, monkeypatch):
    assert words_of(how_to_look("tensorboard", str(odd))) == ["tensorboard", "--logdir", str(odd)]
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = odd / "trial" / "wandb" / "offline-run-1"
    run.mkdir(parents=True)
    assert words_of(how_to_look("wandb", str(odd))) == ["wandb", "sync", str(run)]


def test_how_to_look_at_mlflow(odd, monkeypatch):
    """The database is where the sweep has it, and only the whole of MLflow shows it."""
    mlflow = pytest.importorskip("mlflow")
    prepare_tracker("mlflow", SweepFolder(odd))
    assert {path.name for path in odd.iterdir()} == {"mlflow.db"}
    found = {True: ["mlflow-skinny", "mlflow"], False: ["mlflow-skinny"]}
    for whole, names in found.items():
        monkeypatch.setattr(
            tracking.importlib.metadata, "distributions", lambda names=names: map(Named, names)
        )
        line = how_to_look("mlflow", str(odd))
        install, _, show = line.rpartition(" && ")
        assert install == ("" if whole else "pip install mlflow")
        *words, uri = words_of(show)
        assert words == ["mlflow", "ui", "--backend-store-uri"]
        assert uri == mlflow_uri(SweepFolder(odd))
        assert mlflow.MlflowClient(uri).get_experiment_by_name(odd.name) is not None


class Named:
    def __init__(self, name):
        self.name = name
