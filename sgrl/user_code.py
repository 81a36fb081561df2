"""Users' own code: importing what experiment files name, and its errors in one line.

A class of the user's is named `module:Class`, as in my_package.models:MyPolicy.
"""

import hashlib
import importlib
import importlib.metadata
import sys
import sysconfig
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from sgrl.names import did_you_mean

Class = TypeVar("Class", bound=type)

#: Packages through which a user's code is called: where an error of theirs shows up is not where
#: its cause is.
LIBRARIES = ("sgrl", "gymnasium", "numpy", "torch", "ray")
MESSAGE_LENGTH = 300
#: How a user's code fails: many simulators end the process where they should raise.
FAILURES = (Exception, SystemExit)


class UserCodeError(ValueError):
    """What a user named cannot be imported, or is not what it must be; the message is one line."""


def import_named(name: str) -> ModuleType:
    """Import a module that a user named; the current folder counts, as with `python -m`.

    Raises:
        UserCodeError: there is no such module, or its own code fails, which is said with file and
            line.
    """
    folder = str(Path.cwd())
    if folder not in sys.path and "" not in sys.path:
        sys.path.insert(0, folder)
    importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except FAILURES as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing is not None and f"{name}.".startswith(f"{missing}."):
            raise UserCodeError(
                f"no module named {name!r}: it is neither installed nor in the current folder"
            ) from error
        raise UserCodeError(f"the module {name} fails: {described(error)}") from error


def module_of(name: Any) -> str | None:
    """Return the module of a name as in module:Class; None of all others."""
    return name.rpartition(":")[0] or None if isinstance(name, str) else None


def named_class(name: str, base: Class) -> Class:
    """Return the class that a user named, as in module:Class.

    Args:
        name: the name.
        base: what it has to be derived from.

    Raises:
        UserCodeError: as `import_named`, or there is no such class.
    """
    module, _, attribute = name.rpartition(":")
    try:
        there = vars(import_named(module))
    except UserCodeError as error:
        raise UserCodeError(f"{name}: {error}") from error
    needed = f"{base.__module__}.{base.__name__}"
    if attribute not in there:
        own = [f"{module}:{key}" for key, value in there.items() if _is_derived(value, base)]
        hint = did_you_mean(name, own) if own else f"it has no class derived from {needed}"
        raise UserCodeError(f"the module {module} has no {attribute}; {hint}")
    found = there[attribute]
    if not _is_derived(found, base):
        raise UserCodeError(f"{name} is not derived from {needed}")
    return found


def _is_derived(value: Any, base: type) -> bool:
    return isinstance(value, type) and issubclass(value, base) and value is not base


def identity(name: str) -> dict[str, str]:
    """Return what tells one state of a user's package from another.

    Args:
        name: of the package, or of a module in it.

    Returns:
        As far as it has them: version, of the distributions that it is installed from, and where
        it is not installed or still to be edited, sha256, of its Python files. Raises as
        `import_named`.
    """
    top = name.partition(".")[0]
    texts, found = sources(top), {}
    if installed := importlib.metadata.packages_distributions().get(top):
        versions = (f"{each} {importlib.metadata.version(each)}" for each in sorted(set(installed)))
        found["version"] = ", ".join(versions)
    if texts:
        digest = hashlib.sha256()
        for file, text in texts.items():
            digest.update(f"{file}\0{text}\0".encode())
        found["sha256"] = digest.hexdigest()
    return found


def source_of(name: str) -> Path | None:
    """Return the file or package folder that another machine needs to import a user's module.

    None where it is installed. Raises as `import_named`.
    """
    top = name.partition(".")[0]
    module = import_named(top)
    folders = list(getattr(module, "__path__", ()))
    place = Path(folders[0] if folders else module.__file__ or "<built in>")
    installed = {"site-packages", "dist-packages"} & set(place.parts) or _is_library(place)
    return None if installed else place


def sources(name: str) -> dict[str, str]:
    """Return the texts of the Python files behind a user's module, by name from its folder.

    Empty where it is installed. Raises as `import_named`.
    """
    place = source_of(name)
    if place is None:
        return {}
    files = sorted(place.rglob("*.py")) if place.is_dir() else [place]
    return {str(file.relative_to(place.parent)): file.read_text("utf-8") for file in files}


def described(error: BaseException) -> str:
    """Say in one line what an exception is and where the code that raised it stands.

    As in `RuntimeError: simulator crashed (my_envs.py:12)`.
    """
    if isinstance(error, SyntaxError) and error.filename is not None:
        message, place = error.msg, f"{_shown(error.filename)}:{error.lineno}"
    else:
        message, place = str(error), _place(error)
    message = " ".join(message.split())
    if len(message) > MESSAGE_LENGTH:
        message = f"{message[:MESSAGE_LENGTH]}..."
    line = f"{type(error).__name__}: {message}" if message else type(error).__name__
    return f"{line} ({place})" if place else line


def _place(error: BaseException) -> str:
    """File and line of the innermost frame outside of libraries; empty if there is none."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not _is_library(Path(frame.filename)):
            return f"{_shown(frame.filename)}:{frame.lineno}"
    return ""


def _is_library(file: Path) -> bool:
    if file.name.startswith("<"):
        return True
    parts = file.parts
    if "site-packages" in parts:
        return parts[parts.index("site-packages") + 1] in LIBRARIES
    ours = (Path(__file__).parent, Path(sysconfig.get_path("stdlib")))
    return any(file.is_relative_to(folder) for folder in ours)


def _shown(file: str) -> str:
    """A file's name from the current folder where it is in there."""
    path = Path(file)
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
