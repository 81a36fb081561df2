"""What a sweep hands to Tune, without any Ray."""

import os
import signal

import pytest
from ray.tune.search import Searcher

from sgrl.results.storage import Store
from sgrl.tuning import feed
from sgrl.tuning.feed import Feed
from sgrl.tuning.progress import SweepMonitor


@pytest.fixture
def packs_of_fit(monkeypatch):
    monkeypatch.setattr(feed, "FIT_PACKS", 3)
    monkeypatch.setattr(feed, "FIT_PACKS_EACH", 1)


def feed_of(*rounds):
    """What hands out the numbers of these rounds, at most two at a time."""
    left = [list(numbers) for numbers in rounds]
    return Feed(left.pop(0), lambda: left.pop(0) if left else [], lambda pack: pack, limit=2)


def run_fit(fed):
    """What a fit is given, where the older of two trials ends first."""
    given, running = [], []
    while True:
        got = fed.suggest(str(len(given)))
        if got == Searcher.FINISHED:
            return given
        if got is None:
            fed.on_trial_complete(running.pop(0))
        else:
            running.append(str(len(given)))
            given.append(got)


def test_a_fit_gets_a_part_of_a_sweep(packs_of_fit):
    fed, fits = feed_of([1, 2, 3, 4], [5, 6], [7]), []
    while fed.begin_fit():
        fits.append(run_fit(fed))
    assert fits == [[1, 2, 3], [4, 5, 6], [7]]


def test_a_fit_gets_more_where_more_run_at_a_time(packs_of_fit, monkeypatch):
    monkeypatch.setattr(feed, "FIT_PACKS_EACH", 3)
    fed = feed_of(range(8))
    assert fed.begin_fit()
    assert run_fit(fed) == list(range(6))


def test_no_fit_follows_one_that_was_cut_short(packs_of_fit):
    fed = feed_of([1, 2, 3, 4])
    assert fed.begin_fit()
    assert not fed.begin_fit()
    fed = feed_of([1, 2, 3, 4])
    assert fed.begin_fit()
    assert fed.suggest("a") == 1
    assert not fed.begin_fit()


def test_no_fit_follows_an_error(packs_of_fit):
    error = ValueError("no more")

    def fail():
        raise error

    fed = Feed([1, 2, 3], fail, lambda pack: pack, limit=2)
    assert fed.begin_fit()
    assert run_fit(fed) == [1, 2, 3]
    assert not fed.begin_fit()
    assert fed.error is error


def test_ctrl_c_is_noted_and_handed_on(tmp_path):
    """No fit is to follow, also where Tune has nothing left to stop."""
    monitor, handed_on = SweepMonitor(Store(tmp_path), {}, None), []
    before = signal.signal(signal.SIGINT, lambda *_: handed_on.append(True))
    try:
        monitor.setup()
        assert not monitor.interrupted
        os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    assert monitor.interrupted
    assert handed_on == [True]
