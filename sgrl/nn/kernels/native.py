"""The compiled core of the "native" backend: compiled code for the CPU, and its view of a layer.

The C++ is in `slot_neurons.cpp` and the headers beside it, `sgrl.compiled` has it as a library, and
this file declares it to ctypes; `native_unroll.py`, `native_stack.py` and `native_rnn.py` hand it
torch's memory. It runs in one thread and releases the GIL. Structures and functions are declared in
the C++ alone; `read_declarations` makes what ctypes needs of it.
"""

import ctypes
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sgrl.compiled.compiler import CompileError
from sgrl.compiled.library import load_library
from sgrl.compiled.prebuilt import read_source
from sgrl.nn.neuron import PARAMETERS, Layer
from sgrl.nn.sgprop import NORMS, Mixing

_REALS = {torch.float32: "float", torch.float64: "double"}

#: What a backward pass measures, in the order of `Gradients.statistics` in slot_neurons.cpp.
STATISTICS = ("predictor_loss", *NORMS)

#: Types that declarations in C++ may use, beside pointers.
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
        raise ValueError(f"C++ source: cannot read the declaration {text.strip()!r}")
    declared = []
    for part in match[2].split(","):
        name = re.fullmatch(r"\s*(\*?)\s*(\w+)(?:\[(\d+)\])?", part)
        if name is None or not (name[1] or match[1] in _TYPES):
            raise ValueError(f"C++ source: cannot read the declaration {text.strip()!r}")
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


_STRUCTURES, _FUNCTIONS = read_declarations(read_source())


def make_structure(name: str, **values: Any) -> Any:
    """A structure of the C++ source with all its fields.

    Raises:
        TypeError: the structure has other fields than these.
    """
    structure = _STRUCTURES[name]
    fields = [field[0] for field in structure._fields_]
    if set(fields) != values.keys():
        different = ", ".join(sorted(set(fields) ^ values.keys()))
        raise TypeError(f"{name} of the C++ source and native.py differ in: {different}")
    return structure(**values)


def make_array(name: str, count: int) -> Any:
    """So many structures of the C++ source side by side."""
    return (_STRUCTURES[name] * count)()


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


def obstacle(
    x: Tensor, layers: Iterable[tuple[Layer, Mapping[str, tuple[int, ...]]]]
) -> str | None:
    """Why the compiled core cannot run on x, in words; None where it can.

    Args:
        x: the input.
        layers: each with the shapes that its sizes give its parameters, by name.
    """
    for layer, shapes in layers:
        parameters, weights = layer.parameters(), layer.mixing_weight
        tensors = (*parameters.values(), weights)
        for tensor in (x, layer.sources, *tensors):
            if not tensor.is_cpu:
                return f"it runs on the CPU, not on {tensor.device.type}"
        for tensor in tensors:
            if tensor.dtype != x.dtype:
                return f"the input is {_name(x.dtype)}, the parameters are {_name(tensor.dtype)}"
        # Compiled code takes them for granted.
        fit = len(layer.sources) == len(weights) == layer.num_neurons
        fit &= layer.sources.dtype == torch.int64 and layer.sources.is_contiguous()
        if not (fit and {name: p.shape for name, p in parameters.items()} == shapes):
            return "the parameters have other shapes than the layer's sizes say"
    return unavailable(x.dtype)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def pointer(tensor: Tensor | None) -> int | None:
    """Its address; null for None."""
    return None if tensor is None else tensor.data_ptr()


def layer_structure(layer: Layer, parameters: Mapping[str, Tensor | None]) -> Any:
    """The layer; its tensors must be contiguous and live as long as it is used.

    Args:
        layer: its sizes and connections.
        parameters: by their names in `Layer`, those there are.
    """
    return make_structure(
        "Layer",
        neurons=layer.num_neurons,
        size=layer.neuron_size,
        parents=layer.num_parents,
        slots=layer.num_slots,
        external=layer.external_size,
        inputs=layer.num_input_neurons,
        scale=layer.scale,
        noise_std=layer.noise_std,
        parent=layer.sources.data_ptr(),
        **{name: pointer(parameters.get(name)) for name in PARAMETERS},
    )


def mixing_structure(
    mixing: Mixing,
    mixing_weight: Tensor,
    schedule_beta: float = 0.0,
    for_predictor: bool = True,
    episodes: bool = False,
) -> Any:
    """How a layer mixes in a backward pass.

    Args:
        mixing: of the network.
        mixing_weight: lambda [W], which must live as long as the structure is used.
        schedule_beta: step of lambda's schedule over time.
        for_predictor: whether the predictor's gradients are wanted.
        episodes: whether the moments' samples are sequences, not their steps.
    """
    settings, rule = mixing.settings, mixing.rule
    return make_structure(
        "Mixing",
        mixing_weight=mixing_weight.data_ptr(),
        schedule_beta=schedule_beta,
        positive_projection=settings.positive_projection,
        target_received=settings.predictor_target == "received",
        mask_predictions=settings.mask_predictions,
        moments=rule.updates,
        for_predictor=for_predictor,
        unit_gradients=rule.unit_gradients,
        episodes=episodes,
    )


#: The block of memory that the last finished backward pass used, for the next forward pass: getting
#: tens of megabytes afresh from the system takes as long as a forward pass itself.
_spare: list[Tensor] = []


class Record:
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


class StepRecorder:
    """A policy's steps in compiled code through episodes of T steps, from the zero state on.

    With `keep` it leaves what the core's backward pass needs, and that can go on from it instead of
    running the steps again. The parameters must stay as they are meanwhile.

    Args:
        act: name of the function that takes a step.
        policy: what the policy has around its core, a structure.
        core: the core, a structure.
        memory: numbers that the core's and the policy's blocks of memory hold.
        held: tensors whose addresses the structures know.
        length: T, the most steps it may take.
        batch_size: B.
        keep: False needs little memory and is only for acting.
        shapes: of a sequence's observation at one step, and of all that `act` writes, logits last.

    Attributes:
        buffers: these, each [T, B, ..], or [1, B, ..] if not kept.
    """

    def __init__(
        self,
        act: str,
        policy: Any,
        core: Any,
        memory: tuple[int, int],
        held: Sequence[Tensor],
        length: int,
        batch_size: int,
        keep: bool,
        shapes: Sequence[Sequence[int]],
    ) -> None:
        new = held[0].new_empty
        self.library = load(held[0].dtype)
        self.length, self.keep, self.steps = length, keep, 0
        self.core, self.policy, self._held = ctypes.pointer(core), ctypes.pointer(policy), held
        self.sizes = (length, batch_size, keep)
        self.record = Record(memory[0], held[0].dtype) if keep else None
        self.memory = new(memory[0]) if self.record is None else self.record.memory
        self.policy_memory = new(memory[1])
        self._act = getattr(self.library, act)
        # Steps that are not kept are all written to the same place.
        rows = length if keep else 1
        self.buffers = [new(rows, batch_size, *shape) for shape in shapes]
        self.observations = self.buffers[0]
        self.rows = [
            tuple(int(buffer.data_ptr() + t * buffer[0].nbytes) for t in range(rows))
            for buffer in self.buffers
        ]

    def inputs(self, row: int) -> tuple[int | None, ...]:
        """Addresses of what the next step takes."""
        return (self.rows[0][row],)

    def act(self, observations: Float[Tensor, "B F"]) -> Float[Tensor, "B A"]:
        """The next step: observations [B, F] -> logits [B, A], of which only kept ones stay."""
        row = self.steps if self.keep else 0
        self.observations[row].copy_(observations)
        self._act(
            self.policy,
            self.core,
            *self.sizes,
            self.steps,
            *self.inputs(row),
            *(pointers[row] for pointers in self.rows[1:]),
            self.memory.data_ptr(),
            self.policy_memory.data_ptr(),
        )
        self.steps += 1
        return self.buffers[-1][row]


def gradients_structure(parameters: Mapping[str, Tensor | None], moments: Tensor) -> Any:
    """Where a backward pass writes the gradients of parameters, and a layer's moments [4, W]."""
    return make_structure(
        "Gradients",
        **{name: pointer(parameters.get(name)) for name in PARAMETERS},
        statistics=(ctypes.c_double * len(STATISTICS))(),
        moments=moments.data_ptr(),
    )
