"""The promises on speed and memory, checked: `Reinforce.train()` against the frozen baseline.

Whole iterations on labyrinth_escape at full size, in interleaved rounds on one thread; and how
far the process's memory grows during adaptive training. Exits with status 1 where one is missed.

    python benchmarks/speedup.py --rounds 7
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import psutil
import ray
import torch

from sgrl.bench import POLICIES, Contender, load_plain, measure, train_plain
from sgrl.rllib import ReinforceConfig

# Least gain over the baseline, by batch size and policy.
REQUIRED = {
    (20, "sgprop adaptive"): 10,
    (40, "sgprop adaptive"): 10,
    (20, "sgprop fixed"): 9,
    (20, "backprop"): 10,
    (20, "gru"): 5,
    (20, "lstm"): 5,
}
MOST_MEGABYTES = 200


def iterations(policy: str, num_envs: int) -> Iterator[dict[str, float]]:
    """Seconds of an iteration of `Reinforce.train()`: medians of five."""
    arguments = dict(POLICIES[policy][0])
    config = (
        ReinforceConfig()
        .environment("labyrinth_escape")
        .env_runners(num_envs_per_env_runner=num_envs)
        .rl_module(model_config={"policy": arguments.pop("name"), **arguments})
    )
    algorithm = config.build_algo()

    def run() -> Iterator[dict[str, float]]:
        while True:
            seconds = []
            for _ in range(5):  # together about as long as one of the baseline
                started = time.perf_counter()
                algorithm.train()
                seconds.append(time.perf_counter() - started)
            yield {"total": statistics.median(seconds)}

    return run()


def growth() -> float:
    """Megabytes by which adaptive training's peak exceeds the moment before the first batch."""
    ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    batches = iterations("sgprop adaptive", 20)
    before = psutil.Process().memory_info().rss
    for _ in range(8):
        next(batches)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return (peak - before) / 1e6


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--memory", action="store_true", help="only the memory, of this process")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.memory:
        print(f"{growth():.0f}")
        return 0
    missed = False
    script = [sys.executable, __file__, "--memory"]
    megabytes = float(subprocess.run(script, check=True, capture_output=True, text=True).stdout)
    missed |= megabytes > MOST_MEGABYTES
    print(f"memory grows by {megabytes:.0f} MB (at most {MOST_MEGABYTES})", flush=True)

    plain = load_plain()
    assert plain is not None
    ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    print(f"{'B':>3}  {'policy':16}{'plain ms':>10}{'sgrl ms':>10}{'gain':>8}{'required':>10}")
    for (num_envs, policy), least in REQUIRED.items():
        pair = [
            Contender("", policy, "sgrl", iterations(policy, num_envs)),
            Contender(
                "", policy, "plain", train_plain(plain, POLICIES[policy][1], "escape", num_envs, 80)
            ),
        ]
        measure(pair, arguments.rounds)
        ours, theirs = (contender.quartiles("total")[1] for contender in pair)
        gain = theirs / ours
        missed |= gain < least
        print(
            f"{num_envs:3}  {policy:16}{theirs:10.0f}{ours:10.1f}{gain:7.1f}x{least:9}x", flush=True
        )
    return int(missed)


if __name__ == "__main__":
    raise SystemExit(main())
