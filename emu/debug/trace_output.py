"""Where a trace goes: standard output, or a file that appears whole or not at all."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import TracebackType
from typing import IO

_BUFFER = 1 << 20


class OutputError(Exception):
    """Output that cannot be written; the text names file and cause."""


class Output:
    """A text stream, used in a with statement. `path` None: standard output.

    A file is written under another name beside it, and takes its place when the statement ends without an exception. Raises
    OutputError, also from `write`.
    """

    def __init__(self, path: str | None) -> None:
        self.path = path
        self.name = "standard output" if path is None else path
        self._partial: Path | None = None
        try:
            if path is None:
                self._stream: IO[str] = open(sys.stdout.fileno(), "w", _BUFFER, encoding="utf-8", closefd=False)  # noqa: SIM115
            else:
                self._partial = Path(path).with_name(f".{Path(path).name}.{os.getpid()}.partial")
                if Path(path).is_dir():
                    raise OutputError(f"{path}: is a directory")
                self._stream = self._partial.open("w", _BUFFER, encoding="utf-8")
        except (OSError, ValueError) as error:
            raise OutputError(f"{self.name}: {_cause(error)}") from None
        self._put = self._stream.write

    def write(self, text: str) -> None:
        """Write text. Raises OutputError."""
        try:
            self._put(text)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise OutputError(f"{self.name}: {_cause(error)}") from None

    def __enter__(self) -> Output:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self._stream.close()
            if self._partial is not None and kind is None:
                assert self.path is not None, "a partial file has a final name"
                self._partial.replace(self.path)
                self._partial = None
        except BrokenPipeError:
            if kind is None:
                raise
        except OSError as problem:
            if kind is None:
                raise OutputError(f"{self.name}: {_cause(problem)}") from None
        finally:
            if self._partial is not None:
                self._partial.unlink(missing_ok=True)


def _cause(error: Exception) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)
