"""Sweeps on Ray Tune: killed and resumed, damaged, diverging and failing trials."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import pandas as pd
import psutil
import pytest
import yaml
from rich.console import Console
from sweeps import METHODS, SPARSE, make_experiment, metrics_without_times, summary
from worker_server import driver

from sgrl.compiled.processor import processor_kind
from sgrl.results.checkpoints import list_checkpoints, newest_valid_checkpoint, verify
from sgrl.results.folder import SweepFolder, TrialFolder
from sgrl.results.metrics import count_rows
from sgrl.results.plan import ExperimentError
from sgrl.results.provenance import read_starts
from sgrl.results.status import StatusError, sweep_status
from sgrl.tuning import sweep
from sgrl.tuning.experiment.load import load_experiment
from sgrl.tuning.sweep import (
    SweepError,
    failed_trials,
    resume_sweep,
    run_sweep,
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, ray_session):
    """A finished sweep: two trials each of sgprop and GRU, and one whose loss becomes NaN."""
    folder = tmp_path_factory.mktemp("sweep")
    experiment = make_experiment(
        folder / "small.yaml", tuple(METHODS), checkpoint={"every": 1, "keep": 3}
    )
    return run_sweep(experiment, folder / "results")


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of the finished sweep to damage."""
    return Path(shutil.copytree(finished, tmp_path / "copied"))


def test_finished_sweep(finished, capsys):
    table = summary(finished)
    assert list(table.columns) == [
        "method",
        "seed",
        "state",
        "iterations",
        "final_success_rate",
        "auc",
        "reason",
    ]
    assert list(table.index) == [f"{method}_seed={seed}" for method in METHODS for seed in (0, 1)]
    good = table[table["method"] != "diverging"]
    assert set(good["state"]) == {"completed"}
    assert set(good["iterations"]) == {5}
    for trial in good.index:
        assert count_rows(finished / trial / "metrics.csv") == 5
        checkpoints = list_checkpoints(finished / trial / "checkpoints")
        assert [path.name for path in checkpoints] == ["000003", "000004", "000005"]
        assert (checkpoints[-1] / "policy.safetensors").is_file()
    metrics = metrics_without_times(finished)
    assert len({tuple(rows) for rows in metrics.values()}) == len(metrics)
    # Nothing is left but results.
    assert sorted(path.name for path in finished.iterdir() if path.is_file()) == [
        ".lock",
        "experiment.yaml",
        "provenance.json",
        "summary.csv",
        "sweep.log",
    ]
    assert not (finished / ".tune").exists()
    Console(width=80).print(sweep_status(finished).table)
    text = capsys.readouterr().out
    assert text.count("completed") == 5
    assert "4 completed" in text
    assert max(map(len, text.splitlines())) <= 80


def test_a_diverging_trial_fails_alone(finished):
    table = summary(finished)
    for seed in (0, 1):
        row = table.loc[f"diverging_seed={seed}"]
        assert row["state"] == "failed"
        assert row["iterations"] < 5
        assert "NonFiniteLoss" in row["reason"]
        assert "NonFiniteLoss" in (finished / f"diverging_seed={seed}" / "error.txt").read_text()
        folder = finished / f"diverging_seed={seed}" / "checkpoints"
        newest, problems = newest_valid_checkpoint(folder)
        assert int(newest.name) == row["iterations"]
        assert problems == []
    assert failed_trials(finished) == ["diverging_seed=0", "diverging_seed=1"]


def test_resuming_a_finished_sweep_starts_nothing(copied, monkeypatch):
    before = metrics_without_times(copied)
    monkeypatch.setattr(sweep, "_run_trials", None)
    assert resume_sweep(copied) == copied
    assert metrics_without_times(copied) == before


def test_a_sweep_that_knew_fewer_settings_goes_on(copied, monkeypatch):
    for path in (copied / "experiment.yaml", *copied.glob("sparsenet*/config.yaml")):
        text = path.read_text()
        assert "mixing_rule: published" in text
        lines = [line for line in text.splitlines() if "mixing_rule:" not in line]
        path.write_text("\n".join(lines))
    monkeypatch.setattr(sweep, "_run_trials", None)
    assert resume_sweep(copied) == copied
    (config,) = copied.glob("sparsenet*seed=0/config.yaml")
    config.write_text(config.read_text().replace("num_slots: 2", "num_slots: 3"))
    with pytest.raises(SweepError, match="says model: "):
        resume_sweep(copied)


def test_damaged_checkpoints_and_metrics_are_passed_over(copied, finished, capsys):
    last = copied / "gru_seed=0" / "checkpoints" / "000005" / "algorithm_state.pkl"
    last.write_bytes(last.read_bytes()[:100])
    for path in list_checkpoints(copied / "gru_seed=1" / "checkpoints"):
        (path / "policy.json").unlink()
    # Rows that no checkpoint led to, and fewer rows than the newest checkpoint has.
    with (copied / "gru_seed=1" / "metrics.csv").open("ab") as file:
        file.write(b"6,7,torn")
    torn = copied / "sparsenet_sgprop_seed=0" / "metrics.csv"
    torn.write_bytes(b"".join(torn.read_bytes().splitlines(keepends=True)[:5])[:-3])
    # As if another build of the compiled core had trained one of them.
    (before,) = read_starts(TrialFolder(torn.parent).provenance)
    wheel = [before | {"core": "x86-64-v3, prebuilt by g++ 12.2.0"}]
    TrialFolder(torn.parent).provenance.write_text(json.dumps(wheel))

    resume_sweep(copied)
    said = capsys.readouterr().out
    assert "000005 is damaged: algorithm_state.pkl is truncated or changed" in said
    assert "going on from iteration 4" in said
    said_of = (
        f"with another build of the compiled core ({before['core']}): no longer the same numbers"
    )
    assert " ".join(said.split()).count(said_of) == 1
    assert "000004 is damaged: policy.json is missing; going on from iteration 0" in said
    assert metrics_without_times(copied) == metrics_without_times(finished)
    for trial in ("gru_seed=0", "gru_seed=1", "sparsenet_sgprop_seed=0"):
        assert TrialFolder(copied / trial).read_status()["state"] == "completed"
        verify(copied / trial / "checkpoints" / "000005")
    starts = read_starts(TrialFolder(copied / "gru_seed=0").provenance)
    assert [start["iteration"] for start in starts] == [0, 4]
    assert starts[1]["machine"]["processor_kind"] == processor_kind()


def test_a_failing_trial_is_tried_again_and_then_left(copied, finished, capsys):
    shutil.rmtree(copied / "gru_seed=0" / "checkpoints")
    (copied / "gru_seed=0" / "checkpoints").write_text("in the way")
    shutil.rmtree(copied / "gru_seed=1")

    resume_sweep(copied)
    said = capsys.readouterr().out
    assert said.count("gru_seed=0 is started again after") == 1
    assert "gru_seed=0 failed at iteration 1" in said
    row = summary(copied).loc["gru_seed=0"]
    assert row["state"] == "failed"
    assert "checkpoints" in row["reason"]
    assert failed_trials(copied) == ["gru_seed=0", "diverging_seed=0", "diverging_seed=1"]
    assert summary(copied).loc["gru_seed=1", "state"] == "completed"

    (copied / "gru_seed=0" / "checkpoints").unlink()
    resume_sweep(copied)
    assert metrics_without_times(copied) == metrics_without_times(finished)


def test_a_killed_trial_process_is_replaced(tmp_path, ray_session, finished, capsys):
    experiment = make_experiment(
        tmp_path / "small.yaml", ("gru",), seeds=[0], stop={"training_iteration": 100}
    )
    trial = tmp_path / "results" / "small" / "gru_seed=0"
    killed = []

    def kill():
        while not killed:
            if count_rows(trial / "metrics.csv") > 20:
                for process in psutil.Process().children(recursive=True):
                    if any(file.path == f"{trial}/.lock" for file in process.open_files()):
                        process.kill()
                        killed.append(process.pid)
            time.sleep(0.01)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    directory = run_sweep(experiment, tmp_path / "results")
    assert len(killed) == 1
    assert "gru_seed=0 is started again after" in capsys.readouterr().out
    assert count_rows(trial / "metrics.csv") == 100
    assert failed_trials(directory) == []
    # The first iterations do not depend on how many follow.
    start = metrics_without_times(finished)["gru_seed=0"]
    assert metrics_without_times(directory)["gru_seed=0"][: len(start)] == start


def test_a_sweep_whose_driver_is_killed_twice_loses_nothing(tmp_path, ray_session):
    experiment = make_experiment(
        tmp_path / "small.yaml",
        ("sparsenet_sgprop",),
        seeds=[0, 1, 2],
        concurrency=2,
        stop={"training_iteration": 250},
        checkpoint={"every": 25, "keep": 2},
    )
    killed = tmp_path / "killed"
    names = ["sparsenet_sgprop_seed=0", "sparsenet_sgprop_seed=1"]

    def kill_between_checkpoints(start, least):
        code = (
            "from sgrl.tuning.experiment.load import load_experiment\n"
            f"from sgrl.tuning.sweep import resume_sweep, run_sweep\n{start}"
        )
        # A session of its own: Ray must not find the one of these tests.
        environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_ADDRESS")}
        process = subprocess.Popen(driver(code), env=environment)

        def between_checkpoints(name):
            rows = count_rows(killed / name / "metrics.csv")
            return least[name] < rows < 240 and 2 < rows % 25 < 20

        try:
            while not all(between_checkpoints(name) for name in names):
                assert process.poll() is None, "the sweep ended before it was killed"
                time.sleep(0.02)
        finally:
            process.kill()
            process.wait()
        for name in names:
            rows = count_rows(killed / name / "metrics.csv")
            assert least[name] < rows < 250
            assert rows > int(list_checkpoints(killed / name / "checkpoints")[-1].name)

    config = str(tmp_path / "small.yaml")
    start = f"run_sweep(load_experiment({config!r}), {str(tmp_path)!r}, 'killed')"
    kill_between_checkpoints(start, dict.fromkeys(names, 25))
    # The trials' processes outlive the driver for a moment, and write what they have.
    done: dict[str, int] = {}
    while done != (done := {name: count_rows(killed / name / "metrics.csv") for name in names}):
        time.sleep(2)
    kill_between_checkpoints(f"resume_sweep({str(killed)!r})", done)

    resume_sweep(killed)
    whole = run_sweep(experiment, tmp_path, "whole")
    assert metrics_without_times(killed) == metrics_without_times(whole)
    assert set(summary(killed)["state"]) == {"completed"}
    columns = ["state", "iterations", "final_success_rate", "auc"]
    assert summary(killed)[columns].equals(summary(whole)[columns])


def test_any_rllib_algorithm_is_a_trial(tmp_path, ray_session):
    config = {
        "environment": {
            "env": "labyrinth_escape",
            "env_config": {"maze_dims": [6, 6], "episode_length": 10},
        },
        "env_runners": {"num_env_runners": 0, "num_envs_per_env_runner": 2},
        "training": {
            "train_batch_size_per_learner": 40,
            "minibatch_size": 20,
            "num_epochs": 1,
            "lr": {"grid": [1e-3, 2e-3]},
        },
    }
    methods = {"gru": {"model": {"policy": "gru", "hidden_size": 8, "value_head": True}}}
    experiment = make_experiment(tmp_path / "ppo.yaml", algorithm="PPO", config=config, seeds=[3])
    experiment = load_experiment(tmp_path / "ppo.yaml", [f"methods={methods}"])
    directory = run_sweep(experiment, tmp_path, "ppo")
    table = summary(directory)
    assert list(table["lr"]) == [1e-3, 2e-3]
    assert set(table["state"]) == {"completed"}
    for trial in table.index:
        metrics = pd.read_csv(directory / trial / "metrics.csv")
        assert list(metrics["iteration"]) == [1, 2, 3, 4, 5]
        assert metrics["env_steps"].is_monotonic_increasing
        assert metrics[["policy_loss", "entropy"]].notna().all(axis=None)
        newest, _ = newest_valid_checkpoint(directory / trial / "checkpoints")
        assert (newest / "policy.safetensors").is_file()


def test_a_sweep_of_bandits_resumes_exactly(tmp_path, ray_session):
    model = {"policy": "sparse_mlp", "num_layers": 2, **SPARSE}
    training = {
        "entropy_coeff": 0.0,
        "grad_clip": None,
        "normalize_returns": False,
        "two_phase": True,
        "total_updates": 13,
        "total_iterations": 4,
    }
    experiment = make_experiment(
        tmp_path / "bandit.yaml",
        config={
            "environment": {"env": "mnist_bandit", "env_config": {"classes": [0, 1, 7]}},
            "env_runners": {"num_envs_per_env_runner": 8},
            "training": training,
            "evaluation": {
                "evaluation_interval": 1,
                "evaluation_duration": 60,
                "evaluation_config": {"num_envs_per_env_runner": 60},
            },
        },
        methods={"sparse": {"model": model}},
        stop={"training_iteration": 4},
        checkpoint={"every": 1, "keep": 3},
    )
    directory = run_sweep(experiment, tmp_path, "bandit")
    table = summary(directory)
    assert set(table["state"]) == {"completed"}
    assert ((table["final_eval_reward"] >= 0) & (table["final_eval_reward"] <= 1)).all()
    metrics = pd.read_csv(directory / "sparse_seed=0" / "metrics.csv")
    assert list(metrics["env_steps"]) == [8, 40, 72, 104]
    assert metrics["eval_reward"].notna().all()
    assert metrics["layer1_mixing_weight_median"].notna().all()
    assert (directory / "sparse_seed=0" / "checkpoints" / "000004" / "policy.json").is_file()

    before = metrics_without_times(directory)
    assert before["sparse_seed=0"] != before["sparse_seed=1"]
    for name in ("000003", "000004"):
        (directory / "sparse_seed=0" / "checkpoints" / name / "policy.json").unlink()
    shutil.rmtree(directory / "sparse_seed=1")
    resume_sweep(directory)
    assert metrics_without_times(directory) == before


def test_folders_that_cannot_be_used(copied, tmp_path, monkeypatch):
    experiment = load_experiment(copied / "experiment.yaml")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SweepError, match=r"copied already exists: `sgrl resume copied` continues"):
        run_sweep(experiment, ".", "copied")
    (tmp_path / "other").mkdir()
    with pytest.raises(SweepError, match="other holds no sweep"):
        resume_sweep("other")
    with pytest.raises(StatusError, match="none does not exist"):
        sweep_status(tmp_path / "none")
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(SweepError, match="other already exists: --name"):
        run_sweep(experiment, tmp_path, "other")
    with (
        SweepFolder(copied).lock(0),
        pytest.raises(SweepError, match="is being run by another process"),
    ):
        resume_sweep(copied)


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("num_threads", lambda e: e.update(num_threads=2)),
        ("model", lambda e: e["methods"]["sparsenet_sgprop"]["model"].update(backend="eager")),
        ("config", lambda e: e["config"].update(training={"gamma": 0.9})),
    ],
)
def test_a_resumed_sweep_computes_as_it_did(copied, key, change):
    path = copied / "experiment.yaml"
    experiment = yaml.safe_load(path.read_text())
    change(experiment)
    path.write_text(yaml.safe_dump(experiment, sort_keys=False))
    with pytest.raises(SweepError, match=rf"config.yaml says {key}: .*start another sweep"):
        resume_sweep(copied)


def test_a_backend_that_was_left_to_each_process(copied):
    """As sweeps on GPUs once were started."""
    path = copied / "sparsenet_sgprop_seed=0" / "config.yaml"
    path.write_text(path.read_text().replace("backend: native", "backend: auto"))
    assert yaml.safe_load(path.read_text())["model"]["backend"] == "auto"
    resume_sweep(copied)


def test_a_resumed_sweep_may_compute_elsewhere(copied, capsys, monkeypatch):
    """The advice where processors are too few is one that is then taken."""
    path = copied / "experiment.yaml"
    experiment = yaml.safe_load(path.read_text())

    def resume(runners, cpus):
        experiment["config"]["env_runners"]["num_env_runners"] = runners
        path.write_text(yaml.safe_dump(experiment, sort_keys=False))
        monkeypatch.setattr(sweep, "machine_resources", lambda: {"CPU": cpus, "GPU": 0})
        monkeypatch.setattr(sweep, "_run_trials", lambda *_: None)
        monkeypatch.setattr(sweep.ray, "is_initialized", lambda: False)
        with contextlib.suppress(KeyboardInterrupt):  # as trials are left over
            resume_sweep(copied)
        return capsys.readouterr().out

    first, second, *_ = sorted(file.parent for file in copied.glob("*/status.json"))
    moved = "in other processes than before, with the same numbers, up to rounding"
    TrialFolder(first).write_status(state="interrupted")
    assert f"\n1 trial goes on {moved}" in f"\n{resume(1, 2)}"  # the others are over
    assert "other processes" not in resume(1, 2)
    advice = "needs 2 CPUs and there are 1.*or set num_env_runners and num_learners to 0 in that"
    with pytest.raises(ExperimentError, match=advice):
        resume(1, 1)
    TrialFolder(second).write_status(state="interrupted")
    assert f"2 trials go on {moved}" in resume(0, 1)
    # Two runners would hold twice the environments.
    with pytest.raises(SweepError, match=r"config\.yaml says config: "):
        resume(2, 8)


def test_more_than_there_is_is_refused_before_anything_starts(tmp_path):
    experiment = make_experiment(tmp_path / "small.yaml")
    experiment = load_experiment(
        tmp_path / "small.yaml", ["config.env_runners.num_env_runners=5000"]
    )
    with pytest.raises(ExperimentError, match="needs 5001 CPU"):
        run_sweep(experiment, tmp_path / "results")
    assert not (tmp_path / "results").exists()


def test_fractions_of_a_gpu_are_requested(tmp_path, monkeypatch):
    overrides = ["config.learners={num_learners: 0, num_gpus_per_learner: 0.25}"]
    make_experiment(tmp_path / "small.yaml")
    experiment = load_experiment(tmp_path / "small.yaml", overrides)
    monkeypatch.setattr(sweep.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(sweep, "machine_resources", lambda: {"CPU": 2, "GPU": 1})
    sweep._check_resources(experiment)
    (trial,) = (trial for trial in experiment.trials if trial.name == "gru_seed=0")
    assert sweep.resource_request(trial).required_resources == {"CPU": 1, "GPU": 0.25}


def test_ctrl_c_stops_the_trials_and_leaves_a_sweep_to_resume(tmp_path, ray_session):
    experiment = make_experiment(
        tmp_path / "small.yaml", ("gru",), concurrency="auto", stop={"training_iteration": 100000}
    )
    metrics = tmp_path / "small" / "gru_seed=0" / "metrics.csv"
    handler = signal.getsignal(signal.SIGINT)

    def interrupt():
        while count_rows(metrics) < 10:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt, daemon=True)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        run_sweep(experiment, tmp_path)
    assert signal.getsignal(signal.SIGINT) == handler
    assert "interrupted" in set(summary(tmp_path / "small")["state"])
    # Nothing holds the trials any more.
    for name in ("gru_seed=0", "gru_seed=1"):
        with TrialFolder(tmp_path / "small" / name).lock(30):
            pass
