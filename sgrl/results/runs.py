"""Results folders as pandas frames, finished or not, without Ray.

    results = load_results("results/labyrinth_escape")
    results.trials, results.curves, results.problems

A trial is read from its own folder (`config.yaml`, `status.json`, `metrics.csv`). What is half
written counts as not there yet; folders that are missing, and folders that are none of the trials
that `experiment.yaml` plans, do not count. `problems` says so.
"""

import contextlib
import io
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from numpy.typing import NDArray

from sgrl.errors import UserError
from sgrl.results.folder import SweepFolder, TrialFolder
from sgrl.results.metrics import (
    AXES,
    COLUMNS,
    INTEGER_COLUMNS,
    MEASURES,
    NEW_COLUMNS,
    Axis,
    common_measure,
    episodes_of_batch,
    is_taken,
    known_columns,
    read_metrics,
    score_of,
)
from sgrl.results.plan import ExperimentError, planned_trials, points_of
from sgrl.results.selection import ALL, Selection

#: Columns of every row of metrics.csv that is whole; the others may be empty.
FILLED = ("iteration", "env_steps", "iteration_seconds")
#: Steps of a batch where the configuration leaves them unsaid.
DEFAULT_BATCHES = {"PPO": 4000, "APPO": 500, "IMPALA": 500}


class ResultsError(UserError):
    """A folder holds no results; the message is one line."""


@dataclass(frozen=True)
class Results:
    """What one or several results folders hold.

    Attributes:
        directories: the folders, in the order given.
        trials: one row a trial, in the experiment's order. Columns: trial, method, one for each
            swept value, seed, state (as in `status.Progress`), iterations, planned (iterations when
            complete), batch and budget (what a batch and a complete trial take, in words),
            parameters (trainable ones without the predictors', NaN where not recorded),
            final_success_rate (mean over the last five batches), where trials evaluate
            final_eval_reward (of the last evaluation), where the environment knows no success
            final_episode_return_mean (over five batches),
            auc (area under that measure against the axis, trapezoid, divided by its span),
            env_steps (of the last iteration), seconds (spent training), reason (of a failure).
            `attrs["swept"]` lists the swept columns, `attrs["searched"]` those of them whose values
            a search suggested, `attrs["measure"]` is the key of `MEASURES` they are judged by,
            `attrs["x"]` that of `AXES`. With several folders, `experiment` is the first of the
            swept columns and part of the trials' names.
        curves: one row an iteration: trial, and all columns of metrics.csv. The trials follow
            each other in the order of `trials`.
        problems: one line for each folder that is missing or none of the experiment's trials, and
            then for each trial that is not as it was to be.
    """

    directories: tuple[Path, ...]
    trials: pd.DataFrame
    curves: pd.DataFrame
    problems: tuple[str, ...]

    @property
    def swept(self) -> list[str]:
        """The swept columns."""
        return self.trials.attrs["swept"]

    @property
    def measure(self) -> str:
        """What trials are judged by, a key of `MEASURES`."""
        return self.trials.attrs["measure"]

    @property
    def x(self) -> str:
        """What areas and curves are taken against, a key of `AXES`."""
        return self.trials.attrs["x"]

    @property
    def axis(self) -> Axis:
        """The same in words."""
        return AXES[self.x]

    def curve(self, trial: str, column: str) -> pd.Series:
        """One column of one trial's metrics.csv by `x`.

        Rows in which either is empty are left out.
        """
        (position,) = np.flatnonzero(self.trials["trial"] == trial)
        counts = self.trials["iterations"].to_numpy()
        rows = self.curves.iloc[counts[:position].sum() :][: counts[position]]
        values = rows[column].to_numpy(float) if column in rows else np.full(len(rows), np.nan)
        at = places(rows, self.x)
        known = ~np.isnan(values) & ~np.isnan(at)
        return pd.Series(values[known], pd.Index(at[known], name=self.x))

    def curves_of(self, trials: pd.DataFrame, column: str) -> pd.DataFrame:
        """One column of metrics.csv of some of the trials: index `x`, one column a trial.

        At the same iteration seeds are not equally far on the axis, so each one's curve is
        interpolated linearly on a common grid: the seeds' mean places row by row, from where the
        last of them begins to where the first one ends. No curve is drawn beyond its own ends.
        """
        lines = {name: self.curve(name, column) for name in trials["trial"]}
        shortest = min(map(len, lines.values()), default=0)
        if not shortest:
            return pd.DataFrame()
        knots = {name: line.index.to_numpy(float) for name, line in lines.items()}
        first = max(places[0] for places in knots.values())
        last = min(places[-1] for places in knots.values())
        if first > last:
            return pd.DataFrame()
        mean = np.mean([places[:shortest] for places in knots.values()], axis=0)
        grid = np.unique([first, *mean[(first < mean) & (mean < last)], last])
        wide = {n: np.interp(grid, knots[n], line.to_numpy()) for n, line in lines.items()}
        return pd.DataFrame(wide, index=pd.Index(grid, name=self.x))


def places(rows: pd.DataFrame, x: str) -> NDArray[np.float64]:
    """Where each row of a trial, its first ones included, lies on an axis."""
    if x == "hours":
        return rows["iteration_seconds"].cumsum().to_numpy(float) / 3600
    return rows[x].to_numpy(float) if x in rows else np.full(len(rows), np.nan)


def load_results(*directories: str | Path, x: str = "env_steps", only: Selection = ALL) -> Results:
    """Read results folders, each of one experiment.

    Args:
        directories: the folders.
        x: what areas and curves are taken against, a key of `AXES`.
        only: the trials to read.

    Raises:
        SelectionError: there is no such trial.
        ResultsError: a folder holds no trial, or no trial has that axis.
        OldMetricsError: an older metrics.csv does not tell how many steps were taken.
    """
    if x not in AXES:
        raise ResultsError(f"unknown axis {x!r}: give one of {', '.join(AXES)}")
    folders = list(dict.fromkeys(Path(directory) for directory in directories))
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    several = len(folders) > 1
    there: list[tuple[str, Any]] = []
    problems: list[str] = []
    rows: list[dict[str, Any]] = []
    files: list[Path] = []
    swept: dict[str, None] = {"experiment": None} if several else {}
    for name, directory in zip(names, folders, strict=True):
        sweep = SweepFolder(directory)
        found, running = _trial_folders(sweep, problems), sweep.is_running()
        there += [(config["method"], config["seed"]) for _, config in found]
        for folder, config in found:
            if not only.holds(config["method"], config["seed"]):
                continue
            label = f"{name}/{config['name']}" if several else config["name"]
            values = {_column(key): _value(value) for key, value in config["swept"].items()}
            swept.update(dict.fromkeys(values))
            status = folder.read_status()
            state = status.get("state", "pending")
            rows.append(
                {"trial": label, "method": config["method"], "experiment": name}
                | values
                | {
                    "seed": config["seed"],
                    "state": "interrupted" if state == "running" and not running else state,
                    "planned": (config.get("stop") or {}).get("training_iteration") or None,
                    **_planned_steps(config),
                    "parameters": status.get("parameters"),
                    "reason": status.get("reason", ""),
                    "notes": status.get("notes", []),
                }
            )
            files.append(folder.metrics)
    only.check(there)
    metrics = _read_all(files)
    for row, (frame, _) in zip(rows, metrics, strict=True):
        row["lacks_axis"] = len(frame) > 0 and bool(np.isnan(places(frame, x)).any())
    if rows and all(row["lacks_axis"] for row in rows):
        raise ResultsError(f"{folders[0]}: {_lacking(x)} in any trial: give another --x")
    measures = set()
    for row, (frame, dropped) in zip(rows, metrics, strict=True):
        lists = {name: frame[name].tolist() for name in MEASURES if name in frame}
        measure, row["final"], row["auc"] = score_of(places(frame, x).tolist(), lists)
        row["iterations"] = len(frame)
        # Of a Tuner's trials it may be unknown.
        row["env_steps"] = int(np.nan_to_num(frame["env_steps"].iloc[-1])) if len(frame) else 0
        row["seconds"] = float(frame["iteration_seconds"].sum())
        measures.add(measure)
        problems += _problems(row, dropped)
        if row["lacks_axis"]:
            problems.append(f"{row['trial']}: {_lacking(x)}; left out of curves and AUC")
    measure = common_measure(measures)
    if measure == "episode_return_mean" and "success_rate" in measures:
        for row, (frame, _) in zip(rows, metrics, strict=True):
            column = {measure: frame[measure].tolist()} if measure in frame else {}
            _, row["final"], row["auc"] = score_of(places(frame, x).tolist(), column)
    first = ["trial", "method", *swept, "seed", "state", "iterations", "planned"]
    scale = ["batch", "budget", "parameters"]
    trials = pd.DataFrame(rows)[[*first, *scale, "final", "auc", "env_steps", "seconds", "reason"]]
    trials = trials.rename(columns={"final": f"final_{measure}"})
    trials.attrs = {"swept": list(swept), "measure": measure, "x": x}
    trials.attrs["searched"] = [name for name in swept if name in _searched(folders)]
    curves = _concatenate(trials["trial"], [frame for frame, _ in metrics])
    return Results(tuple(folders), trials, curves, tuple(problems))


def _concatenate(names: Iterable[str], frames: Sequence[pd.DataFrame]) -> pd.DataFrame:
    filled = [frame for frame in frames if len(frame)]
    curves = pd.concat(filled, ignore_index=True) if filled else pd.DataFrame(columns=COLUMNS)
    trial = np.repeat(np.array(list(names), dtype=object), [len(frame) for frame in frames])
    curves.insert(0, "trial", trial)
    return curves.astype({name: int for name in INTEGER_COLUMNS if curves[name].notna().all()})


def _searched(folders: Iterable[Path]) -> set[str]:
    """The columns of values that searches suggested."""
    found = set()
    for folder in folders:
        experiment = SweepFolder(folder).read_experiment()
        if experiment.get("search"):
            with contextlib.suppress(AttributeError, KeyError, TypeError):
                for point in points_of(experiment):
                    found |= {_column(name) for name in point.searched.values()}
    return found


def _lacking(x: str) -> str:
    """Why a trial is not on an axis."""
    why = {"padded_env_steps": " (only Reinforce pads)"}.get(x, " (an older version counted none)")
    return f"no {x}{why}"


def _problems(row: dict[str, Any], dropped: int) -> list[str]:
    """What there is to know about a trial that is not complete and sound."""
    name, state, iterations = row["trial"], row["state"], row["iterations"]
    file = TrialFolder(name).metrics.name
    planned = f" of {row['planned']}" if row["planned"] else ""
    found = [f"{name}: {note}" for note in row["notes"]]
    if dropped:
        found.append(
            f"{name}: {file} is damaged after iteration {iterations}; lines dropped: {dropped}"
        )
    if state == "failed":
        found.append(f"{name}: failed at iteration {iterations}{planned}: {row['reason']}")
    elif state in ("stopped", "skipped"):
        pass  # as it was to be
    elif state != "completed":
        found.append(f"{name}: {state} at iteration {iterations}{planned}")
    elif row["planned"] and iterations < row["planned"] and not row["reason"]:
        found.append(f"{name}: completed, but {file} ends at iteration {iterations}{planned}")
    elif np.isnan(row["final"]):
        found.append(f"{name}: completed, but without a success rate or test reward")
    return found


def _read_all(paths: Sequence[Path]) -> list[tuple[pd.DataFrame, int]]:
    """Read many trials' metrics.csv, as `read_metrics` does.

    Returns:
        For each file its rows and the number of dropped lines.

    Files with the same header are parsed in one go: two thousand of them take seconds. One that
    is not as it should be, or of an older version, is read by `read_metrics`, line by line.
    """
    texts = [_read_bytes(path) for path in paths]
    heads = [text.partition(b"\n")[0] for text in texts]
    frames: list[pd.DataFrame | None] = [None] * len(paths)
    for head in dict.fromkeys(heads):
        columns = known_columns(head.decode(errors="replace"))
        if columns is None or NEW_COLUMNS[0] not in columns:
            continue
        members = [i for i, other in enumerate(heads) if other == head]
        bodies = [texts[i][len(head) + 1 : texts[i].rfind(b"\n") + 1] for i in members]
        counts = [body.count(b"\n") for body in bodies]
        with contextlib.suppress(ValueError):  # also pandas' ParserError
            whole = pd.read_csv(
                io.BytesIO(b"".join(bodies)),
                names=list(columns),
                header=None,
                dtype=np.float64,
                float_precision="round_trip",
                skip_blank_lines=False,
            )
            for i, last, count in zip(members, np.cumsum(counts), counts, strict=True):
                frame = whole[last - count : last]
                if _is_sound(frame):
                    frames[i] = frame
    read = []
    for path, text, sound in zip(paths, texts, frames, strict=True):
        frame = _line_by_line(path) if sound is None else sound
        lines = text.count(b"\n") + (not text.endswith(b"\n"))
        dropped = max(0, lines - 1 - len(frame)) if text else 0
        read.append((frame, dropped))
    return read


def _line_by_line(path: Path) -> pd.DataFrame:
    rows = read_metrics(path)
    return pd.DataFrame(rows, columns=list(rows[0]) if rows else list(COLUMNS))


def _is_sound(frame: pd.DataFrame) -> bool:
    """Whether the rows are those of iterations 1, 2, ... and none was cut short."""
    iterations = frame["iteration"].to_numpy()
    return (
        np.array_equal(iterations, np.arange(1, len(frame) + 1))
        and not frame[list(FILLED)].isna().to_numpy().any()
    )


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""


def _trial_folders(
    sweep: SweepFolder, problems: list[str]
) -> list[tuple[TrialFolder, dict[str, Any]]]:
    """List the folders and configurations of planned trials, in the order of the methods.

    Without a whole experiment, every folder that is a trial's.
    """
    names = None
    with contextlib.suppress(ExperimentError):
        names = {trial.name for trial in planned_trials(sweep.experiment)}
        problems += sweep.problems(names)
    found = []
    for folder in sweep.trials():
        name, file = folder.name, folder.config.name
        if names is not None and name not in names:
            continue
        try:
            config = folder.read_config()
        except (OSError, ValueError, yaml.YAMLError):
            problems.append(f"{name}: {file} cannot be read; left out")
            continue
        if not isinstance(config, dict) or not {"name", "method", "seed"} <= config.keys():
            if names is not None:
                problems.append(f"{name}: {file} is no trial's; left out")
        elif names is not None and config["name"] != name:
            problems.append(f"{name}: holds the {file} of {config['name']}; left out")
        else:
            config.setdefault("swept", {})
            found.append((folder, config))
    if not found:
        raise ResultsError(
            f"{sweep.path} holds no results: give a folder such as results/quickstart"
        )
    order = list(sweep.read_experiment().get("methods", {}))

    def position(item: tuple[TrialFolder, dict[str, Any]]) -> tuple:
        config = item[1]
        method = config["method"]
        values = [_sortable(value) for value in config["swept"].values()]
        place = order.index(method) if method in order else len(order)
        return place, method, values, config["seed"]

    return sorted(found, key=position)


def _planned_steps(config: dict[str, Any]) -> dict[str, str | None]:
    """A trial's batch and budget in words; None where its configuration does not say."""
    sections = defaultdict[str, dict[str, Any]](dict, config.get("config") or {})
    training = sections["training"]
    iterations = (config.get("stop") or {}).get("training_iteration") or 0
    match config.get("algorithm"):
        case "Reinforce":
            in_batch = episodes_of_batch(sections["env_runners"])
            episodes = in_batch * _updates(iterations, training)
            length = _episode_length(sections["environment"])
            # How many of them are really taken shows only in the end.
            steps = f"{episodes * length:,} padded environment steps"
            budget = steps if length else f"{episodes:,} episodes"
            return {"batch": f"{in_batch:,} episodes", "budget": budget if episodes else None}
        case "PPO" | "APPO" | "IMPALA" as algorithm:
            size = training.get("train_batch_size_per_learner")
            if size is None:  # RLlib splits this one among the learners
                size = training.get("train_batch_size", DEFAULT_BATCHES[algorithm])
            else:
                size *= max(1, sections["learners"].get("num_learners", 0))
            batch = f"{size:,} environment steps"
            # Those of the others last so many seconds, not batches.
            known = algorithm == "PPO" and iterations
            return {
                "batch": batch,
                "budget": f"{size * iterations:,} environment steps" if known else None,
            }
    return {"batch": None, "budget": None}


def _updates(iterations: int, training: dict[str, Any]) -> int:
    """How many updates Reinforce makes in its first iterations, by its section `training`."""
    updates, spread_over = training.get("total_updates"), training.get("total_iterations")
    if not iterations or updates is None or spread_over is None:
        return iterations
    return int(1 + (iterations - 1) * ((updates - 1) / (spread_over - 1)))


def _episode_length(environment: dict[str, Any]) -> int:
    """T as configured, by default that of an environment of ours; 0 where that is unknown."""
    settings = environment.get("env_config") or {}
    if "episode_length" in settings:
        return settings["episode_length"] or 0
    from sgrl.envs.registry import ENVIRONMENTS  # takes a while

    entry = ENVIRONMENTS.get(environment.get("env", ""))
    return entry.defaults.get("episode_length", 0) if entry else 0


def _sortable(value: Any) -> tuple:
    number = isinstance(value, int | float)
    return (0, value, "") if number else (1, 0, str(value))


def _column(key: str) -> str:
    # Sweeps of today never give such a name.
    return f"swept.{key}" if is_taken(key) else key


def _value(value: Any) -> Any:
    # Swept lists such as maze_dims become text: frames group by them.
    return value if isinstance(value, int | float | str) else json.dumps(value)
