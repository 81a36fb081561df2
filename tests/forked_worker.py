"""Ray runs this in place of its setup_worker.py and its default_worker.py: a worker is forked by
worker_server.py, or else started as Ray does.

It imports next to nothing, to be quick.
"""

import importlib.util
import json
import os
import socket
import sys

CONTEXT, LANGUAGE = "--serialized-runtime-env-context=", "--language="


def fork(options: list[str]) -> bool:
    """Whether worker_server.py has forked a worker."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(os.environ["SGRL_TEST_WORKERS"])
        socket.send_fds(connection, [b"."], [0, 1, 2])
        request = {
            "options": options,
            "environment": dict(os.environ),
            "folder": os.getcwd(),  # noqa: PTH109 - pathlib takes long to import
            "group": os.getpgrp(),
        }
        connection.sendall(json.dumps(request).encode())
        connection.shutdown(socket.SHUT_WR)
        return connection.recv(1) == b"."  # once it is in this process group


if __name__ == "__main__":
    options = []
    for word in sys.argv[1:]:
        if word.startswith(CONTEXT):
            context = json.loads(word.removeprefix(CONTEXT))
            assert not context.get("command_prefix")
            for name, value in context.get("env_vars", {}).items():
                os.environ[name] = os.path.expandvars(value)
        elif word.startswith("--") and not word.startswith(LANGUAGE):
            options.append(word)
    if not fork(options):
        found = importlib.util.find_spec("ray._private.workers.default_worker")
        assert found is not None
        assert found.origin is not None
        os.execv(sys.executable, [sys.executable, found.origin, *options])
