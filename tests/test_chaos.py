"""Sweeps under a random killer, and many trials: short here, long in `make chaos`.

Whatever is killed, every trial ends with the metrics of an undisturbed sweep.
"""

import contextlib
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest import mock

import psutil
import pytest
from network_hosts import network_hosts
from stand_ins import POPULATION, SEARCH, TWO, stand_in_runner, under_kills
from sweeps import METHODS, SPARSE, make_experiment, metrics_without_times, summary

from sgrl.results.metrics import count_rows, read_metrics
from sgrl.results.storage import Store
from sgrl.tuning import feed, fits, sweep
from sgrl.tuning.sweep import failed_trials, is_sweep, resume_sweep, run_sweep
from sgrl.tuning.trial import TrialRunner

SGRL = [sys.executable, "-c", "from sgrl.cli import main; main()"]
CHAOS_METHODS = {
    "gru": METHODS["gru"],
    "sparsenet_sgprop": METHODS["sparsenet_sgprop"],
    # Its environments run in a process of their own.
    "gru_runner": METHODS["gru"] | {"config": {"env_runners": {"num_env_runners": 1}}},
}


def own_processes():
    return psutil.Process().children(recursive=True)


def victims(processes):
    """Processes of trials at work among these, and of their environment runners, by kind."""
    found = {"trial": [], "worker": []}
    for process in processes:
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
    """Kills a process of a random kind, among those it is told of, every so many seconds."""

    def __init__(self, seed, seconds, processes=own_processes):
        self.random = random.Random(seed)
        self.seconds = seconds
        self.processes = processes
        self.killed = []

    def wait(self):
        time.sleep(self.random.uniform(*self.seconds))

    def strike(self):
        kinds = {kind: found for kind, found in victims(self.processes()).items() if found}
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
    killer, over = Killer(seed=0, seconds=(0.2, 0.6)), threading.Event()

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
                (self.folder.path / "times.json").write_text(json.dumps(self.times))
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
    """In three fits of Tune's, one after the other."""
    monkeypatch.setattr(feed, "FIT_PACKS", 15)
    monkeypatch.setattr(feed, "FIT_PACKS_EACH", 1)
    fit = mock.Mock(side_effect=fits._fit)
    monkeypatch.setattr(fits, "_fit", fit)
    print(run_many_trials(tmp_path, monkeypatch, 40, slots=2))
    assert fit.call_count == 3


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


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The large sweep as it is without anybody killing, on this machine alone."""
    folder = tmp_path_factory.mktemp("undisturbed")
    experiment = large_experiment(folder / "small.yaml", 8, 500)
    assert len(experiment.trials) == 24
    command = [*SGRL, "sweep", str(folder / "small.yaml"), "--results", str(folder)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_ADDRESS")}
    subprocess.run(command, env=environment, check=True)
    return folder / "small"


def sweep_under_attack(driver, killer, rows, lose_node, gain_node):
    """Until the driver ends kill trials and workers, and once, after a fifth, a node."""
    lost, enough = False, 0
    while driver.poll() is None:
        killer.wait()
        # Nodes come and go from the main thread only.
        if not lost and rows() > 24 * 500 / 5:
            lose_node()
            lost = True
            killer.killed.append("node")
            killer.wait()
            gain_node()
        # Not before there is something new to lose: a slow machine would only start trials.
        if rows() >= enough:
            killer.strike()
            enough = rows() + 200
    assert driver.returncode == 0
    counts = {kind: killer.killed.count(kind) for kind in ("trial", "worker", "node")}
    assert counts["node"] == 1
    assert min(counts.values()) > 0
    return counts


@pytest.mark.slow
def test_a_sweep_on_a_cluster_under_a_random_killer(tmp_path, undisturbed, report):
    from ray.cluster_utils import Cluster

    config = tmp_path / "small.yaml"
    large_experiment(config, 8, 500)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    nodes = [cluster.add_node(num_cpus=2) for _ in range(2)]
    command = [*SGRL, "sweep", str(config), "--results", str(tmp_path)]
    try:
        begin = time.monotonic()
        driver = subprocess.Popen(command, env=os.environ | {"RAY_ADDRESS": cluster.address})
        counts = sweep_under_attack(
            driver,
            Killer(seed=1, seconds=(4, 10)),
            lambda: rows(tmp_path / "small"),
            lambda: cluster.remove_node(nodes[0], allow_graceful=False),
            lambda: cluster.add_node(num_cpus=2),
        )
        seconds = time.monotonic() - begin
    finally:
        cluster.shutdown()
    assert_undisturbed(tmp_path / "small", undisturbed)
    report.append(
        f"24 trials on three nodes, killed {counts}: all complete and equal, {seconds:.0f} s"
    )


class Bucket:
    """An S3 server on a host."""

    def __init__(self, host, folder):
        self.environment = {
            "AWS_ENDPOINT_URL": f"http://{host.address}:5000",
            "AWS_ACCESS_KEY_ID": "a key",
            "AWS_SECRET_ACCESS_KEY": "a secret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        log = (folder / "s3.log").open("w")
        host.popen(sys.executable, "-m", "moto.server", "-H", host.address, stdout=log, stderr=log)
        make = "import fsspec; fsspec.filesystem('s3').mkdir('bucket')"
        deadline = time.monotonic() + 60
        while True:
            try:
                host.run(sys.executable, "-c", make, env=os.environ | self.environment)
                return
            except subprocess.CalledProcessError:
                assert time.monotonic() < deadline
                time.sleep(0.5)


@pytest.mark.slow
def test_a_sweep_on_hosts_under_a_random_killer(tmp_path, undisturbed, report):
    """Three hosts that share nothing but a bucket, and a token."""
    config = tmp_path / "small.yaml"
    large_experiment(config, 8, 500)
    with network_hosts(3) as hosts:
        bucket = Bucket(hosts[0], tmp_path)
        address = f"{hosts[0].address}:6379"
        common = {k: v for k, v in os.environ.items() if not k.startswith("RAY_ADDRESS")}
        common |= bucket.environment | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}
        common |= {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}

        def start_ray(i):
            role = ["--head", "--port=6379", "--include-dashboard=false"]
            words = role if i == 0 else [f"--address={address}"]
            hosts[i].popen(
                *(str(Path(sys.executable).with_name("ray")), "start", "--block", *words),
                *(f"--node-ip-address={hosts[i].address}", "--num-cpus=2"),
                f"--temp-dir=/tmp/sgrl-chaos-{os.getpid()}",
                env=common | {"SGRL_MIRROR_DIR": str(tmp_path / f"mirror{i}")},
                stdout=(tmp_path / f"ray{i}.log").open("a"),
                stderr=subprocess.STDOUT,
            )

        # One after the other: they share their files here, and Ray's would get in each other's way.
        for i in range(3):
            start_ray(i)
            wait_for_nodes(hosts[0], address, common, i + 1)
        begin = time.monotonic()
        driver = hosts[0].popen(
            *(*SGRL, "sweep", str(config), "--results", "s3://bucket/results"),
            env=common | {"RAY_ADDRESS": address, "SGRL_MIRROR_DIR": str(tmp_path / "driver")},
        )

        def seen():
            """Rows in the mirrors, of which those of trials that ended are the driver's alone."""
            counts = {}
            for path in tmp_path.glob("*/*/small/*/metrics.csv"):
                name = path.parent.name
                counts[name] = max(count_rows(path), counts.get(name, 0))
            return sum(counts.values())

        def processes():
            for process in (process for host in hosts for process in host.processes()):
                with contextlib.suppress(psutil.NoSuchProcess):
                    yield psutil.Process(process)

        counts = sweep_under_attack(
            driver,
            Killer(seed=3, seconds=(4, 10), processes=processes),
            seen,
            hosts[2].kill_all,
            lambda: start_ray(2),
        )
        seconds = time.monotonic() - begin
        copy = (
            "import shutil\nfrom sgrl.results.locations import reading\n"
            "with reading('s3://bucket/results/small') as folder:\n"
            f"    shutil.copytree(folder, {str(tmp_path / 'small')!r})"
        )
        hosts[0].run(sys.executable, "-c", copy, env=common)
    shutil.rmtree(f"/tmp/sgrl-chaos-{os.getpid()}", ignore_errors=True)
    assert_undisturbed(tmp_path / "small", undisturbed)
    report.append(
        f"24 trials on three hosts with results in a bucket, killed {counts}: all complete and "
        f"equal, {seconds:.0f} s"
    )


def wait_for_nodes(host, address, environment, count):
    look = (
        "import sys, ray; ray.init(log_to_driver=False, logging_level='ERROR'); "
        f"sys.exit(sum(node['Alive'] for node in ray.nodes()) < {count})"
    )
    deadline = time.monotonic() + 180
    while True:
        done = subprocess.run(
            host.command(sys.executable, "-c", look),
            env=environment | {"RAY_ADDRESS": address},
            check=False,
            capture_output=True,
            timeout=120,
        )
        if done.returncode == 0:
            return
        assert time.monotonic() < deadline, done.stderr.decode()[-2000:]
        time.sleep(1)


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
    """Trials of a minute and more: wall time is at most 1.15 times their compute over the slots."""
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
        stop={"training_iteration": int(90 / pace)},
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


DECIDING = {
    "search": SEARCH,
    "halving": SEARCH | {"schedule": {"name": "asha", "grace_period": 2, "every": 2}},
    "population": POPULATION,
    "race": {"seeds": "0..19", "schedule": {"name": "race", "first": 4}},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", DECIDING)
def test_ten_kills_where_results_decide(tmp_path, ray_session, report, monkeypatch, name):
    """Killed at ten moments, spread over all its rows, whatever it was doing."""
    config, changes = tmp_path / "small.yaml", DECIDING[name] | {"name": name}
    experiment = make_experiment(config, TWO, **changes)
    monkeypatch.setattr(sweep, "TrialRunner", stand_in_runner())
    whole = run_sweep(experiment, tmp_path, "whole")
    most, moments = rows(whole), random.Random(3)
    after = sorted(moments.randrange(1, most * 9 // 10) for _ in range(10))
    killed = under_kills(config, tmp_path, name, after)
    resume_sweep(killed)
    for file in (
        "rounds.json",
        *(path.relative_to(whole) for path in whole.glob("*/origins.json")),
    ):
        assert (killed / file).read_bytes() == (whole / file).read_bytes()
    assert metrics_without_times(killed) == metrics_without_times(whole)
    columns = ["state", "iterations", "final_success_rate", "auc", "reason"]
    assert summary(killed)[columns].equals(summary(whole)[columns])
    report.append(f"{name} killed ten times, after {after} of {most} rows: the same decisions")
