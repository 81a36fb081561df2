"""What RLlib adds: seconds per iteration of `Reinforce.train()` and of the plain loop.

Run as `python benchmarks/rllib_overhead.py [--policies gru sparsenet] [--iterations N]`. Both do
the same work, alternately, on one thread; the ratio of medians should stay below 1.15.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray
import torch

from sgrl.envs.registry import make_vector
from sgrl.nn import make_policy
from sgrl.reinforce import train
from sgrl.rllib import ReinforceConfig

ENVIRONMENT = "labyrinth_escape"


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def measure(policy: str, num_envs: int, iterations: int, warm_up: int = 3) -> dict[str, float]:
    """Medians of one policy, after `warm_up` iterations that do not count."""
    config = (
        ReinforceConfig()
        .environment(ENVIRONMENT)
        .env_runners(num_envs_per_env_runner=num_envs)
        .rl_module(model_config={"policy": policy})
    )
    algorithm = config.build_algo()
    env = make_vector(ENVIRONMENT, num_envs)
    plain_policy = make_policy(policy, env.observation_size, env.num_actions, seed=config.seed)
    rows = train(plain_policy, env, iterations + warm_up, seed=config.seed)
    pairs = [
        (seconds(lambda: next(rows)), seconds(algorithm.train)) for _ in range(iterations + warm_up)
    ]
    algorithm.stop()
    plain, rllib = (statistics.median(times) for times in zip(*pairs[warm_up:], strict=True))
    return {"plain_seconds": plain, "rllib_seconds": rllib, "ratio": rllib / plain}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--policies", nargs="+", default=["gru", "sparsenet"])
    parser.add_argument("--num-envs", type=int, default=20)
    parser.add_argument("--iterations", type=int, default=40)
    parser.add_argument("--json", help="also write the figures to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    ray.init(
        "local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="error"
    )
    figures = {}
    for policy in arguments.policies:
        figures[policy] = measure(policy, arguments.num_envs, arguments.iterations)
        print(policy, " ".join(f"{name}={value:.4f}" for name, value in figures[policy].items()))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
