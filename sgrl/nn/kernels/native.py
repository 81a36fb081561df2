"""The "native" backend of SparseRNN and SparseMLP: compiled code for the CPU.

The C++ is in `slot_neurons.cpp`, `compiler.py` builds it, this file hands it torch's memory. It
runs in one thread and holds no lock of Python's meanwhile.
"""

import ctypes
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sgrl.nn.kernels.compiler import load_library
from sgrl.nn.mixing import MixingRule, Moments
from sgrl.nn.neuron import SlotNeurons

if TYPE_CHECKING:
    from sgrl.nn.feedforward import SparseMLP
    from sgrl.nn.recurrent import SparseRNN

_REALS = {torch.float32: "float", torch.float64: "double"}
_Pointer = ctypes.c_void_p

#: What a backward pass measures, in the order of `Gradients.statistics` in slot_neurons.cpp.
STATISTICS = ("predictor_loss", "received_grad_norm", "mixed_grad_norm", "prediction_norm")
#: Samples that a stack runs at once where no gradient is needed: small enough for the cache.
PIECE = 256


class _Layer(ctypes.Structure):
    """`Layer` of slot_neurons.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("neurons", "size", "parents", "slots")),
        *((name, ctypes.c_int64) for name in ("external", "inputs")),
        ("scale", ctypes.c_double),
        *((name, _Pointer) for name in ("parent", "weight_h", "weight_x", "bias")),
        *((name, _Pointer) for name in ("predictor_h", "predictor_x", "predictor_bias")),
    ]


class _Policy(ctypes.Structure):
    """`Policy` of slot_neurons.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("observation", "features", "actions", "slots")),
        *((name, _Pointer) for name in ("weight_1", "bias_1", "weight_2", "bias_2")),
        *((name, _Pointer) for name in ("actor", "actor_bias")),
    ]


class _Mixing(ctypes.Structure):
    """`Mixing` of slot_neurons.cpp."""

    _fields_ = [
        ("mixing_weight", _Pointer),
        ("schedule_beta", ctypes.c_double),
        *((name, ctypes.c_int32) for name in ("positive_projection", "target_received")),
        *((name, ctypes.c_int32) for name in ("mask_predictions", "moments", "for_predictor")),
        ("unit_gradients", ctypes.c_int32),
    ]


class _Gradients(ctypes.Structure):
    """`Gradients` of slot_neurons.cpp."""

    _fields_ = [
        *((name, _Pointer) for name in ("weight_h", "weight_x", "bias")),
        *((name, _Pointer) for name in ("predictor_h", "predictor_x", "predictor_bias")),
        ("statistics", ctypes.c_double * 4),
        ("moments", _Pointer),
    ]


class _Stack(ctypes.Structure):
    """`Stack` of slot_neurons.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("count", "inputs")),
        ("residual", ctypes.c_int32),
        ("layers", ctypes.POINTER(_Layer)),
    ]


def load(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The compiled core for tensors of this type, or None."""
    if dtype not in _REALS:
        return None
    core = load_library(_REALS[dtype])
    if core is not None and core.sgrl_workspace.argtypes is None:
        size, flag = ctypes.c_int64, ctypes.c_int32
        core.sgrl_workspace.argtypes = [_Pointer, size, size, flag]
        core.sgrl_workspace.restype = size
        core.sgrl_forward.argtypes = [_Pointer, size, size, flag, size, size, *[_Pointer] * 4]
        core.sgrl_forward.restype = None
        core.sgrl_policy_workspace.argtypes = [_Pointer, _Pointer, size]
        core.sgrl_policy_workspace.restype = size
        core.sgrl_act.argtypes = [_Pointer, _Pointer, size, size, flag, size, *[_Pointer] * 6]
        core.sgrl_act.restype = None
        core.sgrl_backward.argtypes = [_Pointer, size, size, *[_Pointer] * 8]
        core.sgrl_backward.restype = None
        core.sgrl_stack_workspace.argtypes = [_Pointer, size, flag]
        core.sgrl_stack_workspace.restype = size
        core.sgrl_stack_forward.argtypes = [_Pointer, size, size, flag, *[_Pointer] * 3]
        core.sgrl_stack_forward.restype = None
        core.sgrl_stack_backward.argtypes = [_Pointer, size, *[_Pointer] * 5]
        core.sgrl_stack_backward.restype = None
    return core


def can_run(x: Tensor, weight: Tensor) -> bool:
    """Whether the compiled core takes these: on the CPU, of one type, and it compiles here."""
    on_cpu = x.device.type == "cpu" and weight.device.type == "cpu"
    return on_cpu and x.dtype == weight.dtype and load(x.dtype) is not None


def unroll(
    rnn: "SparseRNN",
    x: Tensor,
    h_0: Tensor,
    mask: Tensor | None,
    recorder: "Recorder | None" = None,
) -> Tensor:
    """The unroll of SparseRNN: x [T, B, E], h_0 [B, W, N], mask [T, B] -> [T, B, W, N].

    With a recorder its steps are not run again, only those it has not taken.
    """
    parameters = _parameters(rnn)
    inputs = (x, h_0, *parameters)
    if not (torch.is_grad_enabled() and any(v.requires_grad for v in inputs)):
        return _forward(rnn, x.contiguous(), h_0.contiguous(), parameters, keep=False)[0]
    return _Unroll.apply(rnn, mask, recorder, *inputs)


def _parameters(rnn: "SparseRNN") -> list[Tensor]:
    neurons = rnn.neurons
    parameters: list[Tensor] = [neurons.weight_h, neurons.weight_x, neurons.bias]
    if rnn.propagation == "sgprop":
        parameters += [neurons.predictor_h, neurons.predictor_x, neurons.predictor_bias]
    return parameters


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _layer(rnn: "SparseRNN", parameters: list[Tensor]) -> _Layer:
    """The layer; its tensors must be contiguous and live as long as it is used."""
    neurons = rnn.neurons
    return _Layer(
        neurons.num_neurons,
        neurons.neuron_size,
        rnn.parents.shape[1],
        neurons.num_slots,
        neurons.external_size,
        neurons.num_input_neurons,
        neurons.scale,
        rnn.parents.data_ptr(),
        *map(_pointer, parameters),
    )


#: The block of memory that the last finished backward pass used, for the next forward pass: getting
#: tens of megabytes afresh from the system takes as long as a forward pass itself.
_spare: list[Tensor] = []


class _Record:
    """Memory that holds what a forward pass leaves for its backward; not initialised."""

    def __init__(self, size: int, dtype: torch.dtype) -> None:
        try:
            self.memory = _spare.pop()
        except IndexError:
            self.memory = torch.empty(0)
        if self.memory.dtype != dtype or self.memory.numel() != size:
            self.memory = torch.empty(size, dtype=dtype)

    def __del__(self, spare: list[Tensor] = _spare) -> None:  # the name is gone at exit
        spare[:] = [self.memory]


def _forward(
    rnn: "SparseRNN", x: Tensor, h_0: Tensor, parameters: list[Tensor], keep: bool
) -> tuple[Tensor, _Record | None]:
    """-> output [T, B, W, N], and if to be kept what a backward pass needs."""
    core = load(x.dtype)
    assert core is not None
    length, batch, _ = x.shape
    parameters = [parameter.detach().contiguous() for parameter in parameters]
    layer = _layer(rnn, parameters)
    size = core.sgrl_workspace(ctypes.byref(layer), length, batch, keep)
    record = _Record(size, x.dtype) if keep else None
    memory = x.new_empty(size) if record is None else record.memory
    output = x.new_empty(length, batch, rnn.num_neurons, rnn.neuron_size)
    core.sgrl_forward(
        ctypes.byref(layer),
        *(length, batch, keep, 0, length),
        *map(_pointer, (x, h_0, output, memory)),
    )
    return output, record


class Recorder:
    """A SparseNet policy's steps through episodes of T steps, from the zero state on.

    With `keep` it leaves what the core's backward pass needs, and `SparseRNN` can go on from it
    instead of running the steps again. The parameters must stay as they are meanwhile.

    Args:
        rnn: the core, on the CPU.
        encoder: the two linear layers.
        actor: stacked keys and matrices, and the bias (see `SlotActor`).
        length: T, the most steps it may take.
        batch_size: B.
        keep: False needs little memory and is only for acting.
    """

    def __init__(
        self,
        rnn: "SparseRNN",
        encoder: tuple[nn.Linear, nn.Linear],
        actor: tuple[Tensor, Tensor],
        length: int,
        batch_size: int,
        keep: bool,
    ) -> None:
        weight = rnn.neurons.weight_h
        core = load(weight.dtype)
        assert core is not None
        self.length, self.keep, self.steps = length, keep, 0
        self._core = core
        # Held here, since the structures know only their addresses.
        layer = [p.detach().contiguous() for p in _parameters(rnn)]
        around = [p.detach().contiguous() for e in encoder for p in (e.weight, e.bias)]
        around += [p.detach().contiguous() for p in actor]
        self._held = (rnn.parents, layer, around)
        first, bias = encoder[0], actor[1]
        self._layer = ctypes.pointer(_layer(rnn, layer))
        self._policy = ctypes.pointer(
            _Policy(first.in_features, first.out_features, *bias.shape, *map(_pointer, around))
        )
        self._sizes = (length, batch_size, keep)
        size = core.sgrl_workspace(self._layer, length, batch_size, keep)
        self.record = _Record(size, weight.dtype) if keep else None
        self._memory = weight.new_empty(size) if self.record is None else self.record.memory
        self._policy_memory = weight.new_empty(
            core.sgrl_policy_workspace(self._policy, self._layer, batch_size)
        )
        # Steps that are not kept are all written to the same place.
        rows = length if keep else 1
        self.observations = weight.new_empty(rows, batch_size, first.in_features)
        self.x = weight.new_empty(rows, batch_size, rnn.input_size)
        self.output = weight.new_empty(rows, batch_size, rnn.num_neurons, rnn.neuron_size)
        self._logits = weight.new_empty(batch_size, len(bias))
        self._rows = [
            tuple(int(buffer.data_ptr() + t * buffer[0].nbytes) for t in range(rows))
            for buffer in (self.observations, self.x, self.output)
        ]

    def act(self, observations: Tensor) -> Tensor:
        """The next step: observations [B, F] -> logits [B, A], overwritten by the next."""
        row = self.steps if self.keep else 0
        self.observations[row].copy_(observations)
        self._core.sgrl_act(
            self._policy,
            self._layer,
            *self._sizes,
            self.steps,
            *(pointers[row] for pointers in self._rows),
            self._logits.data_ptr(),
            self._memory.data_ptr(),
            self._policy_memory.data_ptr(),
        )
        self.steps += 1
        return self._logits

    def finish(self, x: Tensor) -> None:
        """The core's steps not yet taken, of x [T, B, E]."""
        if self.steps < self.length:
            self.x[self.steps :].copy_(x[self.steps :])
            pointers = [pointers[self.steps] for pointers in self._rows[1:]]
            self._core.sgrl_forward(
                *(self._layer, *self._sizes, self.steps, self.length),
                *(pointers[0], None, pointers[1], self._memory.data_ptr()),
            )
            self.steps = self.length


class _Unroll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rnn: "SparseRNN",
        mask: Tensor | None,
        recorder: Recorder | None,
        x: Tensor,
        h_0: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        if recorder is None:
            x = x.contiguous()
            output, ctx.record = _forward(rnn, x, h_0.contiguous(), list(parameters), keep=True)
        else:
            recorder.finish(x)
            x, ctx.record = recorder.x, recorder.record
            output = recorder.output.view_as(recorder.output)
        ctx.rnn, ctx.mask = rnn, mask
        # As it is now: a backward pass in between may move it.
        ctx.mixing_weight = rnn.neurons.mixing_weight.clone()
        ctx.save_for_backward(x, *parameters)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        rnn, rule = ctx.rnn, ctx.rnn.rule
        x, *parameters = ctx.saved_tensors
        core = load(x.dtype)
        assert core is not None
        length, batch, _ = x.shape
        sgprop = rnn.propagation == "sgprop"
        mask = None if ctx.mask is None else ctx.mask.contiguous()
        parameters = [parameter.detach().contiguous() for parameter in parameters]
        grad_output = grad_output.contiguous()
        grad_x = torch.empty_like(x) if ctx.needs_input_grad[3] else None
        grad_h0 = None
        if ctx.needs_input_grad[4]:
            grad_h0 = x.new_empty(batch, rnn.num_neurons, rnn.neuron_size)
        grads = [torch.empty_like(parameter) for parameter in parameters]
        pointers = [grad.data_ptr() for grad in grads] + [None] * (6 - len(grads))
        moments = torch.zeros(4, rnn.num_neurons, dtype=torch.float64)
        results = _Gradients(*pointers, moments=moments.data_ptr())
        mixing = None
        if sgprop:
            mixing = ctypes.byref(
                _Mixing(
                    ctx.mixing_weight.data_ptr(),
                    rnn.schedule_beta,
                    rule.positive_projection,
                    rule.predictor_target == "received",
                    rnn.mask_predictions,
                    rule.updates,
                    True,
                    rule.unit_gradients,
                )
            )
        core.sgrl_backward(
            ctypes.byref(_layer(rnn, parameters)),
            *(length, batch, x.data_ptr(), _pointer(mask), mixing, grad_output.data_ptr()),
            *(_pointer(grad_x), _pointer(grad_h0), ctypes.byref(results)),
            ctx.record.memory.data_ptr(),
        )
        if sgprop:
            measured = x.new_tensor(list(results.statistics))
            rnn.statistics = dict(zip(STATISTICS, measured.unbind(), strict=True))
            if rule.updates:
                num_valid = length * batch if mask is None else int(mask.sum())
                _update_mixing_weight(rule, rnn.neurons, moments, num_valid)
        return (None, None, None, grad_x, grad_h0, *grads)


def _update_mixing_weight(
    rule: MixingRule, neurons: SlotNeurons, sums: Tensor, num_valid: int
) -> None:
    """Move a layer's lambda; sums as `moments` in `Gradients` of slot_neurons.cpp."""
    count = max(num_valid, 1)
    moments = Moments(
        mean_u_square=sums[0] / count,
        mean_wu=sums[1] / count,
        square_mean_u=sums[2] / count**2,
        mean_w_mean_u=sums[3] / count**2,
        num_samples=num_valid,
    )
    rule.update(neurons, moments)


# ------------------------------------------------------------------------------ feed-forward


class StackForward:
    """A forward pass of SparseMLP on x [B, input_size], to be gone on from by `stack`."""

    def __init__(self, mlp: "SparseMLP", x: Tensor) -> None:
        parameters = [p for neurons in mlp.layers for p in (neurons.weight_h, neurons.bias)]
        # Tensors of inference mode could not enter the update.
        with torch.inference_mode(False), torch.no_grad():
            self.x = x.clone()
            self.output, self.record = _stack_forward(mlp, self.x, parameters, keep=True)


def stack(mlp: "SparseMLP", x: Tensor, done: StackForward | None = None) -> Tensor:
    """The layers of SparseMLP: x [B, input_size] -> [B, W, N]. What is done is not done again."""
    parameters = [p for neurons in mlp.layers for p in (neurons.weight_h, neurons.bias)]
    predictors = [
        p
        for neurons in mlp.layers
        if neurons.has_predictor
        for p in (neurons.predictor_h, neurons.predictor_bias)
    ]
    inputs = (x, *parameters, *predictors)
    if torch.is_grad_enabled() and any(value.requires_grad for value in inputs):
        return _StackFunction.apply(mlp, done, *inputs)
    return _stack_forward(mlp, x.contiguous(), parameters, keep=False)[0]


class _StackLayers:
    """A `Stack` and the tensors that it holds the addresses of."""

    def __init__(self, mlp: "SparseMLP", parameters: list[Tensor]) -> None:
        self._parameters = [parameter.detach().contiguous() for parameter in parameters]
        self._predictors = [
            (neurons.predictor_h.detach().contiguous(), neurons.predictor_bias.detach())
            if neurons.has_predictor
            else (None, None)
            for neurons in mlp.layers
        ]
        self._parents = [mlp.pixels, *mlp.parents.unbind()]
        layers = (_Layer * len(mlp.layers))()
        for index, neurons in enumerate(mlp.layers):
            weight, bias = self._parameters[2 * index : 2 * index + 2]
            predictor, predictor_bias = self._predictors[index]
            layers[index] = _Layer(
                *(neurons.num_neurons, neurons.neuron_size, mlp.parents.shape[2]),
                *(neurons.num_slots, 0, 0, neurons.scale, self._parents[index].data_ptr()),
                *map(_pointer, (weight, None, bias, predictor, None, predictor_bias)),
            )
        self.pointer = ctypes.pointer(_Stack(len(mlp.layers), mlp.input_size, mlp.residual, layers))


def _stack_forward(
    mlp: "SparseMLP", x: Tensor, parameters: list[Tensor], keep: bool
) -> tuple[Tensor, _Record | None]:
    """-> output [B, W, N], and if to be kept what a backward pass needs."""
    core = load(x.dtype)
    assert core is not None
    layers, piece = _StackLayers(mlp, parameters), len(x)
    if not keep:
        piece = min(piece, PIECE)
    size = core.sgrl_stack_workspace(layers.pointer, piece, keep)
    record = _Record(size, x.dtype) if keep else None
    memory = x.new_empty(size) if record is None else record.memory
    output = x.new_empty(len(x), mlp.num_neurons, mlp.neuron_size)
    pointers = map(_pointer, (x, output, memory))
    core.sgrl_stack_forward(layers.pointer, len(x), piece, keep, *pointers)
    return output, record


class _StackFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, mlp: "SparseMLP", done: StackForward | None, x: Tensor, *parameters: Tensor
    ) -> Tensor:
        weights = list(parameters[: 2 * len(mlp.layers)])
        if done is None:
            output, ctx.record = _stack_forward(mlp, x.contiguous(), weights, keep=True)
        else:
            output, ctx.record = done.output.view_as(done.output), done.record
        ctx.mlp, ctx.num_parameters = mlp, len(parameters)
        # The predictors are not saved: the policy step mixes in what they predict after their own
        # step, which changes them in place.
        ctx.save_for_backward(*weights)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        mlp: SparseMLP = ctx.mlp
        core, depth, rule = load(grad_output.dtype), len(mlp.layers), mlp.rule
        assert core is not None
        weights = list(ctx.saved_tensors)
        layers = _StackLayers(mlp, weights)
        sgprop = mlp.propagation == "sgprop"
        grad_output = grad_output.contiguous()
        grad_x = None
        if ctx.needs_input_grad[2]:
            grad_x = grad_output.new_empty(len(grad_output), mlp.input_size)
        grads: list[Tensor | None] = [None] * ctx.num_parameters
        if rule.phase != "predictor":
            grads[: 2 * depth] = map(torch.empty_like, weights)
        if sgprop and rule.phase != "policy":
            grads[2 * depth :] = [
                torch.empty_like(p)
                for neurons in mlp.layers
                for p in (neurons.predictor_h, neurons.predictor_bias)
            ]
        moments = torch.zeros(depth, 4, mlp.num_neurons, dtype=torch.float64)
        results, mixing = (_Gradients * depth)(), (_Mixing * depth)()
        for index, neurons in enumerate(mlp.layers):
            weight, bias = map(_pointer, grads[2 * index : 2 * index + 2])
            predictor: list[int | None] = [None, None]
            if sgprop:
                place = 2 * (depth + index)
                predictor = list(map(_pointer, grads[place : place + 2]))
                mixing[index] = _Mixing(
                    *(neurons.mixing_weight.data_ptr(), 0.0, False),
                    *(rule.predictor_target == "received", False, rule.updates),
                    rule.phase != "policy",
                    rule.unit_gradients,
                )
            results[index] = _Gradients(
                *(weight, None, bias, predictor[0], None, predictor[1]),
                moments=moments[index].data_ptr(),
            )
        core.sgrl_stack_backward(
            *(layers.pointer, len(grad_output), mixing if sgprop else None),
            *(grad_output.data_ptr(), _pointer(grad_x), results, ctx.record.memory.data_ptr()),
        )
        if sgprop:
            _write_statistics(mlp, grad_output.new_tensor([list(r.statistics) for r in results]))
            if rule.updates:
                for neurons, sums in zip(mlp.layers, moments, strict=True):
                    _update_mixing_weight(rule, neurons, sums, len(grad_output))
        return (None, None, grad_x, *grads)


def _write_statistics(mlp: "SparseMLP", measured: Tensor) -> None:
    """Of every layer [L, 4]: the predictors' loss is summed, the rest are means."""
    sums = measured.sum(0)
    sums[1:] /= len(measured)
    statistics = dict(zip(STATISTICS, sums.unbind(), strict=True))
    if mlp.rule.phase == "policy":
        del statistics["predictor_loss"]
    mlp.statistics = {**mlp.statistics, **statistics}
