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

import contextlib
import fnmatch
import functools
import hashlib
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from sgrl.results.checkpoints import (
    MANIFEST,
    CheckpointError,
    list_checkpoints,
    newest_valid_checkpoint,
    verify,
)
from sgrl.results.provenance import PROVENANCE_FILE
from sgrl.results.zoo import ZooError, find_policy

TOKEN_FILE = "token"
#: What makes a folder an archive.
ARCHIVED_TRIALS_FILE = "trials.json"
#: What a trial has reached, but for its checkpoints; the driver makes the first of them.
TRIAL_FILES = (
    "config.yaml",
    "metrics.csv",
    "status.json",
    "tracking.json",
    "error.txt",
    PROVENANCE_FILE,
)
EVENT_FILES = "events.out.tfevents.*"
#: fsspec's names of storage without folders; making one there would make a bucket.
OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "oci", "oss"}
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


def is_archive(location: str | Path) -> bool:
    """Whether results are packed in an archive, see `sgrl.results.archive`."""
    return not is_address(location) and (Path(location) / ARCHIVED_TRIALS_FILE).is_file()


def open_store(location: str | Path, role: str) -> "Store":
    """The results of a sweep, wherever they lie.

    Args:
        location: a folder, or an address such as `s3://bucket/results/NAME`.
        role: "driver" or "trials": each has a mirror of its own, as both write at the same time.

    Raises StorageError: no filesystem for such an address is installed, it cannot be reached, or
    it holds a password.
    """
    if not is_address(location):
        return Store(Path(location).absolute())
    address = str(location).rstrip("/")
    return Mirror(address, mirror_folder(address, role))


def mirror_folder(address: str, role: str) -> Path:
    """This machine's mirror: below SGRL_MIRROR_DIR, by default the user's cache."""
    home = os.environ.get("SGRL_MIRROR_DIR")
    root = Path(home) if home else Path.home() / ".cache" / "sgrl" / "mirror"
    digest = hashlib.sha256(address.encode()).hexdigest()[:12]
    return root / f"{role}-{digest}" / address.rpartition("/")[2]


@contextlib.contextmanager
def reading(location: str | Path) -> Iterator[Path]:
    """A sweep's results to read, checkpoints aside: their folder, or a copy that lasts as long.

    Raises StorageError as `open_store`, and ArchiveError.
    """
    if is_archive(location):
        from sgrl.results.archive import unpack  # brings NumPy and Arrow

        with tempfile.TemporaryDirectory(prefix="sgrl-") as home:
            folder = Path(home) / Path(location).resolve().name
            unpack(Path(location), folder)
            yield folder
        return
    if not is_address(location):
        yield Path(location)
        return
    address = str(location).rstrip("/")
    with tempfile.TemporaryDirectory(prefix="sgrl-") as home:
        mirror = Mirror(address, Path(home) / address.rpartition("/")[2])
        mirror.pull_reports()
        if not any(mirror.folder.iterdir()):
            raise StorageError(f"{address} holds nothing")
        yield mirror.folder


@contextlib.contextmanager
def reading_checkpoint(location: str | Path) -> Iterator[Path]:
    """A checkpoint to read: its folder, a policy of the zoo, or a copy that lasts as long.

    Raises StorageError as `open_store`, or where the zoo has no such policy.
    """
    if not is_address(location):
        try:
            folder = find_policy(location)
        except ZooError as error:
            raise StorageError(str(error)) from None
        yield folder
        return
    above, _, name = str(location).rstrip("/").rpartition("/")
    with tempfile.TemporaryDirectory(prefix="sgrl-") as home:
        checkpoint = Mirror(above, Path(home)).pull_checkpoint(name)
        if not checkpoint.is_dir():
            raise StorageError(f"{location} holds nothing")
        yield checkpoint


class Store:
    """Results in a folder that all machines of a sweep see: there is nothing to bring up to date.

    Attributes:
        location: the folder as an absolute path, or the address.
        folder: where to work on them.
    """

    def __init__(self, folder: Path) -> None:
        self.location = str(folder)
        self.folder = folder

    def __str__(self) -> str:
        """As a user would type it."""
        return str(display(self.folder))

    def is_free(self) -> bool:
        """Whether there is nothing yet. (Hidden files are all there is of a sweep that ended
        before it had begun.)"""
        folder = self.folder
        return not (folder.is_file() or (folder.is_dir() and any(folder.glob("[!.]*"))))

    def exists(self, name: str) -> bool:
        """Whether the store holds a file."""
        return (self.folder / name).is_file()

    def has_checkpoint(self, trial: str, iteration: int) -> bool:
        """Whether the store holds that checkpoint whole."""
        try:
            verify(self.folder / trial / "checkpoints" / f"{iteration:06d}")
        except CheckpointError:
            return False
        return True

    def newest_checkpoint(self, trial: str, at_most: int) -> int:
        """The iteration of the newest whole checkpoint up to one; 0 where there is none."""
        checkpoints = self.folder / trial / "checkpoints"
        newest, _ = newest_valid_checkpoint(checkpoints, at_most=at_most)
        return int(newest.name) if newest else 0

    def push(self, *names: str) -> None:
        """Bring the store up to date with files of the folder."""

    def pull(self, *names: str) -> None:
        """Bring files of the folder up to date with the store."""

    def pull_reports(self) -> None:
        """Bring all of the folder up to date, checkpoints aside."""

    def claim(self, trial: str) -> None:
        """Make this process the one that may write to a trial, and bring its folder up to date."""

    def push_trial(self, trial: str) -> None:
        """Bring the store up to what a trial has reached."""

    def leave(self, trial: str) -> None:
        """The trial is over on this machine."""


class Mirror(Store):
    """Results in object storage and this machine's folder of them.

    Args:
        address: of the sweep, as in `s3://bucket/results/NAME`.
        folder: made if it is not there.

    Raises StorageError as `open_store`.
    """

    def __init__(self, address: str, folder: Path) -> None:
        if has_secrets(address):
            raise StorageError(
                f"{hide_secrets(address)}: keep the password out of the address, which results "
                "and logs repeat: fsspec also takes it from its own configuration files"
            )
        import fsspec  # what lies in folders does without

        self.location = address
        try:
            # Listings that are remembered would hide what other machines write.
            self.files, root = fsspec.core.url_to_fs(
                address, use_listings_cache=False, skip_instance_cache=True
            )
        except (ImportError, ValueError) as error:
            raise StorageError(f"{address}: {error}") from None
        except Exception as error:
            raise self._failed(error) from None
        protocols = self.files.protocol
        names = {protocols} if isinstance(protocols, str) else set(protocols)
        self.has_folders = not names & OBJECT_STORES
        self.root = root.rstrip("/")
        self.folder = folder
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(
                f"{folder} cannot be made ({error.strerror}): name another folder for this "
                "machine's mirror with SGRL_MIRROR_DIR"
            ) from None
        self.token = uuid.uuid4().hex

    def __str__(self) -> str:
        return self.location

    def is_free(self) -> bool:
        return not self._listed("")

    def exists(self, name: str) -> bool:
        return self._try(lambda: self.files.exists(self._remote(name)))

    # A checkpoint's manifest goes up last: what has one is whole.

    def has_checkpoint(self, trial: str, iteration: int) -> bool:
        return self.exists(f"{trial}/checkpoints/{iteration:06d}/{MANIFEST}")

    def newest_checkpoint(self, trial: str, at_most: int) -> int:
        names = (name for name, _ in self._listed(f"{trial}/checkpoints"))
        found = sorted((int(name) for name in names if name.isdecimal()), reverse=True)
        whole = (n for n in found if n <= at_most and self.has_checkpoint(trial, n))
        return next(whole, 0)

    def push(self, *names: str) -> None:
        try:
            if not self.has_folders and len(names) > 1:  # side by side
                here = [str(self.folder / name) for name in names]
                there = [self._remote(name) for name in names]
                self._try(lambda: self.files.put(here, there))
            else:
                for name in names:
                    self._upload(name)
        except FileNotFoundError as error:  # the bucket is not
            raise self._failed(error) from None

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
        """Make the folder what the storage holds, checkpoints and event files aside."""
        start = len(self.root) + 1
        try:
            names = [path[start:] for path in self._try(lambda: self.files.find(self.root))]
        except FileNotFoundError as error:  # the bucket is not
            raise self._failed(error) from None
        wanted = [
            name
            for name in names
            if name.count("/") == 0
            or (name.count("/") == 1 and name.rpartition("/")[2] in TRIAL_FILES)
        ]
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif not path.name.startswith("."):  # a lock stays
                path.unlink()
        for name in wanted:
            (self.folder / name).parent.mkdir(exist_ok=True)
        here = [str(self.folder / name) for name in wanted]
        there = [self._remote(name) for name in wanted]
        if there:
            self._try(lambda: self.files.get(there, here))

    def claim(self, trial: str) -> None:
        (self.folder / trial).mkdir(exist_ok=True)
        (self.folder / trial / TOKEN_FILE).write_text(self.token)
        self.push(f"{trial}/{TOKEN_FILE}")
        self.pull(*(f"{trial}/{name}" for name in TRIAL_FILES))
        kept = set()
        for name, _ in self._listed(f"{trial}/checkpoints"):
            # One without its manifest was cut short on its way up, or while it was deleted.
            if name.isdecimal() and self.has_checkpoint(trial, int(name)):
                kept.add(name)
                self.pull_checkpoint(f"{trial}/checkpoints/{name}")
        for checkpoint in list_checkpoints(self.folder / trial / "checkpoints"):
            if checkpoint.name not in kept:
                shutil.rmtree(checkpoint)

    def pull_checkpoint(self, name: str) -> Path:
        """Download a checkpoint, unless the mirror holds it already, and return its folder. What
        opens it finds out whether it is whole."""
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
        events = [path.name for path in (self.folder / trial).glob(EVENT_FILES)]
        names = [*events, *(name for name in TRIAL_FILES[1:] if name != "status.json")]
        self.push(*(f"{trial}/{name}" for name in names if (self.folder / trial / name).is_file()))
        checkpoints = f"{trial}/checkpoints"
        there = {name for name, _ in self._listed(checkpoints)}
        here = list_checkpoints(self.folder / trial / "checkpoints")
        for checkpoint in here:
            name = f"{checkpoints}/{checkpoint.name}"
            if not (checkpoint.name in there and self.exists(f"{name}/{MANIFEST}")):
                self._push_checkpoint(name)
        self.push(f"{trial}/status.json")
        for name in sorted(there - {checkpoint.name for checkpoint in here}):
            # One that lost its manifest is not taken for whole while the rest of it goes.
            self._remove(f"{checkpoints}/{name}/{MANIFEST}")
            folder = self._remote(f"{checkpoints}/{name}")
            self._try(functools.partial(self.files.rm, folder, recursive=True))
        for name, _ in self._listed(trial):
            if fnmatch.fnmatch(name, EVENT_FILES) and name not in events:
                self._remove(f"{trial}/{name}")

    def leave(self, trial: str) -> None:
        shutil.rmtree(self.folder / trial, ignore_errors=True)

    def _remove(self, name: str) -> None:
        if self.exists(name):
            self._try(lambda: self.files.rm_file(self._remote(name)))

    def _push_checkpoint(self, name: str) -> None:
        files = [path for path in sorted((self.folder / name).rglob("*")) if path.is_file()]
        names = [path.relative_to(self.folder).as_posix() for path in files]
        manifest = f"{name}/{MANIFEST}"
        self.push(*(name for name in names if name != manifest))
        self.push(manifest)

    def _upload(self, name: str) -> None:
        local, remote = self.folder / name, self._remote(name)

        def upload() -> None:
            if self.has_folders:
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
            except FileNotFoundError:
                raise
            except Exception as error:  # each filesystem has exceptions of its own
                if attempt == ATTEMPTS - 1 or isinstance(error, PermissionError | ImportError):
                    raise self._failed(error) from None
                time.sleep(0.5 * 4**attempt)
        raise AssertionError

    def _failed(self, error: Exception) -> StorageError:
        return StorageError(f"{self.location}: {type(error).__name__}: {error}")


def hide_secrets(address: str) -> str:
    """An address without the user and password that it may hold."""
    scheme, _, rest = address.partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


def has_secrets(address: str) -> bool:
    """Whether an address holds a password."""
    return ":" in address.partition("://")[2].partition("/")[0].rpartition("@")[0]


def display(path: Path) -> Path:
    """A path as a user would type it."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path
