"""Independent pieces of work, spread over Ray tasks."""

import itertools
import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from sgrl.errors import UserError
from sgrl.local_ray import start_local_ray


class TheoryError(UserError):
    """Settings that make no sense; the message is one line."""


def check_at_least(**settings: tuple[int, int]) -> None:
    """Check settings, each given with the least that it may be.

    Raises:
        TheoryError: one is less.
    """
    for name, (value, least) in settings.items():
        if value < least:
            raise TheoryError(f"{name.replace('_', ' ')} must be at least {least}, got {value}")


def run_pieces(
    function: Callable[..., Any], pieces: Iterable[tuple], parallel: int
) -> Iterator[Any]:
    """Yield `function(*piece)` of every piece, in their order.

    With `parallel` of 2 or more, so many run at a time, each on one processor of the Ray instance
    of this process, of the cluster at RAY_ADDRESS, or of a Ray of its own.

    Raises:
        TheoryError: there is no Ray cluster at RAY_ADDRESS.
        LocalRayError: Ray cannot start here.
    """
    if parallel == 1:
        yield from itertools.starmap(function, pieces)
        return
    import ray

    started = not ray.is_initialized()
    if started:
        try:
            if os.environ.get("RAY_ADDRESS"):
                ray.init(log_to_driver=False, logging_level=logging.ERROR)
            else:
                start_local_ray(parallel)
        except (ConnectionError, ValueError) as error:
            raise TheoryError(f"Ray did not start: {str(error).splitlines()[0]}") from None
    try:
        task = ray.remote(num_cpus=1)(function)
        # Two for each that runs: the next one waits beside it, and no more than that is held.
        waiting: deque = deque()
        for piece in pieces:
            if len(waiting) == 2 * parallel:
                yield ray.get(waiting.popleft())
            waiting.append(task.remote(*piece))
        while waiting:
            yield ray.get(waiting.popleft())
    finally:
        if started:
            ray.shutdown()
