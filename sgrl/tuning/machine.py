"""What is asked of every machine of a cluster before a sweep.

A new process answers there, so this imports little.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from sgrl.results.mirror import Mirror
from sgrl.results.storage import Store, is_address
from sgrl.user_code import UserCodeError, import_named


def look(location: str) -> tuple[str | None, str]:
    """Return the experiment file as this machine sees it, or else None and why it cannot."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            mirrored = is_address(location)
            store = Mirror(location, Path(folder)) if mirrored else Store(Path(location))
            store.pull(store.sweep.experiment)
            return store.sweep.experiment.read_text(encoding="utf-8"), ""
    except FileNotFoundError:
        return None, ""
    except OSError as error:
        return None, str(error)


def try_import(modules: Sequence[str]) -> str:
    """Return what is wrong with the modules on this machine; empty where nothing is."""
    try:
        for module in modules:
            import_named(module)
    except UserCodeError as error:
        return str(error)
    return ""
