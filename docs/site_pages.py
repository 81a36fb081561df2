"""What the documentation site has beside the pages of this folder: hooks of MkDocs (mkdocs.yml).

- README.md and other pages outside of this folder, and pages of the files that pages link to: on
  the code host these links lead into the repository, on the site to a page that holds the file, or
  to the API reference.
- The API reference, a page for every folder of `sgrl/`, and the commands.
- The source of functions below the lines `Code: [name](file#name)` of docs/method.md.
- The tutorials, from their notebooks: with outputs where `make docs` has run them.
- Equations as MathML, which browsers draw without scripts or fonts of ours.

A public name without a docstring is a warning, as a broken link is; mkdocs.yml makes them errors.
"""

import functools
import html
import json
import logging
import posixpath
import re
import textwrap
from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path

import griffe
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
LOG = logging.getLogger("mkdocs.hooks.site_pages")
#: Pages outside of docs/, by their path in the repository.
OUTSIDE = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "cluster/README.md": "clusters.md",
    "benchmarks/README.md": "speed.md",
}
LANGUAGES = {".py": "python", ".yaml": "yaml", ".toml": "toml", ".sh": "bash", ".sbatch": "bash"}
LANGUAGES |= {".cpp": "cpp", ".json": "json"}
#: Where `make docs` leaves the notebooks that it has run.
EXECUTED = ROOT / "build" / "tutorials"

_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s:#]+)(#[^)\s]*)?\)")
_SHOWN = re.compile(r"^Code: \[(sgrl[\w.]+)\]\(.*\)$", flags=re.MULTILINE)
_FENCE = re.compile(r"^ *(```+).*?^ *\1 *$", flags=re.MULTILINE | re.DOTALL)
_MATH = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', flags=re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made here."""
    for file in [*files]:
        if file.src_uri.endswith(".ipynb"):
            files.remove(file)
            _add(files, config, *notebook_pages(file.src_uri))
    for path, uri in OUTSIDE.items():
        _add(files, config, (uri, (ROOT / path).read_text()))
    _add(files, config, *api_pages(), ("commands.md", commands_page()))
    _add(files, config, ("iframe-worker.js", search_script()))
    pages = [file for file in files.documentation_pages() if not file.src_uri.startswith("api/")]
    for path in sorted({path for page in pages for path in linked_files(page)}):
        _add(files, config, (f"files/{path}.md", file_page(path)))
    undocumented_names()
    return files


def _add(files: Files, config: MkDocsConfig, *pages: tuple[str, str | bytes]) -> None:
    for uri, content in pages:
        files.append(File.generated(config, uri, content=content))


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Show the code that pages ask for, and let links into the repository lead to the site."""
    shown = _SHOWN.sub(lambda found: f"{found[0]}\n\n{source_of(found[1])}", markdown)
    return replace_links(shown, page.file)


def on_page_content(html_text: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn TeX into MathML."""

    def draw(found: re.Match[str]) -> str:
        display = "block" if found[1] == "div" else "inline"
        drawn = convert(html.unescape(found[2]), display=display)
        if "\\" in drawn:
            LOG.warning(f"{page.file.src_uri}: TeX that MathML lacks in {found[2]}")
        # Names of functions, which browsers would space like operators.
        return re.sub(r"<mo>([A-Za-z]{2,})</mo>", r"<mi>\1</mi>", drawn)

    return _MATH.sub(draw, html_text)


# Links


def repository_path(file: File) -> str:
    """The path in the repository of the page's source."""
    inside = {uri: path for path, uri in OUTSIDE.items()}
    return inside.get(file.src_uri, f"docs/{file.src_uri}")


def replace_links(markdown: str, file: File) -> str:
    """The page's text with every link into the repository turned into one of the site."""
    here = posixpath.dirname(repository_path(file))

    def replace(found: re.Match[str]) -> str:
        image, text, target, fragment = found.groups(default="")
        path = posixpath.normpath(posixpath.join(here, target))
        if not (ROOT / path).exists():
            return found[0]  # MkDocs says so
        if path.startswith("sgrl") and (path.endswith(".py") or (ROOT / path).is_dir()):
            name = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
            return f"[{text}][{'.'.join([name, *fragment[1:].split()])}]"
        uri = site_uri(path)
        start = posixpath.dirname(file.src_uri) or "."
        return f"{image}[{text}]({posixpath.relpath(uri, start)}{fragment})"

    return "".join(
        part if is_code else _LINK.sub(replace, part) for is_code, part in _parts(markdown)
    )


def linked_files(file: File) -> Iterator[str]:
    """The files of the repository that a page links to and that have no page of their own."""
    here = posixpath.dirname(repository_path(file))
    for is_code, part in _parts(file.content_string):
        for *_, target, _ in _LINK.findall("" if is_code else part):
            path = posixpath.normpath(posixpath.join(here, target))
            known = path in OUTSIDE or path.startswith(("docs/", "sgrl"))
            if (not known or path.endswith(".cpp")) and (ROOT / path).exists():
                yield path


def site_uri(path: str) -> str:
    """The source on the site of a path in the repository."""
    if path in OUTSIDE:
        return OUTSIDE[path]
    inside = path.removeprefix("docs/").replace(".ipynb", ".md")
    return inside if path.startswith("docs/") else f"files/{path}.md"


def _parts(markdown: str) -> Iterator[tuple[bool, str]]:
    """The text in pieces, and whether each is a block of code."""
    end = 0
    for fence in _FENCE.finditer(markdown):
        yield False, markdown[end : fence.start()]
        yield True, fence[0]
        end = fence.end()
    yield False, markdown[end:]


def file_page(path: str) -> str:
    """A page that holds a file, or lists the files of a folder."""
    head = f"---\nsearch: {{exclude: true}}\n---\n# {path}\n\n"
    if (ROOT / path).is_dir():
        inside = sorted(file.name for file in (ROOT / path).iterdir() if file.suffix in LANGUAGES)
        parts = [f"## {name}\n\n{_code(ROOT / path / name)}" for name in inside]
        return head + "\n\n".join(parts)
    return head + _code(ROOT / path)


def _code(file: Path) -> str:
    return f"````{LANGUAGES.get(file.suffix, 'text')}\n{file.read_text().rstrip()}\n````\n"


# The API reference and the commands


def api_pages() -> Iterator[tuple[str, str]]:
    """A page for every folder of sgrl/ with all its modules."""
    for folder in sorted({path.parent for path in (ROOT / "sgrl").rglob("*.py")}):
        name = ".".join(folder.relative_to(ROOT).parts)
        modules = sorted(path.stem for path in folder.glob("*.py") if path.stem != "__init__")
        parts = [f"::: {name}\n    options: {{heading_level: 1}}"]
        parts += [f"::: {name}.{module}" for module in modules]
        yield f"api/{name}.md", "\n\n".join(parts) + "\n"


@functools.cache
def package() -> griffe.Module:
    """All of sgrl, read and not imported."""
    loaded = griffe.load("sgrl", search_paths=[ROOT])
    assert isinstance(loaded, griffe.Module)
    return loaded


def source_of(name: str) -> str:
    """The code of a function, without its docstring; folded where it is long."""
    function = package()[name.removeprefix("sgrl.")]
    lines = list(function.lines)
    if function.docstring:
        first, last = (
            line - function.lineno
            for line in (function.docstring.lineno, function.docstring.endlineno)
        )
        del lines[first : last + 1]
    code = f"```python\n{textwrap.dedent(chr(10).join(lines))}\n```"
    return f'{"???" if len(lines) > 15 else "???+"} quote "{name}"\n' + textwrap.indent(
        code, "    "
    )


def undocumented_names() -> None:
    """Warn of public names that have no docstring."""
    for found in _without_docstring(package()):
        LOG.warning(f"{found.path} has no docstring")


def _without_docstring(of: griffe.Module | griffe.Class) -> Iterator[griffe.Object]:
    for name, member in of.members.items():
        if name.startswith("_") or isinstance(member, griffe.Alias | griffe.Attribute):
            continue
        if not member.has_docstring and not _overrides(name, of):
            yield member
        if isinstance(member, griffe.Module | griffe.Class):
            yield from _without_docstring(member)


def _overrides(name: str, of: griffe.Module | griffe.Class) -> bool:
    """Whether a base says what the method does; one outside of sgrl is taken to."""
    if not isinstance(of, griffe.Class):
        return False
    bases = of.mro()
    outside = len(of.bases) > len(of.resolved_bases) or any(
        len(base.bases) > len(base.resolved_bases) for base in bases
    )
    return outside or any(
        name in base.members and base.members[name].has_docstring for base in bases
    )


def commands_page() -> str:
    """All commands of `sgrl` and their options."""
    import typer
    from typer.cli import get_docs_for_click

    from sgrl.cli import app

    command = typer.main.get_command(app)
    with typer.Context(command) as context:
        text = get_docs_for_click(obj=command, ctx=context, name="sgrl", title="Commands")
    # A list of sentences that are cut short; each command has its own section.
    return re.sub(r"\*\*Commands\*\*:\n\n(\* .*\n)+", "", text)


def search_script() -> str:
    """Let the search work in pages opened as files, where browsers refuse to load workers."""
    import material

    (path,) = Path(material.__path__[0]).glob("templates/assets/javascripts/workers/search.*.js")
    source = re.sub(r"\n//# sourceMappingURL=.*", "", path.read_text())
    return (
        f"const searchWorker = {json.dumps(source)};\n"
        'if (location.protocol === "file:") {\n'
        "  const Plain = Worker;\n"
        "  window.Worker = function () {\n"
        "    return new Plain(URL.createObjectURL(new Blob([searchWorker])));\n"
        "  };\n"
        "}\n"
    )


# Tutorials


def notebook_pages(uri: str) -> Iterator[tuple[str, str | bytes]]:
    """The page of a notebook, and its images.

    Args:
        uri: of the notebook, below docs/.
    """
    source = ROOT / "docs" / uri
    executed = EXECUTED / source.name
    if executed.exists() and executed.stat().st_mtime > source.stat().st_mtime:
        source = executed
    parts: list[str] = []
    images: list[bytes] = []
    stem = uri.removesuffix(".ipynb")
    for cell in json.loads(source.read_text())["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(text)
            continue
        language = "bash" if text.startswith("%%bash\n") else "python"
        parts.append(f"```{language}\n{text.removeprefix('%%bash' + chr(10))}\n```")
        printed = ""
        for output in cell["outputs"]:
            data = output.get("data", {})
            table = re.search(r"<table.*</table>", "".join(data.get("text/html", "")), re.DOTALL)
            if "image/png" in data:
                parts.append(f"![]({posixpath.basename(stem)}_{len(images)}.png)")
                images.append(b64decode(data["image/png"]))
            elif table:
                parts.append(re.sub(r"<(table|tr)[^>]*>", r"<\1>", table[0]))
            elif output.get("name") != "stderr":
                printed += "".join(output.get("text", "")) or "".join(data.get("text/plain", ""))
        if printed:
            parts.append(f"```text\n{printed.rstrip()}\n```")
    yield f"{stem}.md", "\n\n".join(parts) + "\n"
    for number, image in enumerate(images):
        yield f"{stem}_{number}.png", image
