"""Iterations of several updates: where each ends, and the row of metrics that it leaves."""

import itertools
import math
from collections.abc import Sequence

from sgrl.reinforce.batch import StepCounts


def last_update(done: int, total_updates: int | None, total_iterations: int | None) -> int:
    """How many updates there will have been when the iteration ends that goes on after `done`.

    Args:
        done: updates so far.
        total_updates: of a whole run, spread over `total_iterations`; None: one an iteration.
        total_iterations: of the run.
    """
    if total_updates is None or total_iterations is None:
        return done + 1
    spacing = (total_updates - 1) / (total_iterations - 1)
    ends = (int(1 + i * spacing) for i in itertools.count())
    return next(end for end in ends if end > done)


def mean_row(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """Means over an iteration's updates; counts and mixing weights are the last ones."""
    counts = vars(StepCounts())
    row = dict(rows[-1])
    for name in row if len(rows) > 1 else ():
        if name not in counts and "mixing_weight" not in name:
            row[name] = math.fsum(other[name] for other in rows) / len(rows)
    return row
