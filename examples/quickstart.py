"""The question, from theory to a maze: what `make quickstart` runs.

Three experiments, each with one sentence on what it found and its figure: the law that the theory
promises, a task where synthetic gradients are said to help, and one where we found no difference.
A page with all three comes at the end. Run again, it goes on where it was interrupted, or shows
what is there.

    python examples/quickstart.py

Takes about five minutes on two cores.
"""

import argparse
import shlex
import sys
import time
import webbrowser
from pathlib import Path

import pandas as pd

from sgrl.analysis.rank_test import smallest_p
from sgrl.cli import app
from sgrl.results.runs import load_results

ROOT = Path(__file__).parent.parent


def run(*arguments: str | Path) -> bool:
    """Run a command of sgrl, shown as it would be typed; returns whether it did what it should."""
    print(f"\n$ sgrl {shlex.join(map(str, arguments))}", flush=True)
    status = app(list(map(str, arguments)), standalone_mode=False)
    if status == 130:  # Ctrl-C
        sys.exit(130)
    return not status


def sweep(config: str, folder: Path, *options: str) -> bool:
    """Run an experiment into a folder, or go on with what is there."""
    if (folder / "experiment.yaml").is_file():
        return run("resume", folder)
    file = ROOT / "tune_configs" / config
    return run("sweep", file, "--results", folder.parent, "--name", folder.name, *options)


def the_law(folder: Path) -> str:
    """Simulate the expert network, where the gain has a formula."""
    options = ("--d", "4-10", "--k", "2", "--n", "1", "--cases", "noisy")
    run("theory", "experts", *options, "--out", folder)
    rows = pd.read_csv(folder / "expert_network.csv")
    row = rows.loc[rows["d"].idxmax()]
    return (
        f"A neuron that sees {row['k']} of {row['d']} bits learns from all states that look the "
        f"same to it: its squared error is {row['ratio']:.0f} times smaller than backpropagation's "
        f"(95% interval {row['ratio_ci_low']:.0f} to {row['ratio_ci_high']:.0f}; theory "
        f"2^{row['d'] - row['k']} = {2 ** (row['d'] - row['k'])})."
    )


def compared(folder: Path, ours: str, other: str) -> str:
    """Final scores of two methods, seed by seed, and what so few can tell."""
    results = load_results(folder)
    trials = results.trials[results.trials["state"] == "completed"]
    final = f"final_{results.measure}"
    scores = [trials.loc[trials["method"] == m, final].tolist() for m in (ours, other)]
    if not all(scores):
        return "No trial of one of the two methods has finished: run this again."
    ahead = sum(a > b for a in scores[0] for b in scores[1])
    values = [", ".join(f"{score:.2f}" for score in sorted(of_one)) for of_one in scores]
    least = smallest_p([(scores[0], scores[1])])
    return (
        f"sgprop ends at {values[0]} and backprop in the same network at {values[1]}; sgprop is "
        f"ahead in {ahead} of {len(scores[0]) * len(scores[1])} pairs of seeds. (So few seeds "
        f"cannot give a p-value below {least:.2g}: they show, they do not prove.)"
    )


def main(arguments: list[str] | None = None) -> list[str]:
    """Run everything that is not there yet; returns the three sentences."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder")
    parser.add_argument("--seeds", type=int, default=3, help="of each method")
    parser.add_argument("--set", action="append", default=[], help="KEY=VALUE, of both sweeps")
    options = parser.parse_args(arguments)
    started = time.monotonic()
    seeds = ["--seeds", f"0..{options.seeds - 1}"]
    short = [word for key in options.set for word in ("--set", key)]
    law, bandit, maze = (
        options.results / name for name in ("quickstart_law", "mnist_quickstart", "quickstart")
    )

    print("1 of 3: the law. Noisy feedback in a network of experts, simulated.")
    found = [the_law(law)]
    figures = [law / "ratio_noisy.png"]

    print("\n2 of 3: where it is said to help. Guess a digit; two rewards in five are flipped.")
    methods = "sparse_sgprop,sparse_backprop"
    noise = ("--set", "config.environment.env_config.p_flip=0.4")  # the published one
    sweep("mnist_quickstart.yaml", bandit, "--methods", methods, *noise, *seeds, *short)
    if (bandit / "summary.csv").is_file():
        found.append(
            compared(bandit, "sparse_sgprop", "sparse_backprop")
            + " With one reward in five flipped, backprop was ahead in the few seeds run."
        )
        figures.append(bandit / "figures" / "eval_reward.png")
    else:
        found.append("Not run: without its images there is no bandit (see above).")

    print("\n3 of 3: where we found no difference. Find the way out of a maze.")
    methods = "gru,sparsenet_backprop,sparsenet_sgprop"
    sweep("quickstart.yaml", maze, "--methods", methods, *seeds, *short)
    found.append(
        compared(maze, "sparsenet_sgprop", "sparsenet_backprop")
        + " Forty seeds at full size found no difference either (docs/study.md)."
    )
    figures.append(maze / "figures" / "success_rate.png")

    page = options.results / "quickstart.html"
    there = [folder for folder in (law, bandit, maze) if any(folder.glob("*.csv"))]
    run("report", *there, "--out", page)
    checkpoint = maze / f"sparsenet_sgprop_seed=0/checkpoints/{100:06}"
    print("\nWhat was found")
    for sentence in found:
        print(f"\n- {sentence}")
    print("\nFigures:", *map(str, figures))
    print(f"All of it on one page: {page}\n\nNext:")
    print(f"  sgrl render {shlex.quote(str(checkpoint))} --out episode.gif")
    print("  sgrl sweep tune_configs/labyrinth_escape.yaml --dry-run")
    print("  sgrl report results/published/escape_confirmation --out study.html")
    minutes, seconds = divmod(round(time.monotonic() - started), 60)
    print(f"\n{minutes} min {seconds} s")
    if sys.stdout.isatty():
        webbrowser.open(page.resolve().as_uri())
    return found


if __name__ == "__main__":
    main()
