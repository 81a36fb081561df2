"""Faults: damaged checkpoints, a full disk, hanging and failing trials."""

import ctypes
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console
from sweeps import make_experiment, metrics_without_times, summary
from worker_server import ALONE

from sgrl.results.checkpoints import (
    MANIFEST,
    CheckpointError,
    list_checkpoints,
    newest_valid_checkpoint,
    open_policy,
    verify,
)
from sgrl.results.folder import SweepFolder, TrialFolder
from sgrl.results.metrics import score
from sgrl.results.status import read_progress, sweep_status
from sgrl.results.storage import Store
from sgrl.tuning import sweep
from sgrl.tuning.experiment.load import load_experiment
from sgrl.tuning.progress import SweepMonitor
from sgrl.tuning.sweep import SweepError, is_sweep, resume_sweep, run_sweep
from sgrl.tuning.trial import TrialRunner, is_disk_full

TRIAL = "sparsenet_sgprop_seed=0"


@pytest.fixture(scope="module")
def finished(tmp_path_factory, ray_session):
    """An undisturbed sweep of six iterations, checkpoints after 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("faults")
    experiment = make_experiment(
        folder / "small.yaml",
        seeds=[0, 1, 2],
        stop={"training_iteration": 6},
        checkpoint={"every": 2, "keep": 3},
    )
    return run_sweep(experiment, folder)


@pytest.fixture
def copied(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "copied"))


def assert_never_loaded(checkpoint, name):
    """The checkpoint is passed over for the one before it, by those that resume and those that
    want its policy, and the reason names the file."""
    newest, problems = newest_valid_checkpoint(checkpoint.parent)
    assert newest.name == "000004"
    assert len(problems) == 1
    assert name in problems[0]
    with pytest.raises(CheckpointError, match=r"the newest whole one is .*000004"):
        open_policy(checkpoint)


def test_a_checkpoint_cut_short_anywhere_is_never_loaded(copied):
    checkpoint = copied / TRIAL / "checkpoints" / "000006"
    verify(checkpoint)
    files = [path for path in checkpoint.rglob("*") if path.is_file()]
    assert {"policy.safetensors", "algorithm_state.pkl", MANIFEST} <= {f.name for f in files}
    for path in files:
        content = path.read_bytes()
        for size in {len(content) * part // 20 for part in range(20)}:
            path.write_bytes(content[:size])
            assert_never_loaded(checkpoint, path.name)
        path.unlink()
        assert_never_loaded(checkpoint, path.name)
        path.write_bytes(content)
    verify(checkpoint)


class Planted:
    """Leaves a file behind when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("damage", ["pickle", "manifest", "missing"])
def test_no_pickle_is_loaded_unless_the_manifest_verifies(copied, finished, tmp_path, damage):
    checkpoint, opened = copied / TRIAL / "checkpoints" / "000006", tmp_path / "opened"
    planted = pickle.dumps(Planted(opened))
    pickle.loads(planted)
    assert opened.is_file()
    opened.unlink()
    pickles = [*checkpoint.rglob("*.pkl")]
    assert len(pickles) > 3
    for path in pickles:
        path.write_bytes(planted)
    if damage == "manifest":
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        for path in pickles:
            manifest["files"][path.relative_to(checkpoint).as_posix()] = {"size": len(planted)}
        (checkpoint / MANIFEST).write_text(json.dumps(manifest))
    if damage == "missing":
        (checkpoint / MANIFEST).unlink()
    with pytest.raises(CheckpointError):
        open_policy(checkpoint)
    if damage == "missing":  # the other damages take the same way
        resume_sweep(copied)
        assert metrics_without_times(copied) == metrics_without_times(finished)
        verify(checkpoint)
    assert not opened.exists()


def faulty_runner():
    """Trials that before iteration 4 raise (seed 0) or hang, outside Python and with its lock:
    the first time (seed 1), or always (seed 2)."""

    class Faulty(TrialRunner):
        def _start(self):
            super()._start()
            train, seed, hung = self.algorithm.train, self.trial.seed, self.folder.path / ".hung"

            def faulty():
                if len(self.rows) == 3 and seed == 0:
                    raise ValueError("no fourth iteration")
                if len(self.rows) == 3 and not (seed == 1 and hung.exists()):
                    hung.touch()
                    ctypes.PyDLL(None).sleep(600)
                return train()

            self.algorithm.train = faulty

    return Faulty


def test_trials_that_hang_or_fail_for_their_own_reason(tmp_path, finished, monkeypatch, capsys):
    experiment = make_experiment(
        tmp_path / "small.yaml",
        ("gru",),
        seeds=[0, 1, 2],
        stop={"training_iteration": 6},
        iteration_timeout=5,
        concurrency=3,
    )
    monkeypatch.setattr(sweep, "TrialRunner", faulty_runner())
    directory = run_sweep(experiment, tmp_path)
    said = capsys.readouterr().out
    # Its own reason: once more, to be sure of it, although max_failures would allow more.
    assert said.count("gru_seed=0 is started again after ValueError: no fourth iteration") == 1
    assert "gru_seed=0 failed at iteration 3, ValueError: no fourth iteration (again, " in said
    assert f"; see {directory}/gru_seed=0/error.txt\n" in said
    found = sweep_status(directory)
    assert [line.partition("; see ")[2] for line in found.lines] == [
        f"{directory}/gru_seed=0/error.txt",
        f"{directory}/gru_seed=2/hung.txt",
    ]
    # max_failures is 1, and the second trial needs one restart, the third two.
    hanging = "an iteration of more than 5 s (hung.txt says where it hung)"
    for name in ("gru_seed=1", "gru_seed=2"):
        where = hanging.replace("(", f"({directory}/{name}/")
        assert said.count(f"{name} is started again after {where}") == 1
    there = f"; see {directory}/gru_seed=2/"
    assert f"gru_seed=2 failed at iteration 3, {hanging}{there}hung.txt\n" in said
    assert list(summary(directory)["state"]) == ["failed", "completed", "failed"]
    assert TrialFolder(directory / "gru_seed=2").read_status()["reason"] == hanging
    assert "in faulty" in (directory / "gru_seed=2" / "hung.txt").read_text()
    assert not (directory / "gru_seed=1" / "hung.txt").exists()

    # Without the fault, all of it is what it would have been.
    monkeypatch.setattr(sweep, "TrialRunner", TrialRunner)
    resume_sweep(directory)
    whole = metrics_without_times(finished)
    assert metrics_without_times(directory) == {
        name: rows for name, rows in whole.items() if name.startswith("gru")
    }
    assert not (directory / "gru_seed=2" / "hung.txt").exists()


def test_failures_add_up_only_without_a_new_checkpoint_in_between(finished):
    trial = load_experiment(finished / "experiment.yaml").trials[0]
    progress = {trial.name: read_progress(SweepFolder(finished), trial)}
    monitor = SweepMonitor(Store(finished), progress, Console())
    metadata = SimpleNamespace(num_failures=0)
    tune_trial = SimpleNamespace(config={"trials": [trial.name]}, run_metadata=metadata)
    report = {"iteration": 1, "score": score([]), "seconds_per_iteration": 1.0, "notes": []}
    report |= {"done": False}
    for saved, failures in [(0, 2), (2, 0), (2, 2), (0, 2), (2, 2), (3, 0)]:
        metadata.num_failures = 2
        reports = {trial.name: report | {"saved": saved}}
        monitor.on_trial_result(1, [], tune_trial, {"trials": reports, "disk_full": False})
        assert metadata.num_failures == failures


def test_a_disk_is_full_in_whatever_words():
    assert is_disk_full(OSError(28, "No space left on device"))
    assert is_disk_full(RuntimeError("I/O error: No space left on device (os error 28)"))
    assert not is_disk_full(OSError(2, "No such file or directory"))
    wrapped = RuntimeError("wrapped")
    wrapped.__cause__ = OSError(122, "Disk quota exceeded")
    assert is_disk_full(wrapped)


def test_a_sweep_that_ended_before_it_had_begun_starts_again(tmp_path, monkeypatch):
    def no_space(path, text):
        path.with_name(f".{path.name}.tmp").touch()
        raise OSError(28, "No space left on device")

    experiment = make_experiment(tmp_path / "small.yaml")
    monkeypatch.setattr(sweep, "_run", lambda store, *more: store.folder)
    with monkeypatch.context() as full:
        full.setattr(sweep, "write_text", no_space)
        with pytest.raises(SweepError, match=r"no space left .*: make some, then start the sweep"):
            run_sweep(experiment, tmp_path)
    assert run_sweep(experiment, tmp_path) == tmp_path / "small"
    assert is_sweep(Store(tmp_path / "small"))


#: Kilobytes of the disk: room for some of the first checkpoints, for some trials, for all.
SIZES = (1500, 9000, 60000)
#: A sweep on a disk that is full a few times, each time made larger. It leaves copies of the disk.
FULL_DISK = """
import shutil, subprocess, sys
from pathlib import Path

from worker_server import local_ray

from sgrl.tuning.experiment.load import load_experiment
from sgrl.results.metrics import append_row, read_metrics
from sgrl.tuning.sweep import SweepError, resume_sweep, run_sweep

folder = Path(sys.argv[1])
disk = folder / "disk"

def mount(size, *options):
    options = ",".join(["size=%dk" % size, *options])
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", disk], check=True)

# A row that does not fit is not there at all.
mount(64)
rows = 0
try:
    while True:
        append_row(disk / "metrics.csv", {"iteration": rows + 1, "success_rate": 1 / 3})
        rows += 1
except OSError as error:
    assert error.errno == 28
assert (disk / "metrics.csv").read_bytes().endswith(b"\\n")
assert len(read_metrics(disk / "metrics.csv")) == rows > 100
(disk / "metrics.csv").unlink()

sizes = [int(size) for size in sys.argv[2:]]
with local_ray():
    for number, size in enumerate(sizes):
        mount(size, "remount")
        try:
            if number:
                resume_sweep(disk / "small")
            else:
                run_sweep(load_experiment(folder / "small.yaml"), disk)
        except SweepError as error:
            print(error)
        shutil.copytree(disk / "small", folder / "out" / str(number))
"""


@pytest.mark.skipif(
    subprocess.run(["unshare", "-Urm", "true"], capture_output=True).returncode != 0,
    reason="needs a mount namespace of its own: user namespaces are switched off here",
)
def test_a_full_disk_stops_the_sweep_and_loses_nothing(tmp_path, finished):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").mkdir()
    shutil.copy(finished.parent / "small.yaml", tmp_path)
    child = subprocess.run(
        ["unshare", "-Urm", sys.executable, "-c", FULL_DISK, str(tmp_path), *map(str, SIZES)],
        capture_output=True,
        text=True,
        timeout=240,
        env={k: v for k, v in os.environ.items() if not k.startswith(ALONE)}
        | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert child.returncode == 0, child.stdout + child.stderr
    sweeps = child.stdout.split("6 trials")[1:]
    assert len(sweeps) == len(SIZES)
    for said in sweeps[:-1]:
        folder = tmp_path / "disk" / "small"
        assert said.splitlines()[-1] == (
            f"no space left on the disk of {folder}: make some, then `sgrl resume {folder}` goes on"
        )
        assert "again" not in said
        assert "failed" not in said
    assert "no space" not in sweeps[-1]

    whole = metrics_without_times(finished)
    experiment = load_experiment(finished / "experiment.yaml").resolved
    rows = []
    for directory in (tmp_path / "out" / str(number) for number in range(len(SIZES))):
        assert load_experiment(directory / "experiment.yaml").resolved == experiment
        found = metrics_without_times(directory)
        for name, lines in found.items():
            assert lines == whole[name][: len(lines)]
        rows.append(sum(map(len, found.values())))
        for path in directory.glob("*/status.json"):
            assert json.loads(path.read_text())["state"] in ("pending", "running", "completed")
        for trial in directory.glob("*/checkpoints"):
            assert all(verify(checkpoint) is None for checkpoint in list_checkpoints(trial))
    assert 0 < rows[0] < rows[1] < rows[2]
    assert found == whole
    assert set(summary(directory)["state"]) == {"completed"}
