"""What can be set in an experiment is listed, from where it is declared."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sgrl.cli import app
from sgrl.envs.registry import ENVIRONMENTS
from sgrl.markdown import write_tables
from sgrl.nn.mixing_rules import MIXING_RULES
from sgrl.nn.registry import POLICIES
from sgrl.tuning.experiment.file import ExperimentFile
from sgrl.tuning.experiment.load import TRAINING
from sgrl.tuning.experiment.settings import all_settings, described, settings_page

PAGE = Path(__file__).parent.parent / "docs" / "settings.md"


def listed(*words: str) -> str:
    result = CliRunner().invoke(app, ["list", *words])
    assert result.exit_code == 0, result.output
    return result.output


def test_every_setting_is_listed_and_described() -> None:
    groups = all_settings()
    names = {group: [setting.name for setting in settings] for group, settings in groups.items()}
    assert names["experiment"] == list(ExperimentFile.model_fields)
    assert set(TRAINING) <= set(names["config.training"])
    for name, policy in POLICIES.items():
        assert names[f"policy {name}"] == [f.name for f in dataclasses.fields(policy.Settings)]
    for name, entry in ENVIRONMENTS.items():
        assert names[f"env {name}"] == [*entry.defaults, "vectorized"]
    for group, settings in groups.items():
        for setting in settings:
            assert setting.line, f"{group}: {setting.name} is not described"
            assert "cannot hold" not in setting.type
    (lr,) = [setting for setting in groups["config.training"] if setting.name == "lr"]
    assert (lr.type, lr.default) == ("a number or a list or null", "0.002")


def test_docstrings_are_read() -> None:
    def function() -> None:
        """Do it.

        Args:
            first: what is first. And more of it,
                in two lines.
            second, third: what is
                second: or third.

        Returns:
            fourth: not this.
        """

    assert described(function) == {
        "first": "What is first.",
        "second": "What is second: or third.",
        "third": "What is second: or third.",
    }


def test_the_page_is_up_to_date(tmp_path: Path) -> None:
    """`sgrl list settings --write docs/settings.md` would change nothing."""
    page = tmp_path / "settings.md"
    shutil.copy(PAGE, page)
    assert write_tables(page, lambda mark: settings_page()) == 1
    assert page.read_text() == PAGE.read_text()


@pytest.mark.parametrize(
    ("kind", "names"),
    [("envs", ENVIRONMENTS), ("policies", POLICIES), ("rules", MIXING_RULES)],
)
def test_names(kind: str, names: dict) -> None:
    assert [row["name"] for row in json.loads(listed(kind, "--json"))] == list(names)
    lines = listed(kind).splitlines()
    assert [line.split()[0] for line in lines][: len(names)] == list(names)


def test_one_name() -> None:
    said = listed("policies", "gru")
    assert said.startswith("Dense recurrent baseline")
    assert "\n  hidden_size     a whole number; default 256. Length of the core's output" in said
    assert "brings each sample" in listed("rules", "raw")
    found = json.loads(listed("settings", "hidden_size", "--json"))
    assert list(found) == [f"policy {name}" for name in ("gru", "lstm", "mlp", "dense")]
    assert found["policy dense"][0]["default"] == "745"
    assert list(json.loads(listed("settings", "stop", "--json"))) == ["stop"]
    assert json.loads(listed("settings", "--json")).keys() == all_settings().keys()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["polices"], "no such list: 'polices'; did you mean 'policies'?"),
        (["policies", "grru"], "no such name among the policies: 'grru'; did you mean 'gru'?"),
        (["settings", "hiden_size"], "did you mean 'hidden_size'?"),
    ],
)
def test_unknown_names(words: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["list", *words])
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr
