"""Synthetic gradients under Stable-Baselines3's PPO.

The network of features of an otherwise stock "MlpPolicy" gets a block after each hidden layer.
PPO is untouched: its loss.backward() mixes the predictions in, and its optimizer trains the
predictors with everything else, at the same learning rate (Stable-Baselines3 sets one rate for all
parameter groups) and clipped together with it. Prints the mean return and the mean mixing weight.

    python examples/sb3_ppo.py

Takes about a minute on one core. Needs Stable-Baselines3: pip install "sgrl[examples]".
"""

import argparse

import gymnasium as gym
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import Tensor, nn

from sgrl.nn import SyntheticGradient


class BlockFeatures(BaseFeaturesExtractor):
    """Two hidden layers, each followed by a block; policy and value head share them."""

    def __init__(self, observation_space: gym.spaces.Box, hidden_size: int = 64) -> None:
        super().__init__(observation_space, features_dim=hidden_size)
        self.body = nn.Sequential(
            nn.Linear(observation_space.shape[0], hidden_size),
            nn.Tanh(),
            SyntheticGradient(hidden_size),
            nn.Linear(hidden_size, hidden_size),
            nn.Tanh(),
            SyntheticGradient(hidden_size),
        )

    def forward(self, observations: Tensor) -> Tensor:
        return self.body(observations)


class Report(BaseCallback):
    """One line at the end of each rollout."""

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        returns = [episode["r"] for episode in self.model.ep_info_buffer]
        weights = [b for name, b in self.model.policy.named_buffers() if "mixing_weight" in name]
        print(
            f"{self.num_timesteps:6} steps: return {sum(returns) / max(len(returns), 1):.1f}, "
            f"mean lambda {torch.cat(weights).mean().item():.3f}"
        )


def main(arguments: list[str] | None = None) -> nn.Module:
    """Train; returns the trained policy."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--iterations", type=int, default=20, help="of PPO")
    parser.add_argument("--batch", type=int, default=1000, help="environment steps an iteration")
    options = parser.parse_args(arguments)
    model = PPO(
        "MlpPolicy",
        "CartPole-v1",
        policy_kwargs={"features_extractor_class": BlockFeatures, "net_arch": []},
        learning_rate=1e-3,
        n_steps=options.batch,
        batch_size=min(250, options.batch),
        gamma=0.98,
        gae_lambda=0.8,
        seed=0,
        device="cpu",
    )
    model.learn(options.iterations * options.batch, callback=Report())
    return model.policy


if __name__ == "__main__":
    main()
