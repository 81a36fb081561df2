"""Code of the user's own that follows the trials of a sweep, an experiment's key `callbacks`.

    class Printing(TrialCallbacks):
        def on_iteration(self, trial, row):
            print(trial.name, row["iteration"], row["episode_return_mean"])

Numbers do not depend on it: it is given copies, and random generators of its own. What it raises
is noted in the trial's status.json, and the trial goes on.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sgrl.reinforce.generators import generators_aside
from sgrl.results.plan import Trial
from sgrl.user_code import FAILURES, UserCodeError, described, module_of, named_class


class TrialCallbacks:
    """To be derived from; each trial has an instance of its own, made whenever it starts.

    Attributes:
        folder: the trial's, on the machine that it runs on.
    """

    folder: Path

    def on_iteration(self, trial: Trial, row: Mapping[str, float]) -> None:
        """Follow an iteration; called again for those that a restarted trial repeats.

        Args:
            trial: its name, settings and seed.
            row: the iteration's, as in metrics.csv.
        """

    def on_checkpoint(self, trial: Trial, checkpoint: Path) -> None:
        """Follow a checkpoint that was written.

        Args:
            trial: its name, settings and seed.
            checkpoint: the folder, as `sgrl.load_policy` takes it.
        """

    def on_trial_end(self, trial: Trial, state: str) -> None:
        """Follow the end of a trial.

        Args:
            trial: its name, settings and seed.
            state: completed, failed, or stopped early.
        """


def callbacks_class(name: Any) -> type[TrialCallbacks]:
    """Return the class that a user named, as in my_package:MyCallbacks.

    Raises:
        UserCodeError: there is none that is derived from `TrialCallbacks`.
    """
    if not module_of(name):
        raise UserCodeError(f"expected module:Class, as in my_package:MyCallbacks, got {name!r}")
    return named_class(name, TrialCallbacks)


class Following:
    """The callbacks of one trial; nothing where it has none.

    Args:
        trial: the trial.
        folder: its own.
        notes: where lines go about what they raise, each once.
    """

    def __init__(self, trial: Trial, folder: Path, notes: list[str]) -> None:
        self.trial, self.folder, self.notes = trial, folder, notes
        self.callbacks: TrialCallbacks | None = None
        if trial.config.callbacks is not None:
            self._try("__init__", 0, self._make)

    def _make(self) -> None:
        made = callbacks_class(self.trial.config.callbacks)()
        made.folder = self.folder
        self.callbacks = made

    def call(self, name: str, iteration: int, *arguments: Any) -> None:
        """Call one of the methods of `TrialCallbacks`.

        Args:
            name: the method's.
            iteration: after which one.
            *arguments: those behind the trial.
        """
        if self.callbacks is not None:
            method = getattr(self.callbacks, name)
            self._try(name, iteration, lambda: method(self.trial, *arguments))

    def _try(self, name: str, iteration: int, function: Any) -> None:
        try:
            with generators_aside([self.trial.seed, iteration]):
                function()
        except FAILURES as error:
            said = f"{name} of {self.trial.config.callbacks} failed: {described(error)}"
            if said not in self.notes:
                self.notes.append(said)
