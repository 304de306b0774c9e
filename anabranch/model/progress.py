"""A progress bar for loading, on stderr, for whoever starts a worker at a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from anabranch.model.loader import Progress


@contextmanager
def progress_bar(label: str) -> Iterator[Progress | None]:
    """A callback that draws a bar; None where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label)

        def advance(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        yield advance
