"""The expert network: how many samples pooling saves, simulated exactly.

One node computes u from 2^d equally likely inputs, one block of parameters each: u runs through
the R = 2^d states of {-1, 1}^d, and J_u [d, d] is the Jacobian of its block. Each of m experts
reads k coordinates P_j u and is trained towards a linear target of its own:

    y_j = <a_j, P_j u> + b_j,   target_j = <beta_j, P_j u> + gamma_j,   feedback y_j - target_j

The gradient with respect to the node's parameters is the concatenation over states u of
J_u^T sum_j P_j^T a_j feedback_j(u) / R. Its estimators see n noisy samples of the feedback at each
state. Backprop averages them per state; sgprop's predictor is a table that pools, for each expert,
all 2^(d-k) states with the same projection P_j u, which is all that its feedback depends on. Every
kind of noise is unbiased, and the ratio of the two mean squared errors is 2^(d-k).

What is drawn is what the errors depend on, with no change to their distribution:

- the mean of the n samples at a state, not the samples;
- of J_u, which is Gaussian and serves one trial only, its action on the two vectors it meets.
  Let c and c~ be the errors of the two estimators before J_u, and c~ = rho c + r with r orthogonal
  to c. Then J_u^T c and J_u^T r are independent Gaussian vectors, and the squared lengths of
  J_u^T c and J_u^T c~ follow from three numbers, whatever d is (see `Draws`).

So 2^20 states of 20 x 20 Jacobians need no more memory than their feedback.

Source: the paper, Sections 5, F and H.1.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.random.bit_generator import ISeedSequence
from numpy.typing import NDArray

from sgrl.theory.tasks import TheoryError, check_at_least, run_pieces

Array = NDArray[np.float64]

CASES = ("noisy", "activation", "partial")
NUM_EXPERTS = 5
SIGMA = 0.5  # standard deviation of the feedback's noise (noisy)
P = 0.5  # probability that an expert is active (activation)
TAU = 0.5  # standard deviation of what the expert does not see (partial)
RESAMPLES = 500
CONFIDENCE = 0.95
MAX_D = 20
MAX_N = 10**6

#: States, of all trials together, that one Ray task works on: enough to hide Ray's own time.
STATES_PER_TASK = 2**15
#: States that are worked on at once: enough to hide Python's time, and few enough that arrays of
#: one batch lie where those of the last one did. Larger ones cost a third more, for new memory.
STATES_AT_ONCE = 2**13


class Cell(NamedTuple):
    """One point of the sweep."""

    case: str
    d: int
    k: int
    n: int

    @property
    def theory(self) -> int:
        """The ratio of the mean squared errors that the paper derives, 2^(d-k)."""
        return 2 ** (self.d - self.k)


class Result(NamedTuple):
    """One row of the table: a cell, its mean squared errors, and their ratio with its interval."""

    case: str
    d: int
    k: int
    n: int
    mse_backprop: float
    mse_sgprop: float
    ratio: float
    ratio_ci_low: float
    ratio_ci_high: float


class Network(NamedTuple):
    """The experts of T trials."""

    coordinates: NDArray[np.intp]  # [T, m, k], distinct: what expert j reads of u
    a: Array  # [T, m, k]
    b: Array  # [T, m]
    beta: Array  # [T, m, k]
    gamma: Array  # [T, m]
    alpha: Array  # [T, m], weight of what the expert does not see (partial)


class Draws(NamedTuple):
    """Everything random in T trials.

    `feedback` [T, m, R] is the mean over n samples of a standard normal number, or, for the case
    "activation", of Bernoulli(P). The others [T, R] are the action of J_u: with e a unit vector
    and e' one orthogonal to it, `along` = |J_u^T e|^2 (chi-square_d / d); J_u^T e' has the
    component `aslant` in the direction of J_u^T e (normal, variance 1/d), and the squared length
    `across` outside it (chi-square_{d-1} / d).
    """

    network: Network
    feedback: Array
    along: Array
    aslant: Array
    across: Array


def sweep_cells(
    d: Iterable[int] = range(4, 13),
    k: Iterable[int] = (2, 3, 4),
    n: Iterable[int] = range(1, 5),
    cases: Iterable[str] = CASES,
) -> list[Cell]:
    """All combinations; by default those of the published sweep.

    Raises:
        TheoryError: k > d, d not in 1..20, k < 1, n not in 1..10^6, or an unknown case.
    """
    cells = [Cell(*values) for values in itertools.product(cases, d, k, n)]
    cells = list(dict.fromkeys(cells))  # given twice, simulated once
    for cell in cells:
        if cell.case not in CASES:
            raise TheoryError(f"unknown case {cell.case!r}; the cases are {', '.join(CASES)}")
        if not 1 <= cell.d <= MAX_D:
            raise TheoryError(f"d must be in 1..{MAX_D}, got {cell.d}")
        if not 1 <= cell.k <= cell.d:
            raise TheoryError(f"k must be in 1..d, got k = {cell.k} with d = {cell.d}")
        if not 1 <= cell.n <= MAX_N:
            raise TheoryError(f"n must be in 1..{MAX_N}, got {cell.n}")
    return cells


def parse_numbers(text: str, name: str) -> list[int]:
    """Whole numbers and ranges with both ends, as in "4-12" or "2,3,4"; `name` is for errors.

    Raises:
        TheoryError: anything else.
    """
    numbers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", part.strip())
        if not match:
            raise TheoryError(f"{name}: expected numbers as in 4-12 or 2,3,4, got {text!r}")
        first, last = match.groups()
        span = range(int(first), int(last or first) + 1)
        if not 1 <= len(span) <= 1000:
            raise TheoryError(f"{name}: {part.strip()} is no range of 1 to 1000 numbers")
        numbers += span
    return numbers


def simulate(
    cells: Sequence[Cell],
    trials: int = 20,
    seed: int = 0,
    parallel: int = 1,
    advance: Callable[[int], object] = lambda states: None,
) -> list[Result]:
    """Simulate cells, one row each, in their order.

    Args:
        cells: see `sweep_cells`.
        trials: independent trials of every cell, each with a network of its own.
        seed: of everything; a cell's row depends on no other cell.
        parallel: with 2 or more, the trials are spread over so many Ray tasks at a time; the rows
            are the same.
        advance: called with the number of states that were finished, `work(cells, trials)` in all.

    Raises:
        TheoryError: trials < 2, seed < 0, parallel < 1, or no Ray cluster at RAY_ADDRESS.
    """
    check_at_least(trials=(trials, 2), seed=(seed, 0), parallel=(parallel, 1))
    pieces = [
        (cell, piece) for cell in cells for piece in _split(cell, range(trials), STATES_PER_TASK)
    ]
    errors: dict[Cell, list[Array]] = {cell: [] for cell in cells}
    work_of_pieces = ((cell, trials, seed) for cell, trials in pieces)
    finished = run_pieces(simulate_trials, work_of_pieces, parallel)
    for (cell, piece), piece_errors in zip(pieces, finished, strict=True):
        errors[cell].append(piece_errors)
        advance(len(piece) * 2**cell.d)
    return [summarise(cell, np.concatenate(errors[cell], axis=1), seed) for cell in cells]


def work(cells: Iterable[Cell], trials: int) -> int:
    """Number of states in all trials of all cells."""
    return sum(trials * 2**cell.d for cell in cells)


def simulate_trials(cell: Cell, trials: range, seed: int) -> Array:
    """Squared errors of some trials of a cell: [2, T], see `squared_errors`."""
    parts = _split(cell, trials, STATES_AT_ONCE)
    return np.hstack([squared_errors(cell, draw(cell, part, seed)) for part in parts])


def _split(cell: Cell, trials: range, states: int) -> list[range]:
    """Trials in parts of about so many states each."""
    step = max(1, states // 2**cell.d)
    return [trials[start : start + step] for start in range(0, len(trials), step)]


def draw(cell: Cell, trials: range, seed: int) -> Draws:
    """Draw trials of a cell: each has a network and noise of its own, from its own seed.

    A trial's numbers depend on the seed, the cell and the trial's index only: not on which other
    trials or cells are simulated, nor where.
    """
    case, d, k, n = cell
    count, states = len(trials), 2**d
    words = _seed(cell, seed, 0).generate_state(3 * trials.stop, np.uint64).reshape(-1, 3)
    order = np.empty((count, NUM_EXPERTS, d))
    normals = np.empty((count, NUM_EXPERTS, 2 * k + 3))
    feedback = np.empty((count, NUM_EXPERTS, states))
    along, aslant, across = np.empty((3, count, states))
    for row, trial in enumerate(trials):
        generator = np.random.Generator(np.random.SFC64(_Words(words[trial])))  # type: ignore[arg-type]
        generator.random(out=order[row])
        generator.standard_normal(out=normals[row])
        if case == "activation":
            feedback[row] = _heads(generator, n, (NUM_EXPERTS, states))
        else:
            generator.standard_normal(out=feedback[row])
        # Twice a standard gamma variable of shape f/2 is a chi-square variable of f degrees.
        generator.standard_gamma(d / 2, out=along[row])
        generator.standard_normal(out=aslant[row])
        generator.standard_gamma((d - 1) / 2, out=across[row])
    feedback *= 1 / n if case == "activation" else 1 / math.sqrt(n)
    along *= 2 / d
    aslant *= 1 / math.sqrt(d)
    across *= 2 / d
    a, beta, biases = np.split(normals, [k, 2 * k], axis=2)
    network = Network(
        coordinates=order.argsort(axis=2)[:, :, :k],
        a=a / math.sqrt(k),
        b=0.1 * biases[:, :, 0],
        beta=beta / math.sqrt(k),
        gamma=0.1 * biases[:, :, 1],
        alpha=biases[:, :, 2],
    )
    return Draws(network, feedback, along, aslant, across)


def _heads(generator: np.random.Generator, n: int, shape: tuple[int, ...]) -> NDArray[np.integer]:
    """Draw Binomial(n, P) numbers.

    Up to n = 8 they are counted in random bits, which are fair coins as P is 1/2: a tenth of the
    time.
    """
    if n > 8:
        return generator.binomial(n, P, size=shape)
    coins = np.frombuffer(generator.bytes(math.prod(shape)), np.uint8)
    return np.bitwise_count(coins >> (8 - n)).reshape(shape)


class _Words(ISeedSequence):
    """The words that a trial's generator starts from.

    Those of all trials come from one SeedSequence: one for each would take as long as all that is
    drawn at small d.
    """

    def __init__(self, words: NDArray[np.uint64]) -> None:
        self.words = words

    def generate_state(self, n_words: int, dtype: object = np.uint64) -> NDArray[np.uint64]:
        return self.words  # SFC64 asks for three


def _seed(cell: Cell, seed: int, use: int) -> np.random.SeedSequence:
    key = (CASES.index(cell.case), cell.d, cell.k, cell.n, use)
    return np.random.SeedSequence(seed, spawn_key=key)


def squared_errors(cell: Cell, draws: Draws) -> Array:
    """Squared distance of both estimates to the exact gradient: [2, T], backprop's, sgprop's."""
    network, states = draws.network, 2**cell.d
    entry = table_entries(network.coordinates, cell.d)
    error = feedback_errors(cell.case, network, entry, draws.feedback)
    pooled = pool(error, entry, 2**cell.k)

    # <c, c>, <c, c~> and <c~, c~>, where c = sum_j P_j^T a_j error_j, through the experts' inner
    # products. Equal errors give equal numbers, to the last bit.
    directions = np.zeros((*network.a.shape[:2], cell.d))
    np.put_along_axis(directions, network.coordinates, network.a, axis=2)
    inner = directions @ directions.swapaxes(1, 2)
    square = np.einsum("tjr,tjr->tr", error, inner @ error)
    weighted = inner @ pooled
    product = np.einsum("tjr,tjr->tr", error, weighted)
    pooled_square = np.einsum("tjr,tjr->tr", pooled, weighted)

    # c~ = rho c + r. Where c is 0, so is its product with anything.
    rho = product / np.where(square > 0, square, 1)
    rest = np.maximum(pooled_square - rho * product, 0)
    backprop = square * draws.along
    sgprop = (
        rho * rho * backprop
        + 2 * rho * np.sqrt(backprop * rest) * draws.aslant
        + rest * (draws.aslant * draws.aslant + draws.across)
    )
    return np.stack([backprop.sum(1), sgprop.sum(1)]) / states**2


def table_entries(coordinates: NDArray[np.intp], d: int) -> NDArray[np.intp]:
    """Where each state falls in the tables of all experts: [T, m, R] from [T, m, k].

    A table has one entry for each of the 2^k inputs of one expert of one trial; they follow each
    other. Bit i of a state's number stands for coordinate i of u (0 for -1, 1 for 1), and bit i
    of an input's number for the i-th coordinate that the expert reads.
    """
    trials, experts, k = coordinates.shape
    steps = np.zeros((trials, experts, d), dtype=np.intp)  # what bit i of the state adds
    np.put_along_axis(steps, coordinates, 1 << np.arange(k)[None, None], axis=2)
    entry = np.empty((trials, experts, 2**d), dtype=np.intp)
    entry[:, :, 0] = np.arange(trials * experts).reshape(trials, experts) << k
    for i in range(d):
        low, high = entry[:, :, : 2**i], entry[:, :, 2**i : 2 ** (i + 1)]
        np.add(low, steps[:, :, i, None], out=high)
    return entry


def clean_feedback(network: Network) -> Array:
    """Every expert's feedback without noise for each of its 2^k inputs: [T, m, 2^k]."""
    k = network.a.shape[2]
    signs = 2.0 * ((np.arange(2**k)[:, None] >> np.arange(k)) & 1) - 1
    bias = network.b - network.gamma
    return (network.a - network.beta) @ signs.T + bias[:, :, None]


def feedback_errors(case: str, network: Network, entry: NDArray[np.intp], feedback: Array) -> Array:
    """What noise adds to the mean feedback at each state: [T, m, R].

    Args:
        case: one of `CASES`.
        network: the experts.
        entry: see `table_entries`.
        feedback: see `Draws`.
    """
    if case == "noisy":
        return SIGMA * feedback
    if case == "partial":
        return -TAU * network.alpha[:, :, None] * feedback
    return clean_feedback(network).take(entry) * (feedback / P - 1)


def pool(values: Array, entry: NDArray[np.intp], num_inputs: int) -> Array:
    """Mean over all states with the same entry, at each state: [T, m, R]."""
    trials, experts, states = values.shape
    sums = np.bincount(entry.ravel(), values.ravel(), trials * experts * num_inputs)
    return (sums / (states // num_inputs)).take(entry)


def summarise(cell: Cell, errors: Array, seed: int) -> Result:
    """A cell's row from its squared errors [2, trials].

    The ratio is that of the means over trials. Its interval is the percentile bootstrap's, at 95%:
    500 times, as many trials are drawn with replacement, the same for both estimators.
    """
    trials = errors.shape[1]
    generator = np.random.Generator(np.random.SFC64(_seed(cell, seed, 1)))
    backprop, sgprop = errors.mean(axis=1)
    ratios = np.empty(RESAMPLES)
    at_once = max(1, 2**20 // trials)  # of many trials not all resamples fit into memory
    for first in range(0, RESAMPLES, at_once):
        size = (min(at_once, RESAMPLES - first), trials)
        drawn = generator.integers(trials, size=size)
        means = errors.take(drawn.T, axis=1).mean(axis=1)  # over rows, which is quicker
        ratios[first : first + at_once] = means[0] / means[1]
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(ratios, [tail, 1 - tail])
    return Result(*cell, *map(float, (backprop, sgprop, backprop / sgprop, low, high)))
