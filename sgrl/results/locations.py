"""Results wherever they lie: a folder, an archive, an address, or the zoo."""

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from platformdirs import user_cache_path

from sgrl.results import tune_folder
from sgrl.results.mirror import Mirror
from sgrl.results.storage import StorageError, Store, is_address, is_archive
from sgrl.results.tune_folder import is_tune_folder
from sgrl.results.zoo import find_policy

#: The folder, in that of all results, of those that a checkout keeps under version control.
PUBLISHED = "published"


def open_store(location: str | Path, role: str) -> Store:
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
    root = Path(home) if home else user_cache_path("sgrl") / "mirror"
    digest = hashlib.sha256(address.encode()).hexdigest()[:12]
    return root / f"{role}-{digest}" / address.rpartition("/")[2]


def is_copied(location: str | Path) -> bool:
    """Whether what `reading` yields is a copy, in which nothing is to be kept."""
    return is_address(location) or is_archive(location) or is_tune_folder(location)


def is_published(location: str | Path) -> bool:
    """Whether results lie in a folder `published`, in which nothing else is to be written."""
    return not is_address(location) and Path(location).resolve().parent.name == PUBLISHED


@contextlib.contextmanager
def reading(location: str | Path) -> Iterator[Path]:
    """A sweep's results to read, checkpoints aside: their folder, or a copy that lasts as long.

    Raises StorageError as `open_store`, and ArchiveError.
    """
    if not is_copied(location):
        yield Path(location)
        return
    with tempfile.TemporaryDirectory(prefix="sgrl-") as home:
        if not is_address(location):
            folder = Path(home) / Path(location).resolve().name
            if is_archive(location):
                from sgrl.results import archive  # brings NumPy and Arrow

                archive.unpack(Path(location), folder)
            else:
                tune_folder.unpack(Path(location), folder)
            yield folder
            return
        address = str(location).rstrip("/")
        mirror = Mirror(address, Path(home) / address.rpartition("/")[2])
        mirror.pull_reports()
        if not any(mirror.folder.iterdir()):
            raise StorageError(f"{address} holds nothing")
        yield mirror.folder


@contextlib.contextmanager
def reading_checkpoint(location: str | Path) -> Iterator[Path]:
    """A checkpoint to read: its folder, a policy of the zoo, or a copy that lasts as long.

    Raises StorageError as `open_store`, and ZooError.
    """
    if not is_address(location):
        yield find_policy(location)
        return
    above, _, name = str(location).rstrip("/").rpartition("/")
    with tempfile.TemporaryDirectory(prefix="sgrl-") as home:
        checkpoint = Mirror(above, Path(home)).pull_checkpoint(name)
        if not checkpoint.is_dir():
            raise StorageError(f"{location} holds nothing")
        yield checkpoint
