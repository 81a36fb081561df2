"""The sdist and wheels of this checkout: the same bytes again, and they train without a compiler.

`make test-dist`; building them takes a minute.
"""

import email.message
import email.parser
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from sgrl import __version__
from sgrl.compiled import prebuilt
from sgrl.compiled.compiler import COMPILERS
from sgrl.compiled.processor import features

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
MACHINE = platform.machine()
LEVELS = [name for name, level in prebuilt.LEVELS.items() if level.machine == MACHINE]
#: What this processor can run.
HERE = [name for name in LEVELS if prebuilt.LEVELS[name].features <= features()]
#: The oldest C library that torch's wheels run on.
GLIBC_OF_TORCH = 28

EXPERIMENT = """
name: small
config:
  environment: {env: labyrinth_escape, env_config: {episode_length: 10}}
  env_runners: {num_envs_per_env_runner: 3}
methods:
  sparsenet: {model: {policy: sparsenet, num_neurons: 20, neuron_size: 3, backend: native}}
  gru: {model: {policy: gru, hidden_size: 8, backend: torch}}
stop: {training_iteration: 3}
checkpoint: {every: 1}
seeds: [0]
"""
TRAIN = """
import sys, torch
from sgrl.compiled.library import core_build
from sgrl.nn.kernels import native
from sgrl.nn.registry import make_policy
from sgrl.envs.registry import make_vector
from sgrl.reinforce.rollout import Rollout
from sgrl.reinforce.update import UpdateSettings, make_optimizers, update

print(sys.modules["sgrl"].__file__)
print(core_build())
for dtype in (torch.float32, torch.float64):
    for backend in ("native", "eager"):
        policy = make_policy(
            "sparsenet", 56, 4, seed=0, backend=backend, num_neurons=20, neuron_size=5, dtype=dtype
        )
        env = make_vector("labyrinth_escape", 7, {"episode_length": 12})
        rollout = Rollout(env, policy, seed=0)
        optimizers = make_optimizers(policy, 2e-3, 1e-5)
        for _ in range(3):
            update(policy, optimizers, rollout.collect(), UpdateSettings())
        print(*(float(p.double().sum()) for p in policy.parameters()))
"""


class Built(NamedTuple):
    """What `make dist` builds."""

    sdist: Path
    wheel: Path


def run(*command: str | Path, cwd: Path, **variables: str) -> str:
    """Run a command outside of the checkout, and return what it printed."""
    apart = ("PYTHONPATH", "CXX", "SGRL_CXXFLAGS", "SGRL_CORE", "SGRL_WHEEL")
    environment = {name: value for name, value in os.environ.items() if name not in apart}
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=environment | {"SOURCE_DATE_EPOCH": "1700000000"} | variables,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def make_sdist(checkout: Path) -> Path:
    run(sys.executable, "setup.py", "-q", "sdist", cwd=checkout)
    (sdist,) = (checkout / "dist").iterdir()
    return sdist


def make_wheel(source: Path, to: Path, **variables: str) -> Path:
    pip = (sys.executable, "-m", "pip", "-q", "wheel", "--no-deps", "--no-build-isolation")
    run(*pip, "--no-index", "-w", to, source, cwd=to.parent, **variables)
    (wheel,) = to.iterdir()
    return wheel


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what git knows of this checkout."""
    folder = tmp_path_factory.mktemp("checkout")
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z", "--deduplicate"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file() and not name.startswith(("results/", "tests/")):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def built(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    sdist = make_sdist(checkout)
    return Built(sdist, make_wheel(sdist, tmp_path_factory.mktemp("wheel") / "dist"))


@pytest.fixture(scope="module")
def python(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of a fresh environment with the wheel installed; it borrows the other packages."""
    folder = tmp_path_factory.mktemp("fresh") / "venv"
    venv.create(folder, symlinks=True, with_pip=True)
    interpreter = folder / "bin" / "python"
    run(
        interpreter,
        "-m",
        "pip",
        "-q",
        "install",
        "--no-deps",
        "--no-index",
        built.wheel,
        cwd=folder,
    )
    packages = folder / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
    # After its own packages. A line, unlike a .pth file there, takes no editable install along.
    (packages / "borrowed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return interpreter


@pytest.fixture
def without_compiler(tmp_path: Path) -> dict[str, str]:
    """Environment variables for a machine without a compiler, with an empty cache."""
    commands = tmp_path / "bin"
    commands.mkdir()
    compiler = re.compile(r".*(\+\+|gcc|clang|icpx?)(-[\d.]+)?|cc|c\d\d|cpp")
    for folder in ("/usr/bin", "/bin"):
        for command in Path(folder).iterdir():
            link = commands / command.name
            if not compiler.fullmatch(command.name) and not link.is_symlink():
                link.symlink_to(command)
    assert shutil.which("bash", path=commands)
    assert not any(shutil.which(name, path=commands) for name in ("cc", "gcc", *COMPILERS))
    return {"PATH": str(commands), "SGRL_CACHE_DIR": str(tmp_path / "cache")}


def metadata(wheel: Path) -> email.message.Message:
    with zipfile.ZipFile(wheel) as archive:
        content = archive.read(f"sgrl-{__version__}.dist-info/METADATA").decode()
    return email.parser.Parser().parsestr(content)


def test_what_they_hold(built: Built) -> None:
    assert built.sdist.name == f"sgrl-{__version__}.tar.gz"
    tag = re.fullmatch(
        rf"sgrl-{__version__}-py3-none-manylinux_2_(\d+)_{MACHINE}\.whl", built.wheel.name
    )
    assert tag
    assert int(tag[1]) <= GLIBC_OF_TORCH
    with zipfile.ZipFile(built.wheel) as archive:
        names = set(archive.namelist())
        for level in LEVELS:
            for real in prebuilt.REALS:
                library = archive.read(f"sgrl/nn/kernels/prebuilt/{level}-{real}.so")
                assert library.startswith(b"\x7fELF")
                # The tag holds: nothing newer of the C library, and no other library.
                minors = re.findall(rb"\0GLIBC_2\.(\d+)", library)
                assert minors
                assert max(map(int, minors)) <= int(tag[1])
                assert not re.search(rb"GLIBCXX|CXXABI|GCC_|libstdc|libgcc|libgomp", library)
    page = (ROOT / "docs" / "installing.md").read_text()
    assert f"pip install {built.sdist.name}\n" in page
    if MACHINE == "x86_64":
        assert f"pip install {built.wheel.name}\n" in page
    package = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "sgrl").rglob("*")
        if path.is_file() and path.suffix != ".pyc" and path.parent != prebuilt.FOLDER
    }
    experiments = {f"tune_configs/{path.name}" for path in (ROOT / "tune_configs").iterdir()}
    package |= {f"sgrl/{name}" for name in experiments}
    assert {n for n in names if n.startswith("sgrl/") and "/prebuilt/" not in n} == package
    with tarfile.open(built.sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert package - {f"sgrl/{name}" for name in experiments} | experiments < inside
    assert {"CHANGELOG.md", "LICENSE", "setup.py", "tune_configs/quickstart.yaml"} < inside
    assert not {name for name in inside if name.startswith("tests") or name.endswith(".so")}


def test_metadata(built: Built) -> None:
    """The dependencies of pyproject.toml, and its Pythons."""
    said = metadata(built.wheel)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert said["Version"] == __version__
    assert said["Requires-Python"] == project["requires-python"]

    def plain(requirement: str) -> tuple[str, list[str]]:
        name, rest = re.fullmatch(r"([\w.\[\],-]+?)((?:[<>=!~].*)?)", requirement).groups()
        return name.lower(), sorted(filter(None, rest.split(",")))

    required = [line for line in said.get_all("Requires-Dist") or [] if "extra ==" not in line]
    assert sorted(map(plain, required)) == sorted(map(plain, project["dependencies"]))
    assert set(said.get_all("Provides-Extra") or []) == set(project["optional-dependencies"])


def test_the_same_bytes_again(built: Built, checkout: Path, tmp_path: Path) -> None:
    """Of the sdist, and of a wheel from it and from the checkout."""
    before = built.sdist.read_bytes()
    shutil.rmtree(checkout / "dist")
    for file in checkout.rglob("*"):
        os.utime(file)
    assert make_sdist(checkout).read_bytes() == before
    again = make_wheel(checkout, tmp_path / "dist")
    assert (again.name, again.read_bytes()) == (built.wheel.name, built.wheel.read_bytes())


def test_trains_without_a_compiler(
    python: Path, without_compiler: dict[str, str], tmp_path: Path
) -> None:
    """By every instruction set of this processor; close to eager, and the widest is the default."""
    for level in [None, *HERE]:
        asked = {} if level is None else {"SGRL_CORE": level}
        said = run(
            python,
            "-W",
            "error::RuntimeWarning",
            "-c",
            TRAIN,
            cwd=tmp_path,
            **without_compiler,
            **asked,
        )
        file, core, *sums = said.splitlines()
        assert file.startswith(str(python.parents[1]))
        assert core.startswith(f"{level or HERE[0]}, prebuilt by ")
        for expected, actual, tolerance in ((1, 0, 1e-3), (3, 2, 1e-9)):
            first, second = (list(map(float, sums[i].split())) for i in (expected, actual))
            assert first == pytest.approx(second, rel=tolerance, abs=tolerance)
    assert not (tmp_path / "cache").exists()


def test_sweeps_and_resumes_without_a_compiler(
    python: Path, without_compiler: dict[str, str], tmp_path: Path
) -> None:
    """The build is recorded, and a trial that goes on under another says so."""
    if len(HERE) < 2:
        pytest.skip("this processor has but one of the instruction sets")
    (tmp_path / "small.yaml").write_text(EXPERIMENT)
    sgrl = python.with_name("sgrl")
    assert f"sgrl {__version__}\ncore: {HERE[0]}, " in run(sgrl, "--version", cwd=tmp_path)
    common = without_compiler | {"HOME": str(tmp_path), "RAY_USAGE_STATS_ENABLED": "0"}
    # What the wheel brings along has names.
    assert "\nlabyrinth_escape " in run(sgrl, "list", "experiments", cwd=tmp_path)
    found = run(sgrl, "sweep", "labyrinth_escape", "--dry-run", "--no-estimate", cwd=tmp_path)
    assert found.startswith("labyrinth_escape: 300 trials\n")
    run(sgrl, "sweep", "small.yaml", cwd=tmp_path, **common)
    going_on = run(
        sgrl, "resume", "results/small", "--iterations", "5",
        cwd=tmp_path, **common, SGRL_CORE=HERE[-1],
    )  # fmt: skip
    # Of the network that computes in it, as it happens and at the end; not of the GRU.
    note = (
        f"going on from iteration 3 with another build of the compiled core ({HERE[-1]}, prebuilt"
    )
    said = [line.split("going on")[0] for line in going_on.splitlines() if note in line]
    assert said == ["", "sparsenet_seed=0: "]
    (trial,) = (tmp_path / "results" / "small").glob("sparsenet*/provenance.json")
    recorded = re.findall(r'"core": "([\w-]+), prebuilt by', trial.read_text())
    assert recorded == [HERE[0], HERE[-1]]


def test_without_libraries(checkout: Path, tmp_path: Path) -> None:
    """A wheel for any machine, asked for, or where there is no compiler."""
    names: list[Callable[[], Path]] = [
        lambda: make_wheel(checkout, tmp_path / "asked", SGRL_WHEEL="any"),
        lambda: make_wheel(checkout, tmp_path / "missing", CXX="no-such-compiler"),
    ]
    for make in names:
        wheel = make()
        assert wheel.name == f"sgrl-{__version__}-py3-none-any.whl"
        with zipfile.ZipFile(wheel) as archive:
            assert not [name for name in archive.namelist() if "prebuilt/" in name]
