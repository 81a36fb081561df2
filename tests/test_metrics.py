"""metrics.csv: exact values, torn files, truncation, and RLlib's own keys."""

import math
import random

import pytest

from sgrl.results.metrics import (
    COLUMNS,
    append_row,
    common_measure,
    count_rows,
    read_metrics,
    score,
    truncate_metrics,
)
from sgrl.results.rllib_metrics import metrics_row


def write(path, rows, seed=0):
    generator = random.Random(seed)
    for iteration in range(1, rows + 1):
        append_row(
            path,
            {
                "iteration": iteration,
                "env_steps": 40.0 * iteration,
                "success_rate": generator.random(),
                "policy_loss": generator.gauss(0, 1e-7),
                "mixing_weight_mean": math.nan,
                "iteration_seconds": generator.random(),
                "unknown": 1.0,
            },
        )


def test_values_read_back_bit_for_bit(tmp_path):
    path = tmp_path / "metrics.csv"
    write(path, 7)
    generator = random.Random(0)
    for iteration, row in enumerate(read_metrics(path), 1):
        assert tuple(row) == COLUMNS
        assert (row["iteration"], row["env_steps"]) == (iteration, 40 * iteration)
        assert row["success_rate"] == generator.random()
        assert row["policy_loss"] == generator.gauss(0, 1e-7)
        assert row["iteration_seconds"] == generator.random()
        assert math.isnan(row["grad_norm"])
        assert math.isnan(row["mixing_weight_mean"])
    assert path.read_text().splitlines()[0] == ",".join(COLUMNS)
    assert path.read_text().splitlines()[1].startswith("1,40,")


def test_any_torn_file_reads_as_its_whole_rows(tmp_path):
    path = tmp_path / "metrics.csv"
    write(path, 4)
    content = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(content) if byte == ord("\n")]
    for size in range(len(content) + 1):
        path.write_bytes(content[:size])
        assert count_rows(path) == max(0, sum(end <= size for end in ends) - 1)


def test_truncation_keeps_the_first_rows_untouched(tmp_path):
    path = tmp_path / "metrics.csv"
    write(path, 6)
    lines = path.read_bytes().splitlines(keepends=True)
    with path.open("ab") as file:
        file.write(b"7,280,0.1")
    truncate_metrics(path, 4)
    assert path.read_bytes() == b"".join(lines[:5])
    with pytest.raises(ValueError, match="4 whole rows"):
        truncate_metrics(path, 5)
    truncate_metrics(path, 0)
    assert not path.exists()


def test_gaps_repeats_and_other_headers_are_not_read(tmp_path):
    path = tmp_path / "metrics.csv"
    write(path, 5)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:3] + lines[4:]))
    assert count_rows(path) == 2
    path.write_text("".join(lines[:3] + lines[2:]))
    assert count_rows(path) == 2
    path.write_text("iteration\n1\n")
    assert count_rows(path) == 0
    assert count_rows(tmp_path / "none.csv") == 0


def test_summary_numbers():
    steps = [(0, 0.2), (10, 0.4), (40, 1.0), (50, 0.0), (60, 0.5), (70, 0.6)]
    rows = [{"env_steps": step, "success_rate": rate} for step, rate in steps]
    assert score(rows).measure == "success_rate"
    assert score(rows).final == pytest.approx((0.4 + 1.0 + 0.0 + 0.5 + 0.6) / 5)
    assert score(rows).auc == pytest.approx((3 + 21 + 5 + 2.5 + 5.5) / 70)
    assert score(rows[:1]).auc == 0.2
    assert math.isnan(score([]).final)
    assert math.isnan(score([]).auc)


def test_trials_that_evaluate_are_judged_by_that():
    rows = [
        {"env_steps": 10 * i, "success_rate": 0.5, "eval_reward": value}
        for i, value in enumerate([0.1, math.nan, 0.3])
    ]
    assert score(rows) == ("eval_reward", 0.3, pytest.approx(0.2))


def test_without_success_trials_are_judged_by_their_return():
    rows = [
        {"env_steps": 10 * i, "success_rate": math.nan, "episode_return_mean": value}
        for i, value in enumerate([-9.0, 1.0, 1.0, 2.0, -1.0, 3.0])
    ]
    assert score(rows) == ("episode_return_mean", 1.2, pytest.approx(0.0, abs=1e-12))
    assert common_measure([]) == common_measure(["", "success_rate"]) == "success_rate"
    assert common_measure(["success_rate", "episode_return_mean"]) == "episode_return_mean"
    assert common_measure(["success_rate", "eval_reward"]) == "eval_reward"


def test_columns_of_layers(tmp_path):
    path = tmp_path / "metrics.csv"
    reported = {"env_steps": 1, "layer1_mixing_weight_mean": 0.2, "layer0_mixing_weight_max": 0.3}
    reported["layer0_mixing_weight_mean"] = 0.1
    for iteration in (1, 2):
        append_row(path, metrics_row({"sgrl": reported}, iteration, 0.5))
    header = path.read_text().splitlines()[0].split(",")
    layers = [f"layer{name}" for name in ("0_mixing_weight_mean", "0_mixing_weight_max")]
    layers.append("layer1_mixing_weight_mean")
    assert header == [*COLUMNS[:-1], *layers, COLUMNS[-1]]
    assert [read_metrics(path)[1][name] for name in layers] == [0.1, 0.3, 0.2]
    truncate_metrics(path, 1)
    assert count_rows(path) == 1
    assert path.read_text().splitlines()[0].split(",") == header


@pytest.mark.parametrize("without", [{1}, {1, 2, 4}, {2}, {3, 4}])
def test_rows_without_an_update_fit_the_others(tmp_path, without):
    """As of APPO and IMPALA, whose learner may have ended no update in an iteration."""
    path = tmp_path / "metrics.csv"
    layers = {f"layer{layer}_mixing_weight_mean": 0.1 + layer for layer in (0, 1)}
    for iteration in range(1, 5):
        learner = {"policy_loss": 0.5, "sgrl": {**layers, "predictor_loss": 0.25}}
        if iteration in without:
            learner = {"policy_loss": math.nan, "module_train_batch_size_mean": math.nan}
        row = metrics_row({"learners": {"default_policy": learner}}, iteration, 0.5)
        append_row(path, row | {"env_steps": iteration})
    rows = read_metrics(path)
    expected = [math.nan if iteration in without else 1.1 for iteration in range(1, 5)]
    assert [row["layer1_mixing_weight_mean"] for row in rows] == pytest.approx(
        expected, nan_ok=True
    )
    assert [row["env_steps"] for row in rows] == [1, 2, 3, 4]
    assert list(rows[0]) == [*COLUMNS[:-1], *layers, COLUMNS[-1]]
    truncate_metrics(path, 3)
    assert count_rows(path) == 3
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.csv"]


def test_rows_of_other_algorithms_come_from_rllibs_keys():
    result = {
        "num_env_steps_sampled_lifetime": 400,
        "env_runners": {"episode_return_mean": 0.5, "episode_len_mean": 12.0},
        "learners": {
            "default_policy": {
                "policy_loss": 0.1,
                "total_loss": 0.2,
                "entropy": 1.3,
                "gradients_default_optimizer_global_norm": 3.0,
            }
        },
    }
    row = metrics_row(result, 3, 0.25)
    assert tuple(row) == COLUMNS
    assert {key: value for key, value in row.items() if not math.isnan(value)} == {
        "iteration": 3,
        "env_steps": 400,
        "episode_return_mean": 0.5,
        "episode_length_mean": 12.0,
        "policy_loss": 0.1,
        "entropy": 1.3,
        "grad_norm": 3.0,
        "iteration_seconds": 0.25,
    }
    # The thread in which APPO learns need not have come to an end of anything.
    result["learners"]["default_policy"] |= {
        "policy_loss": math.nan,
        "total_loss": math.nan,
        "module_train_batch_size_mean": math.nan,
    }
    row = metrics_row(result, 3, 0.25)
    assert row["env_steps"] == 400
    assert math.isnan(row["policy_loss"])
    stats = {"policy_loss": 0.1, "total_loss": 0.2, "entropy": 1.3, "grad_gnorm": 3.0}
    old = {"info": {"learner": {"default_policy": {"learner_stats": stats}}}, "env_runners": {}}
    assert metrics_row(old, 1, 0.1)["grad_norm"] == 3.0


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("key", ["policy_loss", "total_loss"])
def test_a_non_finite_loss_is_no_row(loss, key):
    with pytest.raises(FloatingPointError, match=f"{key} is .* at iteration 2"):
        metrics_row({"learners": {"default_policy": {key: loss}}}, 2, 0.1)
    assert metrics_row({"sgrl": {"policy_loss": 0.1, "grad_norm": math.nan}}, 2, 0.1)
