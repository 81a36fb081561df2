"""The library of the compiled core that this process uses.

An installed wheel brings prebuilt libraries; where it brings none that fits, and in a checkout, the
core is compiled for this very processor. SGRL_CORE asks for the one or the other.
"""

import ctypes
import os
from functools import cache

from sgrl.compiled import prebuilt
from sgrl.compiled.compiler import (
    CompileError,
    compile_library,
    compiler_name,
    extra_flags,
    find_compiler,
)
from sgrl.errors import UserError
from sgrl.names import did_you_mean

#: What SGRL_CORE says to have the core compiled, whatever a wheel brings.
COMPILE = "compile"
COMPILED_HERE = "compiled for this processor by "


@cache
def load_library(real: str) -> ctypes.CDLL | CompileError:
    """The compiled core for C++ type `real`, or what kept it from being compiled.

    Raises:
        UserError: SGRL_CORE names a library that there is not.
    """
    if found := _prebuilt():
        return found.libraries[real]
    try:
        return compile_library(real)
    except (CompileError, OSError) as error:
        return CompileError(
            f"sgrl's compiled core is not available ({error}): install a C++ compiler (g++ or "
            "clang++, or name one in CXX) to have it"
        )


@cache
def core_build() -> str:
    """Which build of the compiled core this process uses; under one build results repeat exactly.

    Nothing is compiled for the answer.

    Raises:
        UserError: as of `load_library`.
    """
    if found := _prebuilt():
        return f"{found.level}, prebuilt by {found.compiler}"
    try:
        compiler = compiler_name(find_compiler())
    except CompileError as error:
        return f"none: {error}"
    return " ".join([f"{COMPILED_HERE}{compiler}", *extra_flags()])


@cache
def _prebuilt() -> prebuilt.Prebuilt | None:
    """The libraries that a wheel brought, where they are to be used."""
    wanted, levels = os.environ.get("SGRL_CORE", ""), prebuilt.supported()
    if wanted == COMPILE or (not wanted and extra_flags()):
        return None
    known = (COMPILE, *prebuilt.LEVELS)
    if wanted and wanted not in known:
        raise UserError(f"SGRL_CORE is {wanted!r}; {did_you_mean(wanted, known)}")
    if wanted and wanted not in levels:
        raise UserError(f"SGRL_CORE is {wanted}, and this processor has {_list(levels)}")
    found = prebuilt.find([wanted] if wanted else levels)
    if wanted and found is None:
        raise UserError(
            f"SGRL_CORE is {wanted}, and this installation of sgrl brings no such library: install "
            f"sgrl from its wheel, or leave SGRL_CORE at {COMPILE}"
        )
    return found


def _list(levels: list[str]) -> str:
    return ", ".join(levels) or "none of the instruction sets that sgrl has libraries for"
