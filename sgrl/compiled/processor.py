"""What the processor is, and which instructions it has."""

import platform
from functools import cache
from pathlib import Path


@cache
def cpuinfo() -> dict[str, str]:
    """What Linux says of the first processor, by field; empty elsewhere."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    lines = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in lines}


def features() -> set[str]:
    """Instructions that processor and system support, as Linux calls them; empty elsewhere."""
    info = cpuinfo()
    return {*info.get("flags", "").split(), *info.get("Features", "").split()}


def processor() -> str:
    """The processor's name."""
    return cpuinfo().get("model name") or platform.processor() or platform.machine()


def processor_kind() -> str:
    """What rounding depends on: the processor's model and its vector instructions, in one line.

    Results repeat exactly between processors of one kind, given the same versions, threads and
    build of the compiled core.
    """
    info = cpuinfo()
    names = ("vendor_id", "cpu family", "model", "CPU implementer", "CPU part")
    model = [info[name] for name in names if name in info] or [platform.processor()]
    vectors = sorted(f for f in features() if f.startswith(("avx", "fma", "asimd", "sve")))
    return " ".join([platform.machine(), *model, *vectors])
