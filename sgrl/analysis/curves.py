"""Curves of training as they are drawn, in a figure and in a report's page."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.colors
import numpy as np
import pandas as pd

from sgrl.analysis.statistics import INTERVAL_SEEDS
from sgrl.analysis.style import draw_band, rows_of_three, save, seeds_note

#: A page holds at most so many places of a line, evenly spaced ones of more.
MOST_PLACES = 600
#: Dashes of lines [on, off, ...], in a figure in units of their width.
DASHES: list[list[int]] = [[], [6, 3], [2, 2], [8, 3, 2, 3]]


def smoothing_window(rows: int) -> int:
    """Choose how many values of a curve are averaged: an odd number, a thirtieth of them.

    Args:
        rows: number of values.

    Returns:
        The number; 1, which smooths nothing, for short curves.
    """
    return rows // 30 | 1


class Line(NamedTuple):
    """The curve of a method.

    Attributes:
        name: for the legend.
        values: from `Results.curves_of`: index the axis, one column a seed.
        style: keywords of Matplotlib's `plot`, from `style.method_styles`.
        dash: which of `DASHES`.
    """

    name: str
    values: pd.DataFrame
    style: dict[str, Any]
    dash: int = 0

    def smoothed(self, window: int) -> pd.DataFrame:
        """Average each seed's curve over the `window` values around each place, fewer at its ends.

        Args:
            window: an odd number.

        Returns:
            The curves, shaped as `values`.
        """
        return self.values.rolling(window, center=True, min_periods=1).mean()


@dataclass(frozen=True)
class Curves:
    """Panels of curves.

    Attributes:
        title: what they show.
        x: label of the horizontal axes.
        y: label of the vertical axes.
        panels: each with its title and its lines.
        limits: of the vertical axes; chosen by the values if None.
        more: further words of the note.
        smooth: whether curves are smoothed (`smoothing_window` of the longest one).
    """

    title: str
    x: str
    y: str
    panels: Sequence[tuple[str, Sequence[Line]]]
    limits: tuple[float, float] | None = None
    more: str = ""
    smooth: bool = True

    @property
    def lines(self) -> list[Line]:
        """The lines of all panels."""
        return [line for _, lines in self.panels for line in lines]

    @property
    def window(self) -> int:
        """Number of values that are averaged."""
        longest = max((len(line.values) for line in self.lines), default=0)
        return smoothing_window(longest) if self.smooth else 1

    @property
    def note(self) -> str:
        """What the lines are."""
        note = seeds_note(line.values.shape[1] for line in self.lines)
        if self.window > 1:
            note += f", smoothed over {self.window} values, the unsmoothed mean faint"
        return note + (f"; {self.more}" if self.more else "")

    def draw(self, path: Path) -> Path:
        """Draw the figure: of each line the mean over seeds, with a band of one SEM.

        With fewer than five seeds each of them is a thin line instead.

        Args:
            path: the PNG to write; an SVG of the same name is written beside it.

        Returns:
            `path`.
        """
        titles = [(title, pd.DataFrame()) for title, _ in self.panels]
        figure, axes = rows_of_three(titles, self.x, self.y, fontsize="large")
        for axis, (_, lines) in zip(axes.flat, self.panels, strict=False):
            for line in lines:
                self._draw_line(axis, line)
            if self.limits:
                axis.set_ylim(*self.limits)
            if axis.lines:
                axis.legend(frameon=False, fontsize=8, loc="best")
        figure.suptitle(self.title, fontsize=11)
        return save(figure, path, self.note)

    def _draw_line(self, axis: Any, line: Line) -> None:
        smooth, count = line.smoothed(self.window), line.values.shape[1]
        colour = line.style["color"]
        places, mean = smooth.index.to_numpy(), smooth.mean(axis=1).to_numpy()
        axis.plot(
            places,
            mean,
            label=f"{line.name}, n={count}",
            linewidth=1.6,
            markevery=max(1, len(places) // 8),
            markersize=4.5,
            linestyle=(0, DASHES[line.dash]) if line.dash else "-",
            **line.style,
        )
        if self.window > 1:
            axis.plot(places, line.values.mean(axis=1), color=colour, linewidth=0.7, alpha=0.35)
        if count >= INTERVAL_SEEDS:
            error = smooth.sem(axis=1).to_numpy()
            draw_band(axis, places, mean - error, mean + error, colour)
        elif count > 1:
            axis.plot(places, line.values.to_numpy(), color=colour, linewidth=0.6, alpha=0.5)

    def data(self) -> dict[str, Any]:
        """Return what a page draws, as JSON holds it: what the figure shows, line by line.

        Returns:
            The labels, and for each panel its title and its lines. A line has its places x, the
            mean over seeds (value), with a band its bounds (low and high), if smoothed the
            unsmoothed mean (raw), and below five seeds those themselves (seeds).
        """
        panels = [
            {"title": title, "lines": [self._data_of(line) for line in lines]}
            for title, lines in self.panels
        ]
        return {"x": self.x, "y": self.y, "limits": self.limits, "panels": panels}

    def _data_of(self, line: Line) -> dict[str, Any]:
        smooth, count = line.smoothed(self.window), line.values.shape[1]
        shown = np.linspace(0, len(smooth) - 1, min(len(smooth), MOST_PLACES)).round().astype(int)
        mean = smooth.mean(axis=1).to_numpy()
        found: dict[str, Any] = {
            "name": f"{line.name}, n={count}",
            "colour": matplotlib.colors.to_hex(line.style["color"]),
            "x": _rounded(smooth.index.to_numpy()[shown], 7),
            "value": _rounded(mean[shown]),
        }
        if line.dash:
            found["dash"] = DASHES[line.dash]
        if self.window > 1:
            found["raw"] = _rounded(line.values.mean(axis=1).to_numpy()[shown])
        if count >= INTERVAL_SEEDS:
            error = smooth.sem(axis=1).to_numpy()
            found |= {
                "low": _rounded((mean - error)[shown]),
                "high": _rounded((mean + error)[shown]),
            }
        elif count > 1:
            found["seeds"] = [_rounded(line.values[name].to_numpy()[shown]) for name in line.values]
        return found


def _rounded(values: Any, digits: int = 4) -> list[float]:
    return [float(f"{value:.{digits}g}") for value in values]
