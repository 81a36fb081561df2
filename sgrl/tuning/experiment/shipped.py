"""The experiments of tune_configs/, which a wheel brings along, by their names."""

import re
from pathlib import Path

#: Beside the package in a checkout, in the package where a wheel is installed.
FOLDER = Path(__file__).parents[3] / "tune_configs"
if not FOLDER.is_dir():
    FOLDER = Path(__file__).parents[2] / "tune_configs"


def shipped_experiments() -> dict[str, Path]:
    """Return the files, by their names without .yaml."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}


def about(path: Path) -> str:
    """Return the first sentence of the comment that a file begins with."""
    head = re.match(r"(# .*\n)+", path.read_text(encoding="utf-8"))
    text = " ".join(line.removeprefix("# ") for line in head[0].splitlines()) if head else ""
    return re.split(r"(?<=\.)\s", text, maxsplit=1)[0]


def find_experiment(config: Path) -> Path:
    """Return the file that an argument means.

    Args:
        config: a file, or the name of one that sgrl brings along.

    Returns:
        The file; where there is neither, `config` itself.
    """
    if config.exists():
        return config
    return shipped_experiments().get(str(config), config)
