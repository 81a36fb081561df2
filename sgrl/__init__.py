"""sgrl: sparse networks trained with synthetic-gradient propagation, on RLlib and Ray Tune.

`sgrl.load_policy(checkpoint)` needs neither Ray nor pickle; everything else is imported from
the room it lives in (`sgrl.nn`, `sgrl.envs`, `sgrl.reinforce`, `sgrl.rllib`, `sgrl.tuning`).
"""

from sgrl.nn.policies import load_policy

__all__ = ["load_policy"]
__version__ = "0.1.0"
