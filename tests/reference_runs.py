"""Short runs whose learning rows stay what they are: recorded in `reference/`, compared by
`test_reference_rows.py`.

`python tests/reference_runs.py` records them anew. Later work must not move these numbers, so that
is for a change of the method itself, which says so.
"""

import csv
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sgrl.compiled.processor import processor_kind
from sgrl.envs.registry import make_vector
from sgrl.nn.kernels.backends import BACKENDS
from sgrl.nn.registry import make_policy
from sgrl.reinforce.loop import train
from sgrl.reinforce.update import UpdateSettings

FOLDER = Path(__file__).parent / "reference"
ROWS, MACHINE = FOLDER / "rows.csv", FOLDER / "machine.json"
ITERATIONS = 6
#: Columns that are no learning.
ASIDE = {"iteration", "env_steps", "padded_env_steps", "episodes", "iteration_seconds"}

LABYRINTHS = {
    "labyrinth_escape": {"maze_dims": [6, 6], "episode_length": 30},
    "labyrinth_explore": {"maze_dims": [6, 6], "episode_length": 20},
}
RECURRENT = {"num_neurons": 24, "num_parents": 4, "num_slots": 3, "num_input_neurons": 6}
FEED_FORWARD = {"num_layers": 3, "num_neurons": 20, "num_parents": 3, "num_slots": 3}
DENSE: dict[str, tuple[str, dict[str, Any]]] = {
    "gru": ("gru", {"backend": "torch"}),
    "gru/native": ("gru", {"backend": "native"}),
    "lstm": ("lstm", {"backend": "torch"}),
    "lstm/native": ("lstm", {"backend": "native"}),
    "mlp": ("mlp", {}),
}

Rows = list[dict[str, float]]


def labyrinth(env: str, dtype: torch.dtype, policy: str, **settings: Any) -> Rows:
    """REINFORCE on 6 labyrinths, in the plain loop."""
    vector = make_vector(env, 6, LABYRINTHS[env])
    made = make_policy(policy, vector.observation_size, vector.num_actions, dtype=dtype, **settings)
    return list(train(made, vector, ITERATIONS, lr=2e-3, predictor_lr=1e-4))


def bandit(dtype: torch.dtype, policy: str, **settings: Any) -> Rows:
    """REINFORCE on 32 images with the published two-phase step, in the plain loop."""
    vector = make_vector("mnist_bandit", 32, {})
    made = make_policy(policy, vector.observation_size, vector.num_actions, dtype=dtype, **settings)
    step = UpdateSettings(
        entropy_coeff=0.0, grad_clip=None, normalize_returns=False, two_phase=True
    )
    return list(train(made, vector, ITERATIONS, lr=5e-3, predictor_lr=5e-3, settings=step))


def ppo(dtype: torch.dtype, **settings: Any) -> Rows:
    """RLlib's PPO on 4 labyrinths."""
    from sgrl.results.rllib_metrics import metrics_row
    from sgrl.rllib import PPOConfig

    model = {"policy": "sparsenet", "dtype": str(dtype).removeprefix("torch."), **settings}
    config = (
        PPOConfig()
        .environment("labyrinth_escape", env_config={"episode_length": 12})
        .env_runners(num_env_runners=0, num_envs_per_env_runner=4, batch_mode="complete_episodes")
        .rl_module(model_config=model)
        .training(
            train_batch_size_per_learner=48,
            minibatch_size=26,
            num_epochs=2,
            lr=1e-3,
            predictor_lr=2e-4,
            grad_clip=0.5,
        )
        .debugging(seed=5)
    )
    algorithm = config.build_algo()
    try:
        return [metrics_row(algorithm.train(), i, 0.0) for i in range(1, 4)]
    finally:
        algorithm.stop()


def runs() -> Iterator[tuple[str, Callable[[torch.dtype], Rows]]]:
    """Every run by its name, to be called with a type of numbers."""
    for propagation in ("sgprop", "backprop"):
        for backend in BACKENDS:
            how = {"propagation": propagation, "backend": backend}
            for env in LABYRINTHS:
                run = partial(labyrinth, env, policy="sparsenet", **RECURRENT, **how)
                yield f"{env}/sparsenet_{propagation}/{backend}", run
            run = partial(bandit, policy="sparse_mlp", **FEED_FORWARD, **how)
            yield f"mnist_bandit/sparse_mlp_{propagation}/{backend}", run
            yield f"ppo/sparsenet_{propagation}/{backend}", partial(ppo, **RECURRENT, **how)
    for name, (policy, settings) in DENSE.items():
        run = partial(labyrinth, "labyrinth_escape", policy=policy, hidden_size=16, **settings)
        yield f"labyrinth_escape/{name}", run
    dense = partial(bandit, policy="dense", num_layers=3, hidden_size=16)
    yield "mnist_bandit/dense", dense


def learning_row(row: dict[str, float]) -> dict[str, float]:
    """The columns of a row that say what was learned."""
    return {name: value for name, value in row.items() if name not in ASIDE and value == value}


def machine() -> dict[str, Any]:
    """What the bits of float32 depend on."""
    return {
        "processor": processor_kind(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


def record() -> None:
    """Write the rows of every run, and the machine that made them."""
    FOLDER.mkdir(exist_ok=True)
    with ROWS.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["run", "dtype", "iteration", "column", "value"])
        for name, run in runs():
            for dtype in (torch.float32, torch.float64):
                for iteration, row in enumerate(run(dtype), start=1):
                    for column, value in learning_row(row).items():
                        writer.writerow(
                            [name, str(dtype)[6:], iteration, column, repr(float(value))]
                        )
    MACHINE.write_text(json.dumps(machine(), indent=1) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    record()
