"""Time of a training step and of an evaluation on the MNIST bandit, as ratios to the plain step.

Processor time, in interleaved rounds on one thread, so that only what is compared differs. Exits
with status 1 where a ratio is missed: a training step at least 2.5x faster than the plain baseline
with the "torch" backend and 5x with "native", an evaluation of 4,000 images 3x and 8x.

    python benchmarks/mnist.py --rounds 5
"""

import argparse
import statistics
import time
from collections.abc import Callable

import plain_mnist
import torch

from sgrl.envs.registry import evaluation_config, make_vector
from sgrl.nn.kernels.backends import BACKENDS
from sgrl.nn.registry import make_policy
from sgrl.reinforce.rollout import Rollout
from sgrl.reinforce.update import UpdateSettings, make_optimizers, update

REQUIRED = {
    "torch": {"step": 2.5, "evaluation": 3.0},
    "native": {"step": 5.0, "evaluation": 8.0},
}
BATCH, IMAGES = 64, 4000
SETTINGS = UpdateSettings(
    entropy_coeff=0.0, grad_clip=None, normalize_returns=False, two_phase=True
)


def runs() -> dict[tuple[str, str], Callable[[], object]]:
    """One training step, and one evaluation, by (implementation, what)."""
    env, test = (
        make_vector("mnist_bandit", BATCH),
        make_vector("mnist_bandit", IMAGES, evaluation_config("mnist_bandit")),
    )
    jobs: dict[tuple[str, str], Callable[[], object]] = {}
    for backend in BACKENDS:
        policy = make_policy("sparse_mlp", 784, 9, backend=backend)
        optimizers = make_optimizers(policy, 5e-3, 5e-3)
        rollout, evaluation = Rollout(env, policy, 0, keep=True), Rollout(test, policy, 0)

        def step(policy=policy, optimizers=optimizers, rollout=rollout) -> object:
            return update(policy, optimizers, rollout.collect(), SETTINGS)

        jobs[backend, "step"], jobs[backend, "evaluation"] = step, evaluation.collect

    plain = plain_mnist.SparseMLP()
    plain_optimizers = plain_mnist.make_optimizers(plain, 5e-3, 5e-3)
    batch = Rollout(env, policy, 0).collect()
    images = torch.from_numpy(test.reset(range(IMAGES)))

    def plain_step() -> object:
        contexts = batch.observations[0]
        actions = plain_mnist.sample(plain, contexts)
        return plain_mnist.update(plain, plain_optimizers, contexts, actions, batch.rewards[0])

    jobs["plain", "step"] = plain_step
    labels = torch.zeros(IMAGES, dtype=torch.int64)
    jobs["plain", "evaluation"] = lambda: plain_mnist.evaluate(plain, images, labels)
    return jobs


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    jobs = runs()
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in jobs}
    # Steps follow each other, as in training: a step after something else finds no memory ready.
    for what, repeats in (("step", 3), ("evaluation", 1)):
        for round_ in range(arguments.rounds + 1):
            for key in (key for key in jobs if key[1] == what):
                for repeat in range(repeats):
                    started = time.process_time()
                    jobs[key]()
                    if round_ and (repeat or repeats == 1):  # the first round warms up
                        seconds[key].append(time.process_time() - started)
    median = {key: statistics.median(values) for key, values in seconds.items()}
    print(f"milliseconds (median of {arguments.rounds}); times faster than plain")
    missed = 0
    for name in ("plain", *BACKENDS):
        row = f"{name:8}"
        for what in ("step", "evaluation"):
            gain = median["plain", what] / median[name, what]
            required = REQUIRED.get(name, {}).get(what, 0.0)
            missed += gain < required
            note = f" (required {required}x)" if required else ""
            row += f"  {what} {1e3 * median[name, what]:.0f} ms, {gain:.2f}x{note}"
        print(row)
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
