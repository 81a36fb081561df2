"""Versions, revision and machine of every start of a sweep and of its trials.

They are kept in `provenance.json`.
"""

import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from sgrl import __version__
from sgrl.compiled.library import COMPILED_HERE, core_build
from sgrl.compiled.processor import processor, processor_kind
from sgrl.files import read_json, write_json
from sgrl.user_code import identity

PACKAGES = ("torch", "ray", "numpy", "gymnasium", "popgym")


def record_start(path: Path, modules: Iterable[str] = (), **more: Any) -> None:
    """Add this start to the provenance of a sweep or a trial: a list, one mapping a start.

    Keys: those of `more` (of a trial `iteration`, the one it went on from), parts (where there are
    any: the user's own packages, each with its `sgrl.user_code.identity`), started (UTC), versions
    (by package, and python), core (the build of the compiled core that this process uses where it
    uses one), revision (git's, of the checkout that sgrl is imported from, "-dirty" where it has
    changes; null without one), machine (processor, processor_kind, cpus, memory_gb, gpus, system).
    Nothing in it names a user or a host.

    Args:
        path: provenance.json.
        modules: of the user's own.
        **more: further keys.
    """
    parts = {name.partition(".")[0]: identity(name) for name in modules}
    own = {"parts": parts} if parts else {}
    write_json(path, [*read_starts(path), more | own | describe()])


def read_starts(path: Path) -> list[dict[str, Any]]:
    """The starts of a sweep or a trial, the first one first; none where nothing was recorded."""
    starts = read_json(path)
    return starts if isinstance(starts, list) else []


def changed_parts(path: Path) -> list[str]:
    """The user's own packages that are not what they were at the start before the last one."""
    starts = [start.get("parts", {}) for start in read_starts(path)]
    before, now = ([{}, {}, *starts])[-2:]
    return [package for package in now if now[package] != before.get(package, now[package])]


def describe() -> dict[str, Any]:
    """This process's entry; see `record_start`."""
    import psutil  # what only reads the file, or times a policy, does without either
    import torch

    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "revision": revision(),
        "versions": versions(),
        "core": core_build(),
        "machine": {
            "processor": processor(),
            "processor_kind": processor_kind(),
            "cpus": os.cpu_count(),
            "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
            "system": f"{platform.system()} {platform.release()}",
        },
    }


def what_rounds_otherwise(
    before: Mapping[str, Any], now: Mapping[str, Any], compiled: bool, on_gpus: bool
) -> list[str]:
    """What keeps two starts of a trial from yielding the same bits, in words; empty where nothing.

    Args:
        before: one start, see `record_start`.
        now: the other.
        compiled: whether the trial computes in the compiled core.
        on_gpus: whether it computes on GPUs.
    """
    found = []
    machines = [start.get("machine", {}) for start in (before, now)]
    if on_gpus and machines[0].get("gpus") != machines[1].get("gpus"):
        found.append("other GPUs")
    kinds = [machine.get("processor_kind") for machine in machines]
    if kinds[0] is None or kinds[0] != kinds[1]:
        found.append("another kind of processor")
    for package in ("torch", "numpy"):
        used = [start.get("versions", {}).get(package) for start in (before, now)]
        if used[0] != used[1]:
            found.append(f"{package} {used[1]} instead of {used[0]}")
    # Up to version 0.1.0 the machine itself compiled it, always, and nothing was recorded.
    alike = now["core"].startswith(before.get("core", COMPILED_HERE))
    if compiled and not alike:
        found.append(f"another build of the compiled core ({now['core']})")
    return found


def versions() -> dict[str, str]:
    """Versions of Python, of sgrl and of installed packages that results depend on, by name."""
    found = {"python": platform.python_version(), "sgrl": __version__}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


@cache
def revision() -> str | None:
    """Git's name of the checkout that sgrl is imported from; None where it is installed."""
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
