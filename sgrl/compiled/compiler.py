"""Compiles the C++ source of the native backend at first use and keeps the result.

A library is kept in a cache folder (SGRL_CACHE_DIR, else the user's, as in ~/.cache/sgrl)
under a name that holds a hash of all it depends on: the source, the flags, the compiler and the
processor. So nodes with different processors can share the folder, and a change of any of these
compiles anew. It appears there by an atomic rename: processes that compile the same at the same
moment merely do it twice. SGRL_CXXFLAGS holds further flags for the compiler.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from sgrl.compiled.prebuilt import FLAGS, SOURCE, read_source
from sgrl.compiled.processor import cpuinfo

COMPILERS = ("c++", "g++", "clang++")


class CompileError(Exception):
    """There is no working compiler; the message says what is wrong, in one line."""


def compile_library(real: str) -> ctypes.CDLL:
    """The compiled core for C++ type `real`, from the cache or compiled for this processor.

    Raises:
        CompileError: there is no compiler, or it failed.
        OSError: there is no folder to compile in, or the library cannot be loaded.
    """
    command = [*find_compiler(), *FLAGS, "-march=native", *extra_flags(), f"-DREAL={real}"]
    name = f"slot_neurons-{real}-{_fingerprint(command)}.so"
    folder = cache_folder()
    kept = folder / name
    if kept.is_file():
        try:
            return ctypes.CDLL(str(kept))
        except OSError:
            pass  # damaged: compile it again
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix="compiling-") as scratch:
            built = _compile(command, Path(scratch) / name)
            built.replace(kept)
        return ctypes.CDLL(str(kept))
    except OSError:  # the cache cannot be written to, or not be executed from
        with tempfile.TemporaryDirectory(prefix="sgrl-") as scratch:
            return ctypes.CDLL(str(_compile(command, Path(scratch) / name)))


def cache_folder() -> Path:
    """Where compiled libraries are kept."""
    from platformdirs import user_cache_path  # setup.py imports this file without it

    given = os.environ.get("SGRL_CACHE_DIR")
    return Path(given) if given else user_cache_path("sgrl")


def extra_flags() -> list[str]:
    """Flags that the user adds."""
    return os.environ.get("SGRL_CXXFLAGS", "").split()


def find_compiler() -> list[str]:
    """The command of a C++ compiler.

    Raises:
        CompileError: there is none.
    """
    given = os.environ.get("CXX", "").split()
    for candidate in [given] if given else [[name] for name in COMPILERS]:
        if path := shutil.which(candidate[0]):
            return [path, *candidate[1:]]
    raise CompileError(f"found no {given[0] if given else 'C++ compiler'}")


def compiler_name(command: list[str]) -> str:
    """A compiler's name and version, as in `g++ (Debian 12.2.0-14+deb12u1) 12.2.0`."""
    said = _version(command)
    first = said.split("\n", 1)[0]
    # g++ says the name it was called by.
    return "g++" + first[first.find(" (") :] if "Free Software" in said else first


def _version(command: list[str]) -> str:
    return subprocess.run([command[0], "--version"], capture_output=True, text=True).stdout


def _compile(command: list[str], to: Path) -> Path:
    try:
        subprocess.run(
            [*command, str(SOURCE), "-o", str(to)], check=True, capture_output=True, text=True
        )
    except subprocess.CalledProcessError as error:
        lines = [line for line in error.stderr.splitlines() if "error" in line] or ["no message"]
        raise CompileError(f"{command[0]} failed: {lines[0].strip()}") from error
    return to


def _fingerprint(command: list[str]) -> str:
    parts = [read_source(), *command, _version(command), platform.machine(), _processor()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _processor() -> str:
    """What -march=native depends on: the processor's model and features."""
    names = ("vendor_id", "cpu family", "model", "model name", "flags", "Features", "CPU part")
    info = {name: value for name, value in cpuinfo().items() if name in names}
    return repr(info) if info else platform.processor()
