"""Sweeps under a random killer, and many trials: short here, long in `make chaos`.

Whatever is killed, every trial ends with the metrics of an undisturbed sweep.
"""

import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import threading
import time

import psutil
import pytest
from sweeps import METHODS, SPARSE, make_experiment, metrics_without_times, summary

from sgrl.tuning import sweep
from sgrl.tuning.metrics import count_rows, read_metrics
from sgrl.tuning.storage import Store
from sgrl.tuning.sweep import failed_trials, is_sweep, resume_sweep, run_sweep
from sgrl.tuning.trial import TrialRunner

SGRL = [sys.executable, "-c", "from sgrl.cli import main; main()"]
CHAOS_METHODS = {
    "gru": METHODS["gru"],
    "sparsenet_sgprop": METHODS["sparsenet_sgprop"],
    # Its environments run in a process of their own.
    "gru_runner": METHODS["gru"] | {"config": {"env_runners": {"num_env_runners": 1}}},
}


def victims():
    """Processes of trials at work below this one, and of their environment runners, by kind."""
    found = {"trial": [], "worker": []}
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            title = process.cmdline()[0]
            if title.startswith("ray::EpisodeRunner"):
                found["worker"].append(process)
            elif title.startswith("ray::") and any(
                file.path.endswith("/.lock") for file in process.open_files()
            ):
                found["trial"].append(process)
    return found


class Killer:
    """Kills a process of a random kind every so many seconds."""

    def __init__(self, seed, seconds):
        self.random = random.Random(seed)
        self.seconds = seconds
        self.killed = []

    def wait(self):
        time.sleep(self.random.uniform(*self.seconds))

    def strike(self):
        kinds = {kind: found for kind, found in victims().items() if found}
        if kinds:
            kind = self.random.choice(sorted(kinds))
            victim = self.random.choice(sorted(kinds[kind], key=lambda process: process.pid))
            with contextlib.suppress(psutil.NoSuchProcess):
                victim.kill()
                self.killed.append(kind)


def assert_undisturbed(directory, whole):
    assert metrics_without_times(directory) == metrics_without_times(whole)
    assert set(summary(directory)["state"]) == {"completed"}
    columns = ["state", "iterations", "final_success_rate", "auc"]
    assert summary(directory)[columns].equals(summary(whole)[columns])


def test_a_sweep_under_a_random_killer(tmp_path, ray_session):
    methods = CHAOS_METHODS | {
        "lstm": {"model": {"policy": "lstm", "hidden_size": 8}},
        "mlp": {"model": {"policy": "mlp", "hidden_size": 8}},
        "sparsenet_backprop": {"model": {"policy": "sparsenet", "propagation": "backprop"}},
    }
    changes = {"stop": {"training_iteration": 90}, "checkpoint": {"every": 20, "keep": 2}}
    changes |= {"seeds": [0], "max_failures": 3}
    experiment = make_experiment(tmp_path / "small.yaml", methods, **changes)
    assert len(experiment.trials) == 6
    whole = run_sweep(experiment, tmp_path, "whole")
    experiment = make_experiment(tmp_path / "small.yaml", methods, **changes, concurrency=2)
    killer, over = Killer(seed=0, seconds=(0.5, 1.5)), threading.Event()

    def kill():
        while len(killer.killed) < 3 and not over.is_set():
            killer.wait()
            killer.strike()

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        directory = run_sweep(experiment, tmp_path, "killed")
    finally:
        over.set()
        thread.join()
    assert len(killer.killed) == 3
    assert_undisturbed(directory, whole)


def kill_driver(folder, directory, config, seconds, further):
    """Start or go on with a sweep in a process of its own, and kill that after `seconds`, from
    its start or, if it is to get `further`, from its first iteration beyond what was done."""
    done = rows(directory)
    start = (
        ["resume", directory]
        if is_sweep(Store(directory))
        else ["sweep", config, "--results", folder]
    )
    driver = subprocess.Popen(
        [*SGRL, *map(str, start)],
        # Ray must not find the one of these tests.
        env={k: v for k, v in os.environ.items() if not k.startswith("RAY_ADDRESS")},
    )
    try:
        while further and rows(directory) <= done and driver.poll() is None:
            time.sleep(0.1)
        time.sleep(seconds)
        assert driver.poll() is None, "it ended before it was killed"
    finally:
        driver.kill()
        driver.wait()


def rows(directory):
    return sum(count_rows(path) for path in directory.glob("*/metrics.csv"))


def timed_runner():
    """Trials that leave in times.json what their time went into, in seconds."""

    class Timed(TrialRunner):
        def setup(self, config):
            super().setup(config)
            self.times = {"start": 0.0, "train": 0.0, "step": 0.0}

        def _measured(self, name, function):
            begin = time.perf_counter()
            try:
                return function()
            finally:
                self.times[name] += time.perf_counter() - begin

        def _start(self):
            self._measured("start", super()._start)

        def _train_once(self):
            return self._measured("train", super()._train_once)

        def step(self):
            result = self._measured("step", super().step)
            if result["done"]:
                (self.directory / "times.json").write_text(json.dumps(self.times))
            return result

    return Timed


def run_many_trials(tmp_path, monkeypatch, count, slots):
    """A sweep of short trials; returns the driver's memory and each trial's overhead in words."""
    experiment = make_experiment(
        tmp_path / "many.yaml",
        ("gru",),
        seeds=list(range(count)),
        stop={"training_iteration": 2},
        concurrency=slots,
    )
    monkeypatch.setattr(sweep, "TrialRunner", timed_runner())
    driver, memory, over = psutil.Process(), [], threading.Event()
    memory.append(driver.memory_info().rss)

    def watch():
        while not over.wait(0.2):
            memory.append(driver.memory_info().rss)

    thread = threading.Thread(target=watch)
    thread.start()
    begin = time.perf_counter()
    try:
        directory = run_sweep(experiment, tmp_path)
    finally:
        over.set()
        thread.join()
    wall = time.perf_counter() - begin

    table = summary(directory)
    assert list(table.index) == [f"gru_seed={seed}" for seed in range(count)]
    assert set(table["state"]) == {"completed"}
    assert set(table["iterations"]) == {2}
    metrics = metrics_without_times(directory)
    assert len({tuple(lines) for lines in metrics.values()}) == len(metrics) == count
    times = [json.loads(path.read_text()) for path in directory.glob("*/times.json")]
    assert len(times) == count
    start, train, step = (
        statistics.fmean(each[name] for each in times) for name in ("start", "train", "step")
    )
    return (
        f"{count} trials on {slots} slots in {wall:.0f} s; driver memory "
        f"{memory[0] / 1e6:.0f} MB before, {max(memory) / 1e6:.0f} MB at most; each trial: "
        f"training {train:.3f} s, start-up {start:.3f} s, writing {step - start - train:.3f} s, "
        f"scheduling (with Ray's processes) {wall * slots / count - step:.3f} s"
    )


def test_many_short_trials(tmp_path, ray_session, monkeypatch):
    print(run_many_trials(tmp_path, monkeypatch, 40, slots=2))


# The long ones: `make chaos` -------------------------------------------------------------------


def large_experiment(path, seeds, iterations, **changes):
    """Trials of some seconds each, with checkpoints every second or so."""
    return make_experiment(
        path,
        CHAOS_METHODS,
        seeds=list(range(seeds)),
        stop={"training_iteration": iterations},
        checkpoint={"every": 50, "keep": 2},
        concurrency="auto",
        max_failures=20,
        **changes,
    )


@pytest.fixture(scope="module")
def report():
    """Lines that are printed when all is over."""
    lines = []
    yield lines
    print("", "Report", *(f"- {line}" for line in lines), sep="\n")


@pytest.mark.slow
def test_a_sweep_on_a_cluster_under_a_random_killer(tmp_path, report):
    from ray.cluster_utils import Cluster

    config = tmp_path / "small.yaml"
    assert len(large_experiment(config, 8, 500).trials) == 24
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    nodes = [cluster.add_node(num_cpus=2) for _ in range(2)]
    command = [*SGRL, "sweep", str(config), "--results", str(tmp_path), "--name"]
    environment = os.environ | {"RAY_ADDRESS": cluster.address}
    try:
        begin = time.monotonic()
        subprocess.run([*command, "whole"], env=environment, check=True, timeout=1800)
        undisturbed = time.monotonic() - begin
        killer, directory = Killer(seed=1, seconds=(4, 10)), tmp_path / "killed"
        driver = subprocess.Popen([*command, "killed"], env=environment)
        begin, enough = time.monotonic(), 0
        while driver.poll() is None:
            killer.wait()
            # Nodes come and go from the main thread only.
            if nodes and rows(directory) > 24 * 500 / 5:
                cluster.remove_node(nodes.pop(0), allow_graceful=False)
                nodes = []
                killer.killed.append("node")
                killer.wait()
                cluster.add_node(num_cpus=2)
            # Not before there is something new to lose: a slow machine would only start trials.
            if rows(directory) >= enough:
                killer.strike()
                enough = rows(directory) + 200
        disturbed = time.monotonic() - begin
        assert driver.returncode == 0
    finally:
        cluster.shutdown()
    assert killer.killed.count("node") == 1
    assert {"trial", "worker"} <= set(killer.killed)
    assert_undisturbed(directory, tmp_path / "whole")
    counts = {kind: killer.killed.count(kind) for kind in ("trial", "worker", "node")}
    report.append(
        f"24 trials on three nodes, killed {counts}: all complete and equal, "
        f"{disturbed:.0f} s (undisturbed {undisturbed:.0f} s)"
    )


@pytest.mark.slow
def test_ten_kills_of_the_driver(tmp_path, ray_session, report):
    config, directory = tmp_path / "small.yaml", tmp_path / "small"
    experiment = large_experiment(config, 2, 1500)
    moments, after = random.Random(2), []
    for kill in range(10):
        # Every third one while it starts.
        further = kill % 3 > 0
        kill_driver(tmp_path, directory, config, moments.uniform(0, 5 if further else 20), further)
        after.append(rows(directory))
    assert 0 < after[-1] < 6 * 1500
    resume_sweep(directory)
    assert_undisturbed(directory, run_sweep(experiment, tmp_path, "whole"))
    report.append(f"driver killed ten times, after {after} iterations: all complete and equal")


@pytest.mark.slow
def test_five_hundred_short_trials(tmp_path, ray_session, monkeypatch, report):
    report.append(run_many_trials(tmp_path, monkeypatch, 500, slots=2))


@pytest.mark.slow
def test_every_slot_is_kept_busy(tmp_path, ray_session, report):
    """Trials of a minute: the wall time is at most 1.15 times their compute over the slots."""
    model = {"policy": "sparsenet", "num_input_neurons": 4, "adaptive": True, **SPARSE}
    methods = {"sparsenet_sgprop": {"model": model}}
    path = tmp_path / "long.yaml"
    experiment = make_experiment(path, methods, seeds=[0], stop={"training_iteration": 200})
    trial = run_sweep(experiment, tmp_path, "pace") / "sparsenet_sgprop_seed=0"
    pace = statistics.median(
        row["iteration_seconds"] for row in read_metrics(trial / "metrics.csv")
    )
    experiment = make_experiment(
        path,
        methods,
        seeds=[0, 1, 2, 3, 4, 5],
        stop={"training_iteration": int(75 / pace)},
        checkpoint={"every": int(15 / pace), "keep": 2},
        concurrency=2,
    )
    begin = time.perf_counter()
    directory = run_sweep(experiment, tmp_path, "long")
    wall = time.perf_counter() - begin
    compute = [
        sum(row["iteration_seconds"] for row in read_metrics(path))
        for path in directory.glob("*/metrics.csv")
    ]
    assert min(compute) >= 60
    ratio = wall / (sum(compute) / 2)
    report.append(
        f"{len(compute)} trials of {min(compute):.0f} to {max(compute):.0f} s on two "
        f"slots: wall time {wall:.0f} s, {ratio:.3f} of their compute over the slots"
    )
    assert ratio <= 1.15
    assert failed_trials(directory) == []
