"""Drawings of an episode: an animation (GIF) or a filmstrip (PNG).

episode = record_episode("results/NAME/TRIAL/checkpoints/000100", seed=0, number=3)
write_episode(episode, Path("episode.gif"))
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray
from PIL import Image
from popgym.core.maze import Actions, Cell

from sgrl.analysis.episodes import BanditEpisode, FrameEpisode, LabyrinthEpisode, RenderError
from sgrl.analysis.style import method_styles
from sgrl.files import replacing

SUFFIXES = (".gif", ".png")
#: Of walls, free cells, the start and the goal, in the order of `Cell`.
CELL_COLOURS = ["#FFFFFF", "#4D4D4D", "#D9D9D9", "#F0E442"]
AGENT_COLOUR = "#D55E00"
_AGENT: dict[str, Any] = {"color": AGENT_COLOUR, "markeredgecolor": "white", "markeredgewidth": 1.2}
#: How long an animation shows its last frame.
LAST_FRAME_SECONDS = 2.0


def check_out(out: Path) -> None:
    """Check that a drawing can be written to a file, and create its folder.

    Args:
        out: the file.

    Raises:
        RenderError: the name has another suffix, or the folder cannot be created.
    """
    if out.suffix.lower() not in SUFFIXES:
        raise RenderError(f"{out}: give a name that ends in {' or '.join(SUFFIXES)}")
    if out.is_dir():
        raise RenderError(f"{out} is a folder: give the name of a file")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RenderError(f"{out} cannot be written: {error.strerror}") from None


def write_episode(
    episode: LabyrinthEpisode | BanditEpisode | FrameEpisode,
    out: Path,
    fps: int = 5,
    frames: int = 6,
    advance: Callable[[int], object] = lambda total: None,
) -> None:
    """Draw an episode to a file.

    Args:
        episode: from `record_episode`.
        out: `.gif` for an animation with a frame before each step and one after the last, `.png`
            for a filmstrip of evenly spaced steps. A bandit's single step can only be a `.png`.
        fps: steps per second in the animation, at most 50.
        frames: pictures in the filmstrip.
        advance: called after each picture with the total number of pictures.

    Raises:
        RenderError: the name has another suffix, or the file cannot be written.
    """
    check_out(out)
    animated = out.suffix.lower() == ".gif"
    if isinstance(episode, BanditEpisode):
        if animated:
            raise RenderError(
                f"{out}: an episode of {episode.env} has a single step: give a name that ends in "
                ".png"
            )
        pictures = [draw_bandit(episode)]
    else:
        last = len(episode.actions)
        count = last + 1 if animated else min(frames, last + 1)
        steps = np.linspace(0, last, count).round().astype(int) if count > 1 else [last]
        drawing: FrameDrawing | LabyrinthDrawing
        if isinstance(episode, FrameEpisode):
            drawing = FrameDrawing(episode)
        else:
            drawing = LabyrinthDrawing(episode)
        pictures = []
        for step in steps:
            pictures.append(drawing.draw(int(step)))
            advance(count)
        drawing.close()
    try:
        with replacing(out) as temporary, temporary.open("wb") as file:
            if animated:
                _write_gif(pictures, file, fps)
            else:
                _tile(pictures).save(file, "png")
    except OSError as error:
        raise RenderError(f"{out} cannot be written: {error.strerror or error}") from None


def _write_gif(pictures: list[Image.Image], file: Any, fps: int) -> None:
    # One palette for all frames, from the first, middle and last one, so that nothing flickers.
    samples = [pictures[0], pictures[len(pictures) // 2], pictures[-1]]
    palette = _tile(samples).quantize(255, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    frames = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in pictures]
    durations = [round(1000 / fps)] * (len(frames) - 1) + [round(1000 * LAST_FRAME_SECONDS)]
    frames[0].save(
        file,
        "gif",
        save_all=True,
        append_images=frames[1:],
        duration=durations,
        loop=0,
        optimize=False,
    )


def _tile(pictures: list[Image.Image]) -> Image.Image:
    """Arrange pictures of one size, two in a row."""
    width, height = pictures[0].size
    columns = min(2, len(pictures))
    rows = -(-len(pictures) // columns)
    tiled = Image.new("RGB", (columns * width, rows * height), "white")
    for place, picture in enumerate(pictures):
        tiled.paste(picture, (place % columns * width, place // columns * height))
    return tiled


class LabyrinthDrawing:
    """Draws the steps of an episode.

    The parts that do not change are drawn once; each step draws the others on top.

    Args:
        episode: the episode.

    Attributes:
        maze: the axes of the maze; cell (row, column) is at (column, row) in its data.
    """

    def __init__(self, episode: LabyrinthEpisode) -> None:
        self.episode = episode
        self.colour = method_styles([episode.method])[episode.method]["color"]
        self.figure = plt.figure(figsize=(9.6, 5.2), dpi=100)
        self.moving: list[Any] = []
        self._titles()
        self._maze()
        self._view()
        self._probabilities()
        self._hidden()
        for artist in self.moving:
            artist.set_animated(True)
        self.canvas = FigureCanvasAgg(self.figure)
        self.canvas.draw()
        self.still = self.canvas.copy_from_bbox(self.figure.bbox)

    def close(self) -> None:
        """Free the figure."""
        plt.close(self.figure)

    def draw(self, step: int) -> Image.Image:
        """Draw the state before a step.

        Args:
            step: from 0; the number of steps for the state after the last one.

        Returns:
            The picture.
        """
        self._update(step)
        self.canvas.restore_region(self.still)
        for artist in self.moving:
            artist.axes.draw_artist(artist) if artist.axes else self.figure.draw_artist(artist)
        return _picture(self.canvas)

    def _titles(self) -> None:
        self.figure.text(0.02, 0.945, self.episode.title, fontsize=12, weight="bold")
        self.state = self.figure.text(0.02, 0.895, "", fontsize=10.5)
        self.moving.append(self.state)

    def _maze(self) -> None:
        episode = self.episode
        self.maze = self.figure.add_axes((0.02, 0.04, 0.41, 0.80))
        _show_cells(self.maze, episode.maze)
        height, width = episode.maze.shape
        size = 0.45 * 72 * min(0.41 * 9.6 / width, 0.80 * 5.2 / height)  # of the agent, in points
        for code, letter in ((Cell.START, "S"), (Cell.GOAL, "G")):
            for row, column in np.argwhere(episode.maze == code):
                corner = (column - 0.44, row - 0.44)
                self.maze.text(*corner, letter, ha="left", va="top", fontsize=min(9, 0.6 * size))
        # The outline of its view, with a border that is visible on walls.
        self.outline = Rectangle((0, 0), 1, 1, fill=False, edgecolor="black", lw=1.5, ls=":")
        self.outline.set_path_effects([withStroke(linewidth=3, foreground="white")])
        self.maze.add_patch(self.outline)
        (self.path,) = self.maze.plot(
            [], [], color=self.colour, lw=max(1.2, 0.3 * size), alpha=0.75, solid_capstyle="round"
        )
        (self.agent,) = self.maze.plot([], [], "o", markersize=size, **_AGENT)
        self.moving += [self.outline, self.path, self.agent]

    def _view(self) -> None:
        axes = self.figure.add_axes((0.455, 0.53, 0.17, 0.31))
        axes.set_title("3x3 view", fontsize=10)
        self.view = _show_cells(axes, self.episode.views[0])
        (self.viewer,) = axes.plot([], [], "o", markersize=15, **_AGENT)
        self.moving += [self.view, self.viewer]

    def _probabilities(self) -> None:
        axes = self.figure.add_axes((0.495, 0.09, 0.13, 0.33))
        axes.set_title("action probabilities", fontsize=10, x=0.35)
        names = [action.name.lower() for action in Actions if action != Actions.NONE]
        self.bars = axes.barh(names, np.zeros(len(names)), color=self.colour, height=0.7)
        axes.invert_yaxis()
        axes.set_xlim(0, 1)
        axes.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
        axes.tick_params(labelsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        (self.choice,) = axes.plot([], [], "o", markersize=8, clip_on=False, **_AGENT)
        self.moving += [*self.bars, self.choice]

    def _hidden(self) -> None:
        episode = self.episode
        steps, neurons, size = episode.hidden.shape
        has_weights = episode.mixing_weights is not None
        width = 0.225 if has_weights else 0.275
        axes = self.figure.add_axes((0.695, 0.20, width, 0.64))
        what = "hidden state" if episode.memory else "activations (no memory)"
        axes.set_title(what, fontsize=10)
        axes.set_xlabel("step", fontsize=9, labelpad=1)
        axes.set_ylabel("neuron" if size > 1 else "unit", fontsize=9, labelpad=1)
        axes.tick_params(labelsize=8)
        # One row per component of the state; the axis counts neurons.
        rows = episode.hidden.reshape(steps, -1).T
        self.rows = np.ma.masked_array(rows, mask=True)
        limit = max(float(np.percentile(np.abs(rows), 99)), 1e-6)
        self.hidden = axes.imshow(
            self.rows,
            cmap="RdBu_r",
            vmin=-limit,
            vmax=limit,
            aspect="auto",
            interpolation="nearest",
            extent=(-0.5, steps - 0.5, neurons - 0.5, -0.5),
        )
        axes.set_facecolor("#F2F2F2")
        (self.now,) = axes.plot([], [], color="black", lw=1)
        self.moving += [self.hidden, self.now]
        _scale(self.figure, self.hidden, (0.695, 0.085, width, 0.022))
        if episode.mixing_weights is not None:
            draw_weights(self.figure, episode.mixing_weights)

    def _update(self, step: int) -> None:
        episode = self.episode
        last = len(episode.actions)
        earned = float(episode.rewards[:step].sum())
        if step < last:
            name = Actions(episode.actions[step]).name.lower()
            wall = (episode.positions[step] == episode.positions[step + 1]).all()
            doing = f"goes {name}" + (", into a wall" if wall else "")
        else:
            doing = "success" if episode.success else "out of time"
        self.state.set_text(f"step {step} of {last}   return {earned:+.3f}   {doing}")

        rows, columns = episode.positions[: step + 1].T
        self.path.set_data(columns, rows)
        self.agent.set_data(columns[-1:], rows[-1:])
        # In mazes that are not square the view can lack the agent, or be all padding.
        seen = episode.seen[step]
        height, width = episode.maze.shape
        inside_y, inside_x = np.divmod(seen[seen < height * width], width)
        self.outline.set_visible(inside_x.size > 0)
        if inside_x.size:
            self.outline.set_xy((inside_x.min() - 0.5, inside_y.min() - 0.5))
            self.outline.set_width(np.ptp(inside_x) + 1)
            self.outline.set_height(np.ptp(inside_y) + 1)

        self.view.set_data(episode.views[step])
        here = np.argwhere(seen == rows[-1] * width + columns[-1])
        self.viewer.set_data(here[:, 1], here[:, 0])

        shown = episode.probabilities[step] if step < last else np.zeros(len(self.bars))
        for bar, probability in zip(self.bars, shown, strict=True):
            bar.set_width(probability)
        chosen = episode.actions[step : step + 1]
        self.choice.set_data(shown[chosen], chosen)

        acted = min(step + 1, last)
        self.rows.mask = np.arange(last)[None, :] >= acted
        self.hidden.set_data(self.rows)
        self.now.set_data([acted - 1, acted - 1], self.hidden.axes.get_ylim())


class FrameDrawing:
    """Draws the steps of an episode as its environment does, with the return so far.

    Args:
        episode: the episode.

    Attributes:
        frame: the axes of the environment's own picture.
    """

    def __init__(self, episode: FrameEpisode) -> None:
        self.episode = episode
        self.figure = plt.figure(figsize=(9.6, 5.2), dpi=100)
        self.figure.text(0.02, 0.945, episode.title, fontsize=12, weight="bold")
        self.state = self.figure.text(0.02, 0.895, "", fontsize=10.5)
        self.frame = self.figure.add_axes((0.02, 0.04, 0.55, 0.80))
        self.frame.set_axis_off()
        self.picture = self.frame.imshow(episode.frames[0])
        has_weights = episode.mixing_weights is not None
        axes = self.figure.add_axes((0.645, 0.20, 0.25 if has_weights else 0.325, 0.64))
        axes.set_title("return so far", fontsize=10)
        axes.set_xlabel("step", fontsize=9, labelpad=1)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        self.earned = np.concatenate([[0.0], np.cumsum(episode.rewards, dtype=float)])
        colour = method_styles([episode.method])[episode.method]["color"]
        axes.plot(self.earned, color=colour, lw=1, alpha=0.35)
        (self.line,) = axes.plot([], [], color=colour, lw=1.8)
        if episode.mixing_weights is not None:
            draw_weights(self.figure, episode.mixing_weights)
        self.canvas = FigureCanvasAgg(self.figure)

    def close(self) -> None:
        """Free the figure."""
        plt.close(self.figure)

    def draw(self, step: int) -> Image.Image:
        """Draw the state before a step, as `LabyrinthDrawing.draw`."""
        last = len(self.episode.actions)
        self.state.set_text(f"step {step} of {last}   return {self.earned[step]:+.3f}")
        self.picture.set_data(self.episode.frames[step])
        self.line.set_data(np.arange(step + 1), self.earned[: step + 1])
        self.canvas.draw()
        return _picture(self.canvas)


def draw_weights(figure: Any, weights: NDArray[np.float32]) -> None:
    """Draw mixing weights as a strip at the figure's right, on a scale from lowest to highest.

    Args:
        figure: Matplotlib's figure.
        weights: [layers, W].
    """
    strip = figure.add_axes((0.94, 0.20, 0.035, 0.64))
    strip.set_title("$\\lambda$", fontsize=11)
    strip.set_xticks([])
    strip.set_yticks([])
    low, high = float(weights.min()), float(weights.max())
    if low == high:  # no difference to show
        low, high = 0.0, 1.0
    image = strip.imshow(
        weights.T, cmap="viridis", vmin=low, vmax=high, aspect="auto", interpolation="nearest"
    )
    # In digits that differ, one below the other: the strip is narrow.
    digits = max(1, math.ceil(-math.log10(high - low)) + 1)
    bar = _scale(figure, image, (0.94, 0.085, 0.035, 0.022))
    label = f"{low:.{digits}f}\nto {high:.{digits}f}"
    bar.set_ticks([(low + high) / 2], labels=[label])
    bar.ax.get_xticklabels()[0].set_horizontalalignment("center")


def _scale(figure: Any, image: Any, place: tuple[float, float, float, float]) -> Any:
    bar = figure.colorbar(image, cax=figure.add_axes(place), orientation="horizontal")
    low, high = image.get_clim()
    bar.set_ticks([low, high], labels=[f"{low:.2g}", f"{high:.2g}"])
    bar.ax.tick_params(labelsize=8, length=0)
    lowest, highest = bar.ax.get_xticklabels()
    lowest.set_horizontalalignment("left")
    highest.set_horizontalalignment("right")
    return bar


def _show_cells(axes: Any, cells: NDArray[np.int8]) -> Any:
    count = len(CELL_COLOURS)
    image = axes.imshow(
        cells,
        cmap=ListedColormap(CELL_COLOURS),
        norm=BoundaryNorm(np.arange(count + 1) - 0.5, count),
    )
    height, width = cells.shape
    axes.set_xticks([])
    axes.set_yticks([])
    axes.vlines(np.arange(1, width) - 0.5, -0.5, height - 0.5, color="#BFBFBF", lw=0.6)
    axes.hlines(np.arange(1, height) - 0.5, -0.5, width - 0.5, color="#BFBFBF", lw=0.6)
    axes.spines[:].set_color("#4D4D4D")
    return image


def draw_bandit(episode: BanditEpisode) -> Image.Image:
    """Draw a bandit's image, the probability of each class, and each layer's mixing weights.

    Args:
        episode: the episode.

    Returns:
        The picture.
    """
    colour = method_styles([episode.method])[episode.method]["color"]
    weights = episode.mixing_weights
    figure, axes = plt.subplots(1, 2 if weights is None else 3, figsize=(9.6, 3.4), dpi=100)
    guess = int(episode.actions[0])
    figure.suptitle(episode.title, x=0.02, ha="left", fontsize=12, weight="bold")
    axes[0].imshow(episode.observations[0].reshape(28, 28), cmap="gray")
    axes[0].set_title(f"a {episode.classes[episode.right]}", fontsize=10)
    axes[0].set_axis_off()

    bars = axes[1].barh(np.arange(len(episode.classes)), episode.probabilities[0], color=colour)
    axes[1].plot(bars[guess].get_width(), guess, "o", markersize=9, clip_on=False, **_AGENT)
    axes[1].set_yticks(np.arange(len(episode.classes)), map(str, episode.classes))
    axes[1].invert_yaxis()
    axes[1].set_xlim(0, 1)
    axes[1].set_xlabel("probability", fontsize=9)
    axes[1].set_title(f"guesses {episode.classes[guess]}", fontsize=10)
    axes[1].spines[["top", "right"]].set_visible(False)
    if weights is not None:
        layers = np.arange(1, len(weights) + 1)
        axes[2].boxplot(weights.T, positions=layers, whis=(0, 100), medianprops={"color": colour})
        axes[2].ticklabel_format(axis="y", useOffset=False)
        axes[2].set_xlabel("layer", fontsize=9)
        axes[2].set_title("mixing weights $\\lambda$", fontsize=10)
        axes[2].spines[["top", "right"]].set_visible(False)
    figure.tight_layout(rect=(0, 0, 1, 0.97))
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    picture = _picture(canvas)
    plt.close(figure)
    return picture


def _picture(canvas: FigureCanvasAgg) -> Image.Image:
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())
