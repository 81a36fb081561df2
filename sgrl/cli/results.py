"""Commands that read results: reports, comparisons, archives and the study."""

from pathlib import Path
from typing import Annotated

import typer

from sgrl.cli.options import JSON, Experiment, Methods, Seeds, home, homes
from sgrl.cli.terminal import print_json

Axis = Annotated[
    str,
    typer.Option(
        "--x",
        metavar="AXIS",
        help="Of curves and AUC: env_steps, padded_env_steps, iteration, episodes or hours.",
    ),
]


def report(
    directories: Annotated[
        list[str],
        typer.Argument(metavar="DIR...", callback=homes, help="As in results/quickstart."),
    ],
    out: Annotated[
        Path | None, typer.Option(callback=home, help="File to write; DIR/report.html.")
    ] = None,
    format: Annotated[str, typer.Option(help="html, markdown or latex.")] = "html",
    threshold: Annotated[
        float, typer.Option(help="Score that sample efficiency is counted to.")
    ] = 0.5,
    x: Axis = "env_steps",
    methods: Methods = None,
    seeds: Seeds = None,
) -> None:
    """Report on results folders, finished or not: tables, figures, and how to run them again."""
    from sgrl.analysis.report import write_report
    from sgrl.results.selection import Selection

    path = write_report(
        directories,
        out,
        format,
        threshold,
        lambda title: typer.echo(f"read: {title}"),
        x,
        Selection.of(methods, seeds),
    )
    typer.echo(f"written: {path}")


def compare(
    first: Experiment,
    second: Annotated[
        str | None, typer.Argument(metavar="[DIR]", help="The other one, if there are two.")
    ] = None,
    plan: Annotated[
        float | None,
        typer.Option(metavar="DIFFERENCE", help="Say how many seeds find this difference of AUC."),
    ] = None,
    out: Annotated[Path | None, typer.Option(callback=home, help="CSV to write too.")] = None,
    x: Axis = "env_steps",
    methods: Methods = None,
    seeds: Seeds = None,
    json: JSON = False,
) -> None:
    """Compare the methods of an experiment, or those of two, each with itself."""
    from rich.console import Console

    from sgrl.analysis.compare import compare as compare_results
    from sgrl.analysis.tables import print_table
    from sgrl.results.selection import Selection

    frame, tables = compare_results(first, second, plan, x, Selection.of(methods, seeds))
    if out is not None:
        out.write_text(frame.to_csv(index=False), encoding="utf-8")
    if json:
        experiments = [first] if second is None else [first, second]
        print_json({"experiments": experiments, "x": x, "rows": frame.to_dict("records")})
        return
    console = Console()
    for title, note, table in tables:
        console.print(title, style="bold", highlight=False)
        print_table(table, console)
        console.print(f"{note}\n" if note else "", style="dim", highlight=False)
    if out is not None:
        typer.echo(f"written: {out}")


def archive(
    directories: Annotated[
        list[str],
        typer.Argument(
            metavar="DIR...", callback=homes, help="Finished sweeps, as in results/quickstart."
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            callback=home,
            help="Folder to write; of several sweeps, the one that holds their archives.",
        ),
    ],
    policy: Annotated[
        list[str] | None,
        typer.Option(metavar="TRIAL", help="Trial whose final policy goes along; repeatable."),
    ] = None,
    half: Annotated[bool, typer.Option("--half", help="Keep policies as float16.")] = False,
) -> None:
    """Pack finished sweeps into a few small files, which every command reads as it reads them."""
    from sgrl.results.archive import write_archive

    for directory in map(Path, directories):
        place = out if len(directories) == 1 else out / directory.resolve().name
        for line in write_archive(directory, place, policy or [], half):
            typer.echo(line)
        size = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
        typer.echo(f"written: {place} ({size / 2**20:.1f} MB)")


def study(
    published: Annotated[
        Path, typer.Argument(metavar="DIR", callback=home, help="Folder of the archives.")
    ] = Path("results/published"),
    write: Annotated[
        Path | None,
        typer.Option(callback=home, metavar="FILE", help="Page whose tables to bring up to date."),
    ] = None,
    figure: Annotated[
        Path | None,
        typer.Option(callback=home, metavar="FILE", help="PNG to draw the learning curves into."),
    ] = None,
) -> None:
    """Judge the paper's claims from the published archives, as docs/study.md says.

    Prints the claims and what each archive cost.
    """
    from sgrl.analysis.published import draw_study, table_named, write_into
    from sgrl.results.runs import ResultsError

    if not published.is_dir():
        raise ResultsError(f"{published} does not exist: give the folder of the archives")
    if figure is not None:
        typer.echo(f"written: {draw_study(published, figure)}")
    if write is None and figure is None:
        typer.echo("\n".join(table_named(name, published) for name in ("findings", "cost")))
    elif write is not None:
        typer.echo(f"written: {write_into(write, published)} tables of {write}")


def verify(
    directory: Annotated[
        str,
        typer.Argument(metavar="ARCHIVE", callback=home, help="As in results/published/NAME."),
    ],
    trials: Annotated[int, typer.Option(min=1, help="Trials to train again, at most.")] = 3,
    iterations: Annotated[int, typer.Option(min=1, help="Iterations of each, at most.")] = 20,
    seed: Annotated[int, typer.Option(min=0, help="Of the choice of trials.")] = 0,
    trial: Annotated[
        list[str] | None, typer.Option(metavar="TRIAL", help="Trial to take instead; repeatable.")
    ] = None,
) -> None:
    """Train trials of an archive again, chosen at random or by name, and compare every row."""
    import tempfile

    from sgrl.tuning.verify import verify_archive

    with tempfile.TemporaryDirectory(prefix="sgrl-") as scratch:
        verdicts = verify_archive(
            Path(directory), Path(scratch), trials, iterations, seed, trial or []
        )
    for verdict in verdicts:
        typer.echo(f"{'passed' if verdict.passed else 'FAILED'}: {verdict.text}")
    if not all(verdict.passed for verdict in verdicts):
        raise typer.Exit(1)
