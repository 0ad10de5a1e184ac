"""__bug_table rows."""

from __future__ import annotations

import struct

from emu.kernel.bug_table import BugFlag, parse_bug_table

LA = 0xFFFF_FFFF_C000_2000


def row(offset: int, instruction: int, file: int, line: int, flags: int) -> bytes:
    """One row at LA + offset for the instruction and file name at these addresses."""
    return struct.pack("<iiHH", instruction - (LA + offset), file - (LA + offset + 4), line, flags)


def strings(la: int) -> str | None:
    """A file name at 0x100 past LA, none elsewhere."""
    return "guest.c" if la == LA + 0x100 else None


def test_distances_are_from_the_fields_own_addresses() -> None:
    table = parse_bug_table(LA, row(0, LA - 0x1000, LA + 0x100, 12, 0) + row(12, LA - 0xFF0, LA + 0x100, 13, 0), strings)
    assert {ip: (entry.file, entry.line) for ip, entry in table.items()} == {
        LA - 0x1000: ("guest.c", 12), LA - 0xFF0: ("guest.c", 13),
    }


def test_flags_tell_bug_from_warning_and_once() -> None:
    flags = (0, BugFlag.WARNING, BugFlag.WARNING | BugFlag.ONCE, BugFlag.WARNING | BugFlag.NO_CUT_HERE | 9 << 8)
    data = b"".join(row(12 * n, LA - 0x100 + n, LA + 0x100, 1, flag) for n, flag in enumerate(flags))
    entries = parse_bug_table(LA, data, strings).values()
    assert [(e.warning, e.once, e.cut_here) for e in entries] == [
        (False, False, True), (True, False, True), (True, True, True), (True, False, False),
    ]


def test_a_file_name_that_cannot_be_read_leaves_the_place_out() -> None:
    (entry,) = parse_bug_table(LA, row(0, LA - 0x1000, LA + 0x500, 12, 0), strings).values()
    assert (entry.file, entry.line) == ("", 0)


def test_a_row_that_is_cut_off_is_none() -> None:
    assert parse_bug_table(LA, row(0, LA, LA, 1, 0)[:11], strings) == {}
