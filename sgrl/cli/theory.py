"""Commands that measure what the theory predicts: the probe and the expert network."""

from io import StringIO
from pathlib import Path
from typing import Annotated

import typer

from sgrl.bars import progress_bar
from sgrl.cli.options import JSON, Checkpoint, home
from sgrl.cli.terminal import print_json

app = typer.Typer(help="The paper's claims in numbers.", no_args_is_help=True)

Fresh = Annotated[bool, typer.Option("--fresh", help="With initial weights drawn anew.")]
Numbers = Annotated[str, typer.Option(metavar="NUMBERS", help="As in 4-12 or 2,3,4.")]


def probe(
    checkpoint: Checkpoint,
    fresh: Fresh = False,
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
        Path, typer.Option(callback=home, help="Folder for the CSVs and the figure.")
    ] = Path("results/probe"),
    json: JSON = False,
) -> None:
    """Measure how far a policy's gradients are from the true ones, neuron by neuron."""
    from sgrl.results.checkpoints import open_policy
    from sgrl.results.locations import reading_checkpoint
    from sgrl.theory.probe import NUM_SHARDS, check_settings, fresh_policy
    from sgrl.theory.probe import probe as probe_policy

    with reading_checkpoint(checkpoint) as folder:
        policy, environment = open_policy(folder)
    env, env_config = environment["env"], environment["env_config"]
    settings = check_settings(
        policy, env, samples, batch_size, trained_batch, neurons, seed, parallel
    )
    out.mkdir(parents=True, exist_ok=True)
    with progress_bar("probing", NUM_SHARDS) as bar:
        probed = fresh_policy(policy, seed) if fresh else policy
        report = probe_policy(probed, env, env_config, settings, lambda: bar(advance=1))

    from rich.console import Console

    from sgrl.analysis.outputs import write_probe

    if not json:
        write_probe(report, out)
        return
    write_probe(report, out, Console(file=StringIO()))
    print_json({"checkpoint": checkpoint, "fresh": fresh, "seed": seed, **report._asdict()})


@app.command()
def bounds(
    checkpoint: Checkpoint,
    fresh: Fresh = False,
    samples: Annotated[
        int | None, typer.Option(help="Images or episodes; half for fits, half for their test.")
    ] = None,
    fitted: Annotated[
        str | None, typer.Option(metavar="NUMBERS", help="Samples of other fits, as in 20,100.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="n; the published number.")] = None,
    neurons: Annotated[int, typer.Option(help="Of each layer, drawn at random; 0: all.")] = 8,
    seed: Annotated[int, typer.Option(help="Seed of everything.")] = 0,
    parallel: Annotated[int, typer.Option(help="Ray tasks at a time; 1: without Ray.")] = 1,
    out: Annotated[Path, typer.Option(callback=home, help="Folder for the CSV.")] = Path(
        "results/bounds"
    ),
    json: JSON = False,
) -> None:
    """Measure what the best linear predictions that a policy's neurons allow would save."""
    from sgrl.results.checkpoints import open_policy
    from sgrl.results.locations import reading_checkpoint
    from sgrl.theory.expert_network import parse_numbers
    from sgrl.theory.probe import NUM_SHARDS, check_settings, fresh_policy, measure_bounds

    with reading_checkpoint(checkpoint) as folder:
        policy, environment = open_policy(folder)
    env, env_config = environment["env"], environment["env_config"]
    settings = check_settings(policy, env, samples, batch_size, batch_size, neurons, seed, parallel)
    fits = parse_numbers(fitted, "fitted") if fitted else []
    out.mkdir(parents=True, exist_ok=True)
    with progress_bar("fitting", NUM_SHARDS) as bar:
        measured = fresh_policy(policy, seed) if fresh else policy
        report = measure_bounds(measured, env, env_config, settings, fits, lambda: bar(advance=1))

    from rich.console import Console

    from sgrl.analysis.outputs import write_bounds

    write_bounds(report, out, Console(file=StringIO()) if json else Console())
    if json:
        print_json({"checkpoint": checkpoint, "fresh": fresh, "seed": seed, **report._asdict()})


@app.command()
def experts(
    d: Numbers = "4-12",
    k: Numbers = "2-4",
    n: Numbers = "1-4",
    cases: Annotated[str, typer.Option(help="Kinds of noise.")] = "noisy,activation,partial",
    trials: Annotated[int, typer.Option(help="Trials of each cell.")] = 20,
    seed: Annotated[int, typer.Option(help="Seed of everything.")] = 0,
    parallel: Annotated[int, typer.Option(help="Ray tasks at a time; 1: without Ray.")] = 1,
    out: Annotated[
        Path, typer.Option(callback=home, help="Folder for the CSV and the figures.")
    ] = Path("results/expert_network"),
) -> None:
    """Simulate the expert network: how many samples synthetic gradients save."""
    from sgrl.theory.expert_network import parse_numbers, simulate, sweep_cells, work

    cells = sweep_cells(
        parse_numbers(d, "d"), parse_numbers(k, "k"), parse_numbers(n, "n"), cases.split(",")
    )
    out.mkdir(parents=True, exist_ok=True)
    with progress_bar("simulating", work(cells, trials)) as bar:
        results = simulate(cells, trials, seed, parallel, lambda n: bar(advance=n))

    from sgrl.analysis.outputs import write_expert_network

    write_expert_network(results, out)
