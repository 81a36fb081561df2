"""sgrl on RLlib: the algorithm `Reinforce`, and the policies for any other algorithm.

Importing this registers, for RLlib scripts, the environments of `sgrl.envs.registry` by name, and
the old API stack's models `sgrl_gru`, `sgrl_lstm` and `sgrl_sparsenet`. An environment of gymnasium
or POPGym gets our wrappers by `register_environment(id)`.
"""

from functools import partial

from ray.rllib.models import ModelCatalog
from ray.tune import register_env

from sgrl.envs.registry import ENVIRONMENTS, make_single
from sgrl.rllib.algorithm import Reinforce, ReinforceConfig
from sgrl.rllib.module import PolicyModule
from sgrl.rllib.recurrent_network import GRUNetwork, LSTMNetwork, SparseNetwork

__all__ = [
    "GRUNetwork",
    "LSTMNetwork",
    "PolicyModule",
    "Reinforce",
    "ReinforceConfig",
    "SparseNetwork",
    "register_environment",
]


def register_environment(env: str) -> None:
    """Let RLlib build the environment of that name, or id, by `make_single`."""
    register_env(env, partial(make_single, env))


for _name in ENVIRONMENTS:
    register_environment(_name)
for _model in (GRUNetwork, LSTMNetwork, SparseNetwork):
    ModelCatalog.register_custom_model(f"sgrl_{_model.policy_name}", _model)
