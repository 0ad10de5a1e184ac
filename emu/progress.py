"""Progress and tables on a terminal; plain lines where there is none."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID


class Progress:
    """A bar over `total` steps on stderr, shown only when that is a terminal; text goes to stdout above it."""

    def __init__(self, total: int, *, enabled: bool) -> None:
        self._bar: RichProgress | None = None
        self._task: TaskID | None = None
        if enabled and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as RichProgress

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = RichProgress(*columns, console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task("", total=total)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def start(self, name: str) -> None:
        """The step that begins now."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, description=name)

    def done(self) -> None:
        """The step has ended."""
        if self._bar is not None and self._task is not None:
            self._bar.advance(self._task)

    def print(self, text: str) -> None:
        """Text for stdout."""
        print(text, flush=True)

    def print_error(self, text: str) -> None:
        """A message for stderr."""
        print(text, file=sys.stderr, flush=True)

    @staticmethod
    def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Rows in aligned columns on stdout."""
        widths = [max(len(row[n]) for row in (header, *rows)) for n in range(len(header))]
        for row in (header, *rows):
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
