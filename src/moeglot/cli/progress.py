"""How long a command still takes: a bar with rate and time left on a terminal, lines in a pipe; imported when a command has work to show."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from moeglot.conversion.stream import WRITING
from moeglot.sizes import size


class Rate(ProgressColumn):
    """Bytes a second while writing, else experts a second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        if speed is None:
            return Text("")
        return Text(f"{size(speed)}/s" if task.description == WRITING else f"{speed:,.0f} experts/s", style="progress.data.speed")


@contextmanager
def bar(quiet: bool) -> Iterator[Any]:
    """A progress bar with rate and time left on a terminal; a line for each tenth in a pipe; both on standard error."""
    err = Console(stderr=True)
    if quiet or not err.is_terminal:
        last: dict[str, int] = {}

        def lines(what: str, done: int, total: int) -> None:
            tenth = 10 * done // total
            if not quiet and last.get(what) != tenth:
                last[what] = tenth
                print(f"{what} {10 * tenth} %", file=sys.stderr, flush=True)

        yield lines
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), Rate(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err) as progress:
        tasks: dict[str, Any] = {}

        def tell(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=total)
            progress.update(tasks[what], completed=done, total=total)

        yield tell
