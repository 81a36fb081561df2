"""Trials that train for no time, in sweeps where it matters which ones are trained.

As a script, `stand_ins.py sweep CONFIG RESULTS` or `stand_ins.py resume DIRECTORY`, on the cluster
at RAY_ADDRESS or a Ray of its own. SGRL_STAND_IN_SECONDS is what an iteration takes; each adds the
time of its end, a line, to the file SGRL_STAND_IN_LOG.
"""

import contextlib
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from sweeps import CONFIG
from worker_server import local_ray

from sgrl.results.metrics import count_rows
from sgrl.tuning import sweep
from sgrl.tuning.experiment.load import load_experiment
from sgrl.tuning.trial import TrialRunner

TWO = {
    "gru": {"model": {"policy": "gru", "hidden_size": 8}},
    "lstm": {"model": {"policy": "lstm", "hidden_size": 8}},
}


LR = "config.training.lr"
SEARCH = {
    "name": "search",
    "config": CONFIG | {"training": {"lr": {"loguniform": [1e-5, 1e-1]}}},
    "seeds": [0, 1, 2],
    "search": {"name": "optuna", "num_samples": 14, "concurrent": 4, "seed": 5},
    "concurrency": "auto",
}
POPULATION = {
    "name": "population",
    "config": CONFIG | {"training": {"lr": {"grid": [1e-5, 1e-4, 1e-3, 1e-2]}}},
    "stop": {"training_iteration": 9},
    "schedule": {
        "name": "pbt",
        "perturbation_interval": 2,
        "quantile_fraction": 0.5,
        "hyperparam_mutations": {LR: {"loguniform": [1e-5, 1e-2]}},
    },
}


def stand_in_class():
    """Return an algorithm whose success rate nears what its method and its learning rate allow."""

    class StandIn:
        def __init__(self, config, seconds=0.0):
            lr = config.sections["training"]["lr"]
            if lr > 1:
                raise FloatingPointError(f"lr {lr} is too high")
            best = 0.95 if config.method == "gru" else 0.3
            self.best = best * math.exp(-((math.log10(lr) + 3) ** 2) / 4)
            self.seed, self.iteration, self.skill, self.seconds = config.seed, 0, 0.0, seconds

        def train(self):
            time.sleep(self.seconds)
            self.iteration += 1
            self.skill += (self.best - self.skill) / 2
            noise = np.random.default_rng([self.seed, self.iteration]).normal(0, 0.05)
            success = min(max(self.skill + noise, 0.0), 1.0)
            counts = {"env_steps": 10.0 * self.iteration, "episodes": float(self.iteration)}
            counts["padded_env_steps"] = counts["env_steps"]
            return {"sgrl": {**counts, "success_rate": success, "policy_loss": self.skill}}

        def save_checkpoint(self, directory):
            state = {"iteration": self.iteration, "skill": self.skill}
            (Path(directory) / "state.json").write_text(json.dumps(state))

        def load_checkpoint(self, directory):
            vars(self).update(json.loads((Path(directory) / "state.json").read_text()))

        def stop(self):
            pass

    return StandIn


def stand_in_runner(seconds=0.0, log=None):
    """Return the trials that train it."""
    algorithm = stand_in_class()

    class StandInRunner(TrialRunner):
        def _build(self, config):
            self.parameters = 1
            return algorithm(config, seconds)

        def _train_once(self):
            done = super()._train_once()
            if log is not None:
                with Path(log).open("a") as file:
                    file.write(f"{time.time():.6f}\n")
            return done

    return StandInRunner


def success_rates(trial):
    """Return what a trial has in that column of metrics.csv, without any sweep."""
    algorithm = stand_in_class()(trial.config)
    iterations = range(trial.config.stop.training_iteration)
    return [algorithm.train()["sgrl"]["success_rate"] for _ in iterations]


def start(*words, output=None, **more):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_ADDRESS")} | more
    script = Path(__file__)
    words = [sys.executable, script, *map(str, words)]
    return subprocess.Popen(words, env=environment, stdout=output, stderr=output)


def under_kills(config, folder, name, rows):
    """Run a sweep whose driver is killed once it has that many rows, for each of `rows`."""
    directory = folder / name

    def written():
        return sum(count_rows(path) for path in directory.glob("*/metrics.csv"))

    for enough in rows:
        begun = (directory / "experiment.yaml").is_file()
        driver = start("resume", directory) if begun else start("sweep", config, folder)
        try:
            while written() < enough:
                assert driver.poll() is None, "it ended before it was killed"
                time.sleep(0.02)
        finally:
            driver.kill()
            driver.wait()
    return directory


if __name__ == "__main__":
    seconds = float(os.environ.get("SGRL_STAND_IN_SECONDS", "0.02"))
    sweep.TrialRunner = stand_in_runner(seconds, os.environ.get("SGRL_STAND_IN_LOG"))
    what, where, *results = sys.argv[1:]
    own_ray = contextlib.nullcontext() if "RAY_ADDRESS" in os.environ else local_ray()
    with contextlib.suppress(KeyboardInterrupt), own_ray:
        if what == "sweep":
            sweep.run_sweep(load_experiment(where), *results)
        else:
            sweep.resume_sweep(where)
