"""metrics.csv: one row an iteration, in the same columns for every method and algorithm.

Feed-forward networks under sgprop add columns for each layer, before the last one, and so do
RLlib's own algorithms and evaluations apart from training. A row is appended in one write, and the
file is truncated to the iteration of the checkpoint that a trial continues from, so it has neither
gaps nor duplicates, whichever process was killed.

Files from before there was `padded_env_steps` are read as if they had it (see `_old_counts`).
"""

import contextlib
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from sgrl.errors import UserError
from sgrl.files import replacing
from sgrl.results.columns import METRICS
from sgrl.results.folder import TrialFolder

#: What evaluations apart from training add, before the last column (`sgrl.tuning.evaluation`).
EVALUATION_COLUMNS = (
    "eval_success_rate",
    "eval_return",
    "eval_greedy_success_rate",
    "eval_greedy_return",
)
#: What RLlib's own algorithms add, there too.
STOCK_COLUMNS = ("value_loss", "kl", "clip_fraction", "explained_variance")
#: Columns that every file has.
COLUMNS = tuple(
    name
    for name in METRICS
    if name not in (*EVALUATION_COLUMNS, *STOCK_COLUMNS) and not name.startswith("layer")
)
INTEGER_COLUMNS = ("iteration", "env_steps", "padded_env_steps", "episodes")
#: Environments of Reinforce where its configuration leaves them unsaid.
DEFAULT_ENVIRONMENTS = 20
#: Columns that older files lack, and those that they have under another name.
NEW_COLUMNS = ("padded_env_steps", "episodes")
OLD_NAMES = {"true_grad_norm": "received_grad_norm"}
#: What a trial is judged by, the first one it reports: the mean of its last so many values.
MEASURES = {"eval_reward": 1, "success_rate": 5, "episode_return_mean": 5}


class Axis(NamedTuple):
    """What curves are drawn and areas taken against: its name in words, and what it counts."""

    name: str
    unit: str


#: Axes by column; hours are the sums of iteration_seconds.
AXES = {
    "env_steps": Axis(METRICS["env_steps"].name, "steps"),
    "padded_env_steps": Axis(METRICS["padded_env_steps"].name, "padded steps"),
    "iteration": Axis("iterations", "iterations"),
    "episodes": Axis(METRICS["episodes"].name, "episodes"),
    "hours": Axis("hours of training", "hours"),
}
#: The measures in words.
MEASURE_NAMES = {name: METRICS[name].name for name in MEASURES}

#: Other columns of ours that stand beside those of swept values.
TAKEN = frozenset(
    {"trial", "method", "experiment", "seed", "state", "iterations", "planned", "final", "auc"}
    | {"batch", "budget", "parameters"}
    | {"env_steps", "padded_env_steps", "seconds", "reason", "notes"}
    | {"trials", "failed", "stopped", "skipped", "unfinished", "failing", "x"}
)

Row = dict[str, float]


class OldMetricsError(UserError):
    """An older metrics.csv does not tell how many steps were really taken; one line."""


def columns_of(row: Mapping[str, float]) -> tuple[str, ...]:
    """Return the columns of the file that holds `row`.

    These are `COLUMNS`, and those of its layers, of RLlib's own algorithms and of evaluations apart
    from training.
    """
    layers = tuple(name for name in row if is_of_layer(name))
    others = tuple(name for name in (*STOCK_COLUMNS, *EVALUATION_COLUMNS) if name in row)
    return (*COLUMNS[:-1], *layers, *others, COLUMNS[-1])


def is_taken(name: str) -> bool:
    """Whether tables of trials or methods have a column of that name, or may have one."""
    scores = ("auc_", *(f"final_{measure}" for measure in MEASURES))
    return name in TAKEN or name.startswith(scores)


def known_columns(header: str) -> tuple[str, ...] | None:
    """Return the columns of a file with that first line, by their present names.

    Returns:
        None for any other file. Older files lack `NEW_COLUMNS`.
    """
    columns = tuple(OLD_NAMES.get(column, column) for column in header.split(","))
    whole = columns_of(dict.fromkeys(columns, 0.0))
    older = tuple(column for column in whole if column not in NEW_COLUMNS)
    return columns if columns in (whole, older) else None


def is_of_layer(column: str) -> bool:
    """Whether a column is of one layer among several."""
    return column.startswith("layer")


def append_row(path: Path, row: Mapping[str, float]) -> None:
    """Append one iteration, with the header first where the file is new.

    NaN and columns that `row` lacks are left empty; floats are read back exactly. A file that
    lacks columns of `row` is written anew with them, atomically: APPO and IMPALA may report rows
    before their first update, which tell nothing of layers. Raises OSError where the disk is full,
    and then leaves the file as it was.
    """
    columns = _header(path) or columns_of(row)
    if not set(columns_of(row)) <= set(columns):
        rows = read_metrics(path)
        columns = columns_of({**dict.fromkeys(columns, 0.0), **row})
        _replace(path, columns, rows)
    line = _line(columns, row)
    with path.open("ab", buffering=0) as file:
        # One write: a kill leaves a whole row or a torn last one, which reading drops.
        size = file.tell()
        data = (("" if size else ",".join(columns) + "\n") + line).encode()
        try:
            # On a disk that fills up a write is cut short, and the next one raises.
            while data:
                data = data[file.write(data) :]
        except OSError:
            file.truncate(size)
            raise


def write_rows(path: Path, rows: Sequence[Mapping[str, float]]) -> None:
    """Write a new file of rows that share their columns, as `append_row` would; none, no file."""
    if rows:
        columns = columns_of(rows[0])
        lines = (_line(columns, row) for row in rows)
        path.write_text(",".join(columns) + "\n" + "".join(lines), encoding="utf-8")


def _line(columns: Iterable[str], row: Mapping[str, float]) -> str:
    return ",".join(_format(column, row.get(column, math.nan)) for column in columns) + "\n"


def read_metrics(path: Path) -> list[Row]:
    """Return the rows of iterations 1, 2, ... up to the first torn, missing or repeated one.

    Empty fields read as NaN. A file that does not exist has no rows.
    """
    columns, rows = _whole_rows(path)
    if not rows or NEW_COLUMNS[0] in rows[0]:
        return rows
    lists = {name: [row[name] for row in rows] for name in ("env_steps", "episode_length_mean")}
    counts = _old_counts(path, _config_beside(path), *lists.values())
    counted = [
        dict(zip(counts, values, strict=True)) for values in zip(*counts.values(), strict=True)
    ]
    names = columns_of(dict.fromkeys(columns, 0.0))
    return [
        {name: (row | more)[name] for name in names}
        for row, more in zip(rows, counted, strict=True)
    ]


def _config_beside(path: Path) -> dict[str, Any]:
    """The trial's configuration, empty where it cannot be read."""
    with contextlib.suppress(OSError, ValueError, yaml.YAMLError):
        config = TrialFolder(path.parent).read_config()
        return config if isinstance(config, dict) else {}
    return {}


def episodes_of_batch(runners: Mapping[str, Any]) -> int:
    """How many episodes a batch of Reinforce has, by the section env_runners of its config."""
    size = runners.get("num_envs_per_env_runner", DEFAULT_ENVIRONMENTS)
    return size * max(1, runners.get("num_env_runners", 0))


def _old_counts(
    path: Path, config: Mapping[str, Any], env_steps: Sequence[float], lengths: Sequence[float]
) -> dict[str, list[float]]:
    """What `env_steps`, `padded_env_steps` and `episodes` are in a file that has only the first.

    There `Reinforce` counted T steps an episode, padding included. The first iteration was one
    batch of B episodes, so each counts env_steps[0] / B = T, and those of an iteration took
    `episode_length_mean` steps each: their sum is a whole number. Other algorithms counted the
    steps really taken, and no episodes.

    Args:
        path: of the file, for the error.
        config: the trial's config.yaml.
        env_steps: as the file has it.
        lengths: its episode_length_mean.

    Raises:
        OldMetricsError: the configuration is missing or does not lead to whole numbers.
    """
    if config.get("algorithm") not in (None, "Reinforce"):
        unknown = [math.nan] * len(env_steps)
        return {"env_steps": [*env_steps], "padded_env_steps": unknown, "episodes": unknown}
    try:
        batch = episodes_of_batch(config["config"].get("env_runners") or {})
        episodes = [batch * padded / env_steps[0] for padded in env_steps]
        ended = [later - before for before, later in itertools.pairwise([0.0, *episodes])]
        taken = [count * length for count, length in zip(ended, lengths, strict=True)]
        whole = [*episodes, *taken, env_steps[0] / batch]
        if not all(abs(number - round(number)) < 1e-3 for number in whole):
            raise ValueError
    except (KeyError, TypeError, AttributeError, ValueError, ArithmeticError):
        raise OldMetricsError(
            f"{path} is of an older version, which counted padding as env_steps, and the "
            f"{TrialFolder(path.parent).config.name} beside it does not say how many episodes a "
            "batch had: restore that file, or move this trial out of the results"
        ) from None
    return {
        "env_steps": list(itertools.accumulate(map(round, taken))),
        "padded_env_steps": [*env_steps],
        "episodes": [*map(round, episodes)],
    }


def count_rows(path: Path) -> int:
    """The number of iterations that `read_metrics` would return."""
    return len(_whole_rows(path)[1])


def truncate_metrics(path: Path, iteration: int) -> None:
    """Keep the header and the rows of iterations 1 to `iteration`, atomically; no rows, no file.

    An older file becomes one with all columns. Raises ValueError where the file holds fewer whole
    rows than that, and as `_old_counts`.
    """
    rows = read_metrics(path)
    if len(rows) < iteration:
        raise ValueError(f"{path} holds {len(rows)} whole rows, fewer than {iteration}")
    if iteration == 0:
        path.unlink(missing_ok=True)
        return
    _replace(path, columns_of(rows[0]), rows[:iteration])


def _replace(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, float]]) -> None:
    """Make the file one of these rows, whole or not at all."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write(",".join(columns) + "\n")
        file.writelines(_line(columns, row) for row in rows)


class Score(NamedTuple):
    """How well a trial does: measure, final value and area under the curve.

    The measure is empty where the trial reports none.
    """

    measure: str
    final: float
    auc: float


def score(rows: Sequence[Row]) -> Score:
    """Judge a trial by its rows; see `score_of`."""
    columns = {name: [row.get(name, math.nan) for row in rows] for name in MEASURES}
    return score_of([row["env_steps"] for row in rows], columns)


def final_of(rows: Sequence[Row], column: str) -> float:
    """Return a column's final value: the mean of its last five values that are not NaN.

    Of a test reward it is the last one; NaN where there is none.
    """
    values = [row[column] for row in rows if not math.isnan(row.get(column, math.nan))]
    last = values[-MEASURES.get(column, 5) :]
    return sum(last) / len(last) if last else math.nan


def score_of(axis: Sequence[float], columns: Mapping[str, Sequence[float]]) -> Score:
    """Score a trial by its test reward, its success rate or its mean return.

    The test reward counts if the trial evaluates, the return where its environment knows no
    success.

    final: the last test reward, or the mean of the other two over the last five batches. auc: the
    area under the measure against the axis, which is environment steps unless something else is
    given (trapezoid), divided by its span; a single row counts as its own. Both NaN where no row
    reports the measure, auc also where the axis is unknown.
    """
    for measure, count in MEASURES.items():
        # Stock algorithms report no success before the first episode has ended.
        points = [
            (place, value)
            for place, value in zip(axis, columns.get(measure, ()), strict=False)
            if not math.isnan(value)
        ]
        if points:
            last = [value for _, value in points[-count:]]
            return Score(measure, sum(last) / len(last), _area_under(points))
    return Score("", math.nan, math.nan)


def common_measure(measures: Iterable[str]) -> str:
    """Return the measure by which trials with these measures of their own are compared.

    That is the test reward if one evaluates (see `Score`), and the episode return, which all
    report, if one knows no success.
    """
    found = set(measures)
    order = ("eval_reward", "episode_return_mean")
    return next((measure for measure in order if measure in found), "success_rate")


def _area_under(points: Sequence[tuple[float, float]]) -> float:
    span = points[-1][0] - points[0][0]
    if span == 0:
        return points[-1][1]
    area = sum(
        (later - earlier) * (before + after) / 2
        for (earlier, before), (later, after) in itertools.pairwise(points)
    )
    return area / span


def _header(path: Path) -> tuple[str, ...] | None:
    """The columns of the file; None where there is none yet, or no whole header."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return known_columns(file.readline().removesuffix("\n"))
    except FileNotFoundError:
        return None


def _whole_rows(path: Path) -> tuple[tuple[str, ...], list[Row]]:
    """The columns, and the rows of iterations 1, 2, ..., without torn or out-of-order ones."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return COLUMNS, []
    header, *lines = text.split("\n")[:-1] or [""]
    columns = known_columns(header)
    if columns is None:
        return COLUMNS, []
    rows: list[Row] = []
    for line in lines:
        fields = line.split(",")
        if fields[0] != str(len(rows) + 1):
            break
        try:
            rows.append({c: _parse(c, field) for c, field in zip(columns, fields, strict=True)})
        except ValueError:  # no number, or not as many as columns
            break
    return columns, rows


def _parse(column: str, field: str) -> float:
    if not field:
        return math.nan
    return int(field) if column in INTEGER_COLUMNS else float(field)


def _format(column: str, value: float) -> str:
    if math.isnan(value):
        return ""
    # repr is the shortest text that reads back as the same float.
    return str(int(value)) if column in INTEGER_COLUMNS else repr(float(value))
