"""Results folders as frames, the comparison of methods, and its figure."""

import fcntl
import json
import math
import subprocess
import sys

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import yaml
from rich.console import Console

from sgrl.analysis import curves, figures
from sgrl.analysis.comparison import best_learning_rates, compare_methods
from sgrl.analysis.figures import curves_of_training, performance_profiles, scores_against
from sgrl.analysis.outputs import write_comparison
from sgrl.analysis.report import write_report
from sgrl.analysis.style import COLOURS, method_styles
from sgrl.results.metrics import DEFAULT_ENVIRONMENTS, append_row, read_metrics, score
from sgrl.results.runs import (
    DEFAULT_BATCHES,
    ResultsError,
    _planned_steps,
    load_results,
)
from sgrl.tuning.experiment.sections import algorithm_class


def write_results(directory, iterations=12, seeds=3):
    """Two methods, one with two learning rates, three seeds, two numbers of environments."""
    generator = np.random.default_rng(0)
    directory.mkdir()
    methods = {"sparsenet_sgprop": [0.001, 0.002], "mine": [None]}
    (directory / "experiment.yaml").write_text(
        yaml.safe_dump({"methods": methods}, sort_keys=False)
    )
    for method, rates in methods.items():
        for rate in rates:
            for envs in (20, 4):
                for seed in range(seeds):
                    swept = ({"lr": rate} if rate else {}) | {"envs": envs}
                    name = "_".join([method, *(f"{k}={v}" for k, v in swept.items()), f"{seed}"])
                    folder = directory / name
                    folder.mkdir()
                    config = {"name": name, "method": method, "seed": seed, "swept": swept}
                    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
                    (folder / "status.json").write_text('{"state": "completed"}')
                    for iteration in range(1, iterations + 1):
                        rise = 1 - math.exp(-iteration * (rate or 0.0005) * 100)
                        append_row(
                            folder / "metrics.csv",
                            {
                                "iteration": iteration,
                                "env_steps": iteration * envs * 10,
                                "success_rate": 0.9 * rise + 0.1 * generator.random(),
                            },
                        )
    return directory


@pytest.fixture
def results(tmp_path):
    return write_results(tmp_path / "results")


def test_trials_and_curves(results):
    loaded = load_results(results)
    trials, curves = loaded.trials, loaded.curves
    assert list(trials.columns) == [
        "trial",
        "method",
        "lr",
        "envs",
        "seed",
        "state",
        "iterations",
        "planned",
        "batch",
        "budget",
        "parameters",
        "final_success_rate",
        "auc",
        "env_steps",
        "seconds",
        "reason",
    ]
    assert loaded.swept == ["lr", "envs"]
    assert loaded.measure == "success_rate"
    assert loaded.problems == ()
    # The methods' order is the experiment's, the other values rise.
    assert list(trials["method"]) == ["sparsenet_sgprop"] * 12 + ["mine"] * 6
    assert list(trials["envs"][:3]) == [4, 4, 4]
    assert list(trials["seed"][:3]) == [0, 1, 2]
    assert list(curves["trial"].drop_duplicates()) == list(trials["trial"])
    assert curves["iteration"].dtype == curves["env_steps"].dtype == int
    for row in trials.itertuples():
        # The same numbers as summary.csv's, computed by the sweep, to the last bit.
        metrics = read_metrics(results / row.trial / "metrics.csv")
        assert ("success_rate", row.final_success_rate, row.auc) == score(metrics)
        curve = curves[curves["trial"] == row.trial].drop(columns="trial")
        pd.testing.assert_frame_equal(
            curve.reset_index(drop=True), pd.DataFrame(metrics), check_exact=True
        )


def test_curves_of_some_trials(results):
    loaded = load_results(results)
    some = loaded.trials[(loaded.trials["method"] == "mine") & (loaded.trials["envs"] == 20)]
    path = results / some["trial"].iloc[1] / "metrics.csv"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:8]))
    loaded = load_results(results)
    wide = loaded.curves_of(loaded.trials.loc[some.index], "success_rate")
    assert list(wide.columns) == list(some["trial"])
    assert list(wide.index) == [200 * i for i in range(1, 8)]  # as far as the shortest
    for name in wide:
        rows = read_metrics(results / name / "metrics.csv")
        assert list(wide[name]) == [row["success_rate"] for row in rows[:7]]
    assert loaded.curves_of(loaded.trials, "eval_reward").empty
    assert loaded.curves_of(loaded.trials[:0], "success_rate").empty


def test_curves_are_interpolated_on_a_common_grid(tmp_path):
    """From where the last of them begins to where the first one ends; never beyond."""
    places = {0: [10, 20, 40, 50], 1: [12, 30, 38, 70], 2: [8, 22, 44, 46]}
    for seed, steps in places.items():
        folder = tmp_path / f"gru_{seed}"
        folder.mkdir()
        config = {"name": folder.name, "method": "gru", "seed": seed}
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        for i, step in enumerate(steps, 1):
            row = {"iteration": i, "env_steps": step, "success_rate": i / (seed + 1)}
            append_row(folder / "metrics.csv", row)
    loaded = load_results(tmp_path)
    wide = loaded.curves_of(loaded.trials, "success_rate")
    assert wide.index.name == "env_steps"
    assert wide.index.tolist() == [12, 24, pytest.approx(122 / 3), 46]
    for seed, steps in places.items():
        rates = [i / (seed + 1) for i in range(1, 5)]
        for step, value in wide[f"gru_{seed}"].items():
            before = max(i for i, other in enumerate(steps) if other <= step)
            share = (step - steps[before]) / (steps[min(before + 1, 3)] - steps[before] or 1)
            expected = rates[before] + share * (rates[min(before + 1, 3)] - rates[before])
            assert value == pytest.approx(expected)


def test_several_folders(results, tmp_path):
    (tmp_path / "more").mkdir()
    other = write_results(tmp_path / "more" / "others", iterations=3)
    loaded = load_results(results, other)
    assert loaded.swept == ["experiment", "lr", "envs"]
    assert list(loaded.trials["experiment"].value_counts()) == [18, 18]
    assert loaded.trials["trial"].is_unique
    assert loaded.trials["trial"].iloc[20].startswith("others/")
    assert len(loaded.curves) == 18 * 12 + 18 * 3
    same = load_results(results, write_results(tmp_path / "more" / "results"))
    assert set(same.trials["experiment"]) == {str(results), str(tmp_path / "more" / "results")}


def test_unfinished_and_damaged_folders_are_read_as_far_as_they_go(results):
    trials = load_results(results).trials
    torn, fresh, failed, empty, edited, alien, going, cut = trials["trial"][:8]

    def lines(trial):
        return (results / trial / "metrics.csv").read_text().splitlines(keepends=True)

    (results / torn / "metrics.csv").write_text("".join(lines(torn))[:-3])
    (results / torn / "status.json").write_text('{"state": "runn')
    (results / fresh / "metrics.csv").unlink()
    (results / fresh / "status.json").unlink()
    status = {"state": "failed", "reason": "NonFiniteLoss: the loss is nan"}
    (results / failed / "status.json").write_text(json.dumps(status))
    (results / empty / "metrics.csv").write_text("")
    kept = lines(edited)
    (results / edited / "metrics.csv").write_text("".join(kept[:5] + kept[6:]))  # a gap
    (results / alien / "metrics.csv").write_text("a,b\n1,2\n")
    (results / going / "status.json").write_text('{"state": "running", "notes": ["a note"]}')
    (results / cut / "metrics.csv").write_text("".join(lines(cut)[:4]) + "4,what,ever\n")
    (results / trials["trial"][8] / "config.yaml").write_text("seed: [")
    (results / "figures").mkdir()
    (results / "notes").mkdir()
    (results / "notes" / "config.yaml").write_text("- mine\n")

    loaded = load_results(results)
    trials = loaded.trials.set_index("trial")
    assert len(trials) == 17
    assert trials.loc[torn, ["state", "iterations"]].tolist() == ["pending", 11]
    assert trials.loc[fresh, ["state", "iterations"]].tolist() == ["pending", 0]
    assert math.isnan(trials.loc[fresh, "final_success_rate"])
    assert trials.loc[failed, ["state", "reason"]].tolist() == list(status.values())
    assert math.isnan(trials.loc[empty, "auc"])
    assert trials.loc[[edited, alien, cut], "iterations"].tolist() == [4, 0, 3]
    assert trials.loc[going, "state"] == "interrupted"
    assert len(loaded.curves) == trials["iterations"].sum()
    for trial in trials.index:
        assert trials.loc[trial, "iterations"] == len(read_metrics(results / trial / "metrics.csv"))
    said = "\n".join(loaded.problems)
    for line in (
        f"{torn}: metrics.csv is damaged after iteration 11; lines dropped: 1",
        f"{torn}: pending at iteration 11",
        f"{fresh}: pending at iteration 0",
        f"{failed}: failed at iteration 12: NonFiniteLoss: the loss is nan",
        f"{empty}: completed, but without a success rate or test reward",
        f"{edited}: metrics.csv is damaged after iteration 4; lines dropped: 7",
        f"{alien}: metrics.csv is damaged after iteration 0; lines dropped: 1",
        f"{alien}: completed, but without a success rate or test reward",
        f"{going}: a note",
        f"{going}: interrupted at iteration 12",
        f"{cut}: metrics.csv is damaged after iteration 3; lines dropped: 1",
        "config.yaml cannot be read; left out",
    ):
        assert line in said
    assert len(loaded.problems) == 12

    with pytest.raises(ResultsError, match="holds no results"):
        load_results(results / "figures")
    with pytest.raises(ResultsError, match="holds no results"):
        load_results(results / "none")


def test_a_trial_is_running_while_the_sweep_holds_its_lock(results):
    trial = load_results(results).trials["trial"][0]
    (results / trial / "status.json").write_text('{"state": "running"}')
    with (results / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert load_results(results).problems == (f"{trial}: running at iteration 12",)
    assert load_results(results).problems == (f"{trial}: interrupted at iteration 12",)


def test_comparison(results):
    lost = load_results(results).trials["trial"][0]
    (results / lost / "status.json").write_text('{"state": "failed", "reason": "nan"}')
    trials = load_results(results).trials
    comparison = compare_methods(trials)
    assert list(comparison["method"]) == ["sparsenet_sgprop"] * 4 + ["mine"] * 2
    assert list(comparison["trials"]) == [2, 3, 3, 3, 3, 3]
    assert list(comparison["failed"]) == [1, 0, 0, 0, 0, 0]
    for column in ("final_success_rate", "auc"):
        first, second = trials[column][1:3]
        assert comparison[column][0] == pytest.approx((first + second) / 2)
        # Of two values, SEM is half their distance.
        assert comparison[f"{column}_sem"][0] == pytest.approx(abs(first - second) / 2)

    best = best_learning_rates(comparison)
    assert list(best["lr"].dropna()) == [0.002, 0.002]
    assert list(best["envs"]) == [4, 20, 4, 20]
    assert list(best["method"]) == ["sparsenet_sgprop"] * 2 + ["mine"] * 2

    equal = comparison.assign(auc=0.5, failed=0)
    equal.attrs = comparison.attrs
    assert list(best_learning_rates(equal)["lr"].dropna()) == [0.001, 0.001]
    one_seed = compare_methods(trials[trials["seed"] == 2])
    assert one_seed["auc_sem"].isna().all()


def test_report_files_and_table(results, capsys):
    failed = load_results(results).trials["trial"][4]
    (results / failed / "status.json").write_text('{"state": "failed", "reason": "nan loss"}')
    comparison = write_comparison(results, Console(width=160))
    said = capsys.readouterr().out
    assert f"{failed}: failed at iteration 12: nan loss" in said
    lines = [line.split() for line in said.splitlines()]
    assert ["method", "lr", "envs", "trials", "failed", "success", "rate", "AUC"] in lines
    row = next(line for line in lines if line[:3] == ["sparsenet_sgprop", "0.001", "20"])
    assert row[3:5] == ["2", "1"]
    trials = load_results(results).trials
    group = trials[(trials["lr"] == 0.001) & (trials["envs"] == 20)]
    own = group["auc"][group["state"] == "completed"]
    assert " ".join(row[9:]) == f"{own.mean():.3f} (seeds {', '.join(f'{s:.3f}' for s in own)})"
    assert "Of fewer than five seeds their own scores are shown, and no SEM or interval." in said
    intervals = [name for name in comparison if "_ci_" in name]
    assert len(intervals) == 4
    assert comparison[intervals].isna().all(axis=None)
    written = pd.read_csv(results / "comparison.csv")
    pd.testing.assert_frame_equal(written, comparison, check_dtype=False)
    assert (results / "figures" / "success_rate.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("seeds", [1, 3, 5])
def test_bands_are_those_of_five_seeds(seeds, tmp_path, monkeypatch):
    """Fewer are drawn themselves, and the caption says so."""
    drawn = []
    for module in (curves, figures):
        monkeypatch.setattr(
            module, "save", lambda figure, path, note, legend=None: drawn.append((figure, note))
        )
    results = load_results(write_results(tmp_path / "results", seeds=seeds))
    curves_of_training(results).draw(tmp_path / "curves.png")
    scores_against(results, tmp_path / "scores.png", "envs")
    performance_profiles(results, tmp_path / "profiles.png")
    bands = 2 if seeds == 5 else 0  # of two methods
    own = {"curves": 2 * 3, "scores": 2 * 2} if seeds == 3 else {"curves": 0, "scores": 0}
    for (figure, note), count in zip(drawn[:2], own.values(), strict=True):
        for axis in figure.axes:
            assert len(axis.collections) == bands
            assert len(axis.lines) == 2 + count
        assert ("band: one SEM" in note) == (seeds == 5)
        assert ("fewer than five (no band)" in note) == (seeds == 3)
        assert ("one seed each" in note) == (seeds == 1)
    figure, note = drawn[2]
    assert len(figure.axes[0].lines) == 2
    assert len(figure.axes[0].collections) == bands
    assert ("no bands: fewer than five seeds" in note) == (seeds < 5)
    plt.close("all")


def reinforce(env="mnist_bandit", length=None, **config):
    env_config = {} if length is None else {"episode_length": length}
    environment = {"env": env, "env_config": env_config}
    return {"algorithm": "Reinforce", "config": {"environment": environment, **config}}


def stock(algorithm, **config):
    return {"algorithm": algorithm, "config": config}


SPREAD = {"total_updates": 1500, "total_iterations": 20}


@pytest.mark.parametrize(
    ("config", "iterations", "batch", "budget"),
    [
        (
            reinforce(length=80, env_runners={"num_envs_per_env_runner": 20, "num_env_runners": 2}),
            *(100, "40 episodes", "320,000 padded environment steps"),
        ),
        # What is left to defaults counts like what is written.
        (reinforce(), 100, "20 episodes", "2,000 episodes"),
        (
            reinforce("labyrinth_escape"),
            *(100, "20 episodes", "160,000 padded environment steps"),
        ),
        # int(linspace(1, 1500, 20))
        (
            reinforce(env_runners={"num_envs_per_env_runner": 64}, training=SPREAD),
            *(20, "64 episodes", "96,000 episodes"),
        ),
        (reinforce(training=SPREAD), 2, "20 episodes", "1,580 episodes"),
        (reinforce(training=dict.fromkeys(SPREAD)), 3, "20 episodes", "60 episodes"),
        (
            stock("PPO", training={"train_batch_size_per_learner": 1600}),
            *(100, "1,600 environment steps", "160,000 environment steps"),
        ),
        (
            stock(
                "PPO",
                training={"train_batch_size_per_learner": 1600},
                learners={"num_learners": 2},
            ),
            *(100, "3,200 environment steps", "320,000 environment steps"),
        ),
        (
            stock("PPO", learners={"num_learners": 2}),
            *(100, "4,000 environment steps", "400,000 environment steps"),
        ),
        # An iteration of these lasts ten seconds.
        (stock("APPO"), 100, "500 environment steps", None),
        (stock("another"), 100, None, None),
    ],
)
def test_batches_and_budgets_are_said(config, iterations, batch, budget):
    config = {**config, "stop": {"training_iteration": iterations}}
    assert _planned_steps(config) == {"batch": batch, "budget": budget}


def test_default_sizes_are_those_of_the_algorithms():
    assert algorithm_class("Reinforce").get_default_config().num_envs_per_env_runner == (
        DEFAULT_ENVIRONMENTS
    )
    for name, size in DEFAULT_BATCHES.items():
        assert algorithm_class(name).get_default_config().total_train_batch_size == size


def test_trials_have_batches_and_budgets(tmp_path):
    folder = write_results(tmp_path / "results", seeds=1)
    trial = min(folder.glob("*/config.yaml")).parent
    saved = yaml.safe_load((trial / "config.yaml").read_text())
    saved |= {**reinforce(), "stop": {"training_iteration": 3}}
    (trial / "config.yaml").write_text(yaml.safe_dump(saved))
    (trial / "status.json").write_text('{"state": "completed", "parameters": 123}')
    trials = load_results(folder).trials.set_index("trial")
    assert list(trials.loc[trial.name, ["batch", "budget", "parameters"]]) == [
        *("20 episodes", "60 episodes", 123)
    ]
    assert trials.drop(trial.name)["parameters"].isna().all()


def test_a_method_has_one_colour_in_all_figures():
    alone, together = method_styles(["gru"]), method_styles(["new", *COLOURS, "other"])
    assert alone["gru"] == together["gru"]
    assert len({style["color"] for style in together.values()}) == len(together)
    assert len({style["marker"] for style in together.values()}) == len(together)
    bandit = method_styles(["sparse_sgprop", "sparse_sgprop_fixed", "sparse_backprop", "dense"])
    assert bandit["sparse_sgprop"] == together["sparsenet_sgprop"]
    assert len({style["color"] for style in bandit.values()}) == 4


def test_figure_without_any_results_yet(results, tmp_path):
    for path in results.glob("*/metrics.csv"):
        path.unlink()
    path = curves_of_training(load_results(results)).draw(tmp_path / "empty.png")
    assert path.is_file()


def test_analysis_imports_without_ray():
    code = (
        "import sys, sgrl.analysis.report\n"
        "assert not any(name.split('.')[0] == 'ray' for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_environments_with_and_without_success_are_compared_by_return(tmp_path, capsys):
    """Each of both kinds alone by what it has."""
    for env, success in (("maze", 0.5), ("cards", math.nan)):
        for seed in range(2):
            folder = tmp_path / f"gru_env={env}_{seed}"
            folder.mkdir()
            config = {"name": folder.name, "method": "gru", "seed": seed, "swept": {"env": env}}
            (folder / "config.yaml").write_text(yaml.safe_dump(config))
            (folder / "status.json").write_text('{"state": "completed"}')
            for iteration in range(1, 8):
                row = {"iteration": iteration, "env_steps": 10 * iteration, "success_rate": success}
                append_row(folder / "metrics.csv", row | {"episode_return_mean": -3.0 + iteration})
    trials = load_results(tmp_path).trials
    assert trials.attrs["measure"] == "episode_return_mean"
    assert trials["final_episode_return_mean"].tolist() == [2.0] * 4
    assert trials["auc"].tolist() == pytest.approx([1.0] * 4)
    comparison = write_comparison(tmp_path)
    assert comparison["final_episode_return_mean"].tolist() == [2.0, 2.0]
    assert "Episode return of the last 5 batches" in capsys.readouterr().out
    assert (tmp_path / "figures" / "episode_return_mean.png").is_file()
    path = write_report([tmp_path], None, "markdown", 0.5, lambda title: None)
    assert "the mean episode return over the last 5 batches" in path.read_text()
