"""Read a guest from a file: .asm, .c, .S or .o."""

from __future__ import annotations

from pathlib import Path

from emu.guest.asm import assemble
from emu.guest.elf import MAX_FILE_SIZE, read_object
from emu.guest.error import GuestError
from emu.guest.program import Program

SUFFIXES = (".asm", ".c", ".S", ".o")
MAX_SOURCE_SIZE = 4 << 20


def load(path: str | Path) -> Program:
    """The program in a file, by the suffix of its name. Raises GuestError only."""
    source = Path(path)
    name = str(path)
    if source.suffix not in SUFFIXES:
        raise GuestError(name, 0, f"{source.suffix or 'a file without suffix'} is not a guest (known: {', '.join(SUFFIXES)})")
    limit = MAX_FILE_SIZE if source.suffix == ".o" else MAX_SOURCE_SIZE
    try:
        if not source.is_file() and source.exists():
            raise GuestError(name, 0, "not a regular file")
        with source.open("rb") as file:
            data = file.read(limit + 1)
    except (OSError, ValueError) as problem:
        raise GuestError(name, 0, getattr(problem, "strerror", None) or str(problem)) from None
    if len(data) > limit:
        raise GuestError(name, 0, f"file exceeds {limit >> 20} MiB")
    if source.suffix == ".o":
        return read_object(data, name)
    try:
        text = data.decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as problem:
        raise GuestError(name, data[: problem.start].count(b"\n") + 1, "not UTF-8 text") from None
    if source.suffix == ".asm":
        return assemble(text, name)
    from emu.guest.cc import compile_source

    return compile_source(source, text)
