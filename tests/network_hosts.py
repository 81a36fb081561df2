"""Hosts of a network, as Linux network namespaces joined by a bridge: each has an address, a
loopback and ports of its own. They share this machine's files and processes."""

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest


@dataclass(frozen=True)
class Host:
    """One host: `command("ls")` is how to run `ls` there."""

    name: str
    address: str

    def command(self, *words: str) -> list[str]:
        return ["ip", "netns", "exec", self.name, *words]

    def popen(self, *words: str, **options: Any) -> subprocess.Popen:
        return subprocess.Popen(self.command(*words), **options)

    def run(self, *words: str, **options: Any) -> subprocess.CompletedProcess:
        """Raises CalledProcessError where the command fails."""
        return subprocess.run(
            self.command(*words), check=True, text=True, capture_output=True, **options
        )

    def processes(self) -> list[int]:
        """The ids of all processes that run on this host."""
        done = subprocess.run(
            ["ip", "netns", "pids", self.name], check=False, text=True, capture_output=True
        )
        return [int(word) for word in done.stdout.split()]

    def kill_all(self) -> None:
        """The host dies: every process on it is killed at once."""
        deadline = time.monotonic() + 10
        while (processes := self.processes()) and time.monotonic() < deadline:
            for process in processes:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, 9)
            time.sleep(0.1)


@contextlib.contextmanager
def network_hosts(count: int) -> Iterator[list[Host]]:
    """`count` hosts that reach each other and nothing else; whatever still runs on them is killed
    at the end. Skips the test where namespaces cannot be made (they need root and iproute2)."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and the command `ip` (iproute2)")
    prefix = f"sgrl{os.getpid()}"
    switch = f"{prefix}switch"
    hosts = [Host(f"{prefix}host{i}", f"10.77.0.{i}") for i in range(1, count + 1)]
    namespaces: list[str] = []

    def ip(*words: str) -> None:
        done = subprocess.run(["ip", *words], check=False, text=True, capture_output=True)
        if done.returncode:
            pytest.skip(f"network namespaces cannot be made: {done.stderr.strip()}")

    try:
        # The bridge is in a namespace too: this machine's own network is left alone.
        for name in (switch, *(host.name for host in hosts)):
            ip("netns", "add", name)
            namespaces.append(name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        ip("-n", switch, "link", "set", "bridge", "up")
        for i, host in enumerate(hosts):
            peer = ("peer", "name", "eth0", "netns", host.name)
            ip("-n", switch, "link", "add", f"port{i}", "type", "veth", *peer)
            ip("-n", switch, "link", "set", f"port{i}", "master", "bridge", "up")
            ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", "eth0")
            ip("-n", host.name, "link", "set", "eth0", "up")
        yield hosts
    finally:
        for host in hosts:
            if host.name in namespaces:
                host.kill_all()
        for name in namespaces:
            subprocess.run(["ip", "netns", "delete", name], check=False)
