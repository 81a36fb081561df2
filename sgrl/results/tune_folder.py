"""Experiment folders of Tune's own, as a script with a `Tuner` leaves them, read as results.

Tune writes into each trial's folder its configuration and what each iteration returned, appended
line by line: lines may be torn or repeated after a kill. `unpack` makes of that a results folder of
the usual kind. Folders that `sgrl.tuning.callback` has written to are of that kind already.
"""

import contextlib
import csv
import itertools
import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sgrl.files import read_json, write_text
from sgrl.results.folder import SweepFolder, TrialFolder
from sgrl.results.grids import label, leaves_of, put, short_names
from sgrl.results.metrics import Row, is_taken, write_rows
from sgrl.results.rllib_metrics import metrics_row
from sgrl.yaml_files import dump_yaml

PARAMETERS_FILE, ROWS_FILE, TABLE_FILE = "params.json", "result.json", "progress.csv"
STATE_FILES = "experiment_state-*.json"
#: Sections of AlgorithmConfig, and what config.yaml always says of them; else what differs.
SECTIONS = {
    "environment": ("env", "env_config"),
    "env_runners": ("num_env_runners", "num_envs_per_env_runner"),
    "learners": ("num_learners",),
    "training": (
        *("lr", "predictor_lr", "gamma", "entropy_coeff", "grad_clip"),
        *("train_batch_size", "train_batch_size_per_learner", "total_updates", "total_iterations"),
    ),
}
#: How an experiment of Tune's goes on.
RESTORE = "run its script again, with Tuner.restore (docs/tune.md)"
SECTION_OF = {key: section for section, keys in SECTIONS.items() for key in keys}
#: How the old API stack calls the models of `sgrl.rllib.recurrent_network`.
PREFIX = "sgrl_"

Leaves = dict[tuple[str, ...], Any]


class TuneTrial(NamedTuple):
    """A trial as Tune knows it.

    Attributes:
        algorithm: the name it is registered by; empty where that is not known.
        config: of the algorithm, a plain dict by the names of RLlib's settings.
        stop: when it ends, by the names of results.
    """

    algorithm: str
    config: Mapping[str, Any]
    stop: Mapping[str, Any] = {}

    @property
    def last_iteration(self) -> int:
        """When it is complete; 0 where something else says so."""
        return int(self.stop.get("training_iteration", 0)) if len(self.stop) == 1 else 0


def describe_trials(trials: Mapping[str, TuneTrial]) -> dict[str, dict[str, Any]]:
    """What config.yaml is to say of each trial.

    A method is a policy, and the settings of its model that are words and differ between its
    trials, as in sparsenet_sgprop; everything else that differs is swept.

    Args:
        trials: all there are, by the names of their folders.
    """
    leaves = {name: _leaves(trial.config) for name, trial in trials.items()}
    policies = {name: _policy(trial, leaves[name]) for name, trial in trials.items()}
    described: dict[str, dict[str, Any]] = {}
    for policy in dict.fromkeys(policies.values()):
        group = {name: leaves[name] for name in trials if policies[name] == policy}
        differing = _differing(group.values())
        method, swept = _named(policy, differing, group)
        for name, own in group.items():
            sections: dict[str, dict[str, Any]] = {}
            for (first, key, *inner), value in own.items():
                if first == "config" and (key in SECTION_OF or (first, key, *inner) in differing):
                    put(sections, [SECTION_OF.get(key, "training"), key, *inner], value)
            described[name] = {
                "name": name,
                "swept": swept[name],
                "algorithm": trials[name].algorithm.removeprefix(PREFIX),
                "method": method[name],
                "seed": own.get(("config", "seed")),
                "config": sections,
                "model": {path[1]: value for path, value in own.items() if path[0] == "model"},
                "stop": {"training_iteration": trials[name].last_iteration},
            }
    for point in _points(described.values()):
        for number, content in enumerate(point):
            if content["seed"] is None:  # repeated without one
                content["seed"] = number
    return {name: described[name] for name in trials}


def name_trial(trial: TuneTrial, evaluated: Mapping[str, Any]) -> str:
    """A short name of a trial, as a sweep would give it.

    Args:
        trial: which one.
        evaluated: what its search space left open, keys as in "env_config/maze_dims".
    """
    config: dict[str, Any] = {}
    for path, value in evaluated.items():
        put(config, path.split("/"), value)
    leaves, whole = _leaves(config), _leaves(trial.config)
    methods, swept = _named(_policy(trial, whole), list(leaves), {"": leaves})
    seed = whole.get(("config", "seed"))
    words = [methods[""], *(f"{key}={label(value)}" for key, value in swept[""].items())]
    return "_".join([*words, *([] if seed is None else [f"seed={seed}"])])


def _leaves(config: Mapping[str, Any]) -> Leaves:
    """A configuration's values: those of the model below "model", all others below "config"."""
    config = {key.lstrip("_"): value for key, value in config.items()}
    model = dict(config.get("model_config") or {})
    old = config.get("model") or {}
    if str(old.get("custom_model") or "").startswith(PREFIX):
        name = old["custom_model"].removeprefix(PREFIX)
        model = {"policy": name, **(old.get("custom_model_config") or {})}
        config["model"] = {
            k: v for k, v in old.items() if k not in ("custom_model", "custom_model_config")
        }
    rest = {k: v for k, v in config.items() if k != "model_config" and v not in (None, {})}
    return {
        **{("model", key): _plain(value) for key, value in model.items()},
        **{("config", *path): _plain(value) for path, value in leaves_of(rest)},
    }


def _plain(value: Any) -> Any:
    """A value as YAML holds it; objects without what tells equal ones apart."""
    if isinstance(value, bool | int | float):
        return value
    return json.loads(re.sub(r" at 0x[0-9a-f]+", "", json.dumps(value, default=str)))


def _policy(trial: TuneTrial, leaves: Leaves) -> str:
    return str(leaves.get(("model", "policy"), trial.algorithm or "unknown"))


def _differing(group: Iterable[Leaves]) -> list[tuple[str, ...]]:
    """The paths at which trials differ."""
    members = list(group)
    paths = dict.fromkeys(path for leaves in members for path in leaves)
    return [path for path in paths if len({repr(leaves.get(path)) for leaves in members}) > 1]


def _named(
    policy: str, open_: Iterable[tuple[str, ...]], group: Mapping[str, Leaves]
) -> tuple[dict[str, str], dict[str, dict[str, Any]]]:
    """Method and swept values of each trial, from the paths that are open between them."""
    paths = [path for path in open_ if path not in {("config", "seed"), ("model", "policy")}]
    words = [
        path
        for path in paths
        if path[0] == "model"
        and all(isinstance(leaves.get(path, ""), str) for leaves in group.values())
    ]
    short = short_names([path for path in paths if path not in words], is_taken)
    methods = {
        name: "_".join([policy, *(leaves[path] for path in words if path in leaves)])
        for name, leaves in group.items()
    }
    swept = {
        name: {column: leaves[path] for path, column in short.items() if path in leaves}
        for name, leaves in group.items()
    }
    return methods, swept


def _points(described: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """The trials of each method at each swept point."""

    def point(content: dict[str, Any]) -> tuple[str, str]:
        return content["method"], repr(content["swept"])

    for _, members in itertools.groupby(sorted(described, key=point), key=point):
        yield list(members)


# Reading --------------------------------------------------------------------------------------


def is_of_tuner(folder: str | Path) -> bool:
    """Whether a script's `Tuner` made a folder, with `ResultsCallback` or without."""
    folder = Path(folder)
    return not SweepFolder(folder).experiment.is_file() and any(folder.glob(STATE_FILES))


def is_tune_folder(location: str | Path) -> bool:
    """Whether a folder is an experiment of Tune's with trials that are not as sweeps write them."""
    folder = Path(location)
    if SweepFolder(folder).experiment.is_file():
        return False
    found = (TrialFolder(path.parent) for path in folder.glob(f"*/{PARAMETERS_FILE}"))
    return any(not trial.config.is_file() for trial in found)


def unpack(experiment: Path, folder: Path) -> None:
    """Make a results folder out of an experiment of Tune's, as far as its files go.

    A trial whose last row says that it is done is completed, or where it was to train on, stopped;
    one that left an error has failed.

    Args:
        experiment: the folder that Tune wrote.
        folder: a new one.
    """
    known = _read_state(experiment)
    trials, results = {}, {}
    for path in sorted(experiment.glob(f"*/{PARAMETERS_FILE}")):
        params = read_json(path)
        if isinstance(params, dict):
            name = path.parent.name
            results[name] = list(_read_results(path.parent, params))
            algorithm, stop = known.get(name, ("", {}))
            trials[name] = TuneTrial(algorithm, params, stop)
    folder.mkdir(parents=True)
    for name, content in describe_trials(trials).items():
        trial, left = SweepFolder(folder).trial(name), TrialFolder(experiment / name)
        trial.path.mkdir()
        if left.config.is_file():  # the callback was there, but not from the beginning
            for file in filter(Path.is_file, left.reports):
                shutil.copyfile(file, trial.path / file.name)
            continue
        rows = _rows(results[name])
        lost = results[name] and not rows
        notes = ["the rows of its first iterations are lost, and with them all"] if lost else []
        done = bool(results[name]) and results[name][-1].get("done") is True
        state = state_of(done, len(rows), trials[name])
        if state != "completed" and left.error.is_file():
            text = left.error.read_text(encoding="utf-8", errors="replace")
            reason = (text.strip().splitlines() or [""])[-1]
            write_text(trial.error, text)
            trial.write_status(state="failed", reason=reason, notes=notes)
        else:
            trial.write_status(state=state, notes=notes)
        if state == "completed" and not content["stop"]["training_iteration"]:
            content["stop"]["training_iteration"] = len(rows)
        write_text(trial.config, dump_yaml(content))
        write_rows(trial.metrics, rows)


def state_of(done: bool, iterations: int, trial: TuneTrial) -> str:
    """The state of a trial that is not running.

    Completed only if nothing cut it short; what ended before it was to was stopped by a scheduler.
    """
    if not done:
        return "interrupted"
    return "completed" if iterations >= trial.last_iteration else "stopped"


def _read_state(experiment: Path) -> dict[str, tuple[str, dict[str, Any]]]:
    """Algorithm and stop of each trial, by folder, from the newest of Tune's own snapshots."""
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for path in sorted(experiment.glob(STATE_FILES)):
        with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError):
            for trial, *_ in (read_json(path) or {})["trial_data"]:
                state = json.loads(trial)
                stop = state["stopping_criterion"]
                found[state["relative_logdir"]] = (state["trainable_name"], stop)
    return found


def _read_results(trial: Path, params: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """What each iteration returned, as far as lines are whole."""
    rows, table = trial / ROWS_FILE, trial / TABLE_FILE
    if rows.is_file():
        for line in rows.read_text(encoding="utf-8", errors="replace").split("\n"):
            with contextlib.suppress(ValueError):
                result = json.loads(line)
                if isinstance(result, dict) and "training_iteration" in result:
                    yield result
    elif table.is_file():
        text = table.read_text(encoding="utf-8", errors="replace")
        whole = text[: text.rfind("\n") + 1].splitlines()
        for fields in csv.DictReader(whole):
            with contextlib.suppress(ValueError, TypeError, KeyError):
                yield {"config": params, **_nested(fields)}


def _nested(fields: Mapping[str, str]) -> dict[str, Any]:
    """A line of Tune's table as the result that it was."""
    if None in fields or None in fields.values():
        raise ValueError("a torn line")
    result: dict[str, Any] = {}
    truths = {"True": True, "False": False}
    for path, text in fields.items():
        with contextlib.suppress(ValueError):
            put(result, path.split("/"), truths[text] if text in truths else float(text))
    result["training_iteration"] = int(result["training_iteration"])
    return result


def _rows(results: Iterable[Mapping[str, Any]]) -> list[Row]:
    """Return the rows of iterations 1, 2, ...

    A trial that was restored has repeated some: the later ones count, and what came after them
    before it was restored does not.
    """
    rows: list[Row] = []
    for result in results:
        iteration = result["training_iteration"]
        if 1 <= iteration <= len(rows) + 1:
            seconds = float(result.get("time_this_iter_s") or 0.0)
            row = metrics_row(result, iteration, seconds, check=False)
            rows[iteration - 1 :] = [row]
    columns = dict.fromkeys(column for row in rows for column in row)
    return [{column: row.get(column, float("nan")) for column in columns} for row in rows]
