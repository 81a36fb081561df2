"""Training on a GPU repeats itself, resumes bit for bit, and goes on on a CPU and back."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from sgrl.reinforce.device import prepare_device
from sgrl.reinforce.generators import generators_aside, get_random_state, set_random_state
from sgrl.reinforce.update import UpdateSettings

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
from gpu import Given, Run

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=NEEDS_GPU)]
POLICIES: list[dict[str, Any]] = [
    {"name": "sparsenet", "backend": "torch"},
    {"name": "sparsenet", "backend": "eager"},
    {"name": "sparsenet", "backend": "torch", "propagation": "backprop"},
    {"name": "sparsenet", "backend": "torch", "shuffle_predictions": True},
    {"name": "sparse_mlp", "backend": "torch"},
    {"name": "sparse_mlp", "backend": "eager"},
    {"name": "gru"},
    {"name": "lstm"},
    {"name": "mlp"},
]


def name_of(arguments: dict[str, Any]) -> str:
    return "-".join(map(str, arguments.values()))


def start(arguments: dict[str, Any], device: str) -> Run:
    given = Given(prepare_device(device), tiny=True)
    return Run(given, arguments, given.device, num_envs=4)


@pytest.mark.parametrize(
    ("device", "arguments"),
    [
        pytest.param("cpu", POLICIES[0], id="cpu"),
        *(
            pytest.param("cuda", policy, id=f"cuda-{name_of(policy)}", marks=NEEDS_GPU)
            for policy in POLICIES
        ),
    ],
)
def test_runs_repeat_and_resume_bit_for_bit(device: str, arguments: dict[str, Any]) -> None:
    once, again, resumed = (start(arguments, device) for _ in range(3))
    rows = once.iterate(10)
    saved = once.save()
    rows += once.iterate(10)
    assert again.iterate(20) == rows
    resumed.load(saved)
    assert resumed.iterate(10) == rows[10:]
    for run in (again, resumed):
        assert all(map(torch.equal, run.weights(), once.weights()))


@NEEDS_GPU
@pytest.mark.parametrize("arguments", POLICIES, ids=name_of)
def test_a_cuda_run_goes_on_on_a_cpu_and_back(arguments: dict[str, Any]) -> None:
    """In float64, where rounding stays out of sight (returns are normalised in float32)."""
    there, here, back = (start(arguments, device) for device in ("cuda", "cpu", "cuda"))
    for run in (there, here, back):
        run.policy.double()
        run.settings = UpdateSettings(normalize_returns=False)
    there.iterate(2)
    here.load(there.save())
    rows = here.iterate(2)
    back.load(here.save())
    rows += back.iterate(2)
    for row, expected in zip(rows, there.iterate(4), strict=True):
        assert row == pytest.approx(expected, rel=1e-6)


@NEEDS_GPU
def test_one_precision_for_all_on_cuda() -> None:
    prepare_device("cuda")
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32
    assert torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("device", DEVICES)
def test_generators_are_put_back(device: str) -> None:
    draw = lambda: torch.rand(3, device=device).tolist()  # noqa: E731
    draw()
    state = get_random_state()
    expected = draw()
    set_random_state(state)
    with generators_aside([7]):
        aside = draw()
    assert draw() == expected
    with generators_aside([7]):
        assert draw() == aside != expected
