"""The one error of the guest loaders."""

from __future__ import annotations


class GuestError(Exception):
    """A guest's source or object file that cannot be used, with the place in it: str is "path:line: message".

    `line` counts from 1; 0 means the file as a whole and is left out of the text.
    """

    def __init__(self, path: str, line: int, message: str) -> None:
        super().__init__(f"{path}:{line}: {message}" if line else f"{path}: {message}")
        self.path = path
        self.line = line
        self.message = message
