"""Trained policies by name: `zoo:labyrinth_escape/sparsenet_sgprop`.

They lie in the study's archives; `results/published/zoo.json` of a checkout says where each one is.
"""

import json
from pathlib import Path

from sgrl.errors import UserError
from sgrl.names import did_you_mean

PREFIX = "zoo:"
PUBLISHED = Path(__file__).parents[2] / "results" / "published"
INDEX_FILE = "zoo.json"


class ZooError(UserError):
    """There is no such policy; the message is one line that names those there are."""


def policy_names() -> list[str]:
    """Names of all policies, as `TASK/METHOD`; none where sgrl runs outside of a checkout."""
    return sorted(_index())


def find_policy(location: str | Path) -> Path:
    """The folder of a policy.

    Args:
        location: a name with `zoo:` before it; anything else is a folder already.

    Raises:
        ZooError: there is no policy of that name.
    """
    if not str(location).startswith(PREFIX):
        return Path(location)
    name, index = str(location).removeprefix(PREFIX), _index()
    if name in index:
        return PUBLISHED / index[name]
    if not index:
        raise ZooError(
            f"{location}: the zoo is not in what pip installs: it lies in results/published of a "
            "checkout of sgrl (git clone, then pip install -e .)"
        )
    raise ZooError(f"{location}: no such policy; {did_you_mean(name, sorted(index))}")


def _index() -> dict[str, str]:
    try:
        return json.loads((PUBLISHED / INDEX_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
