"""Backends: the ways the layers can compute. All give the numbers of "eager", the oracle."""

import warnings
from collections.abc import Callable
from functools import cache

import torch

from sgrl.names import did_you_mean
from sgrl.nn.kernels import native

#: From the plain definition to the fastest.
BACKENDS = ("eager", "torch", "native")
#: Those of GRU and LSTM that differ: "eager" and "torch" are both torch's own module.
DENSE_BACKENDS = ("torch", "native")


def check_backend(name: str, shuffle_predictions: bool = False) -> None:
    """Check a layer's backend.

    Args:
        name: "auto" or one of `BACKENDS`.
        shuffle_predictions: whether the layer is to shuffle them.

    Raises:
        ValueError: no backend of that name, or one that cannot shuffle predictions.
    """
    known = ("auto", *BACKENDS)
    if name not in known:
        raise ValueError(f"unknown backend {name!r}; {did_you_mean(name, known)}")
    if shuffle_predictions and name == "native":
        raise ValueError(
            "shuffle_predictions is for the backends torch and eager: leave backend at auto"
        )


def resolve_backend(name: str, dtype: torch.dtype = torch.float32, compiled: bool = True) -> str:
    """The backend that `name` stands for on this machine's CPU; "auto" is the fastest there is.

    "auto" warns once where compiled code would run but for a missing compiler.

    Args:
        name: "auto" or one of `BACKENDS`.
        dtype: of the numbers.
        compiled: whether the layer can do what it is set to in compiled code.

    Raises:
        ValueError: no backend of that name, or "native" where it cannot run.
    """
    check_backend(name)
    if name not in ("auto", "native"):
        return name
    if name == "auto" and not compiled:
        return "torch"
    reason = native.unavailable(dtype)
    if reason is None:
        return "native"
    if name == "native":
        raise ValueError(_refusal(name, reason))
    if native.takes(dtype):
        _warn(reason)
    return "torch"


def choose_backend(name: str, obstacle: Callable[[str], str | None]) -> str:
    """The backend to compute with; what `name` says, and for "auto" the fastest that can.

    Args:
        name: as a layer was given it.
        obstacle: says of a backend why it cannot compute this, None where it can. "eager" always
            can.

    Raises:
        ValueError: the one that is named cannot; it is never replaced by another.
    """
    if name == "auto":
        return next(b for b in reversed(BACKENDS) if b == "eager" or obstacle(b) is None)
    reason = None if name == "eager" else obstacle(name)
    if reason is not None:
        raise ValueError(_refusal(name, reason))
    return name


def _refusal(name: str, reason: str) -> str:
    return f"backend {name!r} cannot run: {reason}; backend 'auto' takes the fastest that can"


@cache
def _warn(reason: str) -> None:
    """Warn once a process."""
    message = f"{reason}; using the slower torch backend"
    warnings.warn(message, RuntimeWarning, stacklevel=4)
