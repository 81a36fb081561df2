"""The house stands as docs/architecture.md has it: floors, no circles, files of readable length."""

import ast
import itertools
import re
import shutil
import subprocess
import sys
import tomllib
from graphlib import TopologicalSorter
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parents[1]
MOST_LINES = 450
PAGE = (ROOT / "docs" / "architecture.md").read_text()
REFERENCE = re.compile(r"`([\w/]+\.py):([\w.]+)`")


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    linter = Path(sys.executable).with_name("lint-imports")
    return subprocess.run(
        [linter, "--no-logo", "--no-cache"],
        cwd=folder,
        env={"PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    ("file", "imported", "broken"),
    [
        ("nn/recurrent.py", "sgrl.envs.registry", "No import goes upwards"),
        ("results/runs.py", "sgrl.analysis.style", "No import goes upwards"),
        ("nn/sgprop.py", "sgrl.nn.recurrent", "No imports in a circle"),
    ],
)
def test_the_linter_finds_a_planted_import(
    tmp_path: Path, file: str, imported: str, broken: str
) -> None:
    shutil.copytree(ROOT / "sgrl", tmp_path / "sgrl", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copyfile(ROOT / "pyproject.toml", tmp_path / "pyproject.toml")
    clean = lint_imports(tmp_path)
    assert clean.returncode == 0, clean.stdout
    path = tmp_path / "sgrl" / file
    # Inside of a function, where Python itself would take no notice.
    path.write_text(f"{path.read_text()}\n\ndef planted():\n    import {imported}\n")
    found = lint_imports(tmp_path)
    assert found.returncode == 1, found.stderr
    assert f"{broken} BROKEN" in found.stdout


def test_no_file_imports_itself_through_others() -> None:
    """Unlike the linter's, these circles may lead through the __init__ of a folder above."""
    graph = grimp.build_graph("sgrl", cache_dir=None)
    imports = {name: graph.find_modules_directly_imported_by(name) for name in graph.modules}
    TopologicalSorter(imports).prepare()


def test_no_python_file_is_too_long_to_read() -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in ROOT.glob("sgrl/**/*.py")}
    assert {path: length for path, length in lengths.items() if length > MOST_LINES} == {}


def named_in(tree: ast.Module | ast.ClassDef) -> dict[str, ast.AST]:
    """What a module or class defines itself, by name."""
    found: dict[str, ast.AST] = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = node
        elif isinstance(node, ast.Assign):
            found |= {target.id: node for target in node.targets if isinstance(target, ast.Name)}
    return found


def test_the_page_names_what_there_is() -> None:
    references = REFERENCE.findall(PAGE)
    assert len(references) > 30
    for file, name in references:
        node: ast.AST = ast.parse((ROOT / "sgrl" / file).read_text())
        for step in name.split("."):
            assert isinstance(node, ast.Module | ast.ClassDef), f"{file}:{name}"
            assert step in named_in(node), f"{file} has no {name}"
            node = named_in(node)[step]


def test_each_parameter_on_the_page_enters_a_room_once() -> None:
    walks = re.findall(r"(?:^\d+\. .*\n(?:   .*\n)*)+", PAGE, flags=re.MULTILINE)
    assert len(walks) == 5
    for walk in walks:
        on_the_way = re.sub(r"\([^()]*\)", "", walk)
        rooms = [file.partition("/")[0] for file, _ in REFERENCE.findall(on_the_way)]
        entered = [room for room, _ in itertools.groupby(rooms)]
        assert len(entered) == len(set(entered)), entered


def test_the_page_shows_the_floors_of_the_linter() -> None:
    linted = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    floors: list[set[str]] = []
    for floor, rooms in re.findall(r"^\| (\d?) ?\| (`.*?`) \|", PAGE, flags=re.MULTILINE):
        floors += [set()] if floor else []
        floors[-1] |= {Path(room).stem for room in re.findall(r"`(.*?)`", rooms)}
    layers = linted["contracts"][0]["layers"]
    assert floors == [set(layer.split(" | ")) for layer in layers]
