"""Results in object storage, on a real server: FTP, the lightest that fsspec speaks."""

import threading

import pytest
from pyftpdlib.authorizers import DummyAuthorizer
from pyftpdlib.handlers import FTPHandler
from pyftpdlib.servers import ThreadedFTPServer

from sgrl.tuning.checkpoints import MANIFEST, CheckpointError, verify, write_checkpoint
from sgrl.tuning.storage import Mirror, StorageError, has_secrets, hide_secrets, is_address, join


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server's address, and the folder behind it."""
    root = tmp_path_factory.mktemp("storage")
    authorizer = DummyAuthorizer()
    authorizer.add_anonymous(str(root), perm="elradfmwMT")
    handler = type("Handler", (FTPHandler,), {"authorizer": authorizer, "log_prefix": ""})
    ftp = ThreadedFTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=ftp.serve_forever, kwargs={"timeout": 0.1}, daemon=True)
    thread.start()
    yield f"ftp://127.0.0.1:{ftp.address[1]}", root
    ftp.close_all()
    thread.join()


@pytest.fixture
def mirrors(server, tmp_path, monkeypatch):
    """Two mirrors of one sweep, as two machines have them."""
    monkeypatch.setenv("SGRL_MIRROR_DIR", str(tmp_path / "mirrors"))
    address = join(f"{server[0]}/{tmp_path.name}", "sweep")
    return Mirror(address, "driver"), Mirror(address, "trials")


def checkpoint(mirror, trial, iteration, keep=2):
    def save(folder):
        (folder / "deep").mkdir()
        (folder / "deep" / "weights").write_bytes(bytes([iteration]) * 1000)

    return write_checkpoint(mirror.folder / trial / "checkpoints", iteration, save, keep=keep)


def write(mirror, trial, rows, state="running"):
    (mirror.folder / trial / "metrics.csv").write_text("iteration\n" + "".join(map(str, rows)))
    (mirror.folder / trial / "status.json").write_text(state)


def test_a_trial_goes_up_and_down(mirrors, server, tmp_path):
    one, other = mirrors
    behind = server[1] / tmp_path.name / "sweep"
    one.claim("trial")
    for iteration in (2, 4, 6):
        write(one, "trial", range(iteration))
        checkpoint(one, "trial", iteration)
        one.push_trial("trial")
    assert sorted(path.name for path in (behind / "trial/checkpoints").iterdir()) == [
        "000004",
        "000006",
    ]
    verify(behind / "trial/checkpoints/000006")
    checkpoint(other, "trial", 8)  # of a start that the storage does not know of
    other.pull_trial("trial")
    theirs = other.folder / "trial"
    assert (theirs / "metrics.csv").read_text() == "iteration\n012345"
    assert sorted(path.name for path in (theirs / "checkpoints").iterdir()) == ["000004", "000006"]
    for name in ("000004", "000006"):
        verify(theirs / "checkpoints" / name)
    # What is there already is not downloaded again, unless it is damaged.
    weights = theirs / "checkpoints/000004/deep/weights"
    modified = weights.stat().st_mtime_ns
    other.pull_trial("trial")
    assert weights.stat().st_mtime_ns == modified
    weights.write_bytes(b"short")
    other.pull_trial("trial")
    verify(theirs / "checkpoints/000004")


def test_a_cut_upload_is_no_checkpoint(mirrors, server, tmp_path):
    one, other = mirrors
    behind = server[1] / tmp_path.name / "sweep/trial/checkpoints"
    one.claim("trial")
    write(one, "trial", range(4))
    for iteration in (2, 4):
        checkpoint(one, "trial", iteration)
    one.push_trial("trial")
    (behind / "000004" / MANIFEST).unlink()  # it is uploaded last
    (behind / "000004/deep/weights").write_bytes(b"part")
    other.pull_trial("trial")
    with pytest.raises(CheckpointError):
        verify(other.folder / "trial/checkpoints/000004")
    verify(other.folder / "trial/checkpoints/000002")
    one.push_trial("trial")  # what lacks its manifest goes up again
    verify(behind / "000004")


def test_only_the_last_start_writes(mirrors):
    one, other = mirrors
    one.claim("trial")
    write(one, "trial", range(2))
    one.push_trial("trial")
    other.claim("trial")
    with pytest.raises(StorageError, match="run by another process"):
        one.push_trial("trial")


def test_reports_are_pulled_without_checkpoints(mirrors):
    one, other = mirrors
    (one.folder / "experiment.yaml").write_text("name: sweep")
    one.claim("trial")
    (one.folder / "trial" / "config.yaml").write_text("method: gru")
    write(one, "trial", range(2), "completed")
    checkpoint(one, "trial", 2)
    one.push("experiment.yaml", "trial/config.yaml")
    one.push_trial("trial")
    assert other.exists("experiment.yaml")
    assert not other.exists("nothing")
    other.pull_reports()
    found = {path.relative_to(other.folder).as_posix() for path in other.folder.rglob("*.*")}
    names = ("config.yaml", "metrics.csv", "status.json")
    assert found == {"experiment.yaml", *(f"trial/{name}" for name in names)}
    other.pull("nothing.csv")
    assert not (other.folder / "nothing.csv").exists()


def test_what_cannot_be_used(monkeypatch, tmp_path):
    monkeypatch.setenv("SGRL_MIRROR_DIR", str(tmp_path))
    monkeypatch.setattr("sgrl.tuning.storage.ATTEMPTS", 1)
    with pytest.raises(StorageError, match="nosuch://bucket/x: Protocol not known: nosuch"):
        Mirror("nosuch://bucket/x", "driver")
    with pytest.raises(StorageError, match=r"ftp://127.0.0.1:1/x: ConnectionRefusedError"):
        Mirror("ftp://someone:password@127.0.0.1:1/x", "driver")


def test_addresses():
    assert is_address("s3://bucket/results")
    assert not is_address("results/deep")
    assert join("s3://bucket/results/", "x") == "s3://bucket/results/x"
    assert str(join("results", "x")) == "results/x"
    assert has_secrets("ftp://someone:password@host/x")
    assert not has_secrets("gs://bucket/a:b@c")
    assert hide_secrets("ftp://someone:password@host/x") == "ftp://host/x"
