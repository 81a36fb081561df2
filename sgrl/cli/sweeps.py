"""Commands that run and resume sweeps, and show their progress."""

import gc
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from sgrl.cli.options import JSON, Experiment, home
from sgrl.cli.options import Methods as OfMethods
from sgrl.cli.options import Seeds as OfSeeds
from sgrl.cli.terminal import print_json
from sgrl.commands import command

if TYPE_CHECKING:
    from sgrl.results.selection import Selection
    from sgrl.tuning.experiment.load import Experiment as Checked

Config = Annotated[
    Path,
    typer.Argument(metavar="CONFIG", callback=home, help="Experiment file, or as in quickstart."),
]
Results = Annotated[
    str,
    typer.Option(
        callback=home,
        help="Folder that holds the experiments' folders, or as in s3://bucket/results.",
    ),
]
Name = Annotated[str | None, typer.Option(help="Folder under results; the experiment's name.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="As in config.training.lr=1e-3; repeatable."),
]
Methods = Annotated[
    str | None, typer.Option(metavar="NAMES", help="The file's methods to run, as in gru,lstm.")
]
Seeds = Annotated[
    str | None, typer.Option(metavar="SEEDS", help="Instead of the file's, as in 0..5 or 0,2,4.")
]
Jobs = Annotated[
    int | None,
    typer.Option(min=1, help="Trials at a time; as many as fit unless the file says otherwise."),
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Check the file, list its trials, and estimate what they cost."),
]
NoEstimate = Annotated[bool, typer.Option("--no-estimate", help="With --dry-run: no estimate.")]
Track = Annotated[
    str | None,
    typer.Option(metavar="TRACKER", help="tensorboard, wandb, mlflow or none."),
]
Address = Annotated[
    str | None,
    typer.Option(help="Ray cluster: auto or HOST:PORT to join it, ray://HOST:PORT from outside."),
]
Iterations = Annotated[int | None, typer.Option(min=1, help="Train every trial up to this one.")]
Add = Annotated[
    list[str] | None,
    typer.Option("--add", metavar="KEY=VALUES", help="As in seeds=6..11; repeatable."),
]
Plan = Annotated[bool, typer.Option("--dry-run", help="Check, and list what would run.")]


def sweep(
    config: Config,
    results: Results = "results",
    name: Name = None,
    set_: Set = None,
    methods: Methods = None,
    seeds: Seeds = None,
    jobs: Jobs = None,
    track: Track = None,
    address: Address = None,
    dry_run: DryRun = False,
    no_estimate: NoEstimate = False,
) -> None:
    """Run all trials of an experiment file into RESULTS/NAME."""
    with _without_collector() if dry_run else nullcontext():
        from sgrl.tuning.experiment.load import load_experiment
        from sgrl.tuning.experiment.shipped import find_experiment

        config = find_experiment(config)
        experiment = load_experiment(
            config,
            set_ or [],
            name,
            track,
            methods=[] if methods is None else methods.split(","),
            seeds=seeds,
            concurrency=jobs,
        )
    if dry_run:
        _list(experiment)
        if not no_estimate:
            from sgrl.tuning.estimate import estimate_lines

            for line in estimate_lines(experiment):
                typer.echo(line)
        return

    if client := _client_address(address):
        from sgrl.tuning.experiment.resources import user_modules
        from sgrl.user_code import sources

        words = ["sweep", config.name, "--results", results, "--name", experiment.name]
        words += [word for setting in set_ or [] for word in ("--set", setting)]
        words += _given(methods=methods, seeds=seeds, jobs=jobs, track=track)
        files = {config.name: config.read_text("utf-8")}
        for module in user_modules(experiment):
            files |= sources(module)
        _run_on_cluster(client, words, results, files)
    _join(address)
    from sgrl.results.storage import join
    from sgrl.tuning.sweep import run_sweep

    location = join(results, experiment.name)
    with _interruptible(location):
        run_sweep(experiment, results)
    _compare(location)


def _list(experiment: "Checked") -> None:
    """Print the trials of an experiment, as far as they are known before it runs."""
    count, search = len(experiment.examples), experiment.file.search
    decides = search is not None or experiment.file.schedule is not None
    typer.echo(f"{experiment.name}: {'at most ' if decides else ''}{count} trials")
    if search is not None:
        typer.echo(f"  {search.name} suggests values; these, drawn at random, are examples:")
    for trial in experiment.examples:
        typer.echo(f"  {trial.name}")


@contextmanager
def _interruptible(location: str | Path) -> Iterator[None]:
    """Say on Ctrl-C how the sweep goes on."""
    try:
        yield
    except KeyboardInterrupt:
        again = command("sgrl", "resume", location)
        raise KeyboardInterrupt(f"; go on with: {again}") from None


@contextmanager
def _without_collector() -> Iterator[None]:
    """Importing RLlib makes hardly any garbage; collecting it would take a tenth of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def resume(
    directory: Experiment,
    iterations: Iterations = None,
    add: Add = None,
    methods: Methods = None,
    seeds: Seeds = None,
    jobs: Jobs = None,
    track: Track = None,
    address: Address = None,
    dry_run: Plan = False,
) -> None:
    """Finish the trials of an interrupted sweep; train on, or add trials.

    --add takes seeds, and values of any key that the experiment sweeps, as in
    config.training.lr=[1e-4,2e-4].
    """
    if client := _client_address(address):
        words = ["resume", directory, *(["--dry-run"] if dry_run else [])]
        words += [word for addition in add or [] for word in ("--add", addition)]
        words += _given(iterations=iterations, methods=methods, seeds=seeds, jobs=jobs, track=track)
        _run_on_cluster(client, words, directory)
    _join(address)
    from sgrl.results.selection import Selection
    from sgrl.tuning.sweep import resume_plan, resume_sweep

    selection = Selection.of(methods, seeds)
    with _interruptible(directory):
        if dry_run:
            trials, todo = resume_plan(directory, iterations, add or [], selection)
            typer.echo(f"{directory}: {len(trials)} trials, {len(todo)} to run")
            for row, until in todo:
                typer.echo(f"  {row.trial.name}: from {row.iteration} to {until}")
            return
        resume_sweep(directory, iterations, add or [], track, jobs, selection)
    _compare(directory)


def _given(**options: str | int | None) -> list[str]:
    """The words of those options that are given."""
    given = {f"--{name}": str(value) for name, value in options.items() if value is not None}
    return [word for option in given.items() for word in option]


def _client_address(address: str | None) -> str | None:
    """The address of a cluster that this machine is not part of."""
    address = address or os.environ.get("RAY_ADDRESS", "")
    return address if address.startswith("ray://") else None


def _run_on_cluster(
    address: str, words: list[str], results: str, files: dict[str, str] | None = None
) -> NoReturn:
    """Run the command on the cluster, and exit with its status."""
    from sgrl.tuning.client import run_on_cluster

    raise typer.Exit(run_on_cluster(address, words, results, files))


def _join(address: str | None) -> None:
    """Pass the cluster's address to Ray."""
    if address is not None:
        os.environ["RAY_ADDRESS"] = address


def _compare(location: str | Path) -> None:
    """Write a finished sweep's table and figure; exit with status 1 if a trial failed."""
    from sgrl.analysis.outputs import write_comparison
    from sgrl.results.locations import open_store
    from sgrl.results.plan import planned_trials
    from sgrl.results.status import failures, read_progress

    store = open_store(location, "driver")
    write_comparison(store.folder, shown_as=str(store))
    store.push(store.sweep.comparison, *store.sweep.figures.glob("*.png"))
    progress = [read_progress(store.sweep, t) for t in planned_trials(store.sweep.experiment)]
    for line in failures(progress, store):
        typer.echo(line)
    if any(row.state == "failed" for row in progress):
        raise typer.Exit(1)


def status(
    directory: Experiment,
    methods: OfMethods = None,
    seeds: OfSeeds = None,
    json: JSON = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="Show it again and again until the sweep ends.")
    ] = False,
) -> None:
    """Show how far each trial of a sweep is."""
    from rich.console import Console

    from sgrl.results.selection import Selection
    from sgrl.results.status import sweep_status

    only = Selection.of(methods, seeds)
    if watch:
        _watch(directory, only)
    found = sweep_status(directory, only)
    if json:
        print_json(found.as_dict())
        return
    console = Console()
    # Into a pipe as wide as it has to be.
    width = None if console.is_terminal else 10_000
    Console(width=width).print(found.table)
    for line in found.lines:
        console.print(line, soft_wrap=True, highlight=False, markup=False)


#: Between two looks at a sweep, and into a pipe between two lines.
WATCH_SECONDS, LINE_SECONDS = 3.0, 20.0


def _watch(directory: str, only: "Selection") -> None:
    """Show where a sweep stands until it ends."""
    from rich.console import Console
    from rich.live import Live

    from sgrl.results.status import progress_line, sweep_status, sweep_view

    console, next_line = Console(), 0.0
    with Live(console=console, auto_refresh=False, transient=True) as live:
        while (found := sweep_status(directory, only)).goes_on:
            if console.is_terminal:
                live.update(sweep_view(found.rows, found.name, console.height), refresh=True)
            elif time.monotonic() >= next_line:
                next_line = time.monotonic() + LINE_SECONDS
                print(progress_line(found.rows), flush=True)
            time.sleep(WATCH_SECONDS)
