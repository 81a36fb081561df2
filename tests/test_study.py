"""How claims are decided, on made-up archives."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner

from sgrl.analysis.published import PURPOSE, draw_study, table_named, write_into
from sgrl.analysis.study import CLAIMS, judge_claims
from sgrl.cli import app
from sgrl.results.archive import write_archive
from sgrl.results.locations import reading
from sgrl.results.metrics import write_rows
from sgrl.results.runs import ResultsError, load_results
from sgrl.results.storage import is_archive

DOCS = Path(__file__).parent.parent / "docs"


def publish(
    published: Path,
    name: str,
    scores: dict[str, list[float]],
    swept: dict[str, list[float]] | None = None,
    measure: str = "success_rate",
    failed: Sequence[str] = (),
    **columns: dict[float, float],
) -> None:
    """An archive whose trials have constant curves.

    Args:
        published: folder of the archives.
        name: of this one.
        scores: by method, of seeds 0, 1, ...; with `swept` of its first value, and lower by a
            hundredth at each further one.
        swept: name and values of a swept value; a method's own where the name is "METHOD.NAME".
        measure: column of the scores.
        failed: trials that failed after half of their iterations.
        columns: last values of further columns by swept value.
    """
    sweep = published.parent / f"sweep_{name}"
    ((key, values),) = (swept or {"": [0.0]}).items()
    for method, of_seeds in scores.items():
        owner, _, short = key.rpartition(".")
        points = values if owner in ("", method) else [None]
        for place, value in enumerate(points):
            for seed, score in enumerate(of_seeds):
                point = {} if value is None or not short else {short: value}
                trial = "_".join([method, *(f"{k}={v}" for k, v in point.items()), f"seed={seed}"])
                folder = sweep / trial
                folder.mkdir(parents=True)
                config = {"name": trial, "method": method, "seed": seed, "swept": point}
                config["stop"] = {"training_iteration": 2}
                (folder / "config.yaml").write_text(json.dumps(config))
                state = "failed" if trial in failed else "completed"
                (folder / "status.json").write_text(json.dumps({"state": state}))
                row = {measure: score - 0.01 * place, "iteration_seconds": 1.0}
                row |= {column: by[value] + 0.001 * seed for column, by in columns.items()}
                last = 1 if trial in failed else 2
                rows = [{"iteration": i, "env_steps": 10 * i, **row} for i in (1, 2)[:last]]
                write_rows(folder / "metrics.csv", rows)
    write_archive(sweep, published / name)


def spread(mean: float, seeds: int, width: float = 0.02) -> list[float]:
    """Scores around a mean, all different."""
    return (mean + width * np.linspace(-1, 1, seeds)).tolist()


@pytest.fixture
def published(tmp_path: Path) -> Path:
    folder = tmp_path / "published"
    folder.mkdir()
    return folder


def judged(published: Path) -> dict[int, dict]:
    return {row["number"]: row for row in judge_claims(published).to_dict("records")}


def test_nothing_is_judged_without_runs(published: Path) -> None:
    assert {row["verdict"] for row in judged(published).values()} == {"not run yet"}


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (spread(0.8, 20), spread(0.6, 20), "confirmed"),
        (spread(0.6, 20), spread(0.8, 20), "not confirmed"),
        (spread(0.7, 20, 0.01), spread(0.7, 20, 0.01), "not confirmed"),
        (spread(0.7, 20, 0.3), spread(0.7, 20, 0.3), "cannot tell (would need"),
    ],
)
def test_two_methods(published: Path, first: list, second: list, expected: str) -> None:
    methods = {"sparsenet_sgprop": first, "sparsenet_backprop": second}
    publish(published, "escape_confirmation", methods)
    baselines = {"gru": second, "lstm": second[:19], "mlp": second}
    publish(published, "escape_confirmation_baselines", baselines)
    rows = judged(published)
    assert rows[9]["verdict"].startswith(expected)
    assert rows[10]["verdict"].startswith(expected)
    assert rows[9]["runs"] == "20 against 20"
    assert rows[10]["runs"] == "20 against 20; 20 against 19"
    assert f"difference {np.mean(first) - np.mean(second):+.3f}" in rows[9]["ours"]


def test_failed_trials_count(published: Path) -> None:
    """As 0 from where they failed on, and by name."""
    failed = [f"sparsenet_sgprop_seed={seed}" for seed in range(20)]
    scores = {"sparsenet_sgprop": spread(0.8, 20), "sparsenet_backprop": spread(0.6, 20)}
    publish(published, "escape_confirmation", scores, failed=failed)
    scores = {"gru": spread(0.3, 20), "lstm": spread(0.3, 20)}
    publish(published, "escape_confirmation_baselines", scores)
    rows = judged(published)
    assert rows[9]["verdict"] == "not confirmed"
    assert "AUC 0.400 against sparsenet_backprop 0.600" in rows[9]["ours"]
    assert rows[9]["runs"] == f"20 against 20; failed: {', '.join(failed)}"
    assert rows[10]["verdict"] == "confirmed"


def test_better_than_all_is_as_good_as_the_weakest(published: Path) -> None:
    scores = {"sparsenet_sgprop": spread(0.8, 40), "sparsenet_backprop": spread(0.8, 40)}
    publish(published, "explore_confirmation", scores)
    scores = {"gru": spread(0.5, 20), "lstm": spread(0.9, 20)}
    publish(published, "explore_confirmation_baselines", scores)
    assert judged(published)[12]["verdict"] == "not confirmed"


@pytest.mark.parametrize(("gap", "verdict"), [(0.2, "confirmed"), (-0.2, "not confirmed")])
def test_sweeps_are_stratified(published: Path, gap: float, verdict: str) -> None:
    levels = [0.0, 0.1, 0.2, 0.3, 0.4]
    scores = {"sparse_sgprop": spread(0.7 + gap, 6), "sparse_backprop": spread(0.7, 6)}
    weights = {level: (0.9 - level if gap > 0 else level) for level in levels}
    publish(
        published,
        "mnist_reward_noise",
        scores,
        {"p_flip": levels},
        "eval_reward",
        mixing_weight_mean=weights,
    )
    rows = judged(published)
    assert rows[4]["verdict"] == rows[7]["verdict"] == verdict
    assert rows[4]["runs"] == "30 against 30"
    assert rows[4]["ours"].count(f"{gap:+.3f}") == 6


def test_an_advantage_that_is_not_everywhere(published: Path) -> None:
    """It is neither confirmed nor refuted."""
    levels = [0.0, 0.1, 0.2, 0.3, 0.4]
    scores = {"sparse_sgprop": spread(0.9, 6), "sparse_backprop": spread(0.7, 6)}
    publish(published, "mnist_parents", scores, {"num_parents": levels}, "eval_reward")
    trials = published / "mnist_parents"
    table = pq.read_table(trials / "metrics.parquet").to_pandas()
    table.loc[table["trial"].str.contains("sgprop_num_parents=0.2"), "eval_reward"] = 0.1
    table.to_parquet(trials / "metrics.parquet")
    row = judged(published)[6]
    assert row["p"] < 0.05
    assert row["verdict"] == "cannot tell (not so in every case)"


def test_no_trend_is_no_number_of_seeds(published: Path) -> None:
    levels = [0.0, 0.1, 0.2, 0.3, 0.4]
    scores = {"sparse_sgprop": spread(0.8, 6), "sparse_backprop": spread(0.7, 6)}
    weights = dict(zip(levels, (0.5, 0.4, 0.5, 0.4, 0.5), strict=True))
    swept = {"p_flip": levels}
    publish(
        published, "mnist_reward_noise", scores, swept, "eval_reward", mixing_weight_mean=weights
    )
    assert judged(published)[7]["verdict"] == "cannot tell"


@pytest.mark.parametrize(("inside", "verdict"), [(9, "confirmed"), (8, "not confirmed")])
def test_the_law_of_the_expert_network(published: Path, inside: int, verdict: str) -> None:
    """In at least 88% of each case's cells."""
    cells = [
        {"case": case, "d": 4, "k": 2, "n": 1, "ratio_ci_low": low, "ratio_ci_high": 5}
        for case in ("noisy", "partial")
        for low in [3.0] * (inside if case == "noisy" else 10)
        + [4.5] * (10 - inside if case == "noisy" else 0)
    ]
    (published / "expert_network").mkdir()
    pd.DataFrame(cells).to_csv(published / "expert_network" / "expert_network.csv", index=False)
    row = judged(published)[1]
    assert row["verdict"] == verdict
    assert f"(noisy {inside / 10:.1%}, partial 100.0%)" in row["ours"]


def test_best_learning_rates(published: Path) -> None:
    scores = {"sparse_sgprop": spread(0.7, 6), "sparse_backprop": spread(0.6, 6)}
    publish(published, "mnist_learning_rate", scores, {"lr": [1e-3, 5e-3]}, "eval_reward")
    row = judged(published)[5]
    assert row["verdict"] == "not confirmed"  # the smaller one is best of both
    assert row["ours"].startswith("0.001 against 0.001; larger in 0.0%")


@pytest.mark.parametrize(("adaptive", "verdict"), [(0.7, "confirmed"), (0.5, "not confirmed")])
def test_adaptive_against_fixed(published: Path, adaptive: float, verdict: str) -> None:
    scores = {"sparse_sgprop": spread(adaptive, 6), "sparse_sgprop_fixed": spread(0.7, 6)}
    swept = {"sparse_sgprop_fixed.mixing_weight": [0.9, 0.5]}
    publish(published, "mnist_fixed_mixing", scores, swept, "eval_reward")
    assert judged(published)[8]["verdict"] == verdict


def test_controls(published: Path) -> None:
    scores = {"sparsenet_sgprop": 0.7, "sparsenet_placebo": 0.6, "sparsenet_backprop": 0.8}
    publish(published, "labyrinth_placebo", {k: spread(v, 20) for k, v in scores.items()})
    backprop = spread(0.8, 40)
    publish(
        published,
        "escape_confirmation",
        dict.fromkeys(("sparsenet_backprop", "sparsenet_sgprop"), backprop),
    )
    rows = {row["claim"]: row["verdict"] for row in judge_claims(published).to_dict("records")}
    halves = "Backprop's seeds in two halves"
    assert rows[f"{halves}, escape"].startswith("no difference (p = ")
    assert rows[f"{halves}, explore"] == "not run yet"
    escape = "On LabyrinthEscape"
    assert rows[f"{escape} sgprop learns faster than GRU and LSTM"] == "not run yet"
    assert rows[f"{escape} sgprop learns faster than with shuffled predictions"] == "confirmed"
    assert rows[f"{escape} shuffled predictions learn faster than backprop"] == "not confirmed"


def test_claims_are_those_of_the_plan() -> None:
    plan = (DOCS / "study.md").read_text()
    numbers = [claim.number for claim in CLAIMS.values() if claim.number]
    assert numbers == list(range(1, 15))
    for number in numbers:
        assert f"| {number}. " in plan


@pytest.mark.parametrize("name", ["study.md", "learning.md", "predictors.md"])
def test_pages_hold_what_the_archives_say(name: str, tmp_path: Path) -> None:
    """`sgrl study --write docs/study.md` would change nothing."""
    page = tmp_path / name
    shutil.copy(DOCS / name, page)
    assert write_into(page, DOCS.parent / "results" / "published") >= 1
    assert page.read_text() == (DOCS / name).read_text()


def test_every_archive_has_its_purpose_and_no_problems() -> None:
    """No trial of an archive is missing or damaged, and what each cost is told."""
    published = DOCS.parent / "results" / "published"
    archives = [path.name for path in published.iterdir() if is_archive(path)]
    assert set(archives) <= set(PURPOSE)
    table = table_named("cost", published)
    for name in archives:
        assert f"| {name} |" in table
        with reading(published / name) as folder:
            results = load_results(folder)
        assert not results.problems
        experiment = yaml.safe_load((published / name / "experiment.yaml").read_text())
        trials = results.trials
        assert set(trials["state"]) <= {"completed", "failed"}
        assert set(trials["seed"]) == set(experiment["seeds"])
        assert set(trials["method"]) == set(experiment["methods"])
        sizes = trials.groupby(["method", "seed"]).size()
        assert sizes.groupby("method").nunique().eq(1).all()  # every point with every seed
        assert sum(path.stat().st_size for path in published.rglob("*")) < 40e6


def test_tables(published: Path, tmp_path: Path) -> None:
    publish(
        published,
        "escape_confirmation",
        {"sparsenet_sgprop": spread(0.6, 6), "sparsenet_backprop": spread(0.5, 6)},
        failed=["sparsenet_backprop_seed=5"],
    )
    archive = published / "escape_confirmation"
    (archive / "experiment.yaml").write_text("num_threads: 2\n")
    table = table_named("cost", published)
    # Twelve trials of two seconds, one of which failed after the first, on two threads.
    hours = f"{23 * 2 / 3600:.1f}"
    assert "| Figure 3 | escape_confirmation | 12 | 1 | 0 |" in table
    assert f"| all |  |  |  |  | {hours} |  |" in table
    rows = table_named("escape_confirmation", published).splitlines()[2:]
    assert rows[0].startswith("| sparsenet_backprop | 5 | 1 |")
    assert rows[1] == "| sparsenet_sgprop | 6 | 0 | 0.600 ± 0.006 | 0.600 ± 0.006 |"


def test_the_figure(published: Path, tmp_path: Path) -> None:
    """A panel for each task with archives of confirmation runs, a line for each method."""
    with pytest.raises(ResultsError, match="holds no archives of confirmation runs"):
        draw_study(published, tmp_path / "study.png")
    publish(published, "escape_confirmation", {"sparsenet_sgprop": spread(0.6, 6)})
    publish(published, "escape_confirmation_baselines", {"gru": spread(0.5, 5)})
    publish(published, "mnist_confirmation", {"dense": spread(0.7, 6)}, measure="eval_reward")
    arguments = ["study", str(published), "--figure", str(tmp_path / "study.png")]
    result = CliRunner().invoke(app, arguments)
    assert (result.exit_code, result.output) == (0, f"written: {tmp_path / 'study.png'}\n")
    drawn = (tmp_path / "study.svg").read_text()
    for text in (
        "LabyrinthEscape",
        "MNIST bandit",
        "sparsenet_sgprop, n=6",
        "gru, n=5",
        "dense, n=6",
    ):
        assert f"<!-- {text} -->" in drawn or f">{text}<" in drawn, text
    assert "LabyrinthExplore" not in drawn


def test_the_command(published: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("Before.\n\n<!-- findings -->\nold\n<!-- end of findings -->\nAfter.\n")

    def study(*arguments: str | Path) -> tuple[int, str]:
        result = CliRunner().invoke(app, ["study", *map(str, arguments)])
        return result.exit_code, result.output

    code, output = study(published, "--write", page)
    assert (code, output) == (0, f"written: 1 tables of {page}\n")
    text = page.read_text()
    assert text.startswith("Before.\n")
    assert text.endswith("\nAfter.\n")
    assert text.count("not run yet") == len(CLAIMS)
    assert "old" not in text
    code, output = study(published)
    assert code == 0
    findings, _, cost = output.partition("\n\n")
    assert findings in text
    assert cost.startswith("| for |")
    code, output = study(tmp_path / "nowhere")
    assert code == 2
    assert "does not exist" in output
    for wrong, said in {
        "no marks": "does not hold the lines",
        "<!-- a -->\n<!-- end of b -->": "is followed by",
        "<!-- a -->\n<!-- end of a -->": "no such table, and no archive",
    }.items():
        page.write_text(wrong)
        code, output = study(published, "--write", page)
        assert code == 2
        assert said in output
        assert page.read_text() == wrong
