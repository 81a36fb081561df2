"""The native backend: against eager on sizes of all kinds, its record, its compiler and cache."""

import copy
import ctypes
import multiprocessing
import subprocess
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_recurrent import make_problem, problems, run
from torch import nn
from torch.nn.utils import parametrize

from sgrl.compiled import compiler, library
from sgrl.compiled.prebuilt import SOURCE
from sgrl.envs.registry import make_vector
from sgrl.nn.feedforward import SparseMLP
from sgrl.nn.kernels import backends, native
from sgrl.nn.kernels.backends import BACKENDS, resolve_backend
from sgrl.nn.neuron import Activation, SlotNeurons
from sgrl.nn.recurrent import SparseRNN
from sgrl.nn.recurrent_policies import SparseNetPolicy
from sgrl.nn.registry import load_policy, make_policy, save_policy
from sgrl.reinforce.rollout import Rollout
from sgrl.reinforce.update import UpdateSettings, batch_loss, make_optimizers, update

SMALL = {"num_neurons": 7, "neuron_size": 3, "num_parents": 2, "num_slots": 3}
ENV_CONFIG = {"episode_length": 12}


def assert_native_equals_eager(problem: dict, dtype: torch.dtype, tolerance: float) -> None:
    """Relative to each result's largest entry; what rounding leaves of zeros is no difference."""
    rnn, arguments = make_problem(problem, dtype)
    rnn.backend = "eager"
    expected = run(rnn, *arguments)
    rnn.backend = "native"
    assert rnn.runs_on(arguments[0]) == "native"
    actual = run(rnn, *arguments)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        error = (actual[name] - value).abs().max().item()
        assert error <= tolerance * max(value.abs().max().item(), 0.01), name


@settings(max_examples=60, deadline=None, derandomize=True)
@given(problems())
def test_native_on_random_sizes(problem: dict) -> None:
    assert_native_equals_eager(problem, torch.float64, 1e-9)


@st.composite
def uneven_problems(draw: st.DrawFn) -> dict:
    """Sizes that fill no vector and no tile: primes and 1."""
    prime = st.sampled_from([1, 2, 3, 5, 7, 11, 13, 17])
    num_neurons = draw(st.sampled_from([1, 5, 13, 19]))
    problem = draw(problems())
    problem["sizes"] = {
        "input_size": draw(st.sampled_from([1, 5, 17, 37])),
        "num_neurons": num_neurons,
        "neuron_size": draw(prime),
        "num_parents": min(draw(prime), num_neurons),
        "num_slots": draw(prime),
        "num_input_neurons": min(draw(prime), num_neurons),
    }
    problem["batch"] = draw(st.sampled_from([1, 3, 8, 15, 16, 17, 31, 33, 49]))
    return problem


@settings(max_examples=25, deadline=None, derandomize=True)
@given(uneven_problems(), st.sampled_from([(torch.float64, 1e-9), (torch.float32, 2e-5)]))
def test_native_on_uneven_sizes(problem: dict, precision: tuple[torch.dtype, float]) -> None:
    assert_native_equals_eager(problem, *precision)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-5)])
def test_native_over_several_chunks_of_time(dtype: torch.dtype, tolerance: float) -> None:
    sizes = {**SMALL, "input_size": 4, "num_input_neurons": 2}
    for rule in ("published", "episodes"):
        problem = {"sizes": sizes, "options": {"mixing_rule": rule}, "length": 70, "batch": 29}
        assert_native_equals_eager(problem | {"masked": True, "seed": 1}, dtype, tolerance)


def test_native_passes_nan_on() -> None:
    rnn = SparseRNN(3, **SMALL, num_input_neurons=2, backend="native")
    x = torch.randn(4, 5, 3)
    x[1, 2, 0] = float("nan")
    output, _ = rnn(x)
    assert output[:, [0, 1, 3, 4]].isfinite().all()
    assert output[1, 2].isnan().any()
    output.sum().backward()
    assert rnn.neurons.weight_x.grad.isnan().any()


def test_native_in_threads() -> None:
    """Networks of different sizes at the same time, each as on its own."""
    generator = torch.Generator().manual_seed(0)
    networks = [
        SparseRNN(3, **(SMALL | {"num_neurons": 7 + i}), num_input_neurons=2, generator=generator)
        for i in range(4)
    ]
    x, h_0 = torch.randn(30, 9, 3, generator=generator), None
    results: dict[int, list] = {}

    def work(i: int) -> None:
        rnn = networks[i]
        weights = torch.linspace(-1, 1, 30 * 9 * rnn.num_neurons * 3).view(30, 9, -1, 3)
        results[i] = []
        for _ in range(5):
            for parameter in rnn.parameters():
                parameter.grad = None
            rnn.neurons.mixing_weight.fill_(0.5)
            (rnn(x, h_0)[0] * weights).sum().backward()
            results[i].append([p.grad for p in rnn.parameters()] + [rnn.neurons.mixing_weight + 0])

    for i in range(4):
        work(i)
    expected = dict(results)
    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(4):
        for result in results[i]:
            assert all(map(torch.equal, expected[i][0], result))


def test_native_float32_training_stays_with_eager() -> None:
    """The published network on 25 recorded batches."""
    env = make_vector("labyrinth_escape", 4, {"episode_length": 30})
    policies = {
        backend: make_policy("sparsenet", env.observation_size, env.num_actions, backend=backend)
        for backend in ("eager", "native")
    }
    rollout = Rollout(env, policies["native"], seed=0)
    batches = [rollout.collect() for _ in range(25)]
    for policy in policies.values():
        optimizers = make_optimizers(policy, 2e-3, 1e-5)
        for batch in batches:
            update(policy, optimizers, batch, UpdateSettings())
    one, other = (torch.nn.utils.parameters_to_vector(p.parameters()) for p in policies.values())
    assert (one - other).norm() <= 1e-4 * one.norm()


# ------------------------------------------------------------------ the record of a rollout


def sparsenet(**settings: object) -> SparseNetPolicy:
    policy = make_policy(
        "sparsenet", 56, 4, dtype=torch.float64, num_input_neurons=2, mixing_weight=0.5,
        backend="native", **SMALL, **settings,
    )  # fmt: skip
    assert isinstance(policy, SparseNetPolicy)
    return policy


def gradients(policy: SparseNetPolicy, batch: object) -> dict[str, torch.Tensor]:
    policy.zero_grad()
    policy.core.neurons.mixing_weight.fill_(0.5)
    batch_loss(policy, batch, UpdateSettings()).loss.backward()
    results = {name: parameter.grad for name, parameter in policy.named_parameters()}
    return results | {"lambda": policy.core.neurons.mixing_weight.clone()}


def as_if_trained(policy: SparseNetPolicy) -> SparseNetPolicy:
    """No parameter is zero any more, as biases are at first."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.add_(0.3 * noise)
    return policy


@pytest.mark.parametrize("batch_size", [*range(1, 20), 32, 33])
def test_native_acts_as_it_computes(batch_size: int) -> None:
    """Whether or not the samples fill whole vectors."""
    policy = as_if_trained(sparsenet())
    generator = torch.Generator().manual_seed(2)
    observations = torch.randn(3, batch_size, 56, generator=generator, dtype=torch.float64)
    policy.core.backend = "eager"
    expected = policy(observations).logits
    policy.core.backend = "native"
    for keep in (False, True):
        acting = policy.acting(3, batch_size, keep)
        logits = torch.stack([acting.step(now).clone() for now in observations])
        torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("propagation", ["sgprop", "backprop"])
def test_native_update_reuses_the_rollout(propagation: str) -> None:
    """Also where all episodes end before T, as truncated ones do."""
    policy = as_if_trained(sparsenet(propagation=propagation))
    batch = Rollout(make_vector("labyrinth_escape", 5, ENV_CONFIG), policy, 0, keep=True).collect()
    assert batch.acted.recorder.steps < ENV_CONFIG["episode_length"]
    assert batch.acted.is_of(policy, batch.observations)
    reused = gradients(policy, batch)
    batch.acted = None
    for name, value in gradients(policy, batch).items():
        torch.testing.assert_close(reused[name], value, rtol=1e-9, atol=1e-13)


def test_native_never_reuses_what_changed() -> None:
    policy = sparsenet()
    env = make_vector("labyrinth_escape", 5, ENV_CONFIG)
    rollout = Rollout(env, policy, 0, keep=True)
    batch = rollout.collect()
    assert not batch.acted.is_of(sparsenet(), batch.observations)
    assert not batch.acted.is_of(policy, batch.observations + 1)
    assert not batch.acted.is_of(policy, batch.observations[:-1])
    assert batch.acted.is_of(policy, batch.observations)
    for parameter in policy.parameters():
        batch = rollout.collect()
        with torch.no_grad():
            parameter.add_(0.1)
        assert not batch.acted.is_of(policy, batch.observations)
        changed = gradients(policy, batch)
        batch.acted = None
        for name, value in gradients(policy, batch).items():
            assert torch.equal(changed[name], value), name
    assert Rollout(env, policy, 0).collect().acted is None


def test_native_bandit_step_reuses_the_rollout() -> None:
    policy = make_policy(
        "sparse_mlp", 30, 4, dtype=torch.float64, num_layers=3, backend="native", **SMALL
    )
    images = torch.rand(9, 30, dtype=torch.float64)
    acting = policy.acting(1, 9, keep=True)
    with torch.inference_mode():
        logits = acting.step(images)
    assert not acting.is_of(policy, images.unsqueeze(0) + 1)
    results = []
    for acted in (acting, None):
        policy.zero_grad()
        for neurons in policy.core.layers:
            neurons.mixing_weight.fill_(0.5)
        if acted is None:
            output = policy(images.unsqueeze(0))
        else:
            output = acted.replay(policy, images.unsqueeze(0), None)
        assert torch.equal(output.logits[0], logits)
        output.logits.sin().sum().backward()
        lambdas = [neurons.mixing_weight.clone() for neurons in policy.core.layers]
        results.append([p.grad for p in policy.parameters()] + lambdas)
    assert all(map(torch.equal, *results))
    with torch.no_grad():
        policy.core.layers[1].bias.add_(1)
    assert not acting.is_of(policy, images.unsqueeze(0))
    assert policy.acting(2, 9, keep=True).is_of(policy, images) is False


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.sampled_from([1, 5, 13]),
    st.lists(st.sampled_from([1, 2, 3, 5, 7, 11]), min_size=3, max_size=3),
    st.sampled_from([1, 3, 8, 15, 16, 17, 31, 33, 300]),
    st.booleans(),
)
def test_native_feedforward_on_uneven_sizes(
    num_neurons: int, sizes: list[int], batch: int, residual: bool
) -> None:
    """Without gradients too, in several pieces where the batch is large."""
    neuron_size, num_parents, num_slots = sizes
    num_parents = min(num_parents, num_neurons)
    generator = torch.Generator().manual_seed(0)
    mlp = SparseMLP(
        num_parents * neuron_size + 4, 3, num_neurons, neuron_size, num_parents, num_slots,
        residual=residual, generator=generator, dtype=torch.float64,
    )  # fmt: skip
    x = torch.randn(batch, mlp.input_size, generator=generator, dtype=torch.float64)
    results = []
    for backend in ("eager", "native"):
        twin, x_again = copy.deepcopy(mlp), x.clone().requires_grad_()
        twin.backend = backend
        output = twin(x_again)
        output.sin().sum().backward()
        with torch.no_grad():
            values = [twin(x), output, x_again.grad, *(p.grad for p in twin.parameters())]
        lambdas = [neurons.mixing_weight for neurons in twin.layers]
        statistics = [twin.statistics[name] for name in native.STATISTICS]
        results.append([*values, *lambdas, *statistics])
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


# -------------------------------------------------------------------- compiler and cache


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("SGRL_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("SGRL_CXXFLAGS", "-O0")  # what it compiles here is never run for long
    for cached in (library.load_library, backends._warn):
        cached.cache_clear()
    yield tmp_path
    for cached in (library.load_library, backends._warn):
        cached.cache_clear()


def assert_falls_back(message: str) -> None:
    """Of "auto", with one warning in all, to the torch backend's numbers; not of "native"."""
    with pytest.warns(RuntimeWarning, match=message) as caught:
        assert resolve_backend("auto") == "torch"
    assert len(caught) == 1
    x = torch.randn(4, 5, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generator = torch.Generator().manual_seed(0)
        rnn = SparseRNN(3, **SMALL, num_input_neurons=2, generator=generator)
        output = rnn(x)[0]
        rnn.backend = "torch"
        assert torch.equal(output, rnn(x)[0])
        refused = f"(?s)backend 'native' cannot run: .*{message}.*'auto'"
        for make in (
            lambda: SparseRNN(3, **SMALL, num_input_neurons=2, backend="native"),
            lambda: SparseMLP(40, 3, **SMALL, backend="native"),
            lambda: sparsenet(),
            lambda: resolve_backend("native"),
        ):
            with pytest.raises(ValueError, match=refused) as error:
                make()
            assert "\n" not in str(error.value)
        rnn.backend = "native"
        with pytest.raises(ValueError, match=refused):
            rnn(x)


def test_fallback_without_a_compiler(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    save_policy(sparsenet(), tmp_path)
    library.load_library.cache_clear()
    monkeypatch.setenv("SGRL_CACHE_DIR", str(empty_cache / "another"))
    monkeypatch.setenv("PATH", str(empty_cache))
    monkeypatch.delenv("CXX", raising=False)
    assert_falls_back("found no C[+][+] compiler.*install")
    # What was trained in compiled code is read without it.
    loaded = load_policy(tmp_path)
    assert loaded.settings.backend == "auto"
    assert loaded(torch.zeros(2, 1, 56, dtype=torch.float64)).logits.isfinite().all()


def test_fallback_where_compiling_fails(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGRL_CXXFLAGS", "-DREAL_=1 -include /does/not/exist.h")
    assert_falls_back("failed: .*error")


class HalfSlots(SlotNeurons):
    """Neurons whose output is half of what it was."""

    def forward(self, inputs: torch.Tensor) -> Activation:
        activation = SlotNeurons.forward(self, inputs)
        return activation._replace(output=activation.output / 2)


class ConstantSchedule(SparseRNN):
    def schedule(self, length: int) -> torch.Tensor:
        return self.neurons.mixing_weight.expand(length, -1)


#: What is done to a network's neurons, none of which a kernel knows of.
CHANGES: dict[str, Callable[[SlotNeurons], object]] = {
    "class": lambda neurons: setattr(neurons, "__class__", HalfSlots),
    "hook": lambda neurons: neurons.register_forward_hook(
        lambda _, __, activation: activation._replace(output=activation.output / 2)
    ),
    "parametrization": lambda neurons: parametrize.register_parametrization(
        neurons, "bias", nn.Tanh()
    ),
    "method": lambda neurons: setattr(neurons, "forward", HalfSlots.forward.__get__(neurons)),
}


def network_of(kind: str, backend: str, **settings: object) -> Any:
    generator = torch.Generator().manual_seed(0)
    if kind == "recurrent":
        sizes = SMALL | {"num_input_neurons": 2}
        return SparseRNN(6, **sizes, backend=backend, generator=generator, **settings)
    return SparseMLP(6, 2, **SMALL, backend=backend, generator=generator, **settings)


def output_of(network: Any, x: torch.Tensor) -> torch.Tensor:
    output = network(x)
    return output[0] if isinstance(network, SparseRNN) else output


both_kinds = pytest.mark.parametrize("kind", ["recurrent", "feedforward"])


@both_kinds
@pytest.mark.parametrize("change", CHANGES)
def test_neurons_that_are_changed_compute_as_they_are(kind: str, change: str) -> None:
    x = torch.randn(4, 5, 6)
    unchanged = output_of(network_of(kind, "eager"), x)
    networks = {name: network_of(kind, name) for name in ("auto", *BACKENDS)}
    for network in networks.values():
        CHANGES[change](network.neurons if kind == "recurrent" else network.layers[1])
    expected = output_of(networks["eager"], x)
    assert not torch.allclose(expected, unchanged, rtol=1e-3)
    assert torch.equal(output_of(networks["auto"], x), expected)
    for name in ("torch", "native"):
        with pytest.raises(ValueError, match=f"^backend '{name}' cannot run: .*no plain Slot.*$"):
            networks[name](x)


@both_kinds
def test_native_that_is_named_is_never_replaced(kind: str) -> None:
    """Where it cannot run it says why; "auto" takes the torch backend."""
    x = torch.randn(4, 5, 6)
    cases: dict[str, tuple[Callable[[Any], object], torch.Tensor]] = {
        "input is float32, the parameters are float64": (lambda n: n.double(), x),
        "runs on the CPU, not on meta": (lambda n: n.to("meta"), x.to("meta")),
        "in float32 and float64, not in bfloat16": (lambda n: n.bfloat16(), x.bfloat16()),
    }
    if kind == "recurrent":
        cases["ConstantSchedule has a schedule of its own"] = (
            lambda n: setattr(n, "__class__", ConstantSchedule),
            x,
        )
    for message, (change, seen) in cases.items():
        networks = [network_of(kind, name) for name in ("native", "auto")]
        for network in networks:
            change(network)
        with pytest.raises(ValueError, match=f"^backend 'native' cannot run: .*{message}.*'auto'"):
            networks[0](seen)
        assert networks[1].runs_on(seen) == "torch"
    with pytest.raises(ValueError, match="not in bfloat16"):
        network_of(kind, "native", dtype=torch.bfloat16)
    automatic = network_of(kind, "auto", dtype=torch.bfloat16)
    assert output_of(automatic, x.bfloat16()).isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@both_kinds
def test_autocast_changes_nothing_inside(backend: str, kind: str) -> None:
    """The layers compute in the precision of their parameters."""
    x = torch.randn(4, 5, 6).bfloat16()
    results = []
    for autocast in (True, False):
        network = network_of(kind, backend, mixing_weight=0.5)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = output_of(network, x if autocast else x.float())
        output.square().sum().backward()
        results.append([output, *(parameter.grad for parameter in network.parameters())])
    assert all(map(torch.equal, *results))


def test_fallback_to_a_temporary_folder(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (empty_cache / "file").write_text("")
    monkeypatch.setenv("SGRL_CACHE_DIR", str(empty_cache / "file"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolve_backend("auto") == "native"


def test_compiling_anew_where_the_kept_library_is_damaged(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert native.unavailable(torch.float32) is None
    [kept] = (empty_cache / "cache").glob("*.so")
    kept.unlink()  # not written over: this process has it mapped
    kept.write_text("damaged")
    library.load_library.cache_clear()
    assert native.unavailable(torch.float32) is None


def _compile(barrier) -> bool:
    barrier.wait()
    return isinstance(library.load_library("float"), ctypes.CDLL)


def test_compiling_in_four_processes_at_once(empty_cache: Path) -> None:
    context = multiprocessing.get_context("fork")
    with context.Manager() as manager, context.Pool(4) as pool:
        assert pool.map(_compile, [manager.Barrier(4)] * 4, chunksize=1) == [True] * 4
    # Nothing half done is left behind.
    assert [file.suffix for file in (empty_cache / "cache").iterdir()] == [".so"]


# ------------------------------------------------------------- what is shared with C++


def check_offsets(structures: dict[str, type[ctypes.Structure]], folder: Path) -> str:
    """Ask the compiler whether it lays out the structures like this; its errors."""
    checks = []
    for name, structure in structures.items():
        checks.append(f"static_assert(sizeof({name}) == {ctypes.sizeof(structure)});")
        for field, *_ in structure._fields_:
            offset, size = (getattr(getattr(structure, field), n) for n in ("offset", "size"))
            checks.append(f"static_assert(offsetof({name}, {field}) == {offset});")
            checks.append(f"static_assert(sizeof({name}::{field}) == {size});")
    file = folder / "check.cpp"
    file.write_text("\n".join(["#include <cstddef>", f'#include "{SOURCE}"', *checks]))
    command = [*compiler.find_compiler(), "-std=gnu++17", "-w", "-fsyntax-only", str(file)]
    return subprocess.run(command, capture_output=True, text=True).stderr


def test_structures_are_those_of_the_source(tmp_path: Path) -> None:
    """They are read from it; the compiler lays them out the same, and finds one that differs."""
    assert check_offsets(native._STRUCTURES, tmp_path) == ""
    of_slots, of_cells = (
        {"Layer", "Policy", "Mixing", "Gradients", "Stack"},
        {"Cells", "CellGradients", "DensePolicy", "DenseGradients"},
    )
    assert set(native._STRUCTURES) == of_slots | of_cells
    source = SOURCE.read_text()
    planted, _ = native.read_declarations(source.replace("std::int32_t residual", "Index residual"))
    assert "offsetof(Stack, residual)" not in check_offsets(planted, tmp_path)  # 4 bytes of padding
    assert "sizeof(Stack::residual)" in check_offsets(planted, tmp_path)
    planted, _ = native.read_declarations(source.replace("double schedule_beta;", ""))
    assert "offsetof(Mixing, positive_projection)" in check_offsets(planted, tmp_path)


def test_a_structure_that_native_does_not_know_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    source = SOURCE.read_text()
    for old, new in (("double schedule_beta;", "float schedule_beta;"), ("scale; ", "scale{1}; ")):
        with pytest.raises(ValueError, match="cannot read the declaration"):
            native.read_declarations(source.replace(old, new))
    renamed, _ = native.read_declarations(source.replace("double schedule_beta", "double beta"))
    monkeypatch.setattr(native, "_STRUCTURES", renamed)
    rnn = SparseRNN(3, **SMALL, num_input_neurons=2, backend="native")
    with pytest.raises(TypeError, match=r"Mixing of .* and native\.py differ in: beta"):
        rnn(torch.randn(4, 5, 3))[0].sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_memory_is_never_read_before_it_is_written(dtype: torch.dtype) -> None:
    """With all fresh memory full of NaN, nothing that comes out is NaN, or other than without."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(9).isnan().all()
        for batch in (1, 3, 5, 8, 13, 20):
            for length in (1, 5, 33):
                problem = {
                    "sizes": {"input_size": 5, "num_neurons": 7, "num_input_neurons": 3},
                    "length": length,
                    "batch": batch,
                    "masked": True,
                    "seed": batch,
                }
                for rule in ("published", "episodes"):
                    rnn, arguments = make_problem(
                        problem | {"options": {"mixing_rule": rule}}, dtype
                    )
                    rnn.backend = "native"
                    found = []
                    for full_of_nan in (True, False):
                        torch.utils.deterministic.fill_uninitialized_memory = full_of_nan
                        native._spare.clear()
                        found.append(run(rnn, *arguments))
                    torch.utils.deterministic.fill_uninitialized_memory = True
                    for name, value in found[0].items():
                        assert value.isfinite().all(), (name, batch, length)
                        assert torch.equal(value, found[1][name]), (name, batch, length)
            mlp = SparseMLP(40, 3, **SMALL, dtype=dtype, backend="native")
            native._spare.clear()
            mlp(torch.randn(batch, 40, dtype=dtype)).sum().backward()
            for parameter in mlp.parameters():
                assert parameter.grad.isfinite().all()
            assert all(neurons.mixing_weight.isfinite().all() for neurons in mlp.layers)
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = True
        torch.use_deterministic_algorithms(False)
