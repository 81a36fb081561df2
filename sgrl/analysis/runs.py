"""Results folders as pandas frames, finished or not, without Ray.

A trial is read from its own folder (`config.yaml`, `status.json`, `metrics.csv`); what is missing
or half written counts as not there yet.
"""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from sgrl.tuning.metrics import COLUMNS, read_metrics, score


class ResultsError(ValueError):
    """A folder holds no results; the message is one line."""


def load_trials(directory: str | Path) -> pd.DataFrame:
    """One row a trial, in the experiment's order.

    Columns: trial, method, one for each swept value, seed, state (pending, running, completed,
    failed), iterations, final_success_rate (mean over the last five batches) or, where trials
    evaluate, final_eval_reward (of the last evaluation), auc (area under that measure against
    environment steps, trapezoid, divided by their span), reason (of a failure). `attrs["swept"]`
    lists the swept columns, `attrs["measure"]` is "success_rate" or "eval_reward".

    Raises ResultsError where the folder holds no trial.
    """
    rows, swept, measures = [], {}, set()
    for folder, config in _trial_folders(Path(directory)):
        status, metrics = _read_status(folder), read_metrics(folder / "metrics.csv")
        swept.update(dict.fromkeys(config["swept"]))
        measure, final, auc = score(metrics)
        measures.add(measure)
        rows.append(
            _labels(config)
            | {
                "seed": config["seed"],
                "state": status.get("state", "pending"),
                "iterations": len(metrics),
                "final": final,
                "auc": auc,
                "reason": status.get("reason", ""),
            }
        )
    columns = ["seed", "state", "iterations", "final", "auc", "reason"]
    trials = pd.DataFrame(rows)[["trial", "method", *swept, *columns]]
    trials.attrs["swept"] = list(swept)
    measure = "eval_reward" if "eval_reward" in measures else "success_rate"
    trials.attrs["measure"] = measure
    trials = trials.rename(columns={"final": f"final_{measure}"})
    return trials


def load_curves(directory: str | Path) -> pd.DataFrame:
    """One row an iteration of every trial: trial, method, swept values, seed, state, and all
    columns of metrics.csv.

    `attrs["swept"]` lists the swept columns. Raises ResultsError where the folder holds no trial.
    """
    frames, swept = [], {}
    for folder, config in _trial_folders(Path(directory)):
        swept.update(dict.fromkeys(config["swept"]))
        metrics = metrics_frame(folder / "metrics.csv")
        state = _read_status(folder).get("state", "pending")
        labels = _labels(config) | {"seed": config["seed"], "state": state}
        for position, (name, value) in enumerate(labels.items()):
            metrics.insert(position, name, value)
        if len(metrics):
            frames.append(metrics)
    columns = ["trial", "method", *swept, "seed", "state"]
    curves = pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=columns)
    curves.attrs["swept"] = list(swept)
    return curves


def metrics_frame(path: Path) -> pd.DataFrame:
    """A trial's metrics.csv as a frame; no file is an empty one."""
    rows = read_metrics(path)
    return pd.DataFrame(rows, columns=list(rows[0]) if rows else list(COLUMNS))


def _trial_folders(directory: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Trial folders and their configurations, in the order of the experiment's methods."""
    found = []
    for path in sorted(directory.glob("*/config.yaml")):
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        if isinstance(config, dict) and "method" in config and "seed" in config:
            config.setdefault("swept", {})
            found.append((path.parent, config))
    if not found:
        raise ResultsError(
            f"{directory} holds no results: give a folder such as results/quickstart"
        )
    order: list[str] = []
    experiment = directory / "experiment.yaml"
    if experiment.is_file():
        order = list(yaml.safe_load(experiment.read_text(encoding="utf-8"))["methods"])

    def position(item: tuple[Path, dict[str, Any]]) -> tuple:
        config = item[1]
        method = config["method"]
        values = [_sortable(value) for value in config["swept"].values()]
        place = order.index(method) if method in order else len(order)
        return place, method, values, config["seed"]

    return sorted(found, key=position)


def _sortable(value: Any) -> tuple:
    number = isinstance(value, int | float)
    return (0, value, "") if number else (1, 0, str(value))


def _labels(config: dict[str, Any]) -> dict[str, Any]:
    # Swept lists such as maze_dims become text: frames group by them.
    swept = {
        name: value if isinstance(value, int | float | str) else json.dumps(value)
        for name, value in config["swept"].items()
    }
    return {"trial": config["name"], "method": config["method"], **swept}


def _read_status(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "status.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
