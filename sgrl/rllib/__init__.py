"""sgrl on RLlib: the algorithm `Reinforce`, and the policies for RLlib's own algorithms.

Importing this registers, for RLlib scripts, the environments of `sgrl.envs.registry` by name, and
the old API stack's models `sgrl_gru`, `sgrl_lstm` and `sgrl_sparsenet`.
"""

from functools import partial

from ray.rllib.models import ModelCatalog
from ray.tune import register_env

from sgrl.envs.registry import ENVIRONMENTS, make_single
from sgrl.rllib.algorithm import Reinforce, ReinforceConfig
from sgrl.rllib.module import PolicyModule
from sgrl.rllib.recurrent_network import GRUNetwork, LSTMNetwork, SparseNetwork
from sgrl.rllib.stock import APPOConfig, IMPALAConfig, PPOConfig

__all__ = [
    "APPOConfig",
    "GRUNetwork",
    "IMPALAConfig",
    "LSTMNetwork",
    "PPOConfig",
    "PolicyModule",
    "Reinforce",
    "ReinforceConfig",
    "SparseNetwork",
]

for _name in ENVIRONMENTS:
    register_env(_name, partial(make_single, _name))
for _model in (GRUNetwork, LSTMNetwork, SparseNetwork):
    ModelCatalog.register_custom_model(f"sgrl_{_model.policy_name}", _model)
