"""A results folder's files: each name is spelled once, and reading takes neither torch nor Ray."""

import ast
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import sgrl.results
from sgrl.files import is_locked, lock, replacing, write_text
from sgrl.results.folder import ExpertNetworkFolder, ProbeFolder, SweepFolder, TrialFolder

SOURCE = Path(sgrl.__file__).parent
#: Every name of a file or folder, by the module that spells it.
HOMES = {"manifest.json": "results/checkpoints.py", "zoo.json": "results/zoo.py"}
HOMES |= dict.fromkeys(["policy.json", "policy.safetensors"], "nn/registry.py")
for kind in (TrialFolder, SweepFolder, ExpertNetworkFolder, ProbeFolder):
    folder = kind("folder")
    paths = [path for path in vars(folder).values() if isinstance(path, Path)]
    HOMES |= {path.name: "results/folder.py" for path in paths if path != folder.path}


def texts(tree: ast.AST) -> Iterator[str]:
    """All strings of a module but docstrings."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, documented)]
    docstrings = {id(node.body[0].value) for node in nodes if ast.get_docstring(node) is not None}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from [node.value] if id(node) not in docstrings else []


def spells(text: str, name: str) -> bool:
    """Whether a string holds a name; a mere word must be a part of a path."""
    if "." in name:
        return re.search(rf"(?<![\w.]){re.escape(name)}(?!\w)", text) is not None
    return " " not in text and "/" in text and name in text.split("/")


def test_the_names_of_files_are_spelled_once() -> None:
    assert {"config.yaml", "metrics.csv", "checkpoints", "summary.csv"} <= HOMES.keys()
    for path in SOURCE.rglob("*.py"):
        module = path.relative_to(SOURCE).as_posix()
        for text in texts(ast.parse(path.read_text())):
            found = {name for name, home in HOMES.items() if home != module and spells(text, name)}
            assert not found, f"{module} spells {found}: {text!r}"


def test_results_are_read_without_torch_and_ray() -> None:
    names = [
        f"sgrl.results.{module.name}" for module in pkgutil.iter_modules(sgrl.results.__path__)
    ]
    assert "sgrl.results.runs" in names
    checked = (
        f"import sys, {', '.join(names)}\n"
        "above = {'sgrl.tuning', 'sgrl.analysis', 'sgrl.rllib', 'torch', 'ray'}\n"
        "assert not above & set(sys.modules), above & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", checked], check=True)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_text(path, "before")

    def write_half() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half of wh")
            assert path.read_text() == "before"
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_half()
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "before"
    with pytest.raises(FileNotFoundError):
        write_text(tmp_path / "nowhere" / "file", "")


def test_a_lock_ends_with_the_process_that_holds_it(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    assert not is_locked(path)
    assert not path.exists()  # asking writes nothing
    code = (
        "import sys, sgrl.files, pathlib\nheld = sgrl.files.lock(pathlib.Path(sys.argv[1]))\n"
        "held.acquire()\nprint(flush=True)\ninput()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline()
        assert is_locked(path)
        with pytest.raises(TimeoutError), lock(path, 0):
            pass
        holder.kill()
        with lock(path, 30):
            assert is_locked(path)
    assert not is_locked(path)
