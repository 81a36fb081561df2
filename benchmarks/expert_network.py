"""Time of the expert network's published sweep, as a ratio to two plain NumPy versions of it.

Both simulate one trial after the other, draw every Jacobian and every sample, and compute the
gradient estimates as the definitions say: "arrays" with arrays over the states, "loops" state by
state and expert by expert. What counts is processor time. Exits with status 1 where sgrl is less
than 10x faster than "arrays". Of "loops" only `--loop-trials` of each cell's 20 trials are run and
the time is scaled up: all 20 take over ten minutes.

    python benchmarks/expert_network.py
    python benchmarks/expert_network.py --loop-trials 20
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from sgrl.theory.expert_network import CASES, Cell, simulate, sweep_cells

REQUIRED = 10
EXPERTS = 5


class Trial(NamedTuple):
    """Everything random in one trial."""

    read: np.ndarray  # [m, k], the coordinates that each expert reads
    a: np.ndarray  # [m, k]
    b: np.ndarray  # [m]
    beta: np.ndarray  # [m, k]
    gamma: np.ndarray  # [m]
    alpha: np.ndarray  # [m]
    jacobians: np.ndarray  # [R, d, d]
    noise: np.ndarray  # [R, n, m]: standard normal, or whether each expert is active


def draw_trial(cell: Cell, generator: np.random.Generator) -> Trial:
    case, d, k, n = cell
    normal = generator.standard_normal
    shape = (2**d, n, EXPERTS)
    return Trial(
        read=np.stack([generator.choice(d, k, replace=False) for _ in range(EXPERTS)]),
        a=normal((EXPERTS, k)) / k**0.5,
        b=0.1 * normal(EXPERTS),
        beta=normal((EXPERTS, k)) / k**0.5,
        gamma=0.1 * normal(EXPERTS),
        alpha=normal(EXPERTS),
        jacobians=normal((2**d, d, d)) / d**0.5,
        noise=generator.random(shape) < 0.5 if case == "activation" else normal(shape),
    )


def all_states(d: int) -> np.ndarray:
    """{-1, 1}^d as rows [R, d]."""
    return 2.0 * ((np.arange(2**d)[:, None] >> np.arange(d)) & 1) - 1


class Gradients(NamedTuple):
    """Gradients before they went through the Jacobians and after [R, d]."""

    exact: np.ndarray
    backprop: np.ndarray
    sgprop: np.ndarray

    def squared_errors(self) -> tuple[float, float]:
        backprop = ((self.backprop - self.exact) ** 2).sum()
        return backprop, ((self.sgprop - self.exact) ** 2).sum()


def loops(cell: Cell, trial: Trial) -> tuple[Gradients, Gradients]:
    """Gradients with respect to u, and with respect to the parameters, state by state."""
    case, d, _, _ = cell
    states = all_states(d)
    exact, backprop, sgprop = np.zeros((3, len(states), EXPERTS))
    tables: list[dict[tuple, list[float]]] = [{} for _ in range(EXPERTS)]
    for u, state in enumerate(states):
        for j in range(EXPERTS):
            x = state[trial.read[j]]
            exact[u, j] = trial.a[j] @ x + trial.b[j] - (trial.beta[j] @ x + trial.gamma[j])
            if case == "noisy":
                samples = exact[u, j] + 0.5 * trial.noise[u, :, j]
            elif case == "activation":
                samples = exact[u, j] * trial.noise[u, :, j] / 0.5
            else:
                samples = exact[u, j] - trial.alpha[j] * 0.5 * trial.noise[u, :, j]
            backprop[u, j] = samples.mean()
            tables[j].setdefault(tuple(x), []).append(backprop[u, j])
    means = [{x: np.mean(values) for x, values in table.items()} for table in tables]
    for u, state in enumerate(states):
        for j in range(EXPERTS):
            sgprop[u, j] = means[j][tuple(state[trial.read[j]])]

    before, after = np.zeros((2, 3, len(states), d))
    for i, feedback in enumerate((exact, backprop, sgprop)):
        for u in range(len(states)):
            for j in range(EXPERTS):
                before[i, u, trial.read[j]] += trial.a[j] * feedback[u, j] / len(states)
            after[i, u] = trial.jacobians[u].T @ before[i, u]
    return Gradients(*before), Gradients(*after)


def arrays(cell: Cell, trial: Trial) -> tuple[Gradients, Gradients]:
    """The same, with whole arrays over the states."""
    case, d, k, _ = cell
    states = all_states(d)
    x = states[:, trial.read]  # [R, m, k]
    exact = ((trial.a - trial.beta) * x).sum(2) + trial.b - trial.gamma
    if case == "noisy":
        samples = exact[:, None] + 0.5 * trial.noise
    elif case == "activation":
        samples = exact[:, None] * trial.noise / 0.5
    else:
        samples = exact[:, None] - trial.alpha * 0.5 * trial.noise
    backprop = samples.mean(1)
    sgprop = np.empty_like(backprop)
    projection = (x > 0) @ 2 ** np.arange(k)
    for j in range(EXPERTS):
        sums = np.bincount(projection[:, j], backprop[:, j])
        sgprop[:, j] = (sums / np.bincount(projection[:, j]))[projection[:, j]]

    directions = np.zeros((EXPERTS, d))
    np.put_along_axis(directions, trial.read, trial.a, axis=1)
    before = [feedback @ directions / len(states) for feedback in (exact, backprop, sgprop)]
    after = [(vectors[:, None] @ trial.jacobians)[:, 0] for vectors in before]
    return Gradients(*before), Gradients(*after)


def seconds_of(version: Callable, cells: list[Cell], trials: int) -> float:
    started = time.process_time()
    for cell in cells:
        generator = np.random.default_rng((CASES.index(cell.case), *cell[1:]))
        for _ in range(trials):
            _, gradients = version(cell, draw_trial(cell, generator))
            gradients.squared_errors()
    return time.process_time() - started


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--loop-trials", type=int, default=1)
    arguments = parser.parse_args()
    cells, trials = sweep_cells(), 20
    ours, theirs = [], []
    for _ in range(arguments.rounds):  # interleaved, so that both meet the same machine
        started = time.process_time()
        simulate(cells, trials)
        ours.append(time.process_time() - started)
        theirs.append(seconds_of(arrays, cells, trials))
    fast = statistics.median(ours)
    seconds = {
        "arrays": statistics.median(theirs),
        "loops": seconds_of(loops, cells, arguments.loop_trials) * trials / arguments.loop_trials,
    }
    print(f"{len(cells)} cells, {trials} trials each; sgrl: {fast:.2f} s")
    for name, value in seconds.items():
        print(f"{name:8}{value:8.1f} s, {value / fast:6.1f}x as long")
    gain = seconds["arrays"] / fast
    print(f"sgrl is {gain:.1f}x faster than plain NumPy (required: {REQUIRED}x)")
    return 0 if gain >= REQUIRED else 1


if __name__ == "__main__":
    raise SystemExit(main())
