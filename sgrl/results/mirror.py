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

import fnmatch
import functools
import shutil
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from sgrl.files import replacing
from sgrl.results.checkpoints import MANIFEST, CheckpointError, list_checkpoints, verify
from sgrl.results.folder import EVENT_FILES, TrialFolder
from sgrl.results.storage import StorageError, Store, has_secrets, hide_secrets

#: fsspec's names of storage without folders; making one there would make a bucket.
OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "oci", "oss"}
ATTEMPTS = 4
T = TypeVar("T")


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

        super().__init__(folder, address)
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
        return not self._listed(self.folder)

    def exists(self, file: str | Path) -> bool:
        return self._try(lambda: self.files.exists(self._remote(file)))

    # A checkpoint's manifest goes up last: what has one is whole.

    def has_checkpoint(self, trial: str, iteration: int) -> bool:
        return self.exists(self.sweep.trial(trial).checkpoint(iteration) / MANIFEST)

    def newest_checkpoint(self, trial: str, at_most: int) -> int:
        names = self._listed(self.sweep.trial(trial).checkpoints)
        found = sorted((int(name) for name in names if name.isdecimal()), reverse=True)
        whole = (n for n in found if n <= at_most and self.has_checkpoint(trial, n))
        return next(whole, 0)

    def push(self, *files: str | Path) -> None:
        try:
            if not self.has_folders and len(files) > 1:  # side by side
                here = [str(self.folder / file) for file in files]
                there = [self._remote(file) for file in files]
                self._try(lambda: self.files.put(here, there))
            else:
                for file in files:
                    self._upload(self.folder / file)
        except FileNotFoundError as error:  # the bucket is not
            raise self._failed(error) from None

    def pull(self, *files: str | Path) -> None:
        """Make files of the mirror those of the storage, or remove them where it has none."""
        for file in files:
            local, remote = self.folder / file, self._remote(file)
            if not self.exists(file):
                local.unlink(missing_ok=True)
                continue
            local.parent.mkdir(parents=True, exist_ok=True)
            with replacing(local) as temporary:
                self._try(functools.partial(self.files.get_file, remote, str(temporary)))

    def pull_reports(self) -> None:
        """Make the folder what the storage holds, checkpoints and event files aside."""
        try:
            found = [self._local(path) for path in self._try(lambda: self.files.find(self.root))]
        except FileNotFoundError as error:  # the bucket is not
            raise self._failed(error) from None
        wanted = [
            file
            for file in found
            if file.parent == self.folder
            or (file.parent.parent == self.folder and file in TrialFolder(file.parent).reports)
        ]
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif not path.name.startswith("."):  # a lock stays
                path.unlink()
        for file in wanted:
            file.parent.mkdir(exist_ok=True)
        if wanted:
            here, there = list(map(str, wanted)), list(map(self._remote, wanted))
            self._try(lambda: self.files.get(there, here))

    def claim(self, trial: str) -> None:
        folder = self.sweep.trial(trial)
        folder.path.mkdir(exist_ok=True)
        folder.token.write_text(self.token)
        self.push(folder.token)
        self.pull(*folder.reports)
        kept = set()
        for name in self._listed(folder.checkpoints):
            # One without its manifest was cut short on its way up, or while it was deleted.
            if name.isdecimal() and self.has_checkpoint(trial, int(name)):
                kept.add(name)
                self.pull_checkpoint(folder.checkpoints / name)
        for checkpoint in list_checkpoints(folder.checkpoints):
            if checkpoint.name not in kept:
                shutil.rmtree(checkpoint)

    def pull_checkpoint(self, checkpoint: str | Path) -> Path:
        """Download a checkpoint, unless the mirror holds it already, and return its folder.

        Whether it is whole is found out by what opens it.
        """
        local = self.folder / checkpoint
        held = local / MANIFEST
        before = held.read_bytes() if held.is_file() else None
        self.pull(held)
        if before is not None and held.is_file() and held.read_bytes() == before:
            try:
                verify(local)
                return local
            except CheckpointError:
                pass
        self.pull(*map(self._local, self._try(lambda: self.files.find(self._remote(local)))))
        return local

    def push_trial(self, trial: str) -> None:
        """Bring the storage up to what a trial has reached.

        Raises StorageError where another process has claimed the trial since.
        """
        folder = self.sweep.trial(trial)
        owner = self._try(lambda: self.files.cat_file(self._remote(folder.token)))
        if owner.decode() != self.token:
            raise StorageError(f"{trial} is being run by another process")
        # The driver makes the configuration; the status says what the rest has reached.
        rest = [file for file in folder.reports if file not in (folder.config, folder.status)]
        self.push(*folder.events, *(file for file in rest if file.is_file()))
        there = self._listed(folder.checkpoints)
        here = list_checkpoints(folder.checkpoints)
        for checkpoint in here:
            if not (checkpoint.name in there and self.exists(checkpoint / MANIFEST)):
                self._push_checkpoint(checkpoint)
        self.push(folder.status)
        for name in sorted(set(there) - {checkpoint.name for checkpoint in here}):
            # One that lost its manifest is not taken for whole while the rest of it goes.
            self._remove(folder.checkpoints / name / MANIFEST)
            remote = self._remote(folder.checkpoints / name)
            self._try(functools.partial(self.files.rm, remote, recursive=True))
        events = {path.name for path in folder.events}
        for name in self._listed(folder.path):
            if fnmatch.fnmatch(name, EVENT_FILES) and name not in events:
                self._remove(folder.path / name)

    def leave(self, trial: str) -> None:
        shutil.rmtree(self.folder / trial, ignore_errors=True)

    def _remove(self, file: Path) -> None:
        if self.exists(file):
            self._try(lambda: self.files.rm_file(self._remote(file)))

    def _push_checkpoint(self, checkpoint: Path) -> None:
        manifest = checkpoint / MANIFEST
        files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file()]
        self.push(*(file for file in files if file != manifest))
        self.push(manifest)

    def _upload(self, local: Path) -> None:
        remote = self._remote(local)
        if self.has_folders:
            self._try(lambda: self.files.makedirs(remote.rpartition("/")[0], exist_ok=True))
        self._try(lambda: self.files.put_file(str(local), remote))

    def _remote(self, file: str | Path) -> str:
        """The storage's path of a file or folder of the mirror."""
        name = (self.folder / file).relative_to(self.folder).as_posix()
        return self.root if name == "." else f"{self.root}/{name}"

    def _local(self, remote: str) -> Path:
        return self.folder / remote[len(self.root) + 1 :]

    def _listed(self, place: Path) -> list[str]:
        """Names in a folder; none where there is no such folder."""
        folder = self._remote(place)
        try:
            listed = self._try(lambda: self.files.ls(folder, detail=False))
        except FileNotFoundError:
            return []
        found = {path.rstrip("/") for path in listed}
        # Some list the folder itself.
        return sorted(path.rpartition("/")[2] for path in found - {folder})

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
