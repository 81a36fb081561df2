"""Time of one update by backend, at full size, as a ratio to eager and to the plain baseline.

Rounds are interleaved and one thread is used, so that only what is compared differs. Exits with
status 1 where the "torch" backend's adaptive update is less than 2.2x faster than eager's.

    python benchmarks/backends.py --num-envs 20 --rounds 5
"""

import argparse
import statistics
import time
from collections.abc import Callable

import plain_torch
import torch

from sgrl.envs.registry import make_vector
from sgrl.nn.registry import make_policy
from sgrl.reinforce.rollout import Rollout
from sgrl.reinforce.update import UpdateSettings, make_optimizers, update

REQUIRED = 2.2
MODES = {
    "backprop": {"propagation": "backprop"},
    "fixed": {"adaptive": False},
    "adaptive": {"adaptive": True},
}
PLAIN = {
    "backprop": "sparsenet_backprop",
    "fixed": "sparsenet_sgprop_fixed",
    "adaptive": "sparsenet_sgprop",
}


def updates(num_envs: int) -> dict[tuple[str, str], Callable[[], object]]:
    """One update on one recorded batch, by (mode, implementation)."""
    env = make_vector("labyrinth_escape", num_envs, {})
    runs: dict[tuple[str, str], Callable[[], object]] = {}
    for mode, settings in MODES.items():
        for backend in ("eager", "torch"):
            policy = make_policy("sparsenet", 56, 4, backend=backend, **settings)
            batch = Rollout(env, policy, seed=0).collect()
            optimizers = make_optimizers(policy, 2e-3, 1e-5)

            def run(policy=policy, optimizers=optimizers, batch=batch) -> object:
                return update(policy, optimizers, batch, UpdateSettings())

            runs[mode, backend] = run
        plain = plain_torch.make_policy(PLAIN[mode], 56, 4)
        plain_optimizers = plain_torch.make_optimizers(plain, 2e-3, 1e-5)
        arrays = (batch.observations, batch.actions, batch.rewards, batch.mask)

        def run_plain(plain=plain, optimizers=plain_optimizers, arrays=arrays) -> object:
            return plain_torch.update(plain, optimizers, *arrays)

        runs[mode, "plain"] = run_plain
    return runs


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--num-envs", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    runs = updates(arguments.num_envs)
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
    for round_ in range(arguments.rounds + 1):
        for key, run in runs.items():
            started = time.perf_counter()
            run()
            if round_:  # the first round warms up
                seconds[key].append(time.perf_counter() - started)
    median = {key: statistics.median(values) for key, values in seconds.items()}
    print(f"update, milliseconds (median of {arguments.rounds}), B = {arguments.num_envs}, T = 80")
    print(f"{'':10}{'plain':>9}{'eager':>9}{'torch':>9}{'eager/torch':>13}{'plain/torch':>13}")
    for mode in MODES:
        plain, eager, fast = (median[mode, name] for name in ("plain", "eager", "torch"))
        times = "".join(f"{1e3 * value:9.0f}" for value in (plain, eager, fast))
        print(f"{mode:10}{times}{eager / fast:13.2f}{plain / fast:13.2f}")
    gain = median["adaptive", "eager"] / median["adaptive", "torch"]
    print(f"adaptive: torch is {gain:.2f}x faster than eager (required: {REQUIRED}x)")
    return 0 if gain >= REQUIRED else 1


if __name__ == "__main__":
    raise SystemExit(main())
