"""`neuron_noise`: by its definition on every backend, and the same in rollout and update."""

import copy
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sgrl.analysis.episodes import record_episode
from sgrl.envs.registry import make_vector
from sgrl.nn.feedforward import SparseMLP
from sgrl.nn.mixing import batch_moments
from sgrl.nn.neuron import Activation, SlotNeurons
from sgrl.nn.policy import Acting, Policy
from sgrl.nn.recurrent import SparseRNN
from sgrl.nn.registry import make_policy, save_policy
from sgrl.nn.sgprop import temporal_schedule
from sgrl.reinforce import Rollout, UpdateSettings, make_optimizers, update
from sgrl.reinforce.batch import EpisodeBatch, concatenate
from sgrl.reinforce.update import batch_loss
from sgrl.results.evaluation import evaluation_rollout

SIZES = {"num_neurons": 5, "neuron_size": 3, "num_parents": 2, "num_slots": 2}
#: Of each kind of policy, beside `SIZES`.
POLICIES = {
    "sparsenet": {
        "feature_size": 6,
        "embedding_size": 4,
        "num_input_neurons": 2,
        "actor_slots": 2,
    },
    "sparse_mlp": {"num_layers": 3},
}
BACKENDS = ("eager", "torch", "native")
SIGMA = 0.3
T, B, L = 6, 7, 3
MAZE = {"episode_length": 8}


def build(network: str, **settings: Any) -> SparseRNN | SparseMLP:
    """A small network whose predictors are not zero."""
    settings = {
        "mixing_weight": 0.6,
        "mixing_momentum": 0.5,
        "generator": torch.Generator().manual_seed(0),
        "dtype": torch.float64,
        "neuron_noise": SIGMA,
        **SIZES,
        **settings,
    }
    built: SparseRNN | SparseMLP
    if network == "recurrent":
        built = SparseRNN(4, num_input_neurons=2, **settings)
    else:
        built = SparseMLP(8, num_layers=L, **settings)
    draw = torch.Generator().manual_seed(7)
    for name, parameter in built.named_parameters():
        if "predictor" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=draw))
    return built


def inputs(network: str) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(1)
    shapes = ((T, B, 4), (T, B, 5, 3)) if network == "recurrent" else ((B, 8), (B, L, 5, 3))
    given = zip(("x", "noise"), shapes, strict=True)
    drawn = {name: torch.randn(s, generator=draw, dtype=torch.float64) for name, s in given}
    if network == "recurrent":
        drawn["mask"] = torch.arange(T).unsqueeze(1) < torch.randint(1, T + 1, (B,), generator=draw)
    return drawn


def computed(network: SparseRNN | SparseMLP, given: dict[str, Any]) -> dict[str, Tensor]:
    """Output, gradients and mixing weights after a forward and a backward pass."""
    x = given["x"].clone().requires_grad_()
    output = network(**{**given, "x": x})
    output = output[0] if isinstance(output, tuple) else output
    draw = torch.Generator().manual_seed(2)
    by_output = torch.randn(output.shape, generator=draw, dtype=torch.float64)
    output.backward(by_output.to(output))
    assert x.grad is not None
    grads = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    weights = {name: b for name, b in network.named_buffers() if "mixing_weight" in name}
    return {"output": output.detach(), "x": x.grad, **grads, **weights}


class Step:
    """A layer at one step, in the plain loop: what it read and computed, and the way back."""

    def __init__(self, neurons: SlotNeurons, read: Tensor) -> None:
        self.neurons, self.read = neurons, read.detach().requires_grad_()
        self.activation = neurons(self.read)
        self.output = self.activation.output

    def gradients(self, feedback: Tensor) -> dict[str, Tensor]:
        """Of the inputs ("read") and the parameters, from that of the output."""
        names = [n for n, _ in self.neurons.named_parameters() if not n.startswith("predictor")]
        wanted = [self.read, *(getattr(self.neurons, name) for name in names)]
        return dict(
            zip(["read", *names], torch.autograd.grad(self.output, wanted, feedback), strict=True)
        )

    def predict(self) -> Tensor:
        return self.neurons.predict(self.activation).detach()

    def regression(self, residual: Tensor) -> dict[str, Tensor]:
        """Gradients of the predictor from that of its prediction."""
        names = [n for n, _ in self.neurons.named_parameters() if n.startswith("predictor")]
        wanted = [getattr(self.neurons, name) for name in names]
        found = torch.autograd.grad(self.neurons.predict(self.activation), wanted, residual)
        return dict(zip(names, found, strict=True))


def add(totals: dict[str, Tensor], parts: dict[str, Tensor], prefix: str = "") -> None:
    for name, value in parts.items():
        totals[prefix + name] = totals.get(prefix + name, torch.zeros_like(value)) + value


def detached(activations: list[Activation]) -> Activation:
    return Activation(*(torch.cat(v).detach() for v in zip(*activations, strict=True)))


def plain_recurrent(rnn: SparseRNN, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """`computed`, as a plain loop forth and back."""
    x, noise, mask = given["x"], given["noise"], given["mask"]
    h, steps, outputs = torch.zeros(B, 5, 3, dtype=torch.float64), [], []
    for t in range(T):
        steps.append(Step(rnn.neurons, rnn.neurons.read(h, rnn.parents, x[t])))
        h = steps[-1].output.detach() + SIGMA * noise[t]
        outputs.append(h)
    output = torch.stack(outputs)
    draw = torch.Generator().manual_seed(2)
    by_output = torch.randn(output.shape, generator=draw, dtype=torch.float64)
    schedule = temporal_schedule(rnn.neurons.mixing_weight, rnn.parents, T, 0.1)
    totals: dict[str, Tensor] = {}
    carried, received, predicted = torch.zeros_like(h), [], []
    by_x = torch.zeros_like(x)
    for t in range(T - 1, -1, -1):
        gradient = by_output[t] + carried
        mixed = gradient
        if rnn.sgprop.mixes:
            weight, guess = schedule[t].view(1, -1, 1), steps[t].predict()
            mixed = weight * gradient + (1 - weight) * guess
            residual = torch.where(mask[t].view(-1, 1, 1), guess - mixed, 0.0)
            count = mask.sum() * mixed[0].numel()
            add(totals, steps[t].regression(2 * residual / count), "neurons.")
            received.append(gradient[mask[t]])
            predicted.append(guess[mask[t]])
        found = steps[t].gradients(mixed)
        by_read = found.pop("read")
        add(totals, found, "neurons.")
        by_parents, by_x[t] = by_read[..., :6], by_read[:, :2, 6:].sum(1)
        carried = torch.zeros_like(h)
        carried.index_add_(1, rnn.parents.flatten(), by_parents.unflatten(2, (2, 3)).flatten(1, 2))
    if rnn.sgprop.mixes:
        valid = [
            Activation(*(v[mask[t]] for v in steps[t].activation)) for t in range(T - 1, -1, -1)
        ]
        rnn.rule.update(
            rnn.neurons,
            batch_moments(
                detached(valid), torch.cat(received), torch.cat(predicted), rnn.neurons.scale
            ),
        )
    weights = {"neurons.mixing_weight": rnn.neurons.mixing_weight}
    return {"output": output, "x": by_x, **totals, **weights}


def plain_layers(mlp: SparseMLP, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """`computed`, layer by layer up and down."""
    x, noise = given["x"], given["noise"]
    h, steps = x, []
    for layer, neurons in enumerate(mlp.layers):
        read = neurons.read(h, mlp.parents[layer - 1], None) if layer else x[:, mlp.pixels]
        steps.append(Step(neurons, read))
        output = steps[-1].output.detach()
        below = h if layer else torch.zeros_like(output)
        h = (torch.tanh(output) + below if layer else output) + SIGMA * noise[:, layer]
    draw = torch.Generator().manual_seed(2)
    gradient = torch.randn(h.shape, generator=draw, dtype=torch.float64)
    totals: dict[str, Tensor] = {"output": h}
    for layer in range(L - 1, -1, -1):
        neurons, step, mixed = mlp.layers[layer], steps[layer], gradient
        slope = 1 - torch.tanh(step.output.detach()).square() if layer else torch.tensor(1.0)
        if mlp.sgprop.mixes:
            weight, guess = neurons.mixing_weight.view(1, -1, 1), step.predict()
            mixed = weight * gradient + (1 - weight) * guess
            residual = guess - gradient
            add(totals, step.regression(2 * residual / residual.numel()), f"layers.{layer}.")
            vectors = (gradient * slope, guess * slope)
            activation = detached([step.activation])
            mlp.rule.update(neurons, batch_moments(activation, *vectors, neurons.scale))
        found = step.gradients(mixed * slope)
        by_read = found.pop("read")
        add(totals, found, f"layers.{layer}.")
        totals[f"layers.{layer}.mixing_weight"] = neurons.mixing_weight
        if layer:
            gradient = mixed.clone()
            edges = by_read.unflatten(2, (2, 3)).flatten(1, 2)
            gradient.index_add_(1, mlp.parents[layer - 1].flatten(), edges)
        else:
            totals["x"] = torch.zeros_like(x)
            totals["x"].index_add_(1, mlp.pixels.flatten(), by_read.flatten(1))
    return totals


@pytest.mark.parametrize("propagation", ["sgprop", "backprop"])
@pytest.mark.parametrize("network", ["recurrent", "feedforward"])
def test_by_the_definition(network: str, propagation: str) -> None:
    given = inputs(network)
    oracle = build(network, propagation=propagation)
    plain = plain_recurrent if isinstance(oracle, SparseRNN) else plain_layers
    expected = plain(oracle, given)  # type: ignore[operator]
    for backend in BACKENDS:
        one = build(network, propagation=propagation, backend=backend)
        found = computed(one, given)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(
                found[name], value, rtol=1e-10, atol=1e-10, msg=f"{backend}: {name}"
            )
        # Without gradients it runs by pieces, and keeps nothing.
        with torch.no_grad():
            output = one(**given)
        output = output[0] if isinstance(output, tuple) else output
        torch.testing.assert_close(output, expected["output"], rtol=1e-10, atol=1e-10)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("network", ["recurrent", "feedforward"])
def test_on_cuda(network: str) -> None:
    given = inputs(network)
    expected = computed(build(network, backend="torch"), given)
    there = {name: value.cuda() for name, value in given.items()}
    found = computed(build(network, backend="torch").cuda(), there)
    for name, value in expected.items():
        torch.testing.assert_close(found[name].cpu(), value, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("rule", ["published", "episodes"])
@pytest.mark.parametrize("backend", ["torch", "native"])
def test_rules_on_episodes_and_projections(backend: str, rule: str) -> None:
    kind = {"mixing_rule": rule, "positive_projection": True, "mask_predictions": True}
    given = inputs("recurrent")
    eager, fast = (
        computed(build("recurrent", backend=b, **kind), given) for b in ("eager", backend)
    )
    for name, value in eager.items():
        torch.testing.assert_close(fast[name], value, rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("network", ["recurrent", "feedforward"])
def test_none_is_as_ever_and_too_little_is_refused(network: str, backend: str) -> None:
    given = inputs(network)
    without = {name: value for name, value in given.items() if name != "noise"}
    plain = computed(build(network, backend=backend, neuron_noise=0.0), without)
    ignored = computed(build(network, backend=backend, neuron_noise=0.0), given)
    for name, value in plain.items():
        assert torch.equal(ignored[name], value), name
    noisy = build(network, backend=backend)
    for noise in (None, given["noise"][..., :-1]):
        with pytest.raises(ValueError, match=r"neuron_noise is 0.3: give noise \[.*standard nor"):
            noisy(**{**given, "noise": noise})
    with pytest.raises(ValueError, match="neuron_noise must be at least 0, got -1"):
        build(network, neuron_noise=-1)


def make(name: str, backend: str = "auto", sigma: float = SIGMA, **settings: Any) -> Policy:
    kind = {"dtype": torch.float64, "backend": backend, "neuron_noise": sigma}
    return make_policy(name, 56, 4, seed=3, **{**SIZES, **POLICIES[name], **kind, **settings})


def rollout_of(policy: Policy, seed: int = 1, keep: bool = False, envs: int = 5) -> Rollout:
    return Rollout(make_vector("labyrinth_escape", envs, MAZE), policy, seed, keep=keep)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", POLICIES)
def test_the_update_computes_what_acted(
    name: str, backend: str, keep: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    acted: list[Tensor] = []
    policy = make(name, backend)
    kinds = {Acting, type(policy.acting(8, 5, keep, torch.zeros(8, 5, policy.noise_size)))}
    for kind in kinds:
        step = kind.step

        def seen(self: Acting, observations: Tensor, step: Any = step) -> Tensor:
            logits = step(self, observations)
            acted.append(logits.clone())
            return logits

        monkeypatch.setattr(kind, "step", seen)
    batch = rollout_of(policy, keep=keep).collect()
    assert batch.noise is not None
    if batch.acted is None:
        output = policy(batch.observations.double(), mask=batch.mask, noise=batch.noise)
    else:
        assert keep
        output = batch.acted.replay(policy, batch.observations.double(), batch.mask, batch.noise)
    valid = batch.mask[: len(acted)]
    again = output.logits[: len(acted)]
    torch.testing.assert_close(again[valid], torch.stack(acted)[valid], rtol=1e-11, atol=1e-12)
    # With other noise the kept pass is not used.
    other = torch.randn_like(batch.noise)
    expected = policy(batch.observations.double(), mask=batch.mask, noise=other).logits
    if batch.acted is not None:
        output = batch.acted.replay(policy, batch.observations.double(), batch.mask, other)
        torch.testing.assert_close(output.logits, expected, rtol=1e-11, atol=1e-12)
    assert not torch.allclose(expected[: len(acted)], again)


@pytest.mark.parametrize("two_phase", [False, True])
@pytest.mark.parametrize("name", POLICIES)
def test_backends_train_alike(name: str, two_phase: bool) -> None:
    """Forward kept or not, on the same noise they make the same steps."""
    if two_phase and name == "sparsenet":
        pytest.skip("the two-phase update is for feed-forward policies")
    env = ("mnist_bandit", {}) if two_phase else ("labyrinth_escape", MAZE)
    states = []
    for backend, keep in (("eager", False), ("torch", False), ("native", False), ("native", True)):
        size = 784 if two_phase else 56
        kind = {"dtype": torch.float64, "backend": backend, "neuron_noise": SIGMA}
        actions = 9 if two_phase else 4
        policy = make_policy(name, size, actions, seed=3, **SIZES, **POLICIES[name], **kind)
        rollout = Rollout(make_vector(env[0], 6, env[1]), policy, 1, keep=keep)
        optimizers = make_optimizers(policy, 1e-2, 1e-2)
        for _ in range(3):
            update(policy, optimizers, rollout.collect(), UpdateSettings(two_phase=two_phase))
        states.append(policy.state_dict())
    for other in states[1:]:
        for key, value in states[0].items():
            torch.testing.assert_close(other[key], value, rtol=1e-7, atol=1e-9, msg=key)


@pytest.mark.parametrize("name", POLICIES)
def test_gradients_are_the_losss_by_finite_differences(name: str) -> None:
    """Under fixed noise, with lambda 1."""
    policy = make(name, "native", mixing_weight=1.0, adaptive=False)
    batch = rollout_of(policy).collect()
    batch.rewards = torch.randn(batch.rewards.shape, generator=torch.Generator().manual_seed(4))
    batch.rewards = torch.where(batch.mask, batch.rewards, 0.0)
    settings = UpdateSettings(entropy_coeff=0.1)
    batch_loss(policy, batch, settings).loss.backward()
    draw = torch.Generator().manual_seed(5)
    parameters = [p for n, p in policy.named_parameters() if "predictor" not in n]
    for parameter in parameters:
        assert parameter.grad is not None
        way = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
        losses = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                parameter += step * way
                losses.append(float(batch_loss(policy, batch, settings).loss))
                parameter -= step * way
        slope = (losses[0] - losses[1]) / 2e-5
        assert slope == pytest.approx(float((parameter.grad * way).sum()), rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("name", POLICIES)
def test_no_other_stream_moves(name: str) -> None:
    """Noise too small for the numbers' type changes nothing, though it is drawn."""
    runs = []
    for sigma in (0.0, 1e-300, SIGMA):
        policy = make(name, "torch", sigma)
        rollout = rollout_of(policy)
        initial = {key: value.clone() for key, value in policy.state_dict().items()}
        runs.append((initial, [rollout.collect() for _ in range(2)]))
    (plain, batches), (tiny, same), (loud, noisy) = runs
    for key, value in plain.items():
        assert torch.equal(tiny[key], value), key
        assert torch.equal(loud[key], value), key
    for one, other in zip(batches, same, strict=True):
        assert one.noise is None
        assert other.noise is not None
        for key, tensor in one.tensors().items():
            assert torch.equal(other.tensors()[key], tensor), key
    # The same mazes and the same noise, whatever its size; new noise in every batch.
    assert torch.equal(noisy[0].observations[0], batches[0].observations[0])
    assert torch.equal(noisy[0].noise, same[0].noise)
    assert not torch.equal(noisy[0].noise, noisy[1].noise)
    assert noisy[0].noise.shape == (8, 5, 45 if name == "sparse_mlp" else 15)
    every = torch.cat([batch.noise.flatten() for batch in noisy])
    assert abs(float(every.mean())) < 4 / len(every) ** 0.5
    assert float(every.std()) == pytest.approx(1, abs=4 / len(every) ** 0.5)
    assert not torch.equal(noisy[0].actions, batches[0].actions)


@pytest.mark.parametrize("optimizer", ["adam", "least_squares"])
@pytest.mark.parametrize("name", POLICIES)
def test_killed_and_resumed_it_goes_on_bitwise(name: str, optimizer: str) -> None:
    policy = make(name)
    rollout = rollout_of(policy, keep=True)
    optimizers = make_optimizers(policy, 1e-2, 1e-2, optimizer)
    how = UpdateSettings()
    rows = [update(policy, optimizers, rollout.collect(), how) for _ in range(2)]
    resumed = copy.deepcopy(policy)
    again = make_optimizers(resumed, 1e-2, 1e-2, optimizer)
    for key, fresh in again.items():
        fresh.load_state_dict(copy.deepcopy(optimizers[key].state_dict()))
    continued = rollout_of(resumed, keep=True)
    continued.set_state(rollout.get_state())
    rows = [update(policy, optimizers, rollout.collect(), how) for _ in range(2)]
    assert rows == [update(resumed, again, continued.collect(), how) for _ in range(2)]
    for key, value in policy.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], value), key


def test_the_example_of_the_docs() -> None:
    page = (Path(__file__).parent.parent / "docs" / "predictors.md").read_text()
    [code] = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(code, "predictors.md", "exec"), names)
    assert names["output"].shape == (5, 3, 128, 6)


def test_batches_side_by_side_and_evaluation() -> None:
    policy = make("sparsenet")
    env = make_vector("labyrinth_escape", 2, MAZE)
    parts = [Rollout(env, policy, 1, first_env=e, total_envs=4).collect() for e in (0, 2)]
    joined = concatenate(parts)
    assert joined.noise is not None
    assert torch.equal(joined.noise, torch.cat([part.noise for part in parts], dim=1))
    assert not torch.equal(parts[0].noise, parts[1].noise)
    moved = joined.to("cpu")
    assert isinstance(moved, EpisodeBatch)
    assert torch.equal(moved.noise, joined.noise)
    # Evaluation has noise of its own, the same at every time.
    environment = {"env": "labyrinth_escape", "env_config": MAZE}
    first, second, still = (
        evaluation_rollout(make("sparsenet", sigma=sigma), environment, 0).collect().actions
        for sigma in (3.0, 3.0, 0.0)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, still)


def test_a_drawn_episode_shows_what_acted(tmp_path: Path) -> None:
    policy = make("sparsenet")
    environment = {"env": "labyrinth_escape", "env_config": MAZE}
    save_policy(policy, tmp_path, environment=environment)
    episode = record_episode(tmp_path, number=2)
    batch = evaluation_rollout(policy, environment, 0).collect()
    assert batch.noise is not None
    embeddings = policy.encoder(batch.observations.double())
    states = policy.core(embeddings, noise=batch.noise)[0].detach()
    steps = int(batch.lengths[2])
    hidden = torch.from_numpy(episode.hidden).flatten(1)
    torch.testing.assert_close(hidden, states[:steps, 2].float())
    assert np.array_equal(episode.actions, batch.actions[:steps, 2].numpy())
