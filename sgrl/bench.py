"""Milliseconds per batch of every policy and backend, measured side by side: `sgrl bench`.

All are measured in one process on one thread, in rounds that take each in turn, so that whatever
else the machine does hits all alike: trust the ratios within one run. Beside them, on a CPU, are
measured the frozen baselines in plain PyTorch where they are at hand (`benchmarks/plain_*.py` of a
checkout), and on a GPU the same policies on one CPU thread.
"""

import importlib.util
import json
import platform
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sgrl import __version__
from sgrl.compiled.processor import processor
from sgrl.envs.registry import make_vector
from sgrl.nn.kernels import native
from sgrl.nn.kernels.backends import BACKENDS, DENSE_BACKENDS
from sgrl.nn.registry import Policy, make_policy
from sgrl.reinforce.batch import EpisodeBatch
from sgrl.reinforce.device import prepare_device
from sgrl.reinforce.rollout import Rollout
from sgrl.reinforce.update import UpdateSettings, make_optimizers, update

BASELINES = Path(__file__).parents[1] / "benchmarks"

#: Policies by the name they have in the table: arguments of `make_policy`, the baseline's name.
POLICIES: dict[str, tuple[dict[str, Any], str]] = {
    "sgprop adaptive": ({"name": "sparsenet"}, "sparsenet_sgprop"),
    "sgprop fixed": ({"name": "sparsenet", "adaptive": False}, "sparsenet_sgprop_fixed"),
    "backprop": ({"name": "sparsenet", "propagation": "backprop"}, "sparsenet_backprop"),
    "gru": ({"name": "gru"}, "gru"),
    "lstm": ({"name": "lstm"}, "lstm"),
}
#: What the others are compared with: on a CPU, and on a GPU.
BASELINE = {"cpu": "plain", "cuda": "one CPU thread"}
BATCH, IMAGES, PIXELS, CLASSES = 64, 4000, 784, 9
#: The bandit's, by the name they have in the table: arguments of `make_policy`.
BANDIT_POLICIES: dict[str, dict[str, Any]] = {
    "sgprop adaptive": {"name": "sparse_mlp"},
    "sgprop fixed": {"name": "sparse_mlp", "adaptive": False},
    "backprop": {"name": "sparse_mlp", "propagation": "backprop"},
    "dense": {"name": "dense"},
}
LABYRINTHS = {"labyrinth_escape": 80, "labyrinth_explore": 40}


@dataclass
class Contender:
    """One row of the table.

    Attributes:
        experiment, policy, implementation: what it is; rows of one experiment and policy compare.
        batches: trains for ever; each item is the seconds of a batch's phases, by name.
        seconds: what was measured, by phase.
    """

    experiment: str
    policy: str
    implementation: str
    batches: Iterator[Mapping[str, float]]
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def quartiles(self, phase: str) -> tuple[float, float, float]:
        """Lower quartile, median and upper quartile of a phase, in milliseconds."""
        values = [1e3 * value for value in self.seconds[phase]]
        if len(values) == 1:
            values *= 2
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return low, median, high


def measure(contenders: Sequence[Contender], rounds: int) -> None:
    """Take a batch of each in turn, `rounds` times, after one round that does not count."""
    for round_ in range(rounds + 1):
        for contender in contenders:
            phases = dict(next(contender.batches))
            if "update" in phases:
                phases["total"] = sum(phases.values())
            for phase, seconds in phases.items():
                if round_:
                    contender.seconds.setdefault(phase, []).append(seconds)


@dataclass(frozen=True)
class Place:
    """Where a policy computes, and by which backend; `implementation` is its name in the table."""

    implementation: str
    device: torch.device
    backend: str = "auto"

    def make_policy(self, **arguments: Any) -> Policy:
        """The policy there; see `registry.make_policy`."""
        settings: dict[str, Any] = {} if self.backend == "auto" else {"backend": self.backend}
        return make_policy(**arguments, **settings).to(self.device)

    def wait(self) -> float:
        """Wait until all is computed; returns the time."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def places(device: torch.device, backends: Sequence[str] = BACKENDS) -> list[Place]:
    """Those of a policy's backends that run on a device, and a GPU's baseline.

    A policy without any runs in torch.
    """
    on_cpu = device.type == "cpu"
    native_runs = on_cpu and native.unavailable(torch.float32) is None
    found = [Place(b, device, b) for b in backends if native_runs or b != "native"]
    if not backends:
        found = [Place("torch", device)]
    if not on_cpu:
        found.append(Place(BASELINE["cuda"], torch.device("cpu")))
    return found


def backends_of(policy: str) -> Sequence[str]:
    """The backends that a policy has, different ones."""
    of_policy = {"gru": DENSE_BACKENDS, "lstm": DENSE_BACKENDS, "dense": ()}
    return of_policy.get(policy, BACKENDS)


def labyrinth(experiment: str, num_envs: int, device: torch.device) -> list[Contender]:
    """Every policy and backend on a labyrinth of the published size."""
    plain, contenders = load_plain(), []
    for policy, (arguments, plain_name) in POLICIES.items():
        for place in places(device, backends_of(arguments["name"])):
            batches = train(experiment, num_envs, arguments, place)
            contenders.append(Contender(experiment, policy, place.implementation, batches))
        if plain is not None and device.type == "cpu":
            kind = experiment.removeprefix("labyrinth_")
            batches = train_plain(plain, plain_name, kind, num_envs, LABYRINTHS[experiment])
            contenders.append(Contender(experiment, policy, "plain", batches))
    return contenders


def train(
    experiment: str, num_envs: int, arguments: Mapping[str, Any], place: Place
) -> Iterator[dict[str, float]]:
    """Train as `sgrl.reinforce.train` does; yields the seconds of each batch's phases."""
    env = make_vector(experiment, num_envs)
    policy = place.make_policy(
        observation_size=env.observation_size, num_actions=env.num_actions, **arguments
    )
    rollout, optimizers = Rollout(env, policy, 0, keep=True), make_optimizers(policy, 2e-3, 1e-5)
    while True:
        started = place.wait()
        batch = rollout.collect()
        rolled = place.wait()
        update(policy, optimizers, batch, UpdateSettings())
        yield {"rollout": rolled - started, "update": place.wait() - rolled}


def load_plain(name: str = "plain_torch") -> ModuleType | None:
    """A frozen baseline; None where sgrl runs without its checkout."""
    file = BASELINES / f"{name}.py"
    if not file.is_file():
        return None
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def train_plain(
    plain: ModuleType, name: str, kind: str, num_envs: int, length: int
) -> Iterator[dict[str, float]]:
    """The same for the frozen baseline."""
    for row in plain.train(name, kind, num_envs, length):
        yield {phase: row[f"{phase}_seconds"] for phase in ("rollout", "update")}


def bandit(device: torch.device) -> list[Contender]:
    """The published feed-forward network on random images: a step, an evaluation of 4,000."""
    images = torch.randn(IMAGES, PIXELS)
    sizes = {"observation_size": PIXELS, "num_actions": CLASSES}
    contenders = []
    for policy, arguments in BANDIT_POLICIES.items():
        for place in places(device, backends_of(arguments["name"])):
            batches = train_bandit(place.make_policy(**arguments, **sizes), images, place)
            contenders.append(Contender("mnist_bandit", policy, place.implementation, batches))
    plain = load_plain("plain_mnist")
    if plain is not None and device.type == "cpu":
        batches = train_plain_bandit(plain, images)
        contenders.append(Contender("mnist_bandit", "sgprop adaptive", "plain", batches))
    return contenders


def train_bandit(policy: Policy, images: Tensor, place: Place) -> Iterator[dict[str, float]]:
    """Seconds of sampling and update on 64 images, and of sampling on all."""
    optimizers = make_optimizers(policy, 5e-3, 5e-3)
    settings = UpdateSettings(
        entropy_coeff=0.0, grad_clip=None, normalize_returns=False, two_phase=True
    )
    images = images.to(place.device)
    contexts = images[:BATCH]
    ones = torch.ones(1, len(contexts), device=place.device)
    while True:
        started = place.wait()
        acting = policy.acting(1, len(contexts), keep=True)
        with torch.inference_mode():
            actions = _sample(acting.step(contexts))
        valid = ones.bool()
        batch = EpisodeBatch(
            *(contexts.unsqueeze(0), actions.clone().unsqueeze(0), ones, valid, valid.sum(0)),
            success=valid[0],
            acted=acting,
        )
        update(policy, optimizers, batch, settings)
        stepped = place.wait()
        with torch.inference_mode():
            _sample(policy.acting(1, len(images)).step(images))
        yield {"step": stepped - started, "evaluation": place.wait() - stepped}


def _sample(logits: Tensor) -> Tensor:
    return (logits - torch.empty_like(logits).exponential_().log_()).argmax(-1)


def train_plain_bandit(plain: ModuleType, images: Tensor) -> Iterator[dict[str, float]]:
    """The same for the frozen baseline."""
    policy = plain.SparseMLP()
    optimizers = plain.make_optimizers(policy, 5e-3, 5e-3)
    contexts, labels = images[:BATCH], torch.zeros(len(images), dtype=torch.int64)
    while True:
        started = time.perf_counter()
        actions = plain.sample(policy, contexts)
        plain.update(policy, optimizers, contexts, actions, torch.ones(len(contexts)))
        stepped = time.perf_counter()
        plain.evaluate(policy, images, labels)
        yield {"step": stepped - started, "evaluation": time.perf_counter() - stepped}


def matrix_product_peak(size: int = 1024, repeats: int = 10) -> float:
    """Best GFLOP/s of a float32 matrix product: what one core can do at most."""
    a, b = torch.randn(2, size, size)
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best / 1e9


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures depend on."""
    card = {} if device.type == "cpu" else {"card": torch.cuda.get_device_name(device)}
    return {
        **card,
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "gemm_gflops": round(matrix_product_peak(), 1),
        "sgrl": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def table(contenders: Sequence[Contender]) -> list[str]:
    """Lines of text: median (quartiles) in milliseconds, and gains over the baseline."""
    known = BASELINE.values()
    baselines = {(c.experiment, c.policy): c for c in contenders if c.implementation in known}
    lines, experiment = [], ""
    for contender in contenders:
        if contender.experiment != experiment:
            experiment = contender.experiment
            phases = "".join(f"{phase:>24}{'':8}" for phase in contender.seconds)
            lines += ["", f"{experiment:35}{phases}".rstrip()]
        baseline = baselines.get((experiment, contender.policy))
        cells = ""
        for phase in contender.seconds:
            low, median, high = contender.quartiles(phase)
            gain = f"{baseline.quartiles(phase)[1] / median:.1f}x" if baseline else ""
            cells += f"{f'{median:.1f} ({low:.1f}-{high:.1f})':>24}{gain:>8}"
        lines.append(f"{contender.policy:20}{contender.implementation:15}{cells}".rstrip())
    return lines


def run_bench(
    num_envs: int, rounds: int, json_file: Path | None = None, device: str = "cpu"
) -> Iterator[str]:
    """Measure everything; yields the lines of the table, and writes the figures to a file."""
    where = prepare_device(device)
    torch.set_num_threads(1)
    about = machine(where)
    yield ", ".join(f"{name} {value}" for name, value in about.items())
    yield (
        f"milliseconds, median (quartiles) of {rounds} rounds, and gain over "
        f"{BASELINE[where.type]}; a batch is {num_envs} episodes, {BATCH} images for the bandit, "
        f"whose evaluation is {IMAGES} images"
    )
    measured: list[Contender] = []
    for experiment in (*LABYRINTHS, "mnist_bandit"):
        if experiment == "mnist_bandit":
            contenders = bandit(where)
        else:
            contenders = labyrinth(experiment, num_envs, where)
        measure(contenders, rounds)
        yield from table(contenders)
        measured += contenders
    if json_file is not None:
        rows = [
            {
                "experiment": c.experiment,
                "policy": c.policy,
                "implementation": c.implementation,
                "num_envs": num_envs,
                "milliseconds": {
                    phase: dict(zip(("p25", "median", "p75"), c.quartiles(phase), strict=True))
                    for phase in c.seconds
                },
            }
            for c in measured
        ]
        json_file.write_text(json.dumps({"machine": about, "rows": rows}, indent=2) + "\n")
