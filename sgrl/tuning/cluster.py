"""The Ray that a sweep runs on: this machine's own, or a cluster.

Every machine of a cluster must see the results and import environments and the user's own parts.
"""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from sgrl.errors import UserError
from sgrl.local_ray import ray_logging, start_local_ray
from sgrl.results.storage import Store
from sgrl.tuning.client import reach
from sgrl.tuning.experiment.load import Experiment
from sgrl.tuning.experiment.resources import user_modules
from sgrl.tuning.machine import look, try_import
from sgrl.tuning.trial import first_line
from sgrl.user_code import source_of

# Set unless the user has: Ray says less and leaves our working directory alone.
ENVIRONMENT = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_CHDIR_TO_TRIAL_DIR": "0"}


class SweepError(UserError):
    """A sweep cannot start or go on; the message is one line that says what to do."""


def _nodes() -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]


def _on_every_node(function: Callable[[Any], Any], argument: Any) -> dict[str, Any]:
    """Call a function on each machine of the cluster; return the results by address."""
    running = {
        node["NodeManagerAddress"]: ray.remote(num_cpus=0)(function)
        .options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False))
        .remote(argument)
        for node in _nodes()
    }
    return {address: ray.get(result) for address, result in running.items()}


def check_visible(store: Store) -> None:
    """Refuse a cluster of which some machine does not see the sweep's results."""
    if len(_nodes()) == 1 and type(store) is Store:
        return
    text = store.sweep.experiment.read_text(encoding="utf-8")
    found = _on_every_node(look, store.location)
    blind = sorted(address for address, (read, _) in found.items() if read != text)
    if blind and type(store) is Store:
        raise SweepError(
            f"{store} is not there on {', '.join(blind)}: give --results a folder that all "
            "machines of the cluster share"
        )
    if blind:
        reason = found[blind[0]][1] or "other machines write there what this one does not see"
        raise SweepError(f"{store} cannot be read on {', '.join(blind)}: {reason}")


def check_modules(experiment: Experiment) -> None:
    """Refuse a cluster of which some machine cannot import environments or the user's own parts."""
    modules = user_modules(experiment)
    if not modules or len(_nodes()) == 1:
        return
    wrong = {address: line for address, line in _on_every_node(try_import, modules).items() if line}
    if wrong:
        raise SweepError(
            f"the user's code cannot be imported on {', '.join(sorted(wrong))}: "
            f"{min(wrong.items())[1]}; install what it needs on every machine of the cluster"
        )


def start_ray(experiment: Experiment) -> None:
    """Join the cluster at RAY_ADDRESS, or start a Ray of this machine alone.

    A Ray that this process has already is used.

    Raises:
        SweepError: there is no cluster, or one that cannot run the sweep.
        LocalRayError: Ray cannot start here.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS", "")
    if address.startswith("ray://"):
        raise SweepError(
            f"the driver of a sweep runs on the cluster: start it there, or from here with `sgrl "
            f"sweep --address {address}`"
        )
    if address:
        print(f"joining the Ray cluster at {address}")
        try:
            reach(address)
            # Other machines may lack what is in the current folder of this one.
            places = [place for m in user_modules(experiment) if (place := source_of(m))]
            ray.init(
                **ray_logging(),
                runtime_env={"py_modules": list(map(str, places))} if places else None,
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise SweepError(
                f"no Ray cluster at {address} ({first_line(error)}): start one, or run here, "
                "without --address and RAY_ADDRESS"
            ) from None
    else:
        start_local_ray(count_cpus())


def machine_resources() -> dict[str, float]:
    """The CPUs that this process may use and the GPUs that torch sees."""
    return {"CPU": count_cpus(), "GPU": torch.cuda.device_count()}


def count_cpus() -> int:
    """CPUs of this process: its affinity, and in a container its quota."""
    count = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        count = min(count, max(1, int(quota) // int(period)))
    return count
