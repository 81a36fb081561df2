"""Mixing rules: what every one of them must do, and each against its definition.

A rule in `MIXING_RULES` is in the contract below by its name alone; its definition is tested by a
line in `DEFINITIONS`.
"""

import copy
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sgrl.envs.registry import make_vector
from sgrl.nn.feedforward import SparseMLP
from sgrl.nn.kernels.backends import BACKENDS
from sgrl.nn.mixing import Moments, backward_phase, gradient_moments, split_parameters, unit
from sgrl.nn.mixing_rules import MIXING_RULES, EpisodesRule, RunningRule
from sgrl.nn.neuron import SlotNeurons
from sgrl.nn.recurrent import SparseRNN
from sgrl.nn.registry import load_policy, make_policy, save_policy
from sgrl.nn.sgprop import mixture
from sgrl.reinforce.rollout import Rollout
from sgrl.reinforce.update import NonFiniteLoss, UpdateSettings, make_optimizers, update

NETWORKS = ("recurrent", "feedforward")
SIZES = {"num_neurons": 5, "neuron_size": 3, "num_parents": 2, "num_slots": 2}
POLICIES = {
    "sparsenet": {"num_input_neurons": 2, "mixing_weight": 0.5},
    "sparse_mlp": {"num_layers": 3},
}
every_rule = pytest.mark.parametrize("rule", MIXING_RULES)
every_network = pytest.mark.parametrize("network", NETWORKS)
every_policy = pytest.mark.parametrize("name", POLICIES)
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def layers_of(network: nn.Module) -> list[SlotNeurons]:
    return [module for module in network.modules() if isinstance(module, SlotNeurons)]


def weights_of(network: nn.Module) -> Tensor:
    """Lambda of all neurons [layers, W]."""
    return torch.stack([neurons.mixing_weight for neurons in layers_of(network)]).clone()


def build(
    network: str, rule: str, backend: str, dtype: torch.dtype = torch.float64, **settings: Any
) -> SparseRNN | SparseMLP:
    """A small network whose predictors are not zero."""
    generator = torch.Generator().manual_seed(0)
    settings |= {"mixing_rule": rule, "backend": backend, "generator": generator, "dtype": dtype}
    built: SparseRNN | SparseMLP
    if network == "recurrent":
        built = SparseRNN(4, **SIZES, num_input_neurons=2, **{"mixing_weight": 0.9} | settings)
    else:
        built = SparseMLP(7, num_layers=3, **SIZES, **settings)
    with torch.no_grad():
        for parameter in split_parameters(built)[1]:
            parameter.normal_(0, 0.3, generator=generator)
    return built


def go_back(network: SparseRNN | SparseMLP, seed: int, scale: float = 1.0) -> None:
    """Forward and backward of one random batch."""
    generator = torch.Generator().manual_seed(seed)
    dtype = layers_of(network)[0].bias.dtype
    output: Tensor
    if isinstance(network, SparseRNN):
        x = torch.randn(4, 6, 4, generator=generator, dtype=torch.float64).to(dtype)
        mask = torch.rand(4, 6, generator=generator) < 0.8
        output = network(x, None, mask)[0]
    else:
        x = torch.randn(9, 7, generator=generator, dtype=torch.float64).to(dtype)
        output = network(x)
    weights = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(dtype)
    (output * weights).sum().mul(scale).backward()


def results(network: SparseRNN | SparseMLP) -> dict[str, Tensor]:
    """Buffers, gradients and statistics after three batches."""
    found: dict[str, Tensor] = {}
    for seed in range(3):
        go_back(network, seed)
        found |= {f"{seed} {name}": b.clone() for name, b in network.named_buffers()}
    found |= {f"grad {name}": p.grad for name, p in network.named_parameters()}
    return found | network.statistics


# ------------------------------------------------------------------------ what every rule must do


@every_network
@every_rule
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-3)])
def test_backends_agree(network: str, rule: str, dtype: torch.dtype, tolerance: float) -> None:
    expected = results(build(network, rule, "eager", dtype))
    for backend in ("torch", "native"):
        actual = results(build(network, rule, backend, dtype))
        assert actual.keys() == expected.keys()
        for name, value in expected.items():
            error = (actual[name] - value).abs().amax() if value.numel() else 0.0
            assert error <= tolerance * max(value.abs().amax() if value.numel() else 0, 0.01), name


@every_network
@every_rule
@every_backend
def test_lambda_moves_and_stays_within_its_bounds(network: str, rule: str, backend: str) -> None:
    built = build(network, rule, backend)
    before = weights_of(built)
    for seed in range(5):
        go_back(built, seed)
        after = weights_of(built)
        assert ((after >= 0) & (after <= 1)).all()
        assert not torch.equal(after, before)
        before = after


@every_network
@every_rule
@every_backend
def test_lambda_of_one_without_update_is_backprop(network: str, rule: str, backend: str) -> None:
    gradients = []
    for settings in ({"adaptive": False, "mixing_weight": 1.0}, {"propagation": "backprop"}):
        built = build(network, rule, backend, **settings)
        buffers = copy.deepcopy(list(built.buffers()))
        go_back(built, 0)
        assert all(map(torch.equal, built.buffers(), buffers))
        gradients.append([parameter.grad for parameter in split_parameters(built)[0]])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


@every_network
@every_rule
def test_a_rule_is_deterministic(network: str, rule: str) -> None:
    one, other = (results(build(network, rule, "native")) for _ in range(2))
    assert all(torch.equal(value, other[name]) for name, value in one.items())


@every_network
@every_rule
@every_backend
def test_the_predictor_step_leaves_a_rule_alone(network: str, rule: str, backend: str) -> None:
    built = build(network, rule, backend)
    go_back(built, 0)
    buffers = copy.deepcopy(list(built.buffers()))
    with backward_phase(built, "predictor"):
        go_back(built, 1)
    built.rule.adaptive = False
    go_back(built, 1)
    assert all(map(torch.equal, built.buffers(), buffers))


@every_network
@every_rule
@every_backend
def test_a_single_sample_tells_nothing(network: str, rule: str, backend: str) -> None:
    built = build(network, rule, backend)
    go_back(built, 0)
    buffers = copy.deepcopy(list(built.buffers()))
    mask = torch.zeros(2, 3, dtype=torch.bool)
    x = torch.ones(2, 3, 4, dtype=torch.float64)
    if isinstance(built, SparseRNN):
        for valid in (0, 1):
            mask.view(-1)[:valid] = True
            built(x, None, mask)[0].sum().backward()
    else:
        built(torch.ones(1, 7, dtype=torch.float64)).sum().backward()
    for value, before in zip(built.buffers(), buffers, strict=True):
        torch.testing.assert_close(value, before, rtol=1e-12, atol=0)  # m * x + (1 - m) * x


@pytest.mark.parametrize("rule", [n for n, r in MIXING_RULES.items() if r.samples == "episodes"])
@every_backend
def test_a_single_episode_tells_nothing(rule: str, backend: str) -> None:
    rnn = build("recurrent", rule, backend)
    assert isinstance(rnn, SparseRNN)
    before = copy.deepcopy(list(rnn.buffers()))
    x = torch.randn(4, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rnn(x[:, :1])[0].square().sum().backward()
    mask = torch.zeros(4, 3, dtype=torch.bool)
    mask[:, 1] = True
    rnn(x, None, mask)[0].square().sum().backward()
    for value, other in zip(rnn.buffers(), before, strict=True):
        torch.testing.assert_close(value, other, rtol=1e-12, atol=0)


@every_network
@every_rule
def test_momentum_of_one_keeps_lambda(network: str, rule: str) -> None:
    built = build(network, rule, "native", mixing_momentum=1.0)
    before = weights_of(built)
    go_back(built, 0)
    assert torch.equal(weights_of(built), before)


@every_network
@every_rule
def test_momentum_of_zero_forgets(network: str, rule: str) -> None:
    """The last batch alone counts (and lambda during it, which is in the gradients)."""
    built, fresh = (build(network, rule, "native", mixing_momentum=0.0) for _ in range(2))
    go_back(built, 0)
    for neurons, others in zip(layers_of(fresh), layers_of(built), strict=True):
        neurons.mixing_weight.copy_(others.mixing_weight)
    for one in (built, fresh):
        go_back(one, 1)
    torch.testing.assert_close(weights_of(built), weights_of(fresh), rtol=1e-12, atol=0)


def training(name: str, rule: str) -> tuple[Any, Any, Rollout]:
    """A policy, its optimizers and its rollout, after two updates."""
    environment, settings = "labyrinth_escape", {"episode_length": 8}
    env = make_vector(environment, 4, settings)
    policy = make_policy(
        name, env.observation_size, env.num_actions, mixing_rule=rule, **SIZES, **POLICIES[name]
    )
    optimizers = make_optimizers(policy, lr=1e-2, predictor_lr=1e-2)
    rollout = Rollout(env, policy, seed=0)
    for _ in range(2):
        update(policy, optimizers, rollout.collect(), UpdateSettings())
    return policy, optimizers, rollout


@every_policy
@every_rule
def test_a_saved_policy_goes_on_as_if_it_had_not_stopped(
    name: str, rule: str, tmp_path: Path
) -> None:
    policy, optimizers, rollout = training(name, rule)
    memory = [neurons.mixing_memory for neurons in layers_of(policy)]
    assert all(len(m) == len(MIXING_RULES[rule].memory) and m.ne(0).all() for m in memory)
    save_policy(policy, tmp_path)
    restored = load_policy(tmp_path)
    assert type(restored.core.rule) is MIXING_RULES[rule]
    others = make_optimizers(restored, lr=1e-2, predictor_lr=1e-2)
    for key, optimizer in others.items():
        optimizer.load_state_dict(copy.deepcopy(optimizers[key].state_dict()))
    batch = rollout.collect()
    for trained, with_ in ((policy, optimizers), (restored, others)):
        update(trained, with_, batch, UpdateSettings())
    assert policy.state_dict().keys() == restored.state_dict().keys()
    for key, value in policy.state_dict().items():
        assert torch.equal(restored.state_dict()[key], value), key


@every_rule
@pytest.mark.parametrize(
    ("name", "two_phase"), [("sparsenet", False), ("sparse_mlp", False), ("sparse_mlp", True)]
)
def test_a_gradient_that_is_not_finite_is_forgotten(name: str, rule: str, two_phase: bool) -> None:
    policy, optimizers, rollout = training(name, rule)
    batch = rollout.collect()
    before = copy.deepcopy(list(policy.buffers()))
    policy.actor.keys.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(NonFiniteLoss):
        update(policy, optimizers, batch, UpdateSettings(two_phase=two_phase))
    assert all(map(torch.equal, policy.buffers(), before))


@pytest.mark.parametrize("name", ["sparsenet", "sparse_mlp"])
def test_an_unknown_rule_is_refused(name: str) -> None:
    message = "unknown mixing_rule 'runing'; did you mean 'running'?"
    with pytest.raises(ValueError, match="unknown mixing_rule") as error:
        make_policy(name, 60, 4, mixing_rule="runing")
    assert str(error.value) == message


def test_the_example_in_the_docs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A class and a line in the registry are a rule."""
    page = (Path(__file__).parent.parent / "docs" / "mixing_rules.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(textwrap.dedent(code), "mixing_rules.md", "exec"), names)
    monkeypatch.setitem(MIXING_RULES, "cautious", names["CautiousRule"])
    cautious, published = (build("recurrent", r, "native") for r in ("cautious", "published"))
    for built in (cautious, published):
        built.neurons.mixing_weight.fill_(0.1)
        go_back(built, 0)
    assert (weights_of(cautious) >= weights_of(published)).all()
    assert (weights_of(cautious) > 0.1).any()


def test_the_docs_name_every_rule() -> None:
    page = (Path(__file__).parent.parent / "docs" / "mixing_rules.md").read_text()
    named = re.findall(r"^\| `(\w+)` \|", page, flags=re.MULTILINE)
    assert list(dict.fromkeys(named)) == list(MIXING_RULES)


def test_the_published_rule_saves_what_it_always_did() -> None:
    names = SparseRNN(4, **SIZES, num_input_neurons=2).state_dict()
    assert "neurons.mixing_weight" in names
    assert "neurons.mixing_memory" not in names
    assert "neurons.mixing_memory" in build("recurrent", "running", "eager").state_dict()
    assert (
        "neurons.mixing_memory"
        not in SparseRNN(
            4, **SIZES, num_input_neurons=2, mixing_rule="running", propagation="backprop"
        ).state_dict()
    )


# ------------------------------------------------------------------- each rule by its definition

Samples = tuple[NDArray[Any], NDArray[Any]]  # w and s of a batch [K, W, parameters of a neuron]


def ratio(variance: Any, covariance: Any, square_mean_u: Any, eps: float) -> Any:
    denominator = variance + np.maximum(square_mean_u - variance, 0)
    assert (denominator > eps).all()
    return np.clip(1 + covariance / denominator, 0, 1)


def terms(batch: Samples) -> tuple[Any, Any, Any]:
    """Var(mean u), Cov(mean w, mean u), both estimated, and |mean u|^2, of each neuron."""
    w, u = batch[0], batch[1] - batch[0]
    n = len(w)
    dw, du = w - w.mean(0), u - u.mean(0)
    share = 1 / (n * (n - 1))
    return (du**2).sum((0, 2)) * share, (dw * du).sum((0, 2)) * share, (u.mean(0) ** 2).sum(1)


def smoothed(batches: list[Samples], first: Any, momentum: float, eps: float) -> Any:
    for batch in batches:
        first = momentum * first + (1 - momentum) * ratio(*terms(batch), eps)
    return first


def averaged(batches: list[Samples], first: Any, momentum: float, eps: float) -> Any:
    ages = range(len(batches) - 1, -1, -1)
    share = np.array([momentum**age for age in ages])
    of_all = np.array([terms(batch) for batch in batches])
    return ratio(*(share @ of_all[:, i] / share.sum() for i in range(3)), eps)


def halfway(batches: list[Samples], first: Any, momentum: float, eps: float) -> Any:
    return (1 + averaged(batches, first, momentum, eps)) / 2


#: Lambda after some batches, and whether w and s come from unit vectors.
DEFINITIONS: dict[str, tuple[Callable[..., Any], bool]] = {
    "published": (smoothed, True),
    "running": (averaged, True),
    "raw": (smoothed, False),
    "running_raw": (averaged, False),
    "episodes": (smoothed, False),
    "running_episodes": (averaged, False),
    "halfway": (halfway, False),
}


def errors(rule: str, spread: Tensor, predictions: str, size: float) -> tuple[Tensor, Tensor]:
    """Squared errors of the mixture and of backpropagation in many batches of 20 samples.

    Every batch decides for itself, lambda being what `rule` makes of that batch alone. The noise of
    a sample's gradient has the standard deviations `spread` [D]; `size` is the length of what the
    predictions are wrong by, in units of the error of the mean of w.
    """
    generator = torch.Generator().manual_seed(7)
    batches, samples, dimensions = 10_000, 20, len(spread)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    target = normal(dimensions)
    noise = spread * normal(samples, batches, dimensions)
    w = target + noise
    wrong = (
        size * float(spread.norm()) * samples**-0.5 * torch.nn.functional.normalize(target, dim=0)
    )
    s = {
        "the same for all": (target + wrong).expand_as(w),
        "noisy": target + wrong + spread * normal(samples, batches, dimensions),
        "of the gradient": target + wrong + 0.8 * noise,
        "against it": target + wrong - 0.5 * noise,
    }[predictions]
    nothing = torch.zeros(4, batches, dtype=torch.float64)
    made = MIXING_RULES[rule](momentum=0.0)
    weight = made.next_weight(gradient_moments(w, s), torch.ones(batches).double(), nothing)
    mixed = mixture(weight.unsqueeze(1), w.mean(0), s.mean(0))
    return (mixed - target).square().sum(1), (w.mean(0) - target).square().sum(1)


@pytest.mark.parametrize("size", [0.0, 1.0, 2.0, 10.0])
@pytest.mark.parametrize(
    "predictions", ["the same for all", "noisy", "of the gradient", "against it"]
)
@pytest.mark.parametrize("spread", [[1.0] * 3, [1.0] * 12, [1.2, 1.1, 1.0, 0.8, 0.6, 0.4, 0.2]])
def test_halfway_is_never_worse_than_backpropagation(
    spread: list[float], predictions: str, size: float
) -> None:
    """In expectation, whatever the predictions, where no direction has most of the noise."""
    numbers = torch.tensor(spread, dtype=torch.float64)
    assert numbers.square().sum() / numbers.square().max() > 2.7
    mixed, backprop = errors("halfway", numbers, predictions, size)
    difference = mixed - backprop
    assert difference.mean() < 3 * difference.std() / len(difference) ** 0.5
    if size == 0 and predictions == "the same for all":  # and they are right
        assert mixed.mean() < 0.6 * backprop.mean()


def test_all_the_way_can_be_worse() -> None:
    """In three dimensions, where predictions are wrong by more than chance."""
    spread = torch.ones(3, dtype=torch.float64)
    mixed, backprop = errors("running_episodes", spread, "the same for all", 2.0)
    difference = mixed - backprop
    assert difference.mean() > 5 * difference.std() / len(difference) ** 0.5


def per_sample(
    state: Tensor, feedback: Tensor, parameters: list[Tensor], count: int
) -> NDArray[Any]:
    """Parameter gradients of each neuron by autograd [K, W, parameters of a neuron].

    Args:
        state: of the layer [K, W, N].
        feedback: its gradient [K, W, N].
        parameters: of the layer, [W, ...] each, or of its first neurons.
        count: W.
    """
    samples = []
    for k in range(len(state)):
        grads = torch.autograd.grad(state[k], parameters, feedback[k], retain_graph=True)
        width = sum(grad[0].numel() for grad in grads)
        flat, at = torch.zeros(count, width, dtype=state.dtype), 0
        for grad in grads:
            flat[: len(grad), at : at + grad[0].numel()] = grad.flatten(1)
            at += grad[0].numel()
        samples.append(flat)
    return torch.stack(samples).numpy()


@every_backend
@every_rule
def test_rule_of_a_residual_layer_by_its_definition(rule: str, backend: str) -> None:
    """The last layer's received gradient is the loss's own; w and s go through its residual."""
    follow, unit_gradients = DEFINITIONS[rule]
    mlp = build("feedforward", rule, backend, mixing_momentum=0.6)
    assert isinstance(mlp, SparseMLP)
    last, first = mlp.layers[2], mlp.layers[2].mixing_weight.numpy().copy()
    generator = torch.Generator().manual_seed(1)
    batches: list[Samples] = []
    inside = False
    for _ in range(4):
        x = torch.randn(8, 7, generator=generator, dtype=torch.float64)
        gradient = torch.randn(8, 5, 3, generator=generator, dtype=torch.float64)
        h = x
        for layer, neurons in enumerate(mlp.layers):
            read = x[:, mlp.pixels] if layer == 0 else h[:, mlp.parents[layer - 1]].flatten(2)
            activation = neurons(read)
            output = activation.output
            h = output if layer == 0 else output.tanh() + h
        with torch.no_grad():
            prediction = last.predict(activation)
        vectors = [gradient, prediction]
        if unit_gradients:  # of length 1 past the residual branch's slope
            slope = 1 - output.detach().tanh() ** 2
            vectors = [v / (v * slope).norm(dim=-1, keepdim=True) for v in vectors]
        parameters = [last.weight_h, last.bias]
        w, s = (per_sample(h, v, parameters, 5) for v in vectors)
        batches.append((w, s))
        (mlp(x) * gradient).sum().backward()
        expected = follow(batches, first, 0.6, 1e-6 if unit_gradients else 0)
        np.testing.assert_allclose(last.mixing_weight, expected, rtol=1e-9, atol=1e-12)
        inside |= bool(((expected > 0.01) & (expected < 0.99)).any())
    assert inside


@every_backend
@every_rule
def test_rule_of_a_recurrent_layer_by_its_definition(rule: str, backend: str) -> None:
    """One step, some sequences of which are masked; the loss's own gradient is the received one."""
    follow, unit_gradients = DEFINITIONS[rule]
    rnn = build("recurrent", rule, backend, mixing_momentum=0.6)
    assert isinstance(rnn, SparseRNN)
    neurons, first = rnn.neurons, rnn.neurons.mixing_weight.numpy().copy()
    generator = torch.Generator().manual_seed(2)
    batches: list[Samples] = []
    inside = False
    for _ in range(4):
        x = torch.randn(1, 8, 4, generator=generator, dtype=torch.float64)
        h_0, gradient = torch.randn(2, 8, 5, 3, generator=generator, dtype=torch.float64)
        valid = torch.rand(8, generator=generator) < 0.8
        activation = neurons(neurons.read(h_0, rnn.parents, x[0]))
        with torch.no_grad():
            prediction = neurons.predict(activation)
        vectors = [gradient[valid], prediction[valid]]
        if unit_gradients:
            vectors = [unit(v) for v in vectors]
        parameters = [neurons.weight_h, neurons.weight_x, neurons.bias]
        output = activation.output[valid]
        w, s = (per_sample(output, v, parameters, 5) for v in vectors)
        batches.append((w, s))
        (rnn(x, h_0, valid.unsqueeze(0))[0] * gradient).sum().backward()
        expected = follow(batches, first, 0.6, 1e-12 if unit_gradients else 0)
        np.testing.assert_allclose(neurons.mixing_weight, expected, rtol=1e-9, atol=1e-12)
        inside |= bool(((expected > 0.01) & (expected < 0.99)).any())
    assert inside


class UnitEpisodes(EpisodesRule):
    """Not offered: sums over episodes, of vectors of length 1."""

    unit_gradients = True


@pytest.mark.parametrize("rule", ["episodes", "running_episodes", "unit"])
@pytest.mark.parametrize("num_episodes", [2, 7, 21])
@every_backend
def test_rules_on_episodes_by_their_definition(
    rule: str, num_episodes: int, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each episode's own gradients by autograd: of its loss, and of its predictions.

    At lambda 1, so that what the neurons receive is the loss's gradient. Episodes end at different
    steps, after which there is no loss, and one has no valid step at all.
    """
    monkeypatch.setitem(MIXING_RULES, "unit", UnitEpisodes)
    follow = averaged if rule == "running_episodes" else smoothed
    unit_gradients = rule == "unit"
    settings = {"mixing_weight": 1.0, "mixing_momentum": 0.6, "schedule_beta": 0.0}
    rnn = build("recurrent", rule, backend, **settings)
    assert isinstance(rnn, SparseRNN)
    neurons, first = rnn.neurons, rnn.neurons.mixing_weight.numpy().copy()
    parameters = [neurons.weight_h, neurons.weight_x, neurons.bias]
    generator = torch.Generator().manual_seed(3)
    batches: list[Samples] = []
    moved = False
    for _ in range(2):
        x = torch.randn(9, num_episodes, 4, generator=generator, dtype=torch.float64)
        shape = (9, num_episodes, 5, 3)
        loss = torch.randn(shape, generator=generator, dtype=torch.float64)
        lengths = torch.randint(1, 10, (num_episodes,), generator=generator)
        lengths[1:2] = 0 if num_episodes > 2 else 4
        valid = torch.arange(9).unsqueeze(1) < lengths
        loss = torch.where(valid[..., None, None], loss, 0)
        w, s = [], []
        for b in lengths.nonzero().flatten():
            h, states, activations = torch.zeros(1, 5, 3, dtype=torch.float64), [], []
            for t in range(int(lengths[b])):
                activations.append(neurons(neurons.read(h, rnn.parents, x[t, b : b + 1])))
                h = activations[-1].output
                states.append(h)
            objective = (torch.cat(states) * loss[: len(states), b]).sum()
            received = torch.autograd.grad(objective, states, retain_graph=True)
            local = [neurons(activation.inputs.detach()) for activation in activations]
            output = torch.stack([activation.output for activation in local])
            with torch.no_grad():
                predicted = torch.stack([neurons.predict(activation) for activation in local])
            vectors = [torch.stack(received), predicted]
            if unit_gradients:
                vectors = [unit(v) for v in vectors]
            sums = [per_sample(output[None], v[None], parameters, 5)[0] for v in vectors]
            if not unit_gradients:  # the steps' sum is the gradient through time
                through_time = per_sample(objective[None], torch.ones(1), parameters, 5)
                np.testing.assert_allclose(sums[0], through_time[0], rtol=1e-10, atol=1e-12)
            w.append(sums[0])
            s.append(sums[1])
        batches.append((np.stack(w), np.stack(s)))
        neurons.mixing_weight.fill_(1.0)
        (rnn(x, None, valid)[0] * loss).sum().backward()
        seen = batches[-1:] if follow is smoothed else batches  # each from lambda 1
        expected = follow(seen, first, 0.6, 1e-12 if unit_gradients else 0)
        np.testing.assert_allclose(neurons.mixing_weight, expected, rtol=1e-10, atol=1e-12)
        moved |= bool((expected < 0.99).any())
    assert moved


@every_backend
def test_without_time_episodes_are_samples(backend: str) -> None:
    found = []
    for rule in ("raw", "episodes"):
        mlp = build("feedforward", rule, backend)
        for seed in range(3):
            go_back(mlp, seed)
        found.append([*mlp.buffers(), *(p.grad for p in mlp.parameters())])
    assert all(map(torch.equal, *found))


@every_network
@pytest.mark.parametrize("rule", [n for n, r in MIXING_RULES.items() if not r.unit_gradients])
@every_backend
def test_raw_rules_know_no_unit_of_the_gradients(network: str, rule: str, backend: str) -> None:
    """Gradients and predictions a hundred million times smaller give the same lambda."""
    networks = [build(network, rule, backend) for _ in range(2)]
    with torch.no_grad():
        for parameter in split_parameters(networks[1])[1]:
            parameter.mul_(1e-8)
    for seed in range(3):
        for built, scale in zip(networks, (1.0, 1e-8), strict=True):
            go_back(built, seed, scale)
        one, other = map(weights_of, networks)
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_running_moments_do_not_average_lambda() -> None:
    """Batches of |mean u|^2 with an outlier: lambda* of the mean, not the mean of lambda*."""
    rule, memory = RunningRule(momentum=0.5), torch.zeros(4, 1, dtype=torch.float64)
    previous = torch.full((1,), 0.9, dtype=torch.float64)

    def after(variance: float, covariance: float, square: float) -> float:
        """Of two samples: mean |u|^2 = variance + |mean u|^2, and likewise <w, u>."""
        moments = [torch.tensor([v]).double() for v in (variance + square, covariance, square, 0)]
        return rule.next_weight(Moments(*moments, num_samples=2), previous, memory).item()

    assert after(1, -0.5, 2) == pytest.approx(1 - 0.5 / 2)
    # Averages with shares 1/3 and 2/3: variance 1, covariance -2.5 / 3, |mean u|^2 10.
    assert after(1, -1, 14) == pytest.approx(1 - 2.5 / 3 / 10)
