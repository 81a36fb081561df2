"""A race: configurations meet on the same seeds, and those that are significantly worse drop out.

All configurations in the race run one seed (or some) after the other; a configuration that others
have significantly beaten gets no more. The last one left has won.

**What is bounded.** Call those configurations the best whose expected score is not below that of
any other. With a probability of at least `1 - error_rate` none of them is ever stopped, though the
race is looked at after every round. Scores need bounds for this; a failed run scores the lower one.
Without bounds only the order of two scores counts, and the best are those that no other beats more
often than it is beaten (there need not be one: rock, paper, scissors).

**What is assumed.** Seeds are independent draws, and the configurations were not chosen by their
scores on them. Nothing is assumed about how scores are distributed, nor about what those of one
seed have in common.

**Why it holds.** A gambler who believes that j is better than i stakes a share b of the capital on
every seed and has it multiplied by `1 + b (score_j - score_i) / (high - low)`. Where i is in fact
no worse than j, this capital is not expected to grow. Nor is its average over several b (`STAKES`)
and all opponents j, which is the evidence against i; an opponent that drops out leaves its capital
as it is. By Ville's inequality, a capital that starts at 1 and is not expected to grow ever reaches
x with a probability of at most 1/x. So does the evidence against the best, averaged over them. Of n
configurations in the race, the one with the most evidence against it is stopped when that reaches
n / error_rate, then the next when it reaches (n - 1) / error_rate, and so on. At the first wrong
stop all of the best were in the race, at most n, so that their average had reached 1 / error_rate.

Sources: Waudby-Smith and Ramdas, Estimating means of bounded random variables by betting, 2024
(the capital); Vovk and Wang, E-values: calibration, combination and applications, 2021 (averages,
several hypotheses); Maron and Moore, Hoeffding races, 1994 (the race).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sgrl.errors import UserError

#: Shares of the capital that are staked on a seed; the capital is split evenly between them.
STAKES = np.array([0.5, 1.0])


@dataclass(frozen=True)
class Stopped:
    """Why a configuration is out of the race.

    Attributes:
        against: the opponent with most evidence that it is better.
        seeds: the number of seeds that the configuration had run.
        difference: how much better the opponent was, on average over the seeds that both ran: in
            units of the score, or without bounds the share of seeds won less that of seeds lost.
        p: a p-value for the whole race, all rounds and configurations: the probability that any of
            the best is stopped with a p of at most x is at most x.
    """

    against: str
    seeds: int
    difference: float
    p: float


class Race:
    """Which configurations run on which seeds, decided by the scores of finished runs.

    A round is a number of seeds that all configurations in the race run. Decisions are made only
    when it is complete, from scores of runs that the race asked for. So they depend neither on the
    order in which scores arrive, nor on others (of runs that were on their way when their
    configuration dropped out). There is no state to be saved: a new `Race` that is given the same
    scores stands where the old one stood.

    Args:
        configurations: their names.
        seeds: the seeds, in the order in which they are run; at most all of them.
        error_rate: bound on the probability that a best configuration is stopped.
        first: the number of seeds in the first round.
        every: the number of seeds in each later round.
        bounds: the lowest and highest score possible, or None to let only the order count.

    Attributes:
        racing: the configurations in the race, in their order.
        out: why the others are not, in the order in which they dropped out.

    Raises:
        UserError: if an argument makes no race.
    """

    def __init__(
        self,
        configurations: Sequence[str],
        seeds: Sequence[int],
        error_rate: float = 0.05,
        first: int = 5,
        every: int = 1,
        bounds: tuple[float, float] | None = (0.0, 1.0),
    ) -> None:
        for name, values in (("configurations", configurations), ("seeds", seeds)):
            if not values or len(set(values)) < len(values):
                raise UserError(f"{name} of a race: give at least one, and none twice")
        if not 0 < error_rate < 1:
            raise UserError(f"error_rate {error_rate} is not between 0 and 1")
        if first < 1 or every < 1:
            raise UserError(f"a round has at least one seed (first: {first}, every: {every})")
        if bounds and not -math.inf < bounds[0] < bounds[1] < math.inf:
            raise UserError(f"bounds {bounds} are not two finite numbers, the lower one first")
        self.configurations = list(configurations)
        self.seeds = list(seeds)
        self.error_rate = error_rate
        self.first = first
        self.every = every
        self.bounds = bounds
        self.racing = list(configurations)
        self.out: dict[str, Stopped] = {}
        self._scores: dict[tuple[str, int], float] = {}
        self._decided = 0
        n = len(self.configurations)
        # By configuration i, its opponent j, and stake: the capital of those who back j.
        self._capital = np.ones((n, n, len(STAKES)))
        self._capital[np.diag_indices(n)] = 0
        self._gains = np.zeros((n, n))
        self._met = np.zeros((n, n))
        self._start_round(first)

    @property
    def over(self) -> bool:
        """Whether one configuration is left, or all seeds are run."""
        return len(self.racing) == 1 or self._decided == len(self.seeds)

    def has_run(self, configuration: str, seed: int) -> bool:
        """Return whether the race has the score of a run."""
        return (configuration, seed) in self._scores

    def next_runs(self) -> list[tuple[str, int]]:
        """Return the runs (configuration, seed) of this round without a score; none once over."""
        return list(self._missing)

    def add(self, configuration: str, seed: int, score: float | None) -> None:
        """Take in the score of a finished run, and decide if it was the last one of its round.

        Args:
            configuration: its name.
            seed: its seed.
            score: higher is better; None or NaN if the run failed, which is the worst score.

        Raises:
            UserError: if the run is none of the race's, has had another score, or its score is out
                of bounds.
        """
        run = f"{configuration}, seed {seed}"
        if configuration not in self.configurations or seed not in self.seeds:
            raise UserError(f"{run}: not in the race; check the names and seeds it was made with")
        low, high = self.bounds or (-math.inf, math.inf)
        if score is None or math.isnan(score):
            score = low
        if not low <= score <= high:
            raise UserError(f"{run}: the score {score} is not within bounds {low, high}")
        known = self._scores.setdefault((configuration, seed), score)
        if known != score:
            raise UserError(f"{run}: has the score {known}, not {score}")
        self._missing.pop((configuration, seed), None)
        while not self.over and not self._missing:
            self._decide()
            self._start_round(self.every)

    def _start_round(self, seeds: int) -> None:
        self._round = [] if self.over else self.seeds[self._decided : self._decided + seeds]
        runs = [(configuration, seed) for seed in self._round for configuration in self.racing]
        # A dict, as a set in order.
        self._missing = {run: None for run in runs if run not in self._scores}

    def _decide(self) -> None:
        racing = [self.configurations.index(name) for name in self.racing]
        pairs = np.ix_(racing, racing)
        for seed in self._round:
            gains = self._gain(np.array([self._scores[name, seed] for name in self.racing]))
            self._capital[pairs] *= 1 + STAKES * gains[..., None]
            self._gains[pairs] += gains
            self._met[pairs] += 1
        self._decided += len(self._round)
        capital = self._capital.mean(axis=-1)
        evidence = capital.sum(axis=1) / max(1, len(self.configurations) - 1)
        for i in sorted(racing, key=lambda i: -evidence[i]):
            if len(self.racing) == 1 or evidence[i] * self.error_rate < len(self.racing):
                break
            p = len(self.racing) / evidence[i]
            self._stop(i, int(capital[i].argmax()), p)

    def _gain(self, scores: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return how far the score in the column is above that in the row, from -1 to 1."""
        if self.bounds is None:
            higher = (scores > scores[:, None]).astype(np.float64)
            return higher - higher.T
        low, high = self.bounds
        shares = (scores - low) / (high - low)
        return shares - shares[:, None]

    def _stop(self, i: int, against: int, p: float) -> None:
        self.racing.remove(self.configurations[i])
        unit = self.bounds[1] - self.bounds[0] if self.bounds else 1.0
        self.out[self.configurations[i]] = Stopped(
            against=self.configurations[against],
            seeds=self._decided,
            difference=float(self._gains[i, against] / self._met[i, against] * unit),
            p=max([float(p), *(stop.p for stop in self.out.values())]),
        )
