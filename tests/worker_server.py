"""A Ray whose worker processes are forked from one that has imported all that they import.

Starting Python and importing Ray, torch and RLlib is most of what a short trial costs: five seconds
of a processor, where a fork costs a tenth of one. What runs in the process is Ray's own worker, but
all of a Ray share one seed of hashes. Rays that tests start as users do start workers as users' do.
"""

import atexit
import contextlib
import gc
import importlib
import inspect
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

#: What workers and trials import, and what they import late: Adam imports torch._dynamo.
MODULES = [
    "ray._private.async_compat",
    "ray._private.node",
    "ray._private.worker",
    "sgrl.tuning.trial",
    "torch._dynamo",
]
#: What workers cannot change after the imports, where Ray reads the number of the job.
FIXED = ["RAY_JOB_ID", "PYTHONPATH"]
ADDRESS = "SGRL_TEST_WORKERS"
#: How the names of variables begin that a process lacks which is to find neither the Ray nor the
#: worker server of these tests.
ALONE = ("RAY_ADDRESS", ADDRESS)


@contextlib.contextmanager
def local_ray() -> Iterator[None]:
    """A Ray whose workers are forked; its processors are only a count."""
    import ray

    # To count what callbacks are used, Ray would import all trackers that are installed.
    with worker_server(), mock.patch("ray.air._internal.usage.tag_callbacks"):
        with forked_workers():
            ray.init(
                "local",
                num_cpus=4,
                include_dashboard=False,
                log_to_driver=False,
                logging_level="error",
                # These would belong to no job.
                _system_config={"prestart_worker_first_driver": False},
            )
        try:
            yield
        finally:
            ray.shutdown()


def forked_workers() -> Any:
    """The workers of nodes that this process starts meanwhile are forked, by `worker_server`."""
    from ray._private import parameter

    script = str(Path(__file__).with_name("forked_worker.py"))
    changes = {
        "setup_worker_path": script,
        "worker_path": script,
        # Nothing reads what these would write.
        "include_log_monitor": False,
        "no_monitor": True,
    }
    return mock.patch.object(parameter, "RayParams", partial(parameter.RayParams, **changes))


@contextlib.contextmanager
def worker_server() -> Iterator[None]:
    """What forks this process's workers, and those of all processes below it."""
    if ADDRESS in os.environ:
        yield
        return
    with tempfile.TemporaryDirectory(prefix="sgrl-") as folder:
        address = f"{folder}/workers"
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(address)
            listener.listen(64)
            server = subprocess.Popen(
                [sys.executable, __file__, str(listener.fileno())],
                stdin=subprocess.PIPE,
                pass_fds=[listener.fileno()],
                process_group=0,
            )
        # It ends when its standard input does, however this process ends.
        with server, mock.patch.dict(os.environ, {ADDRESS: address}):
            yield


def driver(code: str) -> list[str]:
    """The command of a process that has such a Ray of its own while it runs the code."""
    lines = [
        "import sys",
        f"sys.path.append({str(Path(__file__).parent)!r})",
        "from worker_server import local_ray",
        "with local_ray():",
        f"    exec({code!r})",
    ]
    return [sys.executable, "-c", "\n".join(lines)]


def serve(listener: socket.socket) -> dict[str, Any]:
    """Fork a worker for each request of forked_worker.py; return the request, in the worker."""
    imported: dict[str, str | None] | None = None
    while True:
        ready, _, _ = select.select([listener, sys.stdin], [], [])
        if sys.stdin in ready:
            sys.exit()
        connection, _ = listener.accept()
        with connection:
            _, files, _, _ = socket.recv_fds(connection, 1, 3)
            with connection.makefile() as text:
                request = json.load(text)
            fixed = {name: request["environment"].get(name) for name in FIXED}
            os.environ.clear()
            os.environ.update(request["environment"])
            if imported is None and fixed["RAY_JOB_ID"] != "ffffffff":
                prepare()
                imported = fixed
            if imported == fixed and os.fork() == 0:
                listener.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                os.setpgid(0, request["group"])
                for number, file in enumerate(files):
                    os.dup2(file, number)
                connection.send(b".")
            for file in files:
                os.close(file)
        if listener.fileno() < 0:
            return request


def prepare() -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as in Ray's own, and read by torch's import
    # Ray's workers end with the raylet that this named when Ray was imported; it may be any of
    # several here. See `end_with`.
    with mock.patch.dict(os.environ, RAY_RAYLET_PID=str(os.getppid())):
        for module in MODULES:
            importlib.import_module(module)
    inspect.stack = partial(inspect.stack, context=0)  # conftest.py
    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGCHLD, reap)


def end_with(raylet: str) -> None:
    while Path("/proc", raylet).exists():
        time.sleep(1)
    os._exit(1)


def reap(*_: object) -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


if __name__ == "__main__":
    request = serve(socket.socket(fileno=int(sys.argv[1])))
    # Python's end, and what modules have registered for it, would touch, so copy, much memory that
    # workers share, at twice the cost of all the rest of a short one. What trials register stays.
    atexit._clear()
    atexit.register(os._exit, 0)
    raylet = request["environment"]["RAY_RAYLET_PID"]
    threading.Thread(target=end_with, args=[raylet], daemon=True).start()
    import numpy as np
    from ray._private.workers import __path__ as folders

    # What draws numbers unseeded is not to look as if it were seeded.
    np.random.seed()  # noqa: NPY002
    os.chdir(request["folder"])
    sys.path[0] = folders[0]
    sys.argv = [f"{folders[0]}/default_worker.py", *request["options"]]
    runpy.run_path(sys.argv[0], run_name="__main__")
