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
from functools import cache
from pathlib import Path

from platformdirs import user_cache_path

SOURCE = Path(__file__).with_name("slot_neurons.cpp")
# No -ffast-math: it would change the rounding mode of the whole process, and hide NaN.
FLAGS = (
    *("-std=gnu++17", "-O3", "-march=native", "-fno-math-errno", "-ffp-contract=fast"),
    *("-fPIC", "-shared"),
)
COMPILERS = ("c++", "g++", "clang++")


class CompileError(Exception):
    """There is no working compiler; the message says what is wrong, in one line."""


@cache
def load_library(real: str) -> ctypes.CDLL | CompileError:
    """The compiled core for C++ type `real`, or what kept it from being compiled."""
    try:
        return _load(real)
    except (CompileError, OSError) as error:
        return CompileError(
            f"sgrl's compiled core is not available ({error}): install a C++ compiler (g++ or "
            "clang++, or name one in CXX) to have it"
        )


def _load(real: str) -> ctypes.CDLL:
    extra = os.environ.get("SGRL_CXXFLAGS", "").split()
    command = [*_compiler(), *FLAGS, *extra, f"-DREAL={real}"]
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
    given = os.environ.get("SGRL_CACHE_DIR")
    return Path(given) if given else user_cache_path("sgrl")


def _compiler() -> list[str]:
    given = os.environ.get("CXX", "").split()
    for candidate in [given] if given else [[name] for name in COMPILERS]:
        if path := shutil.which(candidate[0]):
            return [path, *candidate[1:]]
    raise CompileError(f"found no {given[0] if given else 'C++ compiler'}")


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
    version = subprocess.run([command[0], "--version"], capture_output=True, text=True).stdout
    parts = [SOURCE.read_text(), *command, version, platform.machine(), _processor()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _processor() -> str:
    """What -march=native depends on: the processor's model and features."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor()
    names = ("vendor_id", "cpu family", "model", "model name", "flags", "Features", "CPU part")
    return "\n".join(line for line in lines if line.split("\t")[0].strip() in names)
