"""Plain Tuner scripts: their folders are read like sweeps', with the callback and without."""

import csv
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray import tune
from sweeps import metrics_without_times
from typer.testing import CliRunner
from worker_server import driver

from sgrl.cli import app
from sgrl.results.evaluation import evaluate
from sgrl.results.folder import SweepFolder
from sgrl.results.locations import reading
from sgrl.results.metrics import count_rows, read_metrics
from sgrl.results.runs import load_results
from sgrl.results.tune_folder import TuneTrial, describe_trials, name_trial
from sgrl.tuning.experiment.load import load_experiment
from sgrl.tuning.sweep import run_sweep

TEXT = (Path(__file__).parent.parent / "docs" / "tune.md").read_text()
FILE, FROM_YAML = re.findall(r"```yaml\n(.*?)```", TEXT, flags=re.DOTALL)
SCRIPT, NEW_STACK, OLD_STACK, _RACE = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
COMMANDS = re.findall(r"^\.venv/bin/sgrl (.*)$", TEXT, flags=re.MULTILINE)
KILLER = """
import os, signal
from ray import tune

class Killer(tune.Callback):
    def on_trial_result(self, *, result, **info):
        if result["training_iteration"] == 4 and "KILLED" in os.environ:
            os.kill(os.getpid(), signal.SIGKILL)
"""


def shortened(text: str) -> str:
    """A piece of docs/tune.md cut down to six iterations of one small policy."""
    for before, after in (
        ('["gru", "lstm", "sparsenet"]', '["gru"]'),
        ("[gru, lstm, sparsenet]", "[gru]"),
        ('{"policy": tune', '{"hidden_size": 8, "policy": tune'),
        ("{policy: gru}", "{policy: gru, hidden_size: 8}"),
        ("{policy: {grid", "{hidden_size: 8, policy: {grid"),
        ("[0, 1]", "[3]"),
        ('episode_length": 80', 'episode_length": 10'),
        ("episode_length: 80", "episode_length: 10"),
        ("runner=20", "runner=4"),
        ("runner: 20", "runner: 4"),
        ('runner": 20', 'runner": 4'),
        ("training_iteration: 100", "training_iteration: 6"),
        ('training_iteration": 100', 'training_iteration": 6'),
        ("frequency=25, num", "frequency=2, num"),
        ("every: 25", "every: 2"),
        ("range(100)", "range(2)"),
        ("1600,", "130, num_epochs=1,"),
    ):
        text = text.replace(before, after)
    return text


def run(words: str) -> str:
    result = CliRunner().invoke(app, words.split())
    assert result.exit_code == 0, result.output
    return result.output


def test_a_killed_script_goes_on_and_has_the_rows_of_the_experiment_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ray_session: None
) -> None:
    monkeypatch.chdir(tmp_path)
    script = shortened(SCRIPT).replace("[ResultsCallback()]", "[ResultsCallback(), Killer()]")
    # A session of its own: Ray must not find the one of these tests.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_ADDRESS")}
    metrics = tmp_path / "results/tuned/gru_seed=3/metrics.csv"
    for code, rows, more in ((-9, 4, {"KILLED": "1"}), (0, 6, {})):
        ended = subprocess.run(
            driver(KILLER + script),
            env=environment | more,
            capture_output=True,
            text=True,
        )
        assert ended.returncode == code, ended.stderr
        assert count_rows(metrics) == rows
        if code:
            assert "interrupted" in run("status results/tuned")

    status, report, compare = COMMANDS
    assert "6/6" in run(status)
    assert "report.html" in run(report)
    page = (tmp_path / "results/tuned/report.html").read_text()
    assert "gru_seed=3" in page
    results = load_results("results/tuned")
    [trial] = results.trials.to_dict("records")
    assert (trial["state"], trial["iterations"], trial["planned"]) == ("completed", 6, 6)
    assert results.problems == ()
    assert evaluate(tmp_path / "results/tuned/gru_seed=3/checkpoint_000002", 2)["episodes"] == 2

    (tmp_path / "file.yaml").write_text(shortened(FILE))
    experiment = load_experiment("file.yaml", ["methods.lstm=null", "methods.sparsenet=null"])
    sweep = run_sweep(experiment, "results")
    # Here of one method, so with the sweep's.
    assert "gru" in run(f"{compare} results/compared")
    same = metrics_without_times("results/tuned")
    assert same == metrics_without_times(sweep)
    assert list(same) == ["gru_seed=3"]
    [one] = load_results(sweep).trials.to_dict("records")
    for column in ("method", "seed", "parameters", "batch", "budget", "env_steps"):
        assert trial[column] == one[column]

    # The same from what Tune itself left, which holds what it did before it was killed, twice.
    for file in ("config.yaml", "status.json", "metrics.csv"):
        (metrics.parent / file).unlink()
    with reading("results/tuned") as folder:
        assert metrics_without_times(folder) == same
        [trial] = load_results(folder).trials.to_dict("records")
    assert (trial["method"], trial["state"], trial["iterations"]) == ("gru", "completed", 6)


def test_plain_configs_and_yaml(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ray_session: None
) -> None:
    monkeypatch.chdir(tmp_path)
    for code in (NEW_STACK, OLD_STACK):
        exec(compile(shortened(code), "docs/tune.md", "exec"), {})
    content = yaml.safe_load(shortened(FROM_YAML))
    content["from_yaml"]["storage_path"] = str(tmp_path)
    tune.run_experiments(content, verbose=0)
    with reading(tmp_path / "from_yaml") as folder:
        [row] = load_results(folder).trials.to_dict("records")
    assert (row["method"], row["seed"], row["iterations"]) == ("gru", 3, 6)


# Folders as Tune leaves them --------------------------------------------------------------------


def result(iteration: int, lr: float, **more: Any) -> dict[str, Any]:
    steps = {"env_steps": 10 * iteration, "padded_env_steps": 20 * iteration, "episodes": iteration}
    measured = {"success_rate": lr * iteration, "episode_return_mean": -0.5}
    return {
        "sgrl": {**steps, **measured, "policy_loss": None},
        "training_iteration": iteration,
        "time_this_iter_s": 0.25,
        "done": False,
        **more,
    }


def leave_trial(folder: Path, params: dict[str, Any], results: list[dict], torn: str = "") -> None:
    folder.mkdir(parents=True)
    (folder / "params.json").write_text(json.dumps(params))
    lines = [json.dumps(one) + "\n" for one in results]
    (folder / "result.json").write_text("".join(lines) + torn)


@pytest.fixture
def left(tmp_path: Path) -> Path:
    """One trial complete, restored on its way; one killed in a line; one failed; one a table; and
    one that a scheduler stopped."""
    experiment = tmp_path / "left"
    common = {"env": "labyrinth_escape", "env_config": {"episode_length": 20}, "seed": 1}

    def params(policy: str, lr: float, **settings: Any) -> dict[str, Any]:
        return {**common, "lr": lr, "_model_config": {"policy": policy, **settings}}

    again = [result(i, 0.1) for i in (1, 2, 3, 2, 3)] + [result(4, 0.1, done=True)]
    leave_trial(experiment / "a", params("gru", 0.1), again)
    torn = json.dumps(result(3, 0.2))[:50]
    leave_trial(experiment / "b", params("gru", 0.2), [result(i, 0.2) for i in (1, 2)], torn)
    leave_trial(experiment / "c", params("sparsenet", 0.1, propagation="sgprop"), [result(1, 0.1)])
    (experiment / "c" / "error.txt").write_text("Traceback\n  ...\nValueError: too steep\n")
    leave_trial(experiment / "d", params("sparsenet", 0.1, propagation="backprop"), [])
    (experiment / "d" / "result.json").unlink()
    with (experiment / "d" / "progress.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        names = ("env_steps", "padded_env_steps", "episodes", "success_rate")
        writer.writerow(
            [*(f"sgrl/{n}" for n in names), "training_iteration", "time_this_iter_s", "done"]
        )
        for i in (1, 2):
            writer.writerow([10 * i, 20 * i, i, 0.1 * i, i, 0.25, i == 2])
        file.write("30,60,3")
    leave_trial(experiment / "e", params("gru", 0.5), [result(1, 0.5), result(2, 0.5, done=True)])
    stop = {"trainable_name": "Reinforce", "stopping_criterion": {"training_iteration": 4}}
    states = [json.dumps({**stop, "relative_logdir": name}) for name in "ae"]
    snapshot = {"trial_data": [[state, "{}"] for state in states]}
    (experiment / "experiment_state-2026-01-01_00-00-00.json").write_text(json.dumps(snapshot))
    (experiment / "experiment_state-2026-01-02_00-00-00.json").write_text(json.dumps(snapshot)[:9])
    return experiment


def test_what_tune_left_is_read_as_far_as_it_goes(left: Path) -> None:
    before = sorted(left.rglob("*"))
    with reading(left) as folder:
        trials = {t["trial"]: t for t in load_results(folder).trials.to_dict("records")}
        rows = {name: read_metrics(SweepFolder(folder).trial(name).metrics) for name in trials}
    assert {name: trial["method"] for name, trial in trials.items()} == {
        "a": "gru",
        "b": "gru",
        "c": "sparsenet_sgprop",
        "d": "sparsenet_backprop",
        "e": "gru",
    }
    assert {name: trial["state"] for name, trial in trials.items()} == {
        "a": "completed",
        "b": "interrupted",
        "c": "failed",
        "d": "completed",
        "e": "stopped",
    }
    assert trials["c"]["reason"] == "ValueError: too steep"
    assert [trials[name]["lr"] for name in "ab"] == [0.1, 0.2]
    assert trials["a"]["budget"] == "1,600 padded environment steps"
    for name, count, lr in (("a", 4, 0.1), ("b", 2, 0.2), ("c", 1, 0.1), ("d", 2, 0.1)):
        assert [row["success_rate"] for row in rows[name]] == [lr * i for i in range(1, count + 1)]
        assert [row["env_steps"] for row in rows[name]] == [10 * i for i in range(1, count + 1)]
        assert {row["iteration_seconds"] for row in rows[name]} == {0.25}
    assert "4/4" in run(f"status {left}")
    assert "sparsenet_sgprop" in run(f"compare {left}")
    assert sorted(left.rglob("*")) == before

    # From where a restored script had the callback on, its files count.
    with reading(left) as folder:
        for name in ("config.yaml", "metrics.csv"):
            shutil.copyfile(folder / "b" / name, left / "b" / name)
    (left / "b" / "status.json").write_text('{"state": "failed", "reason": "by hand"}')
    with reading(left) as folder:
        again = load_results(folder).trials.set_index("trial")
    assert again.loc["b", "reason"] == "by hand"
    assert dict(again["iterations"]) == {"a": 4, "b": 2, "c": 1, "d": 2, "e": 2}
    assert str(left / "report.html") in run(f"report {left}").replace("\n", "")
    assert "too steep" in (left / "report.html").read_text()


def test_what_needs_an_experiment_file_says_so(left: Path, tmp_path: Path) -> None:
    restore = "run its script again, with Tuner.restore (docs/tune.md)"

    def refused(*words: object) -> str:
        said = CliRunner().invoke(app, list(map(str, words)))
        assert said.exit_code == 2
        return said.stderr

    packed = tmp_path / "packed"
    assert refused("resume", left) == f"sgrl: {left} is not of a sweep: {restore}\n"
    assert refused("archive", left, "--out", packed) == f"sgrl: b is not over: {restore}\n"
    shutil.rmtree(left / "b")
    run(f"archive {left} --out {packed}")
    with reading(packed) as folder:
        found = load_results(folder).trials.set_index("trial")
    assert dict(found["iterations"]) == {"a": 4, "c": 1, "d": 2, "e": 2}
    assert refused("verify", packed).startswith(f"sgrl: {packed} holds no experiment.yaml, as ")


def test_trials_are_called_as_a_sweep_calls_them() -> None:
    def trial(model: dict[str, Any], **config: Any) -> TuneTrial:
        return TuneTrial("Reinforce", {"env": "x", "_model_config": model, **config})

    sparse = {"policy": "sparsenet", "propagation": "sgprop", "num_parents": 2}
    trials = {
        "one": trial(sparse, seed=0, lr=0.1),
        "two": trial({**sparse, "propagation": "backprop"}, seed=0, lr=0.1),
        "three": trial({**sparse, "num_parents": 4}, seed=0, lr=0.1),
        "four": TuneTrial(
            "sgrl_PPO",
            {"model": {"custom_model": "sgrl_gru", "custom_model_config": {"hidden_size": 8}}},
        ),
        "five": TuneTrial("sgrl_PPO", {"model": {"custom_model": "sgrl_gru"}}),
    }
    described = describe_trials(trials)
    assert [(d["method"], d["swept"], d["seed"]) for d in described.values()] == [
        ("sparsenet_sgprop", {"num_parents": 2}, 0),
        ("sparsenet_backprop", {"num_parents": 2}, 0),
        ("sparsenet_sgprop", {"num_parents": 4}, 0),
        ("gru", {"hidden_size": 8}, 0),
        ("gru", {}, 0),
    ]
    assert described["four"]["algorithm"] == "PPO"
    assert described["four"]["model"] == {"policy": "gru", "hidden_size": 8}
    one = trials["one"]
    open_ = {"_model_config/propagation": "sgprop", "lr": 0.1, "env_config/maze_dims": [6, 6]}
    assert name_trial(one, open_) == "sparsenet_sgprop_lr=0.1_maze_dims=6x6_seed=0"
    assert name_trial(trials["five"], {"model/custom_model": "sgrl_gru"}) == "gru"
