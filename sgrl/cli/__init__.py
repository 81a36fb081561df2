"""The `sgrl` command: thin commands over the other packages.

Whatever a user can get wrong is one line on stderr and exit status 2. Ray and torch are imported
inside the commands, so that `sgrl --help` answers at once.
"""

import os
import sys
from contextlib import suppress
from typing import Annotated

import typer

from sgrl import __version__
from sgrl.cli import data, listing, policies, results, sweeps, theory
from sgrl.cli.terminal import OneLineErrors
from sgrl.errors import UserError
from sgrl.local_ray import VERBOSE

app = typer.Typer(
    cls=OneLineErrors,
    help="Sparse networks, synthetic gradients and reinforcement learning: sweeps on Ray Tune.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
for command in (
    sweeps.sweep,
    sweeps.resume,
    sweeps.status,
    results.report,
    results.compare,
    results.archive,
    results.study,
    results.verify,
    policies.evaluate,
    policies.render,
    policies.bench,
    theory.probe,
):
    app.command()(command)
app.command("list")(listing.list_names)
app.add_typer(theory.app, name="theory")
app.add_typer(data.app, name="data")


def _version(asked: bool) -> None:
    if asked:
        from sgrl.compiled.library import core_build
        from sgrl.results.provenance import revision, versions

        typer.echo(f"sgrl {__version__}")
        if commit := revision():
            typer.echo(f"commit: {commit}")
        try:
            core = core_build()
        except UserError as error:
            core = f"none: {error}"
        typer.echo(f"core: {core}")
        found = (f"{name} {number}" for name, number in versions().items() if name != "sgrl")
        typer.echo(f"packages: {', '.join(found)}")
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=_version, help="Say which this is."),
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Show Ray's logs, and tracebacks of what went wrong.")
    ] = False,
) -> None:
    if verbose:
        os.environ[VERBOSE] = "1"
        context.call_on_close(lambda: os.environ.pop(VERBOSE, None))


def main() -> None:
    """Run the `sgrl` command."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if not sys.stdout.isatty():
        # Notebooks set it, and Rich takes their pipes for terminals that it may draw over.
        os.environ.pop("FORCE_COLOR", None)
    try:
        app()
    except SystemExit as end:
        if "--dry-run" not in sys.argv:
            raise
        # Nothing was started that would have to be shut down, and destroying RLlib's and torch's
        # objects one by one would take a third of the command's time.
        with suppress(OSError):
            sys.stdout.flush()
        os._exit(end.code if isinstance(end.code, int) else 0)
