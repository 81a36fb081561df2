"""Every notebook of docs/tutorials runs from its first cell to its last, cut down."""

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
from typer.testing import CliRunner

from sgrl.cli import app
from sgrl.nn import SyntheticGradient

FOLDER = Path(__file__).parents[1] / "docs" / "tutorials"
NOTEBOOKS = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
#: What cells are cut down by.
SHORTER = {
    "experiment": {
        "episode_length: 40": "episode_length: 6",
        "runner: 64": "runner: 2",
        "iteration: 40": "iteration: 2",
        "000040": "000002",
        "num_neurons: 16, num_input_neurons: 8": "num_neurons: 8, num_input_neurons: 2",
        "0..4": "0..1",
        "--episodes 200": "--episodes 4",
    },
    "own_network": {"UPDATES = range(3), 1000": "UPDATES = range(1), 10"},
    "tuner": {
        'episode_length": 40': 'episode_length": 6',
        'runner": 32': 'runner": 2',
        'iteration": 20': 'iteration": 2',
        '{"policy": tune': '{"hidden_size": 8, "policy": tune',
        '["gru", "sparsenet"]': '["gru", "lstm"]',
        "sparsenet*seed": "lstm*seed",
    },
    "probe": {"env, 500": "env, 2", "samples=2400, neurons=8": "samples=48, neurons=2"},
}


def all_completed(names: dict[str, Any]) -> None:
    assert set(names["results"].trials["state"]) == {"completed"}
    assert len(names["results"].trials) == 4
    assert (names["results"].directories[0] / "report.html").is_file()


def blocks_have_learned(names: dict[str, Any]) -> None:
    blocks = [block for block in names["network"] if isinstance(block, SyntheticGradient)]
    assert len(blocks) == 2
    for block in blocks:
        assert block.predictor_bias.any()
        assert (block.mixing_weight < 1).any()


def every_layer_is_measured(names: dict[str, Any]) -> None:
    assert list(names["layers"].index) == ["0", "1", "2"]
    assert names["layers"][["ecv_share_backprop", "explained", "mse_sgprop"]].notna().all(axis=None)


CHECKS: dict[str, Callable[[dict[str, Any]], None]] = {
    "experiment": all_completed,
    "tuner": all_completed,
    "own_network": blocks_have_learned,
    "probe": every_layer_is_measured,
}


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_it_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ray_session: None
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for cell in json.loads((FOLDER / f"{name}.ipynb").read_text())["cells"]:
        if cell["cell_type"] != "code":
            continue
        assert cell["outputs"] == []
        assert cell["execution_count"] is None
        code = "".join(cell["source"])
        for before, after in SHORTER[name].items():
            code = code.replace(before, after)
        if code.startswith("%%bash\n"):
            for command in code.splitlines()[1:]:
                result = CliRunner().invoke(app, shlex.split(command)[1:])
                assert result.exit_code == 0, result.output
        else:
            exec(compile(code, name, "exec"), names)
    plt.close("all")
    CHECKS[name](names)
    text = (FOLDER / f"{name}.ipynb").read_text()
    assert all(json.dumps(before)[1:-1] in text for before in SHORTER[name])
