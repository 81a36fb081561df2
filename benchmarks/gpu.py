"""Correctness and speed on a GPU: stages that each write their figures before the next begins.

All stages together take less than eight minutes; one that would begin after `--minutes` is left
out. What a stage raises is written in its place. Neither Ray nor the other parts of an sgrl
installation are needed, but torch and its triton, gymnasium, farama-notifications, popgym,
mazelib, platformdirs, jaxtyping, safetensors and, for the tests, pytest, hypothesis, beartype and
pydantic with its own (pydantic_core, annotated-types, typing-inspection). A C++ compiler gives
the CPU's figures.

    PYTHONPATH=. python benchmarks/gpu.py --out benchmarks      # writes gpu_CARD.json there
    PYTHONPATH=. python benchmarks/gpu.py --device cpu --tiny   # tests the script itself
"""

import argparse
import importlib.util
import io
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gpu_kernels import measure_kernels

from sgrl.bench import POLICIES, Contender, backends_of, measure, places, processor, train
from sgrl.envs.mnist import DataError
from sgrl.envs.registry import make_device, make_vector
from sgrl.nn.registry import Policy, make_policy
from sgrl.reinforce.device import prepare_device
from sgrl.reinforce.pack import Pack, RunSettings
from sgrl.reinforce.rollout import Rollout, action_space_of
from sgrl.reinforce.update import UpdateSettings, make_optimizers, update

ROOT = Path(__file__).parents[1]
#: Tests that need no Ray; those whose names hold "cuda" are run.
TESTS = [
    "device",
    "device_environments",
    "recurrent",
    "feedforward",
    "synthetic_gradient",
    "reinforce",
    "pack",
]
#: What was expected before any GPU had run this, of adaptive sgprop with B = 20 on an H100.
PREDICTED = {
    "launches": {
        "sgprop adaptive B=20": 6659,
        "sgprop adaptive B=40": 8089,
        "backprop B=20": 4391,
        "gru B=20": 3943,
    },
    "speed": {"native, one CPU core": [113, 188], "torch backend": [45, 95]},
    "packs": {
        "30 runs, without a graph": [45, 65],
        "1 run, with a graph": [8, 12],
        "30 runs, with a graph": [30, 40],
    },
}


@dataclass(frozen=True)
class Given:
    """What stages are given."""

    device: torch.device
    tiny: bool  # small networks and short episodes, to test the script itself

    @property
    def rounds(self) -> int:
        """Batches that a time is the median of."""
        return 1 if self.tiny else 5

    @property
    def iterations(self) -> int:
        """Of a run that is compared with another; even."""
        return 4 if self.tiny else 20

    @property
    def batches(self) -> list[int]:
        """Episodes in a batch."""
        return [2] if self.tiny else [20, 40]

    @property
    def env_config(self) -> dict[str, Any]:
        """Of the labyrinth, beyond what is published."""
        return {"episode_length": 5} if self.tiny else {}

    def settings(self, name: str) -> dict[str, Any]:
        """Arguments of a policy beyond what is published."""
        if not self.tiny:
            return {}
        sparse = {"num_neurons": 12, "num_parents": 3, "num_slots": 2}
        tiny = {
            "sparsenet": sparse | {"num_input_neurons": 4},
            "sparse_mlp": sparse | {"num_layers": 3},
        }
        return tiny.get(name, {"hidden_size": 16})

    def wait(self) -> None:
        """Wait until the GPU has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def milliseconds(self, call: Callable[[], Any], repeats: int) -> float:
        """Of one call, after one that does not count."""
        call()
        self.wait()
        started = time.perf_counter()
        for _ in range(repeats):
            call()
        self.wait()
        return 1e3 * (time.perf_counter() - started) / repeats


Stage = Callable[[Given], dict[str, Any]]
STAGES: dict[str, Stage] = {}


def stage(function: Stage) -> Stage:
    """Add a function to the stages, which run in the order of this file."""
    STAGES[function.__name__] = function
    return function


@stage
def machine(given: Given) -> dict[str, Any]:
    """Versions, and what a launch costs: one by one, and within a CUDA graph."""
    x, launches = torch.zeros(16, device=given.device), 1000

    def launch() -> None:
        for _ in range(launches):
            x.add_(1)

    row: dict[str, Any] = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": processor(),
        "launch_us": 1e3 * given.milliseconds(launch, 5) / launches,
    }
    if given.device.type == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            launch()
        row["graph_node_us"] = 1e3 * given.milliseconds(graph.replay, 20) / launches
        row["card"] = torch.cuda.get_device_name()
        row["memory_gb"] = round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1)
        row["cuda"] = torch.version.cuda
    return row


@stage
def cuda_tests(given: Given) -> dict[str, Any]:
    """The tests that need a GPU, but for those that need Ray."""
    files = [f"tests/test_{name}.py" for name in TESTS]
    options = ["-q", "-p", "no:cacheprovider", "-k", "cuda", "--durations=5"]
    if importlib.util.find_spec("xdist"):
        options += ["-n", "4", "--dist", "loadfile"]
    command = [sys.executable, "-m", "pytest", *options, *files]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    return {"exit": run.returncode, "tail": run.stdout[-2500:]}


class Run:
    """A training run of a policy that can be saved and continued, on any device."""

    def __init__(
        self, given: Given, arguments: dict[str, Any], device: torch.device, num_envs: int
    ) -> None:
        arguments = arguments | given.settings(arguments["name"])
        env = make_vector("labyrinth_escape", num_envs, given.env_config)
        actions = action_space_of(env.action_space)
        self.policy: Policy = make_policy(
            observation_size=env.observation_size, num_actions=actions, **arguments
        ).to(device)
        self.rollout = Rollout(env, self.policy, 0, keep=True)
        self.settings = UpdateSettings()
        self.optimizers = make_optimizers(self.policy, 2e-3, 1e-5)
        self.device = device

    def iterate(self, iterations: int = 1) -> list[tuple[float, float]]:
        """Train; the loss and the gradient's norm of each iteration."""
        rows = []
        for _ in range(iterations):
            row = update(self.policy, self.optimizers, self.rollout.collect(), self.settings)
            rows.append((row["policy_loss"], row["grad_norm"]))
        return rows

    def save(self) -> bytes:
        """All that the run goes on from."""
        file = io.BytesIO()
        optimizers = {name: o.state_dict() for name, o in self.optimizers.items()}
        torch.save((self.policy.state_dict(), optimizers, self.rollout.get_state()), file)
        return file.getvalue()

    def load(self, saved: bytes) -> None:
        """Continue from `save`."""
        state = torch.load(io.BytesIO(saved), map_location=self.device, weights_only=False)
        policy, optimizers, rollout = state
        self.policy.load_state_dict(policy)
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(optimizers[name])
        self.rollout.set_state(rollout)

    def weights(self) -> list[torch.Tensor]:
        """Copies, on the CPU, of all that is saved with the policy."""
        return [value.detach().cpu().clone() for value in self.policy.state_dict().values()]


@stage
def determinism(given: Given) -> dict[str, Any]:
    """Two runs alike, a run resumed halfway, and a GPU's run continued on a CPU and back."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rows: dict[str, Any] = {label: _repeat(given, label) for label in POLICIES}
    rows["warnings"] = sorted({str(warning.message)[:300] for warning in caught})
    return rows


def _repeat(given: Given, label: str) -> dict[str, Any]:
    def start(device: torch.device = given.device) -> Run:
        return Run(given, POLICIES[label][0], device, given.batches[0])

    half = given.iterations // 2
    once, again, resumed = start(), start(), start()
    first = once.iterate(half)
    saved = once.save()
    first += once.iterate(half)
    second = again.iterate(2 * half)
    differ = [i for i, (one, other) in enumerate(zip(first, second, strict=True)) if one != other]
    resumed.load(saved)
    third = resumed.iterate(half)
    there, back = start(torch.device("cpu")), start()
    there.load(saved)
    on_cpu = there.iterate(half - 1)
    back.load(there.save())
    continued = on_cpu + back.iterate()
    return {
        "two_runs_bitwise": not differ and _equal(once, again),
        "first_different_iteration": differ[0] if differ else None,
        "resumed_bitwise": third == first[half:] and _equal(once, resumed),
        # The last of them back on the GPU; rounding grows from iteration to iteration.
        "continued_on_cpu_relative_difference": _differences(continued, first[half:]),
    }


def _equal(one: Run, other: Run) -> bool:
    return all(map(torch.equal, one.weights(), other.weights()))


def _differences(one: list[tuple[float, float]], other: list[tuple[float, float]]) -> list[float]:
    """Greatest relative difference of each iteration."""
    return [
        max(abs(x - y) / max(abs(y), 1e-12) for x, y in zip(a, b, strict=True))
        for a, b in zip(one, other, strict=True)
    ]


@stage
def speed(given: Given) -> dict[str, Any]:
    """Milliseconds of an iteration on the GPU, and of the fastest on one CPU thread."""
    rows = {}
    for num_envs in given.batches:
        contenders = []
        for label, (arguments, _) in POLICIES.items():
            arguments = arguments | given.settings(arguments["name"])
            for place in places(given.device, backends_of(arguments["name"])):
                if place.backend != "eager":
                    batches = train("labyrinth_escape", num_envs, arguments, place)
                    contenders.append(Contender("", label, place.implementation, batches))
        measure(contenders, given.rounds)
        for c in contenders:
            rows[f"{c.policy} B={num_envs}, {c.implementation}"] = {
                phase: round(1e3 * statistics.median(seconds), 2)
                for phase, seconds in c.seconds.items()
            }
    return rows


@stage
def launches(given: Given) -> dict[str, Any]:
    """Kernels that an iteration launches, how long the device is busy, how often the CPU waits."""
    from torch.profiler import ProfilerActivity, profile

    rows = {}
    activities = [ProfilerActivity.CPU]
    if given.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    for num_envs in given.batches:
        for label in POLICIES:
            run = Run(given, POLICIES[label][0], given.device, num_envs)
            run.iterate()
            given.wait()
            with profile(activities=activities) as profiled:
                run.iterate()
                given.wait()
            events = profiled.key_averages()
            rows[f"{label} B={num_envs}"] = {
                "launches": sum(e.count for e in events if re.match("cu(da)?LaunchKernel", e.key)),
                "copies": sum(e.count for e in events if e.key == "cudaMemcpyAsync"),
                "waits": sum(e.count for e in events if "Synchronize" in e.key),
                "device_busy_ms": round(
                    sum(getattr(e, "self_device_time_total", 0) for e in events) / 1e3, 2
                ),
            }
    return rows


@stage
def packs(given: Given) -> dict[str, Any]:
    """Milliseconds of an iteration of S runs, B = 20, one launch after the other or as a graph.

    The runs of adaptive sgprop are those of a sweep: up to 6 seeds with 5 learning rates each.
    Torch alone; `fused_packs` has the Triton kernels.
    """
    sizes = {"sgprop adaptive": (1, 6, 30), "backprop": (30,), "gru": (30,)}
    return _packs(given, sizes, "torch")


def _packs(given: Given, every: dict[str, tuple[int, ...]], backend: str) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    cuda = given.device.type == "cuda"
    for label, sizes in every.items():
        firsts = {}
        for size in (1, 2) if given.tiny else sizes:
            last = {}
            row: dict[str, Any] = {}
            for capture in (False, True) if cuda else (False,):
                pack = _pack(given, label, size, capture, backend)
                last[capture] = [pack.train() for _ in range(3)]
                if cuda:
                    torch.cuda.reset_peak_memory_stats()
                row = {
                    "ms": given.milliseconds(pack.train, given.rounds),
                    "ms_on_the_cpu": given.milliseconds(pack.draw, given.rounds),
                }
                if cuda:
                    row["memory_gb"] = torch.cuda.max_memory_allocated() / 2**30
                if pack.graph is not None:
                    row["ms_of_the_graph"] = given.milliseconds(pack.graph.replay, given.rounds)
                else:
                    row["kernels"] = _kernels(given, pack.iterate)
                rows[f"{label} S={size}{' graph' if capture else ''}"] = row
                del pack
            if len(last) > 1:
                row["bitwise_as_without_a_graph"] = last[False] == last[True]
            firsts[size] = [of_runs[0] for of_runs in last[False]]
        first = next(iter(firsts.values()))
        rows[f"{label}: first run bitwise the same in all packs"] = all(
            of_size == first for of_size in firsts.values()
        )
    return rows


#: Policies of the bandit, as published.
OF_BANDIT: dict[str, dict[str, Any]] = {
    "bandit sgprop adaptive": {"name": "sparse_mlp"},
    "bandit backprop": {"name": "sparse_mlp", "propagation": "backprop"},
    "bandit dense": {"name": "dense"},
}


@stage
def bandit_packs(given: Given) -> dict[str, Any]:
    """As `packs`, an update on 64 images; needs MNIST's files in SGRL_DATA_DIR."""
    try:
        return _packs(given, dict.fromkeys(OF_BANDIT, (1, 30)), "torch")
    except DataError as error:
        return {"left_out": str(error)}


def _pack(given: Given, label: str, size: int, capture: bool, backend: str) -> Pack:
    bandit = label in OF_BANDIT
    arguments = OF_BANDIT[label] if bandit else POLICIES[label][0]
    if arguments["name"] == "sparsenet":
        arguments = arguments | {"backend": backend}
    arguments = arguments | given.settings(arguments["name"])
    if bandit:
        env = make_device("mnist_bandit", size, 64, {}, given.device)
        step = UpdateSettings(0.95, 0.0, None, normalize_returns=False, two_phase=True)
    else:
        batch = given.batches[0]
        env = make_device("labyrinth_escape", size, batch, given.env_config, given.device)
        step = UpdateSettings()
    rates = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
    runs = [RunSettings(i // 5 * 10_000, rates[i % 5], update=step) for i in range(size)]
    policies = [
        make_policy(
            observation_size=env.observation_size,
            num_actions=env.num_actions,
            seed=run.seed,
            **arguments,
        )
        for run in runs
    ]
    return Pack(policies, env, runs, capture)


def _kernels(given: Given, call: Callable[[], Any]) -> list[str]:
    """The kernels that take most of the device's time: milliseconds, launches, name."""
    from torch.profiler import ProfilerActivity, profile

    if given.device.type != "cuda":
        return []
    call()
    given.wait()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        call()
        given.wait()
    events = sorted(profiled.key_averages(), key=lambda e: -e.self_device_time_total)
    total = sum(e.self_device_time_total for e in events)
    launches = sum(e.count for e in events)
    top = [(e.self_device_time_total, e.count, e.key[:90]) for e in events[:16]]
    return [f"{us / 1e3:.2f} {n} {name}" for us, n, name in [(total, launches, "in all"), *top]]


@stage
def kernels(given: Given) -> dict[str, Any]:
    """The Triton kernels; on a CPU only in Triton's interpreter (TRITON_INTERPRET=1)."""
    if given.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return {"left_out": "no GPU"}
    runs = (3, 1) if given.tiny else (30, 1, 6)
    return measure_kernels(given.device, given.milliseconds, given.tiny, runs)


@stage
def fused_packs(given: Given) -> dict[str, Any]:
    """As `packs`, in the Triton kernels; and how far the losses then are from torch's."""
    rows: dict[str, Any] = {}
    size = 2 if given.tiny else 30
    packs = [_pack(given, "sgprop adaptive", size, False, b) for b in ("auto", "torch")]
    for iteration in range(3):
        fused, plain = (pack.train() for pack in packs)
        rows[f"relative difference of losses after {iteration + 1}"] = max(
            abs(a["policy_loss"] - b["policy_loss"]) / max(abs(b["policy_loss"]), 1e-12)
            for a, b in zip(fused, plain, strict=True)
        )
    del packs
    return rows | _packs(given, {"sgprop adaptive": (30, 1, 6)}, "auto")


def main(argv: Sequence[str] | None = None) -> Path:
    """Run the stages; returns the file that they are written to."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to test the script")
    parser.add_argument(
        "--out", type=Path, default=Path(), help="where to write; other stages there stay"
    )
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--minutes", type=float, default=7, help="none begins after as long")
    parser.add_argument("--tiny", action="store_true", help="small networks and short episodes")
    arguments = parser.parse_args(argv)
    given = Given(prepare_device(arguments.device), arguments.tiny)
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    card = "cpu" if given.device.type == "cpu" else torch.cuda.get_device_name(given.device)
    file = arguments.out / f"gpu_{re.sub('[^a-z0-9]+', '_', card.lower()).strip('_')}.json"
    begun, results = time.perf_counter(), {}
    if file.is_file():  # of other stages
        results = json.loads(file.read_text())
    for name in arguments.stages:
        started = time.perf_counter()
        if started - begun > 60 * arguments.minutes:
            results[name] = {"left_out": f"{arguments.minutes:g} minutes are over"}
        else:
            try:
                results[name] = STAGES[name](given)
            except Exception:
                results[name] = {"error": traceback.format_exc()[-3000:]}
            if name in PREDICTED:
                results[name]["predicted"] = PREDICTED[name]
            results[name]["stage_seconds"] = round(time.perf_counter() - started, 1)
        print(name, json.dumps(results[name], indent=1), flush=True)
        file.write_text(json.dumps(results, indent=1) + "\n")
    return file


if __name__ == "__main__":
    main()
