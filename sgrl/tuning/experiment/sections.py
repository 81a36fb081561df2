"""The sections of `config`: methods of RLlib's AlgorithmConfig, and their arguments as keys."""

import functools
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from sgrl.annotations import MAPPING, accepts, in_words
from sgrl.results.plan import Problem, TrialConfig
from sgrl.tuning.experiment.file import check_known, unknown_key


def algorithm_class(name: str) -> Any:
    """Return the Algorithm subclass of that name: Reinforce, or one of `sgrl.rllib.stock`.

    Raises:
        Problem: no algorithm of that name trains these policies.
    """
    from ray.rllib.algorithms.registry import ALGORITHMS

    from sgrl.rllib.algorithm import Reinforce
    from sgrl.rllib.stock import STOCK_ALGORITHMS

    # RLlib greets every stock configuration with a warning about its new API stack.
    logging.getLogger("ray.rllib").setLevel(logging.ERROR)

    known: dict[str, Any] = {"Reinforce": Reinforce, **STOCK_ALGORITHMS}
    check_known("algorithm", "algorithm", name, [*known, *ALGORITHMS])
    if name not in known:
        raise Problem(
            "algorithm", f"{name} does not train these policies here; use {', '.join(known)}"
        )
    return known[name]


def config_class_of(algorithm: str) -> Any:
    """Return the AlgorithmConfig subclass of an algorithm; raises as `algorithm_class`."""
    return algorithm_class(algorithm).config_class


def build_algorithm_config(trial: TrialConfig) -> Any:
    """Return the AlgorithmConfig of one trial, with the policy's RLModule in place.

    Algorithms other than Reinforce get a policy with a value head unless its settings say no.
    """
    from sgrl.rllib import register_environment

    config = algorithm_class(trial.algorithm).get_default_config()
    # A trial holds as many CPUs as it computes with.
    config.resources(num_cpus_for_main_process=trial.num_threads)
    for section, arguments in trial.sections.items():
        getattr(config, section)(**arguments)
    if trial.algorithm != "Reinforce":
        register_environment(config.env)
    config.rl_module(model_config=dict(trial.model))
    return config.debugging(seed=trial.seed)


def section_problems(
    config_class: Any, sections: Any, places: Callable[[], Mapping[str, str]]
) -> Iterator[Problem]:
    """Yield what is wrong with the sections of a configuration.

    That is unknown keys, and values of the wrong type or out of bounds.

    Args:
        config_class: of the algorithm.
        sections: what is checked.
        places: tells where keys stand that may have been meant.
    """
    from sgrl.rllib.settings import BOUNDS

    known = section_names(config_class)
    for section, given in sections.items():
        key = f"config.{section}"
        if section == "api_stack":
            yield Problem(key, "experiments run on RLlib's new API stack")
        elif section == "rl_module":
            yield Problem(key, "the model belongs under methods.<name>.model")
        elif section not in known:
            yield Problem(key, unknown_key(section, known, "section", places))
        elif not isinstance(given, dict):
            yield Problem(key, f"expected {MAPPING}, got {given!r}")
        else:
            arguments = section_arguments(config_class, section)
            for name, value in given.items():
                place = f"{key}.{name}"
                if name not in arguments:
                    yield Problem(place, unknown_key(name, list(arguments), places=places))
                elif place == "config.debugging.seed":
                    yield Problem(place, "seeds belong under 'seeds'")
                elif not accepts(arguments[name], value):
                    expected = in_words(arguments[name])
                    yield Problem(place, f"expected {expected}, got {value!r}")
                elif name in BOUNDS and accepts(float, value) and not BOUNDS[name].allow(value):
                    yield Problem(place, f"must be {BOUNDS[name].limits}, got {value}")


@functools.cache
def places_in(config_class: Any) -> dict[str, str]:
    """Return where in an experiment each argument of an algorithm's configuration stands."""
    order = ["environment", "env_runners", "training", "learners"]
    sections = section_names(config_class)
    others = [section for section in sections if section not in (*order, "api_stack")]
    places: dict[str, str] = {}
    for section in [*order, *others]:
        for name in section_arguments(config_class, section):
            places.setdefault(name, f"config.{section}.{name}")
    return places


@functools.cache
def section_names(config_class: Any) -> list[str]:
    """Return the methods that return the configuration itself and take only optional arguments."""
    names = []
    for name, function in inspect.getmembers(config_class, inspect.isfunction):
        parameters = inspect.signature(function).parameters.values()
        if not name.startswith("_") and any(
            type(parameter.default).__name__ == "_NotProvided" for parameter in parameters
        ):
            names.append(name)
    return names


@functools.cache
def section_arguments(config_class: Any, section: str) -> dict[str, Any]:
    """Return keyword arguments and their annotations.

    A subclass's `training(**kwargs)` takes its base's too. RLlib's retired arguments are the ones
    without annotation.
    """
    arguments: dict[str, Any] = {}
    for base in config_class.__mro__:
        function = vars(base).get(section)
        if function is None:
            continue
        try:
            signature = inspect.signature(function, eval_str=True)
        except NameError:
            signature = inspect.signature(function)
        for name, parameter in signature.parameters.items():
            if parameter.annotation is not parameter.empty:
                arguments.setdefault(name, parameter.annotation)
    if arguments.get("entropy_coeff") == float | None:
        # RLlib's PPO annotates it as a number and takes schedules, as it does for lr.
        arguments["entropy_coeff"] = arguments["lr"]
    for name, kind in arguments.items():
        if name.startswith("num_cpus"):
            # RLlib annotates these as whole numbers and takes fractions.
            arguments[name] = float | str if "str" in str(kind) else float
    return {name: kind for name, kind in arguments.items() if name not in ("self", "kwargs")}
