"""A Ray of this machine alone, which nothing outside it can reach."""

import logging
import os
from typing import Any

from sgrl.errors import UserError

#: Set by `sgrl --verbose`: Ray's own messages, and those of its processes, are shown.
VERBOSE = "SGRL_VERBOSE"


def is_verbose() -> bool:
    """Return whether the user wants to see what Ray says."""
    return os.environ.get(VERBOSE) == "1"


def ray_logging() -> dict[str, Any]:
    """Return the arguments of `ray.init` that say what it shows."""
    level = logging.INFO if is_verbose() else logging.ERROR
    return {"log_to_driver": is_verbose(), "logging_level": level}


class LocalRayError(UserError):
    """Ray cannot start here; the message is one line that says what to do."""


def start_local_ray(num_cpus: int) -> None:
    """Start Ray with so many processors, listening on loopback only.

    On Linux its servers listen on all addresses, where anyone who reaches them can run code. A Ray
    that is told to form no clusters, which is its default on other systems, keeps to loopback.

    Raises LocalRayError where it cannot write what it needs: a token in the home folder, and its
    session's files in the folder of temporary ones, or where the machine is too busy to start it.
    """
    import ray
    from ray._private import ray_constants

    variable, before = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR, ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    os.environ[variable] = "0"  # for the processes that are started
    try:
        # "local": without an address, Ray would join any cluster it finds on the machine.
        ray.init(
            address="local",
            num_cpus=num_cpus,
            include_dashboard=False,
            **ray_logging(),
        )
    except OSError as error:
        if isinstance(error, ConnectionError):
            raise
        where = f"{error.filename}: {error.strerror}" if error.filename else error
        raise LocalRayError(
            f"Ray cannot start here ({where}): set HOME, and TMPDIR, to folders that can be written"
        ) from None
    except Exception as error:
        if "timed out during startup" not in str(error):  # Ray has no class for it
            raise
        raise LocalRayError(
            "Ray did not start in time, as on a machine that has too much to do: try again"
        ) from None
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
        del os.environ[variable]
