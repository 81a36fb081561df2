"""Reports as pages: one HTML file that needs nothing else, Markdown, or LaTeX tables."""

import base64
import html
import itertools
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

import jinja2
from markupsafe import Markup

from sgrl.analysis.figures import Figure
from sgrl.analysis.tables import Titled, bold_cells, cells
from sgrl.markdown import markdown_table

#: A longer table than this is broken over pages in LaTeX.
MOST_ROWS = 40


@dataclass
class Section:
    """What a report says about one folder.

    Attributes:
        title: the experiment's name.
        facts: names and values.
        problems: one line for each trial that is not complete and sound.
        findings: sentences that say what was found.
        tables: each with its title and a note, which may be empty.
        figures: files that exist.
        commands: how to run it again.
        configuration: the resolved experiment's YAML.
    """

    title: str
    facts: list[tuple[str, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)
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
    page = template.render(
        sections=sections,
        cells=cells,
        bold_cells=bold_cells,
        image=_image,
        width=_width,
        anchor=_anchor,
        interactive=any(figure.curves for section in sections for figure in section.figures),
        library=lambda name: _part(f"uplot/{name}"),
        script=lambda: _part("report.js"),
    )
    return page + "\n"


def _part(name: str) -> Markup:
    """Read a file of this package as it stands in the page."""
    return Markup(resources.files("sgrl.analysis").joinpath(name).read_text(encoding="utf-8"))


def _image(figure: Figure) -> str:
    """Encode a figure's SVG as a data URL."""
    svg = figure.path.with_suffix(".svg").read_bytes()
    return "data:image/svg+xml;base64," + base64.b64encode(svg).decode()


def _width(figure: Figure) -> int:
    """The most pixels a figure is drawn across: half as many again as its size in inches asks for.

    Larger text than that would not go with the page's.
    """
    svg = figure.path.with_suffix(".svg").read_text(encoding="utf-8")
    points = re.search(r'<svg [^>]*\bwidth="([\d.]+)pt"', svg)
    assert points is not None
    return round(1.5 * float(points[1]) * 96 / 72)


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
        if section.findings:
            lines += ["", "## What was found", "", *(f"- {said}" for said in section.findings)]
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
    """Render the tables of a report as LaTeX, each with caption and label; long ones break.

    Args:
        sections: the report.
        out: where it is written; not used.

    Returns:
        The text of the file.
    """
    lines = ["% Tables for \\input; they need \\usepackage{booktabs,longtable}."]
    for section in sections:
        for said in section.findings:
            lines.append(f"% {section.title}: {said}")
        for title, note, table in section.tables:
            header, rows = cells(table)
            columns = "l" + "r" * (len(header) - 1)
            caption = f"{section.title}, {title[0].lower()}{title[1:]}. {table.caption or ''}"
            named = [
                f"\\caption{{{_latex(caption.strip())}}}",
                f"\\label{{tab:{_anchor(section.title, title)}}}",
            ]
            body = [
                _latex_row(row, bold) for row, bold in zip(rows, bold_cells(table), strict=True)
            ]
            head = ["\\toprule", _latex_row(header), "\\midrule"]
            lines += ["", *(f"% {line}" for line in note.splitlines())]
            if len(rows) > MOST_ROWS:
                lines += [f"\\begin{{longtable}}{{{columns}}}", *named]
                lines[-1] += " \\\\"
                lines += [*head, "\\endhead", *body, "\\bottomrule", "\\end{longtable}"]
            else:
                lines += ["\\begin{table}", "\\centering", *named]
                lines += [f"\\begin{{tabular}}{{{columns}}}", *head, *body, "\\bottomrule"]
                lines += ["\\end{tabular}", "\\end{table}"]
    return "\n".join(lines) + "\n"


_LATEX = {character: f"\\{character}" for character in "&%$#_{}"} | {
    "\\": "\\textbackslash{}",
    "~": "\\textasciitilde{}",
    "^": "\\textasciicircum{}",
    "±": "$\\pm$",
    "<": "$<$",
    ">": "$>$",
}


def _latex(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)


def _latex_row(values: Sequence[str], bold: Sequence[bool] = ()) -> str:
    marked = itertools.zip_longest(map(_latex, values), bold)
    return " & ".join(f"\\textbf{{{v}}}" if best else v for v, best in marked) + " \\\\"


#: Suffix and renderer of each format.
FORMATS = {
    "html": (".html", html_page),
    "markdown": (".md", markdown_page),
    "latex": (".tex", latex_page),
}
