"""Archives: everything that reads a sweep's folder reads them, and they can be trained again."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from sweeps import METHODS, make_experiment
from test_runs import write_results
from typer.testing import CliRunner

from sgrl.cli import app
from sgrl.nn.registry import load_policy
from sgrl.results.archive import ArchiveError, read_archive, write_archive
from sgrl.results.locations import reading
from sgrl.results.metrics import append_row
from sgrl.results.provenance import describe, what_rounds_otherwise
from sgrl.results.runs import load_results
from sgrl.results.storage import is_archive
from sgrl.tuning.sweep import run_sweep
from sgrl.tuning.verify import compare_rows
from sgrl.yaml_files import dump_yaml


@pytest.fixture
def archive(tmp_path: Path) -> tuple[Path, Path]:
    """A made-up sweep, and its archive."""
    sweep, out = write_results(tmp_path / "sweep"), tmp_path / "published" / "sweep"
    for config in sweep.glob("*/config.yaml"):
        config.write_text(config.read_text().replace("lr: 0.001", "lr: 1.0e-05"))
    write_archive(sweep, out)
    return sweep, out


def test_reads_as_the_folder_did(archive: tuple[Path, Path]) -> None:
    sweep, out = archive
    before = load_results(sweep)
    with reading(out) as folder:
        after = load_results(folder)
    pd.testing.assert_frame_equal(before.trials, after.trials, check_exact=True)
    assert len(before.curves) == len(after.curves) > 0
    for column in ("iteration", "env_steps"):
        assert (before.curves[column] == after.curves[column]).all()
    assert (before.curves["success_rate"] == after.curves["success_rate"]).all()
    assert after.trials["lr"].min() == 1e-5
    assert before.problems == after.problems


def test_small_and_whole(archive: tuple[Path, Path]) -> None:
    sweep, out = archive
    assert sorted(path.name for path in out.iterdir()) == [
        "experiment.yaml",
        "metrics.parquet",
        "trials.json",
    ]
    table = pq.read_table(out / "metrics.parquet")
    assert table.schema.field("success_rate").type == pa.float64()
    assert table.schema.field("entropy").type == pa.float32()
    # Writing it again gives the same bytes, in place.
    held = (out / "trials.json").read_bytes()
    write_archive(sweep, out)
    assert (out / "trials.json").read_bytes() == held


def test_folders_that_are_no_trials_are_left_out(tmp_path: Path) -> None:
    experiment = make_experiment(tmp_path / "small.yaml", stop={"training_iteration": 1})
    sweep = tmp_path / "small"
    sweep.mkdir()
    (sweep / "experiment.yaml").write_text(dump_yaml(experiment.resolved))
    for trial in experiment.trials:
        (sweep / trial.name).mkdir()
        config = trial.as_dict()
        (sweep / trial.name / "config.yaml").write_text(dump_yaml(config))
        (sweep / trial.name / "status.json").write_text('{"state": "completed"}')
        row = {"iteration": 1, "env_steps": 9, "success_rate": 0.5, "iteration_seconds": 1.0}
        append_row(sweep / trial.name / "metrics.csv", row)
    first, second, *_ = (trial.name for trial in experiment.trials)
    shutil.copytree(sweep / first, sweep / f"{first} (copy)")
    result = CliRunner().invoke(app, ["archive", str(sweep), "--out", str(tmp_path / "out")])
    assert result.exit_code == 0
    assert f"{first} (copy): not one of the trials" in result.output
    assert [t.name for t in read_archive(tmp_path / "out")] == sorted(
        trial.name for trial in experiment.trials
    )
    result = CliRunner().invoke(app, ["resume", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert "is an archive, which cannot be resumed" in result.output
    line = ["sweep", str(tmp_path / "small.yaml"), "--results", str(tmp_path), "--name", "out"]
    result = CliRunner().invoke(app, line)
    assert result.exit_code == 2
    assert "already exists: --name NAME starts another sweep" in result.output
    (sweep / second / "config.yaml").unlink()
    with pytest.raises(ArchiveError, match=r"is not whole: .*config.yaml is missing"):
        write_archive(sweep, tmp_path / "other")


def test_what_cannot_be_packed_or_read(archive: tuple[Path, Path], tmp_path: Path) -> None:
    sweep, out = archive
    status = next(sweep.glob("*/status.json"))
    status.write_text('{"state": "running"}')
    spaced = sweep.rename(tmp_path / "my sweep")
    with pytest.raises(ArchiveError, match=r"is not over: go on with .*sgrl resume '/.*/my sweep'"):
        write_archive(spaced, tmp_path / "other")
    spaced.rename(sweep)
    status.write_text('{"state": "completed"}')
    with pytest.raises(ArchiveError, match="holds no sweep"):
        write_archive(tmp_path, tmp_path / "other")
    with pytest.raises(ArchiveError, match=r"is no archive: make one with .*sgrl archive"):
        read_archive(sweep)
    with pytest.raises(ArchiveError, match="has no trial 'none'"):
        write_archive(sweep, tmp_path / "other", ["none"])
    with pytest.raises(ArchiveError, match="holds no whole checkpoint"):
        write_archive(sweep, tmp_path / "other", [status.parent.name])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    with pytest.raises(ArchiveError, match="holds something else"):
        write_archive(sweep, tmp_path / "full")
    line = ["archive", str(sweep), "--out", str(tmp_path / "full" / "thesis.tex" / "out")]
    result = CliRunner().invoke(app, line)
    assert result.exit_code == 2
    assert "Not a directory" in result.output
    content = json.loads((out / "trials.json").read_text())
    (out / "trials.json").write_text(json.dumps(content | {"format": 99}))
    with pytest.raises(ArchiveError, match=r"sweep has the unknown format 99$"):
        read_archive(out)
    content["trials"].pop()
    (out / "trials.json").write_text(json.dumps(content))
    with pytest.raises(ArchiveError, match="lacks the trial"):
        read_archive(out)
    (out / "metrics.parquet").write_bytes(b"torn")
    result = CliRunner().invoke(app, ["status", str(out)])
    assert result.exit_code == 2
    assert "is damaged" in result.output


def test_rows_are_compared_in_single_precision() -> None:
    rows = [
        {"iteration": i, "loss": float(np.float32(0.1 * i)), "iteration_seconds": 1.0}
        for i in range(1, 9)
    ]
    again = [{**row, "loss": row["loss"] * (1 + 1e-9), "iteration_seconds": 2.0} for row in rows]
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


def test_rows_with_columns_that_begin_empty() -> None:
    """Of an algorithm whose first iteration ended no episode."""
    rows = [{"iteration": i, "episodes": float("nan") if i == 1 else i} for i in range(1, 4)]
    assert compare_rows("a", rows, rows, exact=True).passed
    changed = [*rows[:2], {"iteration": 3, "episodes": 4}]
    assert not compare_rows("a", rows, changed, exact=False).passed


def test_an_archive_is_trained_again(tmp_path: Path, ray_session: None) -> None:
    gru = {"policy": "gru", "hidden_size": 8, "normalize_observations": True}
    methods = {"sparsenet_sgprop": METHODS["sparsenet_sgprop"], "gru": {"model": gru}}
    stop = {"training_iteration": 3}
    experiment = make_experiment(tmp_path / "small.yaml", methods, stop=stop)
    sweep = run_sweep(experiment, tmp_path / "results")
    out, policy = tmp_path / "published", "gru_seed=0"
    line = ["archive", str(sweep), "--out", str(out), "--policy", policy, "--half"]
    result = CliRunner().invoke(app, line)
    assert result.exit_code == 0, result.output
    assert is_archive(out)

    kept = out / policy / "checkpoints" / "000003"
    original = load_policy(sweep / policy / "checkpoints" / "000003")
    for name, value in load_policy(kept).state_dict().items():
        before = original.state_dict()[name]
        # Statistics of observations are kept as they are: they may be too large.
        halved = before if name.startswith("normalizer.") else before.half().to(value.dtype)
        assert torch.equal(value, halved), name
    result = CliRunner().invoke(app, ["evaluate", str(kept), "--episodes", "5"])
    assert result.exit_code == 0, result.output

    line = ["verify", str(out), "--trials", "2", "--iterations", "2"]
    result = CliRunner().invoke(app, line)
    assert result.exit_code == 0, result.output
    assert result.output.count("2 iterations equal") == 2
    line = ["verify", str(out), "--trial", "gru_seed=2"]
    result = CliRunner().invoke(app, line)
    assert result.exit_code == 2
    assert "no trial gru_seed=2; did you mean 'gru_seed=" in result.output
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
    assert f"first:{out},second:{sweep};" in "".join(result.output.split())
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


def test_rows_repeat_on_the_processor_and_on_the_gpu_that_they_came_from() -> None:
    here = describe()
    other = here | {"machine": here["machine"] | {"gpus": ["another"]}}
    assert what_rounds_otherwise(here, here, compiled=True, on_gpus=True) == []
    assert what_rounds_otherwise(other, here, compiled=True, on_gpus=False) == []
    assert what_rounds_otherwise(other, here, compiled=True, on_gpus=True) == ["other GPUs"]


def test_rows_repeat_with_the_build_of_the_core_that_they_came_from() -> None:
    here = describe()
    wheel = here | {"core": "x86-64-v3, prebuilt by g++ 12.2.0"}
    changed = "another build of the compiled core (x86-64-v3, prebuilt by g++ 12.2.0)"
    assert what_rounds_otherwise(here, wheel, compiled=True, on_gpus=False) == [changed]
    assert what_rounds_otherwise(here, wheel, compiled=False, on_gpus=False) == []
    older = {key: value for key, value in here.items() if key != "core"}
    assert what_rounds_otherwise(older, here, compiled=True, on_gpus=False) == []
    assert what_rounds_otherwise(older, wheel, compiled=True, on_gpus=False) == [changed]
    moved = here["machine"] | {"processor_kind": "another"}
    elsewhere = here | {"machine": moved, "versions": here["versions"] | {"torch": "2.6.0"}}
    assert what_rounds_otherwise(here, elsewhere, compiled=True, on_gpus=False) == [
        "another kind of processor",
        f"torch 2.6.0 instead of {here['versions']['torch']}",
    ]
