"""Files that are written atomically, and locks between the processes of a machine."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from filelock import FileLock


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write a file atomically.

    Yields:
        The temporary name to write it under; after fsync it replaces `path`.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: Path) -> Any:
    """Return the content of a JSON file; None if it does not exist or cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def sync(path: Path) -> None:
    """Fsync a file, or a folder's entries."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock(path: Path, seconds: float = -1) -> FileLock:
    """Return a lock to enter or acquire; it is released at the latest when the process ends.

    Args:
        path: the file that is locked, made if it is not there.
        seconds: how long to wait for another process before TimeoutError; for ever if negative.
    """
    from filelock import FileLock  # takes a while, and what only reads does without

    # A file that stands for a lock, filelock's way out where there is no flock, would outlive a
    # process that is killed.
    return FileLock(path, timeout=seconds, thread_local=False, fallback_to_soft=False)


def is_locked(path: Path) -> bool:
    """Whether a process of this machine holds a lock; found out without writing."""
    with contextlib.suppress(OSError), path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
