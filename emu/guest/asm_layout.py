"""Lay out assembled sections: an offset for every item, then symbols, relocations and patched bytes."""

from __future__ import annotations

from dataclasses import dataclass, field

from emu.guest.asm_encode import Encoded, Fixup, Instruction
from emu.guest.error import GuestError
from emu.guest.program import ENTRY_NAMES, Program, Relocation, RelocationType, Section, SectionKind, Symbol, align_up

NOP = b"\x90"


@dataclass(frozen=True, slots=True)
class Align:
    """Fill with no-operations up to a multiple of `align`."""

    align: int


# An int is so many zero bytes.
Item = Instruction | Encoded | Align | int


@dataclass(slots=True)
class OpenSection:
    """A section being written. `offset` is valid outside .text; in .text a place is the number of its item."""

    name: str
    kind: SectionKind
    align: int
    items: list[tuple[int, Item]] = field(default_factory=list)
    offset: int = 0

    @property
    def place(self) -> int:
        """Where the next item goes."""
        return len(self.items) if self.kind is SectionKind.TEXT else self.offset


class Layout:
    """Offsets for every item, then symbols, relocations and patched bytes. `program` raises GuestError."""

    def __init__(
        self, path: str, sections: list[OpenSection], labels: dict[str, tuple[OpenSection, int]], first_label: str | None
    ) -> None:
        self.path = path
        self.open = sections
        self.labels = labels
        self.first_label = first_label
        self.number = {s.name: n for n, s in enumerate(sections)}
        self.offsets = [self._offsets(s) for s in sections]
        used = {section.name for section, _ in labels.values()} | {".text"}
        self.kept = [n for n, s in enumerate(sections) if s.name in used or self._size(n)]
        self.index = {old: new for new, old in enumerate(self.kept)}
        self.symbols: list[Symbol] = []
        self.by_name: dict[str, int] = {}
        self.relocations: list[Relocation] = []

    @staticmethod
    def _offsets(section: OpenSection) -> list[int]:
        offsets, offset = [], 0
        for _, item in section.items:
            if isinstance(item, Align):
                offset = align_up(offset, item.align)
            offsets.append(offset)
            offset += len(item.data) if isinstance(item, Encoded) else item if isinstance(item, int) else 0
        offsets.append(offset)
        return offsets

    def _size(self, number: int) -> int:
        section = self.open[number]
        return section.offset if section.kind is SectionKind.BSS else self.offsets[number][-1]

    def _place(self, name: str) -> tuple[int, int]:
        section, place = self.labels[name]
        number = self.number[section.name]
        return number, self.offsets[number][place] if section.kind is SectionKind.TEXT else place

    def program(self) -> Program:
        """The finished program, without directives."""
        for name in self.labels:
            if not name.startswith("$@"):
                place, offset = self._place(name)
                self._symbol(Symbol(name, self.index[place], offset))
        entry = self._entry()
        sections: list[Section] = []
        lines: list[tuple[int, int, int]] = []
        for number in self.kept:
            section = self.open[number]
            data = self._bytes(number)
            size = self._size(number)
            sections.append(Section(section.name, section.kind, data, size, section.align))
            lines += [
                (self.index[number], offset, line)
                for (line, item), offset in zip(section.items, self.offsets[number], strict=False)
                if isinstance(item, Encoded) and item.data
            ]
        return Program(
            self.path, tuple(sections), tuple(self.symbols), tuple(self.relocations), entry, lines=tuple(lines)
        )

    def _symbol(self, symbol: Symbol) -> int:
        if symbol.name not in self.by_name:
            self.by_name[symbol.name] = len(self.symbols)
            self.symbols.append(symbol)
        return self.by_name[symbol.name]

    def _entry(self) -> int:
        if not self.offsets[0][-1]:
            raise GuestError(self.path, 0, "the program has no instructions")
        for name in (*ENTRY_NAMES, self.first_label):
            if name in self.labels and name is not None:
                if self.labels[name][0].kind is not SectionKind.TEXT:
                    raise GuestError(self.path, 0, f"entry {name} is not in .text")
                return self.by_name[name]
        return self._symbol(Symbol("_start", 0, 0))

    def _bytes(self, number: int) -> bytes:
        section = self.open[number]
        data = bytearray()
        fill = NOP if section.kind is SectionKind.TEXT else b"\0"
        if section.kind is SectionKind.BSS:
            return b""
        for (line, item), offset in zip(section.items, self.offsets[number], strict=False):
            data += fill * (offset - len(data))
            if isinstance(item, Encoded):
                data += item.data
                for fixup in item.fixups:
                    self._fix(data, number, offset, fixup, line)
            elif isinstance(item, int):
                data += bytes(item)
        return bytes(data)

    def _fix(self, data: bytearray, number: int, start: int, fixup: Fixup, line: int) -> None:
        at = start + fixup.offset
        relative = fixup.type in (RelocationType.PC32, RelocationType.PLT32)
        labels = self.labels
        pair = fixup.value.difference()
        single = fixup.value.single()
        if pair is not None:
            for name in pair:
                if name not in labels:
                    raise GuestError(self.path, line, f"undefined symbol: {name} (in a difference)")
            (first, high), (second, low) = self._place(pair[0]), self._place(pair[1])
            if first != second or relative:
                raise GuestError(self.path, line, f"{pair[0]} - {pair[1]} is not a constant: the labels are in different sections")
            self._patch(data, at, fixup, fixup.value.constant + high - low, line)
            return
        if fixup.value.is_constant and not relative:
            self._patch(data, at, fixup, fixup.value.constant, line)
            return
        if single is None:
            raise GuestError(self.path, line, "an address is one symbol + constant or a difference of two labels")
        addend = fixup.value.constant + fixup.bias
        if relative and single in labels and self._place(single)[0] == number:
            self._patch(data, at, fixup, self._place(single)[1] + addend - at, line)
            return
        if fixup.size == 1:
            raise GuestError(self.path, line, f"{single} is not a label of this section, which a short branch needs")
        if single.startswith("$@"):
            section, offset = self._place(single)
            symbol = self._symbol(Symbol(f"{self.open[section].name}$", self.index[section], 0))
            addend += offset
        else:
            symbol = self._symbol(Symbol(single, None, 0))
        self.relocations.append(Relocation(self.index[number], at, fixup.type, symbol, addend))

    def _patch(self, data: bytearray, at: int, fixup: Fixup, value: int, line: int) -> None:
        bits = 8 * fixup.size
        low, high = -(1 << bits - 1), 1 << (bits if fixup.type is RelocationType.R32 else bits - 1)
        if not low <= value < high:
            raise GuestError(self.path, line, f"{value:#x} does not fit the {bits} bits of the operand or branch")
        data[at : at + fixup.size] = (value & (1 << bits) - 1).to_bytes(fixup.size, "little")
