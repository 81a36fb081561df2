"""metrics.csv: one row an iteration, in the same columns for every method and algorithm.

Feed-forward networks under sgprop add columns for each layer, before the last one, and so do
evaluations apart from training. A row is appended in one write and the file is cut back to the
iteration of the checkpoint that a trial continues from, so it holds no gap and no duplicate
whatever was killed.
"""

import itertools
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

COLUMNS = (
    "iteration",
    "env_steps",
    "success_rate",
    "episode_return_mean",
    "episode_length_mean",
    "eval_reward",
    "policy_loss",
    "entropy",
    "grad_norm",
    "predictor_loss",
    "received_grad_norm",
    "mixed_grad_norm",
    "prediction_norm",
    "mixing_weight_mean",
    "mixing_weight_min",
    "mixing_weight_p25",
    "mixing_weight_median",
    "mixing_weight_p75",
    "mixing_weight_max",
    "iteration_seconds",
)
#: What evaluations apart from training add, before the last column, and what it is in words (see
#: `sgrl.tuning.evaluation`).
EVALUATION_NAMES = {
    "eval_success_rate": "success rate in evaluation",
    "eval_return": "episode return in evaluation",
    "eval_greedy_success_rate": "success rate in evaluation, likeliest actions",
    "eval_greedy_return": "episode return in evaluation, likeliest actions",
}
EVALUATION_COLUMNS = tuple(EVALUATION_NAMES)
INTEGER_COLUMNS = ("iteration", "env_steps")
#: What a trial is judged by, the first one it reports: the mean of its last so many values.
MEASURES = {"eval_reward": 1, "success_rate": 5, "episode_return_mean": 5}
#: The measures in words.
MEASURE_NAMES = {
    "eval_reward": "test reward",
    "success_rate": "success rate",
    "episode_return_mean": "episode return",
}

#: Other columns of ours that stand beside those of swept values.
TAKEN = frozenset(
    {"trial", "method", "experiment", "seed", "state", "iterations", "planned", "final", "auc"}
    | {"batch", "budget", "parameters"}
    | {"env_steps", "padded_env_steps", "seconds", "reason", "notes"}
    | {"trials", "failed", "unfinished", "failing"}
)

Row = dict[str, float]


def columns_of(row: Mapping[str, float]) -> tuple[str, ...]:
    """The columns of the file that holds `row`: `COLUMNS`, those of its layers and of evaluations
    apart from training."""
    layers = tuple(name for name in row if _is_of_layer(name))
    evaluation = tuple(name for name in EVALUATION_COLUMNS if name in row)
    return (*COLUMNS[:-1], *layers, *evaluation, COLUMNS[-1])


def is_taken(name: str) -> bool:
    """Whether tables of trials or methods have a column of that name, or may have one."""
    scores = ("auc_", *(f"final_{measure}" for measure in MEASURES))
    return name in TAKEN or name.startswith(scores)


def _is_of_layer(column: str) -> bool:
    return column.startswith("layer")


def append_row(path: Path, row: Mapping[str, float]) -> None:
    """Append one iteration, with the header first where the file is new.

    NaN and columns that `row` lacks are left empty; floats read back bit for bit. Raises OSError
    where the disk is full, and then leaves the file as it was.
    """
    columns = columns_of(row)
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
    columns, lines = _whole_lines(path)
    return [
        {column: _parse(column, field) for column, field in zip(columns, fields, strict=True)}
        for fields in (line.split(",") for line in lines)
    ]


def count_rows(path: Path) -> int:
    """The number of iterations that `read_metrics` would return."""
    return len(_whole_lines(path)[1])


def truncate_metrics(path: Path, iteration: int) -> None:
    """Keep the header and the rows of iterations 1 to `iteration`, atomically; no rows, no file.

    Raises ValueError where the file holds fewer whole rows than that.
    """
    columns, lines = _whole_lines(path)
    if len(lines) < iteration:
        raise ValueError(f"{path} holds {len(lines)} whole rows, fewer than {iteration}")
    if iteration == 0:
        path.unlink(missing_ok=True)
        return
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(line + "\n" for line in [",".join(columns), *lines[:iteration]])
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def flush_metrics(path: Path) -> None:
    """Bring the file to the disk, so that no checkpoint outlives the rows that led to it."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def metrics_row(result: Mapping, iteration: int, seconds: float) -> Row:
    """One row, of all columns, from what RLlib's `Algorithm.train()` returned.

    `Reinforce` reports the columns themselves under `result["sgrl"]`; for every other algorithm
    they are taken from RLlib's own keys where it has them.

    Raises FloatingPointError where the loss is NaN or infinite.
    """
    reported = result.get("sgrl")
    row = dict(reported) if reported is not None else _rllib_columns(result, iteration)
    for loss in ("policy_loss", "total_loss"):
        if not math.isfinite(row.get(loss, 0.0)):
            raise FloatingPointError(f"{loss} is {row[loss]} at iteration {iteration}")
    row |= {"iteration": iteration, "iteration_seconds": seconds}
    layers = {name: row[name] for name in sorted(filter(_is_of_layer, row), key=_layer_order)}
    return {column: row.get(column, math.nan) for column in COLUMNS} | layers


def _layer_order(column: str) -> tuple[int, int]:
    layer, _, name = column.partition("_")
    return int(layer.removeprefix("layer")), COLUMNS.index(name)


class Score(NamedTuple):
    """How well a trial does: by which measure (empty where it reports none), its final value and
    the area under its curve."""

    measure: str
    final: float
    auc: float


def score(rows: Sequence[Row]) -> Score:
    """Judge a trial by its rows; see `score_of`."""
    columns = {name: [row.get(name, math.nan) for row in rows] for name in MEASURES}
    return score_of([row["env_steps"] for row in rows], columns)


def score_of(env_steps: Sequence[float], columns: Mapping[str, Sequence[float]]) -> Score:
    """Judge a trial by its test reward if it evaluates, else by its success rate, or where its
    environment knows no success by its episodes' mean return.

    final: the last test reward, or the mean of the other two over the last five batches. auc: the
    area under the measure against environment steps (trapezoid), divided by their span; a single
    row counts as its own. Both NaN where no row reports the measure.
    """
    for measure, count in MEASURES.items():
        # Stock algorithms report no success before the first episode has ended.
        points = [
            (steps, value)
            for steps, value in zip(env_steps, columns.get(measure, ()), strict=False)
            if not math.isnan(value)
        ]
        if points:
            last = [value for _, value in points[-count:]]
            return Score(measure, sum(last) / len(last), _area_under(points))
    return Score("", math.nan, math.nan)


def common_measure(measures: Iterable[str]) -> str:
    """What trials are compared by that are judged one by one by these (see `Score`): the test
    reward if one evaluates; the episode return, which all report, if one knows no success."""
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


def _rllib_columns(result: Mapping, iteration: int) -> Row:
    """The columns that RLlib's own result keys hold (either API stack).

    Of the episodes that ended in this iteration where `StockRunner` sampled, else RLlib's moving
    averages.
    """
    runners = result.get("env_runners") or {}
    learner = (result.get("learners") or {}).get("default_policy") or {}
    found = {
        "env_steps": result.get("num_env_steps_sampled_lifetime"),
        "success_rate": runners.get("success_rate"),
        "episode_return_mean": runners.get("episode_return_mean"),
        "episode_length_mean": runners.get("episode_len_mean"),
        "policy_loss": learner.get("policy_loss", learner.get("mean_pi_loss")),
        "total_loss": learner.get("total_loss"),
        "entropy": learner.get("entropy"),
        "grad_norm": learner.get(
            "gradients_policy_global_norm", learner.get("gradients_default_optimizer_global_norm")
        ),
        **(learner.get("sgrl") or {}),
        **_means(runners),
    }
    if not learner:
        info = (result.get("info") or {}).get("learner", {}).get("default_policy", {})
        stats = info.get("learner_stats") or {}
        found |= {key: stats.get(key) for key in ("policy_loss", "total_loss", "entropy")}
        found["grad_norm"] = stats.get("grad_gnorm")
    interval = (result.get("config") or {}).get("evaluation_interval")
    # In between, RLlib repeats the last evaluation's results.
    if interval and iteration % interval == 0:
        evaluation = (result.get("evaluation") or {}).get("env_runners") or {}
        found["eval_reward"] = _means(evaluation).get("episode_return_mean")
    return {column: float(value) for column, value in found.items() if value is not None}


def _means(runners: Mapping) -> dict[str, float]:
    """Means over the episodes that `StockRunner` has summed up; NaN where none has ended."""
    sums = runners.get("sgrl")
    if not sums:
        return {}
    count = sums["episodes"]
    names = {
        "return_sum": "episode_return_mean",
        "length_sum": "episode_length_mean",
        "success_sum": "success_rate",
    }
    return {
        mean: sums[name] / count if count else math.nan
        for name, mean in names.items()
        if name in sums
    }


def _whole_lines(path: Path) -> tuple[tuple[str, ...], list[str]]:
    """The columns, and the lines of iterations 1, 2, ..., without torn or out-of-order ones."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return COLUMNS, []
    header, *lines = text.split("\n")[:-1] or [""]
    columns = tuple(header.split(","))
    if columns != columns_of(dict.fromkeys(columns, 0.0)):
        return COLUMNS, []
    whole: list[str] = []
    for line in lines:
        if not _is_row(columns, line.split(","), len(whole) + 1):
            break
        whole.append(line)
    return columns, whole


def _is_row(columns: Sequence[str], fields: list[str], iteration: int) -> bool:
    if len(fields) != len(columns) or fields[0] != str(iteration):
        return False
    try:
        for column, field in zip(columns, fields, strict=True):
            _parse(column, field)
    except ValueError:
        return False
    return True


def _parse(column: str, field: str) -> float:
    if not field:
        return math.nan
    return int(field) if column in INTEGER_COLUMNS else float(field)


def _format(column: str, value: float) -> str:
    if math.isnan(value):
        return ""
    # repr is the shortest text that reads back as the same float.
    return str(int(value)) if column in INTEGER_COLUMNS else repr(float(value))
