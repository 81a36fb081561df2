"""Results in object storage, on real servers: S3's protocol, which has no folders, and FTP."""

import os
import re
import shlex
import signal
import subprocess
import threading
import time
from pathlib import Path

import fsspec
import pytest
from moto.server import ThreadedMotoServer
from pyftpdlib.authorizers import DummyAuthorizer
from pyftpdlib.handlers import FTPHandler
from pyftpdlib.servers import ThreadedFTPServer
from sweeps import make_experiment, metrics_without_times
from typer.testing import CliRunner
from worker_server import driver

from sgrl.cli import app
from sgrl.results.checkpoints import MANIFEST, list_checkpoints, verify, write_checkpoint
from sgrl.results.locations import open_store, reading, reading_checkpoint
from sgrl.results.storage import StorageError, has_secrets, hide_secrets, is_address, join
from sgrl.tuning.sweep import run_sweep


@pytest.fixture(scope="module")
def ftp(tmp_path_factory):
    authorizer = DummyAuthorizer()
    authorizer.add_anonymous(str(tmp_path_factory.mktemp("storage")), perm="elradfmwMT")
    handler = type("Handler", (FTPHandler,), {"authorizer": authorizer, "log_prefix": ""})
    server = ThreadedFTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"timeout": 0.1}, daemon=True)
    thread.start()
    yield f"ftp://127.0.0.1:{server.address[1]}"
    server.close_all()
    thread.join()


@pytest.fixture(scope="module")
def s3():
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "a key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "a secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        fsspec.filesystem("s3", skip_instance_cache=True).mkdir("bucket")
        yield "s3://bucket"
    server.stop()


@pytest.fixture(params=["s3", "ftp"])
def address(request, tmp_path, monkeypatch):
    """Of a sweep that is not there yet."""
    monkeypatch.setenv("SGRL_MIRROR_DIR", str(tmp_path / "mirrors"))
    return join(f"{request.getfixturevalue(request.param)}/{tmp_path.name}", "sweep")


@pytest.fixture
def mirrors(address):
    """Two mirrors of one sweep, as two machines have them."""
    return open_store(address, "driver"), open_store(address, "trials")


@pytest.fixture
def storage(address):
    """What the storage holds: a function from a name in the sweep to its contents."""
    files, root = fsspec.core.url_to_fs(address, use_listings_cache=False)

    def look(name):
        return files.cat_file(f"{root}/{name}")

    def names(name):
        return sorted(path.rpartition("/")[2] for path in files.ls(f"{root}/{name}", detail=False))

    look.names, look.files, look.root = names, files, root
    return look


def checkpoint(mirror, trial, iteration, keep=2):
    def save(folder):
        (folder / "deep").mkdir()
        (folder / "deep" / "weights").write_bytes(bytes([iteration]) * 1000)

    return write_checkpoint(mirror.folder / trial / "checkpoints", iteration, save, keep=keep)


def write(mirror, trial, rows, state="running"):
    (mirror.folder / trial / "metrics.csv").write_text("iteration\n" + "".join(map(str, rows)))
    (mirror.folder / trial / "status.json").write_text(state)


def test_a_trial_goes_up_and_down(mirrors, storage):
    one, other = mirrors
    one.claim("trial")
    for iteration in (2, 4, 6):
        write(one, "trial", range(iteration))
        checkpoint(one, "trial", iteration)
        one.push_trial("trial")
    assert storage.names("trial/checkpoints") == ["000004", "000006"]
    assert storage("trial/checkpoints/000006/deep/weights") == bytes([6]) * 1000
    checkpoint(other, "trial", 8)  # of a start that the storage does not know of
    other.claim("trial")
    theirs = other.folder / "trial"
    assert (theirs / "metrics.csv").read_text() == "iteration\n012345"
    assert sorted(path.name for path in (theirs / "checkpoints").iterdir()) == ["000004", "000006"]
    for name in ("000004", "000006"):
        verify(theirs / "checkpoints" / name)
    # What is there already is not downloaded again, unless it is damaged.
    weights = theirs / "checkpoints/000004/deep/weights"
    modified = weights.stat().st_mtime_ns
    other.claim("trial")
    assert weights.stat().st_mtime_ns == modified
    weights.write_bytes(b"short")
    other.claim("trial")
    verify(theirs / "checkpoints/000004")


def test_a_cut_upload_is_no_checkpoint(mirrors, storage):
    one, other = mirrors
    one.claim("trial")
    write(one, "trial", range(4))
    for iteration in (2, 4):
        checkpoint(one, "trial", iteration)
    one.push_trial("trial")
    newest = f"{storage.root}/trial/checkpoints/000004"
    storage.files.rm(f"{newest}/{MANIFEST}")  # it is uploaded last
    storage.files.pipe_file(f"{newest}/deep/weights", b"part")
    assert [other.newest_checkpoint("trial", n) for n in (5, 3, 1)] == [2, 2, 0]
    assert other.has_checkpoint("trial", 2)
    assert not other.has_checkpoint("trial", 4)
    other.claim("trial")
    (held,) = list_checkpoints(other.folder / "trial/checkpoints")
    assert held.name == "000002"
    verify(held)
    other.push_trial("trial")
    assert storage.names("trial/checkpoints") == ["000002"]
    one.claim("trial")
    checkpoint(one, "trial", 4)
    storage.files.makedirs(f"{newest}/deep", exist_ok=True)
    storage.files.pipe_file(f"{newest}/deep/weights", b"part")
    one.push_trial("trial")  # what lacks its manifest goes up again
    assert storage("trial/checkpoints/000004/deep/weights") == bytes([4]) * 1000
    assert storage.names("trial/checkpoints/000004") == ["deep", MANIFEST]


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
    monkeypatch.setattr("sgrl.results.mirror.ATTEMPTS", 1)
    with pytest.raises(StorageError, match="nosuch://bucket/x: Protocol not known: nosuch"):
        open_store("nosuch://bucket/x", "driver")
    with pytest.raises(StorageError, match=r"ftp://127.0.0.1:1/x: ConnectionRefusedError"):
        open_store("ftp://127.0.0.1:1/x", "driver")
    with pytest.raises(StorageError, match=r"^ftp://127.0.0.1/x: keep the password out"):
        open_store("ftp://someone:password@127.0.0.1/x", "driver")


def test_addresses():
    assert is_address("s3://bucket/results")
    assert not is_address("results/deep")
    assert join("s3://bucket/results/", "x") == "s3://bucket/results/x"
    assert str(join("results", "x")) == "results/x"
    assert has_secrets("ftp://someone:password@host/x")
    assert not has_secrets("gs://bucket/a:b@c")
    assert hide_secrets("ftp://someone:password@host/x") == "ftp://host/x"


def run(*words, mirror, **options):
    """Start `sgrl` as on a machine whose mirrors are in one folder of their own."""
    environment = {**os.environ, "SGRL_MIRROR_DIR": str(mirror), "OMP_NUM_THREADS": "1"}
    environment.pop("RAY_ADDRESS", None)
    command = [*driver("from sgrl.cli import main; main()"), *map(str, words)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, **pipes, **options)


def answer(*words, code=0):
    """What `sgrl` says, run in this process."""
    result = CliRunner().invoke(app, [*map(str, words)])
    assert result.exit_code == code, result.output
    return result.output


@pytest.mark.usefixtures("ray_session")
def test_a_killed_sweep_goes_on_on_another_machine(s3, tmp_path, monkeypatch):
    config = tmp_path / "small.yaml"
    methods = ("sparsenet_sgprop", "gru", "diverging")
    stop = {"training_iteration": 20}
    experiment = make_experiment(config, methods, stop=stop, seeds=[0], concurrency=2)
    results = f"{s3}/{tmp_path.name}"
    there = f"{results}/small"

    first = run("sweep", config, "--results", results, mirror=tmp_path / "one", process_group=0)
    files, root = fsspec.core.url_to_fs(there, use_listings_cache=False)
    deadline = time.monotonic() + 120
    while sum(name.endswith(f"/{MANIFEST}") for name in files.find(root)) < 3:
        assert time.monotonic() < deadline
        assert first.poll() is None, first.stderr.read()
        time.sleep(0.5)
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    # Nothing but the storage goes on: not even a process of the first machine.
    monkeypatch.setenv("SGRL_MIRROR_DIR", str(tmp_path / "other"))
    taken = answer("sweep", config, "--results", results, code=2)
    assert taken.endswith(
        f"sgrl: {there} already exists: `sgrl resume {there}` continues it, --name NAME starts "
        "another sweep\n"
    )
    assert "3 trials, " in answer("resume", there, "--dry-run")

    second = run("resume", there, mirror=tmp_path / "other")
    out, error = second.communicate()
    assert second.returncode == 1, error  # a trial failed
    assert f"results in {there}" in out
    assert f"written: {there}/comparison.csv" in out
    whole = run_sweep(experiment, tmp_path, "whole")
    with reading(there) as folder:
        assert metrics_without_times(folder) == metrics_without_times(whole)
        assert folder.name == "small"
        names = {path.name for path in folder.iterdir() if path.is_file()}
        assert names >= {"experiment.yaml", "summary.csv", "comparison.csv", "provenance.json"}
    assert files.exists(f"{root}/figures/success_rate.png")
    trial = f"{there}/gru_seed=0"
    assert files.glob(f"{root}/gru_seed=0/events.out.tfevents.*")
    assert sorted(files.ls(f"{root}/gru_seed=0/checkpoints", detail=False)) == [
        f"{root}/gru_seed=0/checkpoints/0000{iteration}" for iteration in (18, 20)
    ]
    weights = whole / "gru_seed=0/checkpoints/000020/policy.safetensors"
    with reading_checkpoint(f"{trial}/checkpoints/000020") as checkpoint:
        verify(checkpoint)
        assert (checkpoint / weights.name).read_bytes() == weights.read_bytes()

    assert "20/20" in answer("status", there)
    assert "--out" in answer("report", there, code=2)
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parent.parent / "docs/faults.md").read_text()
    commands = re.findall("^sgrl (.* s3://.*)$", text, flags=re.MULTILINE)
    assert len(commands) == 4
    said = ""
    checks_only = {"sweep": ["--dry-run", "--no-estimate"], "resume": ["--dry-run"]}
    for command in commands:
        command = command.replace("s3://BUCKET/results/quickstart", there).replace("0100", "0020")
        words = shlex.split(command.replace("s3://BUCKET/results", results))
        words[1] = words[1].replace("tune_configs/quickstart.yaml", str(config))
        said += answer(*words, *checks_only.get(words[0], []))
    assert "gru_seed=0" in (tmp_path / "report.html").read_text()
    assert "episodes: 100" in said
    settled = answer("resume", there, "--dry-run")
    assert "3 trials, 0 to run" in settled


def test_addresses_that_lead_nowhere(s3, tmp_path, monkeypatch):
    monkeypatch.setenv("SGRL_MIRROR_DIR", str(tmp_path / "mirror"))
    config = tmp_path / "small.yaml"
    make_experiment(config)
    for words, reason in (
        (["sweep", config, "--results", "s3://nosuchbucket"], "s3://nosuchbucket/small: "),
        (["resume", f"{s3}/nothing"], f"{s3}/nothing holds no sweep: give a folder such as"),
        (["status", f"{s3}/nothing"], f"{s3}/nothing holds nothing"),
        (["evaluate", f"{s3}/nothing"], f"{s3}/nothing holds nothing"),
        (["sweep", config, "--results", f"{s3}/new", "--track", "mlflow"], "MLFLOW_TRACKING_URI"),
        (["sweep", config, "--results", "nosuch://x"], "nosuch://x/small: Protocol not known"),
    ):
        said = answer(*words, code=2)
        (line,) = [line for line in said.splitlines() if line.startswith("sgrl: ")]
        assert reason in line
        assert "Traceback" not in said
