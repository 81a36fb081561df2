"""Small sweeps, and what is compared of them."""

import csv
import pickle
import shutil
from pathlib import Path

import pandas as pd
import yaml

from sgrl.results.checkpoints import write_checkpoint
from sgrl.results.metrics import COLUMNS
from sgrl.tuning.experiment.load import load_experiment

CONFIG = {
    "environment": {
        "env": "labyrinth_escape",
        "env_config": {"maze_dims": [6, 6], "episode_length": 10},
    },
    "env_runners": {"num_envs_per_env_runner": 4},
}
SPARSE = {"num_neurons": 12, "neuron_size": 2, "num_parents": 2, "num_slots": 2}
#: A policy for tests of algorithms.
SPARSENET = {
    "policy": "sparsenet",
    "feature_size": 16,
    "embedding_size": 16,
    "num_neurons": 12,
    "neuron_size": 3,
    "num_parents": 3,
    "num_slots": 2,
    "num_input_neurons": 4,
    "actor_slots": 2,
}
METHODS = {
    "sparsenet_sgprop": {
        "model": {"policy": "sparsenet", "num_input_neurons": 4, "adaptive": True, **SPARSE}
    },
    "gru": {"model": {"policy": "gru", "hidden_size": 8}},
    "diverging": {
        "model": {"policy": "gru", "hidden_size": 8},
        "config": {"training": {"lr": 1e30}},
    },
}


def make_experiment(path, methods=("sparsenet_sgprop", "gru"), **changes):
    experiment = {
        "name": "small",
        "config": CONFIG,
        "methods": methods if isinstance(methods, dict) else {n: METHODS[n] for n in methods},
        "seeds": [0, 1],
        "stop": {"training_iteration": 5},
        "checkpoint": {"every": 2, "keep": 2},
        "concurrency": 1,
        "max_failures": 1,
        **changes,
    }
    path.write_text(yaml.safe_dump(experiment, sort_keys=False))
    return load_experiment(path)


def metrics_without_times(directory):
    """Each trial's metrics.csv as bytes, without its last column."""
    assert COLUMNS[-1] == "iteration_seconds"
    return {
        path.parent.name: [line.rsplit(b",", 1)[0] for line in path.read_bytes().splitlines()]
        for path in Path(directory).glob("*/metrics.csv")
    }


def summary(directory):
    return pd.read_csv(directory / "summary.csv", index_col="trial")


def make_older(trial):
    """Turn a trial of Reinforce into one of the version that counted padding as env_steps."""
    path = trial / "metrics.csv"
    with path.open() as file:
        rows = list(csv.DictReader(file))
    names = [name for name in rows[0] if name not in ("padded_env_steps", "episodes")]
    header = ["true_grad_norm" if name == "received_grad_norm" else name for name in names]
    lines = [
        header,
        *([{**row, "env_steps": row["padded_env_steps"]}[n] for n in names] for row in rows),
    ]
    path.write_text("".join(",".join(line) + "\n" for line in lines))
    for checkpoint in (trial / "checkpoints").glob("[0-9]*"):
        state = checkpoint / "algorithm_state.pkl"
        content = pickle.loads(state.read_bytes())
        counts = content["reinforce"]
        counts["env_steps"] = counts.pop("padded_env_steps")
        del counts["episodes"]
        state.write_bytes(pickle.dumps(content))
        files = shutil.copytree(checkpoint, trial / "older", dirs_exist_ok=True)
        write_checkpoint(
            checkpoint.parent,
            int(checkpoint.name),
            lambda directory, files=files: shutil.copytree(files, directory, dirs_exist_ok=True),
            keep=9,
        )
        shutil.rmtree(files)
