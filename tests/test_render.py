"""Episodes drawn from a trained policy: what was recorded, and what the pictures show."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from popgym.core.maze import Cell
from typer.testing import CliRunner

from sgrl.analysis.episodes import (
    BanditEpisode,
    Episode,
    FrameEpisode,
    LabyrinthEpisode,
    record_episode,
)
from sgrl.analysis.render import (
    AGENT_COLOUR,
    CELL_COLOURS,
    FrameDrawing,
    LabyrinthDrawing,
    draw_weights,
    write_episode,
)
from sgrl.cli import app
from sgrl.envs.registry import make_single, make_vector
from sgrl.nn.registry import load_policy, make_policy, save_policy
from sgrl.reinforce import train
from sgrl.reinforce.rollout import EVALUATION_SEED_OFFSET, Rollout
from sgrl.results.evaluation import evaluate

ESCAPE = ("labyrinth_escape", {"maze_dims": [6, 6], "episode_length": 40})
EXPLORE = ("labyrinth_explore", {"maze_dims": [8, 6], "episode_length": 30})
BANDIT = ("mnist_bandit", {"classes": [0, 1, 7]})
STEPS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
SMALL = {"num_neurons": 12, "neuron_size": 2, "num_parents": 2, "num_slots": 2}


def save(folder: Path, policy: str, task: tuple, iterations: int = 0, **settings: object) -> Path:
    env, env_config = task
    vector = make_vector(env, 32, env_config)
    made = make_policy(policy, vector.observation_size, vector.num_actions, seed=3, **settings)
    for _ in train(made, vector, iterations, lr=5e-3):
        pass
    folder.mkdir(parents=True)
    save_policy(made, folder, environment={"env": env, "env_config": env_config})
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small SparseNet that has learned for thirty batches."""
    folder = tmp_path_factory.mktemp("render") / "sparsenet"
    return save(folder, "sparsenet", ESCAPE, iterations=30, num_input_neurons=4, **SMALL)


@pytest.fixture(scope="module")
def episodes(trained: Path) -> list[LabyrinthEpisode]:
    """One that ended by success and one that did not."""
    found: dict[bool, Episode] = {}
    for number in range(40):
        episode = record_episode(trained, seed=5, number=number)
        found.setdefault(episode.success, episode)
        if len(found) == 2:
            break
    assert len(found) == 2
    assert all(isinstance(episode, LabyrinthEpisode) for episode in found.values())
    return [found[True], found[False]]


# ---------------------------------------------------------------- what happened


@pytest.mark.parametrize("number", [0, 7, 130])
def test_it_is_an_episode_of_evaluation(trained: Path, number: int) -> None:
    episode = record_episode(trained, seed=5, number=number)
    first = number // 100 * 100
    vector = make_vector(ESCAPE[0], 100, ESCAPE[1])
    batch = Rollout(vector, load_policy(trained), EVALUATION_SEED_OFFSET + 5 + first).collect()
    place, steps = number - first, len(episode.actions)
    assert steps == batch.lengths[place]
    assert episode.success == bool(batch.success[place])
    for name in ("observations", "actions", "rewards"):
        expected = getattr(batch, name)[:steps, place].numpy()
        assert np.array_equal(getattr(episode, name)[:steps], expected)


def test_successes_add_up_to_what_evaluate_says(trained: Path) -> None:
    successes = [record_episode(trained, seed=1, number=number).success for number in range(100)]
    assert evaluate(trained, 100, seed=1)["success_rate"] == pytest.approx(np.mean(successes))


@pytest.mark.parametrize(
    ("policy", "task", "settings"),
    [
        ("sparsenet", ESCAPE, {"num_input_neurons": 4, **SMALL}),
        ("lstm", EXPLORE, {"hidden_size": 8}),
        ("mlp", EXPLORE, {"hidden_size": 8}),
    ],
)
def test_popgym_plays_the_same(tmp_path: Path, policy: str, task: tuple, settings: dict) -> None:
    """Its own environment, given the recorded actions, is everywhere where the recording is."""
    episode = record_episode(save(tmp_path / "policy", policy, task, **settings), number=3)
    assert isinstance(episode, LabyrinthEpisode)
    env = make_single(*task)
    observation, _ = env.reset(seed=EVALUATION_SEED_OFFSET + 3)
    ended = False
    for step, action in enumerate([*episode.actions, None]):
        assert tuple(episode.positions[step]) == tuple(env.unwrapped.position)
        assert np.array_equal(episode.observations[step], observation)
        assert np.array_equal(episode.views[step], observation[:45].reshape(3, 3, 5).argmax(-1))
        if action is not None:
            observation, reward, ended, _, _ = env.step(action)
            assert episode.rewards[step] == np.float32(reward)
    assert ended == episode.success
    free = np.array(env.unwrapped.maze.grid) != Cell.OBSTACLE
    assert np.array_equal(free, episode.maze != Cell.OBSTACLE)


def test_the_path_obeys_the_walls(episodes: list[LabyrinthEpisode]) -> None:
    for episode in episodes:
        assert episode.maze[tuple(episode.positions[0])] == Cell.START
        assert len(episode.positions) == len(episode.actions) + 1
        bumps = 0
        for step, action in enumerate(episode.actions):
            here, after = episode.positions[step], episode.positions[step + 1]
            there = here + list(STEPS.values())[action]
            inside = (there >= 0).all() and (there < episode.maze.shape).all()
            if inside and episode.maze[tuple(there)] != Cell.OBSTACLE:
                assert np.array_equal(after, there)
            else:
                assert np.array_equal(after, here)
                bumps += 1
            assert episode.maze[tuple(after)] != Cell.OBSTACLE
        assert bumps
        at_goal = episode.maze[tuple(episode.positions[-1])] == Cell.GOAL
        assert at_goal == episode.success
        # The view: the cells it names, walls where there are none.
        cells = np.append(episode.maze.reshape(-1), Cell.OBSTACLE)
        assert np.array_equal(episode.views, cells[episode.seen])


def test_what_the_policy_computed(trained: Path, episodes: list[LabyrinthEpisode]) -> None:
    policy = load_policy(trained)
    policy.core.backend = "eager"
    for episode in episodes:
        observations = torch.from_numpy(episode.observations[:-1]).unsqueeze(1)
        state = policy.initial_state(1)
        for step, now in enumerate(observations):
            output = policy.step(now, state)
            state = output.state
            hidden = state["h"].view(12, 2).detach().numpy()
            assert np.allclose(episode.hidden[step], hidden, atol=1e-5)
            expected = output.logits.softmax(-1)[0].detach().numpy()
            assert np.allclose(episode.probabilities[step], expected, atol=1e-5)
        assert episode.mixing_weights is not None
        assert np.array_equal(episode.mixing_weights[0], policy.core.neurons.mixing_weight)
        assert episode.memory
        assert episode.method == "sparsenet_sgprop"


# ---------------------------------------------------------------- what is drawn


def rgb(colour: str) -> NDArray[np.int64]:
    return np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])


def near(pixels: NDArray, colour: str, tolerance: int = 24) -> NDArray[np.bool_]:
    return (np.abs(pixels.astype(int) - rgb(colour)) <= tolerance).all(-1)


def read_frames(path: Path) -> list[NDArray]:
    image = Image.open(path)
    frames = []
    for index in range(image.n_frames):
        image.seek(index)
        frames.append(np.asarray(image.convert("RGB")))
    return frames


def test_every_frame_of_the_animation(tmp_path: Path, episodes: list[LabyrinthEpisode]) -> None:
    for episode in episodes:
        told: list[int] = []
        write_episode(episode, tmp_path / "episode.gif", fps=10, advance=told.append)
        frames = read_frames(tmp_path / "episode.gif")
        steps = len(episode.actions)
        assert len(frames) == steps + 1
        assert told == [steps + 1] * (steps + 1)

        drawing = LabyrinthDrawing(episode)
        height = frames[0].shape[0]
        place = drawing.maze.transData.transform
        cells = np.argwhere(episode.maze >= 0)
        centres = {tuple(cell): place(cell[::-1]).round().astype(int) for cell in cells}
        corner, other = place((-0.5, -0.5)), place(np.array(episode.maze.shape[::-1]) - 0.5)
        left, right = round(corner[0]), round(other[0])
        top, bottom = height - round(corner[1]), height - round(other[1])
        cell_size = (right - left) / episode.maze.shape[1]
        drawing.close()

        for step, frame in enumerate(frames):
            # The agent: its pixels' centre is that of its cell.
            ys, xs = np.nonzero(near(frame[top:bottom, left:right], AGENT_COLOUR))
            assert len(ys) > 20
            agent = np.array([ys.mean(), xs.mean()]) / cell_size - 0.5
            assert np.abs(agent - episode.positions[step]).max() < 0.1
            # Walls stay walls; of the free cells just those are marked where the agent was.
            been = {tuple(position) for position in episode.positions[: step + 1].tolist()}
            for cell, (x, y) in centres.items():
                pixel = frame[height - y, x]
                code = episode.maze[cell]
                drawn_over = not near(pixel, CELL_COLOURS[code])
                if code == Cell.OBSTACLE:
                    assert not drawn_over
                elif len(been) > 1:
                    assert drawn_over == (cell in been)
        image = Image.open(tmp_path / "episode.gif")
        assert image.info["duration"] == 100
        assert image.info["loop"] == 0


def test_animation_frames_are_the_filmstrips_pictures(
    tmp_path: Path, episodes: list[LabyrinthEpisode]
) -> None:
    episode = episodes[1]
    write_episode(episode, tmp_path / "strip.png", frames=4)
    strip = np.asarray(Image.open(tmp_path / "strip.png"))
    drawing = LabyrinthDrawing(episode)
    pictures = [np.asarray(drawing.draw(step)) for step in (0, 13, 26, 39)]
    drawing.close()
    assert len(episode.actions) == 39
    rows = [np.concatenate(pictures[i : i + 2], axis=1) for i in (0, 2)]
    assert np.array_equal(strip, np.concatenate(rows))
    # The same file again, byte for byte.
    write_episode(episode, tmp_path / "again.png", frames=4)
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "strip.png").read_bytes()


@pytest.mark.parametrize(
    ("policy", "settings"),
    [
        ("dense", {"num_layers": 1, "hidden_size": 8}),
        ("sparse_mlp", {"num_layers": 2, "mixing_weight": 0.25, **SMALL}),
    ],
)
def test_a_bandits_step(tmp_path: Path, policy: str, settings: dict) -> None:
    checkpoint = save(tmp_path / "policy", policy, BANDIT, **settings)
    successes = []
    for number in range(20):
        episode = record_episode(checkpoint, number=number)
        assert isinstance(episode, BanditEpisode)
        assert episode.success == (episode.actions[0] == episode.right)
        successes.append(episode.success)
    assert len(set(successes)) == 2
    assert episode.classes == [0, 1, 7]
    if policy == "sparse_mlp":
        assert np.array_equal(episode.mixing_weights, np.full((2, 12), 0.25, np.float32))
    else:
        assert episode.mixing_weights is None
    run(checkpoint, "--out", tmp_path / "digit.png")
    assert Image.open(tmp_path / "digit.png").size == (960, 340)
    refused(checkpoint, "--out", tmp_path / "digit.gif", message="a single step: give a name")


class Walk(gym.Env):
    """A point on a line; its picture is all black but for the point's column."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 5}
    observation_space = gym.spaces.Box(0, 9, (4,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def __init__(self, render_mode: str | None = None, size: int = 10) -> None:
        self.render_mode, self.size = render_mode, size

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.place = int(self.np_random.integers(self.size))
        return np.full(4, self.place, np.float32), {}

    def step(self, action: int) -> Any:
        self.place = int(np.clip(self.place + 2 * action - 1, 0, self.size - 1))
        return np.full(4, self.place, np.float32), float(self.place), False, False, {}

    def render(self) -> Any:
        assert self.render_mode == "rgb_array"
        picture = np.zeros((4, self.size, 3), np.uint8)
        picture[:, self.place] = (213, 94, 0)
        return picture


class Blind(Walk):
    metadata = {"render_modes": []}

    def __init__(self) -> None:
        super().__init__(None)


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    for name, made in (("Walk", Walk), ("Blind", Blind)):
        gym.register(f"sgrl-render/{name}-v0", entry_point=made, max_episode_steps=7)


def test_any_environment_that_draws_itself(tmp_path: Path) -> None:
    """Frames are those of the episode of evaluation, and stand in the pictures."""
    task = ("sgrl-render/Walk-v0", {"size": 8})
    settings = {"num_layers": 2, **SMALL}
    checkpoint = save(tmp_path / "policy", "sparse_mlp", task, iterations=2, **settings)
    episode = record_episode(checkpoint, seed=2, number=103)
    assert isinstance(episode, FrameEpisode)
    batch = Rollout(
        make_vector(task[0], 100, task[1]), load_policy(checkpoint), EVALUATION_SEED_OFFSET + 102
    ).collect()
    places = batch.observations[:, 3, 0].int().tolist()
    assert episode.observations[:7, 0].tolist() == places[:7]
    assert np.array_equal(episode.rewards, batch.rewards[:, 3].numpy())
    assert len(episode.frames) == len(episode.actions) + 1 == 8
    for observed, frame in zip(episode.observations[:, 0], episode.frames, strict=True):
        assert np.argwhere(frame.any((0, 2))).tolist() == [[observed]]
    assert episode.title.endswith(f"episode 103: return {episode.rewards.sum():g}")
    run(checkpoint, "--seed", 2, "--episode", 103, "--out", tmp_path / "walk.gif")
    frames = read_frames(tmp_path / "walk.gif")
    assert len(frames) == 8
    drawing = FrameDrawing(episode)
    transform = drawing.frame.transData.transform
    for step, frame in enumerate(frames):
        x, y = transform((episode.observations[step, 0], 1)).round().astype(int)
        assert near(frame[frame.shape[0] - y, x], "#D55E00")
    drawing.close()
    blind = save(tmp_path / "blind", "dense", ("sgrl-render/Blind-v0", {}), hidden_size=4)
    refused(blind, "--out", tmp_path / "blind.gif", message='that have render_mode="rgb_array"')
    cards = save(tmp_path / "cards", "dense", ("popgym-RepeatFirstEasy-v0", {}), hidden_size=4)
    refused(cards, "--out", tmp_path / "cards.gif", message='that have render_mode="rgb_array"')


@pytest.mark.parametrize("values", [(0.9991, 0.9996, 0.9994), (0.2, 0.9, 0.5), (0.5, 0.5, 0.5)])
def test_mixing_weights_are_drawn_on_their_own_scale(values: tuple[float, ...]) -> None:
    figure = plt.figure()
    draw_weights(figure, np.array([values], np.float64))
    strip, scale = figure.axes
    low, high = (min(values), max(values)) if len(set(values)) > 1 else (0, 1)
    assert strip.images[0].get_clim() == (low, high)
    (label,) = scale.get_xticklabels()
    shown = [float(value) for value in label.get_text().split("\nto ")]
    assert shown == pytest.approx([low, high], abs=(high - low) / 2)
    assert shown[0] < shown[1]
    plt.close(figure)


# ---------------------------------------------------------------- the command


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["render", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    return result.stdout


def refused(*arguments: object, message: str) -> None:
    result = CliRunner().invoke(app, ["render", *map(str, arguments)], catch_exceptions=False)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("sgrl: ")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr


def test_the_command(
    tmp_path: Path, trained: Path, episodes: list[LabyrinthEpisode], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    number = episodes[0].number
    said = run(trained, "--seed", 5, "--episode", number)
    title = f"sparsenet_sgprop, labyrinth_escape, seed 5, episode {number}: success"
    assert said == f"episode.gif: {title}\n"
    assert Image.open("episode.gif").n_frames == len(episodes[0].actions) + 1
    run(trained, "--out", "new/folder/strip.PNG", "--frames", 1)
    assert Image.open("new/folder/strip.PNG").size == (960, 520)
    assert [path.name for path in Path("new/folder").iterdir()] == ["strip.PNG"]


def test_what_cannot_be_drawn(tmp_path: Path, trained: Path) -> None:
    refused(tmp_path / "none", message="is no checkpoint")
    refused(trained, "--out", tmp_path / "episode.mp4", message="ends in .gif or .png")
    refused(trained, "--out", trained.with_suffix(".gif") / "x", message="ends in .gif or .png")
    (tmp_path / "file").write_text("in the way")
    refused(trained, "--out", tmp_path / "file" / "e.gif", message="cannot be written: ")
    (tmp_path / "folder.png").mkdir()
    refused(trained, "--out", tmp_path / "folder.png", message="is a folder")
    assert not list(tmp_path.glob(".*"))


def test_it_needs_neither_ray_nor_pickle(tmp_path: Path, trained: Path) -> None:
    code = (
        "import sys, pickle; pickle.load = pickle.loads = None\n"
        "sys.modules['ray'] = None\n"
        "from sgrl.cli import main; main()"
    )
    arguments = ["render", str(trained), "--out", str(tmp_path / "e.png")]
    command = [sys.executable, "-c", code, *arguments]
    subprocess.run(command, check=True, timeout=120, capture_output=True)
    assert (tmp_path / "e.png").is_file()
