"""sgrl: sparse networks trained with synthetic-gradient propagation, on RLlib and Ray Tune.

`sgrl.load_policy(checkpoint)` needs neither Ray nor pickle; everything else is imported from
the room it lives in (`sgrl.nn`, `sgrl.envs`, `sgrl.reinforce`, `sgrl.rllib`, `sgrl.results`,
`sgrl.tuning`).
"""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sgrl.nn.policy import Policy

__all__ = ["load_policy"]
__version__ = "0.2.0"


def load_policy(path: str | Path) -> "Policy":
    """Load the policy of a checkpoint; see `sgrl.nn.registry.load_policy`.

    Args:
        path: its folder, or a name of the zoo such as `zoo:labyrinth_escape/sparsenet_sgprop`.
    """
    # Imported here so that `import sgrl`, and with it `sgrl --help`, does not wait for torch.
    from sgrl.nn import registry
    from sgrl.results.zoo import find_policy

    return registry.load_policy(find_policy(path))
