"""What predictions could save: equal to plain least squares and to the probe's own sums."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from sgrl.cli import app
from sgrl.nn.mixing import split_parameters
from sgrl.nn.registry import make_policy, save_policy
from sgrl.theory.estimation import mixing_error, optimal_mixing_weight, total_variance
from sgrl.theory.probe import bounds
from sgrl.theory.probe.bounds import fit, regression_sums, sums_of_test
from sgrl.theory.probe.gradients import Group, Seen, parameter_gradients
from sgrl.theory.probe.labyrinth import Episodes, Loss, Shard, labyrinth_sums
from sgrl.theory.probe.sufficiency import PENALTIES
from sgrl.theory.probe.told import MazeTask, Told

TRAINED_BATCH, LENGTH = 3, 5
TINY = {
    "feature_size": 5,
    "embedding_size": 3,
    "num_neurons": 5,
    "neuron_size": 2,
    "num_parents": 2,
    "num_slots": 2,
    "num_input_neurons": 2,
    "actor_slots": 2,
}


class Made:
    """Two neurons of size 2 in samples of 3 steps whose gradients are a known function of what they
    see, and as much noise again."""

    def __init__(self, noise: float = 1.0) -> None:
        self.noise = noise
        generator = torch.Generator().manual_seed(0)
        self.coefficients = torch.randn(2, 8, 2, generator=generator, dtype=torch.float64)

    def told(self, shard: int, groups: Sequence[Group]) -> Iterator[list[Told]]:
        generator = torch.Generator().manual_seed(100 + shard)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        for first in range(0, 40, 8):
            attention, slots = normal(2, 24, 2).softmax(2), normal(2, 24, 2, 2).tanh()
            output = (attention.unsqueeze(3) * slots).sum(2)
            seen = Seen(normal(2, 24, 3), attention, slots, output, 3**-0.5)
            nothing = torch.zeros(3, 2, 8, 2, dtype=torch.float64)
            valid = torch.rand(3, 8, generator=generator) < 0.8
            told = Told(first + torch.arange(8), seen, nothing, nothing, nothing + 1, valid)
            signal = (told.features() @ self.coefficients).unflatten(1, (3, 8)).transpose(0, 1)
            gradient = signal + self.noise * signal.std() * normal(3, 2, 8, 2)
            yield [told._replace(backprop=torch.where(valid.view(3, 1, 8, 1), gradient, 0.0))]


GROUPS = [Group("all", torch.arange(2), torch.ones(2))]


def test_fits_are_least_squares() -> None:
    """Of the first m samples, with the penalty that does best on every fourth of them."""
    task, cuts = Made(), [10, 50, 80]
    sums = [regression_sums(task, shard, GROUPS, 40 * shard, cuts) for shard in range(2)]
    fits = fit(sums, len(cuts), 0)
    every = [told for shard in range(2) for [told] in task.told(shard, GROUPS)]
    for m, coefficients in zip(cuts, fits, strict=True):
        for neuron in range(2):
            x, y, held_out = [], [], []
            for place, told in enumerate(every):
                numbers = 40 * (place // 5) + told.which
                used = (told.valid & (numbers < m)).flatten()
                x.append(told.features()[neuron, used])
                y.append(told.backprop[:, neuron].flatten(0, 1)[used])
                held_out.append(((numbers % 4) == 3).repeat(3)[used])
            features, targets, left = (torch.cat(part) for part in (x, y, held_out))

            def ridge(a: Tensor, b: Tensor, penalty: float) -> Tensor:
                added = penalty * a.square().sum() / a.shape[1] * torch.eye(a.shape[1]).double()
                return torch.linalg.solve(a.T @ a + added, a.T @ b)

            losses = [
                (targets[left] - features[left] @ ridge(features[~left], targets[~left], p))
                .square()
                .sum()
                for p in PENALTIES
            ]
            best = ridge(features, targets, PENALTIES[int(np.argmin(losses))])
            torch.testing.assert_close(coefficients[neuron], best, rtol=1e-8, atol=1e-10)


def test_numbers_are_those_of_all_gradients() -> None:
    """Against the parameter gradients of all samples, formed one by one."""
    task, n = Made(), 7
    coefficients = 0.5 * task.coefficients
    tested = sums_of_test(task, 3, GROUPS, [[coefficients]], [1])
    kinds: list[list[list[Tensor]]] = [[[], []], [[], []]]
    residual = total = 0.0
    for [told] in task.told(3, GROUPS):
        guess = (told.features() @ coefficients).unflatten(1, (3, 8)).transpose(0, 1)
        guess = torch.where(told.valid.view(3, 1, 8, 1), guess, 0.0)
        residual += (told.backprop - guess).square().sum()
        total += told.backprop.square().sum()
        for kind, feedback in enumerate((told.backprop, guess)):
            for sample in range(8):
                by_step = []
                for t in range(3):
                    place = slice(8 * t + sample, 8 * t + sample + 1)
                    seen = Seen(*(part[:, place] for part in told.seen[:4]), told.seen.scale)
                    one = feedback[t, :, sample : sample + 1]
                    by_step.append(parameter_gradients(seen, one, torch.ones(1).double()))
                kinds[0][kind].append(sum(by_step))
                kinds[1][kind].append(by_step[1])
    for of_place, (w, s) in zip(tested, kinds, strict=True):
        w, s = torch.stack(w), torch.stack(s)
        target = w.mean(0)
        weights = torch.ones(1, 1, dtype=torch.float64)  # one shard: the whole population
        numbers = bounds._numbers([of_place], 1, n, weights)
        error = total_variance(w, None) / n
        assert float(numbers["mse_backprop"]) == pytest.approx(float(error.mean()))
        synthetic = total_variance(s, None) / n + (s.mean(0) - target).square().sum(1)
        share = float(numbers["synthetic_to_backprop"])
        assert share == pytest.approx(float(synthetic.mean() / error.mean()))
        best = optimal_mixing_weight(w, s, target, n)
        assert float(numbers["best_weight"]) == pytest.approx(float(best.mean()))
        mixed = mixing_error(best, w, s, target, n).mean() / error.mean()
        assert float(numbers["best_to_backprop"]) == pytest.approx(float(mixed))
        # A mixture with nothing at its best weight.
        nothing = torch.zeros_like(w)
        shrunk = mixing_error(optimal_mixing_weight(w, nothing, target, n), w, nothing, target, n)
        share = float(numbers["shrunk_to_backprop"])
        assert share == pytest.approx(float(shrunk.mean() / error.mean()))
        cosine = target.norm() / (error.sum() + target.square().sum()).sqrt()
        assert float(numbers["cosine_backprop"]) == pytest.approx(float(cosine))
        square = (total_variance(s, None) / n).sum() + s.mean(0).square().sum()
        cosine = (s.mean(0) * target).sum() / (square.sqrt() * target.norm())
        assert float(numbers["cosine_synthetic"]) == pytest.approx(float(cosine))
    numbers = bounds._numbers([tested[0]], 1, n, torch.ones(1, 1, dtype=torch.float64))
    assert float(numbers["explained"]) == pytest.approx(float(1 - residual / total))


def test_least_squares_leaves_the_mean_gradient_of_its_own_samples_as_it_is() -> None:
    """Without penalty, where the slots are in their linear range (docs/predictors.md)."""
    generator = torch.Generator().manual_seed(4)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    attention, slots = normal(2, 60, 2).softmax(2), 1e-6 * normal(2, 60, 2, 2)
    output = (attention.unsqueeze(3) * slots).sum(2)
    seen = Seen(normal(2, 60, 3), attention, slots, output, 3**-0.5)
    told = Told(
        torch.arange(60),
        seen,
        normal(1, 2, 60, 2),
        *[torch.zeros(1, 2, 60, 2, dtype=torch.float64)] * 2,
        torch.ones(1, 60, dtype=torch.bool),
    )
    (coefficients,) = bounds._regression(told, torch.ones(60, dtype=torch.bool)).solutions([0.0])
    fitted = told.features() @ coefficients
    assert 0.05 < fitted.square().sum() / told.backprop.square().sum() < 0.5
    one = torch.ones(60, dtype=torch.float64)
    kinds = [parameter_gradients(seen, g, one) for g in (told.backprop[0], fitted)]
    torch.testing.assert_close(kinds[1], kinds[0], rtol=1e-4, atol=1e-4)
    matrices = slice(2 * 3, None)  # and biases: all but the keys
    torch.testing.assert_close(kinds[1][:, matrices], kinds[0][:, matrices], rtol=1e-8, atol=1e-9)


def test_a_known_signal_is_found() -> None:
    """Half of the variance is explained, and the mean of a few samples gains much by it."""
    task, cuts = Made(), [480]
    sums = [regression_sums(task, shard, GROUPS, 40 * shard, cuts) for shard in range(12)]
    fits = fit(sums, 1, 0)
    tested = [sums_of_test(task, shard, GROUPS, [fits], [])[0] for shard in range(12, 24)]
    numbers = bounds._numbers(tested, 1, 20, torch.ones(1, 12, dtype=torch.float64))
    assert float(numbers["explained"]) == pytest.approx(0.5, abs=0.02)
    assert 1.5 < float(numbers["gain"]) < 4  # what varies between samples is left


def tiny_maze() -> tuple[MazeTask, Shard]:
    policy = make_policy(
        "sparsenet", 4, 3, seed=1, dtype=torch.float64, adaptive=False, backend="eager", **TINY
    )
    generator = torch.Generator().manual_seed(2)
    for parameter in split_parameters(policy)[1]:
        values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data.copy_(0.02 * values)
    lengths = torch.randint(2, LENGTH + 1, (7,), generator=generator)
    mask = torch.arange(LENGTH).unsqueeze(1) < lengths
    returns = torch.randn(LENGTH, 7, dtype=torch.float64, generator=generator)
    episodes = Episodes(
        torch.randn(LENGTH, 7, 4, dtype=torch.float64, generator=generator),
        torch.randint(3, (LENGTH, 7), generator=generator),
        torch.where(mask, returns, 0.0),
        mask,
        torch.zeros(LENGTH, 7, dtype=torch.int64),
    )
    loss = Loss.of([episodes])
    return MazeTask(policy, loss, TRAINED_BATCH), Shard(episodes, {})


def test_episodes_of_a_maze_are_the_probes() -> None:
    """The sums over episodes and at one step are those that the probe's tests hold to autograd."""
    task, shard = tiny_maze()
    everyone = torch.arange(5)
    groups = [Group("all", everyone, torch.ones(5), step) for step in (None, 1)]
    expected, _ = labyrinth_sums(task.policy, shard, task.loss, groups, TRAINED_BATCH)
    tested = sums_of_test(task, shard, groups[:1], [[]], [1])
    for of_place, sums in zip(tested, expected, strict=True):
        torch.testing.assert_close(of_place.sums.gradients[0], sums.gradients[3])
        torch.testing.assert_close(of_place.sums.products[:, 0, 0], sums.products[:, 3, 3])
    # Where no episode has ended yet, predictions too are what the probe makes of them.
    first = [Group("all", everyone, torch.ones(5), 0)]
    (sums,), _ = labyrinth_sums(task.policy, shard, task.loss, first, TRAINED_BATCH)
    _, at_start = sums_of_test(task, shard, groups[:1], [[]], [0])
    torch.testing.assert_close(at_start.sums.gradients[1], sums.gradients[1])


def save(folder: Path, name: str, env: str, sizes: tuple[int, int], **settings: object) -> Path:
    folder.mkdir()
    config = {"episode_length": 12} if name == "sparsenet" else {}
    policy = make_policy(name, *sizes, **settings)
    save_policy(policy, folder, environment={"env": env, "env_config": config})
    return folder


@pytest.fixture(params=["maze", "bandit"])
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "maze":
        return save(tmp_path / "maze", "sparsenet", "labyrinth_escape", (56, 4), **TINY)
    sizes = {"num_layers": 2, "num_neurons": 6, "neuron_size": 3, "num_parents": 3, "num_slots": 2}
    return save(tmp_path / "bandit", "sparse_mlp", "mnist_bandit", (784, 9), **sizes)


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["theory", "bounds", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def test_command(checkpoint: Path, tmp_path: Path) -> None:
    arguments = checkpoint, "--samples", 96, "--neurons", 2, "--fitted", "4,20"
    out = tmp_path / "out"
    code, printed, errors = run(*arguments, "--out", out)
    assert (code, errors) == (0, "")
    rows = pd.read_csv(out / "bounds.csv")
    steps = 5 if checkpoint.name == "maze" else 1
    assert len(rows) == 2 * steps * 4
    assert rows["fitted"].tolist()[:4] == ["4", "20", "48", "trained"]
    assert rows["pooled"].tolist()[:2] == [(4 + n) / n for n in [20 if steps == 5 else 64]] + [
        (20 + n) / n for n in [20 if steps == 5 else 64]
    ]
    assert "tested on half of 96" in printed
    code, again, _ = run(*arguments, "--out", out, "--json")
    found = json.loads(again)
    assert found["rows"][0]["mse_backprop"] == rows["mse_backprop"][0]
    assert (found["samples"], code) == (96, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--fitted 20,4", "fits are made of 4 to 24 of 48 samples, in ascending order; got 20, 4"),
        ("--fitted 2", "fits are made of 4 to 24 of 48 samples, in ascending order; got 2"),
        ("--samples 47", "samples must be at least 48, got 47"),
    ],
)
@pytest.mark.parametrize("checkpoint", ["maze"], indirect=True)
def test_bad_settings(
    arguments: str, message: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(checkpoint.parent)
    samples = [] if "--samples" in arguments else ["--samples", "48"]
    assert run(checkpoint, *arguments.split(), *samples) == (2, "", f"sgrl: {message}\n")
