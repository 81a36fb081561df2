"""Sweeps on a cluster, and what a sweep on this machine lets others reach."""

import ipaddress
import os
import subprocess
import sys
import time

import gymnasium as gym
import psutil
import pytest
import ray
import yaml
from sweeps import CONFIG, METHODS, make_experiment
from typer.testing import CliRunner

from sgrl.cli import app
from sgrl.results.mirror import Mirror
from sgrl.results.storage import Store
from sgrl.tuning import client, cluster, sweep

EXPERIMENT = {
    "name": "small",
    "config": CONFIG,
    "methods": {"gru": METHODS["gru"]},
    "stop": {"training_iteration": 3},
}
SWEEP = [sys.executable, "-c", "from sgrl.cli import main; main()", "sweep"]


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
        time.sleep(0.5)
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
        (
            "/results",
            "no sweep on the Ray cluster at ray://127.0.0.1:1: [Errno 111] Connection refused",
        ),
    ],
)
def test_a_client_that_cannot(results, reason, experiment, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    arguments = ["sweep", str(experiment), "--results", results, "--address", "ray://127.0.0.1:1"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    (line,) = result.output.splitlines()
    assert line.startswith(f"sgrl: {reason}")


def test_a_client_that_the_cluster_fails_to_serve_tries_again(monkeypatch):
    tried = []

    def fail(address, **options):
        tried.append(address)
        raise ConnectionAbortedError("Initialization failure from server:\nRuntimeError: forked")

    monkeypatch.setattr(ray, "init", fail)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr(client, "reach", lambda address: None)
    with pytest.raises(client.ClientError, match=r"at ray://h:1: RuntimeError: forked$"):
        client.run_on_cluster("ray://h:1", ["status", "/x"], "/x")
    assert len(tried) == client.CONNECT_ATTEMPTS


def test_every_machine_must_see_the_results(ray_session, tmp_path, monkeypatch):
    (tmp_path / "experiment.yaml").write_text("name: small")
    (node,) = ray.nodes()
    monkeypatch.setattr(ray, "nodes", lambda: [node, node])
    cluster.check_visible(Store(tmp_path))
    monkeypatch.setattr(cluster, "look", lambda location: (None, ""))
    with pytest.raises(sweep.SweepError, match=f"is not there on {node['NodeManagerAddress']}: "):
        cluster.check_visible(Store(tmp_path))
    # What is only in this process's memory is nowhere else.
    (tmp_path / "mirror").mkdir()
    (tmp_path / "mirror" / "experiment.yaml").write_text("name: small")
    with pytest.raises(sweep.SweepError, match=r"memory://small cannot be read on .*: other mach"):
        cluster.check_visible(Mirror("memory://small", tmp_path / "mirror"))


MODULE = """
import gymnasium as gym
gym.register("Mine-v0", entry_point="gymnasium.envs.classic_control:CartPoleEnv",
             max_episode_steps=7)
"""


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    """An experiment whose environment comes from a package in the current folder."""
    (tmp_path / "own_envs").mkdir()
    (tmp_path / "own_envs" / "__init__.py").write_text("")
    (tmp_path / "own_envs" / "poles.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    config = {"environment": {"env": "own_envs.poles:Mine-v0"}}
    yield make_experiment(tmp_path / "own.yaml", ("gru",), config=config)
    gym.registry.pop("Mine-v0", None)
    for name in ("own_envs", "own_envs.poles"):
        del sys.modules[name]


def test_every_machine_must_have_the_users_modules(ray_session, own_module, monkeypatch):
    (node,) = ray.nodes()
    monkeypatch.setattr(ray, "nodes", lambda: [node, node])
    # This Ray was started in another folder, so its workers do not find the package.
    refused = r"^the user's code cannot be imported on .*: no module named 'own_envs.poles': "
    with pytest.raises(sweep.SweepError, match=refused):
        cluster.check_modules(own_module)
    monkeypatch.setattr(cluster, "try_import", lambda modules: "")
    cluster.check_modules(own_module)


def test_a_cluster_gets_the_users_modules(own_module, tmp_path, monkeypatch):
    """Of the driver on the cluster through Ray's runtime environment; from outside as files."""
    asked = []
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(cluster, "reach", lambda address: None)
    monkeypatch.setattr(ray, "init", lambda **options: asked.append(options["runtime_env"]))
    cluster.start_ray(own_module)
    assert asked == [{"py_modules": [str(tmp_path / "own_envs")]}]

    sent = {}
    monkeypatch.setattr(client, "run_on_cluster", lambda *given: sent.update(given[3]) or 0)
    arguments = ["sweep", "own.yaml", "--results", "/r", "--address", "ray://10.0.0.1:10001"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert set(sent) == {"own.yaml", "own_envs/__init__.py", "own_envs/poles.py"}
    assert sent["own_envs/poles.py"] == MODULE
