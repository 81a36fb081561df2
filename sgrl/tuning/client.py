"""Sweeps on a cluster that this machine is not part of, through Ray's client (`ray://HOST:PORT`).

Tune's driver has to be on the cluster. So the same `sgrl` command runs there, in a process that an
actor supervises, and its output is printed here.
"""

import ctypes
import importlib.util
import logging
import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray

from sgrl.errors import UserError
from sgrl.results.storage import is_address

POLL_SECONDS = 1.0
CONNECT_ATTEMPTS = 3
PR_SET_PDEATHSIG = 1


class ClientError(UserError):
    """The cluster cannot be used from here; the message is one line that says what to do."""


def run_on_cluster(
    address: str, words: Sequence[str], results: str, files: dict[str, str] | None = None
) -> int:
    """Run an `sgrl` command on a cluster, print what it prints, and return its exit status.

    Ctrl-C stops it there, and so does the end of this process.

    Args:
        address: as in `ray://HOST:10001`, where `ray start --head` listens for clients.
        words: the command's, without `--address`.
        results: where they lie: an address or an absolute folder, of the cluster's machines.
        files: texts of files among the words, by name.

    Raises ClientError.
    """
    if not (is_address(results) or Path(results).is_absolute()):
        raise ClientError(
            f"{results} would be a folder on another machine: give one from the root, as in "
            "/shared/results, or an address such as s3://bucket/results"
        )
    if importlib.util.find_spec("grpc") is None:
        raise ClientError(f'{address} needs more of Ray: pip install "sgrl[cluster]"')
    try:
        reach(address)
        with _connected(address):
            command = ray.remote(num_cpus=0, max_restarts=0)(Command).remote(words, files or {})
            return _follow(command)
    except (OSError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        # Where the cluster's side failed, the reason is the end of its traceback.
        lines = str(error).strip().splitlines() or [repr(error)]
        raise ClientError(f"no sweep on the Ray cluster at {address}: {lines[-1]}") from None


def _connected(address: str) -> Any:
    """Connect to the cluster.

    Tries again where Ray's server could not start the process that serves this client, which
    happens when that process is forked at a bad moment (of gRPC's).
    """
    for attempt in range(CONNECT_ATTEMPTS):
        try:
            return ray.init(address, logging_level=logging.ERROR, log_to_driver=False)
        except ConnectionAbortedError:
            if attempt == CONNECT_ATTEMPTS - 1:
                raise
    raise AssertionError


def _follow(command: Any) -> int:
    """Print the command's output until it ends.

    The first Ctrl-C is forwarded to the command, the second one abandons it.
    """
    interrupted = threading.Event()
    before = signal.getsignal(signal.SIGINT)

    # Not a KeyboardInterrupt, which could be swallowed where it lands inside of Ray's client.
    def interrupt(*_: Any) -> None:
        interrupted.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, interrupt)
    handed_on = False
    try:
        while True:
            lines, status = ray.get(command.poll.remote(POLL_SECONDS))
            sys.stdout.writelines(lines)
            sys.stdout.flush()
            if status is not None:
                return status
            if interrupted.is_set() and not handed_on:
                ray.get(command.interrupt.remote())
                handed_on = True
    finally:
        signal.signal(signal.SIGINT, before)


class Command:
    """An `sgrl` command in a process of its own, on whatever machine this actor is."""

    def __init__(self, words: Sequence[str], files: dict[str, str]) -> None:
        self.lines: queue.Queue[str] = queue.Queue()
        self.folder = tempfile.TemporaryDirectory(prefix="sgrl-")
        for name, text in files.items():
            path = Path(self.folder.name) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        cluster = ray.get_runtime_context().gcs_address
        self.process = subprocess.Popen(
            [sys.executable, "-c", "from sgrl.cli import main; main()", *words],
            cwd=self.folder.name,
            env={**os.environ, "RAY_ADDRESS": cluster, "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            preexec_fn=_prepare,
        )
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.put(line)

    def poll(self, seconds: float) -> tuple[list[str], int | None]:
        """Lines that are new, after at most so many seconds, and the exit status at the end."""
        self.reader.join(seconds)
        status = None if self.reader.is_alive() else self.process.wait()
        return [self.lines.get() for _ in range(self.lines.qsize())], status

    def interrupt(self) -> None:
        """Stop it as Ctrl-C does."""
        self.process.send_signal(signal.SIGINT)


def _prepare() -> None:
    """Run the command in the new process.

    With the client the actor ends, and with the actor the sweep, as if by Ctrl-C, which Ray's
    processes block.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGINT)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def reach(address: str) -> None:
    """Raise OSError where nothing answers at HOST:PORT: Ray would wait for it for minutes."""
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if colon and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=10).close()
