"""RLlib Learners for policies with predictors, and one around `sgrl.reinforce.update` (new stack).

`PolicyLearner` is for any algorithm's loss; `ReinforceLearner` computes its own.
"""

import copy
from collections.abc import Iterable
from typing import Any
from weakref import WeakSet

import torch
import tree
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.core import COMPONENT_RL_MODULE, DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns
from ray.rllib.core.learner.torch.torch_learner import TorchLearner
from ray.rllib.core.learner.training_data import TrainingData
from ray.rllib.core.rl_module import RLModule
from ray.rllib.policy.sample_batch import MultiAgentBatch, SampleBatch
from ray.rllib.utils.metrics import NUM_ENV_STEPS_SAMPLED_LIFETIME
from torch import Tensor

from sgrl.nn.mixing import split_parameters
from sgrl.nn.policy import Acting, Policy
from sgrl.nn.registry import mixing_statistics
from sgrl.reinforce.batch import EpisodeBatch
from sgrl.reinforce.device import prepare_device
from sgrl.reinforce.schedules import set_learning_rates
from sgrl.reinforce.update import UpdateSettings, optimizers_of, update
from sgrl.rllib.base import Components
from sgrl.rllib.module import PolicyModule

COMPONENT_KL = "kl_coefficients"
COMPONENT_SCHEDULES = "schedules"


class ExactLearner(TorchLearner):
    """A learner whose state keeps the policy's precision and comes back as it was saved.

    On a GPU it computes the same each time; see `sgrl.reinforce.prepare_device`.
    """

    def build(self) -> None:
        """Build as RLlib does, on a device that is set up."""
        super().build()
        prepare_device(self._device)

    def get_state(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return RLlib's learner state, as a copy: its own arrays change as training goes on."""
        return copy.deepcopy(super().get_state(*args, **kwargs))

    def set_state(self, state: dict[str, Any]) -> None:
        """Set RLlib's learner state, also where it is older than the current one."""
        if COMPONENT_RL_MODULE in state:
            # RLlib passes over weights that count fewer updates than the current ones.
            self._weights_seq_no = 0
        super().set_state(state)

    # RLlib's own versions of these two cast float64 to float32, and bring back the checkpoint's
    # learning rates where the config's were changed.
    def _get_optimizer_state(self) -> dict[str, Any]:
        return {
            name: {
                "module_id": self._optimizer_name_to_module[name],
                "moments": tree.map_structure(
                    lambda moment: moment.cpu().numpy(), optimizer.state_dict()["state"]
                ),
            }
            for name, optimizer in self._named_optimizers.items()
        }

    def _set_optimizer_state(self, state: dict[str, Any]) -> None:
        for name, saved in state.items():
            optimizer = self._named_optimizers[name]
            moments = tree.map_structure(torch.tensor, saved["moments"])
            optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})


class PolicyLearner(ExactLearner):
    """To be put before any algorithm's learner: predictors get an optimizer of their own.

    Registers Adam as "policy", at the config's lr (a number or a schedule), and where the policy
    has predictors as "predictor", at its predictor_lr. RLlib clips the gradients of each optimizer
    separately. Modules that hold no policy of ours are left to the algorithm's own learner.
    A minibatch holds at least one sequence.
    Running statistics of observations take in each batch once, after its last minibatch.
    """

    #: Environment steps at the last update, by which the schedules go.
    _timestep: int | None = None

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        #: What is being learned from.
        self._batch: MultiAgentBatch | None = None
        #: In the statistics of observations already: APPO learns from a batch more than once.
        self._observed: WeakSet[MultiAgentBatch] = WeakSet()

    def configure_optimizers_for_module(self, module_id: str, config: AlgorithmConfig) -> None:
        """Register the optimizers "policy" and, where the policy has predictors, "predictor"."""
        policy = _policy_of(self.module[module_id])
        if policy is None:
            super().configure_optimizers_for_module(module_id, config)
            return
        rates = {"policy": config.lr, "predictor": config.predictor_lr}
        groups = zip(rates.items(), split_parameters(policy), strict=True)
        for (name, rate), parameters in groups:
            if parameters:
                self.register_optimizer(
                    module_id=module_id,
                    optimizer_name=name,
                    optimizer=torch.optim.Adam(parameters),
                    params=parameters,
                    lr_or_lr_schedule=rate,
                )

    def _create_iterator_if_necessary(
        self,
        *,
        training_data: TrainingData,
        minibatch_size: int | None = None,
        **kwargs: Any,
    ) -> Iterable[MultiAgentBatch]:
        if not training_data.data_iterators:
            self._batch = batch = self._make_batch_if_necessary(training_data)
            training_data = TrainingData(batch=batch)
            for columns in batch.policy_batches.values():
                lengths = columns.get(Columns.SEQ_LENS)
                if minibatch_size and lengths is not None:
                    # RLlib takes minibatch_size / (mean length) sequences, rounded down, and where
                    # that is 0 it waits for the end of an epoch for ever.
                    minibatch_size = max(minibatch_size, len(columns) // len(lengths) + 1)
        return super()._create_iterator_if_necessary(
            training_data=training_data, minibatch_size=minibatch_size, **kwargs
        )

    def after_gradient_based_update(self, *, timesteps: dict[str, Any]) -> None:
        """Report what sgprop measured in the update's last backward pass, under "sgrl"."""
        super().after_gradient_based_update(timesteps=timesteps)
        batch, self._batch = self._batch, None
        if batch is not None and batch not in self._observed:
            self._observed.add(batch)
            for module_id, columns in batch.policy_batches.items():
                module = self.module[module_id].unwrapped()
                if isinstance(module, PolicyModule):
                    module.observe(columns)
        self._timestep = timesteps.get(NUM_ENV_STEPS_SAMPLED_LIFETIME, 0)
        for module_id, module in self.module.items():
            measured = mixing_statistics(_policy_of(module) or module.unwrapped())
            self.metrics.log_dict(measured, key=(module_id, "sgrl"), window=1)

    def get_state(
        self, components: Components = None, *, not_components: Components = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Return RLlib's learner state, and what it forgets.

        That is the KL coefficients, the position of the schedules, and APPO's last update of its
        target network.
        """
        state = super().get_state(components, not_components=not_components, **kwargs)
        if self._check_component(COMPONENT_KL, components, not_components):
            coefficients = getattr(self, "curr_kl_coeffs_per_module", {})
            state[COMPONENT_KL] = {key: value.item() for key, value in coefficients.items()}
        if self._check_component(COMPONENT_SCHEDULES, components, not_components):
            targets = getattr(self, "_last_update_ts_by_mid", {})
            state[COMPONENT_SCHEDULES] = {"timestep": self._timestep, "targets": dict(targets)}
        return state

    def set_state(self, state: dict[str, Any]) -> None:
        """Set whatever `state` holds of what `get_state` returns; schedules continue from there."""
        super().set_state(state)
        for module_id, value in state.get(COMPONENT_KL, {}).items():
            self.curr_kl_coeffs_per_module[module_id].data.fill_(value)
        saved = state.get(COMPONENT_SCHEDULES, {})
        if saved.get("targets"):
            self._last_update_ts_by_mid.update(saved["targets"])
        self._timestep = saved.get("timestep")
        if self._timestep is None:
            return
        for optimizer, schedule in self._optimizer_lr_schedules.items():
            self._set_optimizer_lr(optimizer, lr=schedule.update(self._timestep))
        for module_id in self.module.keys():  # noqa: SIM118 (it is no mapping)
            self.entropy_coeff_schedulers_per_module[module_id].update(self._timestep)


def _policy_of(module: RLModule) -> Policy | None:
    policy = getattr(module.unwrapped(), "policy", None)
    return policy if isinstance(policy, Policy) else None


class ReinforceLearner(ExactLearner):
    """One REINFORCE step per batch: one backward pass, two optimizers clipped separately.

    The batch holds an `EpisodeBatch`'s tensors under their own names, time first. Everything keeps
    the policy's precision, float64 included. A loss that is NaN or infinite raises
    `sgrl.reinforce.NonFiniteLoss` and changes nothing.
    """

    #: `EpisodeBatch.acted` of the next batch: it belongs to one process and is in no column.
    acted: Acting | None = None
    #: Environment steps learned from, by which schedules go.
    env_steps = 0

    def configure_optimizers_for_module(self, module_id: str, config: AlgorithmConfig) -> None:
        """Register the optimizers "policy" and, where the policy has predictors, "predictor"."""
        optimizers = optimizers_of(self.module[module_id].policy, config)
        for name, optimizer in optimizers.items():
            self.register_optimizer(
                module_id=module_id,
                optimizer_name=name,
                optimizer=optimizer,
                params=[p for group in optimizer.param_groups for p in group["params"]],
            )

    def _update(
        self, batch: dict[str, SampleBatch], **kwargs: Any
    ) -> tuple[dict, dict[str, float], dict]:
        losses = {}
        acted, self.acted = self.acted, None
        for module_id, columns in batch.items():
            metrics = self.update_policy(EpisodeBatch(**columns, acted=acted), module_id)
            self.metrics.log_dict(metrics, key=(module_id, "sgrl"), reduce="item")
            losses[module_id] = metrics["policy_loss"]
        return {}, losses, {}

    def update_policy(
        self, batch: EpisodeBatch, module_id: str = DEFAULT_MODULE_ID
    ) -> dict[str, float]:
        """Update without RLlib's bookkeeping; returns what `sgrl.reinforce.update` measures."""
        config = self.config.get_config_for_module(module_id)
        optimizers = dict(self.get_optimizers_for_module(module_id))
        set_learning_rates(optimizers, config.lr, config.predictor_lr, self.env_steps)
        # A config holds each of them under the same name.
        settings = UpdateSettings.of(config, self.env_steps)
        policy = self.module[module_id].policy
        measured = update(policy, optimizers, batch.to(self._device), settings)
        self.env_steps += batch.num_steps
        return measured

    def get_state(
        self, components: Components = None, *, not_components: Components = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Return RLlib's learner state, and the position of the schedules."""
        state = super().get_state(components, not_components=not_components, **kwargs)
        if self._check_component(COMPONENT_SCHEDULES, components, not_components):
            state[COMPONENT_SCHEDULES] = {"env_steps": self.env_steps}
        return state

    def set_state(self, state: dict[str, Any]) -> None:
        """Set whatever `state` holds of what `get_state` returns; schedules continue from there."""
        super().set_state(state)
        self.env_steps = state.get(COMPONENT_SCHEDULES, {}).get("env_steps", self.env_steps)

    def compute_loss_for_module(self, **kwargs: Any) -> Tensor:
        """Not used: `sgrl.reinforce.update` computes the loss."""
        raise NotImplementedError("ReinforceLearner updates through sgrl.reinforce.update")

    def _convert_batch_type(
        self, batch: MultiAgentBatch, to_device: bool = True, **kwargs: Any
    ) -> MultiAgentBatch:
        # RLlib's own version casts float64 to float32.
        device = self._device if to_device else None
        columns = tree.map_structure(
            lambda value: torch.as_tensor(value, device=device), batch.policy_batches
        )
        return MultiAgentBatch(columns, env_steps=batch.env_steps())


def learner_batch(
    batch: EpisodeBatch, module_id: str, env_steps: int | None = None
) -> MultiAgentBatch:
    """Wrap an episode batch the way RLlib hands batches to Learners.

    Args:
        batch: whole episodes.
        module_id: whose they are.
        env_steps: what RLlib is to count as learned from with it; the batch's own steps if None.
    """
    columns = batch.tensors()
    return MultiAgentBatch(
        {module_id: SampleBatch(columns, _time_major=True, _zero_padded=True)},
        env_steps=batch.num_steps if env_steps is None else env_steps,
    )
