"""Time to load and to report on a folder of many trials, as promised: 2,000 trials of 300 rows
load in under 10 s and are reported on in under 60 s. Exits with status 1 where they are not.

    python benchmarks/report.py
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import yaml

from sgrl.analysis.report import write_report
from sgrl.results.metrics import COLUMNS
from sgrl.results.runs import load_results

METHODS = ("sparsenet_sgprop", "sparsenet_backprop", "gru", "lstm", "mlp")
RATES = (2e-4, 5e-4, 1e-3, 2e-3, 4e-3)
LOAD_SECONDS, REPORT_SECONDS = 10, 60


def write_trials(folder: Path, trials: int, rows: int) -> None:
    """A made-up sweep of methods, learning rates and numbers of environments."""
    generator = np.random.default_rng(0)
    config = {
        "algorithm": "Reinforce",
        "config": {"training": {"gamma": 0.95}, "environment": {"env": "labyrinth_escape"}},
        "model": {"policy": "sparsenet", "num_neurons": 128, "backend": "native"},
        "stop": {"training_iteration": rows},
    }
    points = [(m, lr, envs) for m in METHODS for lr in RATES for envs in (20, 40)]
    for trial in range(trials):
        method, lr, envs = points[trial % len(points)]
        seed = trial // len(points)
        name = f"{method}_envs={envs}_lr={lr:g}_seed={seed}"
        (folder / name).mkdir()
        labels = {"name": name, "method": method, "seed": seed, "swept": {"envs": envs, "lr": lr}}
        (folder / name / "config.yaml").write_text(yaml.safe_dump(labels | config))
        (folder / name / "status.json").write_text('{"state": "completed", "notes": []}')
        values = generator.random((rows, len(COLUMNS) - 2))
        lines = (
            f"{i},{i * envs * 80}," + ",".join(map(repr, row))
            for i, row in enumerate(values.tolist(), start=1)
        )
        (folder / name / "metrics.csv").write_text("\n".join([",".join(COLUMNS), *lines, ""]))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--rows", type=int, default=300)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "many"
        folder.mkdir()
        write_trials(folder, arguments.trials, arguments.rows)
        started = time.perf_counter()
        results = load_results(folder)
        loaded = time.perf_counter()
        size = write_report([folder]).stat().st_size
        reported = time.perf_counter()
    load, report = loaded - started, reported - loaded
    print(f"{len(results.trials)} trials, {len(results.curves)} rows")
    print(f"loaded in {load:.1f} s (at most {LOAD_SECONDS})")
    print(f"reported on in {report:.1f} s (at most {REPORT_SECONDS}): {size / 1e6:.1f} MB")
    return 0 if load <= LOAD_SECONDS and report <= REPORT_SECONDS else 1


if __name__ == "__main__":
    raise SystemExit(main())
