"""Time of one update by backend, at full size, as a ratio to eager and to the plain baseline.

Rounds are interleaved and one thread is used, so that only what is compared differs. Then the same
by mixing rule, in the native core. Exits with status 1 where the "torch" backend's adaptive update
is less than 2.2x faster than eager's, or where an estimate of lambda from episodes makes the native
update take more than 1.3x as long as the published one.

    python benchmarks/backends.py --num-envs 20 --rounds 5
"""

import argparse
import statistics
import time
from collections.abc import Callable

import plain_torch
import torch

from sgrl.envs.registry import make_vector
from sgrl.envs.vector import VectorEnv
from sgrl.nn.registry import make_policy
from sgrl.reinforce.batch import EpisodeBatch
from sgrl.reinforce.rollout import Rollout
from sgrl.reinforce.update import UpdateSettings, make_optimizers, update

REQUIRED = 2.2
#: Most time of a native update with a rule on episodes, as a ratio to the published rule.
MOST_FOR_EPISODES = 1.3
RULES = ("published", "raw", "episodes", "running_episodes")
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


def one_update(env: VectorEnv, **settings: object) -> tuple[Callable[[], object], EpisodeBatch]:
    """An update of a policy on a batch of its own, again and again; and that batch."""
    policy = make_policy("sparsenet", 56, 4, **settings)
    batch = Rollout(env, policy, seed=0).collect()
    optimizers = make_optimizers(policy, 2e-3, 1e-5)
    return lambda: update(policy, optimizers, batch, UpdateSettings()), batch


def rules_on_episodes(num_envs: int, rounds: int) -> float:
    """Print the native update's processor time by mixing rule; the most of those on episodes.

    As a ratio to the published rule, from the quickest of all rounds, which others on the machine
    have disturbed least.
    """
    env = make_vector("labyrinth_escape", num_envs, {})
    runs = {rule: one_update(env, backend="native", mixing_rule=rule)[0] for rule in RULES}
    least = dict.fromkeys(RULES, float("inf"))
    for _ in range(rounds + 1):
        for rule, run in runs.items():
            started = time.process_time()
            run()
            least[rule] = min(least[rule], time.process_time() - started)
    ratios = {rule: seconds / least["published"] for rule, seconds in least.items()}
    print("native update by mixing rule, milliseconds (the quickest), and ratio to published")
    for rule, ratio in ratios.items():
        print(f"{rule:18}{1e3 * least[rule]:7.1f}{ratio:8.2f}")
    return max(ratio for rule, ratio in ratios.items() if rule.endswith("episodes"))


def updates(num_envs: int) -> dict[tuple[str, str], Callable[[], object]]:
    """One update on one recorded batch, by (mode, implementation)."""
    env = make_vector("labyrinth_escape", num_envs, {})
    runs: dict[tuple[str, str], Callable[[], object]] = {}
    for mode, settings in MODES.items():
        for backend in ("eager", "torch"):
            runs[mode, backend], batch = one_update(env, backend=backend, **settings)
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
    ratio = rules_on_episodes(arguments.num_envs, 4 * arguments.rounds)
    print(f"rules on episodes: {ratio:.2f}x the published rule (at most {MOST_FOR_EPISODES}x)")
    return 0 if gain >= REQUIRED and ratio <= MOST_FOR_EPISODES else 1


if __name__ == "__main__":
    raise SystemExit(main())
