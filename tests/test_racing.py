"""Races by hand, by all their outcomes, and a thousand simulated ones a case."""

import itertools
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from sgrl.errors import UserError
from sgrl.tuning.racing import Race, Stopped

TUNE = Path(__file__).parent.parent / "docs" / "tune.md"
RACES = 1000
#: By method and seed.
Scores = NDArray[np.float64]
Draw = Callable[[np.random.Generator, int], Scores]


def run_race(race: Race, scores: Scores) -> int:
    """Run a race to its end with methods named by their number, and return its number of runs."""
    runs = 0
    while asked := race.next_runs():
        for name, seed in asked:
            race.add(name, seed, scores[int(name), seed])
        runs += len(asked)
    return runs


def names(count: int) -> list[str]:
    return [str(i) for i in range(count)]


# By hand ----------------------------------------------------------------------------------------


def test_a_stop_by_hand() -> None:
    """Half a point better on every seed: half the capital grows by 1.25 a seed, half by 1.5."""
    race = Race(["bad", "good"], range(20), first=1)
    seeds = 0
    while race.next_runs() == [("bad", seeds), ("good", seeds)]:
        race.add("good", seeds, 0.75)
        assert race.next_runs() == [("bad", seeds)]
        race.add("bad", seeds, 0.25)
        seeds += 1
        evidence = (1.25**seeds + 1.5**seeds) / 2
        assert race.over == (evidence >= 2 / 0.05)
    assert (seeds, race.racing) == (11, ["good"])
    assert race.out == {"bad": Stopped("good", 11, 0.5, pytest.approx(2 / evidence))}
    assert race.next_runs() == []


def test_two_drop_out_in_one_round() -> None:
    """The second one's limit is that of two in the race, no longer of three."""
    lost_by = {"0": {"1": 0.7, "2": -0.3}, "2": {"1": 1.0, "0": 0.3}}
    evidence = {
        name: np.mean([(1 + stake * lost) ** 8 for lost in by.values() for stake in (0.5, 1)])
        for name, by in lost_by.items()
    }
    first, second = 3 / evidence["2"], 2 / evidence["0"]
    for error_rate, left in (
        (first - 1e-9, ["0", "1", "2"]),
        (first + 1e-9, ["0", "1"]),
        (second - 1e-9, ["0", "1"]),
        (second + 1e-9, ["1"]),
    ):
        race = Race(names(3), range(8), error_rate, first=8)
        run_race(race, np.outer([0.3, 1, 0], np.ones(8)))
        assert race.racing == left
    assert list(race.out) == ["2", "0"]
    assert race.out["2"] == Stopped("1", 8, 1.0, pytest.approx(first))
    assert race.out["0"] == Stopped("1", 8, pytest.approx(0.7), pytest.approx(second))


@pytest.mark.parametrize(("count", "seeds"), [(2, 7), (4, 9), (25, 15)])
def test_the_seeds_it_takes_to_stop_all_but_one(count: int, seeds: int) -> None:
    race = Race(names(count), range(30))
    assert run_race(race, np.outer(np.arange(count) == 0, np.ones(30))) == count * seeds
    assert race.racing == ["0"]


def test_an_opponent_that_is_out_leaves_its_capital() -> None:
    """The worst drops out early; what it won and lost against the others stays in the mean."""
    race = Race(names(3), range(40), first=1)
    run_race(race, np.outer([0.9, 0.7, 0.0], np.ones(40)))
    assert list(race.out) == ["2", "1"]
    early, late = race.out["2"].seeds, race.out["1"].seeds
    assert early < late < 40
    against_best = (1.1**late + 1.2**late) / 2
    against_worst = (0.65**early + 0.3**early) / 2
    expected = Stopped(
        "0", late, pytest.approx(0.2), pytest.approx(4 / (against_best + against_worst))
    )
    assert race.out["1"] == expected


def test_rounds() -> None:
    race = Race(["a", "b"], [7, 3, 5, 9, 1, 2], first=3, every=2)
    rounds = []
    while asked := race.next_runs():
        rounds.append(asked)
        assert not race.over
        for name, seed in asked:
            race.add(name, seed, 0.5)
    assert [[seed for name, seed in asked if name == "a"] for asked in rounds] == [
        [7, 3, 5],
        [9, 1],
        [2],
    ]
    assert (race.over, race.racing, race.out) == (True, ["a", "b"], {})
    assert Race(["alone"], [0]).over


def test_failed_runs_score_the_lowest() -> None:
    rng = np.random.default_rng(0)
    for bounds, lowest in (((-2.0, 2.0), -2.0), (None, -1e9)):
        scores = rng.uniform([[-2], [1]], [[-1], [2]], size=(2, 40))
        failed = rng.random(scores.shape) < 0.2
        races = []
        for fill in (math.nan, lowest):
            races.append(Race(names(2), range(40), bounds=bounds))
            run_race(races[-1], np.where(failed, fill, scores))
        assert races[0].out == races[1].out != {}
    race = Race(["a"], [0], bounds=(2, 3))
    race.add("a", 0, None)
    race.add("a", 0, 2)


def test_without_bounds_only_the_order_counts() -> None:
    rng = np.random.default_rng(1)
    scores = rng.standard_cauchy((4, 60)) + np.array([[0], [3], [1], [3]])
    races = [Race(names(4), range(60), bounds=None) for _ in range(2)]
    run_race(races[0], scores)
    run_race(races[1], np.arctan(scores) * 1e-3)
    assert races[0].out == races[1].out != {}
    # Won on each of seven seeds, by whatever margin.
    race = Race(names(2), range(60), bounds=None, first=1)
    run_race(race, np.stack([np.full(60, 1e-9), np.zeros(60)]))
    assert race.out == {"1": Stopped("0", 7, 1.0, pytest.approx(2 / ((2**7 + 1.5**7) / 2)))}


def test_bounds_are_a_scale() -> None:
    scores = np.random.default_rng(2).beta([[4], [1], [2]], [[1], [2], [2]], size=(3, 30))
    plain, scaled = Race(names(3), range(30)), Race(names(3), range(30), bounds=(-50, 50))
    assert run_race(plain, scores) == run_race(scaled, 100 * scores - 50)
    assert len(plain.out) == 2
    for name, stop in plain.out.items():
        other = scaled.out[name]
        assert (other.against, other.seeds) == (stop.against, stop.seeds)
        assert other.difference == pytest.approx(100 * stop.difference)
        assert other.p == pytest.approx(stop.p)


def test_neither_the_order_nor_other_runs_matter() -> None:
    """A new race is given the rows of another, shuffled, and rows of runs not asked for."""
    rng = np.random.default_rng(3)
    scores = rng.beta([[8], [1], [2], [8]], 1.5, size=(4, 30))
    scores[0, :2] = np.nan
    one = Race(names(4), range(30), first=3, every=2)
    rows: list[tuple[str, int, float]] = []
    drops = 0
    while asked := one.next_runs():
        for name, seed in asked:
            rows.append((name, seed, scores[int(name), seed]))
            one.add(*rows[-1])
        if len(one.out) > drops or one.over:
            drops = len(one.out)
            early = [("3", 29, scores[3, 29]), *((name, 29, 1.0) for name in one.out)]
            again = Race(names(4), range(30), first=3, every=2)
            for index in rng.permutation(len(rows) + len(early)):
                again.add(*[*rows, *early][index])
            assert (again.out, again.racing, again.over) == (one.out, one.racing, one.over)
            assert set(again.next_runs()) == set(one.next_runs()) - {("3", 29)}
    assert drops >= 2


def test_a_round_half_run_is_asked_for_again() -> None:
    race = Race(["a", "b"], range(9), first=2)
    race.add("b", 0, 1)
    race.add("a", 1, 1)
    assert race.next_runs() == [("a", 0), ("b", 1)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"configurations": []}, "configurations of a race: give at least one, and none twice"),
        ({"seeds": [1, 1]}, "seeds of a race: give at least one, and none twice"),
        ({"error_rate": 5}, "error_rate 5 is not between 0 and 1"),
        ({"every": 0}, "a round has at least one seed (first: 5, every: 0)"),
        ({"bounds": (1, 0)}, "bounds (1, 0) are not two finite numbers, the lower one first"),
        ({"bounds": (0, math.inf)}, "bounds (0, inf) are not two finite numbers"),
    ],
)
def test_mistakes_in_a_race(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        Race(**{"configurations": ["a", "b"], "seeds": range(3)} | arguments)


def test_mistakes_in_scores() -> None:
    race = Race(["a", "b"], range(3))
    race.add("a", 1, 0.5)
    race.add("a", 1, 0.5)
    for row, message in (
        (("c", 1, 0.5), "c, seed 1: not in the race"),
        (("a", 3, 0.5), "a, seed 3: not in the race"),
        (("a", 0, 1.5), "a, seed 0: the score 1.5 is not within bounds (0.0, 1.0)"),
        (("a", 1, 0.6), "a, seed 1: has the score 0.5, not 0.6"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            race.add(*row)


# How often the best is stopped ------------------------------------------------------------------


@pytest.mark.parametrize("error_rate", [0.05, 0.5])
@pytest.mark.parametrize(("up", "down"), [(1, 1), (0.5, 1), (1, 0.25)])
def test_the_bound_on_all_outcomes(up: float, down: float, error_rate: float) -> None:
    """Two methods of the same mean, all sequences of ten seeds, each with its probability.

    On a seed the second one is `up` better or `down` worse, with the odds that make up for it.
    """
    chance = down / (up + down)
    wrong = 0.0
    for wins in itertools.product([False, True], repeat=10):
        first = np.where(wins, 0, down)
        second = np.where(wins, up, 0)
        race = Race(names(2), range(10), error_rate, first=1)
        run_race(race, np.stack([first, second]))
        if race.out:
            wrong += math.prod(chance if win else 1 - chance for win in wins)
    assert 0 < wrong <= error_rate


def independent(means: list[float], concentration: float) -> Draw:
    """Beta scores: those of a concentration below one lie near 0 and 1."""
    a = np.array(means)[:, None] * concentration
    return lambda rng, seeds: rng.beta(a, concentration - a, size=(len(means), seeds))


def rarely_better(chance: float) -> Draw:
    """The same mean, but one method gains it with few seeds: any test of means finds it hard."""

    def draw(rng: np.random.Generator, seeds: int) -> Scores:
        return np.stack([1.0 * (rng.random(seeds) < chance), np.full(seeds, chance)])

    return draw


EQUAL = [0.5] * 4
#: How scores are drawn, the number of best methods (the first ones), and the race's arguments.
CASES: dict[str, tuple[Draw, int, dict[str, Any]]] = {
    "equal, near 0 and 1": (independent(EQUAL, 0.4), 4, {}),
    "two equal, near 0 and 1": (independent([0.5, 0.5], 0.1), 2, {}),
    "two best, others far": (independent([0.8, 0.8, 0.3, 0.2], 0.4), 2, {}),
    "best by 0.01": (independent([0.5, 0.49, 0.49, 0.49], 0.4), 1, {}),
    "best by 0.2": (independent([0.9, 0.7, 0.7, 0.7], 0.4), 1, {}),
    "rarely better": (rarely_better(0.3), 2, {}),
    "equal, order": (lambda rng, seeds: rng.standard_cauchy((4, seeds)), 4, {"bounds": None}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_best_are_stopped_in_at_most_the_stated_share(case: str) -> None:
    draw, best, arguments = CASES[case]
    rng = np.random.default_rng(list(case.encode()))
    wrong = 0
    for _ in range(RACES):
        scores = draw(rng, 30)
        race = Race(names(len(scores)), range(30), **arguments)
        run_race(race, scores)
        wrong += bool(race.out.keys() & names(best))
    assert wrong <= 0.05 * RACES
    # The test is on the safe side of its bound, and docs/tune.md says by how much.
    assert wrong <= 30


# How many runs it saves -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("means", "saved", "seeds"),
    [
        ([0.9, 0.3], 0.67, 10),
        ([0.9, 0.6], 0.38, 18),
        ([0.9, 0.3, 0.3, 0.3], 0.55, 13),
        # The worse one's runs are a third of the grid, and two equals go on to its end.
        ([0.9, 0.9, 0.3], 0.21, 11),
    ],
)
def test_fewer_runs_than_the_grid(means: list[float], saved: float, seeds: int) -> None:
    draw, rng = independent(means, 4), np.random.default_rng(4)
    runs, worse = 0, []
    for _ in range(RACES):
        race = Race(names(len(means)), range(30))
        runs += run_race(race, draw(rng, 30))
        worse += [stop.seeds for stop in race.out.values()]
    assert 1 - runs / (RACES * len(means) * 30) == pytest.approx(saved, abs=0.01)
    assert np.median(worse) == seeds


def test_the_example_of_the_docs(capsys: pytest.CaptureFixture[str]) -> None:
    *_, code = re.findall(r"```python\n(.*?)```", TUNE.read_text(), flags=re.DOTALL)
    scores = {"lr=0.0001": 0.2, "lr=0.001": 0.9, "lr=0.01": None}
    exec(compile(code, "docs/tune.md", "exec"), {"train": lambda name, seed: scores[name]})
    assert capsys.readouterr().out.splitlines() == [
        "['lr=0.001']",
        "lr=0.01: worse than lr=0.001 by 0.90, 9 seeds, p = 0.033",
        "lr=0.0001: worse than lr=0.001 by 0.70, 10 seeds, p = 0.036",
    ]


def test_what_it_imports() -> None:
    code = "import sys, sgrl.tuning.racing; print({'ray', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
