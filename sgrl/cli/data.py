"""Commands that fetch data sets."""

from pathlib import Path
from typing import Annotated

import typer

from sgrl.bars import progress_bar
from sgrl.cli.options import home

app = typer.Typer(help="Data sets.", no_args_is_help=True)


@app.command()
def mnist(
    data_dir: Annotated[
        Path | None,
        typer.Option(
            callback=home,
            help="Folder of the files; SGRL_DATA_DIR, or one under the user's cache.",
        ),
    ] = None,
) -> None:
    """Fetch MNIST, checked, and say where it is."""
    from sgrl.envs.mnist import fetch

    with progress_bar("MNIST") as report:
        folder = fetch(data_dir, report)
    typer.echo(f"MNIST: {folder}")
