"""The files in cluster/: valid where they can be checked, run where they can be run."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml


ROOT = Path(__file__).parent.parent
CLUSTER = ROOT / "cluster"
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
    head, worker = (config["available_node_types"][key]["node_config"] for key in ("head", "worker"))
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
