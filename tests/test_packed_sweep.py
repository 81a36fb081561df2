"""Sweeps whose trials are packed: each keeps its own folder, and numbers that no pack changes."""

import ctypes
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sweeps import make_experiment, metrics_without_times, summary
from typer.testing import CliRunner

from sgrl.cli import app
from sgrl.nn.registry import load_policy
from sgrl.results.checkpoints import list_checkpoints, open_policy, verify
from sgrl.results.plan import ExperimentError
from sgrl.tuning import packs, sweep
from sgrl.tuning.cluster import SweepError
from sgrl.tuning.experiment.load import load_experiment
from sgrl.tuning.packs import PackRunner, group_legs
from sgrl.tuning.rounds import Leg
from sgrl.tuning.sweep import resume_sweep, run_sweep

pytestmark = pytest.mark.usefixtures("ray_session")

SPARSE = {"num_neurons": 24, "num_parents": 4, "num_slots": 3, "num_input_neurons": 6}
METHODS: dict[str, dict[str, Any]] = {
    "sgprop": {"model": {"policy": "sparsenet", "mixing_weight": 0.8, **SPARSE}},
    "gru": {"model": {"policy": "gru", "hidden_size": 16}},
}
TUNE_CONFIGS = Path(__file__).parent.parent / "tune_configs"
SECTIONS = {
    "environment": {
        "env": "labyrinth_escape",
        "env_config": {"maze_dims": [6, 6], "episode_length": 12},
    },
    "env_runners": {"num_envs_per_env_runner": 4},
    "training": {"lr": {"grid": [1e-3, 4e-3]}},
}


def sgrl(*arguments: Any) -> str:
    """Run the command in this process; what it printed."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


def packed(path: Path, pack: Any = 3, **changes: Any) -> Any:
    return make_experiment(path, METHODS, **({"config": SECTIONS, "pack": pack} | changes))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of two kinds with four trials each, in packs of three and one."""
    folder = tmp_path_factory.mktemp("packed")
    return run_sweep(packed(folder / "small.yaml"), folder)


def test_each_trial_keeps_what_is_its_own(finished: Path) -> None:
    table = summary(finished)
    assert len(table) == 8
    assert set(table["state"]) == {"completed"}
    for name in table.index:
        folder = finished / name
        assert [path.name for path in list_checkpoints(folder / "checkpoints")] == [
            "000004",
            "000005",
        ]
        verify(folder / "checkpoints" / "000005")
        policy, environment = open_policy(folder / "checkpoints" / "000005")
        assert environment["env"] == "labyrinth_escape"
        assert policy.name in name or policy.name == "sparsenet"
        rows = pd.read_csv(folder / "metrics.csv")
        assert rows["iteration"].tolist() == [1, 2, 3, 4, 5]
        assert (rows["iteration_seconds"] > 0).all()
        status = json.loads((folder / "status.json").read_text())
        assert status["parameters"] > 0
    assert "episodes: 4" in sgrl(
        "evaluate", finished / "gru_lr=0.001_seed=1/checkpoints/000005", "--episodes", 4
    )
    assert "8 completed" in sgrl("status", finished)


def test_rows_are_those_of_trials_by_themselves(tmp_path: Path) -> None:
    """In float64, to 1e-9; where returns are normalised, to the rounding of rewards."""
    methods = {
        name: {"model": {**method["model"], "dtype": "float64", "backend": "torch"}}
        for name, method in METHODS.items()
    }
    for normalize, tolerance in ((False, 1e-9), (True, 1e-6)):
        sections = {**SECTIONS, "training": {"normalize_returns": normalize, "entropy_coeff": 0.02}}
        found = []
        for pack in (None, 2):
            name = f"{normalize}_{pack}"
            experiment = make_experiment(
                tmp_path / f"{name}.yaml", methods, config=sections, pack=pack, name=name
            )
            found.append(run_sweep(experiment, tmp_path))
        compare(found, tolerance)


def compare(sweeps: list[Path], tolerance: float) -> None:
    """Check that two sweeps have the same rows, times aside."""
    for trial in summary(sweeps[0]).index:
        one, other = (
            pd.read_csv(folder / trial / "metrics.csv").drop(columns="iteration_seconds")
            for folder in sweeps
        )
        np.testing.assert_allclose(other, one, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("pack", [1, "auto"])
def test_rows_do_not_depend_on_the_pack(finished: Path, tmp_path: Path, pack: Any) -> None:
    again = run_sweep(packed(tmp_path / "small.yaml", pack), tmp_path)
    assert metrics_without_times(again) == metrics_without_times(finished)


def cut(trial: Path, iteration: int) -> None:
    """Leave a trial as if its process had been killed after that checkpoint."""
    for checkpoint in list_checkpoints(trial / "checkpoints"):
        if int(checkpoint.name) > iteration:
            shutil.rmtree(checkpoint)
    (trial / "status.json").write_text('{"state": "running"}')


def test_resumed_alone_together_and_not_equally_far(finished: Path, tmp_path: Path) -> None:
    """Rows and checkpoints are those of the undisturbed sweep, whatever is trained together."""
    copied = tmp_path / "small"
    shutil.copytree(finished, copied)
    names = list(summary(copied).index)
    cut(copied / names[0], 0)  # from the beginning
    for name in names[1:3]:
        cut(copied / name, 4)
    experiment = copied / "experiment.yaml"
    text = experiment.read_text()
    assert "pack: 3\n" in text
    experiment.write_text(text.replace("pack: 3\n", "pack: 2\n"))
    alone = [name for name in names[4:] if name.endswith("seed=1")]
    cut(copied / alone[0], 4)
    method = alone[0].split("_")[0]
    sgrl("resume", copied, "--methods", method, "--seeds", 1)
    assert metrics_without_times(copied)[alone[0]] == metrics_without_times(finished)[alone[0]]
    resume_sweep(copied)
    assert metrics_without_times(copied) == metrics_without_times(finished)
    assert set(summary(copied)["state"]) == {"completed"}
    for name in names:
        one, other = (load_policy(f / name / "checkpoints" / "000005") for f in (finished, copied))
        other_state = other.state_dict()
        assert all(torch.equal(v, other_state[k]) for k, v in one.state_dict().items())


def test_a_process_that_dies_comes_back(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With those that had ended left alone."""

    class Dying(PackRunner):
        def step(self) -> dict:
            died = Path(self.members[0].sweep) / f"died_{self.members[0].name}"
            if not died.exists() and self.groups is not None and self.groups[0].updates == 3:
                died.touch()
                raise RuntimeError("lost")
            packs.REPORT_SECONDS = 0.0
            return super().step()

    monkeypatch.setattr(sweep, "PackRunner", Dying)
    again = run_sweep(packed(tmp_path / "small.yaml"), tmp_path)
    assert len(list(again.glob("died_*"))) > 2
    assert metrics_without_times(again) == metrics_without_times(finished)


def test_a_pack_that_hangs_is_started_again(
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Hanging(PackRunner):
        def _start(self) -> None:
            super()._start()
            assert self.groups is not None
            pack = self.groups[0].pack
            hung, train = Path(self.members[0].sweep) / "hung", pack.train

            def once() -> list[dict[str, float]]:
                if not hung.exists() and pack.batches == 3:
                    hung.touch()
                    ctypes.PyDLL(None).sleep(600)  # outside Python, and with its lock
                return train()

            pack.train = once  # type: ignore[method-assign]

    monkeypatch.setattr(sweep, "PackRunner", Hanging)
    experiment = packed(tmp_path / "small.yaml", pack=4, iteration_timeout=4)
    again = run_sweep(experiment, tmp_path)
    assert metrics_without_times(again) == metrics_without_times(finished)
    assert re.search(
        r"seed=1 is started again after an iteration of more than 4 s \(\S+seed=0/hung\.txt says",
        capsys.readouterr().out,
    )


def test_a_trial_that_diverges_leaves_the_others_alone(finished: Path, tmp_path: Path) -> None:
    grid = {**SECTIONS, "training": {"lr": {"grid": [1e-3, 1e30, 4e-3]}}}
    experiment = packed(tmp_path / "small.yaml", pack=6, config=grid)
    directory = run_sweep(experiment, tmp_path)
    table = summary(directory)
    bad = [name for name in table.index if "1e+30" in name or "1e30" in name]
    assert len(bad) == 4
    assert set(table.loc[bad, "state"]) == {"failed"}
    assert table.loc[bad, "reason"].str.contains("no longer finite; try a smaller").all()
    rows = metrics_without_times(directory)
    assert {name: rows[name] for name in rows if name not in bad} == metrics_without_times(finished)
    resume_sweep(directory)  # which leaves them alone
    assert metrics_without_times(directory) == rows


def test_evaluation_stop_and_several_updates_an_iteration(tmp_path: Path) -> None:
    """As by themselves, in float64."""
    model = {"policy": "gru", "hidden_size": 16, "dtype": "float64", "backend": "torch"}
    sections = {
        **SECTIONS,
        "training": {"normalize_returns": False, "total_updates": 9, "total_iterations": 4},
    }
    found = []
    for pack in (None, 4):
        experiment = make_experiment(
            tmp_path / f"{pack}.yaml",
            {"gru": {"model": model}},
            config=sections,
            pack=pack,
            name=f"pack_{pack}",
            evaluate={"every": 2, "episodes": 6},
            stop={"training_iteration": 4, "episode_return_mean": -0.5},
        )
        found.append(run_sweep(experiment, tmp_path))
    tables = [summary(folder) for folder in found]
    assert tables[0]["iterations"].tolist() == tables[1]["iterations"].tolist()
    compare(found, 1e-9)
    rows = pd.read_csv(found[1] / tables[1].index[0] / "metrics.csv")
    assert rows["eval_return"].notna().tolist() == [False, True, False, True][: len(rows)]


def test_the_bandit_in_packs(tmp_path: Path) -> None:
    """As by itself, evaluations on test images included, in float64."""
    small = {"num_layers": 2, "num_neurons": 20, "num_parents": 3, "num_slots": 3}
    model = {"policy": "sparse_mlp", "dtype": "float64", "backend": "torch", **small}
    sections = load_experiment(TUNE_CONFIGS / "mnist_bandit.yaml").file.config
    sections["training"] |= {"total_updates": 7, "total_iterations": 3}
    sections["env_runners"] = {"num_envs_per_env_runner": 8}
    apart = {"evaluation_duration": 60, "evaluation_config": {"num_envs_per_env_runner": 30}}
    sections["evaluation"] |= apart
    found = []
    for pack in (None, 2):
        experiment = make_experiment(
            tmp_path / f"{pack}.yaml",
            {"sgprop": {"model": model}},
            config=sections,
            pack=pack,
            name=f"pack_{pack}",
            stop={"training_iteration": 3},
        )
        found.append(run_sweep(experiment, tmp_path))
    compare(found, 1e-9)
    rows = pd.read_csv(found[1] / "sgprop_seed=1" / "metrics.csv")
    assert rows["eval_reward"].notna().all()
    assert "core hours" in sgrl("sweep", tmp_path / "2.yaml", "--dry-run")


def test_which_trials_make_a_pack(tmp_path: Path) -> None:
    """Those that differ in seed and numbers only, as evenly as the slots let them."""

    def sizes(pack: Any, slots: int = 1, **changes: Any) -> list[int]:
        trials = packed(tmp_path / "small.yaml", pack, **changes).trials
        return [len(group) for group in group_legs([Leg(t, 5) for t in trials], slots)]

    assert sizes(None) == [1] * 8
    assert sizes(3) == [3, 1, 3, 1]
    assert sizes("auto") == [4, 4]
    assert sizes("auto", slots=2) == [2, 2, 2, 2]
    assert sizes("auto", seeds=list(range(20))) == [32, 8, 32, 8]
    training = {
        "lr": {"grid": [1e-3, 4e-3]},
        "gamma": 0.9,
        "normalize_returns": {"grid": [True, False]},
    }
    assert sizes("auto", config={**SECTIONS, "training": training}) == [4, 4, 4, 4]
    trials = packed(tmp_path / "small.yaml").trials
    legs = [Leg(trial, 3 if trial.seed else 5) for trial in trials]
    assert {tuple(leg.until for leg in group) for group in group_legs(legs)} == {(5, 5), (3, 3)}


REFUSALS = {
    "packs are for Reinforce, not for PPO": {"algorithm": "PPO"},
    "num_env_runners is not for packs": {
        "config": {**SECTIONS, "env_runners": {"num_env_runners": 1}}
    },
    "evaluation_duration must be a number of episodes in packs": {
        "config": {
            **SECTIONS,
            "evaluation": {"evaluation_interval": 1, "evaluation_duration_unit": "timesteps"},
        }
    },
    "predictor_optimizer scaled is not for packs": {
        "config": {**SECTIONS, "training": {"predictor_optimizer": "scaled"}}
    },
    "lr is a schedule": {"config": {**SECTIONS, "training": {"lr": [[0, 1e-3], [100, 1e-4]]}}},
    'takes no baseline other than "none"': {
        "config": {**SECTIONS, "training": {"baseline": "batch_mean"}}
    },
    "CartPole-v1 does not run on a device": {
        "config": {"environment": {"env": "CartPole-v1"}, "env_runners": {}}
    },
    "backend native is not for packs": {
        "methods": {"gru": {"model": {"policy": "gru", "backend": "native"}}}
    },
}


@pytest.mark.parametrize("message", REFUSALS)
def test_what_cannot_be_packed_is_refused_before_anything_starts(
    tmp_path: Path, message: str
) -> None:
    changes: dict[str, Any] = {"methods": METHODS, "config": SECTIONS} | REFUSALS[message]
    methods = changes.pop("methods")
    experiment = make_experiment(tmp_path / "small.yaml", methods, pack=2, **changes)
    with pytest.raises(ExperimentError, match=rf"small\.yaml: pack: .*{re.escape(message)}"):
        run_sweep(experiment, tmp_path)
    assert not (tmp_path / "small").exists()


def test_a_pack_is_asked_for_by_a_number_or_auto(tmp_path: Path) -> None:
    for wrong, message in ((0, "must be at least 1, got 0"), ("all", "expected auto or a whole")):
        with pytest.raises(ExperimentError, match=f"pack: {message}"):
            packed(tmp_path / "small.yaml", pack=wrong)


def test_a_sweep_cannot_turn_to_packs(finished: Path, tmp_path: Path) -> None:
    copied = tmp_path / "small"
    shutil.copytree(finished, copied)
    experiment = copied / "experiment.yaml"
    experiment.write_text(experiment.read_text().replace("pack: 3\n", ""))
    with pytest.raises(SweepError, match=r"says pack: 3, experiment\.yaml says None"):
        resume_sweep(copied)


def test_the_backend_that_is_written_down_is_the_one_that_computes(tmp_path: Path) -> None:
    experiment = packed(tmp_path / "small.yaml")
    assert {trial.config.model["backend"] for trial in experiment.trials} == {"torch"}
    on_gpu = {**SECTIONS, "learners": {"num_gpus_per_learner": 1}}
    experiment = packed(tmp_path / "gpu.yaml", config=on_gpu)
    assert {trial.config.model["backend"] for trial in experiment.trials} == {"auto"}
    assert load_experiment(tmp_path / "gpu.yaml").file.pack == 3


def test_verify_and_estimate(finished: Path, tmp_path: Path) -> None:
    archive = tmp_path / "archive"
    sgrl("archive", finished, "--out", archive)
    assert "3 iterations equal" in sgrl("verify", archive, "--trials", 2, "--iterations", 3)
    packed(tmp_path / "small.yaml")
    assert "core hours" in sgrl("sweep", tmp_path / "small.yaml", "--dry-run")
