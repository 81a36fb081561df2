"""The `sgrl` command: thin verbs over `sgrl.tuning` and `sgrl.theory`.

Whatever a user can get wrong is one line on stderr and exit status 2. Ray and torch are imported
inside the verbs, so that `sgrl --help` answers at once.
"""

from __future__ import annotations

import gc
import math
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn, TypeVar

import typer

from sgrl import __version__
from sgrl.commands import command

if TYPE_CHECKING:
    from rich.progress import Progress

app = typer.Typer(
    help="Sparse networks, synthetic gradients and reinforcement learning: sweeps on Ray Tune.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

theory = typer.Typer(help="The paper's claims in numbers.", no_args_is_help=True)
app.add_typer(theory, name="theory")
data = typer.Typer(help="Data sets.", no_args_is_help=True)
app.add_typer(data, name="data")

P = TypeVar("P", str, Path, None)


def _home(path: P) -> P:
    """A path with ~ in its place: shells leave it as it is in --results='~/runs'."""
    return path if path is None else type(path)(os.path.expanduser(path))  # noqa: PTH111


def _homes(paths: list[str]) -> list[str]:
    return [_home(path) for path in paths]


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"sgrl {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=_version, help="Say which this is."),
    ] = False,
) -> None:
    pass


Config = Annotated[
    Path,
    typer.Argument(metavar="CONFIG", callback=_home, help="Experiment file, as in tune_configs/."),
]
Results = Annotated[
    str,
    typer.Option(
        callback=_home,
        help="Folder that holds the experiments' folders, or as in s3://bucket/results.",
    ),
]
Name = Annotated[str | None, typer.Option(help="Folder under results; the experiment's name.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="As in config.training.lr=1e-3; repeatable."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check the file and list its trials.")]
Address = Annotated[
    str | None,
    typer.Option(help="Ray cluster: auto or HOST:PORT to join it, ray://HOST:PORT from outside."),
]
Track = Annotated[
    str | None,
    typer.Option(metavar="TRACKER", help="tensorboard, wandb, mlflow or none."),
]
Iterations = Annotated[int | None, typer.Option(min=1, help="Train every trial up to this one.")]
Add = Annotated[
    list[str] | None,
    typer.Option("--add", metavar="KEY=VALUES", help="As in seeds=6..11; repeatable."),
]
Plan = Annotated[bool, typer.Option("--dry-run", help="Check, and list what would run.")]
Experiment = Annotated[
    str, typer.Argument(metavar="DIR", callback=_home, help="As in results/quickstart.")
]
Checkpoint = Annotated[
    str,
    typer.Argument(
        metavar="CHECKPOINT",
        callback=_home,
        help="As in results/NAME/TRIAL/checkpoints/000025.",
    ),
]
Episodes = Annotated[int, typer.Option(min=1, help="Episodes to run.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the mazes and of the actions.")]
Numbers = Annotated[str, typer.Option(metavar="NUMBERS", help="As in 4-12 or 2,3,4.")]

X = Annotated[
    str,
    typer.Option(
        "--x",
        metavar="AXIS",
        help="Of curves and AUC: env_steps, padded_env_steps, iteration, episodes or hours.",
    ),
]

DataDir = Annotated[
    Path | None,
    typer.Option(
        callback=_home,
        help="Folder of the files; SGRL_DATA_DIR, or one under the user's cache.",
    ),
]


@contextmanager
def _one_line_errors(*errors: type[Exception], resume: str | Path | None = None) -> Iterator[None]:
    try:
        yield
    except errors as error:
        typer.echo(f"sgrl: {error}", err=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        hint = f"; go on with: {command('sgrl', 'resume', resume)}" if resume else ""
        typer.echo(f"sgrl: interrupted{hint}", err=True)
        raise typer.Exit(130) from None


@contextmanager
def _without_collector() -> Iterator[None]:
    """Importing RLlib makes hardly any garbage, and looking for it takes a tenth of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _bar() -> Progress:
    """A progress bar on stderr, where that is a terminal; it is gone once done."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    return Progress(console=console, transient=True, disable=not console.is_terminal)


@app.command()
def sweep(
    config: Config,
    results: Results = "results",
    name: Name = None,
    set_: Set = None,
    track: Track = None,
    address: Address = None,
    dry_run: DryRun = False,
) -> None:
    """Run all trials of an experiment file into RESULTS/NAME."""
    with _without_collector() if dry_run else nullcontext():
        from sgrl.tuning.experiment import ExperimentError, load_experiment

        with _one_line_errors(ExperimentError):
            experiment = load_experiment(config, set_ or [], name, track)
    if dry_run:
        typer.echo(f"{experiment.name}: {len(experiment.trials)} trials")
        for trial in experiment.trials:
            typer.echo(f"  {trial.name}")
        return

    if client := _client_address(address):
        from sgrl.tuning.experiment import user_modules
        from sgrl.user_code import sources

        words = ["sweep", "experiment.yaml", "--results", results, "--name", experiment.name]
        words += [word for setting in set_ or [] for word in ("--set", setting)]
        words += ["--track", track] if track else []
        files = {"experiment.yaml": config.read_text("utf-8")}
        for module in user_modules(experiment):
            files |= sources(module)
        _run_on_cluster(client, words, results, files)
    _join(address)
    from sgrl.results.storage import StorageError, join
    from sgrl.tuning.sweep import SweepError, run_sweep
    from sgrl.tuning.tracking import TrackingError

    location = join(results, experiment.name)
    errors = (ExperimentError, SweepError, TrackingError, StorageError)
    with _one_line_errors(*errors, resume=location):
        run_sweep(experiment, results)
    _compare(location)


@app.command()
def resume(
    directory: Experiment,
    iterations: Iterations = None,
    add: Add = None,
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
        words += ["--iterations", str(iterations)] if iterations else []
        words += [word for addition in add or [] for word in ("--add", addition)]
        words += ["--track", track] if track else []
        _run_on_cluster(client, words, directory)
    _join(address)
    from sgrl.results.storage import StorageError
    from sgrl.tuning.experiment import ExperimentError
    from sgrl.tuning.sweep import SweepError, resume_plan, resume_sweep
    from sgrl.tuning.tracking import TrackingError

    errors = (ExperimentError, SweepError, TrackingError, StorageError)
    with _one_line_errors(*errors, resume=directory):
        if dry_run:
            trials, todo = resume_plan(directory, iterations, add or [])
            typer.echo(f"{directory}: {len(trials)} trials, {len(todo)} to run")
            for row in todo:
                typer.echo(f"  {row.trial.name}: from {row.iteration} to {row.last_iteration}")
            return
        resume_sweep(directory, iterations, add or [], track)
    _compare(directory)


def _client_address(address: str | None) -> str | None:
    """The cluster's, where this machine is no part of it."""
    address = address or os.environ.get("RAY_ADDRESS", "")
    return address if address.startswith("ray://") else None


def _run_on_cluster(
    address: str, words: list[str], results: str, files: dict[str, str] | None = None
) -> NoReturn:
    """Run the command there, and end as it does."""
    from sgrl.tuning.client import ClientError, run_on_cluster

    with _one_line_errors(ClientError):
        raise typer.Exit(run_on_cluster(address, words, results, files))


def _join(address: str | None) -> None:
    """Name the cluster as Ray expects it; RAY_ADDRESS does the same."""
    if address is not None:
        os.environ["RAY_ADDRESS"] = address


def _compare(location: str | Path) -> None:
    """The table and the figure at a sweep's end; exit status 1 where a trial failed."""
    from sgrl.analysis.tables import write_comparison
    from sgrl.results.runs import ResultsError
    from sgrl.results.storage import open_store
    from sgrl.tuning.sweep import failed_trials

    with _one_line_errors(ResultsError, OSError):
        store = open_store(location, "driver")
        write_comparison(store.folder, shown_as=str(store))
        figures = store.folder.glob("figures/*.png")
        store.push("comparison.csv", *(f"figures/{path.name}" for path in figures))
    if failed_trials(store.folder):
        raise typer.Exit(1)


@app.command()
def status(directory: Experiment) -> None:
    """Show how far each trial of a sweep is."""
    from rich.console import Console

    from sgrl.results.status import StatusError, sweep_status
    from sgrl.results.storage import StorageError
    from sgrl.tuning.experiment import ExperimentError

    with _one_line_errors(ExperimentError, StatusError, StorageError):
        table, problems = sweep_status(directory)
    console = Console()
    console.print(table)
    for problem in problems:
        console.print(problem, soft_wrap=True, highlight=False, markup=False)


@app.command()
def report(
    directories: Annotated[
        list[str],
        typer.Argument(metavar="DIR...", callback=_homes, help="As in results/quickstart."),
    ],
    out: Annotated[
        Path | None, typer.Option(callback=_home, help="File to write; DIR/report.html.")
    ] = None,
    format: Annotated[str, typer.Option(help="html, markdown or latex.")] = "html",
    threshold: Annotated[
        float, typer.Option(help="Score that sample efficiency is counted to.")
    ] = 0.5,
    x: X = "env_steps",
) -> None:
    """Report on results folders, finished or not: tables, figures, and how to run them again."""
    from sgrl.analysis.report import write_report
    from sgrl.results.runs import ResultsError
    from sgrl.results.storage import StorageError, is_address, is_archive, reading

    with _one_line_errors(ResultsError, StorageError), ExitStack() as stack:
        if out is None and any(map(is_address, directories)):
            raise ResultsError("say with --out where on this machine the report goes")
        if out is None and is_archive(directories[0]):
            out = Path(directories[0]) / "report.html"
        if format != "html" and any(is_address(d) or is_archive(d) for d in directories):
            raise ResultsError(f"a report in {format} refers to figures in the results: use html")
        folders = [stack.enter_context(reading(directory)) for directory in directories]
        path = write_report(
            folders,
            out,
            format,
            threshold,
            lambda title: typer.echo(f"read: {title}"),
            x,
            directories,
        )
    typer.echo(f"written: {path}")


@app.command()
def compare(
    first: Experiment,
    second: Annotated[
        str | None, typer.Argument(metavar="[DIR]", help="The other one, if there are two.")
    ] = None,
    plan: Annotated[
        float | None,
        typer.Option(metavar="DIFFERENCE", help="Say how many seeds find this difference of AUC."),
    ] = None,
    out: Annotated[Path | None, typer.Option(callback=_home, help="CSV to write too.")] = None,
    x: X = "env_steps",
) -> None:
    """Compare the methods of an experiment, or those of two, each with itself."""
    from sgrl.analysis.report import compare as compare_results
    from sgrl.analysis.tables import print_table
    from sgrl.results.runs import ResultsError
    from sgrl.results.storage import StorageError, reading

    with _one_line_errors(ResultsError, StorageError), ExitStack() as stack:
        one = stack.enter_context(reading(first))
        other = None if second is None else stack.enter_context(reading(second))
        called = [first] if second is None else [first, second]
        frame, tables = compare_results(one, other, plan, x, called)
        for title, note, table in tables:
            print_table(title, note, table)
        if out is not None:
            try:
                out.write_text(frame.to_csv(index=False), encoding="utf-8")
            except OSError as error:
                raise ResultsError(f"{out}: {error.strerror}") from None
            typer.echo(f"written: {out}")


@app.command()
def archive(
    directories: Annotated[
        list[str],
        typer.Argument(
            metavar="DIR...", callback=_homes, help="Finished sweeps, as in results/quickstart."
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            callback=_home,
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
    from sgrl.results.metrics import OldMetricsError
    from sgrl.results.storage import StorageError

    with _one_line_errors(StorageError, OldMetricsError, OSError):
        for directory in map(Path, directories):
            place = out if len(directories) == 1 else out / directory.resolve().name
            for line in write_archive(directory, place, policy or [], half):
                typer.echo(line)
            size = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
            typer.echo(f"written: {place} ({size / 2**20:.1f} MB)")


@app.command()
def study(
    published: Annotated[
        Path, typer.Argument(metavar="DIR", callback=_home, help="Folder of the archives.")
    ] = Path("results/published"),
    write: Annotated[
        Path | None,
        typer.Option(callback=_home, metavar="FILE", help="Page to put the table into."),
    ] = None,
) -> None:
    """Judge the paper's claims from the published archives, as docs/study.md says."""
    from sgrl.analysis.study import judge_claims, markdown, write_into
    from sgrl.results.storage import StorageError

    with _one_line_errors(StorageError, ValueError, OSError):
        if not published.is_dir():
            raise ValueError(f"{published} does not exist: give the folder of the archives")
        table = markdown(judge_claims(published))
        if write is None:
            typer.echo(table, nl=False)
        else:
            write_into(write, table)
            typer.echo(f"written: {write}")


@app.command()
def verify(
    directory: Annotated[
        str,
        typer.Argument(metavar="ARCHIVE", callback=_home, help="As in results/published/NAME."),
    ],
    trials: Annotated[int, typer.Option(min=1, help="Trials to train again, at most.")] = 3,
    iterations: Annotated[int, typer.Option(min=1, help="Iterations of each, at most.")] = 20,
    seed: Annotated[int, typer.Option(min=0, help="Of the choice of trials.")] = 0,
) -> None:
    """Train randomly chosen trials of an archive again and compare every row."""
    import tempfile

    from sgrl.results.storage import StorageError
    from sgrl.tuning.experiment import ExperimentError
    from sgrl.tuning.sweep import SweepError
    from sgrl.tuning.verify import verify_archive

    with (
        _one_line_errors(StorageError, ExperimentError, SweepError),
        tempfile.TemporaryDirectory(prefix="sgrl-") as scratch,
    ):
        verdicts = verify_archive(Path(directory), Path(scratch), trials, iterations, seed)
    for verdict in verdicts:
        typer.echo(f"{'passed' if verdict.passed else 'FAILED'}: {verdict.text}")
    if not all(verdict.passed for verdict in verdicts):
        raise typer.Exit(1)


@app.command()
def evaluate(
    checkpoint: Checkpoint,
    episodes: Episodes = 100,
    seed: Seed = 0,
    greedy: Annotated[
        bool, typer.Option("--greedy", help="Take the likeliest actions instead of sampling.")
    ] = False,
) -> None:
    """Run a checkpoint's policy on its environment.

    Rates and means come with 95% intervals (Wilson's, Student's t).
    """
    from sgrl.envs.guard import EnvironmentFailed
    from sgrl.envs.mnist import DataError
    from sgrl.results.checkpoints import CheckpointError
    from sgrl.results.evaluation import evaluate as evaluate_checkpoint
    from sgrl.results.storage import StorageError, reading_checkpoint

    errors = (CheckpointError, EnvironmentFailed, DataError, StorageError)
    with _one_line_errors(*errors), reading_checkpoint(checkpoint) as folder:
        found = evaluate_checkpoint(folder, episodes, seed, greedy)
        typer.echo(f"episodes: {found.pop('episodes')}")
        for name in [name for name in found if f"{name}_low" in found]:
            low, high = found[f"{name}_low"], found[f"{name}_high"]
            interval = "" if math.isnan(low) else f" (95% interval {low:.4g} to {high:.4g})"
            typer.echo(f"{name}: {found[name]:g}{interval}")


@app.command()
def render(
    checkpoint: Checkpoint,
    out: Annotated[
        Path, typer.Option(callback=_home, help="An animation (.gif) or a filmstrip (.png).")
    ] = Path("episode.gif"),
    seed: Seed = 0,
    episode: Annotated[int, typer.Option(min=0, help="Which of evaluate's, from 0.")] = 0,
    fps: Annotated[int, typer.Option(min=1, max=50, help="Steps a second (.gif).")] = 5,
    frames: Annotated[int, typer.Option(min=1, help="Pictures in the filmstrip (.png).")] = 6,
) -> None:
    """Draw one of the episodes that `evaluate` runs."""
    from sgrl.analysis.render import RenderError, check_out, record_episode, write_episode
    from sgrl.envs.guard import EnvironmentFailed
    from sgrl.envs.mnist import DataError
    from sgrl.results.checkpoints import CheckpointError
    from sgrl.results.storage import StorageError, reading_checkpoint

    errors = (CheckpointError, EnvironmentFailed, DataError, RenderError, StorageError)
    with _one_line_errors(*errors):
        check_out(out)
        with reading_checkpoint(checkpoint) as folder:
            recorded = record_episode(folder, seed, episode)
        with _bar() as progress:
            task = progress.add_task("drawing", total=None)
            write_episode(
                recorded,
                out,
                fps,
                frames,
                lambda total: progress.update(task, total=total, advance=1),
            )
    typer.echo(f"{out}: {recorded.title}")


@app.command()
def bench(
    num_envs: Annotated[int, typer.Option(min=1, help="Episodes per batch.")] = 20,
    rounds: Annotated[int, typer.Option(min=1, help="Batches of each that count.")] = 5,
    json: Annotated[
        Path | None, typer.Option(callback=_home, help="Write the figures to this file too.")
    ] = None,
) -> None:
    """Measure milliseconds per batch of every policy and backend, on one thread."""
    from sgrl.bench import run_bench

    with _one_line_errors(OSError):
        for line in run_bench(num_envs, rounds, json):
            typer.echo(line)


@app.command()
def probe(
    checkpoint: Checkpoint,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="With initial weights drawn anew.")
    ] = False,
    samples: Annotated[
        int | None, typer.Option(help="Images or episodes that the true gradient is taken from.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="n; TRAINED_BATCH unless given.")] = None,
    trained_batch: Annotated[
        int | None, typer.Option(help="Samples in a training batch; the published number.")
    ] = None,
    neurons: Annotated[int, typer.Option(help="Of each layer, drawn at random; 0: all.")] = 20,
    seed: Annotated[int, typer.Option(help="Seed of everything.")] = 0,
    parallel: Annotated[int, typer.Option(help="Ray tasks at a time; 1: without Ray.")] = 1,
    out: Annotated[
        Path, typer.Option(callback=_home, help="Folder for the CSVs and the figure.")
    ] = Path("results/probe"),
) -> None:
    """Measure how far a policy's gradients are from the true ones, neuron by neuron."""
    from sgrl.envs.guard import EnvironmentFailed
    from sgrl.envs.mnist import DataError
    from sgrl.results.checkpoints import CheckpointError, open_policy
    from sgrl.results.storage import StorageError, reading_checkpoint
    from sgrl.theory.probe import NUM_SHARDS, check_settings, fresh_policy
    from sgrl.theory.probe import probe as probe_policy
    from sgrl.theory.tasks import TheoryError

    errors = (CheckpointError, EnvironmentFailed, DataError, TheoryError, StorageError)
    with _one_line_errors(*errors):
        with reading_checkpoint(checkpoint) as folder:
            policy, environment = open_policy(folder)
        env, env_config = environment["env"], environment["env_config"]
        check_settings(policy, env, samples, batch_size, trained_batch, neurons, seed, parallel)
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TheoryError(f"{out}: {error.strerror}") from None
        with _bar() as progress:
            task = progress.add_task("probing", total=NUM_SHARDS)
            report = probe_policy(
                fresh_policy(policy, seed) if fresh else policy,
                env,
                env_config,
                samples=samples,
                batch_size=batch_size,
                trained_batch=trained_batch,
                neurons=neurons,
                seed=seed,
                parallel=parallel,
                advance=lambda: progress.advance(task),
            )

        from sgrl.analysis.tables import write_probe

        write_probe(report, out)


@data.command()
def mnist(data_dir: DataDir = None) -> None:
    """Fetch MNIST, checked, and say where it is."""
    from sgrl.envs.mnist import DataError, fetch
    from sgrl.tuning.progress import progress_bar

    with _one_line_errors(DataError), progress_bar() as report:
        folder = fetch(data_dir, report)
    typer.echo(f"MNIST: {folder}")


@theory.command()
def experts(
    d: Numbers = "4-12",
    k: Numbers = "2-4",
    n: Numbers = "1-4",
    cases: Annotated[str, typer.Option(help="Kinds of noise.")] = "noisy,activation,partial",
    trials: Annotated[int, typer.Option(help="Trials of each cell.")] = 20,
    seed: Annotated[int, typer.Option(help="Seed of everything.")] = 0,
    parallel: Annotated[int, typer.Option(help="Ray tasks at a time; 1: without Ray.")] = 1,
    out: Annotated[
        Path, typer.Option(callback=_home, help="Folder for the CSV and the figures.")
    ] = Path("results/expert_network"),
) -> None:
    """Simulate the expert network: how many samples synthetic gradients save."""
    from sgrl.theory.expert_network import TheoryError, parse_numbers, simulate, sweep_cells, work

    with _one_line_errors(TheoryError):
        cells = sweep_cells(
            parse_numbers(d, "d"), parse_numbers(k, "k"), parse_numbers(n, "n"), cases.split(",")
        )
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TheoryError(f"{out}: {error.strerror}") from None
        with _bar() as progress:
            task = progress.add_task("simulating", total=work(cells, trials))
            results = simulate(
                cells, trials, seed, parallel, lambda states: progress.advance(task, states)
            )

        from sgrl.analysis.tables import write_expert_network

        write_expert_network(results, out)


def main() -> None:
    """Entry point of the `sgrl` command."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        app()
    except SystemExit as end:
        if "--dry-run" not in sys.argv:
            raise
        # Nothing was started that would have to be ended. Taking down RLlib and torch object by
        # object would be a third of the time that the answer takes.
        with suppress(OSError):
            sys.stdout.flush()
        os._exit(end.code if isinstance(end.code, int) else 0)
