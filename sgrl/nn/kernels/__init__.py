"""Backends: the ways the layers can compute. All give the numbers of "eager", the oracle."""

import difflib

import torch

BACKENDS = ("eager", "torch", "native")


def resolve_backend(name: str, compiled: bool = True) -> str:
    """The backend that `name` stands for; "auto" is the fastest that works here.

    Args:
        name: "auto" or one of `BACKENDS`.
        compiled: whether the layer can do what it is set to in compiled code.

    Raises:
        ValueError: no backend of that name.
    """
    if name == "auto":
        from sgrl.nn.kernels import native

        return "native" if compiled and native.load(torch.float32) else "torch"
    if name not in BACKENDS:
        close = difflib.get_close_matches(name, BACKENDS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        known = ", ".join(("auto", *BACKENDS))
        raise ValueError(f"unknown backend {name!r} (known: {known}){hint}")
    return name
