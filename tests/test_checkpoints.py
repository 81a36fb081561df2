"""Checkpoints: damaged ones are noticed and never used; policies are evaluated from whole ones."""

import json
import shutil
import subprocess
import sys

import pytest
import torch

from sgrl.envs.registry import make_vector
from sgrl.nn.registry import make_policy, save_policy
from sgrl.reinforce.rollout import EVALUATION_SEED_OFFSET, Rollout
from sgrl.results.checkpoints import (
    MANIFEST,
    CheckpointError,
    discard_after,
    list_checkpoints,
    newest_valid_checkpoint,
    verify,
    write_checkpoint,
)
from sgrl.results.evaluation import evaluate

FILES = {"state.pkl": b"state" * 50, "learner/state.pkl": b"learner" * 30, "empty.json": b""}


def save(iteration):
    def write(directory):
        for name, content in FILES.items():
            path = directory / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content + (str(iteration).encode() if content else b""))

    return write


@pytest.fixture
def folder(tmp_path):
    """Two checkpoints, 000010 and 000020."""
    for iteration in (10, 20):
        write_checkpoint(tmp_path / "checkpoints", iteration, save(iteration), keep=2)
    return tmp_path / "checkpoints"


def names(folder):
    return [path.name for path in list_checkpoints(folder)]


def test_rotation_keeps_the_newest(tmp_path):
    for iteration in (5, 10, 1000000, 1000005):
        write_checkpoint(tmp_path, iteration, save(iteration), keep=2)
    assert names(tmp_path) == ["1000000", "1000005"]
    assert newest_valid_checkpoint(tmp_path) == (tmp_path / "1000005", [])
    assert newest_valid_checkpoint(tmp_path, at_most=1000004) == (tmp_path / "1000000", [])
    assert newest_valid_checkpoint(tmp_path / "none") == (None, [])


def assert_falls_back(folder, complaint):
    found, problems = newest_valid_checkpoint(folder)
    assert found == folder / "000010"
    assert len(problems) == 1
    assert "000020" in problems[0]
    assert complaint in problems[0]
    assert "\n" not in problems[0]
    with pytest.raises(CheckpointError):
        verify(folder / "000020")


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_a_missing_file_is_noticed(folder, name):
    (folder / "000020" / name).unlink()
    assert_falls_back(folder, name)


@pytest.mark.parametrize("name", ["state.pkl", "learner/state.pkl", MANIFEST])
def test_a_truncated_file_is_noticed_wherever_it_ends(folder, name):
    path = folder / "000020" / name
    content = path.read_bytes()
    for size in {0, 1, 2, len(content) // 3, len(content) // 2, len(content) - 2, len(content) - 1}:
        path.write_bytes(content[:size])
        assert_falls_back(folder, name)
    path.write_bytes(content)
    verify(folder / "000020")


@pytest.mark.parametrize("name", ["state.pkl", "learner/state.pkl"])
def test_one_changed_or_added_byte_is_noticed(folder, name):
    path = folder / "000020" / name
    content = path.read_bytes()
    for place in range(0, len(content), 17):
        changed = bytearray(content)
        changed[place] ^= 1
        path.write_bytes(bytes(changed))
        assert_falls_back(folder, name)
    path.write_bytes(content + b"\n")
    assert_falls_back(folder, name)


def edit(change):
    def apply(manifest):
        change(manifest)
        return manifest

    return apply


@pytest.mark.parametrize(
    "change",
    [
        edit(lambda m: m.update(iteration=21)),
        edit(lambda m: m["files"].pop("state.pkl")),
        edit(lambda m: m["files"].update(more={"size": 1, "sha256": ""})),
        edit(lambda m: m["files"]["state.pkl"].update(size=1)),
        edit(lambda m: m["files"]["state.pkl"].update(sha256="0" * 64)),
        edit(lambda m: m["files"]["state.pkl"].pop("sha256")),
        edit(lambda m: m.update(files={})),
        edit(lambda m: m.update(files=[])),
        lambda _: [],
        lambda _: None,
    ],
)
def test_an_edited_manifest_is_noticed(folder, change):
    path = folder / "000020" / MANIFEST
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    assert_falls_back(folder, "000020")


def test_an_added_file_is_noticed_and_a_hidden_one_is_not(folder):
    (folder / "000020" / ".DS_Store").write_text("")
    verify(folder / "000020")
    (folder / "000020" / "more.pkl").write_text("")
    assert_falls_back(folder, "more.pkl")


def test_no_whole_checkpoint_left(folder):
    for path in list_checkpoints(folder):
        (path / "state.pkl").write_bytes(b"")
    found, problems = newest_valid_checkpoint(folder)
    assert found is None
    assert len(problems) == 2


def test_a_save_that_dies_leaves_what_was_there(folder):
    def die(directory):
        save(30)(directory)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(folder, 30, die, keep=2)
    assert names(folder) == ["000010", "000020"]
    discard_after(folder, 10)
    assert sorted(path.name for path in folder.iterdir()) == ["000010"]
    # A damaged one is written anew.
    (folder / "000010" / "state.pkl").unlink()
    write_checkpoint(folder, 10, save(10), keep=1)
    verify(folder / "000010")


ENV_CONFIG = {"maze_dims": [6, 6], "episode_length": 12}


def save_small_policy(directory, name="sparsenet"):
    sizes = {"num_neurons": 12, "neuron_size": 2, "num_parents": 2, "num_slots": 2}
    settings = {"num_input_neurons": 4, **sizes} if name == "sparsenet" else {"hidden_size": 8}
    vector = make_vector("labyrinth_escape", 1, ENV_CONFIG)
    policy = make_policy(name, vector.observation_size, vector.num_actions, seed=3, **settings)
    environment = {"env": "labyrinth_escape", "env_config": ENV_CONFIG}
    save_policy(policy, directory, environment=environment)
    return policy


def test_evaluation_rolls_out_the_saved_policy(tmp_path):
    policies = []
    for iteration in (10, 20):
        write_checkpoint(
            tmp_path, iteration, lambda d: policies.append(save_small_policy(d)), keep=2
        )
    found = evaluate(tmp_path / "000020", episodes=7, seed=5)
    vector = make_vector("labyrinth_escape", 7, ENV_CONFIG)
    batch = Rollout(vector, policies[-1], seed=EVALUATION_SEED_OFFSET + 5).collect()
    assert {name: value for name, value in found.items() if name[-4:] not in ("_low", "high")} == {
        "episodes": 7,
        "success_rate": batch.success.double().mean().item(),
        "episode_return_mean": batch.rewards.double().sum(0).mean().item(),
        "episode_length_mean": batch.lengths.double().mean().item(),
    }
    # More episodes than one batch holds, and a checkpoint that was moved elsewhere.
    shutil.copytree(tmp_path / "000020", tmp_path / "best")
    many = evaluate(tmp_path / "best", episodes=130, seed=5)
    assert many["episodes"] == 130
    assert many == evaluate(tmp_path / "000020", episodes=130, seed=5)

    weights = tmp_path / "000020" / "policy.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"safetensors is truncated.*whole one is.*000010"):
        evaluate(tmp_path / "000020")
    (tmp_path / "000020" / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match=r"000020.*manifest"):
        evaluate(tmp_path / "000020")


def test_evaluation_refuses_what_is_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="is no checkpoint"):
        evaluate(tmp_path / "none")
    with pytest.raises(CheckpointError, match="is no checkpoint"):
        evaluate(tmp_path)
    write_checkpoint(tmp_path, 10, save(10), keep=1)
    with pytest.raises(CheckpointError, match="holds no policy"):
        evaluate(tmp_path / "000010")
    with pytest.raises(ValueError, match="at least 1"):
        evaluate(tmp_path / "000010", episodes=0)


def test_evaluation_needs_neither_ray_nor_pickle(tmp_path):
    save_small_policy(tmp_path, "gru")
    code = (
        "import sys, pickle; pickle.load = pickle.loads = None\n"
        "from sgrl.results.evaluation import evaluate\n"
        f"print(evaluate({str(tmp_path)!r}, 3))\n"
        "assert not any(name.split('.')[0] == 'ray' for name in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
