"""Adam for runs that are stacked (see `pack.py`)."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

#: Adam's (see `make_optimizers`).
BETAS, EPS = (0.9, 0.999), 1e-8


class StackedAdam:
    """Adam on parameters [S, ...], with a learning rate and a number of steps of each run.

    Args:
        parameters: [S, ...] by name.
        lr: [S].
    """

    def __init__(self, parameters: dict[str, Tensor], lr: Float[Tensor, " S"]) -> None:
        self.parameters = parameters
        self.lr = lr
        self.steps = torch.zeros_like(lr, dtype=torch.float64)
        self.first = {name: torch.zeros_like(p) for name, p in parameters.items()}
        self.second = {name: torch.zeros_like(p) for name, p in parameters.items()}

    @torch.no_grad()
    def step(self, gradients: dict[str, Tensor], moves: Bool[Tensor, " S"]) -> None:
        """One step of the runs that move; all else of the others stays as it is."""
        self.steps += moves
        corrections = [1 - beta**self.steps for beta in BETAS]
        # Corrections of runs that never moved are 0.
        rate = torch.where(moves, self.lr / corrections[0], 0.0).to(self.lr.dtype)
        root = torch.where(moves, corrections[1].sqrt(), 1.0).to(self.lr.dtype)
        shares = [moves.to(self.lr) * (1 - beta) for beta in BETAS]
        for name, parameter in self.parameters.items():
            shape = (-1, *(1,) * (parameter.dim() - 1))
            gradient = torch.where(moves.view(shape), gradients[name], 0.0)
            first, second = self.first[name], self.second[name]
            first.lerp_(gradient, shares[0].view(shape).expand_as(first))
            second.lerp_(gradient.square(), shares[1].view(shape).expand_as(second))
            scale = second.sqrt().div_(root.view(shape)).add_(EPS)
            parameter.sub_(rate.view(shape) * first / scale)
