"""What Tune starts next: the legs of a sweep's rounds, by Tune's own interface for searchers."""

from collections.abc import Callable
from typing import Any

from ray.tune.search import Searcher

from sgrl.tuning.rounds import Leg

#: Packs that one fit of Tune's takes, or so many for each that runs at a time, if that is more.
FIT_PACKS = 500
FIT_PACKS_EACH = 20


class Feed(Searcher):
    """Hands legs to Tune, round by round, those together that one process runs.

    Tune keeps all that it was ever given, 50 kB a trial, until a fit ends. So a fit gets a part of
    the sweep alone, and is followed by another (see `begin_fit`).

    Args:
        packs: the legs of the first round.
        next_packs: returns those of the next round once all before have ended; none at the end.
            May raise, which ends the sweep: see `error`.
        settings: of Tune's trial that runs a pack of legs.
        limit: how many run at a time; as many as fit if None.

    Attributes:
        error: what `next_packs` raised.
        fit_is_over: whether Tune has been told that the fit is over.
    """

    def __init__(
        self,
        packs: list[list[Leg]],
        next_packs: Callable[[], list[list[Leg]]],
        settings: Callable[[list[Leg]], dict[str, Any]],
        limit: int | None,
    ) -> None:
        super().__init__()
        self.next_packs, self.settings, self.limit = next_packs, settings, limit
        self.waiting = list(packs)
        self.running: set[str] = set()
        self.error: Exception | None = None
        self.fit_is_over, self.has_more = True, True
        self.handed = self.most_running = 0

    def begin_fit(self) -> bool:
        """Prepare for the next fit.

        Returns:
            Whether there is one: not where nothing waits, nor after a fit that was cut short.
        """
        if not self.fit_is_over or self.running:
            return False
        self._refill()
        self.fit_is_over, self.handed = False, 0
        return bool(self.waiting)

    def suggest(self, trial_id: str) -> Any:
        """Return the settings of Tune's next trial, None to wait, or that the fit is over."""
        enough = self.handed >= max(FIT_PACKS, FIT_PACKS_EACH * self.most_running)
        if not enough:
            self._refill()
        if enough or not self.waiting:
            self.fit_is_over = not self.running
            return None if self.running else Searcher.FINISHED
        if self.limit is not None and len(self.running) >= self.limit:
            return None
        self.running.add(trial_id)
        self.handed += 1
        self.most_running = max(self.most_running, len(self.running))
        return self.settings(self.waiting.pop(0))

    def _refill(self) -> None:
        """Go on to the next round where all legs of the one before are over."""
        if not self.waiting and not self.running and self.has_more:
            try:
                self.waiting = self.next_packs()
            except Exception as error:
                self.error = error
            self.has_more = bool(self.waiting)

    def on_trial_complete(
        self, trial_id: str, result: dict | None = None, error: bool = False
    ) -> None:
        """Take note that a leg has ended, well or not."""
        self.running.discard(trial_id)

    def save(self, checkpoint_path: str) -> None:
        """Write nothing that is read: all state is in the trials' folders."""
        with open(checkpoint_path, "w"):  # noqa: PTH123
            pass

    def __reduce__(self) -> tuple:
        # Tune pickles it into files that nothing reads.
        return Searcher, ()
