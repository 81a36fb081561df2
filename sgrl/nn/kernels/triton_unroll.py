"""The unroll of stacked SparseRNNs on a GPU, in Triton kernels: an autograd function.

What `torch_unroll.py` computes, in a few launches in place of some for every step. For the layers
of runs that are stacked (`Layer.runs`), where `serves` says so.
"""

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sgrl.nn.kernels import torch_layer, triton_layer
from sgrl.nn.mixing import Moments
from sgrl.nn.neuron import PARAMETERS, Layer
from sgrl.nn.sgprop import NORMS, Mixing

#: A thread holds so many rows of a neuron in its registers, at most.
MAX_ROWS = 64


def serves(layer: Layer) -> bool:
    """Whether the kernels compute this layer."""
    weight = layer.weight_h
    fits = layer.runs is not None and weight.shape[1] <= MAX_ROWS
    return fits and weight.dtype == torch.float32 and weight.is_cuda and _is_installed()


@cache
def _is_installed() -> bool:
    return find_spec("triton") is not None


class Pass(torch_layer.Pass):
    """A forward pass, made step by step or at once."""

    def lay_out(self) -> None:
        self.columns = triton_layer.neurons_last(self.layer)

    def external(self, x: Float[Tensor, "S T B E"]) -> Float[Tensor, "S X R T B"]:
        """What the external inputs add to the rows of the input neurons, keys not scaled yet."""
        return triton_layer.external_rows(self.weight_x, x)

    def step(self, t: int, external: Float[Tensor, "S X R B"]) -> None:
        self.steps(t, external.unsqueeze(3))

    def steps(self, t: int, external: Float[Tensor, "S X R T B"]) -> None:
        """Make steps from t on; `external` of their inputs."""
        triton_layer.forward_steps(
            self.layer,
            self.columns,
            external,
            self.states[t : t + external.shape[3] + 1],
            self.attention[t : t + external.shape[3]],
            self.slots[t : t + external.shape[3]],
        )


def unroll(
    layer: Layer,
    mixing: Mixing,
    schedule: Callable[[int], Tensor],
    x: Float[Tensor, "S T B E"],
    h_0: Float[Tensor, "S B w N"],
    mask: Bool[Tensor, "S T B"] | None,
    passed: torch_layer.Pass | None = None,
) -> Float[Tensor, "S T B w N"]:
    """Unroll a layer of stacked runs over time; see `torch_unroll.unroll`.

    Raises:
        ValueError: the mixing rule's samples are episodes, of which the kernels make no sums.
    """
    if mixing.rule.samples != "steps":
        raise ValueError("the Triton kernels know no rule on episodes: use torch_unroll.unroll")
    parameters = layer.parameters()
    inputs = (x, h_0, *parameters.values())
    if passed is None:
        with torch.no_grad():
            made = Pass(layer, x.shape[1], h_0)
            made.steps(0, made.external(x))
            passed = made
    if torch.is_grad_enabled() and any(value.requires_grad for value in inputs):
        return _Unroll.apply(layer, mixing, schedule, mask, passed, *inputs)
    return passed.output()


class _Unroll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        layer: Layer,
        mixing: Mixing,
        schedule: Callable[[int], Tensor],
        mask: Tensor | None,
        passed: torch_layer.Pass,
        x: Tensor,
        h_0: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        ctx.layer, ctx.mixing, ctx.mask = layer, mixing, mask
        ctx.schedule = schedule(x.shape[1]) if mixing.settings.mixes else None
        ctx.save_for_backward(x, passed.states, passed.attention, passed.slots, *parameters)
        return passed.output().clone(memory_format=torch.contiguous_format)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        mixing, mask = ctx.mixing, ctx.mask
        x, states, attention, slots, *parameters = ctx.saved_tensors
        names = [name for name in PARAMETERS if getattr(ctx.layer, name) is not None]
        layer = ctx.layer._replace(**dict(zip(names, parameters, strict=True)))
        kept = (states, attention, slots)
        mixture = measured = None
        if mixing.settings.mixes:
            prediction = triton_layer.predict(layer, x, states, attention)
            mixture = triton_layer.Mixture(
                ctx.schedule,
                prediction,
                mixing.settings.positive_projection,
                mask if mixing.settings.mask_predictions else None,
            )
            measured = triton_layer.Measured(
                prediction,
                mask,
                mixing.settings.predictor_target == "received",
                mixing.rule.updates,
                mixing.rule.unit_gradients,
            )
        gradient = grad_output.permute(1, 0, 3, 4, 2).flatten(1, 2)  # [T, W, N, B]
        passed = triton_layer.backward(layer, gradient, *kept, mixture)
        sums = triton_layer.sums_over_samples(layer, x, *kept, passed, mixture, measured)
        if measured is not None:
            _finish(layer, mixing, x, mask, sums.parts)
        grad_x = grad_h0 = None
        if ctx.needs_input_grad[5]:
            scaled = torch_layer.scale_keys(layer.weight_x, layer.num_slots, layer.scale)
            scaled = scaled.view(layer.num_runs, -1, x.shape[3])
            rows = passed.grad_rows.flatten(3).flatten(1, 2)  # [S, X*R, T*B]
            grad_x = torch.bmm(rows.transpose(1, 2), scaled).view_as(x)
        if ctx.needs_input_grad[6]:
            grad_h0 = passed.grad_h0.unflatten(0, (layer.num_runs, -1)).permute(0, 3, 1, 2)
        grads = [sums.gradients[name] for name in names]
        return (None, None, None, None, None, grad_x, grad_h0, *grads)


def _finish(
    layer: Layer, mixing: Mixing, x: Tensor, mask: Tensor | None, parts: Float[Tensor, "W 8"]
) -> None:
    """Hand over the statistics and, if lambda is adaptive, update it."""
    width = layer.num_neurons // layer.num_runs
    valid = x.new_full((layer.num_runs,), x.shape[1] * x.shape[2])
    if mask is not None:
        valid = mask.sum((1, 2)).to(valid)
    terms = valid.clamp(min=1) * width
    statistics = _sum_of_neurons(parts[:, 4:].view(layer.num_runs, width, 4))
    mixing.statistics["predictor_loss"] = statistics[:, 0] / (terms * layer.neuron_size)
    for i, name in enumerate(NORMS):
        mixing.statistics[name] = statistics[:, 1 + i] / terms
    if mixing.rule.updates:
        sums = parts[:, :4].unbind(1)
        mixing.rule.update(layer, Moments.of_sums(sums, valid.repeat_interleave(width)))


def _sum_of_neurons(values: Float[Tensor, "S w K"]) -> Float[Tensor, "S K"]:
    """Sum over neurons in an order that does not depend on S, unlike torch's own."""
    while (width := values.shape[1]) > 1:
        half = (width + 1) // 2
        folded = values[:, :half].clone()
        folded[:, : width - half] += values[:, half:]
        values = folded
    return values[:, 0]
