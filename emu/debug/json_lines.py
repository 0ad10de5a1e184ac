"""A trace as JSON lines: a record a line, its kind under `type`. docs/trace.md describes it, `vmemu trace --schema` prints it."""

from __future__ import annotations

import json
from collections.abc import Callable

import msgspec

from emu.debug.records import AnyRecord


class JsonWriter:
    """Gives `write` a line for each record, newline included."""

    def __init__(self, write: Callable[[str], object]) -> None:
        self._write = write
        self._encode = msgspec.json.Encoder().encode

    def __call__(self, record: AnyRecord) -> None:
        """Write a record."""
        self._write(f"{self._encode(record).decode()}\n")

    def close(self) -> None:
        """Nothing is left to write."""


def schema() -> str:
    """The JSON Schema (draft 2020-12) of a line."""
    return json.dumps(msgspec.json.schema(AnyRecord), indent=2)
