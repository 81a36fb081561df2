"""POPGym's games of recall with cards, B at once: equal to popgym's own step for step.

RepeatFirst, RepeatPrevious, Autoencode, CountRecall and HigherLower: what is shown, what should be
answered and when the game ends follow from the shuffled cards alone, so a whole episode is laid
out at its reset and a step only compares answers.

Source: Morad et al., "POPGym", ICLR 2023, and its code (popgym 1.0.7).
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import ClassVar, NamedTuple

import numpy as np
from gymnasium.utils.seeding import np_random
from numpy.typing import NDArray

from sgrl.envs.vector import Observations, StepResult, VectorEnv
from sgrl.envs.wrappers import seed_of_32_bits

Codes = NDArray[np.intp]

DECK = 52
SUITS, RANKS = 4, 13
#: Kinds by which CountRecall tells cards apart: how many there are, and a card's by its number.
KINDS: dict[str, tuple[int, Callable[[Codes], Codes]]] = {
    "colors": (2, lambda cards: cards % 2),
    "suits": (SUITS, lambda cards: cards % SUITS),
    "ranks": (RANKS, lambda cards: cards % DECK // SUITS),
}
NO_QUESTION = -1


class Game(NamedTuple):
    """B episodes laid out. L is the length of a game, popgym's own.

    Attributes:
        shown: one or two parts of an observation, each [B, L + 1].
        answers: the right action at each step, `NO_QUESTION` where none is asked, [B, L].
    """

    shown: tuple[Codes, ...]
    answers: Codes


class VectorCards(VectorEnv):
    """B games stepped together; subclasses lay them out.

    Args:
        num_envs: B.
        episode_length: T; an episode is truncated after so many steps, and says so at its end too.
        previous_action: whether the previous action, one-hot, ends an observation.
        num_decks: decks of 52 cards in the game.
    """

    has_success = False
    seed_spacing = 2**32
    #: How many times the cards are shuffled for one game.
    shuffles: ClassVar[int] = 1
    #: Number of codes of each part of an observation.
    sizes: tuple[int, ...]
    #: A right answer is worth so much, a wrong one its negative.
    reward: float

    def __init__(
        self, num_envs: int, episode_length: int, previous_action: bool, num_decks: int
    ) -> None:
        self.num_envs = num_envs
        self.episode_length = episode_length
        self.num_cards = DECK * num_decks
        self.observation_size = sum(self.sizes) + (self.num_actions if previous_action else 0)
        self._previous_action = previous_action

    @abstractmethod
    def _lay_out(self, *cards: Codes) -> Game:
        """The games of these cards, in the order they are dealt, [B, num_cards] each shuffle."""

    def reset(self, seeds: Sequence[int]) -> Observations:
        self._check_seeds(seeds)
        cards = np.empty((self.shuffles, self.num_envs, self.num_cards), np.intp)
        cards[:] = np.arange(self.num_cards)
        for e, seed in enumerate(seeds):
            generator = np_random(seed_of_32_bits(int(seed)))[0]
            for deck in cards[:, e]:
                generator.shuffle(deck)
        # popgym deals from the end.
        game = self._lay_out(*cards[:, :, ::-1])
        parts = (
            np.eye(size, dtype=np.float32)[codes.T]
            for size, codes in zip(self.sizes, game.shown, strict=True)
        )
        self._shown = np.concatenate([*parts], axis=2)  # time first
        self._answers = game.answers.T
        self._steps = 0
        # popgym's PreviousAction shows action 0 before the first step.
        self._current = self._observe(np.zeros(self.num_envs, np.int64))
        return self._current.copy()

    def _observe(self, actions: NDArray[np.int64]) -> Observations:
        shown = self._shown[self._steps]
        if not self._previous_action:
            return shown
        return np.concatenate([shown, np.eye(self.num_actions, dtype=np.float32)[actions]], axis=1)

    def step(self, actions: NDArray[np.int64]) -> StepResult:
        rewards = np.zeros(self.num_envs, np.float32)
        length = len(self._answers)
        finished = self._steps == min(length, self.episode_length)
        if not finished:
            answers = self._answers[self._steps]
            asked = answers != NO_QUESTION
            rewards[asked] = np.where(actions == answers, self.reward, -self.reward)[asked]
            self._steps += 1
            self._current = self._observe(actions)
        terminated = np.full(self.num_envs, not finished and self._steps == length)
        truncated = np.full(self.num_envs, not finished and self._steps == self.episode_length)
        return StepResult(self._current.copy(), rewards, terminated, truncated, None)


class VectorRepeatFirst(VectorCards):
    """Name the suit of the first card at every step."""

    num_actions = SUITS
    sizes = (SUITS,)

    def _lay_out(self, *cards: Codes) -> Game:
        suits = cards[0] % SUITS
        self.reward = 1 / (self.num_cards - 1)
        return Game((suits,), np.repeat(suits[:, :1], self.num_cards - 1, axis=1))


class VectorRepeatPrevious(VectorCards):
    """Name the suit of the card shown k - 1 steps ago.

    Args:
        k: how far back; nothing is asked before there is such a card.
    """

    num_actions = SUITS
    sizes = (SUITS,)

    def __init__(
        self, num_envs: int, episode_length: int, previous_action: bool, num_decks: int, k: int
    ) -> None:
        super().__init__(num_envs, episode_length, previous_action, num_decks)
        self.k = k

    def _lay_out(self, *cards: Codes) -> Game:
        suits = cards[0] % SUITS
        self.reward = 1 / (self.num_cards - self.k)
        answers = np.full((self.num_envs, self.num_cards - 1), NO_QUESTION)
        answers[:, self.k - 1 :] = suits[:, : -self.k]
        return Game((suits,), answers)


class VectorAutoencode(VectorCards):
    """Watch all cards, then name their suits in reverse order."""

    num_actions = SUITS
    sizes = (2, SUITS)

    def _lay_out(self, *cards: Codes) -> Game:
        suits = cards[0] % SUITS
        self.reward = 1 / self.num_cards
        watched = self.num_cards - 1
        # Mode 0 is to recite, which the last card shown says already; then suit 0 is shown.
        modes = np.zeros((self.num_envs, 2 * self.num_cards), np.intp)
        modes[:, :watched] = 1
        shown = np.zeros_like(modes)
        shown[:, : self.num_cards] = suits
        answers = np.full((self.num_envs, 2 * self.num_cards - 1), NO_QUESTION)
        answers[:, watched:] = suits[:, ::-1]
        return Game((modes, shown), answers)


class VectorCountRecall(VectorCards):
    """Say how many cards of the kind asked for were shown so far.

    Args:
        kind: a key of `KINDS`.
    """

    shuffles = 2

    def __init__(
        self, num_envs: int, episode_length: int, previous_action: bool, num_decks: int, kind: str
    ) -> None:
        self.num_kinds, self._kind_of = KINDS[kind]
        self.sizes = (self.num_kinds, self.num_kinds)
        self.num_actions = DECK * num_decks // self.num_kinds + 1
        super().__init__(num_envs, episode_length, previous_action, num_decks)

    def _lay_out(self, *cards: Codes) -> Game:
        shown, asked = map(self._kind_of, cards)
        self.reward = 1 / (self.num_cards - 1)
        counts = np.eye(self.num_kinds, dtype=np.intp)[shown].cumsum(axis=1)
        answers = np.take_along_axis(counts, asked[:, :, None], axis=2)[:, :-1, 0]
        return Game((shown, asked), answers)


class VectorHigherLower(VectorCards):
    """Guess whether the next card's rank is higher (0) or lower (1); equal ranks count nothing."""

    num_actions = 2
    sizes = (RANKS,)

    def _lay_out(self, *cards: Codes) -> Game:
        ranks = KINDS["ranks"][1](cards[0])
        self.reward = 1 / self.num_cards
        now, following = ranks[:, :-1], ranks[:, 1:]
        answers = np.where(following > now, 0, np.where(following < now, 1, NO_QUESTION))
        return Game((ranks,), answers)


#: Vectorised games by popgym's id: call one with num_envs, episode_length and previous_action.
GAMES: dict[str, Callable[..., VectorCards]] = {
    "popgym-RepeatFirstEasy-v0": partial(VectorRepeatFirst, num_decks=1),
    "popgym-RepeatFirstMedium-v0": partial(VectorRepeatFirst, num_decks=8),
    "popgym-RepeatFirstHard-v0": partial(VectorRepeatFirst, num_decks=16),
    "popgym-RepeatPreviousEasy-v0": partial(VectorRepeatPrevious, num_decks=1, k=4),
    "popgym-RepeatPreviousMedium-v0": partial(VectorRepeatPrevious, num_decks=2, k=32),
    "popgym-RepeatPreviousHard-v0": partial(VectorRepeatPrevious, num_decks=3, k=64),
    "popgym-AutoencodeEasy-v0": partial(VectorAutoencode, num_decks=1),
    "popgym-AutoencodeMedium-v0": partial(VectorAutoencode, num_decks=2),
    "popgym-AutoencodeHard-v0": partial(VectorAutoencode, num_decks=3),
    "popgym-CountRecallEasy-v0": partial(VectorCountRecall, num_decks=1, kind="colors"),
    "popgym-CountRecallMedium-v0": partial(VectorCountRecall, num_decks=2, kind="suits"),
    "popgym-CountRecallHard-v0": partial(VectorCountRecall, num_decks=4, kind="ranks"),
    "popgym-HigherLowerEasy-v0": partial(VectorHigherLower, num_decks=1),
    "popgym-HigherLowerMedium-v0": partial(VectorHigherLower, num_decks=2),
    "popgym-HigherLowerHard-v0": partial(VectorHigherLower, num_decks=3),
}
