"""Time of whole iterations (rollout and update) by build of the compiled core, as a ratio.

The libraries of a wheel for each instruction set of this processor, beside the library that is
compiled for this very processor. Rounds are interleaved, in one process and on one thread.

    python benchmarks/core_builds.py --num-envs 20 --rounds 9
"""

import argparse
import ctypes
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from sgrl.compiled import library, prebuilt
from sgrl.compiled.compiler import compiler_name, find_compiler
from sgrl.envs.registry import make_vector
from sgrl.nn.kernels import native
from sgrl.nn.registry import make_policy
from sgrl.reinforce.rollout import Rollout
from sgrl.reinforce.update import UpdateSettings, make_optimizers, update

Numbers = list[torch.Tensor]


def libraries(folder: Path) -> dict[str, ctypes.CDLL]:
    """The library for float32 of each build."""
    compiler = find_compiler()
    prebuilt.build(folder, platform.machine(), compiler, compiler_name(compiler))
    prebuilt.FOLDER = folder
    found = {}
    for build in (library.COMPILE, *prebuilt.supported()):
        os.environ["SGRL_CORE"] = build
        library.load_library.cache_clear()
        library._prebuilt.cache_clear()
        core = library.load_library("float")
        assert isinstance(core, ctypes.CDLL), core
        found[build] = core
    return found


def make_iteration(num_envs: int) -> Callable[[], Numbers]:
    policy = make_policy("sparsenet", 56, 4, seed=0, backend="native")
    rollout = Rollout(make_vector("labyrinth_escape", num_envs, {}), policy, seed=0)
    optimizers = make_optimizers(policy, 2e-3, 1e-5)

    def iterate() -> Numbers:
        update(policy, optimizers, rollout.collect(), UpdateSettings())
        return [parameter.detach().clone() for parameter in policy.parameters()]

    return iterate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-envs", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        cores = libraries(Path(scratch) / "prebuilt")
        iterations = {name: make_iteration(arguments.num_envs) for name in cores}
        seconds: dict[str, list[float]] = {name: [] for name in cores}
        results: dict[str, Numbers] = {}
        for _ in range(arguments.rounds + 1):  # the first round warms up
            for name, core in cores.items():
                native.load_library = lambda real, core=core: core
                iterations[name]()  # so that each finds its own memory as it left it
                started = time.process_time()
                results[name] = iterations[name]()
                seconds[name].append(time.process_time() - started)
    medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    for name, median in medians.items():
        ratio = median / medians[library.COMPILE]
        same = all(map(torch.equal, results[name], results[library.COMPILE]))
        bits = "the same bits" if same else "other bits"
        print(f"{name:10} {median * 1e3:7.1f} ms {ratio:5.2f}x of {library.COMPILE}'s time, {bits}")


if __name__ == "__main__":
    main()
