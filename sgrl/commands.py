"""Commands to print, which run as they are printed.

`command("sgrl", "resume", "my results/a")` is ``sgrl resume 'my results/a'``.
"""

import shlex
import shutil
import sys
from pathlib import Path


def command(program: str, *words: str | Path) -> str:
    """A command line for a shell, each word quoted where it needs to be.

    Args:
        program: one of those installed beside `sgrl`. Where the shell would not find it, because
            this was started as `.venv/bin/sgrl`, it is named in the same way.
        words: its arguments.
    """
    started = Path(sys.argv[0])
    beside = started.with_name(program)
    if started.name == "sgrl" and beside.is_file():
        found = shutil.which(program)
        if found is None or not Path(found).samefile(beside):
            program = str(beside)
    return shlex.join([program, *map(str, words)])
