"""Progress of long work on a terminal's standard error; nothing where there is no terminal."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def progress_bar(shown: bool, in_bytes: bool = False) -> Iterator[Callable[..., Any]]:
    """A function that shows (what, done, total), a bar for each `what`; a total of None is not known."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        ProgressColumn,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns: list[ProgressColumn] = [TextColumn("{task.description}"), BarColumn(), TaskProgressColumn()]
    columns += (
        [DownloadColumn(binary_units=True), TransferSpeedColumn(), TimeRemainingColumn()]
        if in_bytes
        else [TimeElapsedColumn()]
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not shown or not console.is_terminal) as bars:
        tasks: dict[str, Any] = {}

        def show(what: str, done: int, total: int | None) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=None)
            bars.update(tasks[what], completed=done, total=None if total is None else max(done, total))

        yield show
