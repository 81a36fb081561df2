"""docs/extending.md: its code runs, and what it adds is taken up by the contract tests."""

import re
import textwrap
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import test_policies
import torch
import yaml

from sgrl.envs.registry import make_vector
from sgrl.nn import POLICIES, SyntheticGradient
from sgrl.nn.mixing import split_parameters
from sgrl.nn.registry import make_policy
from sgrl.reinforce import Rollout, train
from sgrl.tuning.experiment.load import load_experiment

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "extending.md").read_text()


def blocks(language: str) -> list[str]:
    found = re.findall(rf"^ *```{language}\n(.*?)^ *```", TEXT, flags=re.DOTALL | re.MULTILINE)
    return [textwrap.dedent(code) for code in found]


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the page's Python leaves behind; its policy is registered for one test."""
    monkeypatch.setitem(POLICIES, "block_mlp", None)  # put back afterwards
    monkeypatch.delitem(gym.registry, "Growing-v0", raising=False)
    names: dict[str, Any] = {}
    code = blocks("python")
    assert len(code) >= 4
    for block in code:
        exec(compile(block, "docs/extending.md", "exec"), names)
    assert POLICIES["block_mlp"] is names["BlockMLPPolicy"]
    return names


def test_the_policy_passes_the_contract(registered: dict, tmp_path: Path) -> None:
    assert registered["predictor"][0].any()  # the first piece has trained its predictor
    for value_head in (False, True):
        test_policies.test_steps_equal_the_unroll("block_mlp", value_head)
    test_policies.test_the_seed_decides_everything("block_mlp")
    for dtype in (torch.float32, torch.float64):
        test_policies.test_saved_and_loaded("block_mlp", dtype, tmp_path)
    with pytest.raises(ValueError, match="hidden_size must be a multiple of 3"):
        make_policy("block_mlp", 5, 3, neuron_size=3)


def test_the_policy_trains(registered: dict) -> None:
    env = make_vector("labyrinth_escape", 2, {"episode_length": 6})
    policy = make_policy("block_mlp", env.observation_size, env.num_actions, neuron_size=4)
    assert isinstance(policy.block, SyntheticGradient)
    for _ in train(policy, env, iterations=2):
        pass
    assert all(parameter.any() for parameter in split_parameters(policy)[1])
    assert (policy.block.mixing_weight < 1).any()


def test_the_environment_resumes_exactly(registered: dict) -> None:
    rollouts = []
    for _ in range(2):
        env = make_vector("Growing-v0", 2)
        policy = make_policy("mlp", env.observation_size, env.num_actions)
        rollouts.append(Rollout(env, policy, seed=0))
    first, second = rollouts
    first.collect()
    second.set_state(first.get_state())
    batches = [rollout.collect() for rollout in rollouts]
    assert batches[0].lengths.tolist() == [3, 3]
    for name, value in batches[0].tensors().items():
        assert torch.equal(value, batches[1].tensors()[name]), name


def test_the_experiment_is_valid(registered: dict, tmp_path: Path) -> None:
    (methods,) = blocks("yaml")
    path = tmp_path / "block.yaml"
    path.write_text(methods + "\n" + without_methods())
    names = {trial.name.partition("_seed")[0] for trial in load_experiment(path).trials}
    assert names == set(yaml.safe_load(methods)["methods"])


def without_methods() -> str:
    experiment = yaml.safe_load((ROOT / "tune_configs" / "quickstart.yaml").read_text())
    del experiment["methods"]
    return yaml.safe_dump(experiment)


def test_its_links_lead_somewhere() -> None:
    links = set(re.findall(r"\]\(([^)#:]+)\)", TEXT))
    assert len(links) >= 8
    for link in links:
        assert (ROOT / "docs" / link).exists(), link
