"""The areas around an address, drawn to scale in a line of text."""

from __future__ import annotations

from dataclasses import dataclass

from emu.kernel.kernel import Kernel
from emu.kernel.layout import PAGE_SIZE
from emu.kernel.vm_struct import VmStruct

COLUMNS = 64
# How much of a neighbour, and of nothing on either side, is drawn.
_MARGIN = 16 * PAGE_SIZE
_MIXED = "+"
_KINDS = {"#": "area", "g": "guard page", "~": "freed, not purged yet", ".": "unallocated", _MIXED: "several of these"}


@dataclass(frozen=True, slots=True)
class _Piece:
    """A busy or lazily freed area: [start, end) with its guard page from `guard` on, and a line about it."""

    start: int
    guard: int
    end: int
    kind: str
    text: str


def area_map(kernel: Kernel, la: int) -> list[str]:
    """Lines that show what lies where around `la`; none outside of vmalloc and module space."""
    if not (kernel.layout.is_vmalloc_addr(la) or kernel.layout.is_module_addr(la)):
        return []
    pieces = _pieces(kernel)
    here = next((piece for piece in pieces if piece.start <= la < piece.end), None)
    page = la & -PAGE_SIZE
    low, high = (here.start, here.end) if here is not None else (page, page + PAGE_SIZE)
    low, high = max(0, low - _MARGIN), high + _MARGIN
    column = -(-(high - low) // (COLUMNS * PAGE_SIZE)) * PAGE_SIZE
    columns = -(-(high - low) // column)
    bar = "".join(_column(pieces, low + n * column, low + (n + 1) * column) for n in range(columns))
    begin = f"{low:016x} |"
    lines = [
        f"{begin}{bar}| {low + columns * column:016x}",
        f"{' ' * (len(begin) + (la - low) // column)}^ {la:x}, a column is {column >> 10} KiB",
        ", ".join(f"{mark} {_KINDS[mark]}" for mark in _KINDS if mark in bar),
    ]
    shown = [piece for piece in pieces if piece.start < high and piece.end > low]
    return lines + [f"{'->' if piece is here else '  '} {piece.start:016x}-{piece.end:016x} {piece.text}" for piece in shown]


def _pieces(kernel: Kernel) -> list[_Piece]:
    pieces = []
    for node in kernel.vmalloc.nodes.nodes:
        for va in node.busy:
            guard, text = va.va_end, "vm_map_ram"
            if isinstance(va.vm, VmStruct):
                guard = va.va_start + va.vm.get_vm_area_size()
                pages = va.vm.get_vm_area_size() // PAGE_SIZE
                text = f"{pages} page{'' if pages == 1 else 's'} by {kernel.symbol_text(va.vm.caller)}"
            pieces.append(_Piece(va.va_start, guard, va.va_end, "#", text))
        for va in node.lazy:
            pieces.append(_Piece(va.va_start, va.va_end, va.va_end, "~", _KINDS["~"]))
    return sorted(pieces, key=lambda piece: piece.start)


def _column(pieces: list[_Piece], start: int, end: int) -> str:
    kinds = set()
    covered = 0
    for piece in pieces:
        for low, high, kind in ((piece.start, piece.guard, piece.kind), (piece.guard, piece.end, "g")):
            size = min(high, end) - max(low, start)
            if size > 0:
                kinds.add(kind)
                covered += size
    if covered < end - start:
        kinds.add(".")
    return kinds.pop() if len(kinds) == 1 else _MIXED
