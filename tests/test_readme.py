"""Every Python example of the README runs, and every file it names exists."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)


def test_it_opens_with_the_two_commands() -> None:
    first = re.search(r"```\n(.*?)```", TEXT, flags=re.DOTALL)
    assert first is not None
    assert first.group(1).split("\n")[:2] == ["make quickstart", "make test"]


@pytest.mark.parametrize("code", [code for code in EXAMPLES if "<trial>" not in code])
def test_python_examples(code: str, ray_session: object) -> None:
    code = code.replace("num_envs_per_env_runner=20", "num_envs_per_env_runner=2").replace(
        '"labyrinth_escape", 20', '"labyrinth_escape", 2'
    )
    exec(compile(code, "README.md", "exec"), {})


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", TEXT)
    assert links
    for link in links:
        assert (ROOT / link).exists(), link
