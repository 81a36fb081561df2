"""Results in object storage: any address that fsspec knows, such as `s3://bucket/results`.

A sweep in object storage is worked on in a local folder, a mirror: the driver has one, and so has
every machine that runs trials. A trial's process brings its mirror up to what the storage holds
before it starts, and the storage up to its mirror after every checkpoint and at its end. What was
written since the last checkpoint is lost with the machine, and computed again.

Files are uploaded in an order that leaves a whole state at any moment: rows before the checkpoint
that follows them, a checkpoint's manifest after its other files, old checkpoints deleted last.
Object storage has no locks: each start of a trial leaves its token there, and a process that
finds another one's stops writing.
"""

import functools
import hashlib
import os
import shutil
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from sgrl.tuning.checkpoints import MANIFEST, CheckpointError, list_checkpoints, verify

TOKEN_FILE = "token"
TRIAL_FILES = ("config.yaml", "metrics.csv", "status.json")
ATTEMPTS = 4
T = TypeVar("T")


class StorageError(OSError):
    """Object storage cannot be used; the message is one line that says why."""


def is_address(results: str | Path) -> bool:
    """Whether results lie in object storage rather than in a folder."""
    return "://" in str(results)


def join(results: str | Path, name: str) -> str | Path:
    """The address, or folder, of what is called `name` under another one."""
    return f"{str(results).rstrip('/')}/{name}" if is_address(results) else Path(results) / name


def mirror_folder(address: str, role: str) -> Path:
    """This machine's mirror: below SGRL_MIRROR_DIR, by default the user's cache.

    Args:
        address: of the sweep.
        role: "driver" or "trials"; the two write to the same files at the same time.
    """
    home = os.environ.get("SGRL_MIRROR_DIR")
    root = Path(home) if home else Path.home() / ".cache" / "sgrl" / "mirror"
    digest = hashlib.sha256(address.encode()).hexdigest()[:12]
    return root / f"{address.rstrip('/').rpartition('/')[2]}-{digest}" / role


class Mirror:
    """A sweep in object storage and its local folder.

    Args:
        address: of the sweep, as in `s3://bucket/results/NAME`.
        role: "driver" or "trials".

    Attributes:
        folder: the local one; made if it is not there.

    Raises StorageError: no filesystem for such an address is installed, or it cannot be reached.
    """

    def __init__(self, address: str, role: str) -> None:
        self.address = address
        try:
            # Listings that are remembered would hide what other machines write.
            self.files, root = fsspec.core.url_to_fs(address, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise StorageError(f"{hide_secrets(address)}: {error}") from None
        except Exception as error:
            raise self._failed(error) from None
        self.root = root.rstrip("/")
        self.folder = mirror_folder(address, role)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.token = uuid.uuid4().hex

    def exists(self, name: str) -> bool:
        """Whether the storage holds a file."""
        return self._try(lambda: self.files.exists(self._remote(name)))

    def push(self, *names: str) -> None:
        """Upload files that the mirror holds."""
        for name in names:
            self._upload(name)

    def pull(self, *names: str) -> None:
        """Make files of the mirror those of the storage, or remove them where it has none."""
        for name in names:
            local, remote = self.folder / name, self._remote(name)
            if not self.exists(name):
                local.unlink(missing_ok=True)
                continue
            local.parent.mkdir(parents=True, exist_ok=True)
            temporary = local.with_name(f".{local.name}.tmp")
            self._try(functools.partial(self.files.get_file, remote, str(temporary)))
            temporary.replace(local)

    def pull_reports(self) -> None:
        """Bring everything up to date but checkpoints: the sweep's own files and, of each trial,
        its configuration, metrics and status."""
        for name, is_folder in self._listed(""):
            if not is_folder:
                self.pull(name)
            elif self.exists(f"{name}/config.yaml"):
                self.pull(*(f"{name}/{file}" for file in TRIAL_FILES))

    def claim(self, trial: str) -> None:
        """Make this process the one that may write to a trial."""
        (self.folder / trial).mkdir(exist_ok=True)
        (self.folder / trial / TOKEN_FILE).write_text(self.token)
        self.push(f"{trial}/{TOKEN_FILE}")

    def pull_trial(self, trial: str) -> None:
        """Bring a trial up to what the storage holds, checkpoints included."""
        self.pull(*(f"{trial}/{name}" for name in TRIAL_FILES))
        kept = set()
        for name, _ in self._listed(f"{trial}/checkpoints"):
            if name.isdecimal():
                kept.add(name)
                self.pull_checkpoint(f"{trial}/checkpoints/{name}")
        for checkpoint in list_checkpoints(self.folder / trial / "checkpoints"):
            if checkpoint.name not in kept:
                shutil.rmtree(checkpoint)

    def pull_checkpoint(self, name: str) -> Path:
        """Download a checkpoint, unless the mirror holds it already, and return its folder.

        A checkpoint whose upload was cut short has no manifest, or one that does not hold: what
        opens it finds out.
        """
        local = self.folder / name
        held = local / MANIFEST
        before = held.read_bytes() if held.is_file() else None
        self.pull(f"{name}/{MANIFEST}")
        if before is not None and held.is_file() and held.read_bytes() == before:
            try:
                verify(local)
                return local
            except CheckpointError:
                pass
        found = self._try(lambda: self.files.find(self._remote(name)))
        start = len(self._remote(name)) + 1
        for path in found:
            self.pull(f"{name}/{path[start:]}")
        return local

    def push_trial(self, trial: str) -> None:
        """Bring the storage up to what a trial has reached.

        Raises StorageError where another process has claimed the trial since.
        """
        owner = self._try(lambda: self.files.cat_file(self._remote(f"{trial}/{TOKEN_FILE}")))
        if owner.decode() != self.token:
            raise StorageError(f"{trial} is being run by another process")
        if (self.folder / trial / "metrics.csv").is_file():
            self.push(f"{trial}/metrics.csv")
        checkpoints = f"{trial}/checkpoints"
        there = {name for name, _ in self._listed(checkpoints)}
        here = list_checkpoints(self.folder / trial / "checkpoints")
        for checkpoint in here:
            name = f"{checkpoints}/{checkpoint.name}"
            if not (checkpoint.name in there and self.exists(f"{name}/{MANIFEST}")):
                self._push_checkpoint(name)
        self.push(f"{trial}/status.json")
        for name in there - {checkpoint.name for checkpoint in here}:
            self._try(functools.partial(self.files.rm, self._remote(f"{checkpoints}/{name}"), True))

    def _push_checkpoint(self, name: str) -> None:
        files = [path for path in sorted((self.folder / name).rglob("*")) if path.is_file()]
        for path in sorted(files, key=lambda path: path.name == MANIFEST):
            self._upload(path.relative_to(self.folder).as_posix())

    def _upload(self, name: str) -> None:
        local, remote = self.folder / name, self._remote(name)

        def upload() -> None:
            self.files.makedirs(remote.rpartition("/")[0], exist_ok=True)
            self.files.put_file(str(local), remote)

        self._try(upload)

    def _remote(self, name: str) -> str:
        return f"{self.root}/{name}" if name else self.root

    def _listed(self, name: str) -> list[tuple[str, bool]]:
        """Names in a folder, and whether each is a folder; nothing where there is none."""
        folder = self._remote(name)

        def listed() -> list[dict[str, Any]]:
            try:
                return self.files.ls(folder, detail=True)
            except FileNotFoundError:
                return []

        found = {entry["name"].rstrip("/"): entry["type"] for entry in self._try(listed)}
        found.pop(folder, None)  # some list the folder itself
        return sorted(
            (path.rpartition("/")[2], kind == "directory") for path, kind in found.items()
        )

    def _try(self, act: Callable[[], T]) -> T:
        """Act, again after a while where the network fails; what is not there is an answer."""
        for attempt in range(ATTEMPTS):
            try:
                return act()
            except (FileNotFoundError, PermissionError):
                raise
            except Exception as error:  # each filesystem has exceptions of its own
                if attempt == ATTEMPTS - 1:
                    raise self._failed(error) from None
                time.sleep(0.5 * 4**attempt)
        raise AssertionError

    def _failed(self, error: Exception) -> StorageError:
        return StorageError(f"{hide_secrets(self.address)}: {type(error).__name__}: {error}")


def hide_secrets(address: str) -> str:
    """An address without the user and password that it may hold."""
    scheme, _, rest = address.partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


def has_secrets(address: str) -> bool:
    """Whether an address holds a password."""
    return ":" in address.partition("://")[2].partition("/")[0].rpartition("@")[0]
