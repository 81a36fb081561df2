"""The house stands: floors, no circles, files of readable length."""

import shutil
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parents[1]
MOST_LINES = 450


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
