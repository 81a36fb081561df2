"""POPGym's and gymnasium's environments by id, against those packages' own."""

import random
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import popgym.wrappers
import pytest
import torch
import tree

from sgrl.envs.by_id import POPGYM_IDS
from sgrl.envs.registry import make_single, make_vector, observation_shape, validate_env_config
from sgrl.envs.wrappers import seed_of_32_bits
from sgrl.nn.registry import make_policy, save_policy
from sgrl.reinforce import Rollout, action_space_of
from sgrl.results.checkpoints import CheckpointError
from sgrl.results.evaluation import evaluate


class ManySpaces(gym.Env):
    """Observes all kinds of spaces; its Discrete actions do not start at 0."""

    observation_space = gym.spaces.Dict(
        {
            "box": gym.spaces.Box(-1, 1, (2, 2), np.float32),
            "pair": gym.spaces.Tuple((gym.spaces.Discrete(3), gym.spaces.MultiDiscrete([2, 3]))),
        }
    )
    action_space: gym.Space = gym.spaces.Discrete(3, start=5)
    taken: ClassVar[list[Any]] = []

    def __init__(self, colour: str = "red") -> None:
        self.colour = colour

    def _observe(self) -> dict[str, Any]:
        box = self.np_random.uniform(-1, 1, (2, 2)).astype(np.float32)
        return {"box": box, "pair": (2, np.array([1, 0]))}

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        random.seed(seed)
        return self._observe(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        assert self.action_space.contains(action)
        self.taken.append(action)
        total = sum(np.sum(part) for part in tree.flatten(action))
        return self._observe(), float(total), False, False, {}


class Grid(ManySpaces):
    action_space = gym.spaces.MultiDiscrete([[2, 3], [4, 5]], start=[[1, 1], [1, 1]])


class Switches(ManySpaces):
    action_space = gym.spaces.MultiBinary(3)


class Levers(ManySpaces):
    action_space = gym.spaces.Box(-0.5, 0.25, (2, 1), np.float64)


class Panel(ManySpaces):
    """Choices alone, in parts."""

    action_space = gym.spaces.Tuple(
        (
            gym.spaces.Discrete(3, start=1),
            gym.spaces.Dict({"on": Switches.action_space, "at": Grid.action_space}),
        )
    )


class Joints(ManySpaces):
    """Numbers alone, in parts."""

    action_space = gym.spaces.Dict(
        {"arm": Levers.action_space, "leg": gym.spaces.Box(-1, 1, (), np.float32)}
    )


class Robot(ManySpaces):
    """Both."""

    action_space = gym.spaces.Tuple((Joints.action_space, Panel.action_space))


class Spoken(ManySpaces):
    action_space = gym.spaces.Tuple((gym.spaces.Discrete(2), gym.spaces.Text(4)))


class Words(ManySpaces):
    observation_space = gym.spaces.Sequence(gym.spaces.Discrete(2))  # type: ignore[assignment]


class Whole(ManySpaces):
    action_space = gym.spaces.Box(0, 9, (2,), np.int64)


for _class in (ManySpaces, Grid, Switches, Levers, Panel, Joints, Robot, Spoken, Words, Whole):
    gym.register(f"sgrl-test/{_class.__name__}-v0", entry_point=_class)


def popgym_episode(env: gym.Env, seed: int, actions: list[Any]) -> list[tuple]:
    observation, _ = env.reset(seed=seed)
    steps = [(observation, 0.0, False, False)]
    for action in actions:
        steps.append(env.step(action)[:4])
        if steps[-1][2] or steps[-1][3]:
            break
    return steps


# One for each kind of observation and action; concentration has hundreds of inputs.
@pytest.mark.parametrize(
    "env",
    [
        "popgym-AutoencodeEasy-v0",
        "popgym-BattleshipEasy-v0",
        "popgym-ConcentrationEasy-v0",
        "popgym-CountRecallHard-v0",
        "popgym-NoisyPositionOnlyPendulumEasy-v0",
        "popgym-LabyrinthExploreEasy-v0",
    ],
)
def test_popgym_environments_equal_their_own(env: str) -> None:
    """With popgym's own wrappers, whatever was played before."""
    vector = make_vector(env, 2, {"previous_action": True})
    own = popgym.wrappers.Flatten(
        popgym.wrappers.PreviousAction(gym.make(env, disable_env_checker=True).unwrapped),
        flatten_action=False,
    )
    own.action_space.seed(0)
    length = min(vector.episode_length, 120)
    for seed in (0, 9):
        actions = [own.action_space.sample() for _ in range(length)]
        expected = popgym_episode(own, seed, actions)
        current = vector.reset([seed, seed + 1])
        zeros = np.zeros(2, np.float32)
        steps = [(current, zeros, zeros, zeros)]
        steps += [vector.step(np.stack([action, action])) for action in actions]
        for t, (observation, reward, terminated, truncated) in enumerate(expected):
            np.testing.assert_array_equal(steps[t][0][0], observation.astype(np.float32))
            assert steps[t][1][0] == np.float32(reward)
            assert steps[t][2][0] == terminated
            # Ours also says so at the last step there is.
            assert steps[t][3][0] == (truncated or t == vector.episode_length)


def test_observations_of_any_kind_become_flat() -> None:
    env = "sgrl-test/ManySpaces-v0"
    single = make_single(env, {"episode_length": 4, "previous_action": True})
    assert single.observation_space.shape == (4 + 3 + 5 + 3,)
    assert single.action_space == gym.spaces.Discrete(3)
    observation, _ = single.reset(seed=3)
    assert observation[4:].tolist() == [0, 0, 1, 0, 1, 1, 0, 0, 1, 0, 0]
    # Action 2 is 7 in its own space.
    observation, reward, *_ = single.step(2)
    assert (reward, observation[-3:].tolist()) == (7.0, [0, 0, 1])
    assert observation_shape(env, {"episode_length": 4}) == (12,)
    unflattened = make_single(env, {"episode_length": 4, "flatten": False})
    assert unflattened.reset(seed=3)[0]["pair"][0] == 2


@pytest.mark.parametrize(
    ("env", "space", "action", "given"),
    [
        ("Grid", gym.spaces.MultiDiscrete([2, 3, 4, 5]), [1, 2, 3, 4], [[2, 3], [4, 5]]),
        ("Switches", gym.spaces.MultiDiscrete([2, 2, 2]), [0, 1, 1], [0, 1, 1]),
        (
            "Levers",
            gym.spaces.Box(-np.inf, np.inf, (2,), np.float32),
            [-2.0, 0.125],
            [[-0.5], [0.125]],
        ),
        (
            "Panel",
            gym.spaces.MultiDiscrete([3, 2, 3, 4, 5, 2, 2, 2]),
            [2, 1, 2, 3, 4, 0, 1, 1],
            (3, {"at": [[2, 3], [4, 5]], "on": [0, 1, 1]}),
        ),
        (
            "Joints",
            gym.spaces.Box(-np.inf, np.inf, (3,), np.float32),
            [-2.0, 0.125, 0.5],
            {"arm": [[-0.5], [0.125]], "leg": 0.5},
        ),
        (
            "Robot",
            gym.spaces.Tuple(
                (
                    gym.spaces.MultiDiscrete([3, 2, 3, 4, 5, 2, 2, 2]),
                    gym.spaces.Box(-np.inf, np.inf, (3,), np.float32),
                )
            ),
            [2, 1, 2, 3, 4, 0, 1, 1, -2.0, 0.125, 0.5],
            (
                {"arm": [[-0.5], [0.125]], "leg": 0.5},
                (3, {"at": [[2, 3], [4, 5]], "on": [0, 1, 1]}),
            ),
        ),
    ],
)
def test_actions_reach_the_environment_in_its_own_space(
    env: str, space: gym.Space, action: list, given: Any
) -> None:
    vector = make_vector(f"sgrl-test/{env}-v0", 1, {"episode_length": 3})
    assert vector.action_space == space
    vector.reset([0])
    dtype = action_space_of(space).dtype
    stepped = vector.step(torch.tensor([action], dtype=dtype).numpy())
    assert as_lists(ManySpaces.taken.pop()) == given
    assert not stepped.truncated[0]
    for _ in range(2):
        truncated = vector.step(torch.tensor([action], dtype=dtype).numpy()).truncated
    assert truncated[0]
    if isinstance(space, gym.spaces.Tuple):
        single = make_single(f"sgrl-test/{env}-v0", {"episode_length": 3})
        single.reset(seed=0)
        single.step((np.array(action[:8]), np.array(action[8:], np.float32)))  # as RLlib does
        assert as_lists(ManySpaces.taken.pop()) == given


def test_previous_actions_in_parts() -> None:
    single = make_single("sgrl-test/Joints-v0", {"episode_length": 3, "previous_action": True})
    assert single.reset(seed=0)[0][-3:].tolist() == [0, 0, 0]
    observation = single.step(np.array([-2.0, 0.125, 0.5], np.float32))[0]
    assert observation[-3:].tolist() == [-0.5, 0.125, 0.5]
    # Before the first step, where 0 is no action, the lowest there is.
    single = make_single("sgrl-test/Panel-v0", {"episode_length": 3, "previous_action": True})
    lowest = [1, 0, 0, 1, 0, 1, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]
    assert single.reset(seed=0)[0][-20:].tolist() == lowest


def as_lists(action: Any) -> Any:
    match action:
        case tuple():
            return tuple(map(as_lists, action))
        case dict():
            return {key: as_lists(part) for key, part in action.items()}
    return np.asarray(action).tolist()


def test_episodes_follow_from_their_seed_alone() -> None:
    """Of any size; the process's generators stay as they were."""
    state = random.getstate()
    env = make_vector("sgrl-test/ManySpaces-v0", 2, {"episode_length": 3})
    first = env.reset([7, 7 + 5 * 2**32])
    assert random.getstate() == state
    np.testing.assert_array_equal(env.reset([7, 7 + 5 * 2**32]), first)
    assert (first[0] != first[1]).any()
    assert seed_of_32_bits(7 + 5 * 2**32) < 2**32


def test_lengths() -> None:
    assert validate_env_config("popgym-HigherLowerMedium-v0")["episode_length"] == 103
    assert validate_env_config("popgym-ConcentrationEasy-v0")["episode_length"] == 104
    assert validate_env_config("CartPole-v1")["episode_length"] == 500
    assert validate_env_config("CartPole-v1", {"episode_length": 20})["episode_length"] == 20
    single = make_single("popgym-RepeatPreviousEasy-v0", {"episode_length": 5})
    single.reset(seed=0)
    assert [single.step(0)[3] for _ in range(5)] == [False] * 4 + [True]


@pytest.mark.parametrize(
    ("env", "config", "words"),
    [
        ("CartPole-v9", {}, ["unknown environment", "'CartPole-v1'"]),
        ("popgym-RepeatPreviousEasy", {}, ["did you mean 'popgym-RepeatPreviousEasy-v0'"]),
        ("no_such_module:Ant-v5", {}, ["no module named 'no_such_module'"]),
        (
            "popgym.envs:popgym-RepeatFirst",
            {},
            ["the module popgym.envs registers no", "did you mean 'popgym.envs:popgym-RepeatFirst"],
        ),
        ("Blackjack-v1", {}, ["give episode_length"]),
        ("CartPole-v1", {"episode_length": 0}, ["episode_length", "at least 1", "got 0"]),
        ("CartPole-v1", {"gravity_typo": 1}, ["cannot be built", "gravity_typo"]),
        ("CartPole-v1", {"previous_action": "yes"}, ["previous_action", "true or false"]),
        (
            "popgym-CountRecallMedium-v0",
            {"previous_actions": True},
            ["did you mean 'previous_action"],
        ),
        ("sgrl-test/Words-v0", {"episode_length": 3}, ["observation space", "no fixed size"]),
        ("sgrl-test/Whole-v0", {"episode_length": 3}, ["action space", "not supported"]),
        ("sgrl-test/Spoken-v0", {"episode_length": 3}, ["action space Text(", "a Tuple or Dict"]),
    ],
)
def test_bad_settings_are_one_clear_line(env: str, config: dict, words: list[str]) -> None:
    with pytest.raises(ValueError, match=env.rpartition("/")[2]) as caught:
        validate_env_config(env, config)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_a_missing_package_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*args: Any, **kwargs: Any) -> None:
        raise gym.error.DependencyNotInstalled("MuJoCo is not installed, run `pip install it`")

    monkeypatch.setattr(gym, "make", missing)
    with pytest.raises(ValueError, match="Ant-v5: a package is missing: MuJoCo is not installed"):
        validate_env_config("Ant-v5", {"frame_skip": 3})


def test_ids_of_a_module_are_found_by_importing_it() -> None:
    assert validate_env_config("popgym.envs:popgym-RepeatFirstEasy-v0")["episode_length"] == 51


def test_unflattened_observations_are_refused_in_batches() -> None:
    config = {"flatten": False}
    with pytest.raises(ValueError, match="CartPole-v1: flatten must be true"):
        make_vector("CartPole-v1", 1, config)


def test_every_family_and_difficulty_is_there() -> None:
    assert len(POPGYM_IDS) == 48
    assert all(env in gym.registry for env in POPGYM_IDS)


def test_success_is_unknown(tmp_path) -> None:
    """Neither a batch nor an evaluation tells a success rate where the environment does not."""
    env = make_vector("popgym-RepeatFirstEasy-v0", 3)
    policy = make_policy("mlp", env.observation_size, env.num_actions)
    batch = Rollout(env, policy, seed=0).collect()
    statistics = batch.statistics()
    assert batch.success is None
    assert "success_rate" not in statistics
    assert -1 <= statistics["episode_return_mean"] <= 1
    environment = {"env": "popgym-RepeatFirstEasy-v0", "env_config": {}}
    save_policy(policy, tmp_path, environment=environment)
    found = evaluate(tmp_path, episodes=3)
    assert [name for name in found if not name.endswith(("_low", "_high"))] == [
        "episodes",
        "episode_return_mean",
        "episode_length_mean",
    ]
    save_policy(policy, tmp_path, environment={"env": "Gone-v0", "env_config": {}})
    with pytest.raises(CheckpointError, match="unknown environment 'Gone-v0'"):
        evaluate(tmp_path, episodes=3)
