"""Bad input: one clear line on stderr, exit status 2, no traceback, and Ray never started."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sgrl.cli import app
from sgrl.compiled.compiler import CompileError
from sgrl.envs import mnist
from sgrl.local_ray import VERBOSE, ray_logging
from sgrl.nn.registry import make_policy, save_policy
from sgrl.results.checkpoints import write_checkpoint
from sgrl.tuning.progress import quiet

GOOD = """\
name: good
algorithm: Reinforce
config:
  environment:
    env: labyrinth_escape
    env_config: {maze_dims: [6, 6], episode_length: 20}
  env_runners: {num_envs_per_env_runner: 2}
  training: {lr: 1e-3}
methods:
  gru: {model: {policy: gru, hidden_size: 8}}
  sparse: {model: {policy: sparsenet}, config: {training: {lr: 2e-3}}}
seeds: [0]
stop: {training_iteration: 1}
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run `sgrl` in an empty folder that holds experiment.yaml, with `ray.init` out of reach."""
    import ray

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ray, "init", lambda *args, **kwargs: pytest.fail("Ray was started"))

    def run(*arguments, text=GOOD):
        Path("experiment.yaml").write_text(text)
        return CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)

    return run


def refused(result, *fragments):
    assert result.exit_code == 2
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("sgrl: ")
    for fragment in fragments:
        assert fragment in lines[0]


def test_the_good_file_is_good(run):
    result = run("sweep", "experiment.yaml", "--dry-run", "--no-estimate")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == "good: 2 trials\n  gru_seed=0\n  sparse_seed=0\n"


@pytest.mark.parametrize(
    ("old", "new", "key", "message"),
    [
        # Unknown keys and names, with the nearest valid one.
        ("seeds:", "sedes:", "sedes:", "unknown key; did you mean 'seeds'?"),
        ("training:", "trainning:", "config.trainning:", "did you mean 'training'?"),
        ("{lr: 1e-3}", "{lrr: 1e-3}", "config.training.lrr:", "did you mean 'lr'?"),
        ("{lr: 2e-3}", "{gama: 1}", "methods.sparse.config.training.gama:", "mean 'gamma'?"),
        ("env:", "enf:", "config.environment.enf:", "did you mean 'env'?"),
        ("maze_dims", "maze_dim", "config.environment.env_config:", "'maze_dims'"),
        ("training_iteration", "iterations", "stop.iterations:", "'training_iteration'"),
        ("hidden_size", "hiden_size", "methods.gru.model:", "did you mean 'hidden_size'?"),
        ("model: {policy: gru", "modle: {policy: gru", "methods.gru.modle:", "mean 'model'?"),
        ("policy: gru", "policy: grew", "methods.gru.model.policy:", "did you mean 'gru'?"),
        ("escape", "escap", "config.environment.env:", "did you mean 'labyrinth_escape'?"),
        ("Reinforce", "Reinforced", "algorithm:", "did you mean 'Reinforce'?"),
        ("Reinforce", "ppo", "algorithm:", "did you mean 'PPO'?"),
        ("{policy: sparsenet}", "{policy: sparsenet, backend: touch}", "model:", "'torch'"),
        # Names that others use, and right names in the wrong place.
        ("{lr: 1e-3}", "{learning_rate: 1e-3}", "training.learning_rate:", "did you mean 'lr'?"),
        ("_envs_per_env_runner", "_workers", "num_workers:", "did you mean 'num_env_runners'?"),
        ("{lr: 1e-3}", "{num_workers: 2}", "num_workers:", "'config.env_runners.num_env_runners'?"),
        ("{lr: 1e-3}", "{env: x}", "training.env:", "did you mean 'config.environment.env'?"),
        ("training: {lr: 1e-3}", "lr: 1", "config.lr:", "did you mean 'config.training.lr'?"),
        ("seeds: [0]", "learning_rate: 1", "learning_rate:", "mean 'config.training.lr'?"),
        ("seeds: [0]", "learing_rate: 1", "learing_rate:", "mean 'config.training.lr'?"),
        ("seeds: [0]", "iterations: 1", "iterations:", "mean 'stop.training_iteration'?"),
        ("seeds: [0]", "seed: 1", "seed:", "did you mean 'seeds'?"),
        ("seeds: [0]", "n_jobs: 1", "n_jobs:", "did you mean 'concurrency'?"),
        ("seeds: [0]", "maze_dim: 1", "maze_dim:", "'config.environment.env_config.maze_dims'?"),
        ("seeds: [0]", "spase: {}", "spase:", "did you mean 'methods.sparse'?"),
        ("{lr: 1e-3}", "{hidden_size: 8}", "hidden_size:", "'methods.gru.model.hidden_size'?"),
        ("hidden_size: 8", "lr: 1", "methods.gru.model:", "did you mean 'config.training.lr'?"),
        # Wrong types.
        ("lr: 1e-3", "lr: fast", "config.training.lr:", "expected a number or a list, got 'fast'"),
        ("lr: 1e-3", "lr: {grid: [1e-3, fast]}", "config.training.lr:", "got 'fast'"),
        ("seeds: [0]", "seeds: 3", "seeds:", "expected a list, got 3"),
        ("seeds: [0]", "seeds: [zero]", "seeds:", "expected a whole number, got 'zero'"),
        ("iteration: 1", "iteration: many", "stop.training_iteration:", "a whole number"),
        ("iteration: 1", "iteration: 1.5", "stop.training_iteration:", "a whole number"),
        ("runner: 2", "runner: two", "num_envs_per_env_runner:", "a whole number, got 'two'"),
        ("size: 8", "size: big", "methods.gru.model:", "hidden_size must be a whole number"),
        ("{lr: 1e-3}", "1e-3", "config.training:", "expected a mapping"),
        ("{model: {policy: gru, hidden_size: 8}}", "gru", "methods.gru:", "a mapping"),
        ("{training: {lr: 2e-3}}", "{grid: [3]}", "methods.sparse.config:", "a mapping"),
        (
            "policy: gru",
            "policy: {grid: [gru]}",
            "methods.gru.model.policy:",
            "expected the policy's name",
        ),
        ("name: good", "name: 7", "name:", "7 is no safe name, which is text: put it in quotes"),
        (
            "{policy: gru, hidden_size: 8}",
            "{grid: [{policy: gru}]}",
            "methods.gru.model:",
            "a method is one policy",
        ),
        ("Reinforce", "[PPO]", "algorithm:", "expected the algorithm's name"),
        ("env: labyrinth_escape", "env: 3", "config.environment.env:", "got 3"),
        # Impossible values.
        ("lr: 1e-3", "lr: -1e-3", "config.training.lr:", "greater than 0, got -0.001"),
        ("lr: 2e-3", "lr: 0", "methods.sparse.config.training.lr:", "greater than 0, got 0"),
        ("lr: 1e-3", "lr: .nan", "config.training.lr:", "must be greater than 0"),
        ("lr: 1e-3", "lr: .inf", "config.training.lr:", "must be greater than 0"),
        ("lr: 1e-3", "gamma: 1.5", "config.training.gamma:", "from 0 to 1, got 1.5"),
        ("iteration: 1", "iteration: 0", "stop.training_iteration:", "at least 1, got 0"),
        ("runner: 2", "runner: 0", "num_envs_per_env_runner:", "at least 1, got 0"),
        ("[6, 6]", "[7, 7]", "config.environment.env_config:", "maze_dims"),
        ("length: 20", "length: 0", "config.environment.env_config:", "episode_length"),
        (
            "{policy: sparsenet}",
            "{policy: sparsenet, num_neurons: 4, num_input_neurons: 2, num_parents: 5}",
            "methods.sparse.model:",
            "num_parents",
        ),
        (
            "{policy: sparsenet}",
            "{policy: sparse_mlp, num_neurons: 9, neuron_size: 12}",
            "methods.sparse.model:",
            "num_parents * neuron_size (60) must be at most input_size (56)",
        ),
        ("lr: 1e-3", "two_phase: true", "config:", "two_phase must be false"),
        ("lr: 1e-3", "total_updates: 9", "config:", "belong together: set both or none"),
        ("lr: 1e-3", "total_updates: none", "config.training.total_updates:", "a whole number"),
        ("seeds: [0]", "seeds: [-1]", "seeds:", "at least 0, got -1"),
        ("seeds: [0]", "seeds: [1073741824]", "seeds:", "less than 1073741824"),
        ("seeds: [0]", "checkpoint: {every: 0}", "checkpoint.every:", "at least 1"),
        ("seeds: [0]", "checkpoint: {often: 1}", "checkpoint.often:", "known: every, keep"),
        ("seeds: [0]", "num_threads: 0", "num_threads:", "at least 1"),
        ("seeds: [0]", "iteration_timeout: 0", "iteration_timeout:", "greater than 0"),
        ("seeds: [0]", "iteration_timeout: soon", "iteration_timeout:", "expected a number"),
        ("seeds: [0]", "concurrency: all", "concurrency:", "expected auto or a whole number"),
        # Names, doubles and holes.
        ("name: good", "name: ../good", "name:", "is no safe name"),
        ("  gru:", "  g/ru:", "methods.g/ru:", "is no safe name"),
        ("  gru:", "  true:", "methods.True:", "put it in quotes, as in 'True'"),
        ("  gru:", "  1:", "methods.1:", "put it in quotes, as in '1'"),
        ("name: good", "name: on", "line 1:", "'on' in quotes"),
        ("seeds: [0]", "seeds: [1, 1]", "seeds:", "1 is given twice"),
        ("seeds: [0]", "seeds: []", "seeds:", "empty list"),
        ("lr: 1e-3", "lr: {grid: []}", "config.training.lr.grid:", "empty list"),
        ("lr: 1e-3", "lr: {grid: [1, 1.0]}", "config.training.lr.grid:", "given twice"),
        ("lr: 1e-3", "lr: {grid: 3}", "config.training.lr.grid:", "expected a list, got 3"),
        ("lr: 1e-3", "lr: {grid: [1], gird: [2]}", "lr.gird:", "did you mean 'grid'?"),
        ("lr: 1e-3", "lr: {gird: [1, 2]}", "lr.gird: unknown key;", "did you mean 'grid'?"),
        ("size: 8", "size: {Grids: [8]}", "model.hidden_size.Grids:", "did you mean 'grid'?"),
        ("iteration: 1", "iteration: {gird: [1]}", "iteration.gird:", "did you mean 'grid'?"),
        ("[6, 6]", "{grd: [[6, 6]]}", "maze_dims.grd:", "did you mean 'grid'?"),
        ("name: good", "", "name:", "missing"),
        ("stop: {training_iteration: 1}", "", "stop:", "missing"),
        ("training_iteration: 1", "", "stop.training_iteration:", "missing"),
        ("env: labyrinth_escape", "", "config.environment.env:", "missing"),
        ("policy: gru, ", "", "methods.gru.model.policy:", "missing; one of gru"),
        ("training: {lr: 1e-3}", "debugging: {seed: 1}", "config.debugging.seed:", "'seeds'"),
        ("training: {lr: 1e-3}", "rl_module: {model_config: {}}", "config.rl_module:", "methods"),
        ("training: {lr: 1e-3}", "learners: {num_learners: 2}", "config:", "num_learners"),
        # Not YAML, or not an experiment.
        ("lr: 1e-3", "lr: 1e-3, lr: 1e-4", "line 8:", "key 'lr' is given twice"),
        ("lr: 1e-3", "lr: [", "line 8:", ""),
        ("name: good", "name: 'good", "line 1", ""),
        ("name: good", "\tname: good", "line 1:", ""),
        ("stop: {", "stop: &a {b: *a, ", "contains itself", ""),
    ],
)
def test_bad_experiment(run, old, new, key, message):
    assert old in GOOD
    result = run("sweep", "experiment.yaml", text=GOOD.replace(old, new, 1))
    refused(result, "experiment.yaml", key, message)


ALL_WRONG = """\
name: on top
algorithm: PPO
config:
  environment: {env: labyrinth_escape, env_config: {maze_dims: [7, 7]}}
  env_runners: {num_envs_per_env_runner: two}
  training: {lr: -1, gama: 0.9, lambda_: {grid: [0.9, 0.9]}}
  learners: {num_gpus_per_learner: 1.5}
  reporting: {metrics_num_episodes_for_smoothing: 0}
methods:
  gru: {model: {policy: grru}}
  lstm: {model: {policy: lstm, hiden_size: 8}, config: {training: {lr: 0}}}
  mlp: {modle: {policy: mlp}}
seeds: [0, -1]
stop: {training_iteration: {grid: [1, 0]}}
checkpoint: {every: 0, keeep: 1}
evaluate: 5
num_thread: 1
concurrency: all
"""


def test_everything_wrong_is_said_at_once(run):
    """One line each, however many grid points and methods it is wrong for."""
    result = run("sweep", "experiment.yaml", "--set", "seeds=[-2]", text=ALL_WRONG)
    assert (result.exit_code, result.stdout) == (2, "")
    place = "sgrl: experiment.yaml"
    assert result.stderr.splitlines() == [
        f"{place}: methods.mlp.modle: unknown key; did you mean 'model'?",
        f"{place}: checkpoint.keeep: unknown key; did you mean 'keep'?",
        f"{place}: num_thread: unknown key; did you mean 'num_threads'?",
        f"{place}: name: 'on top' is no safe name: it must start with a letter or digit and hold "
        "only letters, digits, '_', '.', '+', '-'",
        f"{place} with --set seeds: seeds: must be at least 0, got -2",
        f"{place}: checkpoint.every: must be at least 1, got 0",
        f"{place}: evaluate: expected a mapping of keys to values, got 5",
        f"{place}: concurrency: expected auto or a whole number, got 'all'",
        f"{place}: methods.gru.model.policy: unknown policy 'grru'; did you mean 'gru'?",
        f"{place}: config.training.lambda_.grid: 0.9 is given twice",
        f"{place}: config.env_runners.num_envs_per_env_runner: expected a whole number, got 'two'",
        f"{place}: config.training.lr: must be greater than 0, got -1",
        f"{place}: config.training.gama: unknown key; did you mean 'gamma'?",
        f"{place}: config.learners.num_gpus_per_learner: must be at least 0, and whole above 1, "
        "got 1.5",
        f"{place}: config.reporting.metrics_num_episodes_for_smoothing: must be at least 1, got 0",
        f"{place}: config.environment.env_config: labyrinth_escape: maze_dims must be "
        "[height, width], two even numbers of at least 6, got [7, 7]",
        f"{place}: stop.training_iteration: must be at least 1, got 0",
        f"{place}: methods.lstm.model: policy 'lstm' has no setting 'hiden_size'; did you mean "
        "'hidden_size'?",
        f"{place}: methods.lstm.config.training.lr: must be greater than 0, got 0",
    ]


def test_no_methods(run):
    text = GOOD[: GOOD.index("  gru:")].replace("methods:", "methods: {}") + "stop: {}"
    refused(run("sweep", "experiment.yaml", text=text), "methods: empty")


@pytest.mark.parametrize("text", ["", "\n# nothing\n", "---\n"])
def test_empty_file(run, text):
    refused(run("sweep", "experiment.yaml", text=text), "experiment.yaml: empty")


@pytest.mark.parametrize("text", ["good", "- good", "3"])
def test_no_mapping(run, text):
    refused(run("sweep", "experiment.yaml", text=text), "experiment.yaml: not an experiment")


def test_missing_file(run):
    refused(run("sweep", "experment.yaml"), "no such file; did you mean experiment.yaml?")
    refused(
        run("sweep", "nowhere/experiment.yaml"),
        "no such file; sgrl list experiments shows those that sgrl brings along",
    )
    refused(run("sweep", "."), "cannot be read")


def test_binary_file(run, tmp_path):
    (tmp_path / "policy.yaml").write_bytes(b"\xff\xfe\x00")
    refused(run("sweep", "policy.yaml"), "policy.yaml: not a text file")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("config.training.lr", "expected KEY=VALUE"),
        ("=1", "expected KEY=VALUE"),
        ("config..lr=1", "expected KEY=VALUE"),
        ("config.training.lr=", "config.training.lr: no value given"),
        ("config.training.lr=fast", "--set config.training.lr: config.training.lr: expected a"),
        ("config.training.lr=-1e-3", "greater than 0, got -0.001"),
        ("config.training.lr=[", "--set config.training.lr"),
        ("config.trainin.lr=1", "config.trainin: unknown section; did you mean 'training'?"),
        ("config.training.lr.x=1", "config.training.lr holds no keys"),
        ("lr=1e-3", "with --set lr: lr: unknown key; did you mean 'config.training.lr'?"),
        ("methods.gru.model.policy=grr", "methods.gru.model.policy: unknown policy 'grr'"),
        ("methods.gur.model.policy=gru", "unknown method 'gur'; did you mean 'gru'?"),
        ("methods.gur=null", "methods.gur: unknown method 'gur'; did you mean 'gru'?"),
        ("stop.training_iteration=0", "at least 1, got 0"),
        ("algorithm=Reinforse", "did you mean 'Reinforce'?"),
    ],
)
def test_bad_override(run, override, message):
    refused(run("sweep", "experiment.yaml", "--set", override), "experiment.yaml", message)


@pytest.mark.parametrize(
    ("options", "trials"),
    [
        (["--methods", "sparse"], ["sparse_seed=0"]),
        (["--methods", "sparse,gru", "--seeds", "3"], ["gru_seed=3", "sparse_seed=3"]),
        (
            ["--seeds", "0..1,7", "--set", "methods.gru=null"],
            [f"sparse_seed={s}" for s in (0, 1, 7)],
        ),
        (
            ["--jobs", 2, "--set", "methods.more={model: {policy: mlp}}", "--methods", "more"],
            ["more_seed=0"],
        ),
    ],
)
def test_some_methods_and_other_seeds(run, options, trials):
    result = run("sweep", "experiment.yaml", "--dry-run", "--no-estimate", *options)
    assert (result.exit_code, result.stderr) == (0, "")
    assert [line.strip() for line in result.stdout.splitlines()[1:]] == trials


def test_trials_at_a_time(run, monkeypatch):
    """Of a sweep, and of one that is resumed."""
    asked = []
    monkeypatch.setattr(
        "sgrl.tuning.sweep._run", lambda _, experiment, *selected: asked.append(experiment)
    )
    monkeypatch.setattr("sgrl.cli.sweeps._compare", lambda location: None)
    run("sweep", "experiment.yaml", "--jobs", 3)
    run("resume", "results/good", "--jobs", 2)
    assert [experiment.file.concurrency for experiment in asked] == [3, 2]
    assert "\nconcurrency: 2\n" in Path("results/good/experiment.yaml").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods", "gur"], "--methods: unknown method 'gur'; did you mean 'gru'?"),
        (["--seeds", "2..1"], "with --seeds: seeds: 2..1 is no range"),
        (["--seeds", "0,0"], "with --seeds: seeds: 0 is given twice"),
        (["--seeds", "a"], "with --seeds: seeds: expected a whole number, got 'a'"),
        (
            ["--set", "methods.gru=null", "--set", "methods.sparse=null"],
            "methods: empty; name at least one method",
        ),
    ],
)
def test_no_such_methods_and_seeds(run, options, message):
    refused(run("sweep", "experiment.yaml", *options), message)


def test_override_inside_a_methods_grid(run):
    text = GOOD.replace("{training: {lr: 2e-3}}", "{training: {grid: [{lr: 1}, {lr: 2}]}}")
    result = run("sweep", "experiment.yaml", "--set", "config.training.lr=1e-3", text=text)
    refused(result, "methods.sparse.config.training is a grid")


def test_tracebacks(run):
    """Only where they are asked for; the line comes last."""
    line = "sgrl: nowhere.yaml: no such file"
    said = run("--verbose", "sweep", "nowhere.yaml")
    assert VERBOSE not in os.environ
    assert (said.exit_code, said.stdout) == (2, "")
    assert said.stderr.startswith("Traceback (most recent call last):\n")
    assert said.stderr.splitlines()[-1].startswith(line)


@pytest.mark.parametrize("verbose", [False, True])
def test_what_ray_says_is_shown_where_that_is_asked_for(verbose, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv(VERBOSE, str(int(verbose)))
    assert ray_logging()["log_to_driver"] == verbose
    with quiet(tmp_path / "sweep.log"):
        subprocess.run(["sh", "-c", "echo from a process"], check=True)
        print("from here")
    said = "from a process\nfrom here\n"
    assert (tmp_path / "sweep.log").read_text() == said
    assert capfd.readouterr().err == (said if verbose else "")


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("training.lr", "config.training.lr"),
        ("lr", "config.training.lr"),
        ("env_config.maze_dims", "config.environment.env_config.maze_dims"),
        ("stp.training_iteration", "stop.training_iteration"),
    ],
)
def test_the_whole_key_that_was_meant(run, key, meant):
    """Of what --set gives without its section, or in a misspelled one."""
    said = run("sweep", "experiment.yaml", "--set", f"{key}=1", text=GOOD)
    refused(said, f"experiment.yaml with --set {key}: {key}: unknown key; did you mean '{meant}'?")


def test_bad_name(run):
    refused(run("sweep", "experiment.yaml", "--name", "a/b"), "'a/b' is no safe name")


@pytest.mark.parametrize(
    ("section", "resource"),
    [
        ("env_runners={num_env_runners: 4096}", "4097 CPUs"),
        ("learners={num_gpus_per_learner: 4096}", "4096 GPUs"),
    ],
)
def test_more_resources_than_the_machine_has(run, section, resource):
    result = run("sweep", "experiment.yaml", "--set", f"config.{section}")
    refused(result, "trial gru_seed=0 needs", resource, "there are")


def test_compiled_code_without_a_compiler(run, monkeypatch):
    missing = CompileError("found no C++ compiler: install one")
    monkeypatch.setattr("sgrl.nn.kernels.native.load_library", lambda real: missing)
    text = GOOD.replace("{policy: sparsenet}", "{policy: sparsenet, backend: native}")
    message = "backend native of trial sparse_seed=0 cannot run: found no C++ compiler: install one"
    refused(run("sweep", "experiment.yaml", text=text), message)
    assert not Path("results").exists()


@pytest.mark.parametrize("tracker", ["wandb", "mlflow", "tensorboard"])
def test_trackers_that_are_not_installed(run, monkeypatch, tracker):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    message = f'{tracker} is not installed: pip install "sgrl[{tracker}]"'
    refused(run("sweep", "experiment.yaml", "--track", tracker), message)
    assert not Path("results").exists()
    Path("results/good").mkdir(parents=True)
    Path("results/good/experiment.yaml").write_text(GOOD)
    refused(run("resume", "results/good", "--track", tracker), message)
    Path("results/good/experiment.yaml").write_text(f"{GOOD}track: {tracker}\n")
    refused(run("resume", "results/good"), message)


def test_unknown_tracker(run):
    message = "experiment.yaml: track: unknown tracker 'wand'; did you mean 'wandb'?"
    refused(run("sweep", "experiment.yaml", "--track", "wand"), message)


def test_results_folder_that_exists(run):
    Path("results/good").mkdir(parents=True)
    Path("results/good/experiment.yaml").write_text(GOOD)
    refused(run("sweep", "experiment.yaml"), "sgrl resume results/good", "--name")


def test_results_folder_of_something_else(run):
    Path("results/good").mkdir(parents=True)
    Path("results/good/notes.txt").write_text("mine")
    refused(run("sweep", "experiment.yaml"), "results/good", "--name")


def test_no_mnist_to_be_had(run, tmp_path, monkeypatch):
    def refuse(*arguments):
        raise mnist._Refused("no network")

    monkeypatch.setattr(mnist, "MIRRORS", ())
    monkeypatch.setattr(mnist, "_from_package", refuse)
    text = GOOD.replace("labyrinth_escape", "mnist_bandit").replace(
        "maze_dims: [6, 6], episode_length: 20", f"data_dir: {tmp_path / 'data'}"
    )
    result = run("sweep", "experiment.yaml", text=text)
    refused(result, "MNIST is nowhere to be had", "no network", "SGRL_DATA_DIR")
    assert not Path("results").exists()


@pytest.mark.parametrize("verb", ["resume", "status"])
def test_results_folder_that_is_none(run, verb):
    refused(run(verb, "nowhere"), "nowhere")
    Path("empty").mkdir()
    refused(run(verb, "empty"), "empty", "holds no sweep")
    Path("edited").mkdir()
    Path("edited/experiment.yaml").write_text(GOOD.replace("lr: 1e-3", "lr: -1"))
    if verb == "resume":  # status shows how far the trials are, whatever their settings
        refused(run(verb, "edited"), "edited/experiment.yaml", "config.training.lr")
    Path("edited/experiment.yaml").write_text(GOOD.replace("methods:", "method:"))
    message = "did you mean 'methods'?" if verb == "resume" else "methods: missing"
    refused(run(verb, "edited"), "edited/experiment.yaml", message)


@pytest.fixture
def checkpoints(tmp_path):
    """Two checkpoints of an untrained policy, without RLlib's files."""
    policy = make_policy("gru", 56, 4, hidden_size=8)
    environment = {"env": "labyrinth_escape", "env_config": {"episode_length": 10}}
    for iteration in (5, 10):
        write_checkpoint(
            tmp_path / "checkpoints",
            iteration,
            lambda directory: save_policy(policy, directory, environment=environment),
            keep=2,
        )
    return tmp_path / "checkpoints"


def test_evaluate(run, checkpoints):
    result = run("evaluate", checkpoints / "000010", "--episodes", 7)
    assert (result.exit_code, result.stderr) == (0, "")
    rows = dict(line.split(": ") for line in result.stdout.splitlines())
    assert rows["episodes"] == "7"
    assert 0 <= float(rows["success_rate"].split()[0]) <= 1
    assert result.stdout == run("evaluate", checkpoints / "000010", "--episodes", 7).stdout
    found = json.loads(run("evaluate", checkpoints / "000010", "--episodes", 1, "--json").stdout)
    assert (found["episodes"], found["seed"], found["greedy"]) == (1, 0, False)
    assert 0 <= found["success_rate_low"] <= found["success_rate"] <= found["success_rate_high"]
    assert found["episode_return_mean_low"] is None  # of one episode


def _truncate(file):
    file.write_bytes(file.read_bytes()[:-1])


def _edit(file):
    file.write_bytes(b"\x00" + file.read_bytes()[1:])


@pytest.mark.parametrize("damage", [_truncate, _edit, Path.unlink])
@pytest.mark.parametrize("name", ["policy.safetensors", "policy.json", "manifest.json"])
def test_evaluate_a_damaged_checkpoint(run, checkpoints, damage, name):
    damage(checkpoints / "000010" / name)
    refused(run("evaluate", checkpoints / "000010"), str(checkpoints / "000005"))


def test_evaluate_what_is_no_checkpoint(run, checkpoints):
    refused(run("evaluate", "nowhere"), "nowhere")
    refused(run("evaluate", checkpoints), "is no checkpoint")
    refused(run("evaluate", "experiment.yaml"), "is no checkpoint")


def test_interrupted_sweep_says_how_to_resume(run, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("sgrl.tuning.sweep.run_sweep", interrupted)
    result = run("sweep", "experiment.yaml", "--name", "later")
    assert result.exit_code == 130
    assert result.stderr == "sgrl: interrupted; go on with: sgrl resume results/later\n"


def _sgrl(folder, *arguments, code="from sgrl.cli import main; main()"):
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_home_is_found_however_it_is_written(run, tmp_path, monkeypatch):
    """Shells leave ~ alone in --results='~/runs'."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home" / "runs" / "good").mkdir(parents=True)
    (tmp_path / "home" / "runs" / "good" / "experiment.yaml").write_text("mine")
    (tmp_path / "home" / "good.yaml").write_text(GOOD)
    refused(run("sweep", "~/good.yaml", "--results=~/runs"), "home/runs/good already exists")
    for verb in ("status", "resume", "report"):
        refused(run(verb, "~/runs/none"), "home/runs/none")
    refused(run("compare", "~/runs/none", "~/runs/good"), "home/runs/none")
    for verb in ("evaluate", "render", "probe"):
        refused(run(verb, "~/runs/none"), "home/runs/none")
    assert {path.name for path in tmp_path.iterdir()} == {"home", "experiment.yaml"}


def test_in_a_process_of_its_own(tmp_path):
    # RLlib logs and warns about PPO's configuration, all of which is to be kept quiet.
    text = GOOD.replace("Reinforce", "PPO").replace("lr: 2e-3", "lr: -1")
    (tmp_path / "experiment.yaml").write_text(text)
    result = _sgrl(tmp_path, "sweep", "experiment.yaml")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == (
        "sgrl: experiment.yaml: methods.sparse.config.training.lr: must be greater than 0, got -1\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["experiment.yaml"]


def test_help_is_light_and_evaluate_needs_no_ray(tmp_path, checkpoints):
    code = (
        "import sys, sgrl.cli; assert not {'ray', 'torch', 'pandas'} & set(sys.modules);"
        "sys.modules['ray'] = None; sgrl.cli.main()"
    )
    result = _sgrl(tmp_path, "evaluate", checkpoints / "000005", "--episodes", 1, code=code)
    assert result.returncode == 0, result.stderr
    assert json.loads((checkpoints / "000005" / "policy.json").read_text())["policy"] == "gru"


def test_a_machine_too_busy_to_start_ray(run, monkeypatch) -> None:
    import ray

    def init(*args, **kwargs):
        raise Exception("The current node timed out during startup. This could happen because")

    monkeypatch.setattr(ray, "init", init)
    result = run("sweep", "experiment.yaml")
    assert result.exit_code == 2
    message = "Ray did not start in time, as on a machine that has too much to do: try again"
    assert result.stderr.splitlines()[-1] == f"sgrl: {message}"
