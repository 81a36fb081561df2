"""Every script of examples/ runs, cut short; a new one is tested by being there."""

import ast
import runpy
from pathlib import Path

import pytest
import torch

from sgrl.nn.mixing import split_parameters

EXAMPLES = Path(__file__).parent.parent / "examples"
FILES = sorted(path.name for path in EXAMPLES.glob("*.py"))
SHORT = {
    "plain_torch.py": [["--iterations", "4"]],
    "rllib_ppo.py": [
        ["--iterations", "1", "--batch", "64"],
        ["--iterations", "1", "--batch", "64", "--policy", "sparsenet"],
    ],
    "sb3_ppo.py": [["--iterations", "2", "--batch", "64"]],
}


@pytest.mark.parametrize("name", FILES)
def test_it_says_what_it_shows(name: str) -> None:
    described = ast.get_docstring(ast.parse((EXAMPLES / name).read_text()))
    assert described is not None
    for words in (f"python examples/{name}", "Takes about"):
        assert words in described


@pytest.mark.parametrize("name", FILES)
def test_it_trains(
    name: str, ray_session: None, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`main` returns the trained network: predictors, which start at zero, have learned from what
    they intercepted, and mixing weights, which start at one, have moved."""
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
