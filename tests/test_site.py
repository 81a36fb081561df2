"""The documentation site: it builds strictly, and a browser opens every page of it."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from browser import EXECUTABLE, Browser

ROOT = Path(__file__).parents[1]


def build(folder: Path, site: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "-d", site],
        cwd=folder,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    built = build(ROOT, folder)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


@pytest.mark.skipif(EXECUTABLE is None, reason="no chromium on this machine")
def test_every_page_in_a_browser(site: Path) -> None:
    """No page logs an error, asks a host for anything or is wider than a screen or a phone."""
    pages = sorted(path for path in site.rglob("*.html") if path.name != "404.html")
    assert len(pages) >= 40
    phone = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": False}
    with Browser() as browser:
        for page in pages:
            browser.errors.clear()
            browser.requests.clear()
            for size in (browser.size, phone):
                browser.call("Emulation.setDeviceMetricsOverride", **(phone | size))
                if size is not phone:
                    browser.open(page)
                wide = browser.evaluate("document.documentElement.scrollWidth - window.innerWidth")
                assert wide <= 0, (page, size)
            assert browser.errors == [], page
            local = ("file:", "data:", "blob:")
            assert [asked for asked in browser.requests if not asked.startswith(local)] == [], page
        browser.open(site / "index.html")
        browser.evaluate("document.querySelector('.md-search__input').focus() || 0")
        browser.call("Input.insertText", text="temporal_schedule")
        found = "document.querySelectorAll('.md-search-result__item').length"
        for _ in range(300):
            if browser.evaluate(found):
                break
            time.sleep(0.1)
        assert browser.evaluate(found)
        assert browser.errors == []


def test_what_fails_the_build(tmp_path: Path) -> None:
    """A link that leads nowhere, an unknown name and a public name without a docstring."""
    for name in ("docs", "sgrl", "cluster", "benchmarks"):
        (tmp_path / name).mkdir()
    for name in ("mkdocs.yml", "docs/site_pages.py", "docs/site.css", "sgrl/__init__.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "sgrl" / "parts.py").write_text(
        '"""Two parts."""\n\n\ndef bare() -> int:\n    return 1\n\n\n'
        'def said() -> int:\n    """Return one."""\n    return 1\n'
    )
    outside = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")
    for name in (*outside, "cluster/README.md", "benchmarks/README.md"):
        (tmp_path / name).write_text("# Empty\n")
    (tmp_path / "docs" / "faults.md").write_text(
        "# Faults\n[a](nowhere.md) [b](../sgrl/parts.py#nothing) [c](#no) [d](../README.md)\n"
        "[e](../sgrl/parts.py#said) [f](../mkdocs.yml)\n"
    )
    built = build(tmp_path, tmp_path / "site")
    said = built.stdout + built.stderr
    assert built.returncode == 1
    assert "sgrl.parts.bare has no docstring" in said
    assert "'faults.md' contains a link 'nowhere.md'" in said
    assert "'sgrl.parts.nothing'" in said
    assert "'faults.md' contains a link '#no'" in said
    found = [line for line in said.splitlines() if line.startswith("WARNING")]
    of_the_page = [line for line in found if "in the 'nav'" not in line]
    assert len(of_the_page) == 4, of_the_page
