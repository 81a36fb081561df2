"""What can be set in an experiment is listed, from where it is declared."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

from sgrl.analysis.comparison import compare_methods, compare_pairs
from sgrl.cli import app
from sgrl.envs.registry import ENVIRONMENTS
from sgrl.nn.mixing_rules import MIXING_RULES
from sgrl.nn.registry import POLICIES
from sgrl.results.columns import COMPARISON, METRICS, PAIRS, SUMMARY
from sgrl.results.locations import reading
from sgrl.results.metrics import columns_of
from sgrl.results.runs import load_results
from sgrl.tuning.experiment.file import ExperimentFile
from sgrl.tuning.experiment.load import TRAINING
from sgrl.tuning.experiment.settings import all_settings, described

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


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


@pytest.mark.parametrize("name", ["settings", "columns"])
def test_the_page_is_up_to_date(name: str, tmp_path: Path) -> None:
    """`sgrl list NAME --write PAGE` would change nothing, with the page that says so."""
    (written,) = (path for path in DOCS.glob("*.md") if f"<!-- {name} -->" in path.read_text())
    command = f".venv/bin/sgrl list {name} --write docs/{written.name}\n"
    assert command in written.read_text()
    page = tmp_path / written.name
    shutil.copy(written, page)
    assert listed(name, "--write", str(page)) == f"written: {page}\n"
    assert page.read_text() == written.read_text()


def test_every_environment_variable_is_documented() -> None:
    code = "".join(path.read_text() for path in (ROOT / "sgrl").rglob("*.py"))
    assert set(re.findall(r"SGRL_\w+", code)) == set(
        re.findall(r"SGRL_\w+", (DOCS / "settings.md").read_text())
    )


def test_every_column_is_described() -> None:
    """The tables of columns have those that the files have, in their order."""
    assert columns_of(dict.fromkeys(METRICS, 0.0)) == tuple(METRICS)
    with reading(ROOT / "results" / "published" / "escape_confirmation") as folder:
        trials = load_results(folder).trials
    summary = pd.read_csv(ROOT / "results/published/escape_confirmation/summary.csv").columns
    assert [name.replace("success_rate", "MEASURE") for name in summary] == [
        name for name in SUMMARY if name != "..."
    ]
    comparison = [
        name.replace("final_success_rate_", "SCORE_").replace("success_rate", "MEASURE")
        for name in compare_methods(trials)
        if not name.startswith("auc_")
    ]
    assert sorted(comparison) == sorted(COMPARISON)
    few = trials[trials["seed"] < 60_000]
    assert list(compare_pairs(few, plan=0.5)) == list(PAIRS)


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
    line = r"\n  hidden_size +a whole number; default 256\. Length of the core's output"
    assert re.search(line, said)
    assert "brings each sample" in listed("rules", "raw")
    found = json.loads(listed("settings", "hidden_size", "--json"))
    assert list(found) == [f"policy {name}" for name in ("gru", "lstm", "mlp", "dense")]
    assert found["policy dense"][0]["default"] == "745"
    assert list(json.loads(listed("settings", "stop", "--json"))) == ["stop"]
    assert json.loads(listed("settings", "--json")).keys() == all_settings().keys()


def test_experiments_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They run from any folder, and a file of the name that is there comes first."""
    monkeypatch.chdir(tmp_path)
    files = sorted((ROOT / "tune_configs").glob("*.yaml"))
    assert [line.split()[0] for line in listed("experiments").splitlines()] == [
        file.stem for file in files
    ]
    text = (ROOT / "tune_configs" / "quickstart.yaml").read_text()
    assert listed("experiments", "quickstart") == text
    dry = ["sweep", "quickstart", "--dry-run", "--no-estimate"]
    said = CliRunner().invoke(app, [*dry, "--seeds", "3", "--methods", "gru"])
    assert (said.exit_code, said.output) == (0, "quickstart: 1 trials\n  gru_seed=3\n")
    Path("quickstart").write_text("")
    assert "quickstart: empty" in CliRunner().invoke(app, dry).stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["experiments", "quikstart"], "did you mean 'quickstart'?"),
        (["polices"], "no such list: 'polices'; did you mean 'policies'?"),
        (["policies", "grru"], "no such name among the policies: 'grru'; did you mean 'gru'?"),
        (["settings", "hiden_size"], "did you mean 'hidden_size'?"),
    ],
)
def test_unknown_names(words: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["list", *words])
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr
