"""The frozen baseline: what a careful script in plain PyTorch does, with nothing of sgrl.

Per-step modules, einsum over [B, W, ...], hooks for mixing, popgym's own Python environments
stepped one by one, and a loop over time in rollout and update. It trains to the same numbers as
sgrl (tests/test_plain_torch.py), only slower; every speed claim is a ratio to it, taken in one
run. Do not make it faster.

    python benchmarks/plain_torch.py --policy sparsenet_sgprop --batches 3
"""

import argparse
import math
import random
import time
import warnings
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

POLICIES = ("gru", "lstm", "sparsenet_backprop", "sparsenet_sgprop_fixed", "sparsenet_sgprop")


def make_env(kind: str, maze_dims: tuple[int, int], episode_length: int):
    """One of popgym's labyrinths with the published wrappers: Box(56), 4 actions."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from popgym.envs.labyrinth_escape import LabyrinthEscape
        from popgym.envs.labyrinth_explore import LabyrinthExplore
        from popgym.wrappers import Antialias, Flatten, PreviousAction

        maze = {"escape": LabyrinthEscape, "explore": LabyrinthExplore}[kind]
        env = maze(maze_dims=maze_dims, episode_length=episode_length)
    return Flatten(Antialias(PreviousAction(env)), flatten_action=False)


class Encoder(nn.Module):
    """Observation [B, F] -> embedding [B, 128]."""

    def __init__(self, observation_size: int, size: int = 128) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(observation_size, size),
            nn.LayerNorm(size, elementwise_affine=False),
            nn.Linear(size, size),
            nn.LeakyReLU(0.01),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class DensePolicy(nn.Module):
    """GRU or LSTM, one cell call a step."""

    def __init__(self, kind: str, observation_size: int, num_actions: int) -> None:
        super().__init__()
        self.encoder = Encoder(observation_size)
        self.cell = {"gru": nn.GRUCell, "lstm": nn.LSTMCell}[kind](128, 256)
        self.actor = nn.Sequential(
            nn.Linear(256, 128),
            nn.LeakyReLU(0.01),
            nn.Linear(128, 128),
            nn.LeakyReLU(0.01),
            nn.Linear(128, num_actions),
        )

    def initial_state(self, batch: int):
        zeros = torch.zeros(batch, 256)
        return (zeros, zeros) if isinstance(self.cell, nn.LSTMCell) else zeros

    def step(self, x: Tensor, state, t: int = 0):
        state = self.cell(self.encoder(x), state)
        return self.actor(state[0] if isinstance(state, tuple) else state), state

    def unroll(self, observations: Tensor, mask: Tensor) -> Tensor:
        state, logits = self.initial_state(observations.shape[1]), []
        for x in observations:
            out, state = self.step(x, state)
            logits.append(out)
        return torch.stack(logits)

    def finish_update(self, mask: Tensor) -> None:
        pass


class SparsePolicy(nn.Module):
    """Recurrent SparseNet: one einsum call a step, tensor hooks that mix predictions in."""

    def __init__(
        self,
        observation_size: int,
        num_actions: int,
        sgprop: bool = True,
        adaptive: bool = True,
        num_neurons: int = 128,
        size: int = 6,
        num_parents: int = 6,
        slots: int = 6,
        num_input: int = 16,
        beta: float = 0.1,
    ) -> None:
        super().__init__()
        self.sgprop, self.adaptive, self.beta, self.num_input = sgprop, adaptive, beta, num_input
        inputs = num_parents * size + 128
        self.inputs, self.size = inputs, size
        self.encoder = Encoder(observation_size)
        std = inputs**-0.5
        self.keys = nn.Parameter(torch.randn(num_neurons, slots, inputs) * std)
        self.A = nn.Parameter(torch.randn(num_neurons, slots, size, inputs) * std)
        self.b = nn.Parameter(torch.randn(num_neurons, slots, size) * std)
        self.predictor_A = nn.Parameter(torch.zeros(num_neurons, slots, size, inputs))
        self.predictor_b = nn.Parameter(torch.zeros(num_neurons, slots, size))
        flat = num_neurons * size
        self.actor_keys = nn.Parameter(torch.randn(num_actions, slots, flat) * flat**-0.5)
        self.actor_A = nn.Parameter(torch.randn(num_actions, slots, flat) * flat**-0.5)
        self.actor_b = nn.Parameter(torch.zeros(num_actions, slots))
        parents = [torch.randperm(num_neurons)[:num_parents] for _ in range(num_neurons)]
        self.register_buffer("parents", torch.stack(parents))
        self.register_buffer("lam", torch.ones(num_neurons))

    def predictors(self) -> list[nn.Parameter]:
        return [self.predictor_A, self.predictor_b]

    def initial_state(self, batch: int) -> Tensor:
        return torch.zeros(batch, len(self.keys), self.size)

    def neuron(self, embedding: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        external = torch.zeros(len(h), len(self.keys), embedding.shape[1])
        external[:, : self.num_input] = embedding.unsqueeze(1)
        x = torch.cat([h[:, self.parents].flatten(2), external], dim=2)
        a = torch.softmax(torch.einsum("bwi,wmi->bwm", x, self.keys) / math.sqrt(self.inputs), -1)
        y = torch.tanh(torch.einsum("bwi,wmni->bwmn", x, self.A) + self.b)
        return x, a, y, torch.einsum("bwm,bwmn->bwn", a, y)

    def actor(self, h: Tensor) -> Tensor:
        flat = h.flatten(1)
        scores = torch.einsum("bh,amh->bam", flat, self.actor_keys) / math.sqrt(flat.shape[1])
        values = torch.einsum("bh,amh->bam", flat, self.actor_A) + self.actor_b
        return (scores.softmax(-1) * values).sum(-1)

    def step(self, x: Tensor, state: Tensor, t: int = 0) -> tuple[Tensor, Tensor]:
        h = self.neuron(self.encoder(x), state)[3]
        return self.actor(h), h

    def schedule(self, length: int) -> list[Tensor]:
        lams = [self.lam.clone()]
        counts = torch.bincount(self.parents.flatten(), minlength=len(self.lam)).clamp(min=1)
        for _ in range(length - 1):
            distrust = (1 - lams[0]).unsqueeze(1).expand_as(self.parents)
            total = torch.zeros_like(self.lam).scatter_add_(
                0, self.parents.flatten(), distrust.flatten()
            )
            lams.insert(0, (lams[0] + self.beta * total / counts).clamp(max=1))
        return lams

    def unroll(self, observations: Tensor, mask: Tensor) -> Tensor:
        length, batch = observations.shape[:2]
        self.record: dict[int, tuple[Tensor, ...]] = {}
        lams = self.schedule(length)
        h, logits = self.initial_state(batch), []
        for t in range(length):
            x, a, y, h = self.neuron(self.encoder(observations[t]), h)
            if self.sgprop:
                xd, ad = x.detach(), a.detach()
                guess = torch.einsum("bwi,wmni->bwmn", xd, self.predictor_A) + self.predictor_b
                s = torch.einsum("bwm,bwmn->bwn", ad, guess)
                self.mix(t, h, s, lams[t], xd, ad, y.detach())
            logits.append(self.actor(h))
        return torch.stack(logits)

    def mix(
        self, t: int, h: Tensor, s: Tensor, lam: Tensor, x: Tensor, a: Tensor, y: Tensor
    ) -> None:
        lam = lam.view(1, -1, 1)

        def hook(g: Tensor) -> Tensor:
            mixed = lam * g + (1 - lam) * s.detach()
            self.record[t] = (g, s, mixed, x, a, y)
            return mixed

        h.register_hook(hook)

    def finish_update(self, mask: Tensor) -> None:
        """After the backward pass: the predictor's loss and gradient, then lambda."""
        if not self.sgprop:
            return
        steps = [self.record[t] for t in range(len(mask))]
        g, s, mixed, x, a, y = (torch.stack(values) for values in zip(*steps, strict=True))
        self.predictor_loss = (s - mixed)[mask].square().mean()
        gradients = torch.autograd.grad(self.predictor_loss, self.predictors())
        for parameter, gradient in zip(self.predictors(), gradients, strict=True):
            parameter.grad = gradient
        if self.adaptive:
            with torch.no_grad():
                self.update_lambda(*(v[mask] for v in (g, s, x, a, y)))

    def update_lambda(self, g: Tensor, s: Tensor, x: Tensor, a: Tensor, y: Tensor) -> None:
        g = g / g.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        s = s / s.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        scale, samples = self.inputs**-0.5, len(g)

        def rows(f: Tensor) -> tuple[Tensor, Tensor]:
            t = a.unsqueeze(-1) * f.unsqueeze(2) * (1 - y.square())
            v = torch.einsum("kwn,kwmn->kwm", f, y)
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
                torch.einsum("kwmn,kwi->wmni", t, x).flatten(1) / samples,
                scale * torch.einsum("kwm,kwi->wmi", q, x).flatten(1) / samples,
            )
            return torch.cat(parts, 1)

        w_bar, u_bar = mean(t_w, q_w), mean(t_u, q_u)
        square = u_bar.square().sum(1)
        variance = ((inner(t_u, q_u, t_u, q_u) - square) / (samples - 1)).clamp(min=0)
        covariance = (inner(t_w, q_w, t_u, q_u) - (w_bar * u_bar).sum(1)) / (samples - 1)
        total = variance + (square - variance).clamp(min=0)
        estimate = torch.where(total > 1e-12, (1 + covariance / total).clamp(0, 1), self.lam)
        self.lam.mul_(0.9).add_(0.1 * estimate)


def make_policy(name: str, observation_size: int, num_actions: int) -> nn.Module:
    if name in ("gru", "lstm"):
        return DensePolicy(name, observation_size, num_actions)
    return SparsePolicy(
        observation_size, num_actions, sgprop="sgprop" in name, adaptive=name == "sparsenet_sgprop"
    )


def rollout(envs: list, policy: nn.Module, seeds: list[int], length: int):
    """One episode of each environment -> observations, actions, rewards, mask, success."""
    batch = len(envs)
    observations = torch.zeros(length, batch, 56)
    actions = torch.zeros(length, batch, dtype=torch.int64)
    rewards, mask = torch.zeros(length, batch), torch.zeros(length, batch, dtype=torch.bool)
    success, done = [False] * batch, [False] * batch
    current = [env.reset(seed=seed)[0] for env, seed in zip(envs, seeds, strict=True)]
    with torch.no_grad():
        state = policy.initial_state(batch)
        for t in range(length):
            if all(done):
                break
            observations[t] = torch.as_tensor(np.stack(current))
            logits, state = policy.step(observations[t], state)
            actions[t] = torch.distributions.Categorical(logits=logits).sample()
            for b, env in enumerate(envs):
                if done[b]:
                    continue
                current[b], reward, terminated, truncated, _ = env.step(int(actions[t, b]))
                rewards[t, b], mask[t, b] = reward, True
                success[b], done[b] = terminated, terminated or truncated
    return observations, actions, rewards, mask, success


def clip(parameters: list[nn.Parameter], max_norm: float) -> None:
    norm = torch.stack([p.grad.norm() for p in parameters]).norm()
    for p in parameters:
        p.grad.mul_((max_norm / (norm + 1e-6)).clamp(max=1))


def make_optimizers(policy: nn.Module, lr: float, predictor_lr: float) -> list[torch.optim.Adam]:
    predictors = policy.predictors() if getattr(policy, "sgprop", False) else []
    ids = {id(p) for p in getattr(policy, "predictors", list)()}
    optimizers = [torch.optim.Adam([p for p in policy.parameters() if id(p) not in ids], lr=lr)]
    if predictors:
        optimizers.append(torch.optim.Adam(predictors, lr=predictor_lr))
    return optimizers


def update(
    policy: nn.Module,
    optimizers: list[torch.optim.Adam],
    observations: Tensor,
    actions: Tensor,
    rewards: Tensor,
    mask: Tensor,
    gamma: float = 0.95,
) -> float:
    """One training step; returns the policy loss."""
    returns, ahead = torch.zeros_like(rewards), torch.zeros(rewards.shape[1])
    for t in reversed(range(len(rewards))):
        ahead = (rewards[t] + gamma * ahead) * mask[t]
        returns[t] = ahead
    valid = returns[mask]
    returns = (returns - valid.mean()) / (valid.std(unbiased=False) + 1e-8)
    for optimizer in optimizers:
        optimizer.zero_grad()
    policies = torch.distributions.Categorical(logits=policy.unroll(observations, mask))
    policy_loss = -(policies.log_prob(actions) * returns)[mask].mean()
    (policy_loss - 0.01 * policies.entropy()[mask].mean()).backward()
    policy.finish_update(mask)
    for optimizer in optimizers:
        clip(optimizer.param_groups[0]["params"], 0.5)
        optimizer.step()
    return policy_loss.item()


def train(
    name: str, kind: str = "escape", num_envs: int = 20, length: int = 80, seed: int = 0
) -> Iterator[dict[str, float]]:
    """Train for ever; yields success_rate and seconds of rollout and update for each batch."""
    torch.manual_seed(seed)
    random.seed(seed)
    envs = [make_env(kind, (6, 6), length) for _ in range(num_envs)]
    policy = make_policy(name, 56, 4)
    optimizers = make_optimizers(policy, 2e-3, 1e-5)
    batch = 0
    while True:
        started = time.perf_counter()
        seeds = [seed + e + batch * num_envs for e in range(num_envs)]
        observations, actions, rewards, mask, success = rollout(envs, policy, seeds, length)
        rolled = time.perf_counter()
        update(policy, optimizers, observations, actions, rewards, mask)
        batch += 1
        yield {
            "success_rate": sum(success) / num_envs,
            "rollout_seconds": rolled - started,
            "update_seconds": time.perf_counter() - rolled,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--policy", choices=POLICIES, default="sparsenet_sgprop")
    parser.add_argument("--env", choices=("escape", "explore"), default="escape")
    parser.add_argument("--num-envs", type=int, default=20)
    parser.add_argument("--batches", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    length = {"escape": 80, "explore": 40}[arguments.env]
    rows = train(arguments.policy, arguments.env, arguments.num_envs, length)
    for _, row in zip(range(arguments.batches), rows, strict=False):
        print("  ".join(f"{key} {value:.3f}" for key, value in row.items()), flush=True)


if __name__ == "__main__":
    main()
