"""Which of the prebuilt libraries that a wheel brings is used, and when none is."""

import json
import multiprocessing
import platform
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from sgrl.cli import app
from sgrl.compiled import library, prebuilt
from sgrl.compiled.compiler import CompileError, find_compiler
from sgrl.errors import UserError
from sgrl.nn.kernels import backends, native

QUICKSTART = Path(__file__).parents[1] / "tune_configs" / "quickstart.yaml"
#: Instruction sets for this machine, the widest first.
LEVELS = [name for name, level in prebuilt.LEVELS.items() if level.machine == platform.machine()]
BUILT_BY = "a compiler 1.0"
CACHES = (library.load_library, library.core_build, library._prebuilt, backends._warn)

pytestmark = pytest.mark.skipif(not LEVELS, reason="wheels bring no libraries for this machine")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a wheel brings, of a source that is built in a moment."""
    folder = tmp_path_factory.mktemp("wheel") / "prebuilt"
    source = folder.with_name("slot_neurons.cpp")
    source.write_text('extern "C" int sgrl_answer() { return 42; }\n')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prebuilt, "SOURCE", source)
        prebuilt.build(folder, platform.machine(), find_compiler(), BUILT_BY)
    return folder


@pytest.fixture
def wheel(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """sgrl as installed from a wheel, with all instruction sets and no compiler."""
    folder = tmp_path / "prebuilt"
    folder.mkdir()
    for file in built.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr(prebuilt, "FOLDER", folder)
    monkeypatch.setattr(prebuilt, "SOURCE", built.with_name("slot_neurons.cpp"))
    monkeypatch.setenv("SGRL_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CXX", "SGRL_CXXFLAGS", "SGRL_CORE"):
        monkeypatch.delenv(name, raising=False)
    has(monkeypatch, prebuilt.LEVELS[LEVELS[0]].features)
    yield folder
    forget()


def forget() -> None:
    for cached in CACHES:
        cached.cache_clear()


def has(monkeypatch: pytest.MonkeyPatch, features: frozenset[str] | set[str]) -> None:
    """Let the processor have these features, as far as sgrl can see."""
    monkeypatch.setattr(prebuilt, "features", lambda: {*features, "sse", "sse2", "fpu"})
    forget()


def test_the_widest_instruction_set_that_the_processor_has(
    wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for place, name in enumerate(LEVELS):
            has(monkeypatch, prebuilt.LEVELS[name].features)
            assert library.core_build() == f"{name}, prebuilt by {BUILT_BY}"
            for feature in sorted(prebuilt.LEVELS[name].features):
                has(monkeypatch, prebuilt.LEVELS[name].features - {feature})
                assert prebuilt.supported() == [
                    other
                    for other in LEVELS[place + 1 :]
                    if feature not in prebuilt.LEVELS[other].features
                ]
        has(monkeypatch, set())
        assert library.core_build() == "none: found no C++ compiler"
        assert "found no C++ compiler" in str(native.unavailable(torch.float32))


def replace(file: Path, content: bytes) -> None:
    file.unlink()  # not written over: this process may have it mapped
    file.write_bytes(content)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    replace(file, content)


def make_unloadable(file: Path) -> None:
    """As where the C library is too old: intact, and it cannot be loaded."""
    replace(file, b"\x7fELF of another world")
    manifest = json.loads((file.parent / prebuilt.MANIFEST).read_text())
    manifest["libraries"][file.name] = prebuilt._digest(file)
    (file.parent / prebuilt.MANIFEST).write_text(json.dumps(manifest))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped": (flip, "is damaged"),
    "cut short": (lambda file: replace(file, file.read_bytes()[:9000]), "is damaged"),
    "missing": (Path.unlink, "is missing"),
    "unloadable": (make_unloadable, "too short|invalid ELF|file data"),
}


@pytest.mark.parametrize("count", range(1, len(LEVELS) + 1))
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_libraries_are_passed_over(wheel: Path, damage: str, count: int) -> None:
    """With a warning each, for the next narrower instruction set; the last, for a compiler."""
    spoil, message = DAMAGES[damage]
    for level in LEVELS[:count]:
        spoil(wheel / f"{level}-double.so")  # either type of number counts
    with pytest.warns(RuntimeWarning, match=f"({message}).*reinstall sgrl") as caught:
        said = library.core_build()
    assert len(caught) == count
    expected = [f"{name}, prebuilt by {BUILT_BY}" for name in LEVELS[count:]]
    assert said == [*expected, "none: found no C++ compiler"][0]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"source": 1}', "\0"])
def test_a_damaged_manifest(wheel: Path, text: str) -> None:
    (wheel / prebuilt.MANIFEST).write_text(text)
    with pytest.warns(RuntimeWarning, match=r"libraries\.json cannot be read .*: reinstall sgrl"):
        assert library.core_build() == "none: found no C++ compiler"


def test_a_level_that_the_wheel_lacks(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = json.loads((wheel / prebuilt.MANIFEST).read_text())
    for real in prebuilt.REALS:
        del manifest["libraries"][f"{LEVELS[0]}-{real}.so"]
    (wheel / prebuilt.MANIFEST).write_text(json.dumps(manifest))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = [f"{name}, prebuilt by {BUILT_BY}" for name in LEVELS[1:]]
        assert library.core_build() == [*expected, "none: found no C++ compiler"][0]
    monkeypatch.setenv("SGRL_CORE", LEVELS[0])
    forget()
    with pytest.raises(UserError, match=f"SGRL_CORE is {LEVELS[0]}, and this inst.* no such"):
        library.core_build()


def test_a_source_that_was_changed_is_compiled(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its structures may differ from those of the libraries."""
    source = tmp_path / "slot_neurons.cpp"
    source.write_text(prebuilt.SOURCE.read_text() + "// changed\n")
    monkeypatch.setattr(prebuilt, "SOURCE", source)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert library.core_build() == "none: found no C++ compiler"


def test_what_the_user_asks_for(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(**variables: str) -> str:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            forget()
            return library.core_build()

    for level in LEVELS:
        assert build(SGRL_CORE=level) == f"{level}, prebuilt by {BUILT_BY}"
    compiler = wheel.parent / "g++"
    compiler.write_text("#!/bin/sh\necho 'g++ (Some 1.2) 1.2.3'; echo Free Software Foundation\n")
    compiler.chmod(0o755)
    assert build(SGRL_CORE="compile") == "compiled for this processor by g++ (Some 1.2) 1.2.3"
    assert build(SGRL_CXXFLAGS="-O1").endswith("by g++ (Some 1.2) 1.2.3 -O1")
    # Flags are for a compiler; a level that is named stays what it is.
    assert build(SGRL_CXXFLAGS="-O1", SGRL_CORE=LEVELS[-1]).startswith(LEVELS[-1])
    others = [name for name in prebuilt.LEVELS if name not in LEVELS]
    for asked, message in (
        ("native", r"SGRL_CORE is 'native'; (did you mean|known)"),
        (others[0], f"SGRL_CORE is {others[0]}, and this processor has {LEVELS[0]}"),
    ):
        with pytest.raises(UserError, match=message):
            build(SGRL_CORE=asked)
        for command, code, before in (
            (["--version"], 0, r"sgrl [\d.]+\n(commit: .*\n)?core: none: "),
            (["sweep", str(QUICKSTART), "--dry-run", "--no-estimate"], 2, "sgrl: "),
        ):
            forget()
            result = CliRunner().invoke(app, command, env={"SGRL_CORE": asked})
            assert result.exit_code == code
            assert re.match(f"{before}{message}.*\n", result.output)


def _load(_: int) -> tuple[str, int]:
    found = library.load_library("float")
    assert not isinstance(found, CompileError)
    return found._name, found.sgrl_answer()


def test_processes_side_by_side(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each runs the code, for whatever this processor really has."""
    has(monkeypatch, prebuilt.LEVELS[LEVELS[-1]].features)
    with multiprocessing.get_context("fork").Pool(4) as pool:
        found = {*pool.map(_load, range(8))}
    assert found == {(str(wheel / f"{LEVELS[-1]}-float.so"), 42)}


def test_a_checkout_compiles_for_its_own_processor() -> None:
    forget()
    assert not prebuilt.FOLDER.exists()
    assert library.core_build().startswith(library.COMPILED_HERE)
