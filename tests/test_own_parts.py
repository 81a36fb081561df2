"""Policies, environments, rules and callbacks from a package outside of the project."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import gymnasium as gym
import pytest
import torch
import yaml
from network_hosts import Host, network_hosts
from typer.testing import CliRunner

from sgrl import load_policy
from sgrl.cli import app
from sgrl.nn import SparseRNN
from sgrl.nn.registry import make_policy, save_policy
from sgrl.results.folder import SweepFolder
from sgrl.results.metrics import read_metrics
from sgrl.results.provenance import changed_parts, read_starts, record_start
from sgrl.results.rllib_metrics import metrics_row
from sgrl.rllib import PPOConfig, ReinforceConfig, register_environment
from sgrl.tuning.experiment.load import load_experiment
from sgrl.tuning.experiment.sections import build_algorithm_config
from sgrl.tuning.trial_callbacks import Following

PACKAGE = {
    "__init__.py": "",
    "models.py": '''
from dataclasses import dataclass

from sgrl.nn.recurrent_policies import SparseNetPolicy


@dataclass(frozen=True)
class HalvedSettings(SparseNetPolicy.Settings):
    """Settings of HalvedPolicy.

    Attributes:
        share: of what the core gives. The actor sees no more.
    """

    share: float = 0.5
    words: tuple[str, ...] = ("a", "b")
    note: str | None = None


class HalvedPolicy(SparseNetPolicy):
    """A SparseNet with smaller features."""

    Settings = HalvedSettings

    def run_core(self, embeddings, state, mask):
        features, state = super().run_core(embeddings, state, mask)
        return features * self.settings.share, state


class Broken(SparseNetPolicy):
    def _build_actor(self, core_size, generator, dtype):
        raise RuntimeError("no actor")


class Needy(SparseNetPolicy):
    @dataclass(frozen=True, kw_only=True)
    class Settings(SparseNetPolicy.Settings):
        share: float


class Undecorated(SparseNetPolicy):
    class Settings(SparseNetPolicy.Settings):
        share: float = 0.5


class NoPolicy:
    pass
''',
    "envs.py": '''
import gymnasium as gym
import numpy as np


class Naming(gym.Env):
    """Rewards the action that the observation names."""

    observation_space = gym.spaces.Box(0, 1, (2,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def __init__(self, reward=1.0):
        self.reward = reward

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self._observe(), {}

    def _observe(self):
        self.named = int(self.np_random.integers(2))
        return np.eye(2, dtype=np.float32)[self.named]

    def step(self, action):
        self.steps += 1
        reward = self.reward * float(action == self.named)
        return self._observe(), reward, self.steps == 6, False, {}


gym.register("Naming-v0", entry_point=Naming, max_episode_steps=6)
''',
    "rules.py": '''
from sgrl.nn.mixing import MixingRule


class HalvingRule(MixingRule):
    """Lambda is halved in every update."""

    def next_weight(self, moments, previous, memory):
        return previous / 2
''',
    "following.py": """
import os
import random
import signal
from pathlib import Path

import torch

from sgrl import load_policy
from sgrl.tuning.trial_callbacks import TrialCallbacks


class Journal(TrialCallbacks):
    def note(self, *words):
        with (self.folder / "journal.txt").open("a") as file:
            print(*words, file=file)

    def on_iteration(self, trial, row):
        torch.rand(3), random.random()
        self.note(trial.name, row["iteration"])
        row.clear()
        killing = Path(os.environ.get("KILLING", ""))
        if killing.is_file() and len((self.folder / "metrics.csv").read_text().splitlines()) == 4:
            killing.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError("nowhere\\nto write")

    def on_checkpoint(self, trial, checkpoint):
        self.note(checkpoint.name, type(load_policy(checkpoint)).__name__)

    def on_trial_end(self, trial, state):
        self.note(state)
""",
}
SMALL = {
    **{"feature_size": 16, "embedding_size": 16, "num_neurons": 12, "neuron_size": 3},
    **{"num_parents": 3, "num_slots": 2, "num_input_neurons": 4, "actor_slots": 2},
}
MODEL = {
    "policy": "my_package.models:HalvedPolicy",
    "mixing_rule": "my_package.rules:HalvingRule",
    "share": 0.25,
    **SMALL,
}
EXPERIMENT = {
    "name": "own",
    "config": {
        "environment": {"env": "my_package.envs:Naming-v0"},
        "env_runners": {"num_envs_per_env_runner": 4},
    },
    "methods": {"halved": {"model": MODEL}},
    "seeds": [7],
    "stop": {"training_iteration": 5},
    "checkpoint": {"every": 2, "keep": 2},
    "callbacks": "my_package.following:Journal",
}
FAILED = (
    "on_iteration of my_package.following:Journal failed: "
    "RuntimeError: nowhere to write (my_package/following.py:26)"
)


def write_package(folder: Path) -> None:
    (folder / "my_package").mkdir()
    for name, text in PACKAGE.items():
        (folder / "my_package" / name).write_text(text)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, with the package and own.yaml in it."""
    write_package(tmp_path)
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(EXPERIMENT, sort_keys=False))
    path, modules = sys.path[:], set(sys.modules)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.path[:] = path
    gym.registry.pop("Naming-v0", None)
    for name in set(sys.modules) - modules:
        if name.partition(".")[0] in ("my_package", "theirs"):
            del sys.modules[name]


def in_process_rows(folder: Path) -> list[dict]:
    """What the trial's rows are to be."""
    [trial] = load_experiment(folder / "own.yaml").trials
    algorithm = build_algorithm_config(trial.config).build_algo()
    rows = [metrics_row(algorithm.train(), i, 0.0) for i in range(1, 6)]
    algorithm.stop()
    return list(map(measured, rows))


def measured(row: dict) -> dict:
    """What does not depend on the clock, and is there."""
    return {k: v for k, v in row.items() if k != "iteration_seconds" and not math.isnan(v)}


def test_a_policy_and_a_rule_by_their_paths(folder: Path) -> None:
    policy = make_policy(observation_size=2, num_actions=2, seed=3, name=MODEL["policy"], **SMALL)
    policy.train()
    save_policy(policy, folder)
    description = json.loads((folder / "policy.json").read_text())
    assert description["policy"] == "my_package.models:HalvedPolicy"
    assert description["settings"]["words"] == ["a", "b"]
    loaded = load_policy(folder)
    assert type(loaded) is type(policy)
    for name, value in policy.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    said = CliRunner().invoke(app, ["list", "policies", "my_package.models:HalvedPolicy"])
    assert re.search(r"share +a number; default 0\.5\. Of what the core gives\.\n", said.output)
    said = CliRunner().invoke(app, ["list", "rules", "my_package.rules:HalvingRule"])
    assert said.output == "Lambda is halved in every update.\n\n"

    rnn = SparseRNN(2, 6, 3, num_input_neurons=2, mixing_rule="my_package.rules:HalvingRule")
    for expected in (0.5, 0.25):
        rnn(torch.randn(4, 3, 2))[0].sum().backward()
        assert set(rnn.mixing_weights[0].tolist()) == {expected}


def test_rllib_configs(folder: Path, ray_session: None) -> None:
    """`Reinforce` takes names as they are; RLlib's own algorithms, registered environments."""
    env = "my_package.envs:Naming"
    register_environment(env)
    for config in (
        ReinforceConfig().env_runners(num_envs_per_env_runner=2),
        PPOConfig()
        .env_runners(num_env_runners=0, num_envs_per_env_runner=2)
        .training(train_batch_size_per_learner=24, minibatch_size=24, num_epochs=1),
    ):
        config.environment(env, env_config={"episode_length": 5, "reward": 2.0})
        algorithm = config.rl_module(model_config=MODEL).debugging(seed=0).build_algo()
        row = metrics_row(algorithm.train(), 1, 0.0)
        assert row["episode_length_mean"] == 5
        assert row["episode_return_mean"] % 0.5 == 0
        algorithm.save_to_path(str(folder / "saved" / config.algo_class.__name__))
        algorithm.stop()
        assert row["mixing_weight_mean"] < 1
    for saved in (folder / "saved").iterdir():
        assert type(load_policy(saved)).__name__ == "HalvedPolicy"
        said = CliRunner().invoke(app, ["evaluate", str(saved), "--episodes", "2", "--json"])
        assert json.loads(said.output)["episodes"] == 2


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        (
            "methods.halved.model.policy=my_package.models:HalvedPolic",
            "the module my_package.models has no HalvedPolic; did you mean "
            "'my_package.models:HalvedPolicy'?",
        ),
        (
            "methods.halved.model.policy=my_package:HalvedPolicy",
            "the module my_package has no HalvedPolicy; it has no class derived from "
            "sgrl.nn.policy.Policy",
        ),
        (
            "methods.halved.model.policy=my_pakage.models:HalvedPolicy",
            "my_pakage.models:HalvedPolicy: no module named 'my_pakage.models': it is "
            "neither installed nor in the current folder",
        ),
        (
            "methods.halved.model.policy=my_package.models:NoPolicy",
            "my_package.models:NoPolicy is not derived from sgrl.nn.policy.Policy",
        ),
        (
            "methods.halved.model.policy=my_package.models:Undecorated",
            "my_package.models:Undecorated: put @dataclass(frozen=True) before its settings",
        ),
        (
            "methods.halved.model={policy: my_package.models:Needy}",
            "policy 'my_package.models:Needy' needs the setting 'share'",
        ),
        (
            "methods.halved.model={policy: my_package.models:Broken}",
            "my_package.models:Broken fails: RuntimeError: no actor (my_package/models.py:32)",
        ),
        (
            "methods.halved.model.shaer=1",
            "policy 'my_package.models:HalvedPolicy' has no setting 'shaer'; did you mean 'share'?",
        ),
        (
            "methods.halved.model.share=big",
            "share must be a number, got 'big'",
        ),
        (
            "methods.halved.model.words=[1]",
            "words must be a list, got [1]",
        ),
        (
            "methods.halved.model.mixing_rule=my_package.rules:Halving",
            "the module my_package.rules has no Halving; did you mean "
            "'my_package.rules:HalvingRule'?",
        ),
        (
            "config.environment.env=my_package.envs:Namin",
            "the module my_package.envs registers no Namin; did you mean 'my_package.envs:Naming'?",
        ),
        (
            "config.environment.env=my_package.models:NoPolicy",
            "NoPolicy of the module my_package.models is not derived from gymnasium.Env",
        ),
        (
            "config.environment.env=my_package.envs:Naming",
            "my_package.envs:Naming: its episodes have no end of their own: give "
            "episode_length, in steps",
        ),
        (
            "callbacks=my_package.following:Journl",
            "the module my_package.following has no Journl; did you mean "
            "'my_package.following:Journal'?",
        ),
        (
            "callbacks=Journal",
            "expected module:Class, as in my_package:MyCallbacks, got 'Journal'",
        ),
        (
            "callbacks=theirs:Journal",
            "theirs:Journal: the module theirs fails: ModuleNotFoundError: No module named "
            "'no_such_plotter' (theirs.py:2)",
        ),
    ],
)
def test_mistakes_are_one_line(folder: Path, setting: str, words: str) -> None:
    (folder / "theirs.py").write_text("import os\nimport no_such_plotter\n")
    said = CliRunner().invoke(app, ["sweep", "own.yaml", "--dry-run", "--set", setting])
    assert said.exit_code == 2
    (line,) = said.stderr.splitlines()
    assert line.startswith("sgrl: own.yaml")
    assert line.endswith(f": {words}")


def test_the_parts_are_named_in_provenance(folder: Path) -> None:
    provenance = folder / "provenance.json"
    record_start(provenance, ["my_package.models", "my_package.envs", "torch.nn"])
    [start] = read_starts(provenance)
    assert set(start["parts"]) == {"my_package", "torch"}
    assert set(start["parts"]["my_package"]) == {"sha256"}
    assert start["parts"]["torch"] == {"version": f"torch {torch.__version__}"}
    record_start(provenance, ["my_package.models", "torch"])
    assert changed_parts(provenance) == []
    (folder / "my_package" / "more.py").write_text("x = 1\n")
    record_start(provenance, ["my_package.models", "torch"])
    assert changed_parts(provenance) == ["my_package"]


def test_what_callbacks_raise_is_noted_once(folder: Path) -> None:
    [trial] = load_experiment("own.yaml").trials
    notes: list[str] = []
    following = Following(trial, folder, notes)
    before = torch.get_rng_state()
    for iteration in (1, 2):
        following.call("on_iteration", iteration, {"iteration": iteration})
    assert torch.equal(torch.get_rng_state(), before)
    following.call("on_trial_end", 2, "completed")
    assert notes == [FAILED]
    assert (folder / "journal.txt").read_text() == "halved_seed=7 1\nhalved_seed=7 2\ncompleted\n"


def start_ray(host: Host, log: Path, environment: dict[str, str], *words: str) -> None:
    """Start Ray on a host, in a folder where the package is not, and wait until it runs."""
    ray = str(Path(sys.executable).with_name("ray"))
    command = host.command(ray, "start", "--block", f"--node-ip-address={host.address}", *words)
    with log.open("w") as file:
        running = subprocess.Popen(
            command, env=environment, stdout=file, stderr=subprocess.STDOUT, cwd="/"
        )
    deadline = time.monotonic() + 240
    while "Ray runtime started" not in log.read_text():
        assert running.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)


def test_a_sweep_on_hosts_without_the_package(folder: Path, ray_session: None) -> None:
    """The rows are those of one process that has it, though the trial's was killed once."""
    expected = in_process_rows(folder)
    package = (folder / "my_package").rename(folder / "elsewhere")
    private, killing, temporary = folder / "private", folder / "killing", f"/tmp/own-{os.getpid()}"
    private.mkdir()
    # Not the Ray of this process.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}
    environment |= {"KILLING": str(killing), "RAY_USAGE_STATS_ENABLED": "0"}
    with network_hosts(2) as (first, second):
        address = f"{first.address}:6379"
        head = ("--head", "--port=6379", "--include-dashboard=false", "--num-cpus=0")
        start_ray(first, folder / "first.log", environment, *head, f"--temp-dir={temporary}")
        start_ray(
            *(second, folder / "second.log", environment),
            *(f"--address={address}", "--num-cpus=1"),
        )
        # What a host mounts is not seen on others: the package is on the first one alone, and
        # trials run on the second.
        sweep = (
            f"mount -t tmpfs none {private} && cp -r {package} {private}/my_package && "
            f"cp own.yaml {private} && cd {private} && exec {sys.executable} -c "
            f'"from sgrl.cli import main; main()" sweep own.yaml --results {folder} '
            f"--address {address}"
        )
        killing.touch()
        done = subprocess.run(
            first.command("sh", "-c", sweep), env=environment, capture_output=True, text=True
        )
    shutil.rmtree(temporary, ignore_errors=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not killing.exists()
    assert "on_iteration of my_package.following:Journal failed: RuntimeError: " in done.stdout
    trial = SweepFolder(folder / "own").trial("halved_seed=7")
    assert [measured(row) for row in read_metrics(trial.metrics)] == expected
    assert (trial.path / "journal.txt").read_text().splitlines() == [
        *(f"halved_seed=7 {i}" for i in (1, 2)),
        *("000002 HalvedPolicy", "halved_seed=7 3", "halved_seed=7 3", "halved_seed=7 4"),
        *("000004 HalvedPolicy", "halved_seed=7 5", "000005 HalvedPolicy", "completed"),
    ]
    [start] = read_starts(SweepFolder(folder / "own").provenance)
    assert set(start["parts"]) == {"my_package"}
    assert [each["parts"] for each in read_starts(trial.provenance)] == [start["parts"]] * 2
