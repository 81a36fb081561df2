"""Every script of examples/ runs, cut short; a new one is tested by being there."""

import ast
import json
import re
import runpy
from pathlib import Path

import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from sgrl.cli import app
from sgrl.nn.mixing import split_parameters

EXAMPLES = Path(__file__).parent.parent / "examples"
FILES = sorted(path.name for path in EXAMPLES.glob("*.py"))
SHORT = {
    "plain_torch.py": [["--iterations", "4"]],
    "rllib_ppo.py": [
        ["--iterations", "1", "--batch", "64"],
        ["--iterations", "1", "--batch", "64", "--policy", "sparsenet"],
    ],
    "rllib_old_stack.py": [["--iterations", "1", "--batch", "64", "--steps", "12"]],
    "sb3_ppo.py": [["--iterations", "2", "--batch", "64"]],
    "tune_gru_lstm_sparsenet.py": [["--iterations", "2", "--steps", "12"]],
}

#: Those that leave results, and where.
RESULTS = {
    "rllib_old_stack.py": "old_stack_example",
    "tune_gru_lstm_sparsenet.py": "tune_example",
}


@pytest.mark.parametrize("name", FILES)
def test_it_says_what_it_shows(name: str) -> None:
    described = ast.get_docstring(ast.parse((EXAMPLES / name).read_text()))
    assert described is not None
    for words in (f"python examples/{name}", "Takes about"):
        assert words in described


@pytest.mark.parametrize("name", [name for name in FILES if name != "quickstart.py"])
def test_it_trains(
    name: str,
    ray_session: None,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """`main` returns the trained network: predictors, which start at zero, have learned from what
    they intercepted, and mixing weights, which start at one, have moved."""
    monkeypatch.chdir(tmp_path)  # some leave results
    # So that Ray's workers could import it, as from a script that is run.
    monkeypatch.syspath_prepend(EXAMPLES)
    main = runpy.run_path(str(EXAMPLES / name))["main"]
    for arguments in SHORT[name]:
        network = main(arguments)
        _, predictor = split_parameters(network)
        assert predictor
        assert all(torch.isfinite(parameter).all() for parameter in predictor)
        assert all(parameter.any() for parameter in predictor)
        weights = [b for n, b in network.named_buffers() if n.endswith("mixing_weight")]
        assert weights
        assert all((weight < 1).any() and (weight >= 0).all() for weight in weights)
        assert "lambda" in capsys.readouterr().out.splitlines()[-1]
    if name in RESULTS:
        folder = tmp_path / "results" / RESULTS[name]
        reported = CliRunner().invoke(app, ["report", str(folder)])
        assert reported.exit_code == 0, reported.output
        page = (folder / "report.html").read_text()
        assert all(policy in page for policy in ("gru", "lstm", "sparsenet"))
        assert "3 completed" in page
        saved = [
            file.parent
            for file in sorted(folder.glob("*/checkpoint_*/policy.json"))
            if json.loads(file.read_text())["policy"] == "sparsenet"
        ]
        for command, *options in (
            ("evaluate", "--episodes", "2"),
            ("render", "--out", "episode.png"),
            ("probe", "--samples", "48", "--neurons", "1", "--out", "probe"),
        ):
            read = CliRunner().invoke(app, [command, str(saved[-1]), *options])
            assert read.exit_code == 0, read.output


def test_quickstart(
    ray_session: None,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Three sentences that say what the results say, a page, and commands that are valid."""
    monkeypatch.chdir(tmp_path)
    main = runpy.run_path(str(EXAMPLES / "quickstart.py"))["main"]
    short = ["stop.training_iteration=2", "config.env_runners.num_envs_per_env_runner=4"]
    arguments = ["--seeds", "2", *(word for key in short for word in ("--set", key))]
    law, bandit, maze = main(arguments)
    row = pd.read_csv("results/quickstart_law/expert_network.csv").iloc[-1]
    assert f"is {row['ratio']:.0f} times smaller" in law
    assert "theory 2^8 = 256" in law
    for sentence, folder, methods in (
        (bandit, "mnist_quickstart", ("sparse_sgprop", "sparse_backprop")),
        (maze, "quickstart", ("sparsenet_sgprop", "sparsenet_backprop")),
    ):
        summary = pd.read_csv(f"results/{folder}/summary.csv")
        (final,) = (name for name in summary if name.startswith("final_"))
        ours, other = (summary.loc[summary["method"] == m, final].tolist() for m in methods)
        assert len(ours) == len(other) == 2
        assert ", ".join(f"{score:.2f}" for score in sorted(ours)) in sentence
        ahead = sum(a > b for a in ours for b in other)
        assert f"ahead in {ahead} of 4 pairs" in sentence
        assert "cannot give a p-value below 0.33" in sentence
    assert bandit.endswith(
        "With one reward in five flipped, backprop was ahead in the few seeds run."
    )
    printed = capsys.readouterr().out
    page = Path("results/quickstart.html").read_text()
    for name in ("gru", "sparse_backprop", "expert network"):
        assert name in page
    for line in re.findall(r"^Figures: (.*)$", printed, flags=re.MULTILINE):
        assert all(Path(figure).is_file() for figure in line.split())
    (render,) = re.findall(r"^  sgrl (render .*)$", printed, flags=re.MULTILINE)
    checkpoints = Path(render.split()[1]).parent
    (checkpoints / "000002").rename(checkpoints / "000100")
    # Again it shows what is there.
    assert main(arguments) == [law, bandit, maze]
    printed = capsys.readouterr().out
    assert "$ sgrl resume results/quickstart" in printed
