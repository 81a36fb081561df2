"""Where results lie: a folder, which all machines of a sweep see, or an address."""

from pathlib import Path

from sgrl.errors import UserError
from sgrl.results.checkpoints import CheckpointError, newest_valid_checkpoint, verify
from sgrl.results.folder import SweepFolder


class StorageError(UserError, OSError):
    """Object storage cannot be used; the message is one line that says why."""


def is_address(results: str | Path) -> bool:
    """Whether results lie in object storage rather than in a folder."""
    return "://" in str(results)


def join(results: str | Path, name: str) -> str | Path:
    """The address, or folder, of what is called `name` under another one."""
    return f"{str(results).rstrip('/')}/{name}" if is_address(results) else Path(results) / name


def is_archive(location: str | Path) -> bool:
    """Whether results are packed in an archive, see `sgrl.results.archive`."""
    return not is_address(location) and SweepFolder(location).archived_trials.is_file()


class Store:
    """Results in a folder that all machines of a sweep see: nothing needs synchronising.

    Attributes:
        location: the folder as an absolute path, or the address.
        folder: where to work on them.
        sweep: the files in it.
    """

    def __init__(self, folder: Path, location: str | None = None) -> None:
        self.location = str(folder) if location is None else location
        self.folder = folder.absolute()
        self.sweep = SweepFolder(self.folder)

    def __str__(self) -> str:
        """As a user would type it."""
        return str(display(self.folder))

    def is_free(self) -> bool:
        """Whether there are no results yet.

        A sweep that ended before it began leaves only hidden files.
        """
        folder = self.folder
        return not (folder.is_file() or (folder.is_dir() and any(folder.glob("[!.]*"))))

    def exists(self, file: str | Path) -> bool:
        """Whether the store holds a file of the folder."""
        return (self.folder / file).is_file()

    def has_checkpoint(self, trial: str, iteration: int) -> bool:
        """Whether the store holds that checkpoint whole."""
        try:
            verify(self.sweep.trial(trial).checkpoint(iteration))
        except CheckpointError:
            return False
        return True

    def newest_checkpoint(self, trial: str, at_most: int) -> int:
        """The iteration of the newest whole checkpoint up to one; 0 where there is none."""
        checkpoints = self.sweep.trial(trial).checkpoints
        newest, _ = newest_valid_checkpoint(checkpoints, at_most=at_most)
        return int(newest.name) if newest else 0

    def push(self, *files: str | Path) -> None:
        """Bring the store up to date with files of the folder."""

    def pull(self, *files: str | Path) -> None:
        """Bring files of the folder up to date with the store."""

    def pull_reports(self) -> None:
        """Bring all of the folder up to date, checkpoints aside."""

    def claim(self, trial: str) -> None:
        """Make this process the one that may write to a trial, and bring its folder up to date."""

    def push_trial(self, trial: str) -> None:
        """Bring the store up to what a trial has reached."""

    def leave(self, trial: str) -> None:
        """Drop what is only needed while the trial runs on this machine."""


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
