"""Rows of metrics.csv from what RLlib's `Algorithm.train()` returns."""

import math
from collections.abc import Mapping

from sgrl.results.metrics import COLUMNS, STOCK_COLUMNS, Row, is_of_layer


def metrics_row(result: Mapping, iteration: int, seconds: float, check: bool = True) -> Row:
    """One row, of all columns, from what RLlib's `Algorithm.train()` returned.

    `Reinforce` reports the columns themselves under `result["sgrl"]`; for every other algorithm
    they are taken from RLlib's own keys where it has them.

    Args:
        result: what it returned, also as JSON has it.
        iteration: which one it was.
        seconds: that it took.
        check: whether its loss must be a number.

    Raises:
        FloatingPointError: the loss is NaN or infinite.
    """
    reported = result.get("sgrl")
    row = dict(reported) if reported is not None else _rllib_columns(result, iteration)
    row = {column: value for column, value in row.items() if value is not None}
    for loss in ("policy_loss", "total_loss"):
        if check and not math.isfinite(row.get(loss, 0.0)):
            raise FloatingPointError(f"{loss} is {row[loss]} at iteration {iteration}")
    row |= {"iteration": iteration, "iteration_seconds": seconds}
    layers = {name: row[name] for name in sorted(filter(is_of_layer, row), key=_layer_order)}
    stock = {name: row[name] for name in STOCK_COLUMNS if name in row}
    return {column: row.get(column, math.nan) for column in COLUMNS} | layers | stock


def _layer_order(column: str) -> tuple[int, int]:
    layer, _, name = column.partition("_")
    return int(layer.removeprefix("layer")), COLUMNS.index(name)


def _rllib_columns(result: Mapping, iteration: int) -> Row:
    """The columns that RLlib's own result keys hold (either API stack).

    Of the episodes that ended in this iteration where `StockRunner` sampled, else RLlib's moving
    averages.
    """
    runners = result.get("env_runners") or {}
    learner = (result.get("learners") or {}).get("default_policy") or {}
    if math.isnan(learner.get("module_train_batch_size_mean", 0.0)):
        # The learner's thread ended no update in this iteration, and RLlib says NaN of its loss.
        learner = {}
    found = {
        "env_steps": result.get("num_env_steps_sampled_lifetime"),
        "episodes": runners.get("num_episodes_lifetime"),
        "success_rate": runners.get("success_rate"),
        "episode_return_mean": runners.get("episode_return_mean"),
        "episode_length_mean": runners.get("episode_len_mean"),
        "policy_loss": learner.get("policy_loss", learner.get("mean_pi_loss")),
        "total_loss": learner.get("total_loss"),
        "value_loss": learner.get("mean_vf_loss", learner.get("vf_loss")),
        "kl": learner.get("mean_kl_loss"),
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
