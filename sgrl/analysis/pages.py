"""Reports as pages: one HTML file that needs nothing else, Markdown, or LaTeX tables."""

import base64
import html
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jinja2

from sgrl.analysis.figures import Figure
from sgrl.analysis.tables import Titled, cells
from sgrl.markdown import markdown_table


@dataclass
class Section:
    """What a report says about one folder.

    Attributes:
        title: the experiment's name.
        facts: names and values.
        problems: one line for each trial that is not complete and sound.
        tables: each with its title and a note, which may be empty.
        figures: files that exist.
        commands: how to run it again.
        configuration: the resolved experiment's YAML.
    """

    title: str
    facts: list[tuple[str, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    tables: list[Titled] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)
    configuration: str = ""


def html_page(sections: Sequence[Section], out: Path) -> str:
    """Render a report as HTML, figures included.

    Args:
        sections: the report.
        out: where it is written; not used.

    Returns:
        The text of the file.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("sgrl.analysis", ""), autoescape=True, trim_blocks=True
    )
    template = environment.get_template("report.html")
    return template.render(sections=sections, cells=cells, image=_image, anchor=_anchor) + "\n"


def _image(figure: Figure) -> str:
    """Encode a figure's SVG as a data URL."""
    svg = figure.path.with_suffix(".svg").read_bytes()
    return "data:image/svg+xml;base64," + base64.b64encode(svg).decode()


def _anchor(*parts: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", " ".join(parts).lower()).strip("-")


def markdown_page(sections: Sequence[Section], out: Path) -> str:
    """Render a report as Markdown.

    Args:
        sections: the report.
        out: where it is written; figures are linked relative to its folder.

    Returns:
        The text of the file.
    """
    lines: list[str] = []
    for section in sections:
        lines += [f"# {section.title}", ""]
        lines += [f"- {name}: {said}" for name, said in section.facts]
        if section.problems:
            lines += ["", "## What is missing", "", *(f"- {said}" for said in section.problems)]
        for title, note, table in section.tables:
            header, rows = cells(table)
            escaped = [[html.escape(cell, quote=False) for cell in row] for row in (header, *rows)]
            lines += ["", f"## {title}", "", *([note, ""] if note else [])]
            lines += markdown_table(escaped[0], escaped[1:]).splitlines()
        for figure in section.figures:
            path = os.path.relpath(figure.path, out.parent)
            lines += ["", f"## {figure.title}", "", f"![{figure.title}]({path})"]
        if section.commands:
            lines += ["", "## To run it again", "", "```", *section.commands, "```"]
        lines.append("")
    return "\n".join(lines)


def latex_page(sections: Sequence[Section], out: Path) -> str:
    """Render the tables of a report as LaTeX.

    Args:
        sections: the report.
        out: where it is written; not used.

    Returns:
        The text of the file.
    """
    lines = ["% Tables for \\input; they need \\usepackage{booktabs}."]
    for section in sections:
        for title, note, table in section.tables:
            header, rows = cells(table)
            lines += [
                "",
                f"% {section.title}: {title}",
                *(f"% {line}" for line in note.splitlines()),
                f"\\begin{{tabular}}{{{'l' + 'r' * (len(header) - 1)}}}",
                "\\toprule",
                _latex_row(header),
                "\\midrule",
                *map(_latex_row, rows),
                "\\bottomrule",
                "\\end{tabular}",
            ]
    return "\n".join(lines) + "\n"


_LATEX = {character: f"\\{character}" for character in "&%$#_{}"} | {
    "\\": "\\textbackslash{}",
    "~": "\\textasciitilde{}",
    "^": "\\textasciicircum{}",
    "±": "$\\pm$",
    "<": "$<$",
    ">": "$>$",
}


def _latex_row(values: Sequence[str]) -> str:
    escaped = ("".join(_LATEX.get(character, character) for character in v) for v in values)
    return " & ".join(escaped) + " \\\\"


#: Suffix and renderer of each format.
FORMATS = {
    "html": (".html", html_page),
    "markdown": (".md", markdown_page),
    "latex": (".tex", latex_page),
}
