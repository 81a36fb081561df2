"""The native backend: against eager on sizes of all kinds, its record, its compiler and cache."""

import copy
import multiprocessing
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_recurrent import make_problem, problems, run

from sgrl.envs.registry import make_vector
from sgrl.nn.feedforward import SparseMLP
from sgrl.nn.kernels import compiler, native, resolve_backend
from sgrl.nn.policies import make_policy
from sgrl.nn.recurrent import SparseRNN
from sgrl.nn.recurrent_policies import SparseNetPolicy
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
    assert rnn.runs_native(arguments[0])
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
    problem = {"sizes": sizes, "options": {}, "length": 70, "batch": 29, "masked": True, "seed": 1}
    assert_native_equals_eager(problem, dtype, tolerance)


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
        output = policy(images.unsqueeze(0), acted=acted)
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
    compiler.load_library.cache_clear()
    yield tmp_path
    compiler.load_library.cache_clear()


def assert_falls_back(message: str) -> None:
    """One warning in all, then the torch backend's numbers."""
    with pytest.warns(RuntimeWarning, match=message) as caught:
        assert resolve_backend("auto") == "torch"
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generator = torch.Generator().manual_seed(0)
        rnn = SparseRNN(3, **SMALL, num_input_neurons=2, backend="native", generator=generator)
        x = torch.randn(4, 5, 3)
        output = rnn(x)[0]
        rnn.backend = "torch"
        assert torch.equal(output, rnn(x)[0])


def test_fallback_without_a_compiler(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(empty_cache))
    monkeypatch.delenv("CXX", raising=False)
    assert_falls_back("found no C[+][+] compiler.*Install")


def test_fallback_where_compiling_fails(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGRL_CXXFLAGS", "-DREAL_=1 -include /does/not/exist.h")
    assert_falls_back("failed: .*error")


def test_fallback_to_a_temporary_folder(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (empty_cache / "file").write_text("")
    monkeypatch.setenv("SGRL_CACHE_DIR", str(empty_cache / "file"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolve_backend("auto") == "native"


def test_compiling_anew_where_the_kept_library_is_damaged(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert native.load(torch.float32) is not None
    [library] = (empty_cache / "cache").glob("*.so")
    library.unlink()  # not written over: this process has it mapped
    library.write_text("damaged")
    compiler.load_library.cache_clear()
    assert native.load(torch.float32) is not None


def _compile(barrier) -> bool:
    barrier.wait()
    return compiler.load_library("float") is not None


def test_compiling_in_four_processes_at_once(empty_cache: Path) -> None:
    context = multiprocessing.get_context("fork")
    with context.Manager() as manager, context.Pool(4) as pool:
        assert pool.map(_compile, [manager.Barrier(4)] * 4, chunksize=1) == [True] * 4
    # Nothing half done is left behind.
    assert [file.suffix for file in (empty_cache / "cache").iterdir()] == [".so"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_memory_is_never_read_before_it_is_written(dtype: torch.dtype) -> None:
    """With all fresh memory full of NaN, nothing that comes out is NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(9).isnan().all()
        for batch in (1, 3, 5, 8, 13, 20):
            for length in (1, 5, 33):
                problem = {
                    "sizes": {"input_size": 5, "num_neurons": 7, "num_input_neurons": 3},
                    "options": {},
                    "length": length,
                    "batch": batch,
                    "masked": True,
                    "seed": batch,
                }
                rnn, arguments = make_problem(problem, dtype)
                rnn.backend = "native"
                native._spare.clear()
                for name, value in run(rnn, *arguments).items():
                    assert value.isfinite().all(), (name, batch, length)
            mlp = SparseMLP(40, 3, **SMALL, dtype=dtype, backend="native")
            native._spare.clear()
            mlp(torch.randn(batch, 40, dtype=dtype)).sum().backward()
            for parameter in mlp.parameters():
                assert parameter.grad.isfinite().all()
            assert all(neurons.mixing_weight.isfinite().all() for neurons in mlp.layers)
    finally:
        torch.use_deterministic_algorithms(False)
