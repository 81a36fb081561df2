"""Sweeps in which results decide on what is trained, with stand-ins for algorithms."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tree
from ray import tune
from ray.tune.search import SEARCH_ALG_IMPORT
from ray.tune.search.optuna import OptunaSearch, optuna_search
from stand_ins import (
    LR,
    POPULATION,
    SEARCH,
    TWO,
    stand_in_class,
    stand_in_runner,
    success_rates,
    under_kills,
)
from sweeps import CONFIG, METHODS, make_experiment, metrics_without_times, summary

from sgrl.analysis.comparison import (
    best_learning_rates,
    compare_methods,
)
from sgrl.results.checkpoints import discard_after, write_checkpoint
from sgrl.results.folder import SweepFolder, TrialFolder
from sgrl.results.grids import DISTRIBUTIONS
from sgrl.results.metrics import count_rows, final_of, read_metrics, truncate_metrics
from sgrl.results.plan import ExperimentError, Point
from sgrl.results.runs import load_results
from sgrl.results.status import sweep_status
from sgrl.tuning import sweep
from sgrl.tuning.experiment.file import SEARCHERS
from sgrl.tuning.experiment.load import load_experiment
from sgrl.tuning.experiment.searches import example_points, extreme_points
from sgrl.tuning.experiment.sections import build_algorithm_config
from sgrl.tuning.population import hand_over, with_values
from sgrl.tuning.racing import Race
from sgrl.tuning.sweep import SweepError, resume_plan, resume_sweep, run_sweep


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch):
    monkeypatch.setattr(sweep, "TrialRunner", stand_in_runner())


def states(directory):
    return {row.trial.name: row.state for row in sweep_status(directory).rows}


# Races ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def raced(tmp_path_factory, ray_session):
    """A race of a good and a bad method."""
    folder = tmp_path_factory.mktemp("race")
    experiment = make_experiment(
        folder / "race.yaml",
        TWO,
        name="race",
        seeds="0..19",
        schedule={"name": "race", "first": 4, "every": 2},
        concurrency="auto",
    )
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sweep, "TrialRunner", stand_in_runner())
        return experiment, run_sweep(experiment, folder / "results")


def test_a_sweep_runs_what_the_race_alone_asks_for(raced, capsys):
    experiment, directory = raced
    scores = {
        (trial.method, trial.seed): np.mean(success_rates(trial)) for trial in experiment.trials
    }
    race, runs = Race(["gru", "lstm"], range(20), first=4, every=2), set()
    while asked := race.next_runs():
        runs |= set(asked)
        for run in asked:
            race.add(*run, scores[run])
    assert race.racing == ["gru"]
    # At least 30% fewer than the grid.
    assert len(runs) <= 0.7 * len(scores)
    table = summary(directory)
    expected = {
        f"{method}_seed={seed}": "completed" if (method, seed) in runs else "skipped"
        for method, seed in scores
    }
    assert table["state"].to_dict() == expected == states(directory)
    assert set(metrics_without_times(directory)) == {
        name for name, state in expected.items() if state == "completed"
    }
    stopped = race.out["lstm"]
    reasons = set(table["reason"][table["state"] == "skipped"])
    assert reasons == {
        "race: the last one left",
        f"race: worse than gru by {stopped.difference:.3g}, {stopped.seeds} seeds, "
        f"p = {stopped.p:.2g}",
    }


def test_skipped_trials_are_none_that_lack(raced):
    _, directory = raced
    results = load_results(directory)
    assert results.problems == ()
    assert set(results.trials["state"]) == {"completed", "skipped"}
    status = sweep_status(directory)
    assert status.problems == status.lines == []
    counts = status.as_dict()["counts"]
    assert counts["completed"] + counts["skipped"] == 40
    assert all(row.is_over for row in status.rows)


def test_a_race_goes_on_from_wherever_it_was(raced, tmp_path, monkeypatch):
    _, directory = raced
    whole, decided = metrics_without_times(directory), states(directory)
    _, todo = resume_plan(directory)
    assert todo == []
    monkeypatch.setattr(sweep, "_run_trials", None)
    assert resume_sweep(directory) == directory
    monkeypatch.undo()
    monkeypatch.setattr(sweep, "TrialRunner", stand_in_runner())

    # As it was in the second round, where one run had not begun and another had half ended.
    back = Path(shutil.copytree(directory, tmp_path / "back"))
    for trial in back.glob("*_seed=*"):
        if int(trial.name.partition("=")[2]) > 5 or trial.name == "gru_seed=5":
            shutil.rmtree(trial)
    (back / "rounds.json").write_text('{"over": 1}')
    half = back / "lstm_seed=5"
    (half / "status.json").write_text('{"state": "running", "notes": []}')
    shutil.rmtree(half / "checkpoints" / "000005")
    before = {path: path.read_bytes() for path in back.rglob("*") if path.is_file()}
    trials, todo = resume_plan(back)
    assert len(trials) == 40
    assert [(row.trial.name, row.iteration, end) for row, end in todo] == [
        ("gru_seed=5", 0, 5),
        ("lstm_seed=5", 4, 5),
    ]
    assert before == {path: path.read_bytes() for path in before}
    resume_sweep(back)
    assert metrics_without_times(back) == whole
    assert states(back) == decided
    assert json.loads((back / "rounds.json").read_text())["over"] > 1


def test_a_failure_that_has_been_decided_by_stays_one(raced, tmp_path, monkeypatch):
    _, directory = raced
    copied = Path(shutil.copytree(directory, tmp_path / "copied"))
    status = {"state": "failed", "reason": "out of memory", "notes": []}
    (copied / "gru_seed=0" / "status.json").write_text(json.dumps(status))
    _, todo = resume_plan(copied)
    assert "gru_seed=0" not in {row.trial.name for row, _ in todo}


def test_a_race_cannot_be_changed_but_for_its_seeds(raced):
    _, directory = raced
    trials, _ = resume_plan(directory, additions=["seeds=20..24"])
    assert len(trials) == 50
    with pytest.raises(ExperimentError, match="race has decided by what there is so far"):
        resume_plan(directory, iterations=9)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ({"name": "rase"}, "schedule.name: unknown schedule 'rase'; did you mean 'race'?"),
        ({"error_rate": 0.1}, "schedule.name: missing; one of race"),
        ({"name": "race", "errorrate": 0.1}, "schedule.errorrate: unknown key; did you mean 'er"),
        ({"name": "race", "error_rate": 2}, "schedule: error_rate 2 is not between 0 and 1"),
        ({"name": "race", "first": "5"}, "schedule.first: expected a whole number, got '5'"),
        ({"name": "race", "first": 2}, "schedule.first: must be less than the number of seeds, 2"),
        ({"name": "race", "mode": "maximum"}, "schedule.mode: unknown mode 'maximum'; did you me"),
        ({"name": "race", "metric": "sucess_rate"}, "did you mean 'success_rate'?"),
        ({"name": "race", "metric": "episode_return_mean"}, "schedule.bounds: missing: between wh"),
        ({"name": "race", "metric": "eval_success_rate"}, "takes evaluations: set evaluate, too"),
    ],
)
def test_mistakes_in_a_schedule(tmp_path, schedule, message):
    with pytest.raises(ExperimentError) as error:
        make_experiment(tmp_path / "small.yaml", TWO, schedule=schedule)
    (line,) = str(error.value).splitlines()
    assert message in line


def test_a_race_takes_two(tmp_path):
    with pytest.raises(ExperimentError, match="takes at least two methods or values of a grid"):
        make_experiment(tmp_path / "small.yaml", ("gru",), seeds="0..9", schedule={"name": "race"})


def test_without_a_schedule_there_is_none_in_the_folder(tmp_path):
    make_experiment(tmp_path / "small.yaml", {"gru": METHODS["gru"]})
    assert "schedule" not in load_experiment(tmp_path / "small.yaml").resolved


# Searches ---------------------------------------------------------------------------------------

GRU = {"gru": TWO["gru"]}


@pytest.fixture(scope="module")
def searched(tmp_path_factory, ray_session):
    """A search for a learning rate. Optuna goes by results from its eleventh suggestion on."""
    folder = tmp_path_factory.mktemp("search")
    experiment = make_experiment(folder / "search.yaml", GRU, **SEARCH)
    assert experiment.trials == []
    assert len(experiment.examples) == 42
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sweep, "TrialRunner", stand_in_runner())
        return run_sweep(experiment, folder / "results")


def assert_rows(directory):
    """Each trial has its own rows, from the first one to where it has got."""
    for row in sweep_status(directory).rows:
        rows = read_metrics(directory / row.trial.name / "metrics.csv")
        assert [r["success_rate"] for r in rows] == success_rates(row.trial)[: len(rows)]
        assert row.state != "completed" or len(rows) == row.last_iteration


def test_a_search_suggests_what_the_searcher_does_by_the_mean_of_the_seeds(searched):
    suggestions = json.loads((searched / "rounds.json").read_text())["suggestions"]
    rates = [values[LR] for values in suggestions["gru"]]
    for sign in (1, -1):
        searcher = OptunaSearch(seed=5)
        space = {LR: tune.loguniform(1e-5, 1e-1)}
        searcher.set_search_properties("success_rate", "max", space)
        said = []
        for first in range(0, 14, 4):
            numbers = range(first, min(first + 4, 14))
            said += [searcher.suggest(str(number))[LR] for number in numbers]
            for number in numbers:
                names = [f"gru_lr={rates[number]}_seed={seed}" for seed in range(3)]
                files = [searched / name / "metrics.csv" for name in names]
                scores = [final_of(read_metrics(file), "success_rate") for file in files]
                searcher.on_trial_complete(str(number), {"success_rate": sign * np.mean(scores)})
        # Told otherwise, it would have suggested something else.
        assert (said == pytest.approx(rates, rel=1e-5)) == (sign == 1)
    assert_rows(searched)
    table = summary(searched)
    assert set(table["state"]) == {"completed"}
    assert len(table) == 42
    trials = load_results(searched).trials
    best = best_learning_rates(compare_methods(trials))
    assert list(best["lr"]) == [max(rates, key=lambda lr: trials["auc"][trials["lr"] == lr].mean())]
    assert list(table["lr"].unique()) == rates
    assert load_results(searched).problems == ()


def test_a_search_goes_on_as_it_would_have(searched, tmp_path):
    back = Path(shutil.copytree(searched, tmp_path / "back"))
    record = json.loads((back / "rounds.json").read_text())
    for method, values in record["suggestions"].items():
        for suggested in values[4:]:
            for trial in back.glob(f"{method}_lr={suggested[LR]}_*"):
                shutil.rmtree(trial)
        del values[4:]
    record["over"] = 0
    (back / "rounds.json").write_text(json.dumps(record))
    shutil.rmtree(back / next(iter(states(back))) / "checkpoints")
    # Killed while it wrote down the next ones.
    (back / ".rounds.json.tmp").write_text('{"over": 1, "sugg')
    trials, todo = resume_plan(back)
    assert len(trials) == 12
    assert [(row.iteration, end) for row, end in todo] == [(0, 5)]
    resume_sweep(back)
    assert (back / "rounds.json").read_bytes() == (searched / "rounds.json").read_bytes()
    assert metrics_without_times(back) == metrics_without_times(searched)
    assert states(back) == states(searched)


def test_a_search_that_is_killed_suggests_the_same(searched, tmp_path):
    make_experiment(tmp_path / "search.yaml", GRU, **SEARCH)
    killed = under_kills(tmp_path / "search.yaml", tmp_path, "search", (20, 100))
    resume_sweep(killed)
    assert (killed / "rounds.json").read_bytes() == (searched / "rounds.json").read_bytes()
    assert metrics_without_times(killed) == metrics_without_times(searched)
    columns = ["state", "iterations", "lr", "final_success_rate", "auc"]
    assert summary(killed)[columns].equals(summary(searched)[columns])


def test_what_fails_is_not_searched_further(tmp_path, ray_session):
    """Above a learning rate of 1 the stand-in's loss diverges at once."""
    experiment = make_experiment(
        tmp_path / "search.yaml",
        GRU,
        **SEARCH
        | {
            "config": CONFIG | {"training": {"lr": {"choice": [1e-3, 2.0]}}},
            "search": {"name": "random", "num_samples": 8},
            "seeds": [0],
        },
    )
    directory = run_sweep(experiment, tmp_path / "results")
    # The same values are the same trials.
    assert states(directory) == {"gru_lr=0.001_seed=0": "completed", "gru_lr=2.0_seed=0": "failed"}
    assert len(json.loads((directory / "rounds.json").read_text())["suggestions"]["gru"]) == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "optna"}, "search.name: unknown searcher 'optna'; did you mean 'optuna'?"),
        ({"num_samples": 0}, "search.num_samples: must be at least 1, got 0"),
        ({"numsamples": 3}, "search.numsamples: unknown key; did you mean 'num_samples'?"),
        ({"metric": "sucess_rate"}, "search.metric: unknown column of the metrics 'sucess_rate'"),
        ({"mode": "maximise"}, "search.mode: unknown mode 'maximise'; did you mean 'max'?"),
        ({"judge": "median"}, "search.judge: unknown judge 'median'; did you mean 'mean'?"),
        ({"arguments": {"sede": 1}}, "search.arguments.sede: unknown key; "),
        ({"name": "zoopt"}, "search.name: zoopt is not installed: "),
    ],
)
def test_mistakes_in_a_search(tmp_path, changes, message):
    with pytest.raises(ExperimentError) as error:
        make_experiment(
            tmp_path / "small.yaml", GRU, **SEARCH | {"search": SEARCH["search"] | changes}
        )
    (line,) = str(error.value).splitlines()
    assert message in line


@pytest.mark.parametrize(
    ("lr", "message"),
    [
        ({"loguniform": [0, 1]}, "must be greater than 0 to be drawn by its logarithm, got 0"),
        ({"uniform": [1, 0]}, "config.training.lr.uniform: the lower number comes first, got [1"),
        ({"uniform": [1]}, "lr.uniform: expected 2 numbers, [low, high], got [1]"),
        ({"quniform": [0, 1]}, "expected 3 numbers, [low, high, step], got [0, 1]"),
        ({"quniform": [0.1, 0.9, 0.3]}, "low and high must be multiples of the step, got [0.1,"),
        ({"randint": [0.5, 1]}, "expected 2 whole numbers, [low, high], got [0.5, 1]"),
        ({"choice": 1}, "lr.choice: expected a list, got 1"),
        ({"choice": []}, "lr.choice: empty list; give at least one value"),
        ({"unifrom": [0, 1]}, "lr.unifrom: unknown key; did you mean 'uniform'?"),
        ({"uniform": [0.1, 20]}, "config.training.lr"),
        (1e-3, "search: nothing to search for"),
    ],
)
def test_mistakes_in_distributions(tmp_path, lr, message):
    changes = SEARCH | {"config": CONFIG | {"training": {"lr": lr}}}
    if "20" in str(lr):
        changes["config"]["training"] = {"gamma": lr}
        message = "config.training.gamma: must be"
    with pytest.raises(ExperimentError) as error:
        make_experiment(tmp_path / "small.yaml", GRU, **changes)
    (line,) = str(error.value).splitlines()
    assert message in line


def test_a_distribution_takes_a_search(tmp_path):
    changes = {key: value for key, value in SEARCH.items() if key != "search"}
    with pytest.raises(ExperimentError, match=r"lr\.loguniform: takes a section search, as in"):
        make_experiment(tmp_path / "small.yaml", GRU, **changes)


def test_a_search_without_its_package(tmp_path, monkeypatch):
    monkeypatch.setattr(optuna_search, "ot", None)
    with pytest.raises(ExperimentError, match=r"optuna is not installed: pip install 'sgrl\[sea"):
        make_experiment(tmp_path / "small.yaml", GRU, **SEARCH)


def test_searchers_are_those_of_tune():
    assert {*SEARCHERS} == {*SEARCH_ALG_IMPORT} - {"variant_generator"}


def test_a_search_cannot_be_extended(searched):
    for options in ({"iterations": 9}, {"additions": ["seeds=3"]}):
        with pytest.raises(ExperimentError, match="optuna has decided by what there is so far"):
            resume_plan(searched, **options)


@pytest.mark.parametrize("name", [name for name in DISTRIBUTIONS if name != "choice"])
def test_all_distributions(name):
    low, high, *step = (3, 9, 3) if "randint" in name else (0.3, 0.9, 0.3)
    values = [low, high, *step] if name.startswith("q") else [low, high]
    point = Point("gru", {}, {"config": {"x": {name: values}}}, {("config", "x"): "x"})
    suggested = [p.swept["x"] for p in example_points([point], {"num_samples": 50})]
    ends = [p.swept["x"] for p in extreme_points([point])]
    assert len(suggested) > 1
    assert min(ends) <= min(suggested)
    assert max(suggested) <= max(ends)
    if "randint" in name:
        assert {type(value) for value in (*suggested, *ends)} == {int}


# Stopping early ---------------------------------------------------------------------------------

HALVING = {
    "name": "halving",
    "config": CONFIG | {"training": {"lr": {"grid": [1e-5, 1e-4, 1e-3, 1e-2]}}},
    "stop": {"training_iteration": 9},
    "schedule": {"name": "asha", "grace_period": 2, "reduction_factor": 2, "every": 2},
}


@pytest.fixture(scope="module", params=["asha", "median_stopping"])
def halved(request, tmp_path_factory, ray_session):
    folder = tmp_path_factory.mktemp("halving")
    changes = HALVING | {"concurrency": "auto"}
    if request.param != "asha":
        schedule = {"name": "median_stopping", "every": 2, "min_samples_required": 2}
        changes = changes | {"schedule": schedule}
    experiment = make_experiment(folder / "halving.yaml", TWO, **changes)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sweep, "TrialRunner", stand_in_runner())
        return experiment, run_sweep(experiment, folder / "results")


def test_trials_are_stopped_early_all_seeds_together(halved, tmp_path):
    experiment, directory = halved
    found = states(directory)
    assert list(found) == [trial.name for trial in experiment.trials]
    assert set(found.values()) == {"completed", "stopped"}
    assert found["gru_lr=0.001_seed=0"] == "completed"
    assert found["lstm_lr=1e-05_seed=0"] == "stopped"
    for name, state in found.items():
        assert found[name.replace("seed=0", "seed=1")] == state
        iterations = count_rows(directory / name / "metrics.csv")
        assert iterations == 9 if state == "completed" else iterations in (2, 4, 6, 8)
    assert_rows(directory)
    table = summary(directory)
    assert table["state"].to_dict() == found
    name = experiment.file.schedule["name"]
    reasons = table["reason"][table["state"] == "stopped"]
    assert reasons.str.match(rf"{name}: success_rate 0\.\d+ at iteration \d$").all()

    results = load_results(directory)
    assert results.problems == ()
    comparison = compare_methods(results.trials).set_index(["method", "lr"])
    for (method, lr), row in comparison.iterrows():
        counts = {state: row[state] for state in ("trials", "stopped", "failed", "unfinished")}
        whole = found[f"{method}_lr={lr}_seed=0"] == "completed"
        assert counts == {
            "trials": 2 * whole,
            "stopped": 2 * (not whole),
            "failed": 0,
            "unfinished": 0,
        }
        # What was stopped has no final value.
        assert np.isnan(row["final_success_rate"]) == (not whole)


def test_what_is_stopped_does_not_depend_on_when_trials_are_run(halved, tmp_path, monkeypatch):
    _, directory = halved
    back = Path(shutil.copytree(directory, tmp_path / "back"))
    # As it was in the first round, of which two trials had not begun.
    for trial in back.glob("*_seed=*"):
        folder = TrialFolder(trial)
        checkpoints = [*folder.checkpoints.glob("0*")]
        if folder.checkpoint(2) not in checkpoints or trial.name == "gru_lr=0.001_seed=1":
            shutil.rmtree(trial)
            continue
        truncate_metrics(folder.metrics, 2)
        discard_after(folder.checkpoints, 2)
        folder.write_status(state="pending")
    (back / "rounds.json").unlink()
    text = (back / "experiment.yaml").read_text()
    (back / "experiment.yaml").write_text(text.replace("concurrency: auto", "concurrency: 1"))
    resume_sweep(back)
    assert metrics_without_times(back) == metrics_without_times(directory)
    assert states(back) == states(directory)
    monkeypatch.setattr(sweep, "_run_trials", None)
    assert resume_sweep(back) == back
    assert states(back) == states(directory)


def test_mistakes_in_the_arguments_of_tune(tmp_path):
    for changes, message in (
        ({"graceperiod": 2}, "schedule.graceperiod: unknown key; did you mean 'grace_period'?"),
        ({"grace_period": 2.5}, "schedule.grace_period: expected a whole number, got 2.5"),
        ({"reduction_factor": 1}, "schedule: Reduction Factor not valid!"),
        ({"grace_period": 100}, "schedule: grace_period must be <= max_t!"),
        ({"every": 0}, "schedule.every: expected a number of iterations, got 0"),
        ({"name": "ash"}, "schedule.name: unknown schedule 'ash'; did you mean 'asha'?"),
    ):
        changed = HALVING | {"schedule": HALVING["schedule"] | changes}
        with pytest.raises(ExperimentError) as error:
            make_experiment(tmp_path / "small.yaml", TWO, **changed)
        (line,) = str(error.value).splitlines()
        assert message in line


def test_a_random_search_with_halving(tmp_path, ray_session):
    """A search's configurations are stopped early, too."""
    experiment = make_experiment(
        tmp_path / "search.yaml",
        GRU,
        **SEARCH
        | {
            "search": {"name": "random", "num_samples": 6, "judge": "iqm"},
            "schedule": HALVING["schedule"],
            "stop": {"training_iteration": 6},
        },
    )
    directory = run_sweep(experiment, tmp_path / "results")
    found = states(directory)
    assert len(found) == 18
    assert set(found.values()) == {"completed", "stopped"}
    assert_rows(directory)


# Populations ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def population(tmp_path_factory, ray_session):
    folder = tmp_path_factory.mktemp("population")
    changes = POPULATION | {"concurrency": "auto"}
    experiment = make_experiment(folder / "population.yaml", TWO, **changes)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sweep, "TrialRunner", stand_in_runner())
        return run_sweep(experiment, folder / "results")


def origins_of(directory, name):
    path = directory / name / "origins.json"
    return json.loads(path.read_text()) if path.is_file() else []


def algorithm_at(directory, trials, name, iteration):
    """The stand-in of a trial at an iteration, trained without any sweep from where it came."""
    origins = [o for o in origins_of(directory, name) if o["iteration"] < iteration]
    config, state = trials[name].config, (0, 0.0)
    if origins:
        donor = algorithm_at(directory, trials, origins[-1]["trial"], origins[-1]["iteration"])
        config, state = with_values(config, origins[-1]["values"]), (donor.iteration, donor.skill)
    algorithm = stand_in_class()(config)
    algorithm.iteration, algorithm.skill = state
    while algorithm.iteration < iteration:
        algorithm.train()
    return algorithm


def test_rows_of_a_population_come_from_where_it_says(population):
    experiment = load_experiment(population / "experiment.yaml")
    trials = {trial.name: trial for trial in experiment.trials}
    assert set(states(population).values()) == {"completed"}
    assert len(trials) == 16
    for name in trials:
        rows = read_metrics(population / name / "metrics.csv")
        assert [row["iteration"] for row in rows] == list(range(1, 10))
        for row in rows:
            # What the stand-in reports as its loss is all of its state.
            algorithm = algorithm_at(population, trials, name, int(row["iteration"]))
            assert row["policy_loss"] == algorithm.skill
    taken = {name: origins_of(population, name) for name in trials}
    for end in (2, 4, 6, 8):
        for method in TWO:
            for seed in (0, 1):
                group = [n for n in trials if n.startswith(method) and n.endswith(f"={seed}")]
                scores = {
                    n: np.mean(
                        [r["success_rate"] for r in read_metrics(population / n / "metrics.csv")][
                            end - 2 : end
                        ]
                    )
                    for n in group
                }
                ranked = sorted(group, key=lambda n: scores[n])
                moved = {n: o for n in group for o in taken[n] if o["iteration"] == end}
                assert set(moved) == set(ranked[:2])
                assert {o["trial"] for o in moved.values()} <= set(ranked[2:])
    (problem, *_) = load_results(population).problems
    assert "with the weights of" in problem


def test_a_population_goes_on_as_it_would_have(population, tmp_path):
    """Killed while the second round's trials were handed what they go on from."""
    back = Path(shutil.copytree(population, tmp_path / "back"))
    record = json.loads((back / "rounds.json").read_text())
    record["over"] = 1
    first = {}
    for name, origins in record["origins"].items():
        of_first = [o for o in origins if o["iteration"] == 2]
        if of_first:
            first[name] = of_first
    record["origins"] = first
    (back / "rounds.json").write_text(json.dumps(record))
    experiment = load_experiment(back / "experiment.yaml")
    for trial in experiment.trials:
        folder = TrialFolder(back / trial.name)
        truncate_metrics(folder.metrics, 2)
        shutil.rmtree(folder.checkpoints)
        folder.origins.unlink(missing_ok=True)
        folder.write_status(state="pending")
        algorithm = stand_in_class()(trial.config)
        algorithm.train()
        algorithm.train()
        write_checkpoint(folder.checkpoints, 2, algorithm.save_checkpoint, keep=2)
    # One of them has its checkpoint, but does not know yet; another has both.
    given, other, *_ = first
    hand_over(SweepFolder(back), {given: first[given], other: first[other]}, keep=2)
    TrialFolder(back / given).origins.unlink()
    resume_sweep(back)
    assert (back / "rounds.json").read_bytes() == (population / "rounds.json").read_bytes()
    assert metrics_without_times(back) == metrics_without_times(population)
    for name in states(population):
        assert origins_of(back, name) == origins_of(population, name)


def test_other_values_count_after_a_checkpoint_was_loaded(tmp_path, ray_session):
    """The real algorithm trains on at the new learning rate, not at the checkpoint's."""
    experiment = make_experiment(tmp_path / "small.yaml", GRU)
    before = build_algorithm_config(experiment.trials[0].config)
    algorithm = before.algo_class(config=before)
    algorithm.train()
    algorithm.save_checkpoint(str(tmp_path / "saved"))
    weights = algorithm.get_weights()
    algorithm.stop()
    config = build_algorithm_config(with_values(experiment.trials[0].config, {LR: 1e-30}))
    other = config.algo_class(config=config)
    other.load_checkpoint(str(tmp_path / "saved"))
    other.train()
    for one, two in zip(tree.flatten(weights), tree.flatten(other.get_weights()), strict=True):
        assert np.array_equal(one, two)
    other.stop()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hyperparam_mutation": {}}, "unknown key; did you mean 'hyperparam_mutations'?"),
        ({"hyperparam_mutations": {}}, "schedule.hyperparam_mutations: missing: what changes, as"),
        (
            {"hyperparam_mutations": {"config.training.rl": [1]}},
            "config.training.rl: no number that is set; did you mean 'config.training.lr'?",
        ),
        ({"hyperparam_mutations": {LR: {"loguniform": [0, 1]}}}, "must be greater than 0 to be d"),
        ({"hyperparam_mutations": {LR: 1}}, "expected a distribution or a list, got 1"),
        ({"perturbation_interval": 0.5}, "expected a number of iterations, got 0.5"),
        ({"quantile_fraction": 0.6}, "must be greater than 0 and at most 0.5, got 0.6"),
    ],
)
def test_mistakes_in_a_population(tmp_path, changes, message):
    changed = POPULATION | {"schedule": POPULATION["schedule"] | changes}
    with pytest.raises(ExperimentError) as error:
        make_experiment(tmp_path / "small.yaml", TWO, **changed)
    (line,) = str(error.value).splitlines()
    assert message in line


def test_a_population_takes_a_folder(tmp_path):
    experiment = make_experiment(tmp_path / "small.yaml", TWO, **POPULATION)
    with pytest.raises(SweepError, match="pbt copies checkpoints between trials"):
        sweep._check_schedule(SimpleNamespace(location="s3://bucket/population"), experiment)
