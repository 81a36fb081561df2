"""Reading results: what is missing or foreign, and without writing, torch, Ray or environments."""

import ctypes
import json
import os
import platform
import re
import subprocess
import sys
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import pytest
import yaml
from rich.console import Console
from rich.table import Table
from typer.testing import CliRunner

from sgrl import __version__
from sgrl.analysis.comparison import compare_methods
from sgrl.analysis.outputs import write_comparison
from sgrl.analysis.report import write_report
from sgrl.analysis.tables import print_table
from sgrl.cli import app
from sgrl.compiled.library import core_build
from sgrl.results.folder import SweepFolder, TrialFolder
from sgrl.results.metrics import append_row, is_taken
from sgrl.results.plan import planned_trials
from sgrl.results.provenance import revision
from sgrl.results.runs import ResultsError, load_results
from sgrl.results.status import Progress, read_progress, sweep_view
from sgrl.tuning.experiment.load import load_experiment
from sgrl.tuning.progress import write_summary
from sgrl.tuning.recorded import write_config
from sgrl.yaml_files import dump_yaml

ROOT = Path(__file__).parent.parent
EXPERIMENT = """
name: small
config: {environment: {env: labyrinth_escape, env_config: {episode_length: 10}}}
methods:
  gru: {model: {policy: gru, hidden_size: 8}}
seeds: 0..3
stop: {training_iteration: 3}
"""


def write_trial(folder, trial):
    write_config(TrialFolder(folder), trial)
    (folder / "status.json").write_text('{"state": "completed"}')
    for iteration in (1, 2, 3):
        row = {"iteration": iteration, "env_steps": 20 * iteration, "iteration_seconds": 1.0}
        append_row(folder / "metrics.csv", row | {"success_rate": 0.1 * trial.seed})


def write_sweep(directory, text=EXPERIMENT, *overrides):
    """A finished sweep, made up."""
    directory.mkdir(parents=True)
    path = directory / "experiment.yaml"
    path.write_text(text)
    experiment = load_experiment(path, overrides)
    path.write_text(dump_yaml(experiment.resolved))
    for trial in experiment.trials:
        write_trial(directory / trial.name, trial)
    return directory


@pytest.fixture
def results(tmp_path):
    return write_sweep(tmp_path / "results")


def sgrl(*arguments):
    result = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
    return result


def test_folders_are_held_against_the_experiment(results, tmp_path):
    """One is gone, one lost its config.yaml, one was copied, one is of another sweep."""
    other = write_sweep(tmp_path / "other")
    for file in (results / "gru_seed=1").iterdir():
        file.unlink()
    (results / "gru_seed=1").rmdir()
    (results / "gru_seed=2" / "config.yaml").unlink()
    copy = results / "gru_seed=3 (copy)"
    copy.mkdir()
    for file in (results / "gru_seed=3").iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    (results / "gru_seed=9").mkdir()
    (results / "gru_seed=9" / "metrics.csv").write_text("")

    expected = [
        "gru_seed=1: its folder is missing",
        "gru_seed=2: its config.yaml is missing",
        "gru_seed=3 (copy): not one of the trials of experiment.yaml; not counted",
        "gru_seed=9: not one of the trials of experiment.yaml; not counted",
    ]
    loaded = load_results(results)
    assert list(loaded.trials["trial"]) == ["gru_seed=0", "gru_seed=3"]
    assert list(loaded.problems) == expected
    status = sgrl("status", results).output.splitlines()
    assert status[-4:] == expected
    assert status[-5].strip() == "2 completed, 2 pending"
    page = Path(write_report([results], None, "markdown")).read_text()
    assert [line[2:] for line in page.splitlines() if line[2:] in expected] == expected
    assert page.index(expected[0]) < page.index("## Comparison")
    assert "2: 2 completed" in page
    compared = sgrl("compare", results, other).output
    for line in expected:
        assert line in compared

    # A folder that holds what belongs into another one.
    config = results / "gru_seed=0" / "config.yaml"
    config.write_bytes((results / "gru_seed=3" / "config.yaml").read_bytes())
    loaded = load_results(results)
    assert list(loaded.trials["trial"]) == ["gru_seed=3"]
    assert "gru_seed=0: holds the config.yaml of gru_seed=3; left out" in loaded.problems


def test_a_part_of_a_results_folder_is_read_as_it_is(results):
    (results / "experiment.yaml").unlink()
    (results / "gru_seed=1").rename(results.parent / "elsewhere")
    assert list(load_results(results).trials["seed"]) == [0, 2, 3]
    assert load_results(results).problems == ()


TAKEN = ["seed", "state", "method", "iterations", "trial", "planned", "final", "auc", "env_steps"]
TAKEN += ["seconds", "reason", "notes", "experiment", "final_success_rate", "auc_sem", "trials"]


@pytest.mark.parametrize("key", TAKEN)
def test_swept_keys_named_like_columns_of_ours(tmp_path, key):
    """Of an environment's own settings, any name is possible; of a policy's, seed is."""
    parent = "config.environment.env_config"
    text = EXPERIMENT.replace("labyrinth_escape", "CartPole-v1").replace("0..3", "0..1")
    path = tmp_path / "experiment.yaml"
    raw = yaml.safe_load(text)
    raw["config"]["environment"]["env_config"] = {key: {"grid": [3, 4]}}
    path.write_text(yaml.safe_dump(raw))
    trials = planned_trials(path)
    assert [trial.swept for trial in trials[::2]] == [{f"env_config.{key}": v} for v in (3, 4)]
    assert trials[0].name == f"gru_env_config.{key}=3_seed=0"
    directory = tmp_path / "results"
    directory.mkdir()
    path.rename(directory / "experiment.yaml")
    for trial in trials:
        write_trial(directory / trial.name, trial)
    loaded = load_results(directory)
    assert loaded.swept == [f"env_config.{key}"]
    sweep = SweepFolder(directory)
    write_summary(sweep, [read_progress(sweep, trial) for trial in trials])
    summary = pd.read_csv(directory / "summary.csv")
    assert summary.columns.is_unique
    assert list(summary[f"env_config.{key}"]) == [3, 3, 4, 4]
    assert list(summary["seed"]) == [0, 1, 0, 1]
    comparison = write_comparison(directory)
    assert comparison.columns.is_unique
    assert list(comparison["trials"]) == [2, 2]
    assert parent.endswith("env_config")


def test_every_column_of_ours_is_taken(results):
    """A new one is to be added to those that swept values keep clear of."""
    loaded = load_results(results)
    trials = [
        read_progress(SweepFolder(results), trial)
        for trial in planned_trials(results / "experiment.yaml")
    ]
    write_summary(SweepFolder(results), trials)
    columns = {
        *loaded.trials,
        *compare_methods(loaded.trials),
        *pd.read_csv(results / "summary.csv"),
    }
    assert {name for name in columns if not is_taken(name)} == set()


def test_results_with_a_swept_seed_from_before_names_were_kept_clear(tmp_path):
    """Such a sweep trained to its end, and could not be read."""
    text = EXPERIMENT.replace("hidden_size: 8", "seed: {grid: [3, 4]}").replace("0..3", "0..1")
    directory = write_sweep(tmp_path / "old", text)
    for model_seed in (3, 4):
        for seed in (0, 1):
            folder = directory / f"gru_model.seed={model_seed}_seed={seed}"
            config = yaml.safe_load((folder / "config.yaml").read_text())
            config |= {"name": f"gru_seed={model_seed}_seed={seed}", "swept": {"seed": model_seed}}
            (folder / "config.yaml").write_text(yaml.safe_dump(config))
            folder.rename(directory / config["name"])
    loaded = load_results(directory)
    assert loaded.problems == ()
    assert list(loaded.trials["swept.seed"]) == [3, 3, 4, 4]
    assert list(loaded.trials["seed"]) == [0, 1, 0, 1]
    assert "4 completed" in sgrl("status", directory).output
    assert list(write_comparison(directory)["trials"]) == [2, 2]


def test_json(results):
    """The keys that docs/results.md names, and null for what is no number."""
    (results / "gru_seed=2" / "status.json").write_text(
        json.dumps({"state": "failed", "reason": "Boom: it broke"})
    )
    (results / "gru_seed=2" / "error.txt").write_text("Traceback ...")
    (results / "gru_seed=3" / "metrics.csv").unlink()
    (results / "gru_seed=3" / "status.json").write_text(json.dumps({"state": "running"}))
    found = json.loads(sgrl("status", results, "--json").output)
    text = (ROOT / "docs" / "results.md").read_text()
    for key in [*found, *found["trials"][0]]:
        assert f"`{key}`" in text, key
    assert found["location"] == str(results)
    assert (found["name"], found["is_running"], found["problems"]) == ("results", False, [])
    assert found["counts"] == {
        "running": 0,
        "failed": 1,
        "interrupted": 1,
        "completed": 2,
        "stopped": 0,
        "pending": 0,
        "skipped": 0,
    }
    first, _, failed, interrupted = found["trials"]
    assert first == {
        "trial": "gru_seed=0",
        "method": "gru",
        "swept": {},
        "seed": 0,
        "state": "completed",
        "iteration": 3,
        "last_iteration": 3,
        "measure": "success_rate",
        "final": 0.0,
        "auc": 0.0,
        "seconds_per_iteration": 1.0,
        "seconds_left": 0.0,
        "reason": "",
        "details": "",
    }
    details = f"{results}/gru_seed=2/error.txt"
    assert (failed["reason"], failed["details"]) == ("Boom: it broke", details)
    assert (interrupted["final"], interrupted["seconds_left"]) == (None, None)
    said = sgrl("status", results).output.splitlines()
    assert f"gru_seed=2 failed at iteration 3: Boom: it broke; see {details}" in said


def test_json_of_a_comparison(tmp_path):
    text = EXPERIMENT.replace("seeds:", "  mlp: {model: {policy: mlp, hidden_size: 8}}\nseeds:")
    results = write_sweep(tmp_path / "two", text)
    found = json.loads(sgrl("compare", results, "--json").output)
    assert (found["experiments"], found["x"]) == ([str(results)], "env_steps")
    (row,) = found["rows"]
    assert (row["first"], row["second"], row["difference"]) == ("gru", "mlp", 0.0)
    assert row["first_trials"] == 4
    assert row["probability_ci_low"] is None  # of fewer than five seeds
    between = json.loads(sgrl("compare", results, results, "--json").output)
    assert [row["method"] for row in between["rows"]] == ["gru", "mlp"]


def test_watch(results, monkeypatch):
    """A line while the sweep runs, and the table once it has ended; Ctrl-C ends it."""
    (results / "gru_seed=3" / "status.json").write_text(json.dumps({"state": "running"}))
    rows = (results / "gru_seed=3" / "metrics.csv").read_text().splitlines()
    (results / "gru_seed=3" / "metrics.csv").write_text("\n".join(rows[:-1]) + "\n")
    held = SweepFolder(results).lock(seconds=1)
    held.acquire()
    monkeypatch.setattr("sgrl.cli.sweeps.time.sleep", lambda seconds: held.release())
    said = sgrl("status", results, "--watch").output
    assert said.startswith("92%, 1 running, 3 completed, about 1 s left\n")
    assert "1 interrupted, 3 completed" in said

    def interrupt(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr("sgrl.cli.sweeps.time.sleep", interrupt)
    with SweepFolder(results).lock(seconds=1):
        ended = sgrl("status", results, "--watch")
    assert (ended.exit_code, ended.stderr) == (130, "sgrl: interrupted\n")
    assert "Traceback" not in ended.output


def test_a_view_of_many_trials(tmp_path, capsys):
    """Each method's share, counts and a bar, the sweep's time, and as many trials as fit."""
    methods = "".join(f"  gru_{i}: {{model: {{policy: gru}}}}\n" for i in range(5))
    text = EXPERIMENT.replace("  gru: {model: {policy: gru, hidden_size: 8}}\n", methods)
    path = tmp_path / "experiment.yaml"
    path.write_text(text.replace("0..3", "0..29"))
    rows = [Progress(trial) for trial in planned_trials(path)]
    for row in rows[:30]:
        row.state, row.iteration, row.seconds_per_iteration = "completed", 3, 2.0
    rows[30].state, rows[30].iteration, rows[30].seconds_per_iteration = "running", 1, 2.0
    Console(width=80, height=24).print(sweep_view(rows, "many", 24, seconds=61))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].rstrip() == (
        "20%, 1 running, 30 completed, 119 pending, 61 s elapsed, about 12 min left"
    )
    shares = [tuple(re.sub("[━╸╺]", "", line).split()) for line in lines[1:6]]
    assert shares[:3] == [
        ("gru_0", "100%", "30/30"),
        ("gru_1", "1%", "0/30,", "1", "running"),
        ("gru_2", "0%", "0/30"),
    ]
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80


def test_no_table_is_cut_in_a_pipe(tmp_path):
    name = "a_method_whose_name_is_as_long_as_the_name_of_a_method_may_well_become_in_practice"
    results = write_sweep(tmp_path / "long", EXPERIMENT.replace("gru:", f"{name}:"))
    said = sgrl("status", results).output
    assert said.count(name) == 4
    assert "…" not in said


@pytest.mark.parametrize(("columns", "turn"), [(2, True), (9, True), (9, False)])
def test_wide_tables_fit(columns, turn, capsys):
    """Each cell is there once, under or beside its header, and all in 80 columns."""
    head = ["name", *(f"column_{i}" for i in range(columns))]
    table = Table(*head)
    rows = [[f"row_{r}", *(f"cell_{r}_{c}" for c in range(columns))] for r in range(6)]
    for row in rows:
        table.add_row(*row)
    print_table(table, Console(width=80), turn)
    said = capsys.readouterr().out
    lines = [line.split() for line in said.splitlines() if line.strip(" ─")]
    assert max(map(len, said.splitlines())) <= 80
    cells = [word for line in lines for word in line]
    assert all(cells.count(cell) == 1 for row in rows for cell in row[1:])
    if columns == 2:
        assert lines == [head, *rows]
    elif turn:
        assert lines[:2] == [
            ["name", *(row[0] for row in rows)],
            ["column_0", *(r[1] for r in rows)],
        ]
    else:
        assert lines[0][:2] == head[:2]
        assert lines[1][:2] == rows[0][:2]


def in_a_process(code, *arguments, **environment):
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
    )


@pytest.mark.parametrize("verb", ["status", "-h", "--version", "sweep --help"])
def test_answers_come_without_the_heavy_libraries(results, verb):
    code = """
import atexit, sys
heavy = {"torch", "ray", "pandas", "numpy", "scipy", "gymnasium", "popgym", "matplotlib", "fsspec"}
atexit.register(lambda: print("imported:", *sorted(heavy & set(sys.modules))))
from sgrl.cli import main
main()
"""
    arguments = verb.split() + ([results] if verb == "status" else [])
    result = in_a_process(code, *arguments)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.splitlines()[-1].strip() == "imported:"


def test_version():
    first, *more = sgrl("--version").output.splitlines()
    assert first == f"sgrl {__version__}"
    said = dict(line.split(": ", 1) for line in more)
    assert said["core"] == core_build()
    assert said["packages"].startswith(
        f"python {platform.python_version()}, torch {version('torch')}"
    )
    assert said.get("commit") == revision()


def test_reading_needs_no_environment(results, tmp_path):
    for path in [results / "experiment.yaml", *results.glob("*/config.yaml")]:
        path.write_text(
            path.read_text().replace("labyrinth_escape", "a_module_that_is_gone:Env-v0")
        )
    assert "4 completed" in sgrl("status", results).output
    assert "4 completed" in Path(write_report([results], None, "markdown")).read_text()
    assert sgrl("compare", results, results).exit_code == 0
    refused = sgrl("resume", results)
    assert refused.exit_code == 2
    assert "no module named 'a_module_that_is_gone'" in refused.stderr


def test_status_writes_nothing(results):
    """Whoever runs it: an audit hook sees what permissions would not keep root from."""
    code = """
import os, sys
def watch(event, arguments):
    if event in ("os.mkdir", "os.rename", "os.remove", "os.chmod", "os.utime"):
        print("wrote:", event, arguments)
    if event == "open" and isinstance(arguments[0], str) and "pycache" not in arguments[0]:
        path, mode, flags = arguments
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            print("wrote:", path)
sys.addaudithook(watch)
from sgrl.cli import main
main()
"""
    (results / "gru_seed=0" / "status.json").write_text(json.dumps({"state": "running"}))
    before = {path: path.stat().st_mtime_ns for path in results.rglob("*")}
    result = in_a_process(code, "status", results)
    assert (result.returncode, result.stderr) == (0, "")
    assert "1 interrupted, 3 completed" in result.stdout
    assert [line for line in result.stdout.splitlines() if line.startswith("wrote:")] == []
    assert {path: path.stat().st_mtime_ns for path in results.rglob("*")} == before


def test_a_home_that_cannot_be_made(tmp_path):
    """One line, of whatever would write there."""
    code = "from sgrl.cli import main; main()"
    (tmp_path / "file").touch()
    home = {"HOME": str(tmp_path / "file" / "home"), "RAY_ADDRESS": ""}
    path = tmp_path / "experiment.yaml"
    path.write_text(EXPERIMENT)
    result = in_a_process(code, "sweep", path, "--results", tmp_path, **home)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"sgrl: Ray cannot start here ({home['HOME']}/.ray: Not a directory)")
    assert "4 pending" in sgrl("status", tmp_path / "small").output
    result = in_a_process(code, "resume", "memory://bucket/small", **home)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert f"sgrl: {home['HOME']}/.cache/" in line
    assert "SGRL_MIRROR_DIR" in line


@contextmanager
def permissions_that_count():
    """Without root's right to write where nobody may."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, this thread
    before = (ctypes.c_uint32 * 6)()
    assert libc.capget(header, before) == 0, os.strerror(ctypes.get_errno())
    less = (ctypes.c_uint32 * 6)(*before)
    less[0] &= ~(1 << 1)  # CAP_DAC_OVERRIDE, of the effective ones
    assert libc.capset(header, less) == 0, os.strerror(ctypes.get_errno())
    try:
        yield
    finally:
        assert libc.capset(header, before) == 0, os.strerror(ctypes.get_errno())


@pytest.fixture
def read_only(results):
    folders = [results, *(path for path in results.rglob("*") if path.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    with permissions_that_count():
        with pytest.raises(PermissionError):
            (results / "new").touch()
        yield results
    for folder in folders:
        folder.chmod(0o755)


@pytest.mark.skipif(sys.platform != "linux", reason="capabilities are Linux's")
def test_a_folder_that_is_read_only(read_only, tmp_path):
    before = sorted(read_only.rglob("*"))
    assert "4 completed" in sgrl("status", read_only).output
    assert sgrl("compare", read_only, read_only).exit_code == 0
    for verb in ("report", "resume"):
        refused = sgrl(verb, read_only)
        assert (refused.exit_code, refused.stdout) == (2, "")
        (line,) = refused.stderr.splitlines()
        assert str(read_only) in line
        assert "Permission denied" in line
    assert "give --out" in sgrl("report", read_only).stderr

    other = write_sweep(tmp_path / "other")
    page = tmp_path / "pages" / "page.md"
    said = sgrl("report", read_only, other, "--out", page, "--format", "markdown")
    assert said.exit_code == 0, said.output
    beside = tmp_path / "pages" / "page_files" / "results"
    assert {path.name for path in beside.iterdir()} == {"comparison.csv", "pairs.csv", "figures"}
    assert not (tmp_path / "pages" / "page_files" / "other").exists()
    assert (other / "comparison.csv").is_file()
    figures = re.findall(r"!\[.*\]\((.*)\)", page.read_text())
    assert len(figures) >= 2
    assert all((page.parent / path).is_file() for path in figures)
    assert sorted(read_only.rglob("*")) == before


def test_nothing_to_read(tmp_path):
    (tmp_path / "experiment.yaml").write_text("name: x\nmethods: {}\nstop: {}\n")
    result = sgrl("status", tmp_path)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "methods: empty" in result.stderr
    with pytest.raises(ResultsError, match="holds no results"):
        load_results(tmp_path)


@pytest.mark.parametrize(
    ("override", "code", "stdout", "stderr"),
    [
        ("seeds=0..1", 0, "small: 2 trials\n  gru_seed=0\n  gru_seed=1\n", ""),
        (
            "seeds=[-1]",
            2,
            "",
            "sgrl: experiment.yaml with --set seeds: seeds: must be at least 0, got -1\n",
        ),
    ],
)
def test_a_dry_run_says_all_before_it_leaves(tmp_path, override, code, stdout, stderr):
    """It does not wait until its libraries are taken down."""
    path = tmp_path / "experiment.yaml"
    path.write_text(EXPERIMENT)
    options = ["--dry-run", "--no-estimate", "--set", override]
    result = in_a_process("from sgrl.cli import main; main()", "sweep", path, *options)
    stderr = stderr.replace("experiment.yaml", str(path))
    assert (result.returncode, result.stdout, result.stderr) == (code, stdout, stderr)


def test_a_pipe_is_no_terminal_where_colours_are_forced() -> None:
    """As in notebooks: nothing but text, and every line once."""
    command = [sys.executable, "-c", "from sgrl.cli import main; main()"]
    told = subprocess.run(
        [*command, "status", "escape_confirmation"],
        cwd=Path(__file__).parents[1] / "results" / "published",
        env={**os.environ, "FORCE_COLOR": "1"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "sparsenet_sgprop" in told
    assert "\x1b" not in told
