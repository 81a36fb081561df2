"""Versions, revision and machine of every start of a sweep and of its trials.

They are kept in `provenance.json`.
"""

import os
import platform
import subprocess
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from sgrl.files import read_json, write_json

PACKAGES = ("sgrl", "torch", "ray", "numpy", "gymnasium", "popgym")


def record_start(path: Path, **more: Any) -> None:
    """Add this start to the provenance of a sweep or a trial: a list, one mapping a start.

    Keys: those of `more` (of a trial `iteration`, the one it went on from), started (UTC),
    versions (by package, and python), revision (git's, of the checkout that sgrl is imported from,
    "-dirty" where it has changes; null without one), machine (processor, processor_kind, cpus,
    memory_gb, gpus, system). Nothing in it names a user or a host.
    """
    write_json(path, [*read_starts(path), more | describe()])


def read_starts(path: Path) -> list[dict[str, Any]]:
    """The starts of a sweep or a trial, the first one first; none where nothing was recorded."""
    starts = read_json(path)
    return starts if isinstance(starts, list) else []


def describe() -> dict[str, Any]:
    """This process's entry; see `record_start`."""
    import psutil  # what only reads the file, or times a policy, does without either
    import torch

    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "revision": _revision(),
        "versions": {"python": platform.python_version()}
        | {name: found for name in PACKAGES if (found := _version(name))},
        "machine": {
            "processor": processor(),
            "processor_kind": processor_kind(),
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


@cache
def _revision() -> str | None:
    folder = Path(__file__).parents[1]
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
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


def processor_kind() -> str:
    """What rounding depends on: the processor's model and its vector instructions, in one line.

    Results repeat exactly between processors of one kind, given the same versions and threads.
    """
    info = _cpuinfo()
    names = ("vendor_id", "cpu family", "model", "CPU implementer", "CPU part")
    model = [info[name] for name in names if name in info] or [platform.processor()]
    flags = f"{info.get('flags', '')} {info.get('Features', '')}".split()
    vectors = sorted(flag for flag in flags if flag.startswith(("avx", "fma", "asimd", "sve")))
    return " ".join([platform.machine(), *model, *vectors])


def _cpuinfo() -> dict[str, str]:
    """What Linux says of the first processor; empty elsewhere."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    lines = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in lines}
