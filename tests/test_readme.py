"""Every command and example of README and docs runs, cut down where it would take long."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from sgrl.cli import app

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()
#: Read from the first to the last: later ones use what earlier ones leave in results/.
IN_ORDER = (
    "README.md",
    *(f"docs/{name}.md" for name in ("getting_started", "experiments", "results")),
)
PAGES = [(ROOT / name).read_text() for name in IN_ORDER]
PYTHON = [code for page in PAGES for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL)]
COMMANDS = [
    line for page in PAGES for line in page.split("\n") if line.startswith(".venv/bin/sgrl ")
]
CONFIGS = sorted(path.name for path in (ROOT / "tune_configs").glob("*.yaml"))

#: What a full experiment is cut down to.
SMALL = {
    "stop.training_iteration": "2",
    "seeds": "[0]",
    "concurrency": "1",
    "config.training.lr": "1e-3",
    "config.env_runners.num_envs_per_env_runner": "2",
    "config.environment.env_config.episode_length": "6",
}
SMALL_SUITE = SMALL | {"config.environment.env": "{grid: [popgym-ConcentrationEasy-v0]}"}
SMALL_BANDIT = {
    "stop.training_iteration": "2",
    "seeds": "[0]",
    "concurrency": "1",
    "config.training.lr": "1e-3",
    "config.training.total_updates": "3",
    "config.training.total_iterations": "2",
    "config.env_runners.num_envs_per_env_runner": "4",
    "config.environment.env_config.p_flip": "0.3",
    "config.evaluation.evaluation_duration": "20",
    "config.evaluation.evaluation_config.num_envs_per_env_runner": "20",
}
SMALL_PPO = {
    "stop.training_iteration": "2",
    "seeds": "[0]",
    "concurrency": "1",
    "config.training.train_batch_size_per_learner": "12",
    "config.training.minibatch_size": "7",
    "config.training.num_epochs": "1",
    "config.env_runners.num_envs_per_env_runner": "2",
    "config.environment.env_config.episode_length": "6",
}


def is_bandit(config: str) -> bool:
    return "mnist" in config or "bandit" in config


def cut_down(arguments: list[str]) -> list[str]:
    if arguments[0] == "resume":
        text = re.sub(r"--iterations \d+", "--iterations 3", shlex.join(arguments))
        return shlex.split(re.sub(r"seeds=(\d+)\.\.\d+", r"seeds=\1", text))
    small = SMALL_BANDIT if is_bandit(arguments[1]) else SMALL
    if "mnist_parents" in arguments[1]:
        methods = ("sparse_sgprop", "sparse_sgprop_fixed", "sparse_backprop")
        small = small | {f"methods.{name}.model.num_parents": "2" for name in methods}
    if "neuron_noise" in arguments[1]:
        name = "sparse" if is_bandit(arguments[1]) else "sparsenet"
        methods = (f"{name}_sgprop", f"{name}_backprop")
        small = small | {f"methods.{name}.model.neuron_noise": "0.1" for name in methods}
    if "search" in arguments[1]:
        small = small | {"search.num_samples": "2"}
    if "popgym" in arguments[1]:
        small = SMALL_SUITE
    if "ppo" in arguments[1]:
        small = SMALL_PPO
    return arguments + [word for item in small.items() for word in ("--set", "=".join(item))]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty project folder with the experiments, and narrow enough lines."""
    shutil.copytree(ROOT / "tune_configs", tmp_path / "tune_configs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(arguments: list[str]) -> str:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return result.output


def test_it_opens_with_the_two_commands() -> None:
    first = re.search(r"```\n(.*?)```", TEXT, flags=re.DOTALL)
    assert first is not None
    assert first.group(1).split("\n")[:2] == ["make quickstart", "make test"]
    makefile = (ROOT / "Makefile").read_text()
    assert all(f"\n{target}:" in makefile for target in ("quickstart", "test"))


def test_commands_and_python_examples(folder: Path, ray_session: None) -> None:
    assert len(COMMANDS) >= 25
    assert len(PYTHON) >= 5
    # `make quickstart` comes before all of them.
    run(cut_down(["sweep", "tune_configs/quickstart.yaml"]))
    checkpoints = folder / "results/quickstart/sparsenet_sgprop_seed=0/checkpoints"
    (checkpoints / "000002").rename(checkpoints / "000100")
    for command in COMMANDS:
        arguments = shlex.split(command)[1:]
        if "--dry-run" in arguments or arguments[0] == "data":
            run([*arguments, *(["--no-estimate"] if arguments[0] == "sweep" else [])])
            continue
        if arguments[0] in ("evaluate", "render"):
            shutil.copytree(checkpoints / "000100", checkpoints / "moved", dirs_exist_ok=True)
            arguments[1] = str(checkpoints / "moved")  # the manifest knows its iteration
        run(cut_down(arguments) if arguments[0] in ("sweep", "resume") else arguments)
    for code in PYTHON:
        small = code.replace("num_envs_per_env_runner=20", "num_envs_per_env_runner=2")
        small = small.replace('"labyrinth_escape", 20', '"labyrinth_escape", 2')
        exec(compile(small, "a page", "exec"), {})


@pytest.mark.parametrize("config", CONFIGS)
def test_experiments(config: str, folder: Path, ray_session: None) -> None:
    """Every shipped experiment runs to its table and figure."""
    output = run(cut_down(["sweep", f"tune_configs/{config}"]))
    results = folder / "results" / Path(config).stem
    measure = "eval_reward" if is_bandit(config) else "success_rate"
    measure = "episode_return_mean" if re.match("ppo|popgym", config) else measure
    for name in ("experiment.yaml", "summary.csv", "comparison.csv", f"figures/{measure}.png"):
        assert (results / name).is_file()
    methods = yaml.safe_load((results / "experiment.yaml").read_text())["methods"]
    assert len(methods) >= 2
    for method in methods:
        assert method in output


@pytest.mark.parametrize("config", CONFIGS)
def test_commands_in_experiments(config: str, folder: Path) -> None:
    """The commands at the head of each experiment are valid."""
    text = (ROOT / "tune_configs" / config).read_text()
    commands = re.findall(r"^#   (sgrl sweep .*)$", text, flags=re.MULTILINE)
    assert commands
    for command in commands:
        arguments = shlex.split(command)[1:]
        run([*arguments, "--dry-run", "--no-estimate"])


@pytest.mark.parametrize(
    ("page", "least"),
    [("learning.md", 4), ("mixing_rules.md", 2), ("predictors.md", 2), ("study.md", 4)],
)
def test_commands_of_the_results(page: str, least: int, folder: Path) -> None:
    """The sweeps behind these pages are valid; that they run is tested above."""
    text = (ROOT / "docs" / page).read_text()
    commands = re.findall(r"^\.venv/bin/sgrl (sweep .*)$", text, flags=re.MULTILINE)
    commands += re.findall(r"`sgrl (sweep [^`]*)`", text)
    assert len(commands) >= least
    (folder / "results").mkdir()
    (folder / "results" / "published").symlink_to(ROOT / "results" / "published")
    for command in commands:
        run([*shlex.split(command), "--dry-run", "--no-estimate"])


def test_commands_that_extend(folder: Path, ray_session: None) -> None:
    """Those of docs/faults.md, in their order."""
    text = (ROOT / "docs" / "faults.md").read_text()
    commands = re.findall(r"^\.venv/bin/sgrl (.*)$", text, flags=re.MULTILINE)
    assert len(commands) >= 4
    one = ["--set", "methods={gru: {model: {policy: gru, hidden_size: 8}}}"]
    for command in commands:
        arguments = cut_down(shlex.split(command))
        run([*arguments, *(one if arguments[0] == "sweep" else [])])
    summary = (folder / "results" / "entropy" / "summary.csv").read_text().splitlines()
    assert len(summary) == 1 + 4 * 2
    assert all(",completed,3," in line for line in summary[1:])


def test_rllib(folder: Path, ray_session: None) -> None:
    """The commands and scripts of docs/rllib.md."""
    text = (ROOT / "docs" / "rllib.md").read_text()
    commands = re.findall(r"^\.venv/bin/sgrl (.*)$", text, flags=re.MULTILINE)
    assert len(commands) >= 4
    for command in commands:
        arguments = shlex.split(command)
        if "--name" not in arguments:  # it is among the experiments tested above
            continue
        length = f", max_seq_len: {4 if 'truncated' in arguments else 7}"
        # Reinforce learns from whole episodes.
        length = length if "ppo_memory" in arguments[1] else ""
        model = f"{{policy: gru, hidden_size: 8{length}}}"
        last = ["--set", f"methods={{gru: {{model: {model}}}}}"]
        if "appo" in arguments:
            last += ["--set", "config.training.minibatch_size=null"]
        run([*cut_down(arguments), *last])
    metrics = (folder / "results/truncated/gru_seed=0/metrics.csv").read_text().splitlines()
    assert "eval_return,eval_greedy_success_rate,eval_greedy_return" in metrics[0]
    scripts = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(scripts) == 2
    for code in scripts:
        small = code.replace("num_envs_per_env_runner=20", "num_envs_per_env_runner=2")
        small = small.replace('"maze_dims": [6, 6]', '"episode_length": 12')
        small = small.replace("1600", "130")
        small = small.replace("lr=5e-4,", "lr=5e-4, num_epochs=1,")
        exec(compile(small, "docs/rllib.md", "exec"), {})


def test_the_findings_are_those_of_the_study() -> None:
    """Every probability with its interval, and every score, stands in the page that it is from."""
    text, study, learned = (
        " ".join(page.split())
        for page in (
            TEXT,
            *((ROOT / "docs" / f"{name}.md").read_text() for name in ("study", "learning")),
        )
    )
    chances = re.findall(r"0\.\d\d \([\d.]+ to [\d.]+\)|1\.00 \([\d.]+ to [\d.]+\)", text)
    assert len(chances) == 6
    for found in (*chances, "91.0% of 468 cells", "185 seeds"):
        assert found in text
        assert found in study
    scores = re.findall(r"0\.\d+ ± 0\.\d+", text)
    assert len(scores) == 2
    assert all(score in learned for score in scores)


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", TEXT)
    assert links
    for link in links:
        assert (ROOT / link).exists(), link
