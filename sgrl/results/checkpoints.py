"""Checkpoints that are either complete or absent.

A checkpoint is a folder `NNNNNN` (its iteration) with RLlib's own files, the policy as
`policy.safetensors` and `policy.json`, and `manifest.json`: size and SHA-256 of every file. It is
written under a temporary name and renamed after fsync. One that was truncated or edited, or that
lacks a file, is never loaded. torch is imported where a policy is: the rest does without.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from sgrl.errors import UserError
from sgrl.files import sync

if TYPE_CHECKING:
    from sgrl.nn.registry import Policy

MANIFEST = "manifest.json"


class CheckpointError(UserError):
    """A checkpoint cannot be used; the message is one line that says why."""


def checkpoint_name(iteration: int) -> str:
    """The name of the checkpoint's folder, as in 000025."""
    return f"{iteration:06d}"


def write_checkpoint(
    folder: Path, iteration: int, save: Callable[[Path], None], *, keep: int
) -> Path:
    """Write checkpoint `iteration` into `folder` and drop all but the newest `keep`.

    `save(directory)` writes the checkpoint's files. Whatever is killed, `folder/NNNNNN` holds
    either all of them or does not exist.
    """
    final = folder / checkpoint_name(iteration)
    temporary = folder / f".{final.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        save(temporary)
        files = {
            file.relative_to(temporary).as_posix(): _digest(file) for file in _files(temporary)
        }
        manifest = {"format": 1, "iteration": iteration, "files": files}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        for path in [*temporary.rglob("*"), temporary]:
            sync(path)
    except BaseException:
        # On a full disk its place is needed.
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    # A folder that is already there was found damaged, else its trial would be past it.
    shutil.rmtree(final, ignore_errors=True)
    temporary.replace(final)
    sync(folder)
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first, whole or damaged."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if path.is_dir() and path.name.isdecimal()]
    return sorted(found, key=lambda path: int(path.name))


def read_manifest(checkpoint: Path) -> dict:
    """The manifest of a checkpoint; raises CheckpointError where it is missing or unreadable."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        sizes_and_digests = [(file["size"], file["sha256"]) for file in manifest["files"].values()]
        named = int(checkpoint.name) if checkpoint.name.isdecimal() else manifest["iteration"]
        if not sizes_and_digests or named != manifest["iteration"]:
            raise ValueError
    except OSError:
        raise CheckpointError(f"{checkpoint} is no whole checkpoint: no {MANIFEST}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{checkpoint} is damaged: {MANIFEST} has been changed") from None
    return manifest


def verify(checkpoint: Path) -> None:
    """Raise CheckpointError unless every file is there, unchanged, and no other."""
    files = read_manifest(checkpoint)["files"]
    present = {path.relative_to(checkpoint).as_posix() for path in _files(checkpoint)} - {MANIFEST}
    for name in sorted(files.keys() | present):
        if name not in present:
            raise CheckpointError(f"{checkpoint} is damaged: {name} is missing")
        if name not in files:
            raise CheckpointError(f"{checkpoint} is damaged: {name} is not in its {MANIFEST}")
        if _digest(checkpoint / name) != files[name]:
            raise CheckpointError(f"{checkpoint} is damaged: {name} is truncated or changed")


def newest_valid_checkpoint(
    folder: Path, *, at_most: int | None = None
) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint in `folder`, and one line for each damaged one passed over.

    Checkpoints after iteration `at_most` are passed over silently.
    """
    problems = []
    for checkpoint in reversed(list_checkpoints(folder)):
        if at_most is not None and int(checkpoint.name) > at_most:
            continue
        try:
            verify(checkpoint)
        except CheckpointError as error:
            problems.append(str(error))
        else:
            return checkpoint, problems
    return None, problems


def discard_after(folder: Path, iteration: int) -> None:
    """Delete all checkpoints after `iteration`, and unfinished ones.

    A trial that continues from `iteration` writes them again; left in place, a damaged newer one
    would count among those to keep and push out a whole one.
    """
    for unfinished in folder.glob(".*.tmp"):
        shutil.rmtree(unfinished)
    for checkpoint in list_checkpoints(folder):
        if int(checkpoint.name) > iteration:
            shutil.rmtree(checkpoint)


def open_policy(checkpoint: Path) -> tuple[Policy, dict]:
    """The policy of a checkpoint, or of a folder that `save_policy` wrote, and its environment.

    Returns the policy and policy.json's "environment": keys env and env_config.

    Raises CheckpointError where the checkpoint is damaged or holds no policy; the message names
    the newest whole checkpoint beside it.
    """
    from sgrl.nn.registry import DESCRIPTION_FILE, load_policy

    checkpoint = Path(checkpoint)
    if not (checkpoint / MANIFEST).is_file() and not (checkpoint / DESCRIPTION_FILE).is_file():
        raise CheckpointError(
            f"{checkpoint} is no checkpoint: give a folder such as "
            "results/EXPERIMENT/TRIAL/checkpoints/000025"
        )
    if checkpoint.name.isdecimal() or (checkpoint / MANIFEST).is_file():
        try:
            verify(checkpoint)
        except CheckpointError as error:
            newest, _ = newest_valid_checkpoint(checkpoint.parent)
            hint = f"; the newest whole one is {newest}" if newest else ""
            raise CheckpointError(f"{error}{hint}") from None
    try:
        policy = load_policy(checkpoint)
        return policy, json.loads((checkpoint / DESCRIPTION_FILE).read_text())["environment"]
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{checkpoint} holds no policy to run: {error}") from None


def _files(directory: Path) -> list[Path]:
    """All files below `directory` but hidden ones, which file managers leave behind."""
    return sorted(
        path for path in directory.rglob("*") if path.is_file() and not path.name.startswith(".")
    )


def _digest(path: Path) -> dict[str, int | str]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"size": path.stat().st_size, "sha256": digest}
