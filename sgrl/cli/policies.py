"""Commands that run policies: to evaluate, to draw and to time them."""

import math
from pathlib import Path
from typing import Annotated

import typer

from sgrl.bars import progress_bar
from sgrl.cli.options import JSON, Checkpoint, home
from sgrl.cli.terminal import print_json

Seed = Annotated[int, typer.Option(min=0, help="Seed of the mazes and of the actions.")]


def evaluate(
    checkpoint: Checkpoint,
    episodes: Annotated[int, typer.Option(min=1, help="Episodes to run.")] = 100,
    seed: Seed = 0,
    greedy: Annotated[
        bool, typer.Option("--greedy", help="Take the likeliest actions instead of sampling.")
    ] = False,
    json: JSON = False,
) -> None:
    """Run a checkpoint's policy on its environment.

    Rates and means come with 95% intervals (Wilson's, Student's t).
    """
    from sgrl.results.evaluation import evaluate as evaluate_checkpoint
    from sgrl.results.locations import reading_checkpoint

    with reading_checkpoint(checkpoint) as folder:
        found = evaluate_checkpoint(folder, episodes, seed, greedy)
    if json:
        print_json({"checkpoint": checkpoint, "seed": seed, "greedy": greedy, **found})
        return
    typer.echo(f"episodes: {found.pop('episodes')}")
    for name in [name for name in found if f"{name}_low" in found]:
        low, high = found[f"{name}_low"], found[f"{name}_high"]
        interval = "" if math.isnan(low) else f" (95% interval {low:.4g} to {high:.4g})"
        typer.echo(f"{name}: {found[name]:g}{interval}")


def render(
    checkpoint: Checkpoint,
    out: Annotated[
        Path, typer.Option(callback=home, help="An animation (.gif) or a filmstrip (.png).")
    ] = Path("episode.gif"),
    seed: Seed = 0,
    episode: Annotated[int, typer.Option(min=0, help="Which of evaluate's, from 0.")] = 0,
    fps: Annotated[int, typer.Option(min=1, max=50, help="Steps a second (.gif).")] = 5,
    frames: Annotated[int, typer.Option(min=1, help="Pictures in the filmstrip (.png).")] = 6,
) -> None:
    """Draw one of the episodes that `evaluate` runs."""
    from sgrl.analysis.episodes import record_episode
    from sgrl.analysis.render import check_out, write_episode
    from sgrl.results.locations import reading_checkpoint

    check_out(out)
    with reading_checkpoint(checkpoint) as folder:
        recorded = record_episode(folder, seed, episode)
    with progress_bar("drawing") as bar:
        write_episode(recorded, out, fps, frames, lambda total: bar(advance=1, total=total))
    typer.echo(f"{out}: {recorded.title}")


def bench(
    num_envs: Annotated[int, typer.Option(min=1, help="Episodes per batch.")] = 20,
    rounds: Annotated[int, typer.Option(min=1, help="Batches of each that count.")] = 5,
    json: Annotated[
        Path | None, typer.Option(callback=home, help="Write the figures to this file too.")
    ] = None,
    device: Annotated[str, typer.Option(help="Where: cpu, cuda or cuda:N.")] = "cpu",
) -> None:
    """Measure milliseconds per batch of every policy and backend, on one CPU thread or a GPU."""
    from sgrl.bench import run_bench

    for line in run_bench(num_envs, rounds, json, device):
        typer.echo(line)
