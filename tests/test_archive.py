"""Archives: everything that reads a sweep's folder reads them, and they can be trained again."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from sweeps import make_experiment
from test_runs import write_results
from typer.testing import CliRunner

from sgrl.analysis.runs import load_results
from sgrl.cli import app
from sgrl.nn.policies import load_policy
from sgrl.tuning.archive import ArchiveError, read_archive, write_archive
from sgrl.tuning.storage import is_archive, reading
from sgrl.tuning.sweep import run_sweep
from sgrl.tuning.verify import compare_rows


@pytest.fixture
def archive(tmp_path: Path) -> tuple[Path, Path]:
    """A made-up sweep, and its archive."""
    sweep, out = write_results(tmp_path / "sweep"), tmp_path / "published" / "sweep"
    write_archive(sweep, out)
    return sweep, out


def test_reads_as_the_folder_did(archive: tuple[Path, Path]) -> None:
    sweep, out = archive
    before = load_results(sweep)
    with reading(out) as folder:
        after = load_results(folder)
    pd.testing.assert_frame_equal(before.trials, after.trials, rtol=1e-6)
    assert len(before.curves) == len(after.curves) > 0
    for column in ("iteration", "env_steps"):
        assert (before.curves[column] == after.curves[column]).all()
    assert (before.curves["success_rate"].astype(np.float32) == after.curves["success_rate"]).all()
    assert before.problems == after.problems


def test_small_and_whole(archive: tuple[Path, Path]) -> None:
    sweep, out = archive
    assert sorted(path.name for path in out.iterdir()) == [
        "experiment.yaml",
        "metrics.parquet",
        "trials.json",
    ]
    table = pq.read_table(out / "metrics.parquet")
    assert table.schema.field("success_rate").type == pa.float32()
    # Writing it again gives the same bytes, in place.
    held = (out / "trials.json").read_bytes()
    write_archive(sweep, out)
    assert (out / "trials.json").read_bytes() == held


def test_what_cannot_be_packed_or_read(archive: tuple[Path, Path], tmp_path: Path) -> None:
    sweep, out = archive
    status = next(sweep.glob("*/status.json"))
    status.write_text('{"state": "running"}')
    with pytest.raises(ArchiveError, match="is not over: go on with sgrl resume"):
        write_archive(sweep, tmp_path / "other")
    status.write_text('{"state": "completed"}')
    with pytest.raises(ArchiveError, match="holds no sweep"):
        write_archive(tmp_path, tmp_path / "other")
    with pytest.raises(ArchiveError, match="has no trial 'none'"):
        write_archive(sweep, tmp_path / "other", ["none"])
    with pytest.raises(ArchiveError, match="holds no whole checkpoint"):
        write_archive(sweep, tmp_path / "other", [status.parent.name])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    with pytest.raises(ArchiveError, match="holds something else"):
        write_archive(sweep, tmp_path / "full")
    content = json.loads((out / "trials.json").read_text())
    content["trials"].pop()
    (out / "trials.json").write_text(json.dumps(content))
    with pytest.raises(ArchiveError, match="lacks the trial"):
        read_archive(out)
    (out / "metrics.parquet").write_bytes(b"torn")
    result = CliRunner().invoke(app, ["status", str(out)])
    assert result.exit_code == 2
    assert "is damaged" in result.output


def test_rows_are_compared_in_single_precision() -> None:
    rows = [{"iteration": i, "loss": 0.1 * i, "iteration_seconds": 1.0} for i in range(1, 9)]
    again = [
        {**row, "loss": float(np.float32(row["loss"])), "iteration_seconds": 2.0} for row in rows
    ]
    assert compare_rows("a", rows, again, exact=True).passed
    assert not compare_rows("a", rows, again[:-1], exact=True).passed
    for iteration, exact, factor, passed in (
        (5, True, 1 + 1e-6, False),
        (5, False, 1 + 1e-6, True),
        (5, False, 2.0, True),
        (2, False, 2.0, False),
    ):
        changed = [dict(row) for row in again]
        changed[iteration - 1]["loss"] *= factor
        verdict = compare_rows("a", rows, changed, exact)
        assert verdict.passed is passed
        assert ("rounding separates" in verdict.text) is (passed and factor == 2.0)


def test_an_archive_is_trained_again(tmp_path: Path, ray_session: None) -> None:
    experiment = make_experiment(tmp_path / "small.yaml", stop={"training_iteration": 3})
    sweep = run_sweep(experiment, tmp_path / "results")
    out, policy = tmp_path / "published", "gru_seed=0"
    line = ["archive", str(sweep), "--out", str(out), "--policy", policy, "--half"]
    result = CliRunner().invoke(app, line)
    assert result.exit_code == 0, result.output
    assert is_archive(out)

    kept = out / policy / "checkpoints" / "000003"
    original = load_policy(sweep / policy / "checkpoints" / "000003")
    for name, value in load_policy(kept).state_dict().items():
        assert torch.equal(value, original.state_dict()[name].half().to(value.dtype))
    result = CliRunner().invoke(app, ["evaluate", str(kept), "--episodes", "5"])
    assert result.exit_code == 0, result.output

    line = ["verify", str(out), "--trials", "2", "--iterations", "2"]
    result = CliRunner().invoke(app, line)
    assert result.exit_code == 0, result.output
    assert result.output.count("2 iterations equal") == 2
    assert sorted(path.name for path in out.iterdir()) == sorted(
        [
            "experiment.yaml",
            "provenance.json",
            "summary.csv",
            "metrics.parquet",
            "trials.json",
            policy,
        ]
    )

    for line in (["status", str(out)], ["report", str(out)], ["compare", str(out), str(sweep)]):
        result = CliRunner().invoke(app, line)
        assert result.exit_code == 0, result.output
    assert (out / "report.html").is_file()

    table = pq.read_table(out / "metrics.parquet")
    losses = table["policy_loss"].to_numpy().copy()
    losses[0] = np.nextafter(losses[0], np.float32(np.inf))
    place = table.column_names.index("policy_loss")
    pq.write_table(
        table.set_column(place, "policy_loss", pa.array(losses)), out / "metrics.parquet"
    )
    result = CliRunner().invoke(app, ["verify", str(out), "--trials", "4", "--iterations", "1"])
    assert result.exit_code == 1
    assert result.output.count("1 iterations equal") == 3
    assert "policy_loss at iteration 1 is" in result.output
