"""What all commands do on the terminal: errors in one line, and progress bars."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import typer

from sgrl.commands import command


@contextmanager
def one_line_errors(*errors: type[Exception], resume: str | Path | None = None) -> Iterator[None]:
    """Turn a user's errors into one line on stderr and exit status 2.

    Args:
        errors: the errors; others keep their traceback.
        resume: the sweep that an interrupted command can resume.

    Yields:
        Nothing.

    Raises:
        typer.Exit: on such an error, or with status 130 on Ctrl-C.
    """
    try:
        yield
    except errors as error:
        said = str(error)
        if isinstance(error, OSError) and error.filename:
            said = f"{error.filename}: {error.strerror}"
        for line in said.splitlines() or [""]:
            typer.echo(f"sgrl: {line}", err=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        hint = f"; go on with: {command('sgrl', 'resume', resume)}" if resume else ""
        typer.echo(f"sgrl: interrupted{hint}", err=True)
        raise typer.Exit(130) from None


@contextmanager
def progress_bar(title: str, total: int | None = None) -> Iterator[Callable[..., None]]:
    """Show a progress bar on stderr if that is a terminal, until the context ends.

    Args:
        title: the text beside it.
        total: number of steps, if it is known.

    Yields:
        A function that advances the bar, by one step or the number given; its keyword `total`
        sets the number of steps.
    """
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=total)
        yield lambda steps=1, total=None: progress.update(task, advance=steps, total=total)
