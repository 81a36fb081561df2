"""Environments that are not ours: what is wrong in them is said in one line, with its place; their
seeds and their state."""

import os
import pickle
import random
import struct
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from typer.testing import CliRunner
from worker_server import driver

from sgrl.cli import app
from sgrl.envs.guard import EnvironmentFailed, flag_fault, observation_fault, reward_fault
from sgrl.envs.registry import make_single, make_vector, validate_env_config
from sgrl.envs.vector import VectorEnv
from sgrl.nn.registry import make_policy, save_policy
from sgrl.reinforce import Rollout
from sgrl.reinforce.rollout import EVALUATION_SEED_OFFSET, MAX_SEED
from sgrl.results import evaluation
from sgrl.results.folder import TrialFolder
from sgrl.results.rllib_metrics import metrics_row
from sgrl.rllib import APPOConfig, PPOConfig, ReinforceConfig, register_environment
from sgrl.tuning.trial import first_line, is_disk_full

HERE = Path(__file__).name
#: Where `Flawed` raises.
LINES = {
    words: number
    for number, line in enumerate(Path(__file__).read_text().splitlines(), 1)
    for words in ("no licence", "simulator crashed", "division", "exit")
    if f"# {words}" in line
}


class Flawed(gym.Env):
    """Goes wrong at the third step of an episode, or at its reset."""

    observation_space = gym.spaces.Box(-1, 1, (3,), np.float32)
    action_space: gym.Space = gym.spaces.Discrete(2)

    def __init__(self, flaw: str | None = None) -> None:
        self.flaw = flaw

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.steps = 0
        match self.flaw:
            case "raise in reset":
                raise OSError(28, "no licence")  # no licence
            case "old reset":
                return np.zeros(3, np.float32)
            case "nan at reset":
                return np.array([0, np.nan, 0], np.float32), {}
        return np.zeros(3, np.float32), {}

    def step(self, action: Any) -> Any:
        self.steps += 1
        observation: Any = np.zeros(3, np.float32)
        reward: Any = 1.0
        info: Any = {}
        truncated: Any = False
        match self.flaw if self.steps == 3 else None:
            case "raise":
                raise RuntimeError("simulator\n crashed")  # simulator crashed
            case "exit":
                sys.exit(3)  # exit
            case "raise without words":
                np.divide(1, 0, out=np.zeros(0), where=1 // 0)  # division
            case "nan reward":
                reward = np.float32(np.nan)
            case "infinite reward":
                reward = -np.inf
            case "great reward":
                reward = 1e39
            case "no reward":
                reward = None
            case "text reward":
                reward = "1"
            case "text array reward":
                reward = np.array("1")
            case "array reward":
                reward = np.ones(1)
            case "nan observation":
                observation[1] = np.nan
            case "no observation":
                observation = None
            case "short observation":
                observation = observation[:2]
            case "four":
                return observation, reward, False, {}
            case "no info":
                info = None
            case "no flag":
                truncated = None
            case "number flag":
                truncated = 1.0
            case "flags":
                truncated = np.zeros(3, bool)
        return observation, reward, False, truncated, info


class Drawing(gym.Env):
    """Draws from the process-wide generators in `step`."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (4,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.steps = 0
        return np.zeros(4, np.float32), {}

    def step(self, action: Any) -> Any:
        self.steps += 1
        drawn = [random.random(), np.random.random(), torch.rand(1).item(), 0]  # noqa: NPY002
        observation = np.array(drawn, np.float32)
        return observation, float(observation.sum()), self.steps == 6, False, {}


class Stateful(Drawing):
    """Draws from a generator of its own, too, that no reset touches; its episodes get longer."""

    def __init__(self) -> None:
        self.own = np.random.default_rng(0)
        self.episodes = 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        self.episodes += 1
        return super().reset(seed=seed)

    def step(self, action: Any) -> Any:
        observation, reward, *_ = super().step(action)
        observation[3] = self.own.random()
        return observation, reward, self.steps >= min(4 + self.episodes, 12), False, {}

    def get_state(self) -> Any:
        return {"own": self.own.bit_generator.state, "episodes": self.episodes}

    def set_state(self, state: Any) -> None:
        self.own.bit_generator.state, self.episodes = state["own"], state["episodes"]


class SignedSeed(Flawed):
    """Takes a seed as C's int."""

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        struct.pack("i", seed)
        observation, info = super().reset(seed=seed)
        observation[0] = np.float32(self.np_random.random())
        return observation, info


class Parts(Flawed):
    """Its observation is in parts."""

    observation_space: Any = gym.spaces.Dict(
        {"place": gym.spaces.Discrete(4), "view": gym.spaces.Tuple((Flawed.observation_space,) * 2)}
    )

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        view, info = super().reset(seed=seed)
        return {"place": np.int64(3), "view": (view, [0, 0, 0])}, info

    def step(self, action: Any) -> Any:
        view, *rest = super().step(action)
        place = 4 if self.flaw == "place" else 1
        if self.flaw == "missing":
            return {"place": place}, *rest
        return {"place": place, "view": (np.zeros(3), view)}, *rest


class Knob(Flawed):
    """Has a real action, which its observation repeats."""

    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)

    def step(self, action: Any) -> Any:
        return np.full(3, action[0], np.float32), 1.0, False, False, {}


class Robot(Drawing):
    """Its action is a choice and two numbers, of which it knows what it was given."""

    action_space = gym.spaces.Dict(
        {"gear": gym.spaces.Discrete(2), "turn": gym.spaces.Box(-1, 1, (2,), np.float32)}
    )

    def step(self, action: Any) -> Any:
        assert self.action_space.contains(action)
        observation, *rest = super().step(action)
        observation[1:] = action["gear"], *action["turn"]
        return observation, *rest


for _class in (Flawed, Stateful, Drawing, SignedSeed, Parts, Knob, Robot):
    gym.register(f"{_class.__name__}-v0", entry_point=_class, max_episode_steps=12)
    register_environment(f"{_class.__name__}-v0")

FLAWS = {
    "raise": f"RuntimeError: simulator crashed ({HERE}:{LINES['simulator crashed']}) at step 3",
    "exit": f"SystemExit: 3 ({HERE}:{LINES['exit']}) at step 3",
    "raise in reset": f"OSError: [Errno 28] no licence ({HERE}:{LINES['no licence']}) at the reset",
    "raise without words": "ZeroDivisionError: integer division or modulo by zero "
    f"({HERE}:{LINES['division']}) at step 3",
    "old reset": "reset returned an array of shape (3,), not (observation, info) at the reset",
    "nan at reset": "observation is NaN at the reset",
    "nan reward": "reward is NaN at step 3",
    "infinite reward": "reward is -inf at step 3",
    "great reward": "reward is 1e+39, too large for float32 at step 3",
    "no reward": "reward is None, not a number at step 3",
    "text reward": "reward is '1', not a number at step 3",
    "text array reward": "reward is an array of shape (), not a number at step 3",
    "array reward": "reward is an array of shape (1,), not a number at step 3",
    "nan observation": "observation is NaN at step 3",
    "no observation": "observation is None, not of its space Box(-1.0, 1.0, (3,), float32) at "
    "step 3",
    "short observation": "observation is an array of shape (2,), not of its space Box(-1.0, 1.0, "
    "(3,), float32) at step 3",
    "four": "step returned a tuple of 4, not (observation, reward, terminated, truncated, info) at "
    "step 3",
    "no info": "info is None, not a dict at step 3",
    "no flag": "terminated or truncated is None, not a bool at step 3",
    "number flag": "terminated or truncated is 1.0, not a bool at step 3",
    "flags": "terminated or truncated is an array of shape (3,), not a bool at step 3",
}


def rollout(env: VectorEnv, seed: int = 0) -> Rollout:
    actions = env.action_space
    size = int(actions.n) if isinstance(actions, gym.spaces.Discrete) else None
    assert size is not None
    return Rollout(env, make_policy("mlp", env.observation_size, size, hidden_size=4), seed)


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are named from the current folder."""
    monkeypatch.chdir(Path(__file__).parent)


@pytest.mark.parametrize("flaw", FLAWS)
def test_a_flaw_is_found_where_it_arises(flaw: str) -> None:
    env = make_vector("Flawed-v0", 2, {"flaw": flaw})
    with pytest.raises(EnvironmentFailed) as caught:
        rollout(env, seed=5).collect()
    seed = env.envs[0].get_wrapper_attr("_seed")  # type: ignore[attr-defined]
    assert str(caught.value) == f"{FLAWS[flaw]} of environment 0 (its seed is {seed})"
    assert seed < 2**31
    # Both the user's exception and what a full disk means survive.
    assert (caught.value.__cause__ is not None) == flaw.startswith(("raise", "exit"))
    assert is_disk_full(caught.value) == (flaw == "raise in reset")
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


@pytest.mark.parametrize(
    ("observation", "space"),
    [
        ([300, 1], gym.spaces.Box(0, 255, (2,), np.uint8)),
        (2**70, gym.spaces.Discrete(3)),
        ([-1, 1], gym.spaces.MultiBinary(2)),
    ],
)
def test_numbers_that_their_type_cannot_hold(observation: Any, space: gym.Space) -> None:
    fault = observation_fault(observation, space)
    assert fault is not None
    assert fault.endswith(f", not of its space {space}")


def test_a_reward_beyond_all_floats() -> None:
    assert reward_fault(10**400) == f"reward is {10**400}, not a number"


def test_numbers_and_flags_of_other_libraries() -> None:
    for number in (True, 2, np.int8(1), np.float32(1), np.bool_(True), np.array(1.0)):
        assert reward_fault(number) is None
    assert reward_fault(torch.tensor(1.0)) is None
    for flag in (True, 0, 1, np.bool_(True), np.int64(0), np.array(True), torch.tensor(False)):
        assert flag_fault(flag) is None
    for flag in (None, "", 2, np.float32(1), [], [True]):
        assert flag_fault(flag) is not None


def test_what_ends_the_process_is_not_the_environments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C, and Ray's answer to SIGTERM."""
    env = make_vector("Flawed-v0", 1)

    def interrupt(self: Any, action: Any) -> Any:
        raise KeyboardInterrupt

    def sigterm_handler(self: Any, action: Any) -> Any:  # named as Ray's
        sys.exit(1)

    for step, kind in ((interrupt, KeyboardInterrupt), (sigterm_handler, SystemExit)):
        monkeypatch.setattr(Flawed, "step", step)
        env.reset([0])
        with pytest.raises(kind):
            env.step(np.zeros(1, np.int64))


def test_an_exit_outside_of_an_episode(monkeypatch: pytest.MonkeyPatch) -> None:
    def leave(self: Any, *args: Any) -> Any:
        sys.exit(3)

    env = make_vector("Stateful-v0", 1)
    monkeypatch.setattr(Stateful, "get_state", leave)
    monkeypatch.setattr(Stateful, "set_state", leave)
    monkeypatch.setattr(Stateful, "close", leave)
    with pytest.raises(EnvironmentFailed, match=r"^get_state failed: SystemExit: 3 \("):
        env.get_state()
    with pytest.raises(EnvironmentFailed, match=r"^set_state failed: SystemExit: 3 \("):
        env.set_state([3])
    with pytest.raises(EnvironmentFailed, match=r"^close failed: SystemExit: 3 \("):
        env.envs[0].close()  # type: ignore[attr-defined]
    monkeypatch.setattr(Stateful, "__init__", leave)
    with pytest.raises(ValueError, match=r"cannot be built: SystemExit: 3 \("):
        make_single("Stateful-v0", {"episode_length": 5})


def test_environments_made_to_play_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[int] = []
    monkeypatch.setattr(Flawed, "close", lambda self: closed.append(getattr(self, "steps", 0)))
    monkeypatch.setattr(evaluation, "EVALUATION_BATCH", 2)
    policy = make_policy("mlp", 3, 2, hidden_size=4)
    played = evaluation.play(policy, {"env": "Flawed-v0"}, episodes=3, seed=0)
    assert played.lengths.tolist() == [12] * 3
    assert closed[-3:] == [12] * 3  # one more may have been made to look at its spaces

    def fail(self: Any) -> None:
        raise RuntimeError("window is gone")

    monkeypatch.setattr(Flawed, "close", fail)
    with pytest.raises(EnvironmentFailed, match=r"^close failed: RuntimeError: window is gone"):
        evaluation.play(policy, {"env": "Flawed-v0"}, episodes=1, seed=0)


def test_the_environment_is_named_by_its_number() -> None:
    env = make_vector("Flawed-v0", 3)
    env.reset([0, 1, 2])
    env.envs[2].unwrapped.flaw = "four"  # type: ignore[attr-defined]
    for _ in range(2):
        env.step(np.zeros(3, np.int64))
    with pytest.raises(EnvironmentFailed, match=r"at step 3 of environment 2 \(its seed is 2\)$"):
        env.step(np.zeros(3, np.int64))


@pytest.mark.parametrize(
    ("flaw", "words"),
    [
        (None, None),
        ("nan observation", "observation['view'][1] is NaN at step 3"),
        ("place", "observation['place'] is 4, not of its space Discrete(4) at step 1"),
        ("missing", "observation is {'place': 1}, not of its space Dict("),
    ],
)
def test_observations_in_parts(flaw: str | None, words: str | None) -> None:
    env = make_vector("Parts-v0", 1, {"flaw": flaw})
    if words is None:
        assert rollout(env).collect().lengths.tolist() == [12]
        return
    with pytest.raises(EnvironmentFailed) as caught:
        rollout(env).collect()
    assert str(caught.value).startswith(words)


def test_an_action_that_is_no_number_is_the_policys_fault() -> None:
    """A policy that diverged is not to be taken for a broken environment."""
    single = make_single("Knob-v0")
    single.reset(seed=0)
    with pytest.raises(FloatingPointError, match=r"action is \[nan\] at step 1 of environment 0"):
        single.step(np.array([np.nan], np.float32))


class Numbers(VectorEnv):
    """Vectorised, and so without a guard: observations and rewards from arrays [T, B]."""

    num_envs, episode_length, observation_size, num_actions = 2, 5, 1, 2

    def __init__(self, observations: Any, rewards: Any) -> None:
        self.observations, self.rewards = np.float32(observations), np.float32(rewards)

    def reset(self, seeds: Any) -> Any:
        self.steps = 0
        return self.observations[0][:, None]

    def step(self, actions: Any) -> Any:
        from sgrl.envs.vector import StepResult

        rewards = self.rewards[self.steps]
        self.steps += 1
        ended = np.full(2, self.steps == 5)
        current = self.observations[min(self.steps, 4)][:, None]
        return StepResult(current, rewards, np.zeros(2, bool), ended, np.zeros(2, bool))


def test_the_first_bad_number_of_a_batch_is_named() -> None:
    zeros = np.zeros((5, 2))
    bad = zeros.copy()
    bad[2, 1] = np.inf
    with pytest.raises(EnvironmentFailed, match=r"^reward is inf at step 3 of environment 1$"):
        rollout(Numbers(zeros, bad)).collect()
    with pytest.raises(EnvironmentFailed, match=r"^observation is inf at step 2 of environment 1$"):
        rollout(Numbers(bad, bad)).collect()
    with pytest.raises(EnvironmentFailed, match=r"^observation is NaN at step 0 of environment 0$"):
        rollout(Numbers(bad * np.nan, bad)).collect()
    assert rollout(Numbers(zeros, zeros)).collect().rewards.sum() == 0


def reinforce(env: str, **env_config: Any) -> ReinforceConfig:
    return (
        ReinforceConfig()
        .environment(env, env_config=env_config)
        .env_runners(num_env_runners=0, num_envs_per_env_runner=2)
        .rl_module(model_config={"policy": "gru", "hidden_size": 4})
        .debugging(seed=5)
    )


def ppo(env: str, **env_config: Any) -> PPOConfig:
    return (
        PPOConfig()
        .environment(env, env_config=env_config)
        .env_runners(num_env_runners=0, num_envs_per_env_runner=2, batch_mode="complete_episodes")
        .training(train_batch_size_per_learner=26, minibatch_size=13, num_epochs=1)
        .rl_module(model_config={"policy": "gru", "hidden_size": 4})
        .debugging(seed=5)
    )


def appo(env: str, **env_config: Any) -> APPOConfig:
    return (
        APPOConfig()
        .environment(env, env_config=env_config)
        .env_runners(num_env_runners=0, num_envs_per_env_runner=2, rollout_fragment_length=12)
        .learners(num_learners=0)
        .training(train_batch_size_per_learner=24)
        .rl_module(model_config={"policy": "gru", "hidden_size": 4})
        .debugging(seed=5)
    )


@pytest.mark.usefixtures("ray_session")
@pytest.mark.filterwarnings("ignore:.*Overriding environment rllib-:UserWarning")
class TestUnderRay:
    @pytest.mark.parametrize("config", [reinforce, ppo, appo])
    @pytest.mark.parametrize("flaw", ["raise", "nan reward"])
    def test_an_algorithm_raises_what_the_environment_did(self, config: Any, flaw: str) -> None:
        algorithm = config("Flawed-v0", flaw=flaw).build_algo()
        with pytest.raises(EnvironmentFailed) as caught:
            algorithm.train()
        algorithm.stop()
        assert str(caught.value).startswith(f"{FLAWS[flaw]} of environment 0 (its seed is ")
        chain = [caught.value, caught.value.__cause__]
        assert [type(link) for link in chain if link is not None][1:] == (
            [RuntimeError] if flaw == "raise" else []
        )
        assert not is_disk_full(caught.value)

    @pytest.mark.parametrize("config", [reinforce, ppo])
    def test_so_does_one_of_another_process(self, config: Any) -> None:
        register_environment("Pendulum-v1")
        algorithm = config("Pendulum-v1", g="heavy").env_runners(num_env_runners=1).build_algo()
        with pytest.raises(EnvironmentFailed) as caught:
            algorithm.train()
        algorithm.stop()
        wrong = "TypeError: unsupported operand type(s) for /: 'str' and 'float'"
        line = first_line(caught.value)
        assert line.startswith(f"EnvironmentFailed: {wrong} at step 1 of environment 0 (its seed")
        # The other process's traceback.
        assert "pendulum.py" in "".join(traceback.format_exception(caught.value))

    @pytest.mark.parametrize("config", [reinforce, ppo])
    @pytest.mark.parametrize("env", ["Drawing-v0", "Stateful-v0", "Robot-v0"])
    def test_restored_it_goes_on_exactly(self, config: Any, env: str, tmp_path: Path) -> None:
        algorithm = config(env).build_algo()
        rows = []
        for iteration in range(1, 5):
            rows.append(metrics_row(algorithm.train(), iteration, 0.0))
            if iteration == 2:
                algorithm.save_to_path(tmp_path)
        algorithm.stop()
        random.seed(1)
        np.random.seed(1)  # noqa: NPY002
        torch.manual_seed(1)
        restored = type(algorithm).from_checkpoint(tmp_path)
        for iteration in (3, 4):
            row = metrics_row(restored.train(), iteration, 0.0)
            np.testing.assert_equal(row, rows[iteration - 1])
        restored.stop()


@pytest.mark.parametrize("env", ["Drawing-v0", "Stateful-v0"])
def test_a_rollout_goes_on_exactly(env: str) -> None:
    first = rollout(make_vector(env, 2))
    first.collect()
    state = pickle.loads(pickle.dumps(first.get_state()))
    expected = [first.collect() for _ in range(2)]
    torch.manual_seed(7)
    second = rollout(make_vector(env, 2))
    second.policy = first.policy
    for _ in range(2):  # from another state, and again from the same one
        second.set_state(state)
        for batch in expected:
            for name, value in second.collect().tensors().items():
                assert torch.equal(value, batch.tensors()[name]), name


def test_a_state_that_fails_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    env = make_vector("Stateful-v0", 1)
    with pytest.raises(EnvironmentFailed, match=r"^set_state failed: TypeError: .*\.py:\d+\)$"):
        env.set_state([3])
    monkeypatch.setattr(Stateful, "get_state", lambda self: 1 // 0)
    with pytest.raises(EnvironmentFailed, match=r"^get_state failed: ZeroDivisionError: "):
        env.get_state()


def test_mujoco_and_popgym_mean_other_things_by_a_state() -> None:
    assert make_vector("popgym-BattleshipEasy-v0", 1).get_state() is None


def seeds_seen(monkeypatch: pytest.MonkeyPatch, env: str) -> list[int]:
    kind = type(gym.make(env).unwrapped)
    seen: list[int] = []
    reset = kind.reset

    def spy(self: Any, *, seed: int | None = None, options: Any = None) -> Any:
        assert seed is not None
        seen.append(seed)
        return reset(self, seed=seed, options=options)

    monkeypatch.setattr(kind, "reset", spy)
    return seen


def test_seeds_fit_a_signed_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of training and evaluation, by whatever run; small ones are what they were."""
    seen = seeds_seen(monkeypatch, "SignedSeed-v0")
    env = make_vector("SignedSeed-v0", 3)
    for seed in (0, 1, 2, MAX_SEED - 1, EVALUATION_SEED_OFFSET, EVALUATION_SEED_OFFSET + 1):
        rollout(env, seed=seed).collect()
    assert seen[:3] == [0, 1, 2]
    assert len(set(seen)) == len(seen) == 18
    single = make_single("SignedSeed-v0")
    for seed in (2**31 - 1, 2**31, 2**32 - 1):
        single.reset(seed=seed)
    assert seen[18] == 2**31 - 1
    for _ in range(20):  # about half of what it draws is larger
        single.reset()
    assert max(seen) < 2**31


def test_the_seeds_of_popgym_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = seeds_seen(monkeypatch, "popgym-RepeatPreviousEasy-v0")
    make_vector("popgym-RepeatPreviousEasy-v0", 1, {"vectorized": False}).reset([3 * 2**31])
    make_vector("popgym-RepeatPreviousEasy-v0", 1, {"vectorized": False}).reset([3 * 2**30])
    assert seen == [int(np.random.SeedSequence(3 * 2**31).generate_state(1)[0]), 3 * 2**30]


def test_evaluate_says_it_in_one_line(tmp_path: Path) -> None:
    policy = make_policy("mlp", 3, 2, hidden_size=4)
    for flaw in ("raise", "exit", "nan reward"):
        environment = {"env": "Flawed-v0", "env_config": {"flaw": flaw}}
        save_policy(policy, tmp_path, environment=environment)
        result = CliRunner().invoke(app, ["evaluate", str(tmp_path), "--episodes", "2"])
        assert result.exit_code == 2
        (line,) = result.output.splitlines()
        assert line.startswith(f"sgrl: {FLAWS[flaw]} of environment 0")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, not yet on Python's path; modules made in it are forgotten again."""
    path, modules = sys.path[:], set(sys.modules)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.path[:] = path
    gym.registry.pop("Mine-v0", None)
    for name in set(sys.modules) - modules:
        del sys.modules[name]


MODULE = """
import gymnasium as gym
gym.register("Mine-v0", entry_point="gymnasium.envs.classic_control:CartPoleEnv",
             max_episode_steps=7)
"""


def test_a_module_of_the_current_folder_is_found(folder: Path) -> None:
    (folder / "my_envs.py").write_text(MODULE)
    assert validate_env_config("my_envs:Mine-v0")["episode_length"] == 7
    with pytest.raises(ValueError, match=r"did you mean 'my_envs:Mine-v0'"):
        validate_env_config("my_envs:Mine-v1")
    (folder / "empty_envs.py").touch()
    for env, words in (
        (
            "empty_envs:Mine-v2",
            "unknown environment 'empty_envs:Mine-v2': the module empty_envs registers no Mine-v2$",
        ),
        (":Mine-v0", "unknown environment ':Mine-v0'; did you mean 'Mine-v0'\\? "),
    ):
        with pytest.raises(ValueError, match=f"^{words}") as caught:
            validate_env_config(env)
        assert "CartPole" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "no module named 'their_envs': it is neither installed nor in the current folder"),
        (
            "import gymnasium\nimport no_such_simulator\n",
            "the module their_envs fails: ModuleNotFoundError: No module named "
            "'no_such_simulator' (their_envs.py:2)",
        ),
        (
            "x = 1\ndef f(:\n",
            "the module their_envs fails: SyntaxError: invalid syntax (their_envs.py:2)",
        ),
        (
            "\n\nraise SystemExit('bye')\n",
            "the module their_envs fails: SystemExit: bye (their_envs.py:3)",
        ),
    ],
)
def test_a_modules_own_error_is_one_clear_line(folder: Path, text: str, words: str) -> None:
    if text is not None:
        (folder / "their_envs.py").write_text(text)
    with pytest.raises(ValueError, match=r"^their_envs:Mine-v0: ") as caught:
        validate_env_config("their_envs:Mine-v0")
    assert str(caught.value) == f"their_envs:Mine-v0: {words}"


SWEEP = """
name: mine
config:
  environment: {env: "my_envs:Breaks-v0", env_config: {flaw: {grid: [raise, nan]}}}
  env_runners: {num_envs_per_env_runner: 2}
methods:
  gru: {model: {policy: gru, hidden_size: 4}}
stop: {training_iteration: 2}
concurrency: 1
"""
BREAKS = """
import gymnasium as gym
from gymnasium.envs.classic_control import CartPoleEnv

class Breaks(CartPoleEnv):
    def __init__(self, flaw):
        super().__init__()
        self.flaw = flaw

    def step(self, action):
        observation, reward, *rest = super().step(action)
        if self.flaw == "raise":
            raise RuntimeError("simulator crashed")
        return observation, float("nan"), *rest

gym.register("Breaks-v0", entry_point=Breaks, max_episode_steps=7)
"""


def test_a_sweep_whose_environment_breaks(tmp_path: Path, ray_session: None) -> None:
    """Of a module in the current folder; the failure is the environment's, not a divergence."""
    (tmp_path / "my_envs.py").write_text(BREAKS)
    (tmp_path / "mine.yaml").write_text(SWEEP)
    # With -P the current folder is not on Python's path, as under the command itself.
    python, *code = driver("from sgrl.cli import main; main()")
    done = subprocess.run(
        [python, "-P", *code, "sweep", "mine.yaml"],
        cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if not k.startswith("RAY_ADDRESS")},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    crash = "RuntimeError: simulator crashed (my_envs.py:13) at step 1 of environment 0"
    for flaw, line in (("raise", crash), ("nan", "reward is NaN at step 1 of environment 0")):
        trial = tmp_path / "results" / "mine" / f"gru_flaw={flaw}_seed=0"
        status = TrialFolder(trial).read_status()
        assert (status["state"], status.get("diverged")) == ("failed", None)
        assert status["reason"] == (
            f"EnvironmentFailed: {line} (its seed is 0) "
            "(again, after iteration 0; error.txt says where)"
        )
        assert f"gru_flaw={flaw}_seed=0 is started again after EnvironmentFailed: " in done.stdout
        whole = (trial / "error.txt").read_text()
        assert ('raise RuntimeError("simulator crashed")' in whole) == (flaw == "raise")
