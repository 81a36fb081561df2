"""Arguments that several rooms of commands share."""

import os
from pathlib import Path
from typing import Annotated, TypeVar

import typer

P = TypeVar("P", str, Path, None)


def home(path: P) -> P:
    """Expand ~ in a path, which shells leave as it is in --results='~/runs'.

    Args:
        path: the path, if there is one.

    Returns:
        The same, of the same type.
    """
    return path if path is None else type(path)(os.path.expanduser(path))  # noqa: PTH111


def homes(paths: list[str]) -> list[str]:
    """Expand ~ in paths.

    Args:
        paths: the paths.

    Returns:
        The same.
    """
    return [home(path) for path in paths]


JSON = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts (docs/results.md).")]
Methods = Annotated[
    str | None, typer.Option(metavar="NAMES", help="Of these methods alone, as in gru,lstm.")
]
Seeds = Annotated[
    str | None, typer.Option(metavar="SEEDS", help="Of these seeds alone, as in 0..5 or 0,2,4.")
]
Experiment = Annotated[
    str, typer.Argument(metavar="DIR", callback=home, help="As in results/quickstart.")
]
Checkpoint = Annotated[
    str,
    typer.Argument(
        metavar="CHECKPOINT",
        callback=home,
        help="As in results/NAME/TRIAL/checkpoints/000025.",
    ),
]
