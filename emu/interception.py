"""Before which instructions of a page an engine stops: those that the machine executes itself, and PAUSE where it is asked to."""

from __future__ import annotations

import re

from emu.privileged_opcodes import MAX_LENGTH, PrivilegedInstruction, candidates, recognise

# PAUSE (SDM vol. 2B): F3 90, other prefixes anywhere before the opcode; with REX.B it would be XCHG.
_LEGACY = rb"[\x66\x67\xf2\x2e\x36\x3e\x26\x64\x65]{0,12}"
_PAUSE = re.compile(rb"(?=(" + _LEGACY + rb"\xf3" + _LEGACY + rb"[\x40\x42\x44\x46\x48\x4a\x4c\x4e]?\x90))")


def stops(code: bytes) -> PrivilegedInstruction | None:
    """The instruction that `code` starts with if it is the machine's to execute.

    Every page-fault handler reads CR2, and 16 us are a quarter of its time: the engine has the value and does that itself.
    """
    found = recognise(code)
    if found is not None and found.name == "mov_from_cr" and found.reg == 2 and 0xF0 not in found.prefixes:
        return None
    return found


def behind_pause(code: bytes) -> int | None:
    """Length of the PAUSE that `code` starts with, None if it is another instruction."""
    found = _PAUSE.match(code)
    return None if found is None else found.end(1)


def stop_offsets(page: bytes, *, pause: bool) -> list[int]:
    """Offsets in a page at which an instruction may start that is to be stopped before; `pause` says whether PAUSE is one."""
    offsets = [
        offset for offset in candidates(page) if offset > len(page) - MAX_LENGTH or stops(page[offset : offset + MAX_LENGTH])
    ]
    return offsets + [found.start() for found in _PAUSE.finditer(page)] if pause else offsets
