"""Sweeps on a cluster, and what a sweep on this machine lets others reach."""

import ipaddress
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import ray
import yaml
from network_hosts import network_hosts
from sweeps import metrics_without_times
from typer.testing import CliRunner

from sgrl.cli import app
from sgrl.tuning import sweep
from sgrl.tuning.experiment import load_experiment
from sgrl.tuning.metrics import count_rows
from sgrl.tuning.storage import Mirror, Store
from sgrl.tuning.sweep import run_sweep

EXPERIMENT = {
    "name": "small",
    "config": {
        "environment": {
            "env": "labyrinth_escape",
            "env_config": {"maze_dims": [6, 6], "episode_length": 10},
        },
        "env_runners": {"num_envs_per_env_runner": 4},
    },
    "methods": {"gru": {"model": {"policy": "gru", "hidden_size": 8}}},
    "stop": {"training_iteration": 3},
}
SGRL = [sys.executable, "-c", "from sgrl.cli import main; main()"]
SWEEP = [*SGRL, "sweep"]


@pytest.fixture
def experiment(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(EXPERIMENT))
    return path


def environment(**more):
    return {k: v for k, v in os.environ.items() if not k.startswith("RAY_ADDRESS")} | more


def listening(process):
    """Addresses that a process and all below it listen on."""
    found = set()
    for one in [process, *process.children(recursive=True)]:
        try:
            connections = one.net_connections(kind="inet")
        except psutil.Error:
            continue
        found |= {(one.pid, c.laddr) for c in connections if c.status == psutil.CONN_LISTEN}
    return found


def test_a_local_sweep_listens_on_loopback_only(experiment, tmp_path):
    command = [*SWEEP, str(experiment), "--results", str(tmp_path)]
    running = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL)
    process, found = psutil.Process(running.pid), set()
    while running.poll() is None:
        found |= listening(process)
        time.sleep(0.1)
    assert running.returncode == 0
    assert len({pid for pid, _ in found}) >= 4  # driver, two servers of Ray's, a worker
    for _, address in found:
        ip = ipaddress.ip_address(address.ip)
        assert (getattr(ip, "ipv4_mapped", None) or ip).is_loopback, address


def test_no_cluster_at_the_address(experiment, tmp_path):
    command = [*SWEEP, str(experiment), "--results", str(tmp_path), "--address", "127.0.0.1:1"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("sgrl: no Ray cluster at 127.0.0.1:1 (")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "small").exists()


@pytest.mark.parametrize(
    ("results", "reason"),
    [
        ("results", "results would be a folder on another machine: give one from the root, as in"),
        ("/results", "no sweep on the Ray cluster at ray://127.0.0.1:1: ConnectionRefusedError"),
    ],
)
def test_a_client_that_cannot(results, reason, experiment, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    arguments = ["sweep", str(experiment), "--results", results, "--address", "ray://127.0.0.1:1"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    (line,) = result.output.splitlines()
    assert line.startswith(f"sgrl: {reason}")


def test_a_sweep_from_outside_the_cluster(experiment, tmp_path, ray_session):
    """Started, stopped by Ctrl-C and resumed by one host, on a Ray of another one."""
    pytest.importorskip("grpc")
    results = tmp_path / "results"
    with network_hosts(2) as (head, client):
        common = environment(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="0" * 64, OMP_NUM_THREADS="1")
        folder = f"/tmp/sgrl-client-{os.getpid()}"
        head.popen(
            *(str(Path(sys.executable).with_name("ray")), "start", "--head", "--block"),
            *(f"--node-ip-address={head.address}", "--port=6379", "--num-cpus=1"),
            *("--include-dashboard=false", "--ray-client-server-port=10001"),
            *("--min-worker-port=0", "--max-worker-port=0", f"--temp-dir={folder}"),
            env=common,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        address = ["--address", f"ray://{head.address}:10001"]
        connect = f"import socket; socket.create_connection(({head.address!r}, 10001))"
        while subprocess.run(
            client.command(sys.executable, "-c", connect), check=False, stderr=subprocess.DEVNULL
        ).returncode:
            time.sleep(0.5)

        def start(*words):
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            return client.popen(*SGRL, *words, *address, env=common, cwd=tmp_path, **pipes)

        sweep = start(
            *("sweep", experiment.name, "--results", str(results)),
            *("--set", "stop.training_iteration=1000"),
        )
        while count_rows(results / "small/gru_seed=0/metrics.csv") < 100:
            assert sweep.poll() is None, sweep.communicate()
            time.sleep(0.1)
        sweep.send_signal(signal.SIGINT)
        out, error = sweep.communicate()
        assert sweep.returncode == 130, out + error
        assert f"sgrl: interrupted; go on with: sgrl resume {results}/small" in out
        assert (done := count_rows(results / "small/gru_seed=0/metrics.csv")) < 1000
        resume = start("resume", str(results / "small"))
        out, error = resume.communicate()
        assert resume.returncode == 0, error
        assert "[1/1] gru_seed=0 completed at iteration 1000" in out
        assert f"written: {results}/small/comparison.csv" in out
    shutil.rmtree(folder, ignore_errors=True)
    assert done > 0
    whole = run_sweep(load_experiment(results / "small/experiment.yaml"), tmp_path, "whole")
    assert metrics_without_times(results / "small") == metrics_without_times(whole)


def test_every_machine_must_see_the_results(ray_session, tmp_path, monkeypatch):
    (tmp_path / sweep.EXPERIMENT_FILE).write_text("name: small")
    (node,) = ray.nodes()
    monkeypatch.setattr(ray, "nodes", lambda: [node, node])
    sweep._check_visible(Store(tmp_path))
    monkeypatch.setattr(sweep, "_look", lambda location: (None, ""))
    with pytest.raises(sweep.SweepError, match=f"is not there on {node['NodeManagerAddress']}: "):
        sweep._check_visible(Store(tmp_path))
    # What is only in this process's memory is nowhere else.
    (tmp_path / "mirror").mkdir()
    (tmp_path / "mirror" / sweep.EXPERIMENT_FILE).write_text("name: small")
    with pytest.raises(sweep.SweepError, match=r"memory://small cannot be read on .*: other mach"):
        sweep._check_visible(Mirror("memory://small", tmp_path / "mirror"))
