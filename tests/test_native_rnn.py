"""The native backend of GRU and LSTM against torch's own modules, and older records of them."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sgrl.envs.registry import make_vector
from sgrl.nn.kernels import native
from sgrl.nn.kernels.native_rnn import Cells, unroll
from sgrl.nn.policy import PolicyOutput, State
from sgrl.nn.recurrent_policies import DenseRecurrentPolicy, GRUPolicy
from sgrl.nn.registry import load_policy, make_policy, save_policy
from sgrl.reinforce.loop import train
from sgrl.reinforce.rollout import Rollout
from sgrl.reinforce.update import UpdateSettings, batch_loss

ENV_CONFIG = {"episode_length": 12}
SMALL = {"feature_size": 9, "embedding_size": 5, "hidden_size": 11}
KINDS = {"gru": nn.GRU, "lstm": nn.LSTM}
both = pytest.mark.parametrize("name", KINDS)


def trained(
    name: str, backend: str, actions: int = 4, observation: int = 56, **sizes: Any
) -> DenseRecurrentPolicy:
    """A policy with biases other than zero, in float64 unless `sizes` says otherwise."""
    given = {"dtype": torch.float64, **SMALL, **sizes}
    policy = make_policy(name, observation, actions, backend=backend, **given)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(0.2 * noise)
    assert isinstance(policy, DenseRecurrentPolicy)
    return policy


def weighted(output: Tensor) -> Tensor:
    """A sum of it in which every entry has a weight of its own."""
    return (output * torch.linspace(-1, 1, output.numel()).to(output).view_as(output)).sum()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.sampled_from(list(KINDS)),
    st.tuples(*[st.sampled_from([1, 2, 3, 5, 8, 16, 17, 33, 48]) for _ in range(3)]),
    st.sampled_from([1, 2, 9, 40]),
    st.sampled_from([(torch.float64, 1e-12), (torch.float32, 1e-5)]),
)
def test_equal_to_torch(name: str, sizes: tuple, length: int, precision: tuple) -> None:
    """Output, last state and all gradients, of sizes that do and do not fill vectors and tiles."""
    (batch, units, inputs), (dtype, tolerance) = sizes, precision
    core = KINDS[name](inputs, units, dtype=dtype)
    x = torch.randn(length, batch, inputs, dtype=dtype, requires_grad=True)
    state = [torch.randn(batch, units, dtype=dtype, requires_grad=True) for _ in name[::3]]
    given = [x, *state, *core.parameters()]

    def results(output: Tensor, after: list[Tensor]) -> list[Tensor]:
        total = weighted(output) + sum(2 * weighted(part) for part in after)
        return [output, *after, *torch.autograd.grad(total, given)]

    before = [part.unsqueeze(0) for part in state]
    output, last = core(x, tuple(before) if len(before) > 1 else before[0])
    expected = results(output, [part[0] for part in (last if name == "lstm" else [last])])
    output, after = unroll(Cells.of(core), x, state)
    for actual, value in zip(results(output, list(after)), expected, strict=True):
        error = (actual - value).abs().max().item()
        assert error <= tolerance * max(1, value.abs().max().item())
    with torch.no_grad():
        assert torch.equal(unroll(Cells.of(core), x, state)[0], output)


@both
def test_over_several_chunks_of_samples(name: str) -> None:
    """The published sizes: more samples than are summed up at a time, more rows than one tile."""
    core = KINDS[name](128, 256, dtype=torch.float64)
    x = torch.randn(30, 20, 128, dtype=torch.float64)
    zeros = [torch.zeros(20, 256, dtype=torch.float64) for _ in name[::3]]
    found = []
    for output in (core(x)[0], unroll(Cells.of(core), x, zeros)[0]):
        found.append([output, *torch.autograd.grad(weighted(output), core.parameters())])
    for actual, expected in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@both
def test_only_the_last_cell_is_used(name: str) -> None:
    """Its gradient alone reaches the beginning, and what needs no gradient gets none."""
    core = KINDS[name](3, 4, dtype=torch.float64)
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    state = [torch.randn(2, 4, dtype=torch.float64, requires_grad=True) for _ in name[::3]]
    before = [part.unsqueeze(0) for part in state]
    last = core(x, tuple(before) if len(before) > 1 else before[0])[1]
    expected = torch.autograd.grad(weighted(last[1] if name == "lstm" else last), state)
    actual = torch.autograd.grad(weighted(unroll(Cells.of(core), x, state)[1][-1]), state)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(("name", "batch"), itertools.product(KINDS, [1, 3, 16, 20, 33]))
def test_acts_as_it_computes(name: str, batch: int) -> None:
    expected = trained(name, "torch")
    policy = trained(name, "native")
    observations = torch.randn(4, batch, 56, dtype=torch.float64)
    for keep in (False, True):
        acting = policy.acting(4, batch, keep)
        logits = torch.stack([acting.step(now).clone() for now in observations])
        torch.testing.assert_close(logits, expected(observations).logits, rtol=1e-10, atol=1e-12)
    state = policy.initial_state(batch)
    for now in observations:
        state = policy.step(now, state).state
    for part, value in acting.replay(policy, observations, None).state.items():
        torch.testing.assert_close(state[part], value)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    st.sampled_from(list(KINDS)),
    st.tuples(*[st.sampled_from([1, 2, 5, 8, 17, 33]) for _ in range(7)]),
    st.booleans(),
)
def test_a_replay_is_the_policy(name: str, sizes: tuple, value_head: bool) -> None:
    """Outputs and the gradients of all parameters, of sizes that do and do not fill vectors."""
    batch, length, observation, actions, *parts = sizes
    made = dict(zip(SMALL, parts, strict=True), value_head=value_head, dtype=torch.float64)
    policies = [trained(name, b, actions, observation, **made) for b in ("native", "torch")]
    observations = torch.randn(length, batch, observation, dtype=torch.float64)
    acting = policies[0].acting(length, batch, keep=True)
    for now in observations[: (length + 1) // 2]:
        acting.step(now)
    found = []
    for policy, run in zip(policies, (acting.replay, lambda p, x, _: p(x)), strict=True):
        logits, values, state = run(policy, observations, None)
        outputs = [logits, *state.values(), *([] if values is None else [values])]
        total = sum((i + 1) * weighted(part) for i, part in enumerate(outputs))
        found.append([*outputs, *torch.autograd.grad(total, list(policy.parameters()))])
    for actual, expected in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


def gradients(policy: DenseRecurrentPolicy, batch: Any) -> dict[str, Tensor]:
    policy.zero_grad()
    batch_loss(policy, batch, UpdateSettings()).loss.backward()
    return {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}


@both
def test_update_reuses_the_rollout(name: str) -> None:
    """Also where all episodes end before T; padded steps count as they do in torch."""
    policy, other = trained(name, "native"), trained(name, "torch")
    env = make_vector("labyrinth_escape", 5, ENV_CONFIG)
    batch = Rollout(env, policy, 0, keep=True).collect()
    assert batch.acted is not None
    assert batch.acted.recorder.steps < ENV_CONFIG["episode_length"]  # type: ignore[attr-defined]
    assert batch.acted.is_of(policy, batch.observations)
    reused = gradients(policy, batch)
    batch.acted = None
    for expected in (gradients(policy, batch), gradients(other, batch)):
        assert expected.keys() == reused.keys()
        for key, value in expected.items():
            torch.testing.assert_close(reused[key], value, rtol=1e-10, atol=1e-13)


@both
def test_never_reuses_what_changed(name: str) -> None:
    policy = trained(name, "native")
    rollout = Rollout(make_vector("labyrinth_escape", 5, ENV_CONFIG), policy, 0, keep=True)
    batch = rollout.collect()
    assert not batch.acted.is_of(trained(name, "native"), batch.observations)
    assert not batch.acted.is_of(policy, batch.observations + 1)
    assert not batch.acted.is_of(policy, batch.observations[:-1])
    for parameter in policy.parameters():
        batch = rollout.collect()
        with torch.no_grad():
            parameter.add_(0.1)
        assert not batch.acted.is_of(policy, batch.observations)
    batch = rollout.collect()
    policy.actor[1].negative_slope = 0.5
    assert not batch.acted.is_of(policy, batch.observations)


@both
def test_two_runs_are_bitwise_equal(name: str) -> None:
    rows = []
    for _ in range(2):
        policy = trained(name, "native", dtype=torch.float32)
        rows.append(list(train(policy, make_vector("labyrinth_escape", 5, ENV_CONFIG), 4)))
    assert rows[0] == rows[1]


@both
def test_learns_what_torch_learns(name: str) -> None:
    runs = [
        list(train(trained(name, b), make_vector("labyrinth_escape", 5, ENV_CONFIG), 4))
        for b in ("torch", "native")
    ]
    for one, other in zip(*runs, strict=True):
        assert one == pytest.approx(other, rel=1e-9)


@both
def test_passes_nan_on(name: str) -> None:
    policy = trained(name, "native")
    observations = torch.randn(4, 3, 56, dtype=torch.float64)
    observations[1, 2, 0] = float("nan")
    logits = policy(observations).logits
    assert logits[:, :2].isfinite().all()
    assert logits[1:, 2].isnan().all()
    logits.sum().backward()
    assert policy.core.weight_hh_l0.grad.isnan().any()


class Louder(GRUPolicy):
    """Reads its core's output in a way of its own."""

    def read_out(self, features: Tensor, state: State) -> PolicyOutput:
        return super().read_out(2 * features, state)


class Doubled(GRUPolicy):
    """Runs its core in a way of its own."""

    def run_core(
        self, embeddings: Tensor, state: State, mask: Tensor | None
    ) -> tuple[Tensor, State]:
        features, after = super().run_core(embeddings, state, mask)
        return 2 * features, after


CHANGES: dict[str, Callable[[DenseRecurrentPolicy], object]] = {
    "hook": lambda p: p.core.register_forward_hook(lambda _, __, out: (out[0] / 2, out[1])),
    "parametrization": lambda p: parametrize.register_parametrization(
        p.core, "bias_ih_l0", nn.Tanh()
    ),
}


@both
@pytest.mark.parametrize("change", CHANGES)
def test_a_core_that_is_changed_computes_as_it_is(name: str, change: str) -> None:
    """auto takes torch, and native that is named is an error of one line."""
    x = torch.randn(4, 3, 56, dtype=torch.float64)
    policies = {backend: trained(name, backend) for backend in ("auto", "torch", "native")}
    unchanged = policies["torch"](x).logits
    for policy in policies.values():
        CHANGES[change](policy)
    expected = policies["torch"](x).logits
    assert not torch.allclose(expected, unchanged, rtol=1e-3)
    assert torch.equal(policies["auto"](x).logits, expected)
    torch.testing.assert_close(policies["auto"].acting(4, 3).step(x[0]), expected[0])
    with pytest.raises(ValueError, match=r"^backend 'native' cannot run: the core is no plain .*$"):
        policies["native"](x)


@both
def test_native_that_is_named_is_never_replaced(name: str) -> None:
    """Where it cannot run it says why; "auto" takes torch."""
    sizes = SMALL["embedding_size"], SMALL["hidden_size"]
    double = torch.float64
    x = torch.randn(4, 3, sizes[0], dtype=double)
    cases: dict[str, tuple[Callable[[Any], object], Tensor]] = {
        "input is torch.float32, the parameters are torch.float64": (lambda p: None, x.float()),
        "runs on the CPU, not on meta": (lambda p: p.to("meta"), x.to("meta")),
        "in float32 and float64, not in bfloat16": (lambda p: p.bfloat16(), x.bfloat16()),
        "of one layer with biases": (
            lambda p: setattr(p, "core", KINDS[name](*sizes, num_layers=2, dtype=double)),
            x,
        ),
        "other shapes than": (
            lambda p: setattr(p.core, "bias_hh_l0", nn.Parameter(torch.ones(1, dtype=double))),
            x,
        ),
    }
    for message, (change, seen) in cases.items():
        policies = [trained(name, backend) for backend in ("native", "auto")]
        for policy in policies:
            change(policy)
        with pytest.raises(ValueError, match=f"^backend 'native' cannot run: .*{message}.*'auto'"):
            policies[0].runs_on(seen)
        assert policies[1].runs_on(seen) == "torch"
    policies = [trained(name, backend) for backend in ("native", "auto")]
    with torch.autocast("cpu", torch.bfloat16):
        assert policies[1].runs_on(x) == "torch"
        with pytest.raises(ValueError, match=r"'native' cannot run: torch\.autocast is on"):
            policies[0].runs_on(x)
    assert policies[1].runs_on(x) == "native"
    with pytest.raises(ValueError, match=r"unknown backend 'nativ'; did you mean 'native'\?"):
        make_policy(name, 56, 4, backend="nativ")


def test_shapes_that_do_not_fit_are_refused() -> None:
    cells, x = Cells.of(nn.GRU(3, 4)), torch.randn(5, 2, 3)
    for wrong in (torch.randn(5, 2, 4), torch.randn(0, 2, 3)):
        with pytest.raises(ValueError, match=r"x must be \[T, B, 3\] and not empty, got"):
            unroll(cells, wrong, [torch.zeros(2, 4)])
    for state in (torch.zeros(2, 5), torch.zeros(2, 4, dtype=torch.float64)):
        with pytest.raises(ValueError, match=r"the state must be torch\.float32 \[2, 4\], got"):
            unroll(cells, x, [state])


def test_a_subclass_computes_what_it_says() -> None:
    """Its steps are not those of compiled code; the core in them is."""
    made = (64, 4, trained("gru", "native").settings, torch.Generator().manual_seed(0))
    one, other, louder = (kind(*made, torch.float64) for kind in (GRUPolicy, Doubled, Louder))
    x = torch.randn(3, 2, 64, dtype=torch.float64)
    assert not torch.allclose(one(x).logits, other(x).logits)
    acting = other.acting(3, 2, keep=True)
    logits = torch.stack([acting.step(now) for now in x])
    torch.testing.assert_close(logits, other(x).logits, rtol=1e-10, atol=1e-12)
    for acting in (louder.acting(3, 2), louder.acting(3, 2, keep=True)):
        logits = torch.stack([acting.step(now) for now in x])
        torch.testing.assert_close(logits, louder(x).logits, rtol=1e-10, atol=1e-12)
    other.actor[0] = nn.Linear(11, 128, dtype=torch.float64)
    other.actor[1] = nn.Tanh()
    assert not other.step_is_published()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@both
def test_memory_is_never_read_before_it_is_written(name: str, dtype: torch.dtype) -> None:
    """With all fresh memory full of NaN, nothing that comes out is NaN, or other than without."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(9).isnan().all()
        for batch, length in itertools.product((1, 5, 20), (1, 7)):
            policy = trained(name, "native", dtype=dtype)
            observations = torch.randn(length, batch, 56, dtype=dtype)
            found = []
            for full_of_nan in (True, False):
                torch.utils.deterministic.fill_uninitialized_memory = full_of_nan  # type: ignore[attr-defined]
                native._spare.clear()
                acting = policy.acting(length, batch, keep=True)
                for now in observations[: length // 2]:
                    acting.step(now)
                output = acting.replay(policy, observations, None)
                total = weighted(output.logits) + sum(map(weighted, output.state.values()))
                grads = torch.autograd.grad(total, list(policy.parameters()))
                found.append([output.logits, *output.state.values(), *grads])
            torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
            for one, again in zip(*found, strict=True):
                assert one.isfinite().all()
                assert torch.equal(one, again)
    finally:
        torch.use_deterministic_algorithms(False)


@both
def test_a_policy_saved_before_there_were_backends(name: str, tmp_path: Path) -> None:
    """It computes as it did then; one of now as the fastest does."""
    policy = trained(name, "torch")
    save_policy(policy, tmp_path)
    description = tmp_path / "policy.json"
    text = description.read_text()
    assert '"backend": "torch"' in text
    description.write_text(text.replace('"backend": "torch"', '"value_head": false'))
    older = load_policy(tmp_path)
    x = torch.randn(3, 2, 56, dtype=torch.float64)
    assert older.settings.backend == "torch"  # type: ignore[attr-defined]
    assert torch.equal(older(x).logits, policy(x).logits)
    description.write_text(text.replace('"backend": "torch"', '"backend": "native"'))
    assert load_policy(tmp_path).settings.backend == "auto"  # type: ignore[attr-defined]
