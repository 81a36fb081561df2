"""Reports of sweeps, finished, damaged and in progress, in a real browser."""

import html
import json
import re
import shutil

import numpy as np
import pandas as pd
import pytest
import yaml
from browser import EXECUTABLE, Browser
from rich.table import Table
from rich.text import Text
from sweeps import CONFIG, METHODS, SPARSE, make_older
from typer.testing import CliRunner

from sgrl.analysis import pages, report
from sgrl.analysis.compare import compare
from sgrl.analysis.comparison import at_points, best_learning_rates, compare_methods, compare_pairs
from sgrl.analysis.curves import Curves, Line
from sgrl.analysis.figures import Figure
from sgrl.analysis.findings import pair_findings
from sgrl.analysis.outputs import write_expert_network
from sgrl.analysis.report import BOLD, read_section, write_report
from sgrl.analysis.style import method_styles
from sgrl.analysis.tables import cells
from sgrl.cli import app
from sgrl.nn.mixing import split_parameters
from sgrl.nn.registry import load_policy
from sgrl.results.archive import write_archive
from sgrl.results.metrics import AXES, read_metrics
from sgrl.results.runs import ResultsError, load_results
from sgrl.theory.expert_network import simulate, sweep_cells
from sgrl.tuning.experiment.load import load_experiment
from sgrl.tuning.sweep import run_sweep

EXPERIMENT = {
    "name": "small",
    "config": CONFIG | {"env_runners": {"num_envs_per_env_runner": {"grid": [4, 8]}}},
    "methods": {
        "sparsenet_sgprop": {
            "model": {"policy": "sparsenet", "num_input_neurons": 4, **SPARSE},
            "config": {"training": {"lr": {"grid": [0.001, 0.01]}}},
        },
        "gru": METHODS["gru"],
    },
    "seeds": [0, 1],
    "stop": {"training_iteration": 6},
}
FIGURES = [
    "success_rate",
    "performance_profiles",
    "scores_by_envs",
    "scores_by_lr",
    "mixing_weights",
    "mixing_weights_by_envs",
]

#: Those that the page draws itself.
DRAWN = ["success_rate", "mixing_weights_by_envs"]

in_browser = pytest.mark.skipif(EXECUTABLE is None, reason="no chromium on this machine")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, ray_session):
    """A real sweep of twelve trials."""
    folder = tmp_path_factory.mktemp("reports")
    (folder / "small.yaml").write_text(yaml.safe_dump(EXPERIMENT, sort_keys=False))
    return run_sweep(load_experiment(folder / "small.yaml"), folder)


@pytest.fixture
def sweep(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "small")


@pytest.fixture
def damaged(sweep):
    """A sweep with a torn metrics file, a failed, a NaN trial and one in progress."""
    torn, failed, diverged, going = load_results(sweep).trials["trial"][:4]
    metrics = sweep / torn / "metrics.csv"
    metrics.write_bytes(metrics.read_bytes()[:-5])
    for trial, state in (
        (failed, {"state": "failed", "reason": "RuntimeError: no <b>memory</b>"}),
        (diverged, {"state": "failed", "reason": "policy_loss is nan at iteration 6"}),
        (going, {"state": "running"}),
    ):
        (sweep / trial / "status.json").write_text(json.dumps(state))
    rows = (sweep / diverged / "metrics.csv").read_text().splitlines()
    values = rows[-1].split(",")
    loss = rows[0].split(",").index("policy_loss")
    (sweep / diverged / "metrics.csv").write_text(
        "\n".join([*rows[:-1], ",".join([*values[:loss], "nan", *values[loss + 1 :]])]) + "\n"
    )
    return sweep


def table(section, title):
    (found,) = (table for name, _, table in section.tables if name == title)
    header, rows = cells(found)
    return [dict(zip(header, row, strict=True)) for row in rows]


def pairs_of(folder):
    trials = load_results(folder).trials
    return compare_pairs(at_points(trials, best_learning_rates(compare_methods(trials))))


@in_browser
def test_the_page_in_a_browser(sweep, tmp_path):
    page = write_report([sweep])
    assert page == sweep / "report.html"
    alone = tmp_path / "alone" / "page.html"
    alone.parent.mkdir()
    page.rename(alone)  # away from its figures: the page is whole by itself
    with Browser() as browser:
        browser.cut_off()
        browser.open(alone)
        images = browser.evaluate(
            """Array.from(document.images).map(image => [
                image.alt, image.complete, image.naturalWidth, image.clientWidth,
                image.clientHeight, Boolean(image.closest(".curves"))])"""
        )
        assert len(images) == len(FIGURES)
        for _, complete, natural, width, height, drawn in images:
            assert complete
            assert natural > 200
            assert min(width, height) == 0 if drawn else min(width, height) > 200
            assert width <= 1.5 * natural + 1
        assert [image[-1] for image in images] == [name in DRAWN for name in FIGURES]
        text = browser.evaluate("document.body.innerText")
        wide = browser.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        links = browser.evaluate(
            "Array.from(document.links).filter(l => !l.download)"
            ".every(l => document.getElementById(l.hash.slice(1)))"
        )
        browser.screenshot(tmp_path / "page.png")
        assert browser.errors == []
        assert all(address.startswith(("file:", "data:")) for address in browser.requests)
        assert sum(address.startswith("file:") for address in browser.requests) == 1
    assert wide
    assert links
    assert (tmp_path / "page.png").stat().st_size > 50_000
    for said in ("12: 12 completed", "Methods against each other", "torch", "processor", "seed=1"):
        assert said in text
    assert "What is missing" not in text


@in_browser
def test_curves_answer_to_the_mouse(tmp_path):
    """Values under the pointer, zooming, and methods that are hidden; a picture without scripts."""
    places = pd.Index(np.arange(1.0, 91) * 20, name="env_steps")
    generator = np.random.default_rng(0)
    values = {n: pd.DataFrame(generator.random((90, n)), places) for n in (3, 6)}
    lines = [
        Line(f"method_{n}", values[n], style)
        for n, style in zip((3, 6), method_styles(["a", "b"]).values(), strict=True)
    ]
    curves = Curves("Success", "environment steps", "success rate", [("", lines)], (-0.02, 1.02))
    figure = Figure(curves.draw(tmp_path / "success.png"), "Success", curves)
    page = tmp_path / "page.html"
    page.write_text(pages.html_page([pages.Section("curves", figures=[figure])], page))
    for width, dark in ((1280, False), (390, True)):
        with Browser(width, dark=dark) as browser:
            browser.cut_off()
            browser.open(page)
            browser.evaluate("document.querySelector('figure').scrollIntoView()")
            left, top, right, bottom = browser.box(".u-over")
            assert right - left > 0.6 * width
            assert browser.evaluate("document.documentElement.scrollWidth") <= width
            (paper,) = browser.evaluate("[getComputedStyle(document.body).backgroundColor]")
            assert paper == ("rgb(22, 24, 27)" if dark else "rgb(255, 255, 255)")

            # In the middle, values of the 45th or 46th batch.
            def said(browser=browser):
                return browser.evaluate(
                    "Array.from(document.querySelectorAll('output'), o => o.value)"
                )

            assert said() == ["", ""]
            browser.mouse("mouseMoved", (left + right) / 2, (top + bottom) / 2)
            found = [re.findall(r"[\d.]+", text) for text in said()]
            assert [len(numbers) for numbers in found] == [2, 3]
            for n, numbers in zip((3, 6), found, strict=True):
                raw = values[n].mean(axis=1)
                smooth = raw.rolling(3, center=True).mean()
                error = values[n].rolling(3, center=True).mean().std(axis=1, ddof=1) / n**0.5
                expected = [
                    [smooth.iloc[i], *([error.iloc[i]] if n > 4 else []), raw.iloc[i]]
                    for i in (44, 45)
                ]
                assert any(
                    np.allclose([*map(float, numbers)], row, rtol=0.04, atol=2e-3)
                    for row in expected
                )

            look = "document.querySelector('.uplot canvas').toDataURL()"
            whole = browser.evaluate(look)
            y = (top + bottom) / 2
            browser.mouse("mousePressed", left + 20, y, 1)
            browser.mouse("mouseMoved", left + 60, y, 1)
            browser.mouse("mouseMoved", left + 120, y, 1)
            browser.mouse("mouseReleased", left + 120, y, 1)
            browser.wait_until(f"{look} !== {json.dumps(whole)}")
            browser.click(left + 60, y, 2)
            browser.wait_until(f"{look} === {json.dumps(whole)}")
            x, y, _, _ = browser.box(".legend button")
            browser.click(x + 4, y + 4)
            pressed = "document.querySelector('.legend button').ariaPressed"
            assert browser.evaluate(pressed) == "false"
            browser.wait_until(f"{look} !== {json.dumps(whole)}")
            browser.click(x + 4, y + 4)
            assert browser.evaluate(pressed) == "true"
            browser.wait_until(f"{look} === {json.dumps(whole)}")
            address = "document.querySelector('a[download]').href === document.images[0].src"
            assert browser.evaluate(address)
            assert browser.errors == []
            assert {r for r in browser.requests if not r.startswith("data:")} == {page.as_uri()}
    with Browser() as browser:
        browser.call("Emulation.setScriptExecutionDisabled", value=True)
        browser.open(page)
        assert browser.evaluate("document.images[0].clientWidth") > 600


def test_what_the_page_says(sweep):
    section = read_section(sweep)
    assert section.title == "small"
    assert section.problems == []
    assert [figure.path.stem for figure in section.figures] == FIGURES
    for figure in section.figures:
        assert figure.path.read_bytes()[:4] == b"\x89PNG"
        assert figure.path.with_suffix(".svg").is_file()
    facts = dict(section.facts)
    steps = 6 * 10 * 4 + 6 * 10 * 8
    last = [pd.read_csv(path).iloc[-1] for path in sweep.glob("*/metrics.csv")]
    assert sum(row["padded_env_steps"] for row in last) == 6 * steps
    taken = int(sum(row["env_steps"] for row in last))
    assert facts["environment steps"] == f"{taken:,} really taken"
    assert taken < 6 * steps
    assert re.match(r"\d{4}-\d\d-\d\dT", facts["started"])
    assert "torch 2." in facts["versions"]
    assert yaml.safe_load(section.configuration)["seeds"] == [0, 1]
    assert section.commands[-1] == f"sgrl sweep {sweep / 'experiment.yaml'} --name small_again"

    trials = load_results(sweep).trials
    rows = table(section, "Comparison")
    assert [(row["method"], row["envs"]) for row in rows] == [
        (method, envs) for method in ("sparsenet_sgprop", "gru") for envs in ("4", "8")
    ]
    gru = trials[(trials["method"] == "gru") & (trials["envs"] == 4)]["auc"]
    own = ", ".join(f"{score:.3f}" for score in gru)
    assert rows[2]["AUC"] == f"{gru.mean():.3f} (seeds {own})"
    assert rows[2]["AUC median"] == f"{gru.median():.3f}"
    assert rows[2]["trials"] == "2"
    sgprop = trials[(trials["method"] == "sparsenet_sgprop") & (trials["envs"] == 4)]
    best = sgprop.groupby("lr")["auc"].mean()
    assert rows[0]["lr"] == f"{best.index[best.argmax()]:g}"
    (pair,) = table(section, "Methods against each other")
    assert pair["trials"] == "4 and 4"
    ours, theirs = (trials[trials["method"] == name] for name in ("gru", "sparsenet_sgprop"))
    assert ours["parameters"].nunique() == theirs["parameters"].nunique() == 1
    (note,) = (note for title, note, _ in section.tables if title == "Methods against each other")
    sizes = [f"{trials['parameters'].iloc[0]:,.0f}", f"{ours['parameters'].iloc[0]:,.0f}"]
    assert note.splitlines()[1:] == [
        "Fewer than five seeds: no interval. 4 against 4 trials in 2 tasks cannot give a p below "
        "0.056.",
        f"Confounded by network size: sparsenet_sgprop {sizes[0]} parameters, gru {sizes[1]} "
        "parameters.",
    ]
    policy = load_policy(next(sweep.glob(f"{theirs['trial'].iloc[0]}/checkpoints/000006")))
    count = sum(weights.numel() for weights in split_parameters(policy)[0])
    assert trials["parameters"].iloc[0] == count
    assert count < sum(weights.numel() for weights in policy.parameters())  # has predictors
    assert len(table(section, "All learning rates")) == 6
    assert len(table(section, "Trials")) == 12


def test_results_of_an_older_version_are_read_as_they_would_be_now(sweep):
    """There env_steps counted padding; reading changes no file."""
    before = load_results(sweep)
    for path in sweep.glob("*/config.yaml"):
        make_older(path.parent)
    held = {path: path.read_bytes() for path in sweep.glob("*/metrics.csv")}
    after = load_results(sweep)
    pd.testing.assert_frame_equal(after.trials, before.trials, check_exact=True)
    pd.testing.assert_frame_equal(after.curves, before.curves, check_exact=True)
    assert after.problems == before.problems == ()
    for path in held:  # and line by line
        rows = after.curves[after.curves["trial"] == path.parent.name].drop(columns="trial")
        assert pd.DataFrame(read_metrics(path)).equals(rows.reset_index(drop=True))
    assert {path: path.read_bytes() for path in held} == held
    # Other algorithms counted what was taken.
    (path, *_) = sweep.glob("gru*envs=4*/config.yaml")
    path.write_text(path.read_text().replace("algorithm: Reinforce", "algorithm: PPO"))
    stock = load_results(sweep).curves
    stock = stock[stock["trial"] == path.parent.name]
    assert stock["env_steps"].tolist() == [40 * i for i in range(1, 7)]
    assert stock[["padded_env_steps", "episodes"]].isna().all(axis=None)


def test_axes(sweep):
    """Curves, AUC and steps to a threshold are all taken against the axis asked for."""
    for x in AXES:
        results = load_results(sweep, x=x)
        assert results.x == results.trials.attrs["x"] == x
        for trial in results.trials.to_dict("records"):
            rows = pd.read_csv(sweep / trial["trial"] / "metrics.csv")
            hours = rows["iteration_seconds"].cumsum() / 3600
            at = hours if x == "hours" else rows[x]
            rate = rows["success_rate"]
            area = np.trapezoid(rate, at) / (at.iloc[-1] - at.iloc[0])
            assert trial["auc"] == pytest.approx(area, rel=1e-12)
            curve = results.curve(trial["trial"], "success_rate")
            assert curve.index.tolist() == at.tolist()
            assert curve.tolist() == rate.tolist()
        section = read_section(sweep, threshold=-1, x=x)
        (needed,) = (
            [name for name in row if name.endswith(" to -1")]
            for row in table(section, "Comparison")[:1]
        )
        assert needed == [f"{AXES[x].unit} to -1"]
        svg = (sweep / "figures" / "success_rate.svg").read_text()
        assert f"<!-- {AXES[x].name} -->" in svg
        assert set(pd.read_csv(sweep / "comparison.csv")["x"]) == {x}
        assert set(pd.read_csv(sweep / "pairs.csv")["x"]) == {x}
    result = CliRunner().invoke(app, ["report", str(sweep), "--x", "episodes"])
    assert result.exit_code == 0, result.output
    assert "AUC: over episodes." in html.unescape((sweep / "report.html").read_text())
    result = CliRunner().invoke(app, ["compare", str(sweep), str(sweep), "--x", "hours"])
    assert "AUC: over hours of training." in result.output


def test_an_axis_that_a_trial_lacks_is_named(sweep):
    lacking, *others = sorted(path.parent for path in sweep.glob("*/metrics.csv"))

    def forget(trial):
        frame = pd.read_csv(trial / "metrics.csv")
        frame.assign(padded_env_steps=np.nan).to_csv(trial / "metrics.csv", index=False)

    forget(lacking)
    results = load_results(sweep, x="padded_env_steps")
    line = f"{lacking.name}: no padded_env_steps (only Reinforce pads); left out of curves and AUC"
    assert results.problems == (line,)
    row = results.trials.set_index("trial").loc[lacking.name]
    assert np.isnan(row["auc"])
    assert row["final_success_rate"] == pytest.approx(
        load_results(sweep).trials.set_index("trial").loc[lacking.name, "final_success_rate"]
    )
    read_section(sweep, x="padded_env_steps")
    for trial in others:
        forget(trial)
    for axis, said in (
        ("padded_env_steps", "no padded_env_steps (only Reinforce pads) in any trial"),
        ("step", "unknown axis 'step': give one of env_steps, padded_env_steps, iteration"),
    ):
        for command in (["report", str(sweep)], ["compare", str(sweep), str(sweep)]):
            result = CliRunner().invoke(app, [*command, "--x", axis])
            assert result.exit_code == 2
            (line,) = result.output.splitlines()
            assert said in line


def test_missing_and_damaged_trials_are_named(damaged):
    torn, failed, diverged, going = load_results(damaged).trials["trial"][:4]
    result = CliRunner().invoke(app, ["report", str(damaged)])
    assert result.exit_code == 0, result.output
    assert result.output.splitlines()[-1] == f"written: {damaged / 'report.html'}"
    page = (damaged / "report.html").read_text()
    listed = re.findall(r"<li>(.*?)</li>", page.partition("What was found")[0])
    assert [html.unescape(said) for said in listed] == list(load_results(damaged).problems)
    assert set(load_results(damaged).problems) == {
        f"{torn}: metrics.csv is damaged after iteration 5; lines dropped: 1",
        f"{torn}: completed, but metrics.csv ends at iteration 5 of 6",
        f"{failed}: failed at iteration 6 of 6: RuntimeError: no <b>memory</b>",
        f"{diverged}: failed at iteration 6 of 6: policy_loss is nan at iteration 6",
        f"{going}: interrupted at iteration 6 of 6",
    }
    assert "12: 9 completed, 2 failed, 1 interrupted" in page
    assert "no &lt;b&gt;memory&lt;/b&gt;" in page
    for trial, state in ((failed, "failed"), (diverged, "failed"), (going, "interrupted")):
        assert f"<tr><td>{trial}</td><td>{state}</td>" in page
    if EXECUTABLE:
        with Browser() as browser:
            browser.open(damaged / "report.html")
            assert browser.errors == []
            assert browser.evaluate("document.querySelectorAll('.problems li').length") == 5


def test_nothing_has_begun(sweep):
    for path in sweep.glob("*/metrics.csv"):
        path.unlink()
    for path in sweep.glob("*/status.json"):
        path.unlink()
    section = read_section(sweep)
    assert len(section.problems) == 12
    assert all("pending at iteration 0 of 6" in said for said in section.problems)
    assert {row["AUC"] for row in table(section, "Comparison")} == {"-"}
    assert "performance_profiles" not in [figure.path.stem for figure in section.figures]


def test_the_same_results_are_the_same_bytes(sweep, finished, tmp_path):
    other = shutil.copytree(finished, tmp_path / "other" / "small")
    names = ["comparison.csv", "pairs.csv", *(f"figures/{n}.svg" for n in FIGURES)]
    read_section(sweep)
    read_section(other)
    for name in names:
        assert (sweep / name).read_bytes() == (other / name).read_bytes()


def test_markdown_and_latex(sweep, tmp_path, monkeypatch):
    section = read_section(sweep)
    monkeypatch.setattr(report, "read_section", lambda *_: section)  # read once
    out = write_report([sweep], tmp_path / "deep" / "tables.md", "markdown")
    text = out.read_text()
    assert "| method | envs | lr | trials |" in text
    for link in re.findall(r"!\[.*?\]\((.*?)\)", text):
        assert (out.parent / link).is_file()
    path = write_report([sweep], format="latex")
    assert path == sweep / "report.tex"
    tex = path.read_text()
    assert tex.count("\\begin{tabular}") == tex.count("\\end{tabular}") == 4
    assert re.findall(r"\\label\{tab:(.*?)\}", tex) == [
        "small-comparison",
        "small-methods-against-each-other",
        "small-all-learning-rates",
        "small-trials",
    ]
    assert f"\\caption{{small, comparison. Mean $\\pm$ SEM over completed trials. {BOLD}}}" in tex
    # Bold is the highest mean in each of the two tasks, of the final score and the AUC.
    best = best_learning_rates(compare_methods(load_results(sweep).trials))
    means = [rows[n] for _, rows in best.groupby("envs") for n in ("final_success_rate", "auc")]
    highest = sum((scores == scores.max()).sum() for scores in means if scores.nunique() > 1)
    assert tex.partition("\\bottomrule")[0].count("textbf") == highest > 0
    assert "% small: No claim about sparsenet\_sgprop and gru: fewer than five seeds" not in tex
    assert "% small: No claim about sparsenet_sgprop and gru: fewer than five seeds (4 and 4" in tex
    assert "sparsenet\\_sgprop" in tex
    assert pages._latex_row(["a_b", "0.5 ± 0.1"]) == "a\\_b & 0.5 $\\pm$ 0.1 \\\\"
    assert all(line.startswith("%") for line in tex.splitlines() if "Confounded" in line)
    for line in re.findall(r"\\midrule\n(.*?)\\bottomrule", tex, flags=re.DOTALL)[0].splitlines():
        assert line.count(" & ") == 8
        assert line.endswith(" \\\\")


def test_several_folders_and_the_expert_network(sweep, tmp_path):
    experts = tmp_path / "experts"
    experts.mkdir()
    write_expert_network(simulate(sweep_cells([3, 4], [2], [1, 2]), trials=4), experts)
    seen = []
    out = write_report([experts, sweep], advance=seen.append)
    assert out == tmp_path / "report.html"
    assert seen == ["expert network", "small"]
    page = out.read_text()
    assert page.count("<img") == 3 + len(FIGURES)
    assert "2^(d-k)" in page
    assert "all experiments" not in page


def test_nothing_is_written_beside_what_is_published(sweep, tmp_path):
    """Neither an archive nor another folder changes, wherever the report goes."""
    published = tmp_path / "results" / "published"
    experts = published / "experts"
    experts.mkdir(parents=True)
    write_expert_network(simulate(sweep_cells([3, 4], [2], [1]), trials=4), experts)
    write_archive(sweep, published / "small")
    before = {path: path.read_bytes() for path in published.rglob("*") if path.is_file()}
    reports = tmp_path / "results" / "reports"
    for names, page in (
        (["experts"], "experts"),
        (["small"], "small"),
        (["small", "experts"], "report"),
    ):
        out = write_report([published / name for name in names])
        assert out == reports / f"{page}.html"
        assert "<img" in out.read_text()
    page = write_report([experts], tmp_path / "experts.html").read_text()
    # Figures of one panel, 3.7 inches wide, are not stretched to the page's width.
    assert re.findall(r'<img [^>]*width="(\d+)"', page) == ["533"] * 3
    assert before == {path: path.read_bytes() for path in published.rglob("*") if path.is_file()}


def test_several_sweeps_share_a_table_and_an_overlay(sweep, tmp_path):
    other = shutil.copytree(sweep, tmp_path / "other")
    out = write_report([sweep, other], tmp_path / "out" / "both.html")
    page = out.read_text()
    assert [html.unescape(title) for title in re.findall(r"<h1.*?>(.*?)</h1>", page)] == [
        "all experiments",
        "small",
        "small",
    ]
    assert (tmp_path / "out" / "both_files" / "success_rate.svg").is_file()
    together = page[page.index("<h1") :].split("<h1")[1]
    (data,) = re.findall(r'<script type="application/json">(.*?)</script>', together)
    panels = json.loads(data)["panels"]
    assert [panel["title"] for panel in panels] == ["envs = 4", "envs = 8"]
    results = load_results(sweep)
    for panel, envs in zip(panels, (4, 8), strict=True):
        names = {line["name"].partition(" (")[0].partition(",")[0] for line in panel["lines"]}
        assert names == {
            f"{place}: {method}"
            for place in ("small", "other")
            for method in ("sparsenet_sgprop", "gru")
        }
        assert ["dash" in line for line in panel["lines"]] == [
            line["name"].startswith("other") for line in panel["lines"]
        ]
        trials = results.trials[
            (results.trials["method"] == "gru") & (results.trials["envs"] == envs)
        ]
        mean = results.curves_of(trials, "success_rate").mean(axis=1)
        for line in panel["lines"]:
            if "gru" in line["name"]:
                assert line["value"] == pytest.approx(mean.to_numpy(), rel=1e-3)
                assert line["x"] == pytest.approx(mean.index.to_numpy())


def test_long_tables_break_over_pages_in_latex(tmp_path):
    table = Table("a_b", "c", caption="Ends in 50%.")
    for row in range(pages.MOST_ROWS + 1):
        table.add_row(str(row), Text("1.0 ± 0.1", style="bold" if row == 3 else ""))
    tex = pages.latex_page([pages.Section("long", tables=[("All", "", table)])], tmp_path)
    assert tex.splitlines()[2:9] == [
        "\\begin{longtable}{lr}",
        "\\caption{long, all. Ends in 50\\%.}",
        "\\label{tab:long-all} \\\\",
        "\\toprule",
        "a\\_b & c \\\\",
        "\\midrule",
        "\\endhead",
    ]
    assert tex.count("\\textbf") == 1
    assert "3 & \\textbf{1.0 $\\pm$ 0.1} \\\\" in tex
    assert "tabular" not in tex


PAIRS = ["ab", "ac", "ad", "bc", "bd", "cd"]


def test_findings_claim_no_more_than_the_numbers():
    low = np.linspace(0.1, 0.2, 9)
    frame = pd.DataFrame(
        {
            "method": np.repeat(["a", "b", "c", "d"], [9, 9, 9, 3]),
            "state": "completed",
            "auc": np.concatenate([low, low + 0.4, low + 0.004, [0.0, 0.1, 0.9]]),
        }
    )
    frame.attrs = {"swept": []}
    said = dict(zip(PAIRS, pair_findings(compare_pairs(frame)), strict=True))
    assert said["ab"].startswith("b learns better than a: p (Holm) = ")
    assert (
        "mean AUC +0.400, a run of b is the better one with probability 1.00 (95% interval"
        in said["ab"]
    )
    assert said["bc"].startswith("b learns better than c: ")
    assert not any(word in said["ac"] for word in ("better than", "No claim"))
    assert said["ac"].startswith(("Cannot tell a and c apart: ", "a and c: no difference of "))
    assert "which includes even chances" in said["ac"]
    for pair in ("ad", "bd", "cd"):
        trials = "fewer than five seeds (9 and 3 trials)"
        assert said[pair] == f"No claim about {pair[0]} and {pair[1]}: {trials}."
    assert all(sentence.endswith(".") for sentence in said.values())


def test_compare(sweep, finished, tmp_path):
    settings = yaml.safe_load((sweep / "experiment.yaml").read_text())
    settings["config"]["training"]["gamma"] = 0.5
    (sweep / "experiment.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    for path in sweep.glob("*/metrics.csv"):
        frame = pd.read_csv(path)
        frame["success_rate"] = frame["success_rate"] / 2 - 1
        frame.to_csv(path, index=False)
    frame, tables = compare(finished, sweep)
    assert list(frame["method"]) == ["sparsenet_sgprop", "gru"]
    assert list(frame["probability"]) == [1, 1]
    assert list(frame["tasks"]) == [2, 2]
    assert frame["second_auc"].to_numpy() == pytest.approx(frame["first_auc"].to_numpy() / 2 - 1)
    differing, shown = tables
    assert cells(differing[2])[1] == [["config.training.gamma", "0.95", "0.5"]]
    assert [row[0] for row in cells(shown[2])[1]] == ["sparsenet_sgprop", "gru"]
    same, tables = compare(finished, finished)
    assert list(same["probability"]) == [0.5, 0.5]
    assert np.allclose(same["p_holm"], 1)
    assert len(tables) == 1

    alone, tables = compare(finished, plan=0.2)
    assert alone.drop(columns="seeds_needed").equals(pd.DataFrame(pairs_of(finished)))
    assert [title for title, _, _ in tables] == ["Comparison", "Methods against each other"]
    (row,) = cells(tables[1][2])[1]
    needed = alone["seeds_needed"][0]
    assert row[8:9] == ["more than 1000" if needed == np.inf else f"{needed:.0f}"]
    assert "true difference of 0.2 is found with power 0.8" in tables[1][1]

    out = tmp_path / "compared.csv"
    result = CliRunner().invoke(app, ["compare", str(finished), str(sweep), "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert "config.training.gamma" in result.output
    pd.testing.assert_frame_equal(pd.read_csv(out), frame, check_dtype=False)


def test_what_cannot_be_reported(sweep, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for arguments, said in (
        (["report", "nowhere"], "nowhere is no folder: give one such as results/quickstart"),
        (["report", str(tmp_path / "empty")], "holds no results"),
        (["report", str(sweep), "--format", "pdf"], "unknown format 'pdf'"),
        (["report", str(sweep), "--out", str(tmp_path / "file" / "x.html")], "File exists"),
        (["compare", str(sweep), str(tmp_path / "empty")], "holds no results"),
        (["compare", str(sweep), "--plan", "0"], "a plan is for a difference above 0, got 0"),
        (["compare", str(sweep), str(sweep), "--out", str(tmp_path / "no" / "x.csv")], "No such"),
    ):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 2
        assert said in result.output
        assert len(result.output.splitlines()[-1:]) == 1
        assert "Traceback" not in result.output
    for status in sweep.glob("*/status.json"):
        status.write_text('{"state": "running"}')
    with pytest.raises(ResultsError, match="no method with completed trials"):
        compare(sweep, sweep)
    with pytest.raises(ResultsError, match="no two methods with completed trials"):
        compare(sweep)
