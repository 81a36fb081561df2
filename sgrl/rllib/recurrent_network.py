"""The recurrent policies as models of RLlib's old API stack.

An existing RLlib script names them in its config, for any spaces RLlib flattens::

    config.training(model={"custom_model": "sgrl_sparsenet", "max_seq_len": 80,
                           "custom_model_config": {"propagation": "sgprop", "seed": 0}})

`custom_model_config` holds the policy's settings, and "seed" (of the initial weights and
connections, default 0). The model has a value head; max_seq_len should cover an episode. RLlib's
one optimizer trains the predictors of synthetic gradients at the policy's learning rate; with
`sgrl.rllib.PPOConfig` in place of RLlib's they have one of their own. That one also refuses several
GPUs: RLlib copies the model to each, and only the first copy's mixing weights would be kept.
"""

import contextlib
from typing import Any, ClassVar

import gymnasium as gym
import torch
from ray.rllib.models.torch.recurrent_net import RecurrentNetwork
from torch import Tensor, nn

from sgrl.nn.actions import ActionSpace
from sgrl.nn.registry import make_policy
from sgrl.reinforce.rollout import action_space_of


class PolicyNetwork(RecurrentNetwork, nn.Module):
    """Base of the three networks: the plain policy behind RLlib's interface."""

    policy_name: ClassVar[str]

    def __init__(
        self,
        obs_space: gym.Space,
        action_space: gym.Space,
        num_outputs: int,
        model_config: dict[str, Any],
        name: str,
        **settings: Any,
    ) -> None:
        """Build the policy; `settings` is the custom_model_config.

        Raises:
            ValueError: for an unknown or impossible setting.
        """
        nn.Module.__init__(self)
        super().__init__(obs_space, action_space, num_outputs, model_config, name)
        actions: int | ActionSpace = num_outputs
        with contextlib.suppress(ValueError):  # RLlib knows more kinds than the policies do
            known = action_space_of(action_space)
            actions = known if known.num_outputs == num_outputs else actions
        self.policy = make_policy(
            self.policy_name,
            gym.spaces.flatdim(obs_space),
            actions,
            **{"value_head": True, **settings},
        )
        if self.policy.noise_size:
            raise ValueError("neuron_noise must be 0 on the old API stack: it gives no noise")
        if self.policy.normalizer is not None:
            raise ValueError(
                "normalize_observations must be false on the old API stack: RLlib's own "
                "observation_filter does it there"
            )
        self._values: Tensor | None = None

    def get_initial_state(self) -> list[Tensor]:
        """Return the state before an episode's first step, without batch axis."""
        return [value[0] for value in self.policy.initial_state(1).values()]

    def forward_rnn(
        self, inputs: Tensor, state: list[Tensor], seq_lens: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """Run the policy over sequences.

        Args:
            inputs: flat observations [B, T, F] ([T, B, F] if time major), padded behind.
            state: the state's parts, each [B, ...].
            seq_lens: valid steps of each sequence [B].

        Returns:
            Logits, batch and time in the order of `inputs`, and the state after the last step.
        """
        observations = inputs if self.time_major else inputs.transpose(0, 1)
        steps = torch.arange(len(observations), device=inputs.device)
        mask = steps[:, None] < torch.as_tensor(seq_lens, device=inputs.device)
        names = self.policy.initial_state(1)
        output = self.policy(observations, dict(zip(names, state, strict=True)), mask)
        logits, self._values = output.logits, output.values
        if not self.time_major:
            logits = logits.transpose(0, 1)
            self._values = None if self._values is None else self._values.transpose(0, 1)
        return logits, list(output.state.values())

    def value_function(self) -> Tensor:
        """Return the values of the last `forward`'s steps, flat in its order."""
        if self._values is None:
            raise ValueError("no values: call forward first, with value_head left on")
        return self._values.reshape(-1)


class GRUNetwork(PolicyNetwork):
    """The GRU policy."""

    policy_name = "gru"


class LSTMNetwork(PolicyNetwork):
    """The LSTM policy."""

    policy_name = "lstm"


class SparseNetwork(PolicyNetwork):
    """The recurrent SparseNet policy; its predictors and mixing weights train under any loss."""

    policy_name = "sparsenet"
