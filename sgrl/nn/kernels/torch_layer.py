"""The recurrent layer in torch, batch innermost: a forward pass step by step, and its gradients.

Letters as in `torch_unroll.py`.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from sgrl.nn.neuron import Layer


class Pass:
    """A forward pass, made step by step, and all that its backward pass needs.

    Attributes:
        states: [T+1, W, N, B], the first being the initial state.
        outputs: [T, W, N, B], of the neurons: the states without their noise.
        attention: [T, W, M, B].
        slots: [T, W, M, N, B].
    """

    def __init__(
        self,
        layer: Layer,
        length: int,
        h_0: Float[Tensor, "S B w N"],
        noise: Float[Tensor, "T W N B"] | None = None,
    ) -> None:
        assert layer.weight_x is not None
        num_neurons, size, num_slots = layer.num_neurons, layer.neuron_size, layer.num_slots
        batch = h_0.shape[1]
        self.layer = layer
        self.parents = layer.sources.flatten()
        self.weight_x = layer.weight_x
        self.lay_out()
        self.states = h_0.new_empty(length + 1, num_neurons, size, batch)
        self.states[0] = h_0.permute(0, 2, 3, 1).flatten(0, 1)
        self.noise = noise
        self.outputs = self.states[1:] if noise is None else torch.empty_like(self.states[1:])
        self.attention = h_0.new_empty(length, num_neurons, num_slots, batch)
        self.slots = h_0.new_empty(length, num_neurons, num_slots, size, batch)

    def lay_out(self) -> None:
        """Bring parameters into the form in which every step reads them."""
        layer = self.layer
        self.weight_h = scale_keys(layer.weight_h, layer.num_slots, layer.scale)
        self.bias_rows = layer.bias.view(layer.num_neurons, -1, 1)

    def external(self, x: Float[Tensor, "S T B E"]) -> Float[Tensor, "S X R T B"]:
        """What the external inputs add to the rows of the input neurons."""
        runs, length, batch, size = x.shape
        if self.layer.runs is None:
            external = torch.matmul(self.weight_x.flatten(0, 1), x[0].transpose(1, 2))
            external = external.transpose(0, 1)
        else:
            columns = x.permute(0, 3, 1, 2).reshape(runs, size, -1)
            external = torch.bmm(self.weight_x.view(runs, -1, size), columns)
        external = external.reshape(runs, -1, self.weight_x.shape[1], length, batch)
        external[:, :, : self.layer.num_slots] *= self.layer.scale
        return external

    def step(self, t: int, external: Float[Tensor, "S X R B"]) -> None:
        """Make step t; `external` of its input."""
        layer, states, attention, slots = self.layer, self.states, self.attention, self.slots
        num_neurons, num_slots, batch = layer.num_neurons, layer.num_slots, states.shape[-1]
        read = states[t].view(num_neurons, -1).index_select(0, self.parents)
        scores = torch.bmm(self.weight_h, read.view(num_neurons, -1, batch))
        of_runs = scores.view(layer.num_runs, -1, *scores.shape[1:])
        of_runs[:, : layer.num_input_neurons] += external
        torch.softmax(scores[:, :num_slots], dim=1, out=attention[t])
        pre = slots[t].view(num_neurons, -1, batch)
        torch.add(scores[:, num_slots:], self.bias_rows, out=pre).tanh_()
        torch.sum(attention[t].unsqueeze(2) * slots[t], dim=1, out=self.outputs[t])
        if self.noise is not None:
            torch.add(self.outputs[t], self.noise[t], alpha=layer.noise_std, out=states[t + 1])

    def output(self) -> Float[Tensor, "S T B w N"]:
        """All states but the initial one."""
        return self.states[1:].unflatten(1, (self.layer.num_runs, -1)).permute(1, 0, 4, 2, 3)


@torch.no_grad()
def forward_pass(layer: Layer, x: Tensor, h_0: Tensor, noise: Tensor | None = None) -> Pass:
    """All steps over inputs x [S, T, B, E], from states h_0 [S, B, w, N]; noise [T, B, W, N]."""
    passed = Pass(layer, x.shape[1], h_0, None if noise is None else noise.permute(0, 2, 3, 1))
    external = passed.external(x)
    for t in range(x.shape[1]):
        passed.step(t, external[:, :, :, t])
    return passed


def scale_keys(weight: Tensor, num_slots: int, scale: float) -> Tensor:
    """Stacked weights [W, R, L] with the rows of the keys multiplied by the scale."""
    weight = weight.detach().clone()
    weight[:, :num_slots] *= scale
    return weight


def row_gradients(
    out: Tensor, feedback: Tensor, attention: Tensor, slots: Tensor, output: Tensor
) -> None:
    """Gradients of the scores and pre-activations, [..., W, M + M*N, B], into `out`.

    feedback and output [..., W, N, B], attention [..., W, M, B], slots [..., W, M, N, B].
    """
    num_slots = attention.shape[-2]
    value = (feedback.unsqueeze(-3) * slots).sum(-2)  # v_m = <g, y_m>
    value -= (feedback * output).sum(-2).unsqueeze(-2)  # sum_k a_k v_k = <g, output>
    torch.mul(attention, value, out=out[..., :num_slots, :])
    slope = torch.addcmul(slots.new_ones(()), slots, slots, value=-1)
    slope *= attention.unsqueeze(-2)
    slope *= feedback.unsqueeze(-3)
    out[..., num_slots:, :] = slope.flatten(-3, -2)


def parameter_gradients(
    layer: Layer, grad_rows: Tensor, read: Tensor, external: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of weight_h, weight_x, bias from those of the rows [W, R, K], summed over K."""
    num_slots = layer.num_slots
    grad_h = torch.bmm(grad_rows, read.transpose(1, 2))
    grad_x = external_gradient(layer, grad_rows, external)
    grad_h[:, :num_slots] *= layer.scale
    grad_x[:, :num_slots] *= layer.scale
    grad_bias = grad_rows[:, num_slots:].sum(-1).view_as(layer.bias)
    return grad_h, grad_x, grad_bias


def of_input_neurons(layer: Layer, rows: Tensor) -> Tensor:
    """Of rows [W, R, K] those of the neurons that read external inputs, by run [S, X*R, K]."""
    return rows.unflatten(0, (layer.num_runs, -1))[:, : layer.num_input_neurons].flatten(1, 2)


def external_gradient(layer: Layer, rows: Tensor, external: Tensor) -> Tensor:
    """Gradient of weights on external inputs [S, E, K], from that of all rows [W, R, K]."""
    grad = torch.bmm(of_input_neurons(layer, rows), external.transpose(1, 2))
    return grad.view(-1, rows.shape[1], external.shape[1])
