"""What the trials of an experiment need of the machines they run on."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from sgrl.results.plan import ExperimentError, Problem, Trial, TrialConfig
from sgrl.tuning.experiment.load import Experiment
from sgrl.tuning.experiment.method import asks_for_gpus
from sgrl.tuning.experiment.sections import algorithm_class, build_algorithm_config
from sgrl.user_code import module_of

#: Sections of the keys that say in which processes a trial computes.
PROCESSES = {
    "num_env_runners": "env_runners",
    "num_cpus_per_env_runner": "env_runners",
    "num_gpus_per_env_runner": "env_runners",
    "num_learners": "learners",
    "num_cpus_per_learner": "learners",
    "num_gpus_per_learner": "learners",
}


def user_modules(experiment: Experiment) -> list[str]:
    """Return the modules that the experiment's environments and the user's own parts are in."""
    return list(dict.fromkeys(m for t in experiment.examples for m in modules_of(t.config)))


def modules_of(trial: TrialConfig) -> list[str]:
    """Return the modules that a trial's environment and the user's own parts are in."""
    names = [trial.sections["environment"]["env"], trial.callbacks]
    names += [trial.model.get(key) for key in ("policy", "mixing_rule")]
    return [module for name in names if (module := module_of(name)) is not None]


def resource_request(trial: Trial) -> Any:
    """Return what one trial asks Ray for, its placement group."""
    config = build_algorithm_config(trial.config)
    return config.algo_class.default_resource_request(config)


def required_resources(trial: Trial) -> dict[str, float]:
    """Return what one trial holds while it runs, summed over its processes.

    As in ``{"CPU": 1.0, "GPU": 0.0}``, and any custom resource.
    """
    return {"CPU": 0.0, "GPU": 0.0, **resource_request(trial).required_resources}


def check_resources(
    experiment: Experiment, available: Mapping[str, float], resuming: bool = False
) -> None:
    """Check that no trial alone asks for more than there is: Ray would wait for ever.

    Args:
        experiment: what is to run.
        available: what there is, as in `required_resources`.
        resuming: whether its trials have been trained already.

    Raises:
        ExperimentError: one does.
    """
    for trial in experiment.first_examples:
        for resource, needed in required_resources(trial).items():
            present = available.get(resource, 0.0)
            if needed > present:
                advice = (
                    "lower num_threads, or num_env_runners, num_learners or "
                    f"num_{resource.lower()}s_per_... under config.env_runners and config.learners"
                )
                if resuming:
                    advice = "resume it where there are as many (--address joins a cluster)"
                    before, keys = trial.config, ["num_env_runners", "num_learners"]
                    if resource == "GPU":
                        keys = ["num_gpus_per_env_runner", "num_gpus_per_learner"]
                    lower = processes_of(before) | dict.fromkeys(keys, 0)
                    if lower != processes_of(before) and may_move(
                        before, _with_processes(before, lower)
                    ):
                        advice += f", or set {' and '.join(keys)} to 0 in that file"
                message = f"needs {needed:g} {resource}s and there are {present:g}; {advice}"
                raise _refused(experiment, f"trial {trial.name} {message}")


def check_backends(experiment: Experiment) -> None:
    """Check that compiled code which a trial names can run: with a compiler, and not on GPUs.

    Raises:
        ExperimentError: it cannot.
    """
    from sgrl.nn.kernels import native
    from sgrl.rllib.module import DTYPES

    for trial in experiment.examples:
        model = trial.config.model
        if model.get("backend") != "native":
            continue
        reason = native.unavailable(DTYPES[model.get("dtype", "float32")])
        if asks_for_gpus(trial.config.sections):
            reason = "it runs on CPUs, and the trial asks for GPUs; leave it at auto"
        if reason is not None:
            raise _refused(experiment, f"backend native of trial {trial.name} cannot run: {reason}")


def _refused(experiment: Experiment, message: str) -> ExperimentError:
    return ExperimentError(experiment.path, [Problem("", message)])


def may_move(before: TrialConfig, after: TrialConfig) -> bool:
    """Return whether a trial may go on with other sections.

    Only its processes may differ, and the environments that each runner of `Reinforce` holds stay
    what they are.
    """
    runners, learners = (
        [processes_of(trial)[key] for trial in (before, after)]
        for key in ("num_env_runners", "num_learners")
    )
    if before.algorithm == "Reinforce" and runners[0] != runners[1] and max(runners) > 1:
        return False
    processes = processes_of(after)
    same = _with_processes(before, processes).sections == _with_processes(after, processes).sections
    return max(learners) <= 1 and same


def processes_of(trial: TrialConfig) -> dict[str, Any]:
    """Return where a trial computes, by the keys of `PROCESSES`."""
    defaults = algorithm_class(trial.algorithm).get_default_config()
    return {
        key: trial.sections.get(section, {}).get(key, getattr(defaults, key))
        for key, section in PROCESSES.items()
    }


def _with_processes(trial: TrialConfig, processes: Mapping[str, Any]) -> TrialConfig:
    sections = {section: dict(arguments) for section, arguments in trial.sections.items()}
    for key, section in PROCESSES.items():
        sections.setdefault(section, {})[key] = processes[key]
    return dataclasses.replace(trial, sections=sections)
