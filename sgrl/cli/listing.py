"""The command that lists experiments, what their files can say, and what their results hold."""

from pathlib import Path
from typing import Annotated

import typer

from sgrl.cli.options import JSON, home
from sgrl.cli.terminal import print_json, print_lines


def list_names(
    kind: Annotated[
        str,
        typer.Argument(
            metavar="KIND", help="envs, policies, rules, settings, columns or experiments."
        ),
    ],
    name: Annotated[
        str | None,
        typer.Argument(metavar="[NAME]", help="One of them; of settings, a key or a group."),
    ] = None,
    json: JSON = False,
    write: Annotated[
        Path | None,
        typer.Option(callback=home, metavar="FILE", help="Page to bring up to date."),
    ] = None,
) -> None:
    """List environments, policies, mixing rules, settings, columns of metrics.csv, or experiments.

    Of one experiment it prints the file: sgrl list experiments quickstart > mine.yaml
    """
    from sgrl.tuning.experiment.settings import (
        check_kind,
        docstring_of,
        names_of,
        page_table,
        settings_named,
    )
    from sgrl.tuning.experiment.shipped import shipped_experiments

    check_kind(kind)
    if write is not None:
        from sgrl.markdown import write_tables

        write_tables(write, page_table)
        typer.echo(f"written: {write}")
        return
    if name is None and kind != "settings":
        names = names_of(kind)
        if json:
            print_json([{"name": name, "description": line} for name, line in names.items()])
            return
        print_lines(names.items())
        if kind == "envs":
            typer.echo("and every id of gymnasium and POPGym, as in CartPole-v1")
        return
    groups = settings_named(kind, name)
    if name is not None and kind == "experiments":
        typer.echo(shipped_experiments()[name].read_text(encoding="utf-8"), nl=False)
        return
    if json:
        print_json({group: [s._asdict() for s in settings] for group, settings in groups.items()})
        return
    if name is not None and kind != "settings":
        typer.echo(f"{docstring_of(kind, name)}\n")
    for group, settings in groups.items():
        typer.echo(f"{group}:")
        print_lines(
            (f"  {s.name}", f"{s.type}{f'; default {s.default}' if s.default else ''}. {s.line}")
            for s in settings
        )
