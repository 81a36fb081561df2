"""What a sweep ran on: versions, revision and machine of every start, in `provenance.json`."""

import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

import sgrl

PROVENANCE_FILE = "provenance.json"
PACKAGES = ("sgrl", "torch", "ray", "numpy", "gymnasium", "popgym")


def record_start(directory: Path) -> None:
    """Add this start to the sweep's provenance.json: a list, one mapping a start.

    Keys: started (UTC), versions (by package, and python), revision (git's, of the checkout that
    sgrl is imported from, "-dirty" where it has changes; null without one), machine (processor,
    cpus, memory_gb, gpus, system). Nothing in it names a user or a host.
    """
    path = directory / PROVENANCE_FILE
    starts = [*read_starts(directory), describe()]
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(starts, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def read_starts(directory: Path) -> list[dict[str, Any]]:
    """The starts of a sweep, the first one first; none where nothing was recorded."""
    try:
        starts = json.loads((directory / PROVENANCE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return starts if isinstance(starts, list) else []


def describe() -> dict[str, Any]:
    """This process's entry; see `record_start`."""
    import torch  # what only reads the file does without

    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "revision": _revision(),
        "versions": {"python": platform.python_version()}
        | {name: found for name in PACKAGES if (found := _version(name))},
        "machine": {
            "processor": processor(),
            "cpus": os.cpu_count(),
            "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
            "system": f"{platform.system()} {platform.release()}",
        },
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _revision() -> str | None:
    folder = Path(sgrl.__file__).parent
    if not (folder.parent / ".git").exists():
        return None  # an installed package inside another project's checkout is not ours
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip()


def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
