"""Ten thousand trials, and fifty nodes that come and go: `make thousands`.

SGRL_TRIALS and SGRL_NODES make both smaller.
"""

import itertools
import os
import random
import subprocess
import sys
import time

import psutil
import pytest
from stand_ins import TWO, start, success_rates
from sweeps import CONFIG, make_experiment, summary
from worker_server import forked_workers, worker_server

from sgrl.results.folder import SweepFolder
from sgrl.results.metrics import read_metrics

pytestmark = pytest.mark.slow

SGRL = [sys.executable, "-c", "from sgrl.cli import main; main()"]
TRIALS = int(os.environ.get("SGRL_TRIALS", "10000"))
NODES = int(os.environ.get("SGRL_NODES", "50"))


@pytest.fixture(scope="module")
def report():
    """Lines that are printed when all is over."""
    lines = []
    yield lines
    print("", "Report", *(f"- {line}" for line in lines), sep="\n")


@pytest.fixture
def output(tmp_path):
    """What drivers say goes into a file: they say a line of each trial."""
    with (tmp_path / "output").open("w") as file:
        yield file


def times(log):
    """When each iteration ended, in order."""
    text = log.read_text() if log.exists() else ""
    return sorted(float(line) for line in text.splitlines())


def count_lines(log):
    return log.stat().st_size // len("1700000000.000000\n") if log.exists() else 0


def most_memory(driver, until):
    """Wait until a driver ends or `until()`; returns the most memory that it had."""
    process, most = psutil.Process(driver.pid), 0
    while driver.poll() is None and not until():
        try:
            most = max(most, process.memory_info().rss)
        except psutil.NoSuchProcess:
            break
        time.sleep(0.2)
    return most


def assert_none_lost(directory, experiment):
    """Every trial has the rows that it has without any sweep."""
    table = summary(directory)
    assert list(table.index) == [trial.name for trial in experiment.trials]
    assert set(table["state"]) == {"completed"}
    for trial in experiment.trials:
        rows = read_metrics(SweepFolder(directory).trial(trial.name).metrics)
        assert [row["success_rate"] for row in rows] == success_rates(trial)


def seconds_of(*words):
    begin = time.monotonic()
    subprocess.run([*SGRL, *map(str, words)], check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - begin


def many(path, trials, name):
    """A grid of trials of a millisecond."""
    rates = [round(1e-5 * 1.2**i, 9) for i in range(50)]
    return make_experiment(
        path,
        TWO,
        name=name,
        config=CONFIG | {"training": {"lr": {"grid": rates}}},
        seeds=f"0..{max(1, trials // 100) - 1}",
        stop={"training_iteration": 1},
        concurrency=2,
    )


def test_ten_thousand_trials(tmp_path, output, report):
    """Killed in the middle and resumed: none is lost, and none of them costs more than another."""
    log = tmp_path / "log"
    more = {"SGRL_STAND_IN_SECONDS": "0.001", "SGRL_STAND_IN_LOG": str(log)}
    many(tmp_path / "few.yaml", 100, "few")
    driver = start("sweep", tmp_path / "few.yaml", tmp_path, output=output, **more)
    before = most_memory(driver, lambda: False)
    assert driver.wait() == 0
    log.unlink()

    experiment = many(tmp_path / "many.yaml", TRIALS, "many")
    directory, count = tmp_path / "many", len(experiment.trials)
    driver = start("sweep", tmp_path / "many.yaml", tmp_path, output=output, **more)
    try:
        memory = most_memory(driver, lambda: count_lines(log) >= count // 2)
        assert driver.poll() is None, "it ended before it was killed"
    finally:
        driver.kill()
        driver.wait()
    first = times(log)
    log.unlink()
    assert summary(directory)["state"].eq("completed").sum() >= 0.5 * len(first)

    begin = time.time()
    driver = start("resume", directory, output=output, **more)
    try:
        memory = max(memory, most_memory(driver, lambda: False))
        assert driver.wait() == 0
    finally:
        driver.kill()
    second = times(log)
    assert_none_lost(directory, experiment)
    assert len(first) + len(second) <= count + 10, "trials that had ended were trained again"
    each = (first[-1] - first[0] + second[-1] - second[0]) / (len(first) + len(second))
    wait, grown = second[0] - begin, (memory - before) / 1e6
    status, page = seconds_of("status", directory), seconds_of("report", directory)
    report.append(
        f"{count} trials, killed after {len(first)} and resumed: none lost; driver memory grew by "
        f"{grown:.0f} MB (goal: 200), {each:.3f} s a trial (0.1), first trial {wait:.1f} s after "
        f"`resume` (30), `status` {status:.1f} s (30), `report` {page:.1f} s (180)"
    )
    assert grown <= 200
    assert each <= 0.1
    assert wait <= 30
    assert status <= 30
    assert page <= 180


def test_nodes_that_come_and_go(tmp_path, output, report):
    """A node lasts for some three minutes, is lost without notice, and a new one is there."""
    from ray.cluster_utils import Cluster

    seconds, iterations, waves = 2.0, 30, 4
    log, count = tmp_path / "log", NODES * waves
    experiment = make_experiment(
        tmp_path / "spot.yaml",
        {"gru": TWO["gru"]},
        name="spot",
        seeds=f"0..{count - 1}",
        stop={"training_iteration": iterations},
        checkpoint={"every": 1, "keep": 2},
        concurrency="auto",
        max_failures=20,
    )
    small = {"num_cpus": 1, "object_store_memory": 80_000_000, "include_dashboard": False}
    chance, alive, lost = random.Random(4), [], 0
    with worker_server(), forked_workers():
        cluster = Cluster(initialize_head=True, head_node_args=small | {"num_cpus": 0})
        try:
            nodes = [cluster.add_node(**small) for _ in range(NODES)]
            driver = start(
                *("sweep", tmp_path / "spot.yaml", tmp_path),
                output=output,
                RAY_ADDRESS=cluster.address,
                SGRL_STAND_IN_SECONDS=str(seconds),
                SGRL_STAND_IN_LOG=str(log),
            )
            try:
                # From the main thread only. The last trials leave slots empty whatever is done.
                while driver.poll() is None:
                    alive.append((time.time(), len(nodes)))
                    time.sleep(chance.uniform(100, 300) / NODES)
                    if count_lines(log) and driver.poll() is None:
                        node = nodes.pop(chance.randrange(len(nodes)))
                        cluster.remove_node(node, allow_graceful=False)
                        lost += 1
                        alive.append((time.time(), len(nodes)))
                        nodes.append(cluster.add_node(**small))
                assert driver.wait() == 0
            finally:
                driver.kill()
        finally:
            cluster.shutdown()
    assert_none_lost(tmp_path / "spot", experiment)
    ended = times(log)
    # From when all slots were first taken until there was too little left to take them all.
    begin, end = ended[min(NODES, len(ended)) - 1], ended[-1 - NODES * iterations]
    there = sum(
        held * max(0.0, min(later, end) - max(at, begin))
        for (at, held), (later, _) in itertools.pairwise(alive)
    )
    trained = seconds * sum(begin < at <= end for at in ended)
    again = len(ended) - count * iterations
    report.append(
        f"{count} trials of {seconds * iterations:.0f} s on {NODES} nodes, of which {lost} were "
        f"lost: none lost; slots {trained / there:.1%} busy (goal: 90%), {again} of {len(ended)} "
        "iterations trained a second time"
    )
    assert trained / there >= 0.9
