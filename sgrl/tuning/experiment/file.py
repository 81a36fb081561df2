"""The keys of an experiment file as pydantic models, and pydantic's errors in our words."""

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SkipValidation, ValidationError

from sgrl.annotations import MAPPING
from sgrl.names import did_you_mean, is_close, nearest
from sgrl.results.grids import repeated
from sgrl.results.plan import Checkpointing, Evaluating, Problem, TrialConfig, expand_range

TRACKERS = ("none", "tensorboard", "wandb", "mlflow")
#: Tune's, by its own names for them.
SEARCHERS = (
    *("random", "optuna", "ax", "bayesopt", "bohb", "hebo", "hyperopt", "nevergrad", "zoopt"),
)
JUDGES = ("mean", "iqm")


# Values ---------------------------------------------------------------------------------------


def check_name(name: Any) -> Any:
    """Raise ValueError unless it can be a folder: letters, digits and ``_ . + -``."""
    if not isinstance(name, str):
        quotes = f": put it in quotes, as in '{name}'" if isinstance(name, int | float) else ""
        raise ValueError(f"{name!r} is no safe name, which is text{quotes}")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,99}", name):
        rule = "start with a letter or digit and hold only letters, digits, '_', '.', '+', '-'"
        raise ValueError(f"{name!r} is no safe name: it must {rule}")
    return name


def check_known(key: str, kind: str, name: Any, names: Sequence[str]) -> Any:
    """Return a key's value; raise Problem unless it is one of the names."""
    if not isinstance(name, str):
        raise Problem(key, f"expected the {kind}'s name, got {name!r}")
    if name not in names:
        raise Problem(key, f"unknown {kind} {name!r}; {did_you_mean(name, names)}")
    return name


def _check_count(trials: Any) -> Any:
    if trials != "auto" and type(trials) is not int:
        raise ValueError(f"expected auto or a whole number, got {trials!r}")
    if trials != "auto" and trials < 1:
        raise ValueError(f"must be at least 1, got {trials}")
    return trials


def _check_callbacks(name: Any) -> Any:
    from sgrl.tuning.trial_callbacks import callbacks_class

    callbacks_class(name)
    return name


def _check_seeds(seeds: Any) -> Any:
    from sgrl.reinforce.rollout import MAX_SEED

    expanded = expand_range(seeds)
    if not isinstance(expanded, list):
        raise ValueError(f"expected a list, got {seeds!r}; write [0, 1, 2] or 0..2")
    if message := repeated(expanded):
        raise ValueError(message)
    for seed in expanded:
        if isinstance(seed, int) and seed >= MAX_SEED:
            raise ValueError(f"must be less than {MAX_SEED}, got {seed}")
    return expanded


Name = Annotated[str, BeforeValidator(check_name)]
Positive = Annotated[int, Field(ge=1)]


# The file -------------------------------------------------------------------------------------


class _Keys(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class StopKeys(_Keys):
    """The keys of `sgrl.results.plan.Stop`, at a grid point."""

    training_iteration: Positive
    env_steps: Positive | None = None
    episode_return_mean: float | None = None
    hours: Annotated[float, Field(gt=0)] | None = None


class CheckpointKeys(_Keys):
    """The keys of `sgrl.results.plan.Checkpointing`."""

    every: Positive = Checkpointing.every
    keep: Positive = Checkpointing.keep


class EvaluateKeys(_Keys):
    """The keys of `sgrl.results.plan.Evaluating`."""

    every: Positive = Evaluating.every
    episodes: Positive = Evaluating.episodes


class SearchKeys(_Keys):
    """A search for good values.

    Attributes:
        name: random, optuna, or another of Tune's searchers.
        num_samples: how many configurations are suggested, for each method at each grid point.
        metric: what is searched for: a column of metrics.csv, its mean over the last five values.
        mode: max or min.
        judge: of the seeds' scores, by which a configuration is judged: mean or iqm.
        seed: of the searcher.
        concurrent: configurations suggested at a time, before results of any of them are known;
            by default at most 4, and all of a random search.
        arguments: the searcher's own.
    """

    name: Annotated[
        str, BeforeValidator(lambda n: check_known("search.name", "searcher", n, SEARCHERS))
    ]
    num_samples: Positive
    metric: Annotated[str, SkipValidation] = "success_rate"
    mode: Annotated[str, SkipValidation] = "max"
    judge: Annotated[
        str, BeforeValidator(lambda n: check_known("search.judge", "judge", n, JUDGES))
    ] = "mean"
    seed: Annotated[int, Field(ge=0)] = 0
    concurrent: Positive | None = None
    arguments: dict[str, Any] = {}


class Method(_Keys):
    """A model of the comparison.

    Attributes:
        model: the policy's name and settings.
        config: what this method sets otherwise than the experiment's `config`.
    """

    model: dict[str, Any]
    config: dict[str, Any] | None = None


class ExperimentFile(_Keys):
    """An experiment file.

    `config`, `stop` and a method's `model` and `config` may hold grids, so what is in them is
    checked at each grid point.

    Attributes:
        name: of the experiment, and of its results folder.
        algorithm: Reinforce, or RLlib's PPO, APPO or IMPALA.
        config: sections of RLlib's AlgorithmConfig and their arguments, of all methods.
        methods: the models compared side by side, by their names.
        seeds: one trial each, of every method at every grid point; a list, or a range as in 0..5.
        stop: when a trial is complete.
        search: for values in the place of distributions such as {loguniform: [1e-4, 1e-2]}.
        schedule: what decides meanwhile which trials are trained on; null is nothing.
        checkpoint: what an interrupted trial goes on from.
        evaluate: evaluations apart from training; null is none.
        max_failures: restarts of a trial without a new checkpoint in between.
        iteration_timeout: seconds after which an iteration counts as hung; null is never.
        num_threads: torch threads of one trial.
        concurrency: trials at a time; auto is as many as fit.
        pack: how many trials that differ in seed and numbers only are trained as one, on a GPU;
            auto is as many as fill it; null is each by itself.
        track: where else the curves go: none, tensorboard, wandb or mlflow.
        callbacks: a class of your own that follows each trial, as in my_package:MyCallbacks.
    """

    name: Name
    algorithm: Annotated[str, SkipValidation] = "Reinforce"
    config: dict[str, Any] = {}
    methods: Annotated[dict[Name, Method], Field(min_length=1)]
    seeds: Annotated[list[Annotated[int, Field(ge=0)]], BeforeValidator(_check_seeds)] = [0]
    stop: dict[str, Any]
    search: SearchKeys | None = None
    schedule: dict[str, Any] | None = None
    checkpoint: CheckpointKeys = CheckpointKeys()
    evaluate: EvaluateKeys | None = None
    max_failures: Annotated[int, Field(ge=0)] = TrialConfig.max_failures
    iteration_timeout: Annotated[float, Field(gt=0, le=1e9)] | None = TrialConfig.iteration_timeout
    num_threads: Positive = TrialConfig.num_threads
    concurrency: Annotated[int | str, BeforeValidator(_check_count)] = "auto"
    pack: Annotated[int | str, BeforeValidator(_check_count)] | None = None
    track: Annotated[
        str, BeforeValidator(lambda n: check_known("track", "tracker", n, TRACKERS))
    ] = "none"
    callbacks: Annotated[str, BeforeValidator(_check_callbacks)] | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain YAML holds it, every default written out."""
        content = self.model_dump(warnings=False)
        for method in content["methods"].values():
            if method["config"] is None:
                del method["config"]
        for key in ("search", "schedule", "pack"):
            if content[key] is None:
                del content[key]
        return content


def validate_file(
    content: Mapping[str, Any], places: Callable[[], Mapping[str, str]]
) -> tuple[ExperimentFile | None, list[Problem]]:
    """Check the keys of an experiment file.

    Args:
        content: of the file.
        places: tells where the arguments of an AlgorithmConfig stand, which may have been meant.

    Returns:
        The experiment, and what is wrong with it. What is wrong is then at its default, so that
        the rest can be checked; None where too little is left for that.
    """
    content = {key: value for key, value in content.items() if value is not None}
    try:
        return ExperimentFile.model_validate(content), []
    except ValidationError as error:
        problems = list(_problems(content, error, places))
        sound = _sound_part(content, error)
    try:
        return ExperimentFile.model_validate(sound), problems
    except ValidationError:
        return None, problems


def _sound_part(content: Mapping[str, Any], error: ValidationError) -> dict[str, Any]:
    """The content without the keys that have errors."""
    sound: dict[Any, Any] = copy.deepcopy(dict(content))
    for key, *inner in (detail["loc"] for detail in error.errors(include_url=False)):
        if key == "methods" and inner:
            sound["methods"].pop(inner[0], None)
        else:
            sound.pop(key, None)
    return {"name": "unnamed", "stop": {"training_iteration": 1}, **sound}


def stop_problems(stop: Any) -> list[Problem]:
    """Return what is wrong with the `stop` of a grid point."""
    try:
        StopKeys.model_validate(stop)
    except ValidationError as error:
        return list(_problems({"stop": stop}, error, dict, ("stop",)))
    return []


# Pydantic's errors in our words ---------------------------------------------------------------

#: Keys as RLlib used to call them, or other libraries do.
ALIASES = {
    alias: name
    for name, aliases in {
        "clip_param": "clip_range",
        "concurrency": "jobs n_jobs num_jobs",
        "entropy_coeff": "ent_coef entropy_coef entropy_cost",
        "env": "env_id env_name environment_id",
        "gamma": "discount",
        "grad_clip": "gradient_clip max_grad_norm",
        "lambda_": "gae_lambda lambda",
        "lr": "learning_rate",
        "minibatch_size": "sgd_minibatch_size",
        "num_env_runners": "num_rollout_workers num_workers",
        "num_envs_per_env_runner": "n_envs num_envs num_envs_per_worker",
        "num_epochs": "n_epochs num_sgd_iter",
        "train_batch_size_per_learner": "batch_size train_batch_size",
        "training_iteration": "iterations num_iterations",
        "vf_loss_coeff": "vf_coef",
    }.items()
    for alias in aliases.split()
}
#: What was expected, by the kind of pydantic's error.
EXPECTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "string_type": "text",
    "list_type": "a list",
    "dict_type": MAPPING,
    "model_type": MAPPING,
}
LIMITS = {
    "greater_than_equal": "at least {ge:g}",
    "greater_than": "greater than {gt:g}",
    "less_than_equal": "at most {le:g}",
}
OTHERS = {
    "missing": "missing",
    "invalid_key": "keys must be text; put it in quotes",
    "too_short": "empty; name at least one method",
}


def unknown_key(
    key: Any,
    names: Sequence[str],
    kind: str = "key",
    places: Callable[[], Mapping[str, str]] = dict,
) -> str:
    """Return what to say of a key that is not known.

    Args:
        key: the key.
        names: those that are known where it stands.
        kind: what they are.
        places: tells where other keys stand that may have been meant.
    """
    if not isinstance(key, str):
        return "keys must be text; put it in quotes"
    meant = ALIASES.get(key, key)
    if meant not in names:
        elsewhere = places()
        if meant not in elsewhere:
            alike = nearest(key, [*names, *elsewhere, *ALIASES])
            if alike not in names and is_close(key, alike, cutoff=0.8):
                meant = ALIASES.get(alike, alike)
        meant = elsewhere.get(meant, meant)
    hint = did_you_mean(key, names) if meant == key else f"did you mean {meant!r}?"
    return f"unknown {kind}; {hint}"


def _problems(
    content: Mapping[str, Any],
    error: ValidationError,
    places: Callable[[], Mapping[str, str]],
    section: tuple[str, ...] = (),
) -> Iterator[Problem]:
    """Pydantic's errors about the content of a file, or of one of its sections."""
    models: dict[str, type[_Keys]] = {
        "stop": StopKeys,
        "checkpoint": CheckpointKeys,
        "evaluate": EvaluateKeys,
        "search": SearchKeys,
    }
    details = [(d, (*section, *d["loc"])) for d in error.errors(include_url=False)]
    meant = set()
    for detail, loc in details:
        key = _key(content, detail, loc)
        if detail["type"] == "extra_forbidden":
            model: type[_Keys] = models.get(str(loc[0]), Method) if len(loc) > 1 else ExperimentFile
            names = list(model.model_fields)
            meant.add(".".join([*key.split(".")[:-1], nearest(loc[-1], names)]))
            yield Problem(key, unknown_key(loc[-1], names, places=places))
    for detail, loc in details:
        key, kind, value = _key(content, detail, loc), detail["type"], detail["input"]
        if kind == "string_type" and loc[-1] == "[key]":
            kind = "invalid_key"
        if kind == "value_error":
            yield Problem(key, str(detail["ctx"]["error"]))
        elif kind in EXPECTED:
            yield Problem(key, f"expected {EXPECTED[kind]}, got {value!r}")
        elif kind in LIMITS:
            yield Problem(key, f"must be {LIMITS[kind].format(**detail['ctx'])}, got {value}")
        elif kind != "extra_forbidden" and key not in meant:  # one that is meant is misspelled
            yield Problem(key, OTHERS.get(kind, detail["msg"]))


def _key(content: Any, detail: Mapping[str, Any], loc: Sequence[Any]) -> str:
    """The key of an error, without places in lists and pydantic's own marks."""
    steps = []
    for step in loc:
        if isinstance(content, dict):
            if step in content or detail["type"] == "missing":
                steps.append(str(step))
            content = content.get(step)
    if loc[-1] == "[key]":
        steps[-1] = str(detail["input"])
    return ".".join(steps)
