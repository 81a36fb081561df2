"""Synthetic gradients in an ordinary MLP and an ordinary training loop.

A contextual bandit with noisy feedback: the MLP guesses which of five classes a random vector
belongs to, and is told only whether the guess was right, wrongly so two times in five. A block
after each hidden layer predicts the gradient that arrives there. Trained once with the blocks and
once without, from the same initial weights and on the same data; prints the share of right guesses
on new vectors and the mean mixing weight.

    python examples/plain_torch.py

Takes about fifteen seconds on one core; needs torch only.
"""

import argparse

import torch
from torch import Tensor, nn

from sgrl.nn import SyntheticGradient
from sgrl.nn.mixing import split_parameters

FEATURES, HIDDEN, CLASSES, BATCH = 20, 64, 5, 64


def make_network(synthetic: bool) -> nn.Sequential:
    """An MLP of two hidden layers; the blocks start without drawing anything at random."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    size = FEATURES
    for _ in range(2):
        layers += [nn.Linear(size, HIDDEN), nn.Tanh()]
        if synthetic:
            layers += [SyntheticGradient(HIDDEN)]
        size = HIDDEN
    return nn.Sequential(*layers, nn.Linear(size, CLASSES))


def train(network: nn.Sequential, teacher: Tensor, iterations: int) -> None:
    """REINFORCE on fresh vectors; rewards are flipped with probability 0.4."""
    generator = torch.Generator().manual_seed(1)
    policy, predictor = split_parameters(network)
    groups = [{"params": policy, "lr": 1e-3}, {"params": predictor, "lr": 1e-3}]
    optimizer = torch.optim.Adam([group for group in groups if group["params"]])
    for iteration in range(iterations):
        x = torch.randn(BATCH, FEATURES, generator=generator)
        logits = network(x)
        guesses = torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)
        right = guesses == (x @ teacher).argmax(-1)
        reward = (right ^ (torch.rand(BATCH, generator=generator) < 0.4)).float()
        log_probabilities = logits.log_softmax(-1)[torch.arange(BATCH), guesses]
        loss = -(reward * log_probabilities).mean()
        optimizer.zero_grad()
        loss.backward()  # mixes, updates lambda, and leaves the predictors' gradients
        optimizer.step()
        if (iteration + 1) % max(iterations // 4, 1) == 0:
            report(network, teacher, iteration + 1)


@torch.no_grad()
def report(network: nn.Sequential, teacher: Tensor, iteration: int) -> None:
    x = torch.randn(4000, FEATURES, generator=torch.Generator().manual_seed(2))
    right = (network(x).argmax(-1) == (x @ teacher).argmax(-1)).float().mean().item()
    line = f"  {iteration:5} updates: {right:.3f} right"
    blocks = [module for module in network if isinstance(module, SyntheticGradient)]
    for layer, block in enumerate(blocks):
        line += f", lambda of layer {layer}: {block.mixing_weight.mean().item():.3f}"
    print(line)


def main(arguments: list[str] | None = None) -> nn.Module:
    """Train both networks; returns the one with blocks."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--iterations", type=int, default=4000, help="updates of each network")
    iterations = parser.parse_args(arguments).iterations
    teacher = torch.randn(FEATURES, CLASSES, generator=torch.Generator().manual_seed(3))
    for synthetic in (False, True):
        print("With synthetic gradients:" if synthetic else "Plain backpropagation:")
        network = make_network(synthetic)
        train(network, teacher, iterations)
    return network


if __name__ == "__main__":
    main()
