"""`sgrl bench`: a row for every backend, policy and experiment, as text and as JSON.

And the script for a machine with a GPU, tried on a CPU.
"""

import json
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from sgrl import bench
from sgrl.cli import app
from sgrl.nn.kernels.backends import BACKENDS, DENSE_BACKENDS

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
import gpu


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
        *(("labyrinth_explore", policy, b) for policy in ("gru", "lstm") for b in DENSE_BACKENDS),
        *(("mnist_bandit", policy, b) for policy in sparse for b in BACKENDS),
        ("mnist_bandit", "dense", "torch"),
    ]
    assert sorted(measured) == sorted(expected)
    for row in rows:
        for quartiles in row["milliseconds"].values():
            assert 0 < quartiles["p25"] <= quartiles["median"] <= quartiles["p75"]
        assert row["policy"] in result.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("cuda", f"no GPU for the device 'cuda': torch {torch.__version__}"),
        ("gpu", "unknown device 'gpu': it must be cpu, cuda or cuda:N"),
        ("mps", "device 'mps' is not supported: it must be cpu, cuda or cuda:N"),
    ],
)
def test_a_device_that_is_not_there(device: str, message: str) -> None:
    result = CliRunner().invoke(app, ["bench", "--device", device], catch_exceptions=False)
    assert result.exit_code == 2
    assert message in result.output


def test_the_gpu_script_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "TESTS", ["shapes"])
    monkeypatch.setitem(gpu.STAGES, "broken", lambda given: 1 // 0)
    stages = list(gpu.STAGES)
    file = gpu.main(["--device", "cpu", "--tiny", "--out", str(tmp_path), "--stages", *stages])
    assert file.name == "gpu_cpu.json"
    found = json.loads(file.read_text())
    assert list(found) == stages
    assert "ZeroDivisionError" in found["broken"]["error"]
    assert not [name for name in stages[:-1] if "error" in found[name]]
    assert found["cuda_tests"]["exit"] == 5  # no test of that name
    for policy in bench.POLICIES:
        row = found["determinism"][policy]
        assert row["two_runs_bitwise"]
        assert row["resumed_bitwise"]
        assert row["continued_on_cpu_relative_difference"] == [0, 0]
    late = gpu.main(["--device", "cpu", "--minutes", "0", "--out", str(tmp_path)])
    assert all("left_out" in row for row in json.loads(late.read_text()).values())
