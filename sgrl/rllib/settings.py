"""Which of RLlib's settings do something here. One that does nothing is refused, not ignored.

RLlib takes a few hundred settings and is silent about those that an algorithm or its new API stack
never reads. `Reinforce` reads few, which are listed; of RLlib's own algorithms those are listed
that they do not read.
"""

import functools
import inspect
import math
from collections.abc import Callable, Collection, Iterable
from typing import Any, NamedTuple

import gymnasium as gym
from ray.rllib.algorithms import AlgorithmConfig
from ray.rllib.policy.sample_batch import DEFAULT_POLICY_ID
from ray.util.debug import log_once

from sgrl.envs.registry import ENVIRONMENTS, make_single
from sgrl.reinforce.rollout import MAX_SEED
from sgrl.reinforce.schedules import is_schedule


class Bounds(NamedTuple):
    """Which numbers a setting takes.

    Attributes:
        low: the least.
        high: the greatest; infinity itself is never taken.
        low_allowed: whether `low` is taken.
        whole: whether whole numbers alone are taken.
        whole_above_one: whether above 1 they are, as of GPUs, of which one alone can be shared.
        optional: whether None is taken.
    """

    low: float = 0
    high: float = math.inf
    low_allowed: bool = True
    whole: bool = False
    whole_above_one: bool = False
    optional: bool = False

    def allow(self, value: Any) -> bool:
        """Return whether the setting takes a value."""
        if value is None or isinstance(value, bool) or not isinstance(value, int | float):
            return value is None and self.optional
        if (self.whole and not isinstance(value, int)) or (
            self.whole_above_one and value > 1 and value % 1
        ):
            return False
        low_enough = value >= self.low if self.low_allowed else value > self.low
        return low_enough and value <= self.high and value != math.inf

    @property
    def limits(self) -> str:
        """The numbers taken, in words, as in ``from 0 to 1``."""
        if self.high != math.inf:
            return f"from {self.low} to {self.high}"
        least = f"{'at least' if self.low_allowed else 'greater than'} {self.low}"
        return f"{least}, and whole above 1" if self.whole_above_one else least


#: Of settings that are numbers, those which RLlib would not check, or not before a trial's
#: processes have started; by the names of a config's attributes, which are those of its arguments.
BOUNDS = {
    "lr": Bounds(low_allowed=False),
    "predictor_lr": Bounds(),
    "predictor_memory": Bounds(high=0.9999),
    "gamma": Bounds(high=1),
    "entropy_coeff": Bounds(),
    "grad_clip": Bounds(low_allowed=False, optional=True),
    "value_coeff": Bounds(),
    "seed": Bounds(high=MAX_SEED - 1, whole=True),
    "num_envs_per_env_runner": Bounds(1, whole=True),
    "num_env_runners": Bounds(whole=True),
    "num_learners": Bounds(whole=True),
    "num_gpus_per_learner": Bounds(whole_above_one=True),
    "num_gpus_per_env_runner": Bounds(whole_above_one=True),
    "total_updates": Bounds(1, whole=True, optional=True),
    "total_iterations": Bounds(1, whole=True, optional=True),
    "metrics_num_episodes_for_smoothing": Bounds(1, whole=True),
}

#: Of these, what may be a schedule too.
SCHEDULED = ("lr", "predictor_lr", "entropy_coeff")

#: What `Reinforce` and the parts of RLlib below it read, by the names of a config's attributes.
REINFORCE_READS = frozenset(
    """
    num_cpus_for_main_process custom_resources_for_main_process placement_strategy env
    env_config env_runner_cls num_env_runners num_envs_per_env_runner explore
    num_cpus_per_env_runner num_gpus_per_env_runner custom_resources_per_env_runner
    validate_env_runners_after_construction restart_failed_env_runners
    ignore_env_runner_failures num_learners num_cpus_per_learner num_gpus_per_learner
    custom_resources_per_learner local_gpu_idx _learner_class learner_config_dict lr
    predictor_lr predictor_optimizer predictor_memory gamma entropy_coeff grad_clip grad_clip_by
    normalize_returns two_phase baseline value_coeff total_updates total_iterations num_epochs
    minibatch_size
    algorithm_config_overrides_per_module _rl_module_spec _model_config seed log_level
    log_sys_usage logger_creator logger_config _validate_config _use_msgpack_checkpoints
    stats_cls_lookup evaluation_interval evaluation_duration evaluation_duration_unit
    evaluation_config evaluation_num_env_runners evaluation_sample_timeout_s
    evaluation_error_after_n_consecutive_skips callbacks_class callbacks_on_algorithm_init
    callbacks_on_train_result callbacks_on_evaluate_start callbacks_on_evaluate_end
    callbacks_on_checkpoint_loaded
    """.split()  # noqa: SIM905 (names by the hundred)
)
#: What RLlib's PPO, APPO and IMPALA do not read on the new API stack, beside `offline_data`,
#: `multi_agent` and all that is called "offline" as a whole.
STOCK_IGNORES = frozenset(
    """
    num_gpus _fake_gpus framework_str eager_tracing eager_max_retraces tf_session_args
    local_tf_session_args torch_compile_worker torch_compile_worker_dynamo_backend
    torch_compile_worker_dynamo_mode render_env clip_rewards disable_env_checking _is_atari
    action_mask_key observation_filter compress_observations use_worker_filter_stats
    update_worker_filter_stats exploration_config sample_collector remote_worker_envs
    remote_env_batch_wait_ms preprocessor_pref enable_tf1_exec_eagerly
    sampler_perf_stats_ema_coef model optimizer use_gae opt_type decay momentum epsilon
    _separate_vf_optimizer _lr_vf target_worker_clipping num_multi_gpu_tower_stacks
    minibatch_buffer_size replay_proportion replay_buffer_num_slots learner_queue_timeout
    timeout_s_aggregator_manager export_native_model_files checkpoint_trainable_policies_only
    fake_sampler extra_python_environs_for_driver extra_python_environs_for_worker
    keep_per_episode_custom_metrics off_policy_estimation_methods ope_split_batch_by_episode
    dataset_num_iters_per_eval_runner
    _tf_policy_handles_more_than_one_loss _disable_preprocessor_api _disable_action_flattening
    _disable_initialize_loss_from_dummy_batch _torch_lr_scheduler_classes
    evaluation_parallel_to_training
    """.split()  # noqa: SIM905 (names by the hundred)
)
#: Of an evaluation's own settings, what RLlib replaces by others.
REPLACED = frozenset(["num_env_runners", "rollout_fragment_length", "batch_mode"])
#: What an evaluation of `Reinforce` may set otherwise than training.
EVALUATION_READS = frozenset(
    """
    env env_config num_envs_per_env_runner explore num_cpus_per_env_runner
    num_gpus_per_env_runner custom_resources_per_env_runner seed
    """.split()  # noqa: SIM905 (names by the hundred)
)

_A_BATCH = "a batch is one whole episode of every environment, so set num_envs_per_env_runner"
_AN_ITERATION = "an iteration is one update, or what total_updates and total_iterations say"
#: What to do instead, where there is something.
ADVICE = {
    "train_batch_size": _A_BATCH,
    "train_batch_size_per_learner": _A_BATCH,
    "rollout_fragment_length": _A_BATCH,
    "batch_mode": _A_BATCH,
    "min_time_s_per_iteration": _AN_ITERATION,
    "min_train_timesteps_per_iteration": _AN_ITERATION,
    "min_sample_timesteps_per_iteration": _AN_ITERATION,
    "num_gpus": "set num_gpus_per_learner under learners",
    "framework": "the policies are in torch",
    "model": "the model has a place of its own (methods.NAME.model, in scripts rl_module)",
    "optimizer": "it is Adam, at lr and predictor_lr",
    "_torch_lr_scheduler_classes": "a schedule is a list under lr, as in [[0, 1e-3], [1e6, 1e-4]]",
    "use_gae": "advantages are always GAE's",
    "evaluation_parallel_to_training": "evaluations take place between iterations",
    "evaluation_duration": "give a number",
    "num_env_runners": "set evaluation_num_env_runners",
}


def check_numbers(config: AlgorithmConfig, names: Iterable[str] = tuple(BOUNDS)) -> None:
    """Check the settings of an algorithm's config that are numbers.

    Args:
        config: what is to run.
        names: those to check, of `BOUNDS`.

    Raises:
        ValueError: one is out of its bounds; one line that names it.
    """
    for name in names:
        value, bounds = getattr(config, name), BOUNDS[name]
        if name in SCHEDULED and isinstance(value, list | tuple):
            if not is_schedule(value) or not all(bounds.allow(number) for _, number in value):
                raise ValueError(
                    f"{name} must be a number, or [env_steps, number] pairs from step 0 on as in "
                    f"[[0, 1e-3], [1e6, 1e-4]], each number {bounds.limits}; got {value!r}"
                )
        elif not bounds.allow(value):
            kind = "a whole number" if bounds.whole else "a number"
            raise ValueError(f"{name} must be {kind} {bounds.limits}, got {value!r}")


def refuse_ignored(
    config: AlgorithmConfig, defaults: AlgorithmConfig, reads: Collection[str] | None = None
) -> None:
    """Check that every setting of an algorithm's config does something.

    Args:
        config: what is to run, on the new API stack.
        defaults: a config of the same algorithm as it is made.
        reads: attributes that the algorithm reads. Default: all but `STOCK_IGNORES` and those of
            the sections `offline_data` and `multi_agent`, and what is called "offline".

    Raises:
        ValueError: one does nothing; one line that names it and says what to do.
    """
    # RLlib makes the config of evaluations out of the one for training, which has been checked.
    if config.in_evaluation:
        return
    kind: Any = type(defaults)
    sections = setting_names(kind)
    if reads is None:
        unused = ("offline_data", "multi_agent")
        unread = {name for name in sections if sections[name][0] in unused or "offline" in name}
        unread |= STOCK_IGNORES
    else:
        unread = sections.keys() - reads
    for name, default in vars(defaults).items():
        if name in unread and name in sections and not _same(name, getattr(config, name), default):
            raise _does_nothing(config, *sections[name])
    if not config._validate_config:
        raise ValueError("experimental._validate_config must stay true: settings are checked")
    if config.evaluation_duration == "auto":
        raise ValueError(
            "evaluation_duration must be a number, got 'auto': evaluations take place between "
            "iterations"
        )
    for name, works, why in _conditions(config):
        changed = hasattr(defaults, name) and getattr(config, name) != getattr(defaults, name)
        if changed and not works():
            section, key = sections[name]
            raise ValueError(f"{section}.{key} does nothing {why}: leave it out")
    shuffles = config.shuffle_batch_per_epoch and not defaults.shuffle_batch_per_epoch
    if shuffles and config.num_epochs == 1:
        raise _does_nothing(config, "training", "shuffle_batch_per_epoch")
    if type(config.num_epochs) is not int or config.num_epochs < 1:
        raise ValueError(
            f"num_epochs must be a whole number of at least 1, got {config.num_epochs!r}"
        )
    if isinstance(config.evaluation_config, dict):
        for key in config.evaluation_config:
            name = AlgorithmConfig._translate_special_keys(key)
            if name in REPLACED or (
                name not in EVALUATION_READS
                if reads is not None
                else name in unread or not hasattr(defaults, name)
            ):
                raise _does_nothing(config, "evaluation_config", key)
    if config._rl_module_spec is None and isinstance(config._model_config, dict):
        # Reinforce learns from whole episodes.
        for key in ("vf_share_layers", *(["max_seq_len"] if reads is not None else [])):
            if key in config._model_config:
                raise _does_nothing(config, "model", key)


def _conditions(config: AlgorithmConfig) -> list[tuple[str, Callable[[], bool], str]]:
    """Settings that do something only beside others: name, whether it does, the reason if not."""
    connectors = (
        config._env_to_module_connector,
        config._module_to_env_connector,
        config._learner_connector,
    )
    baseline = config.get("baseline")
    return [
        (
            "train_batch_size",
            lambda: config._train_batch_size_per_learner is None,
            "beside train_batch_size_per_learner",
        ),
        ("grad_clip_by", lambda: config.grad_clip is not None, "without grad_clip"),
        ("value_coeff", lambda: baseline == "value_head", "without baseline: value_head"),
        ("episode_lookback_horizon", lambda: any(connectors), "without connectors that look back"),
        ("normalize_actions", lambda: _takes_numbers(config), "where actions are discrete"),
        ("clip_actions", lambda: _takes_numbers(config), "where actions are discrete"),
    ]


def _takes_numbers(config: AlgorithmConfig) -> bool:
    """Whether an environment takes real numbers as actions; one that is not known here may."""
    if config.env in ENVIRONMENTS:
        return False
    try:
        env = make_single(config.env, config.env_config)
    except ValueError:  # one that a script registered with RLlib alone
        return True
    env.close()
    return isinstance(env.action_space, gym.spaces.Box | gym.spaces.Tuple)


def _does_nothing(config: AlgorithmConfig, section: str, key: str) -> ValueError:
    advice = f" ({ADVICE[key]})" if key in ADVICE else ""
    algorithm = config.algo_class.__name__
    return ValueError(f"{section}.{key} does nothing under {algorithm}{advice}: leave it out")


def _same(name: str, value: Any, default: Any) -> bool:
    if name == "policies":  # those of a checkpoint are described in another way
        return set(value) == {DEFAULT_POLICY_ID}
    return value is default or bool(value == default)


@functools.cache
def setting_names(kind: Any) -> dict[str, tuple[str, str]]:
    """The section and the argument that set an attribute of a config, by the attribute's name."""
    found = {}
    for base in kind.__mro__:
        for section, function in vars(base).items():
            if section.startswith("_") or not inspect.isfunction(function):
                continue
            for argument, parameter in inspect.signature(function).parameters.items():
                if type(parameter.default).__name__ == "_NotProvided":
                    for name in ("{}", "_{}", "callbacks_{}", "{}_str"):
                        found[name.format(argument)] = (section, argument)
    return found


def silence_notes(config: AlgorithmConfig) -> None:
    """Keep RLlib from logging that the API stack is new, and a deprecation of its own."""
    log_once(f"{config.algo_class.__name__}_on_new_api_stack")
    log_once("RLModule(config=[RLModuleConfig object])")
