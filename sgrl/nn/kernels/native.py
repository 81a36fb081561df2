"""The "native" backend of SparseRNN and SparseMLP: compiled code for the CPU.

The C++ is in `slot_neurons.cpp`, `compiler.py` builds it, this file hands it torch's memory. It
runs in one thread and holds no lock of Python's meanwhile. Structures and functions are declared in
the C++ alone; `read_declarations` makes what ctypes needs of it.
"""

import ctypes
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sgrl.nn.kernels.compiler import SOURCE, CompileError, load_library
from sgrl.nn.mixing import MixingRule, Moments
from sgrl.nn.neuron import SlotNeurons

if TYPE_CHECKING:
    from sgrl.nn.feedforward import SparseMLP
    from sgrl.nn.recurrent import SparseRNN

_REALS = {torch.float32: "float", torch.float64: "double"}

#: What a backward pass measures, in the order of `Gradients.statistics` in slot_neurons.cpp.
STATISTICS = ("predictor_loss", "received_grad_norm", "mixed_grad_norm", "prediction_norm")
#: Samples that a stack runs at once where no gradient is needed: small enough for the cache.
PIECE = 256

#: Types that declarations in slot_neurons.cpp may use, beside pointers.
_TYPES: dict[str, Any] = {
    "Index": ctypes.c_int64,
    "std::int32_t": ctypes.c_int32,
    "double": ctypes.c_double,
    "void": None,
}


def _declaration(text: str) -> list[tuple[str, Any]]:
    """A declaration of C++ without its semicolon, as in `const real *a, *b` -> names and types."""
    match = re.fullmatch(r"\s*(?:const\s+)?([\w:]+)\b([\s\w*,\[\]]+)", text)
    if match is None:
        raise ValueError(f"slot_neurons.cpp: cannot read the declaration {text.strip()!r}")
    declared = []
    for part in match[2].split(","):
        name = re.fullmatch(r"\s*(\*?)\s*(\w+)(?:\[(\d+)\])?", part)
        if name is None or not (name[1] or match[1] in _TYPES):
            raise ValueError(f"slot_neurons.cpp: cannot read the declaration {text.strip()!r}")
        kind = ctypes.c_void_p if name[1] else _TYPES[match[1]]
        declared.append((name[2], kind * int(name[3]) if name[3] else kind))
    return declared


def read_declarations(
    source: str,
) -> tuple[dict[str, type[ctypes.Structure]], dict[str, list[tuple[str, Any]]]]:
    """The structures and functions that C++ source declares in extern "C" blocks, by name.

    So they are declared once. A function is its result and its arguments, as (name, type).

    Raises:
        ValueError: a declaration of types that are not known here.
    """
    source = re.sub(r"//.*", lambda c: c[0] if c[0].endswith('extern "C"') else "", source)
    blocks = "".join(re.findall(r'^extern "C" \{$(.*?)^\}  // extern "C"$', source, re.M | re.S))
    structures = {}
    for name, body in re.findall(r"^struct (\w+) \{(.*?)^\};", blocks, re.M | re.S):
        fields = [field for text in body.split(";")[:-1] for field in _declaration(text)]
        structures[name] = type(name, (ctypes.Structure,), {"_fields_": fields})
    functions = {}
    for head, arguments in re.findall(r"^(\w+ sgrl_\w+)\((.*?)\) \{", blocks, re.M | re.S):
        [result] = _declaration(head)
        functions[result[0]] = [result, *(_declaration(a)[0] for a in arguments.split(","))]
    return structures, functions


_STRUCTURES, _FUNCTIONS = read_declarations(SOURCE.read_text())


def make_structure(name: str, **values: Any) -> Any:
    """A structure of slot_neurons.cpp with all its fields.

    Raises:
        TypeError: the structure has other fields than these.
    """
    structure = _STRUCTURES[name]
    fields = [field[0] for field in structure._fields_]
    if set(fields) != values.keys():
        different = ", ".join(sorted(set(fields) ^ values.keys()))
        raise TypeError(f"{name} of slot_neurons.cpp and native.py differ in: {different}")
    return structure(**values)


def load(dtype: torch.dtype) -> ctypes.CDLL:
    """The compiled core for tensors of this type, where `unavailable` says that there is one."""
    core = load_library(_REALS[dtype])
    assert isinstance(core, ctypes.CDLL)
    if "declared" not in vars(core):
        for name, (result, *arguments) in _FUNCTIONS.items():
            function = getattr(core, name)
            function.restype = result[1]
            function.argtypes = [kind for _, kind in arguments]
        vars(core)["declared"] = True  # last: other threads may be here too
    return core


def takes(dtype: torch.dtype) -> bool:
    """Whether the compiled core is written for numbers of this type."""
    return dtype in _REALS


def unavailable(dtype: torch.dtype) -> str | None:
    """Why there is no compiled core for tensors of this type here; None where there is one."""
    if not takes(dtype):
        return f"it computes in float32 and float64, not in {_name(dtype)}"
    library = load_library(_REALS[dtype])
    return str(library) if isinstance(library, CompileError) else None


def obstacle(x: Tensor, layers: Iterable[tuple[SlotNeurons, Tensor, int]]) -> str | None:
    """Why the compiled core cannot run on x, in words; None where it can.

    Args:
        x: the input.
        layers: plain `SlotNeurons`, what they read (int64 [W, ...]) and how many numbers that is.
    """
    for neurons, sources, read in layers:
        parameters = dict(neurons.named_parameters(recurse=False))
        weights = neurons.mixing_weight
        tensors = (*parameters.values(), weights)
        for tensor in (x, sources, *tensors):
            if not tensor.is_cpu:
                return f"it runs on the CPU, not on {tensor.device.type}"
        for tensor in tensors:
            if tensor.dtype != x.dtype:
                return f"the input is {_name(x.dtype)}, the parameters are {_name(tensor.dtype)}"
        # Compiled code takes them for granted.
        shapes = neurons.parameter_shapes(read)
        fit = len(sources) == len(weights) == neurons.num_neurons
        fit &= sources.dtype == torch.int64 and sources.is_contiguous()
        if not (fit and {name: p.shape for name, p in parameters.items()} == shapes):
            return "the parameters have other shapes than the layer's sizes say"
    return unavailable(x.dtype)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


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


#: Of SlotNeurons, in the order in which autograd functions take them.
_PARAMETERS = ("weight_h", "weight_x", "bias", "predictor_h", "predictor_x", "predictor_bias")


def _parameters(rnn: "SparseRNN") -> list[Tensor]:
    names = _PARAMETERS if rnn.propagation == "sgprop" else _PARAMETERS[:3]
    return [getattr(rnn.neurons, name) for name in names]


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _pointers(parameters: Mapping[str, Tensor | None]) -> dict[str, int | None]:
    """Addresses of all parameters; null for those not given."""
    return {name: _pointer(parameters.get(name)) for name in _PARAMETERS}


def _layer(
    neurons: SlotNeurons, sources: Tensor, num_parents: int, parameters: Mapping[str, Tensor]
) -> Any:
    """The layer; its tensors must be contiguous and live as long as it is used.

    Args:
        neurons: of the layer.
        sources: what they read [W, ...].
        num_parents: P.
        parameters: by their names in `SlotNeurons`.
    """
    return make_structure(
        "Layer",
        neurons=neurons.num_neurons,
        size=neurons.neuron_size,
        parents=num_parents,
        slots=neurons.num_slots,
        external=neurons.external_size,
        inputs=neurons.num_input_neurons,
        scale=neurons.scale,
        parent=sources.data_ptr(),
        **_pointers(parameters),
    )


def _recurrent_layer(rnn: "SparseRNN", parameters: Sequence[Tensor]) -> Any:
    """The layer of SparseRNN, with what `_parameters` lists."""
    by_name = dict(zip(_PARAMETERS, parameters, strict=False))
    return _layer(rnn.neurons, rnn.parents, rnn.parents.shape[1], by_name)


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
    length, batch, _ = x.shape
    parameters = [parameter.detach().contiguous() for parameter in parameters]
    layer = _recurrent_layer(rnn, parameters)
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
        self.length, self.keep, self.steps = length, keep, 0
        self._core = core
        # Held here, since the structures know only their addresses.
        layer = [p.detach().contiguous() for p in _parameters(rnn)]
        around = [p.detach().contiguous() for e in encoder for p in (e.weight, e.bias)]
        around += [p.detach().contiguous() for p in actor]
        self._held = (rnn.parents, layer, around)
        first, bias = encoder[0], actor[1]
        names = ("weight_1", "bias_1", "weight_2", "bias_2", "actor", "actor_bias")
        self._layer = ctypes.pointer(_recurrent_layer(rnn, layer))
        self._policy = ctypes.pointer(
            make_structure(
                "Policy",
                observation=first.in_features,
                features=first.out_features,
                actions=bias.shape[0],
                slots=bias.shape[1],
                **dict(zip(names, map(_pointer, around), strict=True)),
            )
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
        moments = torch.zeros(4, rnn.num_neurons, dtype=torch.float64)
        results = _gradients(dict(zip(_PARAMETERS, grads, strict=False)), moments)
        mixing = None
        if sgprop:
            mixing = ctypes.byref(
                make_structure(
                    "Mixing",
                    mixing_weight=ctx.mixing_weight.data_ptr(),
                    schedule_beta=rnn.schedule_beta,
                    positive_projection=rule.positive_projection,
                    target_received=rule.predictor_target == "received",
                    mask_predictions=rnn.mask_predictions,
                    moments=rule.updates,
                    for_predictor=True,
                    unit_gradients=rule.unit_gradients,
                )
            )
        core.sgrl_backward(
            ctypes.byref(_recurrent_layer(rnn, parameters)),
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


def _gradients(parameters: Mapping[str, Tensor | None], moments: Tensor) -> Any:
    """Where a backward pass writes the gradients of parameters, and a layer's moments [4, W]."""
    return make_structure(
        "Gradients",
        **_pointers(parameters),
        statistics=(ctypes.c_double * len(STATISTICS))(),
        moments=moments.data_ptr(),
    )


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
        if x.shape[1:] != (mlp.input_size,) or mlp.runs_on(x) != "native":
            raise ValueError(f"{list(x.shape)} {x.dtype} is no input of this SparseMLP")
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
        self._layers = (_STRUCTURES["Layer"] * len(mlp.layers))()
        for index, neurons in enumerate(mlp.layers):
            weight, bias = self._parameters[2 * index : 2 * index + 2]
            predictor, predictor_bias = self._predictors[index]
            given = {"weight_h": weight, "bias": bias}
            given |= {"predictor_h": predictor, "predictor_bias": predictor_bias}
            num_parents = mlp.parents.shape[2]
            self._layers[index] = _layer(neurons, self._parents[index], num_parents, given)
        stack = make_structure(
            "Stack",
            count=len(mlp.layers),
            inputs=mlp.input_size,
            residual=mlp.residual,
            layers=ctypes.addressof(self._layers),
        )
        self.pointer = ctypes.pointer(stack)


def _stack_forward(
    mlp: "SparseMLP", x: Tensor, parameters: list[Tensor], keep: bool
) -> tuple[Tensor, _Record | None]:
    """-> output [B, W, N], and if to be kept what a backward pass needs."""
    core = load(x.dtype)
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
        results = (_STRUCTURES["Gradients"] * depth)()
        mixing = (_STRUCTURES["Mixing"] * depth)()
        for index, neurons in enumerate(mlp.layers):
            wanted = dict(zip(("weight_h", "bias"), grads[2 * index : 2 * index + 2], strict=True))
            if sgprop:
                place = 2 * (depth + index)
                wanted["predictor_h"], wanted["predictor_bias"] = grads[place : place + 2]
                mixing[index] = make_structure(
                    "Mixing",
                    mixing_weight=neurons.mixing_weight.data_ptr(),
                    schedule_beta=0.0,
                    positive_projection=False,
                    target_received=rule.predictor_target == "received",
                    mask_predictions=False,
                    moments=rule.updates,
                    for_predictor=rule.phase != "policy",
                    unit_gradients=rule.unit_gradients,
                )
            results[index] = _gradients(wanted, moments[index])
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
