"""The RLlib module around any registered policy (new API stack).

RLlib's own algorithms use it too; see `sgrl.rllib.stock`.
"""

from collections.abc import Mapping
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from ray.rllib.core.columns import Columns
from ray.rllib.core.distribution.distribution import Distribution
from ray.rllib.core.distribution.torch.torch_distribution import (
    TorchDiagGaussian,
    TorchMultiCategorical,
    TorchMultiDistribution,
)
from ray.rllib.core.learner.utils import make_target_network
from ray.rllib.core.rl_module.apis import (
    TARGET_NETWORK_ACTION_DIST_INPUTS,
    TargetNetworkAPI,
    ValueFunctionAPI,
)
from ray.rllib.core.rl_module.torch import TorchRLModule
from torch import Tensor, nn

from sgrl.envs.vector import observation_shape
from sgrl.nn.actions import Mixed, MultiDiscrete
from sgrl.nn.registry import Policy, make_policy, policy_settings
from sgrl.reinforce.rollout import action_space_of

# Keys of a model_config that RLlib itself adds or reads; all others are the policy's.
RLLIB_KEYS = {"max_seq_len", "vf_share_layers"}
TARGET = "target."
DTYPES = {"float32": torch.float32, "float64": torch.float64}


class PolicyModule(TorchRLModule, ValueFunctionAPI, TargetNetworkAPI):
    """A registered policy as an RLModule.

    `model_config` holds "policy" (a name in `sgrl.nn.registry.POLICIES`, or a class as in
    my_package.models:MyPolicy), the policy's settings, and optionally "seed" (of its initial
    weights and connections, default 0), "dtype" ("float32", the default, or "float64") and RLlib's
    own "max_seq_len" (steps of the sequences that stock algorithms cut episodes into for truncated
    BPTT, default 20, RLlib's own default).

    Observations are a Box of any shape, of which uint8 on three axes are images (put RLlib's
    FlattenObservations connector before it for other spaces); actions are Discrete, MultiDiscrete,
    a Box on one axis, or a Tuple of these last two. The state is a dict of arrays, empty for
    policies without memory.
    """

    policy: Policy
    #: A slowly following copy, in learners whose algorithm asks for one (APPO).
    target: Policy | None

    def setup(self) -> None:
        """Build the policy.

        Raises:
            ValueError: for another observation or action space, an unknown policy or setting.
        """
        if not isinstance(self.observation_space, gym.spaces.Box):
            raise ValueError(
                f"observation space {self.observation_space} is no Box: add RLlib's "
                "FlattenObservations connector to env_to_module_connector"
            )
        actions = action_space_of(self.action_space)
        # Those that RLlib does not find by itself.
        if isinstance(actions, MultiDiscrete):
            self.action_dist_cls = _categorical(actions)
        elif isinstance(actions, Mixed):
            choices, numbers = actions.parts
            self.action_dist_cls = TorchMultiDistribution.get_partial_dist_cls(
                space=self.action_space,
                child_distribution_cls_struct=(_categorical(choices), TorchDiagGaussian),
                input_lens=[choices.num_outputs, numbers.num_outputs],
            )
        self.model_config.setdefault("max_seq_len", 20)
        self.policy = make_policy(
            observation_size=observation_shape(self.observation_space),
            num_actions=actions,
            **policy_arguments(self.model_config),
        )
        self.target = None

    def get_initial_state(self) -> dict[str, np.ndarray]:
        """Return the state before an episode's first step, one array each without batch axis."""
        state = self.policy.initial_state(1)
        return {key: value[0].detach().cpu().numpy() for key, value in state.items()}

    def _forward(self, batch: Mapping[str, Any], **kwargs: Any) -> dict[str, Any]:
        logits, values, state = self._run(self.policy, batch)
        output: dict[str, Any] = {Columns.ACTION_DIST_INPUTS: logits}
        if state:
            output[Columns.STATE_OUT] = state
        if values is not None:
            # Handed back to `compute_values`, so that a loss runs the network once: a second
            # pass would double the backward pass and the mixing-weight updates in it.
            output[Columns.EMBEDDINGS] = values
        return output

    def compute_values(self, batch: Mapping[str, Any], embeddings: Tensor | None = None) -> Tensor:
        """Return state values [B, T] ([B] for policies without memory).

        Raises:
            ValueError: if the policy has no value head.
        """
        values = embeddings if embeddings is not None else self._run(self.policy, batch)[1]
        if values is None:
            raise ValueError('the policy has no value head: add "value_head": True to model_config')
        return values

    def make_target_networks(self) -> None:
        """Make the copy of the policy that `forward_target` runs."""
        self.target = make_target_network(self.policy)
        self.target.normalizer = self.policy.normalizer  # it reads the same observations

    def get_target_network_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """Return the parameters of policy and copy; RLlib moves the second towards the first."""
        # Without the buffers: RLlib's averaging would round connections down to other neurons.
        assert self.target is not None
        policies = (self.policy, self.target)
        main, target = (nn.ParameterList(policy.parameters()) for policy in policies)
        return [(main, target)]

    def forward_target(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the copy's logits, as `_forward` does the policy's."""
        assert self.target is not None
        with torch.no_grad():
            return {TARGET_NETWORK_ACTION_DIST_INPUTS: self._run(self.target, batch)[0]}

    def observe(self, batch: Mapping[str, Any]) -> None:
        """Take a batch that was trained on into the policy's statistics of observations."""
        if self.policy.normalizer is None:
            return
        axes = 2 if self.policy.initial_state(1) else 1  # as `_run` has it
        observations = batch[Columns.OBS].flatten(start_dim=axes)
        mask = batch.get(Columns.LOSS_MASK)
        dtype = next(self.policy.parameters()).dtype
        self.policy.observe(observations.to(dtype), None if mask is None else mask.bool())

    @staticmethod
    def _run(
        policy: Policy, batch: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        # RLlib's batches are [B, T, ...] for stateful modules and [B, ...] for others. The mask
        # is False at padding, and at the step RLlib adds to each episode for its last value.
        dtype = next(policy.parameters()).dtype
        observations = batch[Columns.OBS].to(dtype)
        mask = batch.get(Columns.LOSS_MASK)
        if not policy.initial_state(1):
            mask = None if mask is None else mask.bool()[None]
            output = policy(observations.flatten(start_dim=1)[None], mask=mask)
            values = None if output.values is None else output.values[0]
            return output.logits[0], values, {}
        observations = observations.flatten(start_dim=2).transpose(0, 1)
        state = {key: value.to(dtype) for key, value in batch[Columns.STATE_IN].items()}
        mask = None if mask is None else mask.bool().transpose(0, 1)
        output = policy(observations, state, mask)
        values = None if output.values is None else output.values.transpose(0, 1)
        return output.logits.transpose(0, 1), values, output.state

    # RLlib's own versions of these two cast float64 to float32.
    def get_state(
        self, *args: Any, inference_only: bool = False, **kwargs: Any
    ) -> dict[str, np.ndarray]:
        """Return weights and buffers by name, in the policy's own precision.

        Args:
            *args: not used.
            inference_only: leave out the copy that only learners have.
            **kwargs: not used.
        """
        return {
            key: value.detach().cpu().numpy()
            for key, value in self.state_dict().items()
            if not (inference_only and key.startswith(TARGET))
        }

    def set_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Load what `get_state` returns; a copy of the policy on one side only is left alone."""
        # A copy, since Ray's arrays are read-only.
        arrays = {key: torch.from_numpy(np.array(value)) for key, value in state.items()}
        missing, unexpected = self.load_state_dict(arrays, strict=False)
        strange = [key for key in (*missing, *unexpected) if not key.startswith(TARGET)]
        if strange:
            raise ValueError(f"not the state of this policy: {', '.join(strange)}")


def _categorical(actions: MultiDiscrete) -> type[Distribution]:
    return TorchMultiCategorical.get_partial_dist_cls(
        space=gym.spaces.MultiDiscrete(list(actions.sizes)), input_lens=list(actions.sizes)
    )


def policy_arguments(model_config: Mapping[str, Any]) -> dict[str, Any]:
    """Translate an RLlib `model_config` into keyword arguments of `make_policy`, checked.

    Raises:
        ValueError: no policy is named, or it, a setting or the dtype is unknown or impossible.
    """
    settings = {key: value for key, value in model_config.items() if key not in RLLIB_KEYS}
    if "policy" not in settings:
        raise ValueError('model_config names no policy: add e.g. "policy": "sparsenet"')
    name, seed = settings.pop("policy"), settings.pop("seed", 0)
    dtype = settings.pop("dtype", "float32")
    for key, value in (("policy", name), ("dtype", dtype)):
        if not isinstance(value, str):
            raise ValueError(f"{key} must be a name, got {value!r}")
    if type(seed) is not int or seed < 0:
        raise ValueError(f"seed must be a whole number of at least 0, got {seed!r}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    policy_settings(name, settings)
    return {"name": name, "seed": seed, "dtype": DTYPES[dtype], **settings}
