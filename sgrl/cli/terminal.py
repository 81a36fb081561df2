"""What all commands do on the terminal: errors in one line, JSON and lists."""

import errno
import math
import traceback
from collections.abc import Iterable
from typing import Any

import typer
from typer.core import TyperGroup

from sgrl.errors import UserError


class OneLineErrors(TyperGroup):
    """Commands whose users' errors are one line each on stderr, with exit status 2.

    Other errors keep their traceback, and with --verbose these too. Ctrl-C ends with status 130.
    """

    def invoke(self, ctx: Any) -> Any:
        """Run the command that is asked for."""
        try:
            return super().invoke(ctx)
        except UserError as error:
            said = str(error)
            if ctx.params.get("verbose"):
                typer.echo("".join(traceback.format_exception(error)), err=True)
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


def print_json(content: Any) -> None:
    """Print content as JSON, with null for numbers that are not finite."""
    import json

    typer.echo(json.dumps(_finite(content), indent=2))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if hasattr(value, "item"):  # NumPy's
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_lines(lines: Iterable[tuple[str, str]]) -> None:
    """Print names and what they are: wrapped to a terminal, and in full into anything else."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    lines = list(lines)
    console = Console()
    if not console.is_terminal:
        width = max(len(name) for name, _ in lines)
        for name, line in lines:
            typer.echo(f"{name:<{width}}  {line}".rstrip())
        return
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column()
    for name, line in lines:
        table.add_row(Text(name), Text(line))
    console.print(table)
