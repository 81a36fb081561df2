"""What Tune starts next: the legs of a sweep's rounds, by Tune's own interface for searchers."""

from collections.abc import Callable
from typing import Any

from ray.tune.search import Searcher

from sgrl.tuning.rounds import Leg


class Feed(Searcher):
    """Hands legs to Tune, round by round, those together that one process runs.

    Args:
        packs: the legs of the first round.
        next_packs: returns those of the next round once all before have ended; none at the end.
            May raise, which ends the sweep: see `error`.
        settings: of Tune's trial that runs a pack of legs.
        limit: how many run at a time; as many as fit if None.

    Attributes:
        error: what `next_packs` raised.
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

    def suggest(self, trial_id: str) -> Any:
        """Return the settings of Tune's next trial, None to wait, or that all is over."""
        if not self.waiting and not self.running and self.error is None:
            try:
                self.waiting = self.next_packs()
            except Exception as error:
                self.error = error
        if not self.waiting:
            return None if self.running else Searcher.FINISHED
        if self.limit is not None and len(self.running) >= self.limit:
            return None
        self.running.add(trial_id)
        return self.settings(self.waiting.pop(0))

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
