"""The files in cluster/: valid where they can be checked, run where they can be run."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from network_hosts import Host, network_hosts
from sweeps import CONFIG, METHODS

from sgrl.results.metrics import COLUMNS, count_rows
from sgrl.tuning.experiment.load import load_experiment
from sgrl.tuning.sweep import run_sweep

ROOT = Path(__file__).parent.parent
CLUSTER = ROOT / "cluster"
BIN = Path(sys.executable).parent
RAY_UP = ["onprem", "aws", "gcp"]


# `ray up`


@pytest.mark.parametrize("name", RAY_UP)
def test_ray_up_files_are_valid(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `ray up` itself does to a file before it asks the cloud for anything."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(yaml.safe_load((CLUSTER / f"{name}.yaml").read_text()))
    validate_config(config)
    for remote, local in config["file_mounts"].items():
        assert remote.startswith("~/")
        assert local.startswith("~/") or (ROOT / local).exists(), local
    # What pip needs to build the package on the other side.
    assert {"~/sgrl/sgrl", "~/sgrl/pyproject.toml", "~/sgrl/constraints.txt"} <= set(
        config["file_mounts"]
    )
    assert "~/.ray/auth_token" in config["file_mounts"]
    with pytest.raises(Exception, match="Additional properties are not allowed"):
        validate_config({**config, "max_worker": 2})


@pytest.mark.parametrize("name", RAY_UP)
def test_ray_up_commands(name: str) -> None:
    """Valid shell, token authentication on every node, and no dashboard beyond loopback."""
    config = yaml.safe_load((CLUSTER / f"{name}.yaml").read_text())
    for key in ("setup_commands", "head_start_ray_commands", "worker_start_ray_commands"):
        for command in config[key]:
            subprocess.run(["bash", "-n", "-c", command], check=True)
            if "ray start" in command:
                assert "RAY_AUTH_MODE=token" in command
                check_ray_start(command)
    heads = [line for line in config["head_start_ray_commands"] if "ray start" in line]
    assert len(heads) == 1
    assert "--head" in heads[0]
    assert "--dashboard-host=127.0.0.1" in heads[0]


@pytest.mark.parametrize("name", ["aws", "gcp"])
def test_cloud_workers_are_preemptible(name: str) -> None:
    config = yaml.safe_load((CLUSTER / f"{name}.yaml").read_text())
    head, worker = (
        config["available_node_types"][key]["node_config"] for key in ("head", "worker")
    )
    if name == "aws":
        assert worker["InstanceMarketOptions"] == {"MarketType": "spot"}
        assert "InstanceMarketOptions" not in head
    else:
        assert worker["scheduling"][0]["preemptible"]
        assert "scheduling" not in head
    assert config["idle_timeout_minutes"] <= 15


def check_ray_start(command: str) -> None:
    """Every option of a `ray start` line is one that Ray has."""
    from ray.scripts.scripts import start

    known = {name for parameter in start.params for name in parameter.opts}
    options = re.findall(r"(--[a-z-]+)", command.split("ray start", 1)[1])
    assert options
    assert set(options) <= known


@pytest.mark.parametrize("path", sorted(CLUSTER.rglob("*.*")), ids=lambda path: path.name)
def test_files_hold_no_names_and_no_secrets(path: Path) -> None:
    """Whatever belongs to a site says CHANGE_ME, and addresses are loopback."""
    text = path.read_text()
    for address in re.findall(r"\b\d+\.\d+\.\d+\.\d+\b", text):
        assert address in ("127.0.0.1", "0.0.0.0"), address
    for bucket in re.findall(r"(?:s3|gs)://(\w+)", text):
        assert bucket.startswith("CHANGE_ME"), bucket
    assert max(map(len, text.splitlines())) <= 140


# Plain `ray start` lines


def test_lines_of_the_readme(tmp_path: Path, ray_session: None) -> None:
    """They make one cluster of two hosts, which turns away who lacks the token; a third one runs
    a sweep on it, stops that by Ctrl-C and resumes it."""
    text = (CLUSTER / "README.md").read_text()
    blocks = re.findall(r"^```\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    assert len(blocks) == 3
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    # One home for both hosts is as good as a copied token. Files apart from those of other Rays.
    environment |= {"HOME": str(tmp_path), "PATH": f"{BIN}:{environment['PATH']}"}
    environment |= {"RAY_worker_niceness": "0"}  # conftest.py
    folder = f"/tmp/sgrl-lines-{os.getpid()}"
    few = f" --num-cpus=1 --object-store-memory=100000000 --temp-dir={folder}"
    few += " --include-log-monitor=false"
    with network_hosts(3) as hosts:
        head = f"{hosts[0].address}:6379"
        for host, block in zip(hosts[:2], blocks[:2], strict=True):
            lines = block.replace("HEAD", hosts[0].address).splitlines()
            check_ray_start(lines[-1])
            lines[-1] += few
            host.run("bash", "-euc", "\n".join(lines), env=environment)
        count = "import ray; ray.init(address='auto'); print(len(ray.nodes()))"
        trusted = environment | {"RAY_AUTH_MODE": "token", "RAY_ADDRESS": head}
        done = hosts[0].run(sys.executable, "-c", count, env=trusted)
        assert done.stdout.split()[-1] == "2"
        stranger = trusted | {"RAY_AUTH_TOKEN": "0" * 64}
        with pytest.raises(subprocess.CalledProcessError) as refused:
            hosts[1].run("ray", "health-check", "--address", head, env=stranger)
        assert "auth" in refused.value.stderr.lower()
        listening = [line.split()[3] for line in hosts[0].run("ss", "-ltnH").stdout.splitlines()]
        dashboards = [address for address in listening if address.endswith(":8265")]
        assert all(address == "127.0.0.1:8265" for address in dashboards)

        results = tmp_path / "results"
        config = write_experiment(
            tmp_path / "quickstart.yaml",
            methods={"gru": EXPERIMENT["methods"]["gru"]},
            stop={"training_iteration": 500},
        )
        lines = blocks[2].replace("HEAD", hosts[0].address).replace("/shared/results", str(results))
        token, *commands = lines.replace("tune_configs/quickstart.yaml", str(config)).splitlines()

        def start(command: str) -> subprocess.Popen:
            command = command.replace("quickstart ", "small ")  # the experiment's name
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            return hosts[2].popen(
                "bash", "-euc", f"{token}; exec {command}", env=environment, **pipes
            )

        def rows() -> int:
            return count_rows(results / "small/gru_seed=0/metrics.csv")

        sweep = start(commands[0])
        wait_until(lambda: rows() >= 40 or sweep.poll() is not None)
        sweep.send_signal(signal.SIGINT)
        out, error = sweep.communicate()
        assert sweep.returncode == 130, out + error
        assert f"sgrl: interrupted; go on with: sgrl resume {results}/small" in out
        assert 40 <= rows() < 500
        resume = start(commands[1])
        out, error = resume.communicate()
        assert resume.returncode == 0, out + error
        assert "[1/1] gru_seed=0 completed at iteration 500" in out
        assert f"written: {results}/small/comparison.csv" in out
    undisturbed = metrics(run_sweep(load_experiment(config), tmp_path / "undisturbed"))
    assert metrics(results / "small") == undisturbed
    shutil.rmtree(folder, ignore_errors=True)


# SLURM: the script runs for real; srun and scontrol are stand-ins that know two hosts.

SRUN = """#!/usr/bin/env python3
# Runs the command once on every host, and hands a SIGTERM on to all of them, as srun does.
import os, signal, subprocess, sys
words = sys.argv[1:]
while words[0].startswith("--"):
    words.pop(0)
tasks = [
    subprocess.Popen(
        ["ip", "netns", "exec", host, *words], env=os.environ | {"SLURM_NODEID": str(i)}
    )
    for i, host in enumerate(os.environ["STUB_HOSTS"].split())
]
signal.signal(signal.SIGTERM, lambda *_: [task.terminate() for task in tasks])
sys.exit(max(abs(task.wait()) for task in tasks))
"""
SCONTROL = """#!/usr/bin/env bash
echo "$@" >> "$STUB_LOG"
"""

EXPERIMENT = {
    "name": "small",
    "config": CONFIG,
    "methods": {name: METHODS[name] for name in ("gru", "sparsenet_sgprop")},
    "seeds": [0],
    "stop": {"training_iteration": 6},
    "checkpoint": {"every": 2, "keep": 2},
}


class Slurm:
    """A SLURM of two hosts: `submit` runs a script as `sbatch` would on the first of them."""

    def __init__(self, hosts: list[Host], folder: Path) -> None:
        self.hosts, self.folder = hosts, folder
        self.log = folder / "scontrol.log"
        stubs = folder / "stubs"
        stubs.mkdir()
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
            (stubs / name).write_text(text)
            (stubs / name).chmod(0o755)
        self.environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith("RAY_")},
            "PATH": f"{stubs}:{BIN}:{os.environ['PATH']}",
            "STUB_LOG": str(self.log),
            "STUB_HOSTS": " ".join(host.name for host in hosts),
            "SLURM_SUBMIT_DIR": str(ROOT),
            "SLURM_JOB_ID": str(os.getpid()),
            "SLURM_JOB_NUM_NODES": str(len(hosts)),
            "SLURM_CPUS_PER_TASK": "1",
        }

    def submit(self, script: str, *arguments: str) -> subprocess.Popen:
        return self.hosts[0].popen(
            "bash",
            str(CLUSTER / script),
            *arguments,
            env=self.environment,
            stdout=(self.folder / "job.log").open("a"),
            stderr=subprocess.STDOUT,
        )

    def output(self) -> str:
        return (self.folder / "job.log").read_text()


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[Slurm]:
    with network_hosts(2) as hosts:
        yield Slurm(hosts, tmp_path)


def write_experiment(path: Path, **changes: object) -> Path:
    path.write_text(yaml.safe_dump({**EXPERIMENT, **changes}, sort_keys=False))
    return path


def metrics(directory: Path) -> dict[str, list[bytes]]:
    """Each trial's metrics.csv without its last column, the seconds."""
    assert COLUMNS[-1] == "iteration_seconds"
    return {
        path.parent.name: [line.rsplit(b",", 1)[0] for line in path.read_bytes().splitlines()]
        for path in directory.glob("*/metrics.csv")
    }


def wait_until(condition: Callable[[], bool], seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_slurm_runs_a_sweep_on_two_nodes(slurm: Slurm, tmp_path: Path) -> None:
    config = write_experiment(tmp_path / "small.yaml")
    job = slurm.submit("slurm_cpu.sbatch", str(config), str(tmp_path / "results"), "small")
    used: set[str] = set()  # hosts on which trials were seen
    while job.poll() is None:
        used |= {
            host.name for host in slurm.hosts if "TrialRunner" in " ".join(command_lines(host))
        }
        time.sleep(0.2)
    assert job.returncode == 0, slurm.output()
    assert used == {host.name for host in slurm.hosts}
    assert {name: len(rows) for name, rows in metrics(tmp_path / "results" / "small").items()} == {
        "gru_seed=0": 7,
        "sparsenet_sgprop_seed=0": 7,
    }
    assert not any(host.processes() for host in slurm.hosts)
    assert not Path(job_folder(slurm)).exists()
    assert not slurm.log.exists()


@pytest.mark.parametrize("name", ["slurm_cpu.sbatch", "slurm_gpu.sbatch"])
def test_slurm_headers(name: str) -> None:
    """What the script relies on: one Ray a node, notice to the script alone, leave to requeue."""
    text = (CLUSTER / name).read_text()
    asked = set(re.findall(r"^#SBATCH (--[a-z-]+(?:=\S+)?)", text, flags=re.MULTILINE))
    assert {"--ntasks-per-node=1", "--requeue", "--no-kill", "--signal=B:USR1@120"} <= asked
    assert ("--gpus-per-node=1" in asked) == ("gpu" in name)


@pytest.mark.slow
def test_slurm_preempted_and_resumed(slurm: Slurm, tmp_path: Path, ray_session: None) -> None:
    """A notice of preemption in the middle: queued again, only this job's Ray is gone, and the
    next start completes the sweep with the numbers of an undisturbed one."""
    config = write_experiment(
        tmp_path / "small.yaml",
        seeds=[0, 1],
        stop={"training_iteration": 600},
        checkpoint={"every": 10, "keep": 2},
    )
    # Someone else's Ray on the first node, of the same user.
    port, folder = "6500", f"/tmp/sgrl-other-{os.getpid()}"
    environment = slurm.environment | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}
    other = slurm.hosts[0].popen(
        *("ray", "start", "--head", "--block", "--port", port, "--temp-dir", folder),
        *("--node-ip-address", slurm.hosts[0].address, "--num-cpus", "1"),
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def other_is_well() -> bool:
        address = f"{slurm.hosts[0].address}:{port}"
        check = slurm.hosts[0].popen(
            *("ray", "health-check", "--address", address),
            env=environment,
            stderr=subprocess.DEVNULL,
        )
        return other.poll() is None and check.wait() == 0

    wait_until(other_is_well)
    results = tmp_path / "results"
    submission = ("slurm_gpu.sbatch", str(config), str(results), "small")
    job = slurm.submit(*submission)
    wait_until(lambda: any(len(rows) > 50 for rows in metrics(results / "small").values()))
    job.send_signal(signal.SIGUSR1)
    assert job.wait() == 0, slurm.output()
    assert slurm.log.read_text() == f"requeue {slurm.environment['SLURM_JOB_ID']}\n"
    stopped = metrics(results / "small")
    assert not slurm.hosts[1].processes()
    assert not [line for line in command_lines(slurm.hosts[0]) if job_folder(slurm) in line]
    assert other_is_well()

    assert slurm.submit(*submission).wait() == 0, slurm.output()
    starts = json.loads((results / "small" / "provenance.json").read_text())
    assert len(starts) == 2
    undisturbed = metrics(run_sweep(load_experiment(config), tmp_path / "undisturbed"))
    assert stopped != undisturbed
    assert metrics(results / "small") == undisturbed
    assert len(slurm.log.read_text().splitlines()) == 1
    assert other_is_well()
    other.terminate()
    other.wait()
    shutil.rmtree(folder, ignore_errors=True)


def job_folder(slurm: Slurm) -> str:
    return f"/tmp/sgrl-{slurm.environment['SLURM_JOB_ID']}"


def command_lines(host: Host) -> list[str]:
    lines = []
    for process in host.processes():
        with contextlib.suppress(OSError):
            lines.append(Path(f"/proc/{process}/cmdline").read_text().replace("\0", " "))
    return lines


# Kubernetes

# KubeRay's fields that rayjob.yaml may use, from the API reference of KubeRay 1.7 (ray.io/v1).
# "Pod": a pod's template, checked against Kubernetes' own schema.
RAY_JOB = {
    "entrypoint": str,
    "backoffLimit": int,
    "submitterConfig": {"backoffLimit": int},
    "shutdownAfterJobFinishes": bool,
    "ttlSecondsAfterFinished": int,
    "rayClusterSpec": {
        "rayVersion": str,
        "authOptions": {"mode": str},
        "enableInTreeAutoscaling": bool,
        "autoscalerOptions": {"idleTimeoutSeconds": int},
        "headGroupSpec": {"rayStartParams": "strings", "serviceType": str, "template": "Pod"},
        "workerGroupSpecs": [
            {
                "groupName": str,
                "replicas": int,
                "minReplicas": int,
                "maxReplicas": int,
                "rayStartParams": "strings",
                "template": "Pod",
            }
        ],
    },
}


def check_fields(value: object, schema: object, pods: list[dict]) -> None:
    """Asserts that `value` has only fields of the schema, of its types; collects pod templates."""
    if schema == "Pod":
        assert isinstance(value, dict)
        pods.append(value)
    elif schema == "strings":
        assert isinstance(value, dict)
        assert all(isinstance(word, str) for pair in value.items() for word in pair)
    elif isinstance(schema, dict):
        assert isinstance(value, dict)
        for key, item in value.items():
            assert key in schema, key
            check_fields(item, schema[key], pods)
    elif isinstance(schema, list):
        assert isinstance(value, list)
        for item in value:
            check_fields(item, schema[0], pods)
    else:
        assert type(value) is schema, value


def manifests() -> dict[str, dict]:
    text = (CLUSTER / "kubernetes" / "rayjob.yaml").read_text()
    return {document["kind"]: document for document in yaml.safe_load_all(text)}


def test_kubernetes_manifests_are_valid() -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    documents = manifests()
    version = kubernetes_validate.latest_version()
    claim = documents["PersistentVolumeClaim"]
    kubernetes_validate.validate(claim, version, strict=True)
    job = documents["RayJob"]
    assert job["apiVersion"] == "ray.io/v1"
    pods: list[dict] = []
    check_fields(job["spec"], RAY_JOB, pods)
    assert len(pods) == 2
    for pod in pods:
        document = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "node"}, **pod}
        kubernetes_validate.validate(document, version, strict=True)
        assert pod["spec"]["securityContext"]["runAsNonRoot"]
        claims = {v["persistentVolumeClaim"]["claimName"] for v in pod["spec"]["volumes"]}
        assert claims == {claim["metadata"]["name"]}
        document["spec"]["containers"][0]["imag"] = "x"
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(document, version, strict=True)


def test_kubernetes_job_resumes_what_is_there(tmp_path: Path) -> None:
    """The entrypoint with a stand-in for sgrl, before and after the first try."""
    spec = manifests()["RayJob"]["spec"]
    assert spec["backoffLimit"] > 0
    assert spec["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    assert "dashboard-host" not in spec["rayClusterSpec"]["workerGroupSpecs"][0]["rayStartParams"]
    stub = tmp_path / "sgrl"
    stub.write_text('#!/bin/sh\n[ "$1" = status ] && exit ${STATUS:?}\necho "$@"\n')
    stub.chmod(0o755)
    for status, verb in ((2, "sweep tune_configs/quickstart.yaml"), (0, "resume /results/")):
        environment = os.environ | {
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "STATUS": str(status),
        }
        done = subprocess.run(
            ["bash", "-c", spec["entrypoint"]],
            check=True,
            capture_output=True,
            text=True,
            env=environment,
        )
        assert done.stdout.startswith(verb)
        assert "--address auto" in done.stdout
        assert len(done.stdout.splitlines()) == 1


def test_versions_agree() -> None:
    """Ray is of one version on all nodes; the image's files are there, and it is not root's."""
    pinned = re.search(r"^ray==(.*)$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)
    assert pinned
    assert manifests()["RayJob"]["spec"]["rayClusterSpec"]["rayVersion"] == pinned.group(1)
    dockerfile = (CLUSTER / "kubernetes" / "Dockerfile").read_text()
    for sources in re.findall(r"^COPY (.*) \S+$", dockerfile, flags=re.MULTILINE):
        assert all((ROOT / source).exists() for source in sources.split()), sources
    assert dockerfile.rstrip().endswith("USER 1000")
    assert dockerfile.count("-c constraints.txt") == dockerfile.count("pip install")


@pytest.mark.parametrize("path", sorted(CLUSTER.glob("slurm*")), ids=lambda path: path.name)
def test_shell_scripts(path: Path) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True)
    shellcheck = BIN / "shellcheck"
    if not shellcheck.exists():
        pytest.skip("shellcheck is not installed")
    done = subprocess.run([str(shellcheck), str(path)], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
