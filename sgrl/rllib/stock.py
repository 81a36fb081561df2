"""RLlib's own algorithms around any registered policy: PPO, APPO and IMPALA.

A script changes one import; everything else is RLlib's::

    from sgrl.rllib import PPOConfig

    config = (
        PPOConfig()
        .environment("labyrinth_escape")
        .env_runners(batch_mode="complete_episodes")
        .rl_module(model_config={"policy": "sparsenet"})
        .training(lr=5e-4, predictor_lr=1e-5, grad_clip=0.5)
        .debugging(seed=0)
    )

Loss, sampling and update are RLlib's. Different are the module (`PolicyModule`, with a value head),
the optimizers (predictors of synthetic gradients have a learning rate of their own, and RLlib clips
each optimizer's gradients separately) and the runner (`StockRunner`). Sequences are as long as
the environment's episodes; "max_seq_len" in model_config shortens them.

On the old API stack `PPOConfig` takes the models of `sgrl.rllib.recurrent_network`, and gives the
predictors a parameter group of their own.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self

import gymnasium as gym
import numpy as np
import torch
from ray.rllib.algorithms import Algorithm, AlgorithmConfig, appo, impala, ppo
from ray.rllib.algorithms.algorithm_config import NotProvided
from ray.rllib.algorithms.appo.torch.appo_torch_learner import APPOTorchLearner
from ray.rllib.algorithms.impala.torch.impala_torch_learner import IMPALATorchLearner
from ray.rllib.algorithms.ppo.ppo_torch_policy import PPOTorchPolicy
from ray.rllib.algorithms.ppo.torch.ppo_torch_learner import PPOTorchLearner
from ray.rllib.core.columns import Columns
from ray.rllib.env.env_runner import EnvRunner
from ray.rllib.env.single_agent_env_runner import SingleAgentEnvRunner
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from ray.rllib.policy import Policy as OldPolicy
from torch import Tensor
from torch.optim import Optimizer

from sgrl.envs.guard import get_state as get_env_state
from sgrl.envs.guard import number
from sgrl.envs.guard import set_state as set_env_state
from sgrl.envs.registry import ENVIRONMENTS, has_success, validate_env_config
from sgrl.envs.vector import is_success
from sgrl.nn.mixing import split_parameters
from sgrl.nn.policy import Policy
from sgrl.nn.registry import policy_class, setting_defaults
from sgrl.reinforce.device import prepare_device
from sgrl.reinforce.generators import generators_aside, get_random_state, set_random_state
from sgrl.rllib.base import Components, PolicyCheckpoints, PolicyConfig
from sgrl.rllib.learner import PolicyLearner
from sgrl.rllib.module import policy_arguments
from sgrl.rllib.settings import BOUNDS, check_numbers, refuse_ignored, silence_notes

COMPONENT_EPISODES = "episodes"


class StockRunner(SingleAgentEnvRunner):
    """RLlib's runner with new episodes in every sample, sums over those that ended, exact state.

    RLlib's own starts every sample of whole episodes (`batch_mode="complete_episodes"`) from
    `config.seed` again, so training would see the same few episodes for ever. Here reset k of
    runner w is seeded from (seed, w, k). Evaluation always starts from the same seeds, which
    training never uses.

    What an environment raises reaches the algorithm, where RLlib's own hides it behind an error
    without a message, or ends the process.

    Under "sgrl" it reports, of the episodes that ended: episodes, return_sum, length_sum, and
    where the environment tells success from failure, success_sum.
    """

    resets = 0

    def _reset_envs(self, *args: Any, **kwargs: Any) -> None:
        evaluating = bool(self.config.in_evaluation)
        if self.config.seed is not None:
            entropy = [self.config.seed, self.worker_index or 0, 0 if evaluating else self.resets]
            drawn = int(np.random.SeedSequence(entropy).generate_state(1)[0])
            # Environment e gets seed + e. Halves of the seeds: for training and for evaluation.
            self._seed = drawn % (2**31 - self.num_envs) + 2**31 * evaluating
            self._needs_initial_reset = True
        self.resets += 1
        super()._reset_envs(*args, **kwargs)

    def sample(self, **kwargs: Any) -> list[SingleAgentEpisode]:
        """Sample as RLlib does.

        An evaluation has random generators of its own, since it may share the process with
        training.
        """
        if not self.config.in_evaluation:
            return super().sample(**kwargs)
        seed = self.config.seed
        with generators_aside(None if seed is None else [seed, self.worker_index or 0]):
            return super().sample(**kwargs)

    def make_env(self) -> None:
        """Make the environments, and number them."""
        super().make_env()
        number(self._single_envs())

    def make_module(self) -> None:
        """Make the module, on a device that is set up."""
        super().make_module()
        prepare_device(self._device)

    def _single_envs(self) -> Sequence[gym.Env]:
        """The environments of this process.

        Returns:
            None of them where they run in processes of their own, or where this runner has none.
        """
        return getattr(self.env.unwrapped, "envs", ()) if self.env is not None else ()

    def _try_env_step(self, actions: Any) -> Any:
        try:
            return super()._try_env_step(actions)
        except RuntimeError as error:
            raised = error.__cause__ or error
        # Out here: within, RLlib's error would become its context, and it is that one's cause.
        raise raised

    def apply(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call `func` with this runner; an error is raised, unless RLlib is to restart runners."""
        if self.config.restart_failed_env_runners:
            return super().apply(func, *args, **kwargs)
        return func(self, *args, **kwargs)

    def get_metrics(self) -> dict[str, Any]:
        """Return what was logged since the last call, and the sums over the ended episodes."""
        tells_success = has_success(self.config.env)
        for last in self._done_episodes_for_metrics:
            chunks = [*self._ongoing_episodes_for_metrics.get(last.id_, ()), last]
            sums = {
                "episodes": 1,
                "return_sum": sum(chunk.get_return() for chunk in chunks),
                "length_sum": sum(len(chunk) for chunk in chunks),
            }
            if tells_success:
                sums["success_sum"] = int(is_success(last.is_terminated, last.get_infos(-1)))
            self.metrics.log_dict(sums, key="sgrl", reduce="sum")
        return super().get_metrics()

    def get_state(
        self, components: Components = None, *, not_components: Components = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Return RLlib's state, and what it forgets.

        That is the number of resets, what the environments keep, and the process's random
        generators.
        """
        state = super().get_state(components, not_components=not_components, **kwargs)
        if self._check_component(COMPONENT_EPISODES, components, not_components):
            state[COMPONENT_EPISODES] = {
                "worker_index": self.worker_index,
                "resets": self.resets,
                "environments": [get_env_state(env) for env in self._single_envs()],
                # Actions are drawn from torch's generator, minibatches from NumPy's.
                **get_random_state(),
            }
        return state

    def set_state(self, state: dict[str, Any]) -> None:
        """Set whatever `state` holds of what `get_state` returns."""
        super().set_state(state)
        episodes = state.get(COMPONENT_EPISODES)
        # A remote runner is handed the local one's state.
        if episodes is not None and episodes["worker_index"] == self.worker_index:
            self.resets = episodes["resets"]
            # Checkpoints from before hold none of these.
            states = episodes.get("environments", ())
            for env, env_state in zip(self._single_envs(), states, strict=False):
                set_env_state(env, env_state)
            set_random_state(episodes)


class PolicyAlgorithmConfig(PolicyConfig):
    """What the configs below share; to be put before RLlib's config of the algorithm.

    Attributes:
        name: of the algorithm in `STOCK_ALGORITHMS`.
        learner_class_of_policies: its learner.
    """

    name: ClassVar[str]
    learner_class_of_policies: ClassVar[type[PolicyLearner]]

    def __init__(self, algo_class: type[Algorithm] | None = None) -> None:
        super().__init__(algo_class=algo_class or STOCK_ALGORITHMS[self.name])
        self.predictor_lr = 1e-5
        self.env_runner_cls: type[EnvRunner] | None = StockRunner
        # Restarted in place, a runner would begin other episodes than a trial that goes on from
        # its checkpoint; an error of the environment's own would come again and again.
        self.restart_failed_env_runners = False

    def training(self, *, predictor_lr: float = NotProvided, **kwargs: Any) -> Self:
        """Set the training settings.

        Args:
            predictor_lr: learning rate of the predictors of synthetic gradients, default 1e-5.
            **kwargs: the algorithm's own.
        """
        super().training(**kwargs)
        if predictor_lr is not NotProvided:
            self.predictor_lr = predictor_lr
        return self

    def api_stack(self, **kwargs: Any) -> Self:
        """Choose the API stack; `StockRunner` is for the new one."""
        super().api_stack(**kwargs)
        if not self.enable_env_runner_and_connector_v2 and self.env_runner_cls is StockRunner:
            self.env_runner_cls = None
        return self

    def get_default_learner_class(self) -> type[PolicyLearner]:
        """Return the algorithm's learner with optimizers for policy and predictors."""
        return self.learner_class_of_policies

    @property
    def _model_config_auto_includes(self) -> dict[str, Any]:
        included = super()._model_config_auto_includes | {"value_head": True}
        if self.seed is not None:
            included["seed"] = self.seed
        length = episode_length(self.env, self.env_config)
        if length is not None:
            # RLlib adds a step to every episode, for the value of the last observation.
            included["max_seq_len"] = length + 1
        return included

    def validate(self) -> None:
        """Check the settings.

        Raises:
            ValueError: one line that names the setting.
        """
        # Others may be schedules, or None.
        numbers = [n for n in BOUNDS if isinstance(getattr(self, n, None), int | float)]
        check_numbers(self, {"predictor_lr", *numbers} - {"seed"})
        if self.enable_rl_module_and_learner:
            refuse_ignored(self, self.algo_class.get_default_config())
            if self._rl_module_spec is None:
                self._check_policy()
        elif self.num_gpus > 1 and self.model["custom_model"] is not None:
            raise ValueError(
                f"num_gpus must be at most 1 on the old API stack, got {self.num_gpus}: the copy "
                "of the model on each GPU would estimate mixing weights of its own"
            )
        silence_notes(self)
        super().validate()

    def _check_policy(self) -> None:
        model = self.model_config
        arguments = policy_arguments(model)
        if not arguments["value_head"]:
            raise ValueError(f"value_head must be true for {self.algo_class.__name__}")
        if arguments.get("neuron_noise"):
            raise ValueError(
                f"neuron_noise must be 0 for {self.algo_class.__name__}: only Reinforce gives its "
                "updates the noise with which the policy acted"
            )
        kind = policy_class(arguments["name"])
        default = setting_defaults(kind.Settings).get("propagation", "backprop")
        if self.num_learners > 1 and arguments.get("propagation", default) == "sgprop":
            raise ValueError(
                f"num_learners must be 0 or 1 under sgprop, got {self.num_learners}: several "
                "learners would each estimate mixing weights of their own"
            )
        if self.num_learners > 1 and arguments.get("normalize_observations"):
            raise ValueError(
                f"num_learners must be 0 or 1 with normalize_observations, got {self.num_learners}"
                ": several learners would each keep statistics of their own"
            )
        if kind.initial_state is Policy.initial_state:
            if "max_seq_len" in self._model_config:
                raise ValueError(
                    f"max_seq_len does nothing for {arguments['name']}, a policy without memory: "
                    "leave it out"
                )
            return
        steps = model.get("max_seq_len")
        if steps is None:
            raise ValueError(
                "max_seq_len is missing in the model: the length of this environment's episodes "
                "plus 1, or less for truncated BPTT"
            )
        if type(steps) is not int or steps < 1:
            raise ValueError(f"max_seq_len must be a whole number of at least 1, got {steps!r}")


def episode_length(env: Any, env_config: Mapping[str, Any]) -> int | None:
    """The greatest number of steps of an episode, None where that is not known beforehand.

    Raises:
        ValueError: impossible settings of one of our environments.
    """
    if env in ENVIRONMENTS:
        # Without that setting an environment's episodes have one step.
        return validate_env_config(env, env_config).get("episode_length", 1)
    try:
        return validate_env_config(env, env_config)["episode_length"]
    except ValueError:
        return None


class PPOLearner(PolicyLearner, PPOTorchLearner):
    """PPO's learner with an optimizer for the predictors, and measures of valid steps alone."""

    def compute_loss_for_module(
        self, *, module_id: str, config: Any, batch: dict[str, Any], fwd_out: dict[str, Tensor]
    ) -> Tensor:
        """Return RLlib's loss, and log under "sgrl" what it does not measure, or with padding."""
        loss = super().compute_loss_for_module(
            module_id=module_id, config=config, batch=batch, fwd_out=fwd_out
        )
        with torch.no_grad():
            measured = self._measured(module_id, config, batch, fwd_out)
        self.metrics.log_dict(measured, key=(module_id, "sgrl"), window=1)
        return loss

    def _measured(
        self, module_id: str, config: Any, batch: dict[str, Any], fwd_out: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        module = self.module[module_id].unwrapped()
        before, now = (
            kind.from_logits(outputs[Columns.ACTION_DIST_INPUTS])
            for kind, outputs in (
                (module.get_exploration_action_dist_cls(), batch),
                (module.get_train_action_dist_cls(), fwd_out),
            )
        )
        log_ratio = now.logp(batch[Columns.ACTIONS]) - batch[Columns.ACTION_LOGP]
        mask = batch.get(Columns.LOSS_MASK, torch.ones_like(log_ratio)).bool()
        clipped = (log_ratio[mask].exp() - 1).abs() > config.clip_param
        measured = {
            "kl": before.kl(now)[mask].mean(),
            "clip_fraction": clipped.double().mean(),
        }
        if config.use_critic:
            values = module.compute_values(batch, embeddings=fwd_out.get(Columns.EMBEDDINGS))
            targets = batch[Columns.VALUE_TARGETS][mask]
            error, spread = targets - values[mask], targets.var(correction=0)
            measured["value_loss"] = error.square().mean()
            explained = 1 - error.var(correction=0) / spread
            measured["explained_variance"] = torch.where(spread > 0, explained, torch.nan)
        return measured


class APPOLearner(PolicyLearner, APPOTorchLearner):
    """APPO's learner with an optimizer for the predictors."""


class IMPALALearner(PolicyLearner, IMPALATorchLearner):
    """IMPALA's learner with an optimizer for the predictors."""


class PPOConfig(PolicyAlgorithmConfig, ppo.PPOConfig):
    """RLlib's PPOConfig, with `predictor_lr`."""

    name = "PPO"
    learner_class_of_policies = PPOLearner


class APPOConfig(PolicyAlgorithmConfig, appo.APPOConfig):
    """RLlib's APPOConfig, with `predictor_lr`."""

    name = "APPO"
    learner_class_of_policies = APPOLearner


class IMPALAConfig(PolicyAlgorithmConfig, impala.IMPALAConfig):
    """RLlib's IMPALAConfig, with `predictor_lr`."""

    name = "IMPALA"
    learner_class_of_policies = IMPALALearner


class PPO(PolicyCheckpoints, ppo.PPO):
    """RLlib's PPO around a policy, on either API stack."""

    config_class = PPOConfig

    @classmethod
    def get_default_policy_class(cls, config: AlgorithmConfig) -> type[OldPolicy]:
        """Return the old stack's policy."""
        return PPOPolicy


class APPO(PolicyCheckpoints, appo.APPO):
    """RLlib's APPO around a policy (new API stack)."""

    config_class = APPOConfig


class IMPALA(PolicyCheckpoints, impala.IMPALA):
    """RLlib's IMPALA around a policy (new API stack)."""

    config_class = IMPALAConfig


#: RLlib's algorithms around our policies, by RLlib's name.
STOCK_ALGORITHMS: dict[str, type[Algorithm]] = {"PPO": PPO, "APPO": APPO, "IMPALA": IMPALA}


class PPOPolicy(PPOTorchPolicy):
    """PPO of the old API stack, with a parameter group for the predictors.

    RLlib clips the gradients of each group separately. A schedule of learning rates is for the
    other parameters alone.
    """

    def optimizer(self) -> list[Optimizer]:
        """Make Adam with a group for the predictors, if there are any."""
        prepare_device(self.device)  # here, since RLlib computes in its constructor already
        rates = (self.config["lr"], self.config["predictor_lr"])
        groups = [
            {"params": parameters, "lr": rate}
            for parameters, rate in zip(split_parameters(self.model), rates, strict=True)
            if parameters
        ]
        optimizers = [torch.optim.Adam(groups)]
        return self.exploration.get_exploration_optimizer(optimizers)

    def set_state(self, state: dict[str, Any]) -> None:
        """Set RLlib's state; schedules continue from there."""
        super().set_state(state)
        self.on_global_var_update({"timestep": self.global_timestep})

    def on_global_var_update(self, global_vars: dict[str, Any]) -> None:
        """Follow RLlib's schedules, but for the predictors' learning rate."""
        super().on_global_var_update(global_vars)
        for optimizer in self._optimizers:
            for group in optimizer.param_groups[1:]:
                group["lr"] = self.config["predictor_lr"]
