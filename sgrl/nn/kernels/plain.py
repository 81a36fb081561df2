"""Whether modules are just what a kernel computes.

A kernel computes what its source says, whatever a module does that it stands for. So it may stand
only for modules of exactly the classes it was written for, to which nothing was added later: no
hook, no parametrization, no method replaced. All others run as they are written.
"""

from functools import cache
from typing import Any, TypeGuard, TypeVar

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

Kind = TypeVar("Kind", bound=nn.Module)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_plain(module: nn.Module, kind: type[Kind]) -> TypeGuard[Kind]:
    """Whether a module is of exactly this class and nothing was added to it.

    What is registered inside it is not looked at. (A parametrized module has a class of its own.)
    """
    return type(module) is kind and not _is_changed(module)


def is_unchanged(module: nn.Module, base: type[nn.Module], *methods: str) -> bool:
    """Whether a module, perhaps of a subclass, has these methods of `base` and nothing added."""
    same = all(getattr(type(module), name) is getattr(base, name) for name in methods)
    return isinstance(module, base) and same and not _is_changed(module)


def is_autocast_on(device: torch.device) -> bool:
    """Whether torch runs operations there in another precision than they are written in."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def _is_changed(module: nn.Module) -> bool:
    kind: Any = type(module)
    return (
        any(getattr(module, hooks) for hooks in _HOOKS)
        or _has_any_global_hook()
        # A method put on this one instance hides its class's.
        or not _methods(kind).isdisjoint(vars(module))
    )


@cache
def _methods(kind: type[nn.Module]) -> frozenset[str]:
    """Names of a class's methods."""
    return frozenset(name for name in dir(kind) if callable(getattr(kind, name)))
