"""sgrl on RLlib: the algorithm `Reinforce`, and the policies for RLlib's own algorithms.

Importing this registers by name, for Tune and for RLlib scripts: the algorithms `Reinforce`,
`sgrl_PPO`, `sgrl_APPO` and `sgrl_IMPALA` (RLlib keeps PPO, APPO and IMPALA for its own), the
environments of `sgrl.envs.registry`, and the old API stack's models `sgrl_gru`, `sgrl_lstm` and
`sgrl_sparsenet`. An environment of gymnasium or POPGym gets our wrappers by
`register_environment(id)`.
"""

from functools import partial

from ray.rllib.models import ModelCatalog
from ray.tune import register_env, register_trainable

from sgrl.envs.registry import ENVIRONMENTS, make_single
from sgrl.rllib.algorithm import Reinforce, ReinforceConfig
from sgrl.rllib.module import PolicyModule
from sgrl.rllib.recurrent_network import GRUNetwork, LSTMNetwork, SparseNetwork
from sgrl.rllib.stock import STOCK_ALGORITHMS, APPOConfig, IMPALAConfig, PPOConfig

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
    "register_environment",
]


def register_environment(env: str) -> None:
    """Let RLlib build the environment of that name, or id, by `make_single`."""
    register_env(env, partial(make_single, env))


for _name in ENVIRONMENTS:
    register_environment(_name)
for _model in (GRUNetwork, LSTMNetwork, SparseNetwork):
    ModelCatalog.register_custom_model(f"sgrl_{_model.policy_name}", _model)
register_trainable("Reinforce", Reinforce)
for _name, _algorithm in STOCK_ALGORITHMS.items():
    register_trainable(f"sgrl_{_name}", _algorithm)
