"""What all commands do on the terminal: errors in one line, and progress bars."""

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperGroup

from sgrl.errors import UserError


class OneLineErrors(TyperGroup):
    """Commands whose users' errors are one line each on stderr, with exit status 2.

    Other errors keep their traceback. Ctrl-C ends with status 130.
    """

    def invoke(self, ctx: Any) -> Any:
        """Run the command that is asked for."""
        try:
            return super().invoke(ctx)
        except UserError as error:
            said = str(error)
        except OSError as error:
            # Those without a number are other errors in a library's dress.
            if error.errno in (None, errno.EPIPE):
                raise
            said = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        except KeyboardInterrupt as interrupt:
            typer.echo(f"sgrl: interrupted{interrupt}", err=True)
            raise typer.Exit(130) from None
        for line in said.splitlines() or [""]:
            typer.echo(f"sgrl: {line}", err=True)
        raise typer.Exit(2)


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
