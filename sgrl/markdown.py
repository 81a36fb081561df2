"""Tables in Markdown, and pages whose tables are brought up to date.

A page holds each table between two marks, `<!-- NAME -->` and `<!-- end of NAME -->`.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from sgrl.errors import UserError

_MARK = re.compile(r"<!-- (?!end of )(.*?) -->\n.*?<!-- end of (.*?) -->", flags=re.DOTALL)


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a table.

    Args:
        head: the title of each column.
        rows: the cells, in Markdown but for "|".

    Returns:
        Its lines, each with a newline at its end.
    """
    escaped = [[cell.replace("|", r"\|") for cell in row] for row in (head, *rows)]
    escaped.insert(1, ["---"] * len(head))
    return "".join(f"| {' | '.join(row)} |\n" for row in escaped)


def write_tables(page: Path, table_of: Callable[[str], str]) -> int:
    """Replace the tables of a page.

    Args:
        page: a page in Markdown.
        table_of: returns the table of a mark's name.

    Returns:
        The number of tables.

    Raises:
        UserError: the page has no marks, or those around a table differ; one line.
    """
    text = page.read_text(encoding="utf-8")
    if not _MARK.search(text):
        raise UserError(f"{page} does not hold the lines <!-- NAME --> and <!-- end of NAME -->")

    def table(mark: re.Match[str]) -> str:
        name, end = mark.groups()
        if name != end:
            raise UserError(f"{page}: <!-- {name} --> is followed by <!-- end of {end} -->")
        return f"<!-- {name} -->\n\n{table_of(name)}\n<!-- end of {name} -->"

    replaced, count = _MARK.subn(table, text)
    page.write_text(replaced, encoding="utf-8")
    return count
