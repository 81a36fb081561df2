"""Experiment files: what a YAML resolves to, trial by trial."""

import copy
import dataclasses
import math
import re
from pathlib import Path

import pytest
import yaml

from sgrl.compiled.compiler import CompileError
from sgrl.nn.kernels import backends as backends_module
from sgrl.nn.kernels.backends import resolve_backend
from sgrl.nn.mixing_rules import MIXING_RULES
from sgrl.nn.recurrent_policies import SparseNetPolicy
from sgrl.nn.registry import POLICIES, policy_settings
from sgrl.results.archive import ArchivedTrial
from sgrl.results.folder import SweepFolder
from sgrl.results.plan import ExperimentError
from sgrl.tuning.experiment.load import extend_experiment, load_experiment
from sgrl.tuning.experiment.resources import (
    check_backends,
    check_resources,
    may_move,
    required_resources,
)
from sgrl.tuning.experiment.sections import build_algorithm_config
from sgrl.tuning.sweep import resume_plan
from sgrl.tuning.verify import _shortened
from sgrl.yaml_files import dump_yaml, parse_yaml

CONFIGS = sorted((Path(__file__).parent.parent / "tune_configs").glob("*.yaml"))
METHODS = ["gru", "lstm", "sparsenet_backprop", "sparsenet_sgprop", "mlp"]
PUBLISHED = ["labyrinth_escape", "labyrinth_explore"]
#: Each repeats a method of another experiment, under every mixing rule on steps.
MIXING_RULE_STUDIES = {
    "mixing_rules_escape": ("labyrinth_comparison", "sparsenet_sgprop"),
    "mixing_rules_bandit": ("mnist_bandit", "sparse_sgprop"),
}
RULES_ON_STEPS = [name for name, rule in MIXING_RULES.items() if rule.samples == "steps"]
PLACEBOS = ["labyrinth_placebo", "mnist_placebo"]
NOISY_NEURONS = ["labyrinth_neuron_noise", "mnist_neuron_noise"]

SMALL = """
name: small
config:
  environment:
    env: labyrinth_escape
    env_config: {maze_dims: [6, 6], episode_length: 20}
  env_runners: {num_envs_per_env_runner: {grid: [2, 4]}}
  training: {lr: {grid: [5e-4, 1e-3]}, gamma: 0.9}
methods:
  gru: {model: {policy: gru, hidden_size: 8}}
  sparse:
    model: {policy: sparsenet, num_neurons: {grid: [16, 32]}}
    config: {training: {lr: 2e-3}, env_runners: {num_envs_per_env_runner: 3}}
seeds: [3, 5]
stop: {training_iteration: 10}
"""


@pytest.fixture
def load(tmp_path):
    def load(text=SMALL, *overrides, name=None):
        path = tmp_path / "experiment.yaml"
        path.write_text(text)
        return load_experiment(path, overrides, name)

    return load


def by_name(experiment):
    return {trial.name: trial for trial in experiment.trials}


def test_one_trial_per_method_grid_point_and_seed(load):
    experiment = load()
    assert [trial.name for trial in experiment.trials] == [
        "gru_envs=2_lr=0.0005_seed=3",
        "gru_envs=2_lr=0.0005_seed=5",
        "gru_envs=2_lr=0.001_seed=3",
        "gru_envs=2_lr=0.001_seed=5",
        "gru_envs=4_lr=0.0005_seed=3",
        "gru_envs=4_lr=0.0005_seed=5",
        "gru_envs=4_lr=0.001_seed=3",
        "gru_envs=4_lr=0.001_seed=5",
        "sparse_num_neurons=16_seed=3",
        "sparse_num_neurons=16_seed=5",
        "sparse_num_neurons=32_seed=3",
        "sparse_num_neurons=32_seed=5",
    ]
    assert load().trials == experiment.trials


def test_a_trial_is_fully_resolved(load):
    trial = by_name(load())["sparse_num_neurons=32_seed=5"]
    assert trial.swept == {"num_neurons": 32}
    assert trial.config.as_dict() == {
        "algorithm": "Reinforce",
        "method": "sparse",
        "seed": 5,
        "config": {
            "environment": {
                "env": "labyrinth_escape",
                "env_config": {"maze_dims": [6, 6], "episode_length": 20},
            },
            "env_runners": {"num_envs_per_env_runner": 3},
            "training": {
                "lr": 2e-3,
                "gamma": 0.9,
                "predictor_lr": 1e-5,
                "entropy_coeff": 0.01,
                "grad_clip": 0.5,
                "normalize_returns": True,
                "two_phase": False,
                "total_updates": None,
                "total_iterations": None,
            },
        },
        "model": {
            "policy": "sparsenet",
            **{
                name: value
                for name, value in dataclasses.asdict(POLICIES["sparsenet"].Settings()).items()
                if name != "value_head"
            },
            "num_neurons": 32,
            "backend": resolve_backend("auto"),
        },
        "stop": {"training_iteration": 10},
        "checkpoint": {"every": 25, "keep": 2},
        "evaluate": None,
        "num_threads": 1,
        "max_failures": 2,
        "iteration_timeout": None,
        "callbacks": None,
    }


def test_resolved_file_loads_as_the_same_experiment(load):
    experiment = load(SMALL, "config.training.lr={grid: [1e-4, 1e-3]}")
    again = load(dump_yaml(experiment.resolved))
    assert again.resolved == experiment.resolved
    assert again.trials == experiment.trials
    assert experiment.resolved["methods"]["sparse"]["model"]["backend"] == resolve_backend("auto")
    assert experiment.resolved["num_threads"] == 1


def test_names_that_look_like_numbers_can_be_resumed(load):
    experiment = load(SMALL, "name='1e3'")
    assert experiment.name == "1e3"
    assert load(dump_yaml(experiment.resolved)).resolved == experiment.resolved


ALIASED = """
name: aliased
x-common: {model: &m {policy: gru, hidden_size: 8}}
config:
  environment: {env: labyrinth_escape}
  training: {lr: &rates {grid: [1e-3, 2e-3]}, gamma: 0.9}
methods:
  a: {model: *m}
  b: {model: *m}
  c: {model: {<<: *m, feature_size: 16}, config: &over {training: {lr: *rates}}}
  d: {model: {<<: *m, hidden_size: 4}, config: *over}
stop: {training_iteration: 1}
"""


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("methods.a.model.hidden_size", 64),
        ("methods.c.model.hidden_size", 64),
        ("methods.d.config.training.lr", 3e-3),
        ("config.environment.env_config", {"maze_dims": [8, 8]}),
    ],
)
def test_only_the_named_key_changes(load, key, value):
    """However many aliases and merge keys repeat what stands there."""
    before = load(ALIASED).resolved
    after = load(ALIASED, f"{key}={value}").resolved
    *parents, last = key.split(".")
    tree = before
    for step in parents:
        tree = tree[step]
    tree[last] = value
    assert after == before


def test_only_the_named_grid_gets_more_values(load, tmp_path):
    before = load(ALIASED)
    path = tmp_path / "written.yaml"
    path.write_text(dump_yaml(before.resolved))
    for file in (path, before.path):
        longer = extend_experiment(file, additions=["methods.c.config.training.lr=[3e-3]"])
        new = {trial.name for trial in longer.trials} - {trial.name for trial in before.trials}
        assert new == {"c_lr=0.003_seed=0"}


def test_written_files_hold_no_anchors(load):
    experiment = load(ALIASED)
    shared = [1, 2]
    for content in (
        experiment.resolved,
        *(t.as_dict() for t in experiment.trials),
        {"a": [shared] * 2},
    ):
        assert not re.search(r"[&*]\w", dump_yaml(content))
    assert load(dump_yaml(experiment.resolved)).trials == experiment.trials


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("017", 17),
        ("-08", -8),
        ("0o17", 15),
        ("0x1F", 31),
        ("1_000", 1000),
        ("1:30", "1:30"),
        ("1:30.5", "1:30.5"),
        ("2024-01-01", "2024-01-01"),
        ("1e-3", 1e-3),
        (".5", 0.5),
        ("3.", 3.0),
        ("-.inf", -math.inf),
        ("true", True),
        ("False", False),
        ("null", None),
        ("y", "y"),
        ("=", "="),
        ("0b11", "0b11"),
    ],
)
def test_scalars_are_yaml_1_2s(text, value):
    """Those that it reads as text are quoted where they are written, for other readers too."""
    (read,) = parse_yaml(f"[{text}]")
    assert (type(read), read) == (type(value), value)
    for content in ({text: text}, {text: value}):
        written = dump_yaml(content)
        assert parse_yaml(written) == yaml.safe_load(written) == content


@pytest.mark.parametrize("word", ["on", "Off", "YES", "no"])
def test_words_that_may_be_true_or_false(load, word):
    """Where a name stands they are names."""
    experiment = load(SMALL.replace("  sparse:", f"  {word}:"))
    assert list(experiment.resolved["methods"]) == ["gru", word]
    with pytest.raises(ExperimentError, match=f"write true or false, or '{word}' in quotes"):
        load(SMALL, f"methods.sparse.model.adaptive={word}")


def test_ranges_of_seeds(load):
    for experiment in (load(SMALL, "seeds=2..4"), load(SMALL.replace("[3, 5]", "2..4"))):
        assert experiment.resolved["seeds"] == [2, 3, 4]


def test_sections_of_helpers_are_ignored(load):
    plain = load(ALIASED.replace("x-common: {model: &m ", "x-common: {}\nx-more: {model: &m "))
    assert plain.resolved == load(ALIASED).resolved
    assert not any(key.startswith("x-") for key in plain.resolved)
    with pytest.raises(ExperimentError, match="hidden_size: only helps to write the file"):
        load(ALIASED, "x-common.model.hidden_size=9")


def test_no_trial_holds_an_automatic_backend(load):
    experiment = load(SMALL, "methods.sparse.model.backend={grid: [auto, eager]}")
    backends = {trial.config.model.get("backend") for trial in experiment.trials}
    assert backends - {None} == {resolve_backend("auto"), "eager"}


def test_backends_of_trials_that_the_machine_does_not_decide(load, monkeypatch):
    """On GPUs, of a control without compiled code, and of a policy from elsewhere."""
    model = "methods.sparse.model"
    for setting, backend in (
        ("config.learners={num_gpus_per_learner: 1}", "torch"),
        ("methods.sparse.config.env_runners.num_gpus_per_env_runner=1", "torch"),
        ("config.learners={num_gpus_per_learner: 0}", resolve_backend("auto")),
        ("config.learners={num_gpus_per_learner: {grid: [0, 1]}}", "auto"),
        ("config.learners={grid: [{num_gpus_per_learner: 1}, {}]}", "auto"),
        (f"{model}.shuffle_predictions=true", "torch"),
    ):
        resolved = load(SMALL, setting).resolved
        assert resolved["methods"]["sparse"]["model"]["backend"] == backend, setting
    own = type("Own", (SparseNetPolicy,), {"__module__": "mine"})
    monkeypatch.setitem(POLICIES, "own", own)
    resolved = load(SMALL, f"{model}.policy=own").resolved
    assert resolved["methods"]["sparse"]["model"]["backend"] == "auto"


def test_a_sweep_that_began_before_a_policy_had_backends_stays_with_torch(load, tmp_path):
    """GRU and LSTM were computed by torch then; what begins now takes the fastest."""
    resolved = load(SMALL, "methods.old={model: {policy: lstm}}").resolved
    for method in ("gru", "old"):
        assert resolved["methods"][method]["model"].pop("backend") == resolve_backend("auto")
    sweep = SweepFolder(tmp_path)
    sweep.experiment.write_text(dump_yaml(resolved))
    experiments = {
        "torch": [
            extend_experiment(sweep.experiment, additions=["seeds=7"], begun=True),
            load_experiment(sweep.experiment, begun=True),
        ],
        resolve_backend("auto"): [load_experiment(sweep.experiment)],
    }
    for backend, found in experiments.items():
        for experiment in found:
            models = {t.method: t.config.model for t in experiment.trials}
            assert {models[name]["backend"] for name in ("gru", "old")} == {backend}
            assert models["sparse"]["backend"] == resolve_backend("auto")
    # Its trials' own files do not say it either.
    trial = by_name(experiments["torch"][0])["gru_envs=2_lr=0.0005_seed=3"]
    config = trial.as_dict()
    del config["model"]["backend"]
    folder = sweep.trial(trial.name)
    folder.path.mkdir()
    folder.config.write_text(dump_yaml(config))
    planned, _ = resume_plan(tmp_path)
    assert {t.config.model["backend"] for t in planned if t.method == "gru"} == {"torch"}
    again = _shortened(ArchivedTrial(trial.name, config, {}, [], []), 1)
    assert again.config.model == trial.config.model


def test_compiled_code_that_is_named_must_run_before_the_start(load, monkeypatch):
    backends = ["methods.sparse.model.backend=native", "methods.gru.model.backend=torch"]
    native = load(SMALL, *backends)
    check_backends(native)
    on_gpus = load(dump_yaml(native.resolved), "config.learners={num_gpus_per_learner: 1}")
    with pytest.raises(ExperimentError, match=r"native of trial sparse_.*the trial asks for GPUs"):
        check_backends(on_gpus)
    reason = CompileError("found no C++ compiler: install one")
    monkeypatch.setattr("sgrl.nn.kernels.native.load_library", lambda real: reason)
    with pytest.raises(
        ExperimentError, match=r"experiment\.yaml: .*: found no C\+\+ comp.*"
    ) as error:
        check_backends(native)
    assert "\n" not in str(error.value)
    # Reading such an experiment, as for a report, needs no compiler.
    assert load(dump_yaml(native.resolved)).trials == native.trials
    backends_module._warn.cache_clear()  # another test may have had the process's one warning
    with pytest.warns(RuntimeWarning, match="using the slower torch backend"):
        automatic = load(SMALL).resolved["methods"]["sparse"]["model"]["backend"]
    assert automatic == "torch"


@pytest.mark.parametrize("text", ["1e-3", "1.0e-3", "1.e-3", "0.001", "+1E-03", ".1e-2"])
def test_numbers_however_written(load, text):
    overridden = load(SMALL, f"config.training.lr={text}")
    written = load(SMALL.replace("2e-3", text))
    for experiment in (overridden, written):
        trial = by_name(experiment)["sparse_num_neurons=16_seed=3"]
        assert trial.config.sections["training"]["lr"] == 1e-3


def test_set_wins_over_what_a_method_sets(load):
    experiment = load(SMALL, "config.training.lr=1e-4")
    learning_rates = {trial.config.sections["training"]["lr"] for trial in experiment.trials}
    assert learning_rates == {1e-4}
    # Only that key: the method keeps its other ones.
    last = experiment.trials[-1].config.sections
    assert last["env_runners"] == {"num_envs_per_env_runner": 3}


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("config.training.lr=3e-4", ("config", "training", "lr"), 3e-4),
        ("config.environment.env=labyrinth_explore", ("config", "environment", "env"), None),
        ("config.environment.env_config.maze_dims=[8, 10]", None, [8, 10]),
        ("stop.training_iteration=7", ("stop", "training_iteration"), 7),
        ("checkpoint.every=5", ("checkpoint", "every"), 5),
        ("methods.sparse.model.num_slots=2", ("model", "num_slots"), 2),
        ("num_threads=2", ("num_threads",), 2),
    ],
)
def test_set_any_key(load, override, path, value):
    value = override.partition("=")[2] if value is None else value
    path = path or ("config", "environment", "env_config", "maze_dims")
    tree = load(SMALL, override).trials[-1].as_dict()
    for step in path:
        tree = tree[step]
    assert tree == value


def test_set_seeds_methods_and_name(load):
    overrides = ["seeds=[7]", "methods={mlp: {model: {policy: mlp}}}", "config.training.lr=0.001"]
    experiment = load(SMALL, *overrides, name="other")
    assert experiment.name == experiment.resolved["name"] == "other"
    assert [trial.name for trial in experiment.trials] == ["mlp_envs=2_seed=7", "mlp_envs=4_seed=7"]


def test_grids_of_lists_mappings_and_stop(load):
    experiment = load(
        SMALL,
        "config.environment.env_config={grid: [{maze_dims: [6, 8]}, {episode_length: 30}]}",
        "stop.training_iteration={grid: [1, 2]}",
        "methods={gru: {model: {policy: gru, value_head: {grid: [true, false]}}}}",
        "config.training={}",
        "config.env_runners={}",
        "seeds=[0]",
    )
    assert len(experiment.trials) == 8
    first, last = experiment.trials[0], experiment.trials[-1]
    assert first.name == (
        "gru_env_config=maze_dims=6x8_value_head=true_training_iteration=1_seed=0"
    )
    assert last.config.sections["environment"]["env_config"] == {"episode_length": 30}
    assert last.config.stop.training_iteration == 2
    assert last.config.model["value_head"] is False


def test_swept_keys_of_one_name_stay_apart(load):
    experiment = load(
        SMALL,
        "algorithm=PPO",
        "config.training={lr: 0.1, grad_clip: {grid: [1, 2]}}",
        "config.learners={learner_config_dict: {grad_clip: {grid: [3]}}}",
    )
    swept = {"envs": 2, "training.grad_clip": 1, "learner_config_dict.grad_clip": 3}
    assert experiment.trials[0].swept == swept


def test_trial_configs_share_nothing(load):
    trials = load().trials
    trials[0].config.sections["environment"]["env_config"]["maze_dims"].append(1)
    assert trials[1].config.sections["environment"]["env_config"]["maze_dims"] == [6, 6]


def test_algorithm_config_of_reinforce(load):
    config = build_algorithm_config(load().trials[-1].config)
    assert type(config).__name__ == "ReinforceConfig"
    assert (config.lr, config.gamma, config.predictor_lr) == (2e-3, 0.9, 1e-5)
    assert (config.seed, config.num_envs_per_env_runner) == (5, 3)
    assert (config.env, config.env_config["episode_length"]) == ("labyrinth_escape", 20)
    assert config.model_config["policy"] == "sparsenet"
    assert config.model_config["num_neurons"] == 32


def test_algorithm_config_of_a_stock_algorithm(load):
    experiment = load(SMALL, "algorithm=PPO", "config.training.lambda_=0.5")
    config = build_algorithm_config(experiment.trials[-1].config)
    assert type(config).__name__ == "PPOConfig"
    assert (config.lr, config.lambda_, config.seed) == (2e-3, 0.5, 5)
    assert config.rl_module_spec.module_class.__name__ == "PolicyModule"
    assert config.model_config["policy"] == "sparsenet"
    assert config.model_config["value_head"] is True


def test_stock_algorithms_run_gymnasium_environments(load):
    experiment = load(SMALL, "algorithm=PPO", "config.environment={env: CartPole-v1}")
    assert build_algorithm_config(experiment.trials[0].config).env == "CartPole-v1"


def test_environments_are_swept_like_any_value(load):
    grid = "config.environment.env={grid: [popgym-BattleshipEasy-v0, CartPole-v1]}"
    settings = "config.environment.env_config={previous_action: true, episode_length: 9}"
    trials = load(SMALL, grid, settings, "seeds=[0]", "config.training.lr=1e-3").trials
    assert len(trials) == 2 * (2 + 2)
    assert "gru_env=popgym-BattleshipEasy-v0_envs=2_seed=0" in {trial.name for trial in trials}
    for trial in trials:
        assert build_algorithm_config(trial.config).env == trial.swept["env"]


@pytest.mark.parametrize("algorithm", ["Reinforce", "PPO"])
@pytest.mark.parametrize(
    ("env", "words"),
    [
        ("CartPole-v7", "config.environment.env: unknown environment 'CartPole-v7'; did you mean"),
        ("Blackjack-v1", "env_config: Blackjack-v1: its episodes have no end of their own"),
        ("phys2d/CartPole-v1", "env_config: phys2d/CartPole-v1: cannot be built"),
    ],
)
def test_environments_that_cannot_be_had(load, algorithm, env, words):
    with pytest.raises(ExperimentError, match=re.escape(words)) as caught:
        load(SMALL, f"algorithm={algorithm}", f"config.environment={{env: {env}}}")
    assert "\n" not in str(caught.value)


def test_required_resources(load):
    assert required_resources(load().trials[0]) == {"CPU": 1, "GPU": 0}
    assert required_resources(load(SMALL, "num_threads=2").trials[0]) == {"CPU": 2, "GPU": 0}
    overrides = [
        "config.env_runners.num_env_runners=2",
        "config.env_runners.num_cpus_per_env_runner=0.5",
    ]
    overrides += ["config.learners={num_learners: 1, num_gpus_per_learner: 0.25}"]
    experiment = load(SMALL, *overrides)
    # The main process and two halves; the learner takes its share of a GPU only.
    assert required_resources(experiment.trials[0]) == {"CPU": 2, "GPU": 0.25}
    check_resources(experiment, {"CPU": 2, "GPU": 1})
    with pytest.raises(ExperimentError, match=r"needs 0\.25 GPUs and there are 0"):
        check_resources(experiment, {"CPU": 2})


@pytest.mark.parametrize(
    ("algorithm", "runners", "learners", "moves"),
    [("Reinforce", 1, 0, True), ("Reinforce", 2, 0, False), ("PPO", 3, 1, True)],
)
def test_advice_to_a_resumed_sweep(load, algorithm, runners, learners, moves):
    experiment = load(
        SMALL,
        f"algorithm={algorithm}",
        f"config.env_runners.num_env_runners={runners}",
        f"config.learners.num_learners={learners}",
        *(["config.training={}"] if algorithm == "PPO" else []),
    )
    before = experiment.trials[0].config
    fewer = copy.deepcopy(before)
    fewer.sections["env_runners"]["num_env_runners"] = 0
    fewer.sections["learners"]["num_learners"] = 0
    assert may_move(before, fewer) == may_move(fewer, before) == moves
    fewer.sections["environment"]["env_config"]["episode_length"] = 9
    assert not may_move(before, fewer)
    with pytest.raises(ExperimentError, match="resume it where there are as many") as error:
        check_resources(experiment, {"CPU": 1}, resuming=True)
    assert ("to 0 in that file" in str(error.value)) == moves
    assert "num_threads" not in str(error.value)


def test_a_trial_moves_from_a_gpu_to_a_cpu_and_back(load):
    """As it computes with the torch backend on both."""
    on_gpu = load(SMALL, "config.learners={num_gpus_per_learner: 0.5}")
    advice = "or set num_gpus_per_env_runner and num_gpus_per_learner to 0 in that file"
    with pytest.raises(ExperimentError, match=f"needs 0.5 GPUs and there are 0; .*{advice}"):
        check_resources(on_gpu, {"CPU": 1}, resuming=True)
    on_cpu = load(dump_yaml(on_gpu.resolved), "config.learners.num_gpus_per_learner=0")
    check_resources(on_cpu, {"CPU": 1}, resuming=True)
    for one, other in zip(on_gpu.trials, on_cpu.trials, strict=True):
        assert one.config.model == other.config.model
        assert may_move(one.config, other.config)
        assert may_move(other.config, one.config)


def test_the_experiments_shipped():
    assert {path.stem for path in CONFIGS} == {
        "quickstart",
        "labyrinth_comparison",
        "labyrinth_search",
        *PUBLISHED,
        "popgym_suite",
        "mnist_quickstart",
        *PUBLISHED_ON_MNIST,
        "ppo_memory",
        *MIXING_RULE_STUDIES,
        *PLACEBOS,
        *NOISY_NEURONS,
        "predictor_contest",
    }


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_experiment(path):
    experiment = load_experiment(path)
    assert experiment.name == path.stem
    if path.stem in MIXING_RULE_STUDIES:
        assert set(experiment.resolved["methods"]) == {*RULES_ON_STEPS, "backprop"}
    elif path.stem in PLACEBOS:
        first, placebo, _ = (entry["model"] for entry in experiment.resolved["methods"].values())
        differing = {key for key in first if first[key] != placebo[key]}
        assert differing - {"backend"} == {"shuffle_predictions"}
    elif path.stem in NOISY_NEURONS:
        seeds = len(experiment.resolved["seeds"])
        amounts = [trial.config.model["neuron_noise"] for trial in experiment.trials]
        assert amounts == [a for a in (0.0, 0.05, 0.1, 0.2, 0.5) for _ in range(seeds)] * 2
    elif path.stem == "predictor_contest":
        optimizers = {
            trial.method: (
                trial.config.sections["training"].get("predictor_optimizer", "adam"),
                trial.config.model.get("mixing_rule") if trial.method != "backprop" else None,
            )
            for trial in experiment.trials
        }
        assert optimizers == {
            "backprop": ("adam", None),
            "published": ("adam", "published"),
            "scaled": ("scaled", "running_episodes"),
            "averaged": ("averaged", "running_episodes"),
            "least_squares": ("least_squares", "running_episodes"),
            "least_squares_halfway": ("least_squares", "halfway"),
        }
    elif "mnist" not in path.stem:
        assert set(experiment.resolved["methods"]) == set(METHODS)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_key_is_commented(path):
    """Each `key:` has a comment behind it."""
    for line in path.read_text().splitlines():
        if not re.match(r"\s*(#|$)", line):
            assert re.search(r": .*\S  *# \S|: +# \S", line), line


@pytest.mark.parametrize("name", MIXING_RULE_STUDIES)
def test_studies_of_mixing_rules(name):
    """The rule is all that differs from the published comparison."""
    of, method = MIXING_RULE_STUDIES[name]
    trials = {
        stem: load_experiment(next(path for path in CONFIGS if path.stem == stem)).trials
        for stem in (name, of)
    }
    seeds = {trial.seed for trial in trials[name]}
    assert len(seeds) >= 3
    for seed in seeds:
        (published,) = (t for t in trials[of] if (t.method, t.seed) == (method, seed))
        for rule in RULES_ON_STEPS:
            (trial,) = (t for t in trials[name] if (t.method, t.seed) == (rule, seed))
            assert trial.config.model["mixing_rule"] == rule
            for key in ("algorithm", "sections", "stop", "num_threads"):
                assert getattr(trial.config, key) == getattr(published.config, key)
            ours, theirs = (
                dataclasses.asdict(policy_settings(model.pop("policy"), model))
                for model in (dict(t.config.model) for t in (trial, published))
            )
            assert ours == theirs | {"mixing_rule": rule}
        (control,) = (t for t in trials[name] if (t.method, t.seed) == ("backprop", seed))
        assert control.config.sections == published.config.sections
    assert len(trials[name]) == len(seeds) * (len(RULES_ON_STEPS) + 1)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sweeps(name):
    """The paper, Section H.4."""
    experiment = load_experiment(next(path for path in CONFIGS if path.stem == name))
    assert len(experiment.trials) == 5 * 5 * 2 * 6
    points = {(*trial.swept.values(), trial.method, trial.seed) for trial in experiment.trials}
    assert points == {
        (envs, lr, method, seed)
        for envs in (20, 40)
        for lr in (2e-4, 5e-4, 1e-3, 2e-3, 4e-3)
        for method in METHODS
        for seed in range(6)
    }
    for trial in experiment.trials:
        environment = trial.config.sections["environment"]
        assert environment["env"] == name
        assert environment["env_config"]["maze_dims"] == [6, 6]
        length = {"labyrinth_escape": 80, "labyrinth_explore": 40}[name]
        assert environment["env_config"]["episode_length"] == length
        assert environment["env_config"].get("zero_reward_probability", 0.75) == 0.75
        assert trial.config.stop.training_iteration == 300
        config = build_algorithm_config(trial.config) if trial.seed == 0 else None
        if config:
            published = (config.predictor_lr, config.gamma, config.entropy_coeff, config.grad_clip)
            assert published == (1e-5, 0.95, 0.01, 0.5)


RATES = [5e-4, 1e-3, 2e-3, 5e-3, 1e-2]
DENSE_RATES = [5e-6, 1e-5, 2e-5, 5e-5, 1e-4]
BASE_RATES = {
    "sparse_sgprop": 5e-3,
    "sparse_sgprop_fixed": 5e-3,
    "sparse_backprop": 1e-3,
    "dense": 2e-5,
}
SPARSE_METHODS = list(BASE_RATES)[:3]

#: The paper, Section H.3: what is swept, and over which values for each method.
PUBLISHED_ON_MNIST = {
    "mnist_bandit": (None, {key: [None] for key in BASE_RATES}),
    "mnist_learning_rate": (
        ("config", "training", "lr"),
        {**dict.fromkeys(SPARSE_METHODS, RATES), "dense": DENSE_RATES},
    ),
    "mnist_reward_noise": (
        ("config", "environment", "env_config", "p_flip"),
        {key: [0.0, 0.1, 0.2, 0.3, 0.4] for key in BASE_RATES},
    ),
    "mnist_parents": (
        ("model", "num_parents"),
        {key: [2, 5, 8, 11, 14] for key in SPARSE_METHODS},
    ),
    "mnist_fixed_mixing": (
        ("model", "mixing_weight"),
        {"sparse_sgprop": [0.9], "sparse_sgprop_fixed": [0.0, 0.5, 0.9, 1.0]},
    ),
}


@pytest.mark.parametrize("name", PUBLISHED_ON_MNIST)
def test_published_sweeps_on_mnist(name):
    """The paper, Section H.3."""
    experiment = load_experiment(next(path for path in CONFIGS if path.stem == name))
    key, values = PUBLISHED_ON_MNIST[name]

    def swept(trial):
        value = trial.as_dict() if key else None
        for step in key or ():
            value = value[step]
        return value

    points = [(trial.method, swept(trial), trial.seed) for trial in experiment.trials]
    expected = [(m, v, seed) for m in values for v in values[m] for seed in range(6)]
    assert sorted(points, key=str) == sorted(expected, key=str)
    for trial in experiment.trials:
        assert trial.config.stop.training_iteration == 20
        config = build_algorithm_config(trial.config)
        assert (config.env, config.num_envs_per_env_runner) == ("mnist_bandit", 64)
        assert config.env_config["classes"] == [0, 1, 3, 4, 5, 6, 7, 8, 9]
        assert (config.total_updates, config.total_iterations) == (1500, 20)
        assert (config.two_phase, config.normalize_returns) == (True, False)
        assert (config.entropy_coeff, config.grad_clip, config.predictor_lr) == (0, None, 5e-3)
        assert (config.evaluation_interval, config.evaluation_duration) == (1, 4000)
        if name != "mnist_learning_rate":
            assert config.lr == BASE_RATES[trial.method]
        if name != "mnist_reward_noise":
            assert config.env_config["p_flip"] == 0.4
        model = trial.config.model
        assert model["policy"] == ("dense" if trial.method == "dense" else "sparse_mlp")
        if trial.method == "sparse_backprop":
            assert model["propagation"] == "backprop"
        if trial.method == "sparse_sgprop_fixed":
            assert not model["adaptive"]
            assert name == "mnist_fixed_mixing" or model["mixing_weight"] == 0.9
