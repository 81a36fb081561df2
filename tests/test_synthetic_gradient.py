"""SyntheticGradient: golden cases assembled by hand, the definitions, the interface."""

import copy
import math
import re
from pathlib import Path

import pytest
import torch
from golden_cases import Case, assert_close, golden_files, load_case
from torch import Tensor, nn

from sgrl.nn import SyntheticGradient
from sgrl.nn.mixing import Moments, backward_phase, split_parameters
from sgrl.nn.mixing_rules import MIXING_RULES


def routed(attention: Tensor, inputs: Tensor) -> Tensor:
    """Context [..., M * (I + 1)] in which sum_m a_m (A_m x + b_m) is linear."""
    ones = torch.ones_like(inputs[..., :1])
    return (attention.unsqueeze(-1) * torch.cat([inputs, ones], -1).unsqueeze(-2)).flatten(-2)


def in_routed(matrices: Tensor, biases: Tensor) -> Tensor:
    """A [W, M, N, I] and b [W, M, N] as weights [W, N, M * (I + 1)] of that context."""
    return torch.cat([matrices, biases.unsqueeze(-1)], -1).transpose(1, 2).flatten(2)


class HandMadeNetwork(nn.Module):
    """The feed-forward SparseNet of a golden file in plain PyTorch, with a block in each place."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        config = case.config
        self.residual = config["residual"]
        self.pixels, self.parents = case["pixels"], case["parents"]
        width, size = config["width"], config["neuron_dim"]
        context = config["num_slots"] * (config["num_parents"] * size + 1)
        names = [f"layer{layer}" for layer in range(config["num_layers"])]
        self.weights = nn.ParameterDict(
            {
                f"{layer}_{n}": nn.Parameter(case[f"param/{layer}.{n}"])
                for layer in names
                for n in ("keys", "A", "b")
            }
        )
        self.action_keys = nn.Parameter(case["param/action_keys"])
        fixed = {"adaptive": False, "dtype": torch.float64}
        self.blocks = nn.ModuleList(
            SyntheticGradient(width, size, context_size=context, **fixed) for _ in names
        )
        # The head's prediction is trained and not mixed.
        actions, flat = self.action_keys.shape
        self.head_block = SyntheticGradient(
            1, actions, context_size=actions * (flat + 1), mixing_weight=1.0, **fixed
        )
        with torch.no_grad():
            for layer, block, weight in zip(names, self.blocks, case["lambda_before"], strict=True):
                block.mixing_weight.copy_(weight)
                block.predictor_weight.copy_(
                    in_routed(case[f"param/{layer}.sg_A"], case[f"param/{layer}.sg_b"])
                )
            self.head_block.predictor_weight.copy_(
                in_head(case["param/action_sg_A"], case["param/action_sg_b"])
            )

    def forward(self, x: Tensor) -> Tensor:
        h = x
        for layer, block in enumerate(self.blocks):
            keys, matrices, biases = (self.weights[f"layer{layer}_{n}"] for n in ("keys", "A", "b"))
            inputs = h[:, self.parents[layer - 1]].flatten(2) if layer else x[:, self.pixels]
            scores = torch.einsum("bwi,wmi->bwm", inputs, keys) / math.sqrt(inputs.shape[-1])
            attention = scores.softmax(-1)
            slots = torch.tanh(torch.einsum("bwi,wmni->bwmn", inputs, matrices) + biases)
            output = torch.einsum("bwm,bwmn->bwn", attention, slots)
            h = torch.tanh(output) + h if layer and self.residual else output
            h = block(h, routed(attention, inputs))
        flat = h.flatten(1)
        logits = flat @ self.action_keys.T / math.sqrt(flat.shape[1])
        return self.head_block(logits, routed(logits.softmax(-1), flat))


def in_head(matrices: Tensor, biases: Tensor) -> Tensor:
    """action_sg_A [A, H, A] and action_sg_b [A, A] as weights [1, A, A * (H + 1)]."""
    return in_routed(matrices.transpose(1, 2).unsqueeze(0), biases.unsqueeze(0))


@pytest.mark.parametrize("file", golden_files("feedforward_*.npz"), ids=lambda file: file.stem)
def test_assembled_by_hand_it_gives_the_golden_gradients(file: Path) -> None:
    case = load_case(file)
    assert case["lambda_before"].std() > 0
    network = HandMadeNetwork(case)
    logits = network(case["batch/x0"])
    assert_close(logits.detach(), case["logits"])
    chosen = logits.log_softmax(-1).gather(1, case["batch/action"].unsqueeze(1)).squeeze(1)
    (-(case["batch/reward"] * chosen).mean()).backward()
    for name, parameter in network.weights.items():
        expected = case[f"sgprop_grad/{name.replace('_', '.')}"]
        assert_close(parameter.grad, expected, what=name)
    assert_close(network.action_keys.grad, case["sgprop_grad/action_keys"])
    for layer, block in enumerate(network.blocks):
        expected = in_routed(case[f"sg_grad/layer{layer}.sg_A"], case[f"sg_grad/layer{layer}.sg_b"])
        assert_close(block.predictor_weight.grad, expected, what=f"predictor {layer}")
        assert_close(block.statistics["predictor_loss"], case["sg_losses"][layer])
        assert torch.equal(block.mixing_weight, case["lambda_before"][layer])
    expected = in_head(case["sg_grad/action_sg_A"], case["sg_grad/action_sg_b"])
    assert_close(network.head_block.predictor_weight.grad, expected)
    assert_close(network.head_block.statistics["predictor_loss"], case["sg_losses"][-1])


WIDTH, SIZE, CONTEXT = 4, 3, 5
#: Activations and contexts a block accepts, without their batch axes: (x, context or None).
SHAPES = {
    "flat": ((WIDTH * SIZE,), None),
    "neurons": ((WIDTH, SIZE), None),
    "shared context": ((WIDTH, SIZE), (CONTEXT,)),
    "own context": ((WIDTH * SIZE,), (WIDTH, CONTEXT)),
}


def make_block(shape: str = "flat", seed: int = 0, **settings: object) -> SyntheticGradient:
    """A float64 block with random predictors and mixing weights."""
    context_size = None if SHAPES[shape][1] is None else CONTEXT
    settings = {"context_size": context_size, "dtype": torch.float64} | settings
    block = SyntheticGradient(WIDTH, SIZE, **settings)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        block.mixing_weight.uniform_(0.1, 0.9, generator=generator)
        for parameter in block.parameters():
            parameter.normal_(generator=generator)
    return block


def make_inputs(shape: str = "flat", batch: tuple[int, ...] = (6,), seed: int = 1) -> list[Tensor]:
    """x and the received gradient, and the context if the shape has one."""
    generator = torch.Generator().manual_seed(seed)
    kinds = (SHAPES[shape][0], SHAPES[shape][0], SHAPES[shape][1])
    x, gradient, *context = (
        torch.randn(*batch, *kind, generator=generator, dtype=torch.float64)
        for kind in kinds
        if kind is not None
    )
    return [x.requires_grad_(), gradient, *context]


def by_definition(block: SyntheticGradient, x: Tensor, gradient: Tensor, *context: Tensor) -> tuple:
    """Sample by sample: (g, s, mixed), each [K][W] of vectors [N]."""
    batch = x.shape[:-2] if x.shape[-2:] == (WIDTH, SIZE) else x.shape[:-1]
    gradients = gradient.reshape(-1, WIDTH, SIZE)
    seen = (context[0] if context else x.detach()).reshape(math.prod(batch), -1)
    if context and context[0].dim() > len(batch) + 1:
        seen = seen.reshape(-1, WIDTH, CONTEXT)
    else:
        seen = seen.unsqueeze(1).expand(-1, WIDTH, -1)
    predictions = torch.zeros_like(gradients)
    for k in range(len(gradients)):
        for j in range(WIDTH):
            predictions[k, j] = block.predictor_weight[j] @ seen[k, j] + block.predictor_bias[j]
    weight = block.mixing_weight.reshape(1, WIDTH, 1)
    return gradients, predictions, weight * gradients + (1 - weight) * predictions


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("batch", [(6,), (3, 2), ()])
@pytest.mark.parametrize("target", ["mixed", "received"])
def test_mixture_and_regression(shape: str, batch: tuple[int, ...], target: str) -> None:
    block = make_block(shape, predictor_target=target, adaptive=False)
    x, gradient, *context = make_inputs(shape, batch)
    before = block.mixing_weight.clone()
    output = block(x, *context)
    assert torch.equal(output, x)
    output.backward(gradient)
    received, predictions, mixed = by_definition(block, x, gradient, *context)
    torch.testing.assert_close(x.grad, mixed.detach().reshape(x.shape))
    assert torch.equal(block.mixing_weight, before)
    # The predictor's gradient is that of its regression loss.
    loss = (predictions - (mixed.detach() if target == "mixed" else received)).square().mean()
    weight, bias = torch.autograd.grad(loss, [block.predictor_weight, block.predictor_bias])
    torch.testing.assert_close(block.predictor_weight.grad, weight)
    torch.testing.assert_close(block.predictor_bias.grad, bias)
    expected = {"predictor_loss": loss}
    for name, vectors in zip(
        ("received_grad_norm", "prediction_norm", "mixed_grad_norm"),
        (received, predictions, mixed),
        strict=True,
    ):
        expected[name] = vectors.norm(dim=-1).mean()
    assert block.statistics.keys() == expected.keys()
    for name, value in block.statistics.items():
        torch.testing.assert_close(value, expected[name].detach())


@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_adaptive_weights_by_the_definition(shape: str, projected: bool) -> None:
    """Lambda* minimises |E w + (1 - lambda) E u - E w|^2 plus the variance of the batch's mean,
    each estimated without bias from the unit vectors of the samples."""
    block = make_block(shape, mixing_momentum=0.75, positive_projection=projected)
    inputs = make_inputs(shape, (9,))
    with torch.no_grad():
        # Some predictions close to the gradient, so that not all estimates are at a bound.
        block.predictor_weight[:2] *= 0.05
        block.predictor_bias[:2] = 1.0
        inputs[1] += 0.8
    before = block.mixing_weight.clone()
    block(inputs[0], *inputs[2:]).backward(inputs[1])
    with torch.no_grad():
        block.mixing_weight, after = before, block.mixing_weight
        received, predictions, mixed = by_definition(block, *inputs)
    if projected:
        for k in range(9):
            for j in range(WIDTH):
                g, s = received[k, j], predictions[k, j]
                predictions[k, j] = max(g @ s, 0) * s / (s @ s)
        mixed = before.reshape(-1, 1) * received + (1 - before.reshape(-1, 1)) * predictions
    torch.testing.assert_close(inputs[0].grad, mixed.reshape(inputs[0].shape))
    inside = 0
    for j in range(WIDTH):
        w = torch.stack([g / g.norm() for g in received[:, j]])
        s = torch.stack([s / s.norm().clamp(min=1e-12) for s in predictions[:, j]])
        u = s - w
        # Entries' covariances and variances of the means of 9 samples.
        covariance = sum(torch.cov(torch.stack([w[:, n], u[:, n]]))[0, 1] for n in range(SIZE)) / 9
        variance = sum(u[:, n].var() for n in range(SIZE)) / 9
        bias = max(u.mean(0) @ u.mean(0) - variance, 0)
        estimate = min(max(1 + covariance / (variance + bias), 0), 1)
        inside += 0 < estimate < 1
        torch.testing.assert_close(after[j], 0.75 * before[j] + 0.25 * estimate)
    assert inside >= 2


@pytest.mark.parametrize("shape", SHAPES)
def test_masked_samples(shape: str) -> None:
    """They pass their gradient on as it is; all else is as if they were not there."""
    block, plain = make_block(shape), make_block(shape)
    x, gradient, *context = make_inputs(shape, (4, 2))
    mask = torch.tensor([[True, True], [True, False], [False, True], [False, False]])
    block(x, *context, mask=mask).backward(gradient)
    valid = x.detach()[mask].requires_grad_()
    plain(valid, *(c[mask] for c in context)).backward(gradient[mask])
    assert torch.equal(x.grad[mask], valid.grad)
    assert torch.equal(x.grad[~mask], gradient[~mask])
    for parameter, expected in zip(block.parameters(), plain.parameters(), strict=True):
        assert torch.equal(parameter.grad, expected.grad)
    assert torch.equal(block.mixing_weight, plain.mixing_weight)
    # Nothing but masked samples.
    block.zero_grad()
    block(x, *context, mask=torch.zeros_like(mask)).sum().backward()
    assert block.predictor_weight.grad is None
    assert torch.equal(block.mixing_weight, plain.mixing_weight)


def mlp(block: nn.Module | None, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    generator = torch.Generator().manual_seed(3)
    layers = [nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, WIDTH * SIZE), nn.Tanh()]
    layers += [nn.Identity() if block is None else block, nn.Linear(WIDTH * SIZE, 2)]
    network = nn.Sequential(*layers).to(dtype)
    with torch.no_grad():
        for parameter in (p for layer in layers[:4] + layers[5:] for p in layer.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return network


def loss_of(network: nn.Module, seed: int = 4, samples: int = 12) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    dtype = network[0].weight.dtype
    x, y = (torch.randn(samples, n, generator=generator).to(dtype) for n in (4, 2))
    return (network(x) - y).square().mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_mixing_weight_one_is_backpropagation(dtype: torch.dtype) -> None:
    block = make_block(adaptive=False)
    block.mixing_weight.fill_(1)
    ours, plain = mlp(block, dtype), mlp(None, dtype)
    for network in (ours, plain):
        loss_of(network).backward()
    policy, predictor = split_parameters(ours)
    for parameter, expected in zip(policy, plain.parameters(), strict=True):
        assert torch.equal(parameter.grad, expected.grad)
    assert len(predictor) == 2
    assert all(parameter.grad.any() for parameter in predictor)


def test_mixing_weight_one_passes_gradcheck() -> None:
    block = make_block("shared context", adaptive=False)
    block.mixing_weight.fill_(1)
    x, _, context = make_inputs("shared context")
    for parameter in block.parameters():
        parameter.requires_grad_(False)  # theirs is not that of the output
    assert torch.autograd.gradcheck(lambda x: block(x, context).tanh(), x)


def test_predictors_and_mixing_weights_learn() -> None:
    """Under noise that no neuron sees, a trained predictor is trusted, and finds the mean."""
    generator = torch.Generator().manual_seed(0)
    block = SyntheticGradient(2, 3)
    optimizer = torch.optim.Adam(block.parameters(), lr=0.02)
    signal = torch.randn(6, 6, generator=generator)
    for _ in range(400):
        x = torch.randn(64, 6, generator=generator, requires_grad=True)
        noise = 3 * torch.randn(64, 6, generator=generator)
        optimizer.zero_grad()
        block(x).backward((x @ signal).detach() + noise)
        optimizer.step()
    learned = block.predictor_weight.detach().flatten(0, 1)
    torch.testing.assert_close(learned, signal.T, rtol=0, atol=0.25)
    assert block.mixing_weight.max() < 0.7


def test_nothing_happens_without_gradients() -> None:
    block = make_block()
    x, gradient = make_inputs()
    before = copy.deepcopy(block.state_dict())
    with torch.no_grad():
        assert block(x) is x
    with torch.inference_mode():
        assert torch.equal(block(x), x)
    block(x[:0]).sum().backward()  # no sample, nothing to learn from
    assert block.statistics == {}
    # One sample tells nothing about lambda.
    block(x[0]).backward(gradient[0])
    for name, value in block.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=1e-15, atol=0)


def test_a_single_neuron_and_a_single_sample() -> None:
    block = SyntheticGradient(1, 3, context_size=2, mixing_weight=0.5, adaptive=False)
    torch.nn.init.ones_(block.predictor_weight)
    x = torch.zeros(1, 3, requires_grad=True)
    context = torch.tensor([[1.0, 2.0]])
    block(x, context, torch.tensor([True])).backward(torch.tensor([[1.0, 2.0, 3.0]]))
    assert x.grad.tolist() == [[2.0, 2.5, 3.0]]


def test_channels_of_an_image() -> None:
    """As docs/extending.md has it: each place is a sample."""
    block = make_block()
    image, gradient = torch.randn(2, 5, 12, 3, 2, dtype=torch.float64)
    block(image.requires_grad_().movedim(1, -1)).movedim(-1, 1).backward(gradient)
    pixels = make_block()
    rows = image.detach().permute(0, 2, 3, 1).reshape(-1, 12).requires_grad_()
    pixels(rows).backward(gradient.permute(0, 2, 3, 1).reshape(-1, 12))
    torch.testing.assert_close(image.grad.permute(0, 2, 3, 1).reshape(-1, 12), rows.grad)
    torch.testing.assert_close(block.mixing_weight, pixels.mixing_weight)


def test_gradients_that_are_not_finite_leave_the_mixing_weights_alone() -> None:
    block = make_block()
    x, gradient = make_inputs()
    before = block.mixing_weight.clone()
    gradient[2] = math.inf
    block(x).backward(gradient)
    torch.testing.assert_close(block.mixing_weight, before, rtol=1e-15, atol=0)


@pytest.mark.parametrize("rule", MIXING_RULES)
def test_any_mixing_rule(rule: str) -> None:
    """What the rule makes of the moments of the samples' gradients, and of what it remembers."""
    block = make_block(mixing_rule=rule, mixing_momentum=0.75)
    weight, memory = block.mixing_weight.clone(), block.mixing_memory.clone()
    for seed in range(3):
        x, gradient = make_inputs(batch=(9,), seed=seed)
        with torch.no_grad():
            g, s, _ = by_definition(block, x, gradient)
        block(x).backward(gradient)
        if block.rule.unit_gradients:
            g, s = (v / v.norm(dim=-1, keepdim=True) for v in (g, s))
        u = s - g
        means = [(a * b).sum(-1).mean(0) for a, b in ((u, u), (g, u))]
        means += [(a.mean(0) * b.mean(0)).sum(-1) for a, b in ((u, u), (g, u))]
        weight = block.rule.next_weight(Moments(*means, 9), weight, memory)
        torch.testing.assert_close(block.mixing_weight, weight)
        torch.testing.assert_close(block.mixing_memory, memory)
    restored = make_block(mixing_rule=rule, seed=5)
    restored.load_state_dict(block.state_dict())
    assert torch.equal(restored.mixing_memory, block.mixing_memory)


def test_phases() -> None:
    """The two-phase update: predictors first, then the network, over one forward pass."""
    network = mlp(make_block())
    block, (policy, predictor) = network[4], split_parameters(network)
    joint = copy.deepcopy(network)
    loss_of(joint).backward()
    loss, before = loss_of(network), block.mixing_weight.clone()
    with backward_phase(network, "predictor"):
        loss.backward(inputs=predictor, retain_graph=True)
    assert all(parameter.grad is None for parameter in policy)
    for name in ("predictor_weight", "predictor_bias"):
        expected = getattr(joint[4], name).grad
        assert torch.equal(getattr(block, name).grad, expected)
    assert torch.equal(block.mixing_weight, before)
    with torch.no_grad():
        for parameter in predictor:
            parameter -= 0.5  # the second half uses the predictors as they are now
    stepped = copy.deepcopy(network)
    stepped.zero_grad()
    loss_of(stepped).backward()
    network.zero_grad()
    with backward_phase(network, "policy"):
        loss.backward()
    assert all(parameter.grad is None for parameter in predictor)
    for parameter, expected in zip(policy, split_parameters(stepped)[0], strict=True):
        assert torch.equal(parameter.grad, expected.grad)
    assert torch.equal(block.mixing_weight, stepped[4].mixing_weight)
    assert not torch.equal(block.mixing_weight, before)


def test_a_graph_that_is_kept_is_mixed_again() -> None:
    block = make_block(adaptive=False)
    x, gradient = make_inputs()
    output = block(x)
    output.backward(gradient, retain_graph=True)
    once = x.grad.clone(), block.predictor_weight.grad.clone()
    output.backward(gradient)
    torch.testing.assert_close(x.grad, 2 * once[0])
    torch.testing.assert_close(block.predictor_weight.grad, 2 * once[1])


def test_accumulated_gradients() -> None:
    """Over halves of a batch: the network's gradients are those of the whole batch, the
    predictor's, of a loss that is a mean over each backward pass, as many times as large."""
    whole = mlp(make_block(adaptive=False))
    halves = copy.deepcopy(whole)
    x, y = torch.randn(2, 12, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    for network, parts in ((whole, 1), (halves, 2)):
        for a, b in zip(x.chunk(parts), y.chunk(parts), strict=True):
            ((network(a) - b[:, :2]).square().mean() / parts).backward()
    for kind, factor in zip((0, 1), (1, 2), strict=True):
        ours, expected = split_parameters(halves)[kind], split_parameters(whole)[kind]
        for parameter, other in zip(ours, expected, strict=True):
            torch.testing.assert_close(parameter.grad, factor * other.grad)


def test_saved_and_loaded_it_goes_on_the_same(tmp_path: Path) -> None:
    def train(network: nn.Module, seeds: range) -> None:
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        for seed in seeds:
            optimizer.zero_grad()
            loss_of(network, seed).backward()
            optimizer.step()

    whole = mlp(make_block())
    train(whole, range(3))
    torch.save(whole.state_dict(), tmp_path / "network.pt")
    restored = mlp(make_block(seed=9))
    restored.load_state_dict(torch.load(tmp_path / "network.pt", weights_only=True))
    for network in (whole, restored):
        train(network, range(3, 6))
    for name, value in whole.state_dict().items():
        assert torch.equal(restored.state_dict()[name], value), name


def test_mixed_precision() -> None:
    """Activations and gradients narrower than the block's parameters."""
    block = make_block(dtype=torch.float32)
    x, gradient = (value.detach().bfloat16() for value in make_inputs())
    wide = copy.deepcopy(block)
    block(x.requires_grad_()).backward(gradient)
    wide_x = x.detach().float().requires_grad_()
    wide(wide_x).backward(gradient.float())
    assert x.grad.dtype == torch.bfloat16
    assert torch.equal(x.grad, wide_x.grad.bfloat16())
    assert torch.equal(block.predictor_weight.grad, wide.predictor_weight.grad)
    with torch.autocast("cpu", torch.bfloat16):
        loss_of(mlp(make_block(), torch.float32)).backward()


def test_what_it_cannot_do_is_refused() -> None:
    block = make_block(adaptive=False)
    x, gradient = make_inputs()
    once = torch.autograd.grad(block(x), x, gradient.requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        once[0].sum().backward()
    with pytest.raises(RuntimeError, match="inplace"):
        torch.relu_(block(x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_neurons": 0}, "num_neurons must be at least 1, got 0"),
        ({"neuron_size": 0}, "neuron_size must be at least 1, got 0"),
        ({"context_size": 0}, "context_size must be at least 1, got 0"),
        ({"mixing_weight": 1.5}, "mixing_weight must be between 0 and 1, got 1.5"),
        ({"mixing_momentum": -1}, "mixing_momentum must be between 0 and 1, got -1"),
        ({"mixing_rule": "runing"}, "unknown mixing_rule 'runing'"),
        ({"predictor_target": "x"}, "predictor_target must be 'mixed' or 'received', got 'x'"),
    ],
)
def test_impossible_settings(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        SyntheticGradient(**{"num_neurons": 2} | arguments)


@pytest.mark.parametrize(
    ("x", "context", "context_size", "message"),
    [
        ((2, 5), None, None, "x must be [..., 12] or [..., 4, 3], got [2, 5]"),
        ((), None, None, "x must be [..., 12] or [..., 4, 3], got []"),
        ((2, 12), (2, 7), None, "a context needs a block with its context_size"),
        ((2, 12), None, 7, "context_size is 7, but no context was given"),
        ((2, 12), (2, 6), 7, "context must be [2, 7] or [2, 4, 7], got [2, 6]"),
        ((2, 12), (3, 7), 7, "context must be [2, 7] or [2, 4, 7], got [3, 7]"),
        ((2, 12), (), 7, "context must be [2, 7] or [2, 4, 7], got []"),
    ],
)
def test_impossible_inputs(x: tuple, context: tuple, context_size: int, message: str) -> None:
    block = SyntheticGradient(WIDTH, SIZE, context_size=context_size)
    with pytest.raises(ValueError, match=re.escape(message)):
        block(torch.zeros(x), None if context is None else torch.zeros(context))


def test_rules_on_episodes_want_one_axis_of_samples() -> None:
    block = SyntheticGradient(WIDTH, SIZE, mixing_rule="episodes")
    message = (
        "'episodes' takes each row of x for an episode: flatten its leading axes or take another"
    )
    with pytest.raises(ValueError, match=message):
        block(torch.zeros(3, 2, 12))
    assert block(torch.zeros(2, 12)).shape == (2, 12)


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize("mask", [torch.ones(3, dtype=torch.bool), torch.ones(2)])
def test_impossible_masks(mask: Tensor) -> None:
    message = f"mask must be bool [2], got {mask.dtype} {list(mask.shape)}"
    with pytest.raises(ValueError, match=re.escape(message)):
        SyntheticGradient(WIDTH, SIZE)(torch.zeros(2, 12), mask=mask)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-9), (torch.float32, 1e-3)])
def test_cuda_equals_cpu(shape: str, dtype: torch.dtype, rtol: float) -> None:
    results = []
    for device in ("cpu", "cuda"):
        block = make_block(shape).to(device, dtype)
        x, gradient, *context = (value.detach().to(device, dtype) for value in make_inputs(shape))
        block(x.requires_grad_(), *context).backward(gradient)
        values = [x.grad, block.predictor_weight.grad, block.mixing_weight]
        results.append([value.cpu() for value in values])
    torch.testing.assert_close(results[1], results[0], rtol=rtol, atol=rtol)
