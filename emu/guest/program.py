"""An unlinked guest image: sections, symbols and relocations, whatever the source was written in.

Loaders (asm, cc, elf) make a `Program`; link.py places it. The section kinds are the areas into which v6.12's module loader
splits a module (v6.12 include/linux/module.h: enum mod_mem_type), with .bss apart because it needs no bytes.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum, StrEnum

from emu.guest.directives import Directives
from emu.guest.error import GuestError

# A guest is a small program: more than this in one section is a mistake or an attack, not a guest.
MAX_SECTION_SIZE = 16 << 20
MAX_ALIGN = 4096
NO_DIRECTIVES = Directives()

ENTRY_NAMES = ("init_module", "_start")


class SectionKind(StrEnum):
    """Which memory a section goes to, in load order."""

    TEXT = "text"
    RODATA = "rodata"
    RO_AFTER_INIT = "ro_after_init"
    DATA = "data"
    BSS = "bss"


class RelocationType(IntEnum):
    """x86-64 psABI table 4.9, the types that code built for the kernel's code model uses."""

    NONE = 0
    R64 = 1
    PC32 = 2
    PLT32 = 4
    R32 = 10
    R32S = 11
    PC64 = 24

    @property
    def size(self) -> int:
        """Bytes that the relocation patches."""
        return _RELOCATION_SIZE[self]


_RELOCATION_SIZE = {
    RelocationType.NONE: 0,
    RelocationType.R64: 8,
    RelocationType.PC32: 4,
    RelocationType.PLT32: 4,
    RelocationType.R32: 4,
    RelocationType.R32S: 4,
    RelocationType.PC64: 8,
}


@dataclass(frozen=True, slots=True)
class Section:
    """Bytes (none for BSS) that stay together; `size` bytes at a multiple of `align`."""

    name: str
    kind: SectionKind
    data: bytes
    size: int
    align: int


@dataclass(frozen=True, slots=True)
class Symbol:
    """A name for `section` (index) + `offset`; undefined when `section` is None, unless `absolute` gives its value in `offset`."""

    name: str
    section: int | None
    offset: int
    weak: bool = False
    absolute: bool = False

    @property
    def defined(self) -> bool:
        """Whether this program itself gives the symbol its address."""
        return self.section is not None or self.absolute


@dataclass(frozen=True, slots=True)
class Relocation:
    """Patch `type` at `section` (index) + `offset` with the address of `symbol` (index) + `addend`."""

    section: int
    offset: int
    type: RelocationType
    symbol: int
    addend: int


@dataclass(frozen=True, slots=True)
class Area:
    """Room for all sections of one kind: `size` bytes at a multiple of `align`."""

    size: int
    align: int


@dataclass(frozen=True, slots=True)
class Program:
    """A guest before it has an address. `lines` is sorted (section index, offset, source line)."""

    path: str
    sections: tuple[Section, ...]
    symbols: tuple[Symbol, ...]
    relocations: tuple[Relocation, ...]
    entry: int
    directives: Directives = NO_DIRECTIVES
    lines: tuple[tuple[int, int, int], ...] = ()

    @property
    def entry_symbol(self) -> Symbol:
        """Where the machine calls the program."""
        return self.symbols[self.entry]

    def symbol(self, name: str) -> Symbol | None:
        """The defined symbol of that name, None when there is none."""
        return next((s for s in self.symbols if s.name == name and s.defined), None)

    def undefined(self) -> tuple[str, ...]:
        """Names that the kernel must resolve, sorted; weak ones may stay unresolved."""
        return tuple(sorted({s.name for s in self.symbols if not s.defined and s.name}))

    def line_at(self, section: int, offset: int) -> int:
        """Source line of the bytes at section + offset; 0 when unknown."""
        at = bisect_right(self.lines, (section, offset, 1 << 60)) - 1
        if at >= 0 and self.lines[at][0] == section:
            return self.lines[at][2]
        return 0

    def placement(self) -> Iterator[tuple[int, Section, int]]:
        """(index, section, offset within its kind's area) of every section, in program order."""
        used = dict.fromkeys(SectionKind, 0)
        for number, section in enumerate(self.sections):
            start = align_up(used[section.kind], section.align)
            used[section.kind] = start + section.size
            yield number, section, start

    def areas(self) -> dict[SectionKind, Area]:
        """The room that each kind needs, for the kinds that hold any bytes."""
        areas: dict[SectionKind, Area] = {}
        for _, section, start in self.placement():
            if section.size:
                before = areas.get(section.kind, Area(0, 1))
                areas[section.kind] = Area(start + section.size, max(before.align, section.align))
        return {kind: areas[kind] for kind in SectionKind if kind in areas}

    def validate(self) -> None:
        """Every index is in range, every offset inside its section, every size consistent."""
        for section in self.sections:
            assert section.align >= 1 and section.align & (section.align - 1) == 0, "alignment is a power of two"
            assert section.kind is SectionKind.BSS or len(section.data) == section.size, "data fills the section"
            assert section.kind is not SectionKind.BSS or not section.data, ".bss holds no bytes"
        for symbol in self.symbols:
            if symbol.section is not None:
                assert 0 <= symbol.section < len(self.sections), "a symbol's section exists"
                assert 0 <= symbol.offset <= self.sections[symbol.section].size, "a symbol points into its section"
        for relocation in self.relocations:
            target = self.sections[relocation.section]
            assert target.kind is not SectionKind.BSS, "nothing to patch in .bss"
            assert 0 <= relocation.offset <= target.size - relocation.type.size, "a relocation lies inside its section"
            assert 0 <= relocation.symbol < len(self.symbols), "a relocation's symbol exists"
        assert self.entry_symbol.section is not None, "the entry is defined"


def align_up(value: int, align: int) -> int:
    """The lowest multiple of `align` (a power of two) that is not below `value`."""
    return value + align - 1 & -align


def find_entry(path: str, symbols: tuple[Symbol, ...], sections: tuple[Section, ...]) -> int:
    """Index of the symbol at which the machine calls the program: init_module, else _start.

    Raises GuestError when neither is defined in a text section.
    """
    for name in ENTRY_NAMES:
        for number, symbol in enumerate(symbols):
            if symbol.name == name and symbol.section is not None:
                if sections[symbol.section].kind is not SectionKind.TEXT:
                    raise GuestError(path, 0, f"entry {name} is not in a text section")
                return number
    raise GuestError(path, 0, "no entry: the program defines neither init_module nor _start")
