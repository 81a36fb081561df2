"""Progress bars on the terminal."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(title: str, total: int | None = None) -> Iterator[Callable[..., None]]:
    """Show a progress bar on stderr if that is a terminal, until the context ends.

    Args:
        title: the text beside it.
        total: number of steps, if it is known.

    Yields:
        A function whose keywords move the bar, which is hidden until then: `advance` by so many
        steps, `completed` to so many of them, their `total`, and the text's `description`.
    """
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bars:
        task = bars.add_task(title, total=total, visible=False)
        yield functools.partial(bars.update, task, visible=True)
