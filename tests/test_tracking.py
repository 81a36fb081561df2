"""TensorBoard's event files and the trackers: each iteration once, under one id, and offline."""

import json
import random
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import yaml
from tensorboardX.proto.event_pb2 import Event, SessionLog

from sgrl.results.folder import TrialFolder
from sgrl.results.metrics import append_row, count_rows, read_metrics, truncate_metrics
from sgrl.tuning import tracking
from sgrl.tuning.experiment.load import load_experiment
from sgrl.tuning.sweep import failed_trials, resume_sweep, run_sweep
from sgrl.tuning.tracking import EventFile, Tracking, TrackingError, check_tracker

TRIAL = {"name": "gru_lr=0.1_seed=0", "method": "gru", "seed": 0, "swept": {"lr": 0.1, "x": [1]}}
SECRET = "0123456789abcdef" * 3


def add_rows(folder, start, stop):
    for iteration in range(start, stop + 1):
        row = {"iteration": iteration, "env_steps": 40 * iteration, "iteration_seconds": 0.5}
        append_row(folder / "metrics.csv", row | {"success_rate": iteration / 1000, "entropy": 0.1})
    return read_metrics(folder / "metrics.csv")


def read_events(folder):
    """All events of the folder's only event file; those of earlier starts are empty."""
    *earlier, path = sorted(folder.glob("*tfevents*"))
    assert all(path.stat().st_size == 0 for path in earlier)
    data, at = path.read_bytes(), 0
    while at < len(data):
        (size,) = struct.unpack("<Q", data[at : at + 8])
        yield Event.FromString(data[at + 12 : at + 12 + size])
        at += 16 + size


def scalars(folder):
    """Its curves as {tag: [(step, value), ...]}."""
    found = {}
    for event in read_events(folder):
        for value in event.summary.value:
            if value.WhichOneof("value") == "simple_value":
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


def expected_scalars(rows):
    """The same from metrics.csv; TensorBoard's numbers have 32 bits."""
    found = {}
    for row in rows:
        for name, value in row.items():
            if not np.isnan(value):
                found.setdefault(name, []).append((row["env_steps"], float(np.float32(value))))
    return found


# ---------------------------------------------------------------- TensorBoard


def test_event_file_holds_the_metrics(tmp_path):
    rows = add_rows(tmp_path, 1, 5)
    notes = []
    follow = Tracking(TrialFolder(tmp_path), TRIAL, "none", None, notes)
    follow.send(rows[:3])
    assert scalars(tmp_path) == expected_scalars(rows[:3])  # at once, not at the end
    follow.send(rows)
    follow.send(rows)
    follow.close("completed")
    assert scalars(tmp_path) == expected_scalars(rows)
    events = list(read_events(tmp_path))
    assert events[0].file_version == "brain.Event:2"
    assert events[1].session_log.status == SessionLog.START
    times = [event.wall_time for event in events if event.step]
    assert np.diff(times[:3]) == pytest.approx([0.5, 0.5])
    tags = [value.tag for event in events for value in event.summary.value]
    assert [tag for tag in tags if tag.startswith("_hparams_")] == [
        f"_hparams_/{name}" for name in ("experiment", "session_start_info", "session_end_info")
    ]
    assert notes == []
    assert not (tmp_path / "tracking.json").exists()


def test_a_restarted_trial_leaves_neither_gap_nor_duplicate(tmp_path):
    rows = add_rows(tmp_path, 1, 30)
    Tracking(TrialFolder(tmp_path), TRIAL, "none", None, []).send(rows)  # never closed: killed
    # In the middle of a record, too.
    (path,) = tmp_path.glob("*tfevents*")
    path.write_bytes(path.read_bytes()[:-7])
    truncate_metrics(tmp_path / "metrics.csv", 20)
    follow = Tracking(TrialFolder(tmp_path), TRIAL, "none", None, [])
    follow.send(read_metrics(tmp_path / "metrics.csv"))
    rows = add_rows(tmp_path, 21, 40)
    follow.send(rows)
    follow.close("interrupted")
    assert scalars(tmp_path) == expected_scalars(rows)


def test_tensorboard_that_looks_on_follows_a_restart(tmp_path):
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    ).EventAccumulator(str(tmp_path))

    def shown():
        accumulator.Reload()
        return [(event.step, event.value) for event in accumulator.Scalars("success_rate")]

    rows = add_rows(tmp_path, 1, 30)
    first = Tracking(TrialFolder(tmp_path), TRIAL, "none", None, [])
    first.send(rows)
    assert shown() == expected_scalars(rows)["success_rate"]
    truncate_metrics(tmp_path / "metrics.csv", 20)
    second = Tracking(TrialFolder(tmp_path), TRIAL, "none", None, [])
    second.send(rows[:20])
    assert shown() == expected_scalars(rows[:20])["success_rate"]
    rows = add_rows(tmp_path, 21, 40)
    second.send(rows)
    assert shown() == expected_scalars(rows)["success_rate"]


def test_tensorboard_on_a_results_folder(tmp_path):
    """`tensorboard --logdir results`, the real one, shows every trial's curves."""
    pytest.importorskip("tensorboard")
    rows = {}
    for name in ("gru_seed=0", "gru_seed=1"):
        folder = tmp_path / "results" / "small" / name
        folder.mkdir(parents=True)
        rows[name] = add_rows(folder, 1, 12)
        follow = Tracking(TrialFolder(folder), TRIAL, "tensorboard", None, [])
        follow.send(rows[name])
        follow.close("completed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).parent / "tensorboard"), "--logdir", "results"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--reload_interval", "1"]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=log)
    try:
        base = f"http://127.0.0.1:{port}/data/plugin/scalars"

        def get(path):
            with urllib.request.urlopen(f"{base}/{path}", timeout=10) as answer:
                return json.load(answer)

        deadline, runs = time.monotonic() + 60, {}
        while len(runs) < 2 and time.monotonic() < deadline:
            assert server.poll() is None, (tmp_path / "log").read_text()
            try:
                runs = get("tags")
            except OSError:
                time.sleep(0.2)
        assert sorted(runs) == ["small/gru_seed=0", "small/gru_seed=1"]

        def assert_shown(name, rows):
            run, curve = f"small%2F{name.replace('=', '%3D')}", None
            expected = [[s, pytest.approx(v)] for s, v in expected_scalars(rows)["success_rate"]]
            while curve != expected and time.monotonic() < deadline:
                time.sleep(0.1)
                curve = [point[1:] for point in get(f"scalars?run={run}&tag=success_rate")]
            assert curve == expected

        for name in rows:
            assert "entropy" in runs[f"small/{name}"]
            assert_shown(name, rows[name])
        # And goes along when a trial is started again from an earlier iteration.
        truncate_metrics(folder / "metrics.csv", 7)
        follow = Tracking(TrialFolder(folder), TRIAL, "tensorboard", None, [])
        follow.send(rows[name][:7])
        assert_shown(name, rows[name][:7])
        follow.send(add_rows(folder, 8, 15))
        assert_shown(name, read_metrics(folder / "metrics.csv"))
    finally:
        server.kill()
        server.wait()


# ---------------------------------------------------------------- what trackers may not do


def test_a_tracker_that_fails_is_given_up(tmp_path, monkeypatch):
    rows = add_rows(tmp_path, 1, 6)

    def fail(*arguments):
        raise OSError("no space left\nat all")

    notes = []
    follow = Tracking(TrialFolder(tmp_path), TRIAL, "none", None, notes)
    follow.send(rows[:2])
    monkeypatch.setattr(EventFile, "send", fail)
    follow.send(rows[:4])
    follow.send(rows)
    follow.close("completed")
    assert notes == ["going on without tensorboard: no space left"]
    monkeypatch.setattr(EventFile, "__init__", fail)
    Tracking(TrialFolder(tmp_path), TRIAL, "none", None, notes).send(rows)
    assert len(notes) == 2


def test_trackers_leave_the_random_numbers_alone(tmp_path, monkeypatch):
    def draw(*arguments):
        random.random()
        np.random.rand()  # noqa: NPY002

    monkeypatch.setattr(EventFile, "send", draw)
    before = random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    Tracking(TrialFolder(tmp_path), TRIAL, "none", None, []).send(add_rows(tmp_path, 1, 2))
    after = random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    assert after == before


def test_missing_packages_and_logins(monkeypatch, tmp_path):
    check_tracker("none")
    find = tracking.importlib.util.find_spec
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None)
    for name in ("tensorboard", "wandb", "mlflow"):
        with pytest.raises(TrackingError, match=rf'pip install "sgrl\[{name}\]"'):
            check_tracker(name)
    monkeypatch.setattr(tracking.importlib.util, "find_spec", find)
    # A folder that wandb leaves where it runs is not the package.
    (tmp_path / "empty" / "tensorboard").mkdir(parents=True)
    monkeypatch.setattr(sys, "path", [str(tmp_path / "empty")])
    monkeypatch.delitem(sys.modules, "tensorboard", raising=False)
    with pytest.raises(TrackingError, match="tensorboard is not installed"):
        check_tracker("tensorboard")


def test_wandb_without_a_login(monkeypatch, tmp_path):
    pytest.importorskip("wandb")
    for name in ("WANDB_API_KEY", "WANDB_MODE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(TrackingError, match="no login for wandb: run `wandb login`, or set WANDB"):
        check_tracker("wandb")
    monkeypatch.setenv("WANDB_API_KEY", "short")
    with pytest.raises(TrackingError, match="wandb cannot be used: "):
        check_tracker("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_tracker("wandb")


# ---------------------------------------------------------------- whole sweeps


def make_experiment(path, iterations=60):
    environment = {
        "env": "labyrinth_escape",
        "env_config": {"maze_dims": [6, 6], "episode_length": 10},
    }
    experiment = {
        "name": "small",
        "config": {"environment": environment, "env_runners": {"num_envs_per_env_runner": 4}},
        "methods": {"gru": {"model": {"policy": "gru", "hidden_size": 8}}},
        "stop": {"training_iteration": iterations},
        "checkpoint": {"every": 25, "keep": 2},
    }
    path.write_text(yaml.safe_dump(experiment, sort_keys=False))
    return path


def numbers(rows):
    return [[v for k, v in row.items() if k != "iteration_seconds"] for row in rows]


def wandb_records(path):
    """The records of a W&B run's file: LevelDB's log format, after seven bytes of its own."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # the whole of a record, or its end
            yield Record.FromString(whole)
            whole = b""


def wandb_runs(trial):
    """Of each start of the trial: the run's id, its rows by step, its exit code (None: killed)."""
    for path in sorted(trial.glob("wandb/offline-run-*/*.wandb")):
        run_id, rows, code = path.stem.removeprefix("run-"), [], None
        for record in wandb_records(path):
            if record.HasField("run"):
                assert record.run.run_id == run_id
                assert record.run.run_group == trial.parent.name
                assert record.run.display_name == trial.name
            if record.HasField("history"):
                items = {i.key or i.nested_key[0]: i.value_json for i in record.history.item}
                assert float(items["env_steps"]) == record.history.step.num
                rows.append((record.history.step.num, float(items["policy_loss"])))
            if record.HasField("exit"):
                code = record.exit.exit_code
        yield run_id, rows, code


def mlflow_run(trial):
    """The id of the trial's run, its rows by step and its state."""
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{trial.parent}/mlflow.db")
    experiment = client.get_experiment_by_name(trial.parent.name)
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == trial.name
    assert run.data.params["model/policy"] == "gru"
    history = client.get_metric_history(run.info.run_id, "policy_loss")
    rows = sorted((metric.step, metric.value) for metric in history)
    return run.info.run_id, rows, run.info.status


def test_wandb_rows_count_as_sent_once_they_are_safe(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    now = [100.0]
    clock = SimpleNamespace(time=time.time, time_ns=time.time_ns, monotonic=lambda: now[0])
    monkeypatch.setattr(tracking, "time", clock)
    monkeypatch.setenv("WANDB_MODE", "offline")
    trial = tmp_path / "small" / "gru_seed=0"
    trial.mkdir(parents=True)
    rows = add_rows(trial, 1, 9)
    notes = []

    def state():
        return json.loads((trial / "tracking.json").read_text())["wandb"]

    follow = Tracking(TrialFolder(trial), TRIAL, "wandb", "offline", notes)
    assert notes == []
    follow.send(rows[:3])
    now[0] = 103.0
    follow.send(rows[:5])
    assert state()["sent"] == 0
    now[0] = 106.0
    follow.send(rows[:6])
    assert state()["sent"] == 3
    now[0] = 112.0
    follow.send(rows[:7])
    assert state()["sent"] == 6
    follow.close("interrupted")
    first = state()
    assert first["sent"] == 7
    follow = Tracking(TrialFolder(trial), TRIAL, "wandb", "offline", notes)
    assert notes == []
    follow.send(rows)
    follow.close("completed")
    assert state() == {"id": first["id"], "sent": 9, "step": "env_steps"}
    # A run whose steps are iterations, from an older version, is not gone on with.
    (trial / "tracking.json").write_text(json.dumps({"wandb": {"id": first["id"], "sent": 9}}))
    follow = Tracking(TrialFolder(trial), TRIAL, "wandb", "offline", notes)
    follow.send(rows)
    follow.close("completed")
    assert state()["id"] != first["id"]
    assert notes == []


@pytest.fixture(scope="module")
def untracked(tmp_path_factory, ray_session):
    folder = tmp_path_factory.mktemp("untracked")
    experiment = load_experiment(make_experiment(folder / "small.yaml", 80))
    return read_metrics(run_sweep(experiment, folder) / "gru_seed=0" / "metrics.csv")


@pytest.mark.parametrize("tracker", ["wandb", "mlflow"])
def test_one_run_through_kill_and_resume(tmp_path, monkeypatch, ray_session, untracked, tracker):
    pytest.importorskip(tracker)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    experiment = load_experiment(make_experiment(tmp_path / "small.yaml"), track=tracker)
    trial = tmp_path / "small" / "gru_seed=0"
    killed = []

    def kill():
        """The trial's process, once, between two checkpoints."""
        while not killed:
            if count_rows(trial / "metrics.csv") > 30:
                for process in psutil.Process().children(recursive=True):
                    if any(file.path == f"{trial}/.lock" for file in process.open_files()):
                        process.kill()
                        killed.append(process.pid)
            time.sleep(0.005)

    threading.Thread(target=kill, daemon=True).start()
    run_sweep(experiment, tmp_path)
    assert len(killed) == 1
    first_id = json.loads((trial / "tracking.json").read_text())[tracker]["id"]

    # And once more in a sweep that goes further, with the tracker that it was started with.
    stored = yaml.safe_load((tmp_path / "small" / "experiment.yaml").read_text())
    assert stored["track"] == tracker
    stored["stop"]["training_iteration"] = 80
    (tmp_path / "small" / "experiment.yaml").write_text(yaml.safe_dump(stored, sort_keys=False))
    resume_sweep(tmp_path / "small")
    assert failed_trials(tmp_path / "small") == []

    rows = read_metrics(trial / "metrics.csv")
    assert numbers(rows) == numbers(untracked)
    assert scalars(trial) == expected_scalars(rows)
    expected = [(row["env_steps"], row["policy_loss"]) for row in rows]
    assert json.loads((trial / "tracking.json").read_text())[tracker]["id"] == first_id
    if tracker == "mlflow":
        assert mlflow_run(trial) == (first_id, expected, "FINISHED")
    else:
        runs = list(wandb_runs(trial))
        assert [run_id for run_id, _, _ in runs] == [first_id] * 3
        assert [code for _, _, code in runs] == [None, 0, 0]
        written, *later = [rows for _, rows, _ in runs]
        assert written == expected[: len(written)]
        # What the killed process had not written went out again, and all else once.
        resent = [row for rows in later for row in rows]
        assert resent == expected[-len(resent) :]
        assert len(written) + len(resent) >= len(expected)
        assert later[1] == expected[60:]
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path


def test_a_resumed_sweep_can_change_its_tracker(tmp_path, ray_session):
    pytest.importorskip("tensorboard")
    experiment = load_experiment(make_experiment(tmp_path / "small.yaml", 2))
    directory = run_sweep(experiment, tmp_path)
    stored = (directory / "experiment.yaml").read_text()
    assert "track: none\n" in stored
    resume_sweep(directory, track="tensorboard")
    changed = (directory / "experiment.yaml").read_text()
    assert changed == stored.replace("track: none\n", "track: tensorboard\n")
    resume_sweep(directory)
    assert (directory / "experiment.yaml").read_text() == changed
