"""Libraries of the compiled core that a wheel brings, for several instruction sets.

`setup.py` has them built into a folder beside the C++ source, with a manifest; a checkout has none.
They need no library but libc and libm, and of these only what is old.
"""

import ctypes
import hashlib
import json
import platform
import subprocess
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from sgrl.compiled.processor import features

SOURCE = Path(__file__).parents[1] / "nn" / "kernels" / "slot_neurons.cpp"
FREESTANDING = SOURCE.with_name("freestanding.cpp")
FOLDER = SOURCE.with_name("prebuilt")
MANIFEST = "libraries.json"
#: The types of numbers, each of which has a library.
REALS = ("float", "double")
#: No -ffast-math: it would change the rounding mode of the whole process, and hide NaN.
FLAGS = ("-std=gnu++17", "-O3", "-fno-math-errno", "-ffp-contract=fast", "-fPIC", "-shared")
#: For a library that runs elsewhere: it takes no C++ library along, and none in.
PORTABLE = ("-fno-exceptions", "-fno-asynchronous-unwind-tables", "-static-libgcc", "-s")
LINKED = ("-Wl,--as-needed", "-Wl,-z,defs", "-Wl,--build-id=none")
EXPORTED = "{ global: sgrl_*; local: *; };"

_V2 = frozenset(["cx16", "lahf_lm", "pni", "popcnt", "sse4_1", "sse4_2", "ssse3"])
_V3 = _V2 | frozenset(["abm", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe", "xsave"])
_V4 = _V3 | frozenset(["avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512vl"])


class Level(NamedTuple):
    """A processor's architecture, and what Linux calls the instructions it must have."""

    machine: str
    features: frozenset[str]


#: Instruction sets by the compiler's name, the widest first.
LEVELS = {
    "x86-64-v4": Level("x86_64", _V4),
    "x86-64-v3": Level("x86_64", _V3),
    "x86-64-v2": Level("x86_64", _V2),
    "armv8-a": Level("aarch64", frozenset({"fp", "asimd"})),
}


class Prebuilt(NamedTuple):
    """Libraries that run here.

    Attributes:
        level: their instruction set.
        compiler: what built them.
        libraries: by type of number.
    """

    level: str
    compiler: str
    libraries: Mapping[str, ctypes.CDLL]


def read_source() -> str:
    """All of the core's C++ source: what is compiled, and the headers beside it."""
    return "".join(file.read_text() for file in (SOURCE, *sorted(SOURCE.parent.glob("*.h"))))


def build(folder: Path, machine: str, command: Sequence[str], compiler: str) -> None:
    """Build the libraries of an architecture, and their manifest.

    Args:
        folder: takes them; it must not exist.
        machine: architecture.
        command: the compiler to call.
        compiler: its name and version, for the manifest.

    Raises:
        subprocess.CalledProcessError: the compiler failed.
    """
    folder.mkdir(parents=True)
    exported = folder / "exported"
    exported.write_text(EXPORTED)
    digests = {}
    for level in (name for name, needs in LEVELS.items() if needs.machine == machine):
        for real in REALS:
            library = folder / f"{level}-{real}.so"
            flags = (*FLAGS, f"-march={level}", *PORTABLE, *LINKED, f"-DREAL={real}")
            script = f"-Wl,--version-script={exported}"
            sources = (str(SOURCE), str(FREESTANDING))
            subprocess.run([*command, *flags, script, *sources, "-o", str(library)], check=True)
            digests[library.name] = _digest(library)
    exported.unlink()
    manifest = {"source": _digest_of_source(), "compiler": compiler, "libraries": digests}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")


def supported() -> list[str]:
    """Instruction sets of `LEVELS` that this processor has, the widest first."""
    here, machine = features(), platform.machine()
    return [
        name
        for name, level in LEVELS.items()
        if level.machine == machine and level.features <= here
    ]


def find(levels: Sequence[str]) -> Prebuilt | None:
    """The first of these that the wheel brings and that can be loaded; None where none can be.

    What is damaged is passed over with a warning: it is never loaded. A C++ source that is not the
    one they were built from counts: its structures may differ.
    """
    try:
        manifest = json.loads((FOLDER / MANIFEST).read_text())
        source, compiler, digests = (manifest[k] for k in ("source", "compiler", "libraries"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        _warn(f"{MANIFEST} cannot be read ({type(error).__name__})")
        return None
    if source != _digest_of_source():
        return None
    for level in levels:
        names = {real: f"{level}-{real}.so" for real in REALS}
        if not set(names.values()) <= digests.keys():
            continue
        try:
            return Prebuilt(level, compiler, {r: _load(n, digests[n]) for r, n in names.items()})
        except OSError as error:
            _warn(str(error))
    return None


def _load(name: str, digest: str) -> ctypes.CDLL:
    path = FOLDER / name
    if not path.is_file() or _digest(path) != digest:
        raise OSError(f"{name} is {'damaged' if path.is_file() else 'missing'}")
    return ctypes.CDLL(str(path))


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _digest_of_source() -> str:
    return hashlib.sha256(read_source().encode()).hexdigest()


def _warn(what: str) -> None:
    message = f"of sgrl's prebuilt libraries in {FOLDER}, {what}: reinstall sgrl"
    warnings.warn(message, RuntimeWarning, stacklevel=2)
