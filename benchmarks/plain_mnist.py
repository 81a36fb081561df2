"""The frozen baseline on the MNIST bandit: a careful script in plain PyTorch, nothing of sgrl.

Einsum over [B, W, ...], tensor hooks for mixing, a forward of its own for sampling, for the
predictor phase and for the policy phase, evaluation in one piece. It trains to the same numbers as
sgrl (tests/test_plain_torch.py), only slower; every speed claim is a ratio to it, taken in one
run. Do not make it faster.
"""

import math

import torch
from torch import Tensor, nn


class Layer(nn.Module):
    """Slot neurons [B, W, I] -> [B, W, N], and their predictors."""

    def __init__(self, neurons: int, size: int, inputs: int, slots: int) -> None:
        super().__init__()
        std = inputs**-0.5
        self.inputs = inputs
        self.keys = nn.Parameter(torch.randn(neurons, slots, inputs) * std)
        self.A = nn.Parameter(torch.randn(neurons, slots, size, inputs) * std)
        self.b = nn.Parameter(torch.randn(neurons, slots, size) * std)
        self.predictor_A = nn.Parameter(torch.randn(neurons, slots, size, inputs) * std)
        self.predictor_b = nn.Parameter(torch.randn(neurons, slots, size) * std)
        self.register_buffer("lam", torch.full((neurons,), 0.9))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a = torch.softmax(torch.einsum("bwi,wmi->bwm", x, self.keys) / math.sqrt(self.inputs), -1)
        y = torch.tanh(torch.einsum("bwi,wmni->bwmn", x, self.A) + self.b)
        return a, y, torch.einsum("bwm,bwmn->bwn", a, y)

    def predict(self, x: Tensor, a: Tensor) -> Tensor:
        guess = torch.einsum("bwi,wmni->bwmn", x, self.predictor_A) + self.predictor_b
        return torch.einsum("bwm,bwmn->bwn", a, guess)

    @torch.no_grad()
    def update_lambda(self, x: Tensor, a: Tensor, y: Tensor, g: Tensor, s: Tensor) -> None:
        g = g / g.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        s = s / s.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        scale, samples = self.inputs**-0.5, len(g)

        def rows(f: Tensor) -> tuple[Tensor, Tensor]:
            t = a.unsqueeze(-1) * f.unsqueeze(2) * (1 - y.square())
            v = torch.einsum("bwn,bwmn->bwm", f, y)
            return t, a * (v - (a * v).sum(-1, keepdim=True))

        t_w, q_w = rows(g)
        t_s, q_s = rows(s)
        t_u, q_u = t_s - t_w, q_s - q_w
        norm = x.square().sum(-1)

        def inner(t: Tensor, q: Tensor, t2: Tensor, q2: Tensor) -> Tensor:
            total = (1 + norm) * (t * t2).sum((-1, -2)) + scale**2 * norm * (q * q2).sum(-1)
            return total.mean(0)

        def mean(t: Tensor, q: Tensor) -> Tensor:
            parts = (
                t.mean(0).flatten(1),
                torch.einsum("bwmn,bwi->wmni", t, x).flatten(1) / samples,
                scale * torch.einsum("bwm,bwi->wmi", q, x).flatten(1) / samples,
            )
            return torch.cat(parts, 1)

        w_bar, u_bar = mean(t_w, q_w), mean(t_u, q_u)
        square = u_bar.square().sum(1)
        variance = ((inner(t_u, q_u, t_u, q_u) - square) / (samples - 1)).clamp(min=0)
        covariance = (inner(t_w, q_w, t_u, q_u) - (w_bar * u_bar).sum(1)) / (samples - 1)
        total = variance + (square - variance).clamp(min=0)
        estimate = torch.where(total > 1e-6, (1 + covariance / total).clamp(0, 1), self.lam)
        self.lam.mul_(0.9).add_(0.1 * estimate)


class SparseMLP(nn.Module):
    """Residual feed-forward SparseNet of the published size, adaptive sgprop."""

    def __init__(
        self,
        inputs: int = 784,
        actions: int = 9,
        layers: int = 5,
        neurons: int = 200,
        size: int = 10,
        parents: int = 5,
        slots: int = 5,
    ) -> None:
        super().__init__()
        read, flat = parents * size, neurons * size
        self.layers = nn.ModuleList(Layer(neurons, size, read, slots) for _ in range(layers))
        self.action_keys = nn.Parameter(torch.randn(actions, flat) * read**-0.5)
        self.action_predictor_A = nn.Parameter(torch.randn(actions, flat, actions) * flat**-0.5)
        self.action_predictor_b = nn.Parameter(torch.randn(actions, actions) * flat**-0.5)
        pixels = [torch.randperm(inputs)[:read] for _ in range(neurons)]
        self.register_buffer("pixels", torch.stack(pixels))
        sources = [
            torch.stack([torch.randperm(neurons)[:parents] for _ in range(neurons)])
            for _ in range(layers - 1)
        ]
        self.register_buffer("parents", torch.stack(sources))

    def predictors(self) -> list[nn.Parameter]:
        return [p for name, p in self.named_parameters() if "predictor" in name]

    def others(self) -> list[nn.Parameter]:
        return [p for name, p in self.named_parameters() if "predictor" not in name]

    def forward(self, x: Tensor, mix: bool = False) -> Tensor:
        """Logits [B, actions]; with `mix` the backward pass mixes predictions in, and
        `self.record` holds what it saw."""
        self.record: list[dict[str, Tensor]] = []
        h = x
        for index, layer in enumerate(self.layers):
            read = x[:, self.pixels] if index == 0 else h[:, self.parents[index - 1]].flatten(2)
            a, y, output = layer(read)
            h = output if index == 0 else torch.tanh(output) + h
            if mix:
                seen = {"x": read.detach(), "a": a.detach(), "y": y.detach()}
                slope = 1 - torch.tanh(output.detach()).square()
                seen["slope"] = torch.ones_like(slope) if index == 0 else slope
                seen["s"] = layer.predict(seen["x"], seen["a"])
                h.register_hook(self.hook(layer, seen))
                self.record.append(seen)
        self.flat = h.detach().flatten(1)
        return h.flatten(1) @ self.action_keys.t() / math.sqrt(h[0].numel())

    def hook(self, layer: Layer, seen: dict[str, Tensor]):
        def mix(g: Tensor) -> Tensor:
            seen["g"] = g
            lam = layer.lam.view(1, -1, 1)
            return lam * g + (1 - lam) * seen["s"].detach()

        return mix


def loss_of(logits: Tensor, actions: Tensor, rewards: Tensor) -> Tensor:
    log_probs = torch.log_softmax(logits, -1).gather(1, actions.unsqueeze(1)).squeeze(1)
    return -(rewards * log_probs).mean()


def make_optimizers(policy: SparseMLP, lr: float, predictor_lr: float) -> list[torch.optim.Adam]:
    groups = ((policy.others(), lr), (policy.predictors(), predictor_lr))
    return [torch.optim.Adam(parameters, lr=rate) for parameters, rate in groups]


def sample(policy: SparseMLP, contexts: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.distributions.Categorical(logits=policy(contexts)).sample()


def update(
    policy: SparseMLP,
    optimizers: list[torch.optim.Adam],
    contexts: Tensor,
    actions: Tensor,
    rewards: Tensor,
) -> float:
    """The predictors' step, then the policy's, on one batch; returns the loss."""
    for optimizer in optimizers:
        optimizer.zero_grad()
    logits = policy(contexts, mix=True)
    logits.retain_grad()
    loss_of(logits, actions, rewards).backward()
    routing = logits.detach().softmax(-1)
    guess = torch.einsum("bh,ahk->bak", policy.flat, policy.action_predictor_A)
    guess = torch.einsum("ba,bak->bk", routing, guess + policy.action_predictor_b)
    predictor_loss = (guess - logits.grad).square().mean()
    for seen in policy.record:
        predictor_loss = predictor_loss + (seen["s"] - seen["g"]).square().mean()
    gradients = torch.autograd.grad(predictor_loss, policy.predictors())
    for parameter, gradient in zip(policy.predictors(), gradients, strict=True):
        parameter.grad = gradient
    optimizers[1].step()

    optimizers[0].zero_grad()
    loss = loss_of(policy(contexts, mix=True), actions, rewards)
    loss.backward()
    for layer, seen in zip(policy.layers, policy.record, strict=True):
        s = seen["s"].detach() * seen["slope"]
        layer.update_lambda(seen["x"], seen["a"], seen["y"], seen["g"] * seen["slope"], s)
    optimizers[0].step()
    return loss.item()


def evaluate(policy: SparseMLP, contexts: Tensor, labels: Tensor) -> float:
    """Mean reward of sampled actions on test images, in one piece."""
    return (sample(policy, contexts) == labels).float().mean().item()
