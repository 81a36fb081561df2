"""How predictors learn: each optimizer against what it is defined to be, on every backend."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sgrl.envs.registry import make_vector
from sgrl.nn import feedforward, recurrent
from sgrl.nn.mixing import split_parameters
from sgrl.nn.registry import make_policy
from sgrl.reinforce import Rollout, UpdateSettings, make_optimizers, update
from sgrl.reinforce.batch import EpisodeBatch
from sgrl.reinforce.predictors import PENALTY, LeastSquares

MAZE = {
    "feature_size": 5,
    "embedding_size": 4,
    "num_neurons": 6,
    "neuron_size": 2,
    "num_parents": 2,
    "num_slots": 3,
    "num_input_neurons": 2,
    "actor_slots": 2,
    "mixing_weight": 0.7,
}
FLAT = {"num_layers": 2, "num_neurons": 4, "neuron_size": 2, "num_parents": 2, "num_slots": 3}
BACKENDS = ("eager", "torch", "native")
#: From float32 rounding, where compared as it is; all else is float64.
SETTINGS = UpdateSettings(grad_clip=1e-3)


def make(name: str, backend: str, **settings: object):
    sizes = MAZE if name == "sparsenet" else FLAT
    return make_policy(
        name, 6, 3, seed=1, dtype=torch.float64, **{**sizes, "backend": backend, **settings}
    )


def batches(name: str, count: int) -> list[EpisodeBatch]:
    """Whole episodes of unequal length, or single guesses."""
    generator = torch.Generator().manual_seed(4)
    length, size = (5, 7) if name == "sparsenet" else (1, 9)
    made = []
    for _ in range(count):
        lengths = torch.randint(1, length + 1, (size,), generator=generator)
        mask = torch.arange(length).unsqueeze(1) < lengths
        rewards = torch.randn(length, size, dtype=torch.float64, generator=generator)
        made.append(
            EpisodeBatch(
                observations=torch.randn(length, size, 6, dtype=torch.float64, generator=generator),
                actions=torch.randint(3, (length, size), generator=generator),
                rewards=torch.where(mask, rewards, 0.0),
                mask=mask,
                lengths=lengths,
            )
        )
    return made


def run(name: str, backend: str, optimizer: str, count: int, settings: UpdateSettings, **kind):
    policy = make(name, backend, **kind)
    optimizers = make_optimizers(policy, 1e-3, 1e-2, optimizer, 0.8)
    for number, batch in enumerate(batches(name, count)):
        if policy.noise_size:
            shape = (*batch.mask.shape, policy.noise_size)
            batch.noise = torch.randn(shape, generator=torch.Generator().manual_seed(number))
        update(policy, optimizers, batch, settings)
    return policy, optimizers


@pytest.mark.parametrize("name", ["sparsenet", "sparse_mlp"])
@pytest.mark.parametrize("two_phase", [False, True])
@pytest.mark.parametrize("optimizer", ["scaled", "averaged", "least_squares"])
def test_backends_agree(name: str, optimizer: str, two_phase: bool) -> None:
    if two_phase and name == "sparsenet":
        pytest.skip("the two-phase update is for feed-forward policies")
    settings = UpdateSettings(two_phase=two_phase)
    first, *others = (
        run(name, backend, optimizer, 4, settings)[0].state_dict() for backend in BACKENDS
    )
    for other in others:
        for key, value in first.items():
            torch.testing.assert_close(other[key], value, rtol=1e-7, atol=1e-10, msg=key)


@pytest.mark.parametrize("optimizer", ["scaled", "averaged", "least_squares"])
def test_lambda_of_one_is_backpropagation(optimizer: str) -> None:
    """However predictors learn, what nothing is mixed in from is trained as ever."""
    kind = {"mixing_weight": 1.0, "adaptive": False}
    mixed, _ = run("sparsenet", "eager", optimizer, 4, UpdateSettings(), **kind)
    plain = make("sparsenet", "eager", propagation="backprop", mixing_weight=1.0)
    optimizers = make_optimizers(plain, 1e-3, 1e-2)
    for batch in batches("sparsenet", 4):
        update(plain, optimizers, batch, UpdateSettings())
    trained = dict(mixed.named_parameters())
    for key, value in plain.named_parameters():
        torch.testing.assert_close(trained[key], value, rtol=1e-12, atol=1e-12)


def record_targets(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Features [K, W, M + I] and targets [K, W, N] of every backward pass of an eager network."""
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    finish = recurrent._BackwardRecord.finish

    def of_recurrent(self: recurrent._BackwardRecord) -> None:
        valid = self.mask
        inputs, attention = (
            torch.stack([getattr(a, part) for a in self.activations])[valid]
            for part in ("inputs", "attention")
        )
        steps = (self.steps[t] for t in range(self.length))
        target = torch.stack([prediction - residual for _, _, prediction, _, residual in steps])
        target = target[valid]
        seen.append((0, torch.cat([attention, inputs], 2).detach(), target.detach()))
        finish(self)

    mix = feedforward._BackwardRecord.mix

    def of_layers(self: feedforward._BackwardRecord, layer: int, gradient: Tensor) -> tuple:
        if self.mlp.rule.phase != "policy":
            activation = self.activations[layer]
            features = torch.cat([activation.attention, activation.inputs], 2)
            seen.append((layer, features, gradient.clone()))
        return mix(self, layer, gradient)

    monkeypatch.setattr(recurrent._BackwardRecord, "finish", of_recurrent)
    monkeypatch.setattr(feedforward._BackwardRecord, "mix", of_layers)
    return seen


@pytest.mark.parametrize(
    ("name", "settings", "kind"),
    [
        ("sparsenet", SETTINGS, {}),
        ("sparsenet", SETTINGS, {"predictor_target": "received"}),
        ("sparsenet", SETTINGS, {"num_input_neurons": 6}),
        ("sparsenet", SETTINGS, {"neuron_noise": 0.3}),
        ("sparse_mlp", SETTINGS, {}),
        ("sparse_mlp", SETTINGS, {"neuron_noise": 0.3}),
        ("sparse_mlp", UpdateSettings(two_phase=True), {}),
    ],
)
def test_least_squares_is_the_closed_form(
    name: str, settings: UpdateSettings, kind: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over all batches seen, older ones counting less."""
    seen = record_targets(monkeypatch)
    policy, _ = run(name, "eager", "least_squares", 5, settings, **kind)
    layers = [policy.core.neurons] if name == "sparsenet" else list(policy.core.layers)
    for index, neurons in enumerate(layers):
        of_layer = [(x, y) for place, x, y in seen if place == index]
        assert len(of_layer) == 5
        for neuron in range(neurons.num_neurons):
            reads_input = neuron < neurons.num_input_neurons
            size = neurons.num_slots + neurons.predictor_h.shape[2]
            size += neurons.external_size if reads_input else 0
            gram, cross = torch.zeros(2, size, size).double()
            cross = cross[:, : neurons.neuron_size].clone()
            for age, (features, targets) in enumerate(reversed(of_layer)):
                x, y = features[:, neuron, :size], targets[:, neuron]
                gram, cross = gram + 0.8**age * x.T @ x, cross + 0.8**age * x.T @ y
            penalty = PENALTY * gram.diagonal().mean() * torch.eye(size).double()
            best = torch.linalg.solve(gram + penalty, cross)
            x = torch.randn(5, size, dtype=torch.float64)
            x[:, : neurons.num_slots] = x[:, : neurons.num_slots].softmax(1)
            missing = neurons.input_size + neurons.num_slots - size
            inputs = torch.nn.functional.pad(x[:, neurons.num_slots :], (0, missing))
            shape = (5, neurons.num_neurons, -1)
            nothing = torch.empty(0).double()
            given = (inputs, x[:, : neurons.num_slots])
            activation = [part.unsqueeze(1).expand(*shape) for part in given]
            predicted = neurons.predict(recurrent.Activation(*activation, nothing, nothing))
            torch.testing.assert_close(predicted[:, neuron], x @ best, rtol=1e-7, atol=1e-12)


def adam(parameter: Tensor, gradients: list[Tensor], rates: list[float]) -> list[Tensor]:
    """Adam's iterates, by its definition."""
    value, first, second, path = parameter.clone(), 0.0, 0.0, []
    for k, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), 1):
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient.square()
        corrected = second / (1 - 0.999**k)
        value = value - rate * first / (1 - 0.9**k) / (corrected.sqrt() + 1e-8)
        path.append(value)
    return path


def steps(optimizer: str, count: int) -> tuple[list, list, list, list[Tensor]]:
    """Of `predictor_h` in a run: before, its gradients, its values, and the received lengths."""
    policy = make("sparsenet", "eager")
    optimizers = make_optimizers(policy, 1e-3, 1e-2, optimizer, 0.8)
    parameter = policy.core.neurons.predictor_h
    before, gradients, values, lengths = parameter.detach().clone(), [], [], []
    for batch in batches("sparsenet", count):
        update(policy, optimizers, batch, UpdateSettings(grad_clip=None))
        gradients.append(parameter.grad.clone())
        values.append(parameter.detach().clone())
        lengths.append(float(policy.core.statistics["received_grad_norm"]))
    return before, gradients, values, lengths


def test_scaled_is_adam_in_units_of_what_is_received() -> None:
    before, gradients, values, lengths = steps("scaled", 4)
    average, rates = 0.0, []
    for k, length in enumerate(lengths, 1):
        average = 0.8 * average + 0.2 * length
        rates.append(1e-2 * average / (1 - 0.8**k))
    for value, expected in zip(values, adam(before, gradients, rates), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-15)


def test_averaged_is_the_average_of_adams_iterates() -> None:
    before, gradients, values, _ = steps("averaged", 4)
    average = before
    for value, iterate in zip(values, adam(before, gradients, [1e-2] * 4), strict=True):
        average = 0.8 * average + 0.2 * iterate
        torch.testing.assert_close(value, average, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("optimizer", ["scaled", "averaged", "least_squares"])
@pytest.mark.parametrize("name", ["sparsenet", "sparse_mlp"])
def test_saved_and_restored_it_goes_on_bitwise(name: str, optimizer: str) -> None:
    policy, optimizers = run(name, "eager", optimizer, 3, UpdateSettings())
    copied = copy.deepcopy(policy)
    again = make_optimizers(copied, 1e-3, 1e-2, optimizer, 0.8)
    for key, fresh in again.items():
        # As the learner keeps it: what belongs to parameters alone.
        saved = optimizers[key].state_dict()["state"]
        fresh.load_state_dict({**fresh.state_dict(), "state": copy.deepcopy(saved)})
    for batch in batches(name, 6)[3:]:
        for network, of_network in ((policy, optimizers), (copied, again)):
            update(network, of_network, batch, UpdateSettings())
    for key, value in policy.state_dict().items():
        assert torch.equal(copied.state_dict()[key], value), key


def test_the_rollouts_forward_changes_nothing() -> None:
    """With the forward pass of the rollout used again, as in training."""
    states = []
    for keep in (False, True):
        env = make_vector("labyrinth_escape", 4, {"episode_length": 6})
        policy = make_policy(
            "sparsenet", env.observation_size, 4, seed=1, dtype=torch.float64, **MAZE
        )
        rollout = Rollout(env, policy, 0, keep=keep)
        optimizers = make_optimizers(policy, 1e-3, 1e-2, "least_squares", 0.8)
        for _ in range(3):
            update(policy, optimizers, rollout.collect(), UpdateSettings())
        states.append([p.clone() for p in split_parameters(policy)[1]])
        env.close()
    for fresh, kept in zip(*states, strict=True):
        torch.testing.assert_close(kept, fresh, rtol=1e-6, atol=1e-12)
        assert kept.abs().max() > 0


@pytest.mark.parametrize(
    ("make_one", "message"),
    [
        (
            lambda: make_optimizers(make("sparsenet", "eager"), 1, 1, "avreaged"),
            "unknown predictor_optimizer 'avreaged'; did you mean 'averaged'",
        ),
    ],
)
def test_errors(make_one: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_one()


def test_policies_without_predictors_take_any() -> None:
    policy = make_policy("gru", 6, 3, hidden_size=4)
    assert list(make_optimizers(policy, 1, 1, "least_squares")) == ["policy"]
    assert not isinstance(make_optimizers(policy, 1, 1)["policy"], LeastSquares)
