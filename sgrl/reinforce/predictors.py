"""How predictors of synthetic gradients learn: the optimizers of their parameters.

A predictor regresses on the gradient that its neuron receives. The published way is Adam on every
batch's regression loss ("adam"). The received gradients are small and noisy: Adam's step has the
same length however small they are, and what it learns from one batch is mostly that batch's noise.
Three other ways, all for any backend, since they work on what the backward pass returns:

    scaled         Adam whose learning rate is in units of the mean length of received gradients
    averaged       the average of Adam's iterates predicts, and the regression's gradient is its own
    least_squares  the ridge regression over all batches, the past ones forgotten by and by

docs/predictors.md defines them and tells what they gained.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from sgrl.names import did_you_mean
from sgrl.nn.feedforward import SparseMLP
from sgrl.nn.mixing import MixingModule, mixing_modules, split_parameters
from sgrl.nn.neuron import Activation, SlotNeurons
from sgrl.nn.policy import Mask, Noise, Policy
from sgrl.nn.recurrent import SparseRNN
from sgrl.nn.registry import name_of

#: Steps of a recurrent network that `LeastSquares` looks at together.
CHUNK_STEPS = 8
#: Its ridge penalty, as a share of the features' mean square.
PENALTY = 1e-3


class ScaledAdam(Adam):
    """Adam in units of what it regresses on.

    The learning rate of a module's predictors is `lr` times a running average of the mean length of
    the gradients that the module's neurons receive: average <- m * average + (1 - m) * batch, from
    zero, divided by 1 - m^k after k batches.

    Args:
        policy: whose predictors.
        lr: in units of that length.
        memory: m, in [0, 1).
    """

    def __init__(self, policy: nn.Module, lr: float, memory: float) -> None:
        self.memory = memory
        self.modules = [m for m in mixing_modules(policy) if _parameters_of(m)]
        groups = [{"params": _parameters_of(m)} for m in self.modules]
        super().__init__(groups, lr=lr, fused=True)
        self.unit_lr = lr

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take one step, after a backward pass."""
        averages = []
        for group, module in zip(self.param_groups, self.modules, strict=True):
            state = self.state[group["params"][0]]
            measured = module.statistics.get("received_grad_norm")
            if measured is None:  # it predicts, and mixes nothing: its target's own size
                measured = module.statistics["predictor_loss"].sqrt()
            measured = measured.detach().double().cpu()
            average = self.memory * state.get("average", 0.0) + (1 - self.memory) * measured
            weight = self.memory * state.get("weight", 0.0) + (1 - self.memory)
            group["lr"] = self.unit_lr * float(average / weight)
            # In the parameters' precision, which is that of a state that is loaded.
            dtype = group["params"][0].dtype
            averages.append((average.to(dtype), torch.as_tensor(weight, dtype=dtype)))
        super().step(closure)
        for group, (average, weight) in zip(self.param_groups, averages, strict=True):
            # Adam takes a parameter whose state holds anything for one that it has met before.
            self.state[group["params"][0]] |= {"average": average, "weight": weight}


class AveragedAdam(Adam):
    """Adam whose iterates are averaged, and the average predicts.

    A parameter is the average; the iterate z is kept beside it. A step moves z by the regression's
    gradient at the average (primal averaging), then average <- m * average + (1 - m) * z.

    Args:
        policy: whose predictors.
        lr: Adam's.
        memory: m, in [0, 1); 0 is Adam.
    """

    def __init__(self, policy: nn.Module, lr: float, memory: float) -> None:
        self.memory = memory
        super().__init__(split_parameters(policy)[1], lr=lr, fused=True)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take one step, after a backward pass."""
        parameters = [p for group in self.param_groups for p in group["params"]]
        averages = [p.clone() for p in parameters]
        for parameter in parameters:
            parameter.copy_(self.state[parameter].get("iterate", parameter))
        super().step(closure)
        for parameter, average in zip(parameters, averages, strict=True):
            if parameter.grad is not None:
                self.state[parameter]["iterate"] = parameter.clone()
            parameter.mul_(1 - self.memory).add_(average, alpha=self.memory)


class LeastSquares(Adam):
    """The ridge regression of received gradients on what neurons see, over all batches.

    A neuron's features are its attention a and its inputs x. With Phi [K, M + I] those of a batch's
    K valid samples and Y [K, N] the gradients received there,

        G <- m G + Phi^T Phi,   X <- m X + Phi^T Y,   C = (G + r mean(diag G) 1)^-1 X,

    and s = C^T [a, x]: the slots' matrices are all the same. (With the features a (x) [x, 1] of all
    that a predictor can compute, G would be 36 times as large.) Y itself is not needed: Phi^T Y =
    Phi^T S - (K W N / 2) dL/dC, S being the predictions of the backward pass and L the regression's
    loss, the mean over samples, neurons and dimensions. So it runs with any backend.

    Predictors that belong to no slot neuron learn by Adam.

    Args:
        policy: a `sparsenet` or a `sparse_mlp`.
        lr: of those others.
        memory: m, in [0, 1); the past counts for 1 / (1 - m) batches.

    Raises:
        ValueError: another policy.
    """

    def __init__(self, policy: Policy, lr: float, memory: float) -> None:
        core = policy.core
        if not isinstance(core, SparseRNN | SparseMLP):
            raise ValueError(
                f"least_squares is for the policies sparsenet and sparse_mlp, not {name_of(policy)}"
            )
        self.policy, self.core, self.memory = policy, core, memory
        self.layers = [core.neurons] if isinstance(core, SparseRNN) else list(core.layers)
        #: Sums of the batch, of each layer's groups.
        self.observed: list[list[_Sums]] = []
        super().__init__(split_parameters(policy)[1], lr=lr, fused=True)

    @torch.no_grad()
    def observe(
        self, observations: Float[Tensor, "T B F"], mask: Mask, noise: Noise | None = None
    ) -> None:
        """Take in what the neurons see in a batch, before anything of the policy changes.

        Args:
            observations: [T, B, F].
            mask: bool [T, B], True at valid steps.
            noise: of the policy's neurons, as of `EpisodeBatch`.
        """
        totals: list[list[_Sums] | None] = [None] * len(self.layers)
        embeddings = self.policy.encode(observations)
        for layer, inputs, attention in _seen(self.core, embeddings, mask, noise):
            parts = [
                _Sums.of(group, self.layers[layer], inputs, attention)
                for group in _groups(self.layers[layer])
            ]
            before = totals[layer]
            totals[layer] = (
                [a.plus(b) for a, b in zip(before, parts, strict=True)] if before else parts
            )
        self.observed = [sums for sums in totals if sums is not None]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Solve for the coefficients, after `observe` and a backward pass."""
        for neurons, of_groups in zip(self.layers, self.observed, strict=True):
            state = self.state[neurons.predictor_bias]
            state["step"] = torch.zeros(())  # Adam looks for it in every state that it loads
            for place, (group, batch) in enumerate(zip(_groups(neurons), of_groups, strict=True)):
                terms = batch.samples * neurons.num_neurons * neurons.neuron_size
                cross = batch.predicted - terms / 2 * _gradient(neurons, group)
                gram = batch.gram
                if f"gram{place}" in state:
                    gram = gram + self.memory * state[f"gram{place}"]
                    cross = cross + self.memory * state[f"cross{place}"]
                state[f"gram{place}"], state[f"cross{place}"] = gram, cross
                _write(neurons, group, _ridge(gram, cross))
            for name in ("predictor_h", "predictor_x", "predictor_bias"):
                if hasattr(neurons, name):
                    getattr(neurons, name).grad = None  # not for Adam
        self.observed = []
        super().step(closure)


class _Sums(NamedTuple):
    """Sums over a batch's valid samples, for some neurons of a layer."""

    gram: Float[Tensor, "w D D"]
    predicted: Float[Tensor, "w D N"]  # Phi^T S
    samples: int  # K

    @classmethod
    def of(cls, group: slice, neurons: SlotNeurons, inputs: Tensor, attention: Tensor) -> _Sums:
        size = inputs.shape[2] if group.start == 0 and neurons.num_input_neurons else _read(neurons)
        seen = torch.cat([attention, inputs[..., :size]], dim=2)[:, group].transpose(0, 1)
        features = seen.contiguous()
        predictions = _predict(neurons, inputs, attention)[:, group].transpose(0, 1)
        return cls(features.mT @ features, features.mT @ predictions, len(inputs))

    def plus(self, other: _Sums) -> _Sums:
        return _Sums(
            self.gram + other.gram, self.predicted + other.predicted, self.samples + other.samples
        )


def _read(neurons: SlotNeurons) -> int:
    return neurons.predictor_h.shape[2]


def _groups(neurons: SlotNeurons) -> list[slice]:
    """The neurons that read the external input, and the others, which see fewer numbers."""
    first = neurons.num_input_neurons
    groups = [slice(0, first), slice(first, neurons.num_neurons)]
    return [group for group in groups if group.stop > group.start]


def _seen(
    core: SparseRNN | SparseMLP, x: Float[Tensor, "T B E"], mask: Mask, noise: Noise | None
) -> Iterator[tuple[int, Float[Tensor, "K W I"], Float[Tensor, "K W M"]]]:
    """Layer, inputs and attention of all valid samples, some at a time."""
    if isinstance(core, SparseMLP):
        # All its samples count: it knows no mask.
        h = x.flatten(0, 1)
        for index, neurons in enumerate(core.layers):
            inputs = neurons.read(h, core.parents[index - 1], None) if index else h[:, core.pixels]
            activation = neurons(inputs)
            yield index, activation.inputs, activation.attention
            output = activation.output
            h = torch.tanh(output) + h if core.is_residual(index) else output
            if noise is not None:
                shape = (len(h), len(core.layers), *h.shape[1:])
                h = h + neurons.noise_std * noise.reshape(shape)[:, index].to(h)
        return
    neurons = core.neurons
    states = core(x, noise=noise)[0].reshape(*x.shape[:2], core.num_neurons, core.neuron_size)
    before = torch.cat([torch.zeros_like(states[:1]), states[:-1]])
    keys, _ = neurons.keys_and_matrices()
    for start in range(0, len(x), CHUNK_STEPS):
        steps = slice(start, start + CHUNK_STEPS)
        valid = mask[steps]
        inputs = neurons.read(before[steps][valid], core.parents, x[steps][valid])
        scores = torch.bmm(inputs.transpose(0, 1), keys.mT) * neurons.scale
        yield 0, inputs, scores.softmax(-1).transpose(0, 1)


def _predict(neurons: SlotNeurons, inputs: Tensor, attention: Tensor) -> Float[Tensor, "K W N"]:
    nothing = inputs.new_empty(0)
    return neurons.predict(Activation(inputs, attention, nothing, nothing))


def _gradient(neurons: SlotNeurons, group: slice) -> Float[Tensor, "w D N"]:
    """Gradient of the regression's loss by the coefficients C of some neurons."""
    slots = (neurons.num_slots, neurons.neuron_size)
    by_bias, *by_weights = (
        getattr(neurons, name).grad[group] for name in ("predictor_bias", *_weights(neurons, group))
    )
    by_inputs = [gradient.unflatten(1, slots).sum(1).mT for gradient in by_weights]
    return torch.cat([by_bias, *by_inputs], dim=1)


def _write(neurons: SlotNeurons, group: slice, coefficients: Float[Tensor, "w D N"]) -> None:
    """Make the predictors of some neurons what their coefficients say: s = C^T [a, x]."""
    neurons.predictor_bias[group] = coefficients[:, : neurons.num_slots]
    place = neurons.num_slots
    for name in _weights(neurons, group):
        weight = getattr(neurons, name)
        part = coefficients[:, place : place + weight.shape[2]]
        weight[group] = part.mT.repeat(1, neurons.num_slots, 1)
        place += weight.shape[2]


def _weights(neurons: SlotNeurons, group: slice) -> list[str]:
    reads_input = group.start == 0 and neurons.num_input_neurons
    return ["predictor_h", "predictor_x"] if reads_input else ["predictor_h"]


def _ridge(gram: Float[Tensor, "w D D"], cross: Float[Tensor, "w D N"]) -> Float[Tensor, "w D N"]:
    gram, precision = gram.double(), gram.dtype
    size = gram.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-300)
    penalty = (PENALTY * size).view(-1, 1, 1) * torch.eye(gram.shape[1], dtype=gram.dtype)
    return torch.linalg.solve(gram + penalty.to(gram.device), cross.double()).to(precision)


def _parameters_of(module: MixingModule) -> list[nn.Parameter]:
    return split_parameters(module)[1] if isinstance(module, nn.Module) else []


#: By the names of the setting `predictor_optimizer`.
PREDICTOR_OPTIMIZERS = ("adam", "scaled", "averaged", "least_squares")


def make_predictor_optimizer(
    policy: Policy, name: str, lr: float, memory: float
) -> Optimizer | None:
    """Make the optimizer of a policy's predictors; None where there are none.

    Args:
        policy: whose predictors.
        name: one of `PREDICTOR_OPTIMIZERS`.
        lr: their learning rate.
        memory: weight of the past in what the optimizer averages, in [0, 1); not used by "adam".

    Raises:
        ValueError: an unknown name, or a policy that it is not for; one line.
    """
    parameters = split_parameters(policy)[1]
    if not parameters:
        return None
    match name:
        case "adam":
            return Adam(parameters, lr=lr, fused=True)
        case "scaled":
            return ScaledAdam(policy, lr, memory)
        case "averaged":
            return AveragedAdam(policy, lr, memory)
        case "least_squares":
            return LeastSquares(policy, lr, memory)
    known = did_you_mean(name, PREDICTOR_OPTIMIZERS)
    raise ValueError(f"unknown predictor_optimizer {name!r}; {known}")
