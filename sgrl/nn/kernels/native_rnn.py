"""The "native" backend of GRU and LSTM, and whole policy steps that an update can go on from.

What `torch.nn.GRU` and `torch.nn.LSTM` of one layer compute is the definition.
"""

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sgrl.nn.kernels.native import Record, StepRecorder, load, make_structure, pointer, unavailable
from sgrl.nn.kernels.plain import is_autocast_on, is_plain

#: Of what is around the cells, as C++ numbers it.
_AROUND = [f"{kind}_{i}" for i in range(1, 6) for kind in ("weight", "bias")]
PARAMETERS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
#: What a layer must be set to.
_SETTINGS = {
    "num_layers": 1,
    "bias": True,
    "batch_first": False,
    "bidirectional": False,
    "proj_size": 0,
}


class Cells(NamedTuple):
    """A layer of GRU or LSTM cells, as the compiled core takes it.

    Attributes:
        is_lstm: whether they are LSTM cells.
        weight_ih: [3 * H or 4 * H, E], in torch's order.
        weight_hh: [.., H].
        bias_ih, bias_hh: [..].
    """

    is_lstm: bool
    weight_ih: Float[Tensor, "rows E"]
    weight_hh: Float[Tensor, "rows H"]
    bias_ih: Float[Tensor, " rows"]
    bias_hh: Float[Tensor, " rows"]

    @classmethod
    def of(cls, core: nn.GRU | nn.LSTM) -> "Cells":
        """Those of torch's layer, for which there is no `obstacle`."""
        parameters = (getattr(core, f"{name}_l0") for name in PARAMETERS)
        return cls(isinstance(core, nn.LSTM), *parameters)

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """All there are, in the order of `PARAMETERS`."""
        return self[1:]

    def structure(self) -> Any:
        """As C++ has it; the tensors must be contiguous and live as long as it is used."""
        return make_structure(
            "Cells",
            units=self.weight_hh.shape[1],
            inputs=self.weight_ih.shape[1],
            lstm=self.is_lstm,
            **dict(zip(PARAMETERS, map(pointer, self.parameters), strict=True)),
        )

    def plain(self) -> "Cells":
        """The same with contiguous tensors that need no gradient."""
        return Cells(self.is_lstm, *(p.detach().contiguous() for p in self.parameters))


def obstacle(core: nn.GRU | nn.LSTM, kind: type[nn.GRU] | type[nn.LSTM], x: Tensor) -> str | None:
    """Why the compiled core cannot run a layer on x, in words; None where it can.

    Args:
        core: torch's layer.
        kind: what it should be.
        x: the input.
    """
    name = kind.__name__
    if not is_plain(core, kind):
        return f"the core is no plain {name} (another class, or changed, or with hooks)"
    if any(getattr(core, key) != value for key, value in _SETTINGS.items()):
        return f"the core is no {name} of one layer with biases, as the policy makes it"
    parameters = dict(core.named_parameters())
    if set(parameters) != {f"{p}_l0" for p in PARAMETERS}:
        return f"the core has other parameters than a {name}"
    rows, units = (4 if kind is nn.LSTM else 3) * core.hidden_size, core.hidden_size
    shapes = ((rows, core.input_size), (rows, units), (rows,), (rows,))
    if tuple(getattr(core, f"{p}_l0").shape for p in PARAMETERS) != shapes:
        return "the parameters have other shapes than the layer's sizes say"
    for tensor in (x, *parameters.values()):
        if not tensor.is_cpu:
            return f"it runs on the CPU, not on {tensor.device.type}"
        if tensor.dtype != x.dtype:
            return f"the input is {x.dtype}, the parameters are {tensor.dtype}"
    if is_autocast_on(x.device):
        return "torch.autocast is on, in which GRU and LSTM compute in lower precision"
    return unavailable(x.dtype)


def unroll(
    cells: Cells,
    x: Float[Tensor, "T B E"],
    state: Sequence[Float[Tensor, "B H"]],
) -> tuple[Float[Tensor, "T B H"], tuple[Float[Tensor, "B H"], ...]]:
    """Run a layer over time.

    Args:
        cells: the layer.
        x: [T, B, E].
        state: before the first step, each [B, H]: hidden state, and of an LSTM cell state.

    Returns:
        Hidden states [T, B, H], and the state after the last step.

    Raises:
        ValueError: x or the state has another shape, or x no step or no sequence.
    """
    units, inputs = cells.weight_hh.shape[1], cells.weight_ih.shape[1]
    if x.dim() != 3 or x.shape[2] != inputs or 0 in x.shape:
        raise ValueError(f"x must be [T, B, {inputs}] and not empty, got {list(x.shape)}")
    for part in state:
        if part.shape != (x.shape[1], units) or part.dtype != x.dtype:
            expected = f"{x.dtype} {[x.shape[1], units]}"
            raise ValueError(f"the state must be {expected}, got {part.dtype} {list(part.shape)}")
    given = (x, state[0], state[1] if cells.is_lstm else None, *cells.parameters)
    if torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in given):
        output, last = _Cells.apply(cells.is_lstm, *given)
    else:
        start = [part.contiguous() for part in state]
        output, last, _ = _forward(cells.plain(), x.contiguous(), start, keep=False)
    return output, (output[-1], last) if cells.is_lstm else (output[-1],)


def _forward(
    cells: Cells, x: Tensor, state: Sequence[Tensor], keep: bool
) -> tuple[Tensor, Tensor | None, Record | None]:
    """-> output [T, B, H], last cell, and if to be kept what a backward pass needs."""
    library, structure = load(x.dtype), ctypes.byref(cells.structure())
    length, batch, _ = x.shape
    size = library.sgrl_cells_workspace(structure, length, batch, keep)
    record = Record(size, x.dtype) if keep else None
    memory = x.new_empty(size) if record is None else record.memory
    output = x.new_empty(length, *state[0].shape)
    last = torch.empty_like(state[1]) if cells.is_lstm else None
    start = (state[0], state[1] if cells.is_lstm else None)
    library.sgrl_cells_forward(
        *(structure, length, batch, keep, 0, length),
        *map(pointer, (x, *start, output, last, memory)),
    )
    return output, last, record


class DenseRecorder(StepRecorder):
    """A GRU or LSTM policy's steps, and their backward pass.

    Args:
        cells: the core's, on the CPU.
        around: weight and bias of the encoder's two linear layers, then of the actor's three.
        length: T, the most steps it may take.
        batch_size: B.
        keep: False needs little memory and is only for acting.
    """

    def __init__(
        self, cells: Cells, around: Sequence[Tensor], length: int, batch_size: int, keep: bool
    ) -> None:
        self.cells = cells = cells.plain()
        self.around = around = [parameter.detach().contiguous() for parameter in around]
        sizes = {
            "observation": around[0].shape[1],
            "features": around[0].shape[0],
            "hidden": around[4].shape[0],
            "actions": around[8].shape[0],
        }
        tensors = dict(zip(_AROUND, map(pointer, around), strict=True))
        policy, structure = make_structure("DensePolicy", **sizes, **tensors), cells.structure()
        library, shape = load(cells.weight_hh.dtype), ctypes.byref(structure)
        memory = (
            library.sgrl_cells_workspace(shape, length, batch_size, keep),
            library.sgrl_dense_workspace(ctypes.byref(policy), shape, length, batch_size, keep),
        )
        shapes = ((sizes["observation"],), (cells.weight_hh.shape[1],), (sizes["actions"],))
        held = (*cells.parameters, *around)
        super().__init__(
            *("sgrl_dense_act", policy, structure, memory, held, length, batch_size, keep, shapes)
        )

    def replay(
        self,
        observations: Float[Tensor, "T B F"],
        parameters: Sequence[Tensor],
    ) -> tuple[Float[Tensor, "T B A"], Float[Tensor, "T B H"], tuple[Float[Tensor, "B H"], ...]]:
        """What the policy computes over time, without the steps already taken.

        Args:
            observations: of all T steps; the caller guarantees that those already seen and the
                parameters are unchanged.
            parameters: of the cells and around them, in the order of the arguments.

        Returns:
            Logits [T, B, A], hidden states [T, B, H], and the state after the last step.
        """
        logits, states, last = _Policy.apply(self, observations, *parameters)
        return logits, states, (states[-1], last) if self.cells.is_lstm else (states[-1],)


class _Policy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, recorder: DenseRecorder, observations: Tensor, *parameters: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        for now in observations[recorder.steps :]:
            recorder.act(now)
        _, states, logits = recorder.buffers
        last = None
        if recorder.cells.is_lstm:
            last = torch.empty_like(states[0])
            after = recorder.length
            recorder.library.sgrl_cells_forward(  # takes no step
                *(recorder.core, *recorder.sizes, after, after, None, None, None, None),
                *(last.data_ptr(), recorder.memory.data_ptr()),
            )
        ctx.recorder = recorder
        ctx.set_materialize_grads(False)
        return logits.view_as(logits), states.view_as(states), last

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any,
        grad_logits: Tensor | None,
        grad_states: Tensor | None,
        grad_last: Tensor | None,
    ) -> Any:
        recorder = ctx.recorder
        observations, _, logits = recorder.buffers
        if grad_logits is None:
            grad_logits = torch.zeros_like(logits)
        given = [
            None if g is None else g.contiguous() for g in (grad_logits, grad_states, grad_last)
        ]
        of_cells, around = (
            [torch.empty_like(parameter) for parameter in parameters]
            for parameters in (recorder.cells.parameters, recorder.around)
        )
        recorder.library.sgrl_dense_backward(
            *(recorder.policy, recorder.core, *recorder.sizes[:2]),
            *map(pointer, (observations, *given)),
            *(
                _pointers("DenseGradients", _AROUND, around),
                _pointers("CellGradients", PARAMETERS, of_cells),
            ),
            *(recorder.memory.data_ptr(), recorder.policy_memory.data_ptr()),
        )
        return (None, None, *of_cells, *around)


def _pointers(kind: str, names: Sequence[str], tensors: Sequence[Tensor]) -> Any:
    """A structure of nothing but addresses, by reference."""
    return ctypes.byref(
        make_structure(kind, **dict(zip(names, map(pointer, tensors), strict=True)))
    )


class _Cells(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        is_lstm: bool,
        x: Tensor,
        h_0: Tensor,
        c_0: Tensor | None,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        x = x.contiguous()
        state = [part.contiguous() for part in (h_0, c_0) if part is not None]
        cells = Cells(is_lstm, *parameters).plain()
        output, last, ctx.record = _forward(cells, x, state, keep=True)
        ctx.is_lstm = is_lstm
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, *parameters)
        return output, last

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor | None, grad_last: Tensor | None) -> Any:
        x, *parameters = ctx.saved_tensors
        cells = Cells(ctx.is_lstm, *parameters).plain()
        library, (length, batch, _) = load(x.dtype), x.shape
        units = cells.weight_hh.shape[1]
        if grad_output is None:
            grad_output = x.new_zeros(length, batch, units)
        grad_output = grad_output.contiguous()
        grad_last = None if grad_last is None else grad_last.contiguous()
        grad_x = torch.empty_like(x) if ctx.needs_input_grad[1] else None
        grad_h, grad_c = (
            x.new_empty(batch, units) if needed else None for needed in ctx.needs_input_grad[2:4]
        )
        grads = [torch.empty_like(parameter) for parameter in cells.parameters]
        library.sgrl_cells_backward(
            *(ctypes.byref(cells.structure()), length, batch),
            *map(pointer, (x, grad_output, grad_last, grad_x, grad_h, grad_c)),
            *(_pointers("CellGradients", PARAMETERS, grads), ctx.record.memory.data_ptr()),
        )
        return (None, grad_x, grad_h, grad_c, *grads)
