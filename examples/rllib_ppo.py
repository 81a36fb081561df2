"""Synthetic gradients under RLlib's own PPO (new API stack), in a module of your own.

`BlockModule` is an ordinary TorchRLModule: two shared hidden layers with a block after each, a
policy head and a value head. PPO is untouched: its loss.backward() mixes the predictions in, and
its optimizer trains the predictors together with everything else. With `--policy NAME` the same
script trains one of sgrl's policies instead, such as sparsenet or gru, through
`sgrl.rllib.PolicyModule`. Prints the mean return and the mean mixing weight.

    python examples/rllib_ppo.py
    python examples/rllib_ppo.py --policy sparsenet

Takes about half a minute on one core.
"""

import argparse
from collections.abc import Mapping
from typing import Any

import torch
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.apis.value_function_api import ValueFunctionAPI
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.core.rl_module.torch import TorchRLModule
from torch import Tensor, nn

from sgrl.nn import SyntheticGradient
from sgrl.rllib import PolicyModule


class BlockModule(TorchRLModule, ValueFunctionAPI):
    """Two hidden layers of `model_config["hidden_size"]` features, each followed by a block."""

    def setup(self) -> None:
        size = self.model_config["hidden_size"]
        self.body = nn.Sequential(
            nn.Linear(self.observation_space.shape[0], size),
            nn.Tanh(),
            SyntheticGradient(size),
            nn.Linear(size, size),
            nn.Tanh(),
            SyntheticGradient(size),
        )
        self.policy_head = nn.Linear(size, int(self.action_space.n))
        self.value_head = nn.Linear(size, 1)

    def _forward(self, batch: Mapping[str, Any], **kwargs: Any) -> dict[str, Any]:
        features = self.body(batch[Columns.OBS])
        # PPO hands the features back to `compute_values`: the body runs, and is mixed, once.
        return {
            Columns.ACTION_DIST_INPUTS: self.policy_head(features),
            Columns.EMBEDDINGS: features,
        }

    def compute_values(self, batch: Mapping[str, Any], embeddings: Tensor | None = None) -> Tensor:
        features = self.body(batch[Columns.OBS]) if embeddings is None else embeddings
        return self.value_head(features).squeeze(-1)


def main(arguments: list[str] | None = None) -> nn.Module:
    """Train; returns the trained module."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--iterations", type=int, default=10, help="of PPO")
    parser.add_argument("--batch", type=int, default=2000, help="environment steps an iteration")
    parser.add_argument("--policy", help="train this policy of sgrl instead of BlockModule")
    options = parser.parse_args(arguments)
    if options.policy is None:
        module_class, model_config = BlockModule, {"hidden_size": 64}
    else:
        module_class = PolicyModule
        model_config = {"policy": options.policy, "value_head": True, "max_seq_len": 20}

    algorithm = (
        PPOConfig()
        .environment("CartPole-v1")
        .env_runners(num_env_runners=0, num_envs_per_env_runner=8)
        .rl_module(
            rl_module_spec=RLModuleSpec(module_class=module_class), model_config=model_config
        )
        .training(
            lr=1e-3,
            train_batch_size=options.batch,
            minibatch_size=min(250, options.batch),
            num_epochs=4,
        )
        .debugging(seed=0, log_level="ERROR")
        .build_algo()
    )
    module = algorithm.get_module()
    for iteration in range(options.iterations):
        result = algorithm.train()
        weights = [b for name, b in module.named_buffers() if name.endswith("mixing_weight")]
        # NaN as long as no episode has ended.
        mean_return = result["env_runners"].get("episode_return_mean", float("nan"))
        line = f"iteration {iteration}: return {mean_return:.1f}"
        if weights:
            line += f", mean lambda {torch.cat(weights).mean().item():.3f}"
        print(line)
    algorithm.stop()
    return module


if __name__ == "__main__":
    main()
