"""Builds wheels with the compiled core in them; pyproject.toml says all else.

SGRL_WHEEL names the architecture that a wheel is for, x86_64 or aarch64, or is `any` for one
without libraries, of which each machine compiles its own. Where it is not set, a wheel is for this
machine, or for any where there is no C++ compiler that builds the libraries. An editable install
gets none. Sdists and wheels are the same bytes from the same files, compiler and SOURCE_DATE_EPOCH.
"""

import gzip
import io
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

from setuptools import Command, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.command.sdist import sdist

sys.path.insert(0, str(Path(__file__).parent))
from sgrl.compiled import prebuilt
from sgrl.compiled.compiler import CompileError, compiler_name, find_compiler

ARCHITECTURES = sorted({level.machine for level in prebuilt.LEVELS.values()})
#: The oldest glibc that wheels are tagged for; it is the first for aarch64.
OLDEST_GLIBC = 17
#: What a library may load.
LOADED = {b"libc.so.6", b"libm.so.6"}


def compiler_for(machine: str) -> list[str]:
    """The command of a compiler for an architecture: this machine's own, or a cross compiler."""
    if machine == platform.machine():
        return find_compiler()
    if path := shutil.which(f"{machine}-linux-gnu-g++"):
        return [path]
    raise CompileError(f"found no {machine}-linux-gnu-g++")


def glibc_of(folder: Path) -> int:
    """The minor version of glibc that the libraries of a folder need.

    Raises:
        CompileError: they need more than it.
    """
    newest = OLDEST_GLIBC
    for library in folder.glob("*.so"):
        content = library.read_bytes()
        if others := {*re.findall(rb"\0(lib[\w+.-]+\.so[.\d]*)(?=\0)", content)} - LOADED:
            raise CompileError(f"{library.name} needs {b', '.join(sorted(others)).decode()}")
        minors = re.findall(rb"\0GLIBC_2\.(\d+)(?:\.\d+)?(?=\0)", content)
        newest = max(newest, *map(int, minors))
    return newest


class BuildCore(Command):
    """Builds the libraries of the compiled core; a part of `build`."""

    editable_mode = False
    build_lib: str

    def initialize_options(self) -> None:
        self.build_lib = ""

    def finalize_options(self) -> None:
        self.set_undefined_options("build", ("build_lib", "build_lib"))

    @property
    def folder(self) -> Path:
        root = Path(__file__).parent
        return Path(self.build_lib or "build/lib") / prebuilt.FOLDER.relative_to(root)

    def run(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        asked = os.environ.get("SGRL_WHEEL", "")
        if asked not in ("", "any", *ARCHITECTURES):
            sys.exit(f"SGRL_WHEEL is {asked!r}; known: any, {', '.join(ARCHITECTURES)}")
        machine = asked or platform.machine()
        if self.editable_mode or asked == "any" or machine not in ARCHITECTURES:
            return
        if not asked and platform.system() != "Linux":
            return
        try:
            command = compiler_for(machine)
            prebuilt.build(self.folder, machine, command, compiler_name(command))
            glibc_of(self.folder)
        except (CompileError, subprocess.CalledProcessError) as error:
            shutil.rmtree(self.folder, ignore_errors=True)
            if asked:
                sys.exit(f"SGRL_WHEEL is {asked}: {error}")
            print(f"sgrl without prebuilt libraries: {error}", file=sys.stderr)

    def get_outputs(self) -> list[str]:
        return [str(file) for file in sorted(self.folder.glob("*"))]

    def get_source_files(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class Build(build):
    """All of a build, the core with it."""

    sub_commands = [*build.sub_commands, ("build_core", None)]


class Wheel(bdist_wheel):
    """A wheel for any Python 3 of one architecture, where it brings libraries."""

    def run(self) -> None:
        self.run_command("build")
        folder = self.get_finalized_command("build_core").folder
        if folder.is_dir():
            [machine] = {
                level.machine
                for name, level in prebuilt.LEVELS.items()
                if [*folder.glob(f"{name}-*.so")]
            }
            self.core_tag = ("py3", "none", f"manylinux_2_{glibc_of(folder)}_{machine}")
            self.root_is_pure = False
            self.distribution.has_ext_modules = lambda: True  # so that it is installed as such
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        return getattr(self, "core_tag", None) or super().get_tag()


class SourceArchive(sdist):
    """An sdist of the same bytes from the same files."""

    def make_archive(self, base_name, format, root_dir=None, base_dir=None, **more) -> str:
        if format != "gztar":
            return super().make_archive(base_name, format, root_dir, base_dir, **more)
        when = int(os.environ.get("SOURCE_DATE_EPOCH", "0")) or None

        def plain(entry: tarfile.TarInfo) -> tarfile.TarInfo:
            entry.uid = entry.gid = 0
            entry.uname = entry.gname = ""
            entry.mode = 0o755 if entry.isdir() or entry.mode & 0o100 else 0o644
            entry.mtime = when or entry.mtime
            return entry

        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
            for path in [Path(base_dir), *sorted(Path(base_dir).rglob("*"))]:
                archive.add(path, recursive=False, filter=plain)
        target = Path(f"{base_name}.tar.gz")
        target.parent.mkdir(parents=True, exist_ok=True)
        with gzip.GzipFile(target, "wb", mtime=when) as file:
            file.write(buffer.getvalue())
        return str(target)


setup(
    # The experiments beside the package are in it where it is installed.
    packages=[*find_packages(include=["sgrl*"]), "sgrl.tune_configs"],
    package_dir={"sgrl.tune_configs": "tune_configs"},
    cmdclass={
        "bdist_wheel": Wheel,
        "build": Build,
        "build_core": BuildCore,
        "sdist": SourceArchive,
    },
)
