"""Relocatable x86-64 ELF objects (ET_REL) as guests: ELF-64 object file format 1.5 and the x86-64 psABI 4.4.

Every field is checked against the file before it is used, in one pass over fixed-size records, so a hostile file costs no more
than a good one of its size. (pyelftools costs 48 ms to import and trusts the fields; the tests read the same files with it.)
"""

from __future__ import annotations

import itertools
import struct
from dataclasses import dataclass

from emu.guest.error import GuestError
from emu.guest.program import (
    MAX_ALIGN,
    MAX_SECTION_SIZE,
    Program,
    Relocation,
    RelocationType,
    Section,
    SectionKind,
    Symbol,
    align_up,
    find_entry,
)

MAX_FILE_SIZE = 32 << 20
MAX_SECTIONS = 4096
MAX_SYMBOLS = 1 << 18
MAX_RELOCATIONS = 1 << 18

_EM_X86_64, _ET_REL = 62, 1
_SHF_WRITE, _SHF_ALLOC, _SHF_EXECINSTR, _SHF_TLS = 1, 2, 4, 0x400
_SHT_SYMTAB, _SHT_STRTAB, _SHT_RELA, _SHT_NOBITS, _SHT_REL, _SHT_SYMTAB_SHNDX = 2, 3, 4, 8, 9, 18
_SHN_UNDEF, _SHN_LORESERVE, _SHN_ABS, _SHN_COMMON = 0, 0xFF00, 0xFFF1, 0xFFF2
_STB_LOCAL, _STB_GLOBAL, _STB_WEAK = 0, 1, 2
_STT_SECTION, _STT_TLS, _STT_GNU_IFUNC = 3, 6, 10
_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SECTION_HEADER = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
_RELA = struct.Struct("<QQq")
# Allocated sections that speak to tools or loaders and not to the program: with them goes what refers to them.
_UNUSED = (".note", ".modinfo", ".eh_frame", "__mcount_loc", ".retpoline_sites", ".return_sites", ".call_sites", "__versions")
_COMMON_SECTION = ".bss.common"


@dataclass(frozen=True, slots=True)
class _Header:
    """A section header, named."""

    name: str
    type: int
    flags: int
    offset: int
    size: int
    link: int
    info: int
    align: int
    entry_size: int


def read_object(data: bytes, path: str) -> Program:
    """The program in a .o file. `path` is for messages. Raises GuestError only."""
    return _Reader(data, path).program()


class _Reader:
    def __init__(self, data: bytes, path: str) -> None:
        self.data = data
        self.path = path
        self.headers: list[_Header] = []
        self.sections: list[Section] = []
        # File section number -> number in self.sections, for those that are loaded.
        self.loaded: dict[int, int] = {}
        self.common_size = 0
        self.common_align = 1
        self.symbol_table = 0

    def program(self) -> Program:
        self._read_headers()
        self._load_sections()
        symbols = self._read_symbols()
        relocations = self._read_relocations(len(symbols))
        if self.common_size:
            self.sections.append(
                Section(_COMMON_SECTION, SectionKind.BSS, b"", self.common_size, self.common_align)
            )
        used = tuple(symbols)
        entry = find_entry(self.path, used, tuple(self.sections))
        return Program(self.path, tuple(self.sections), used, tuple(relocations), entry)

    def _bad(self, message: str) -> GuestError:
        return GuestError(self.path, 0, message)

    def _read_headers(self) -> None:
        data = self.data
        if len(data) > MAX_FILE_SIZE:
            raise self._bad(f"object file of {len(data)} bytes exceeds {MAX_FILE_SIZE >> 20} MiB")
        if data[:4] != b"\x7fELF":
            raise self._bad("not an ELF file")
        if len(data) < _HEADER.size:
            raise self._bad(f"truncated: {len(data)} bytes do not hold the ELF header of {_HEADER.size}")
        header = _HEADER.unpack_from(data)
        ident, kind, machine = header[0], header[1], header[2]
        shoff, shentsize, shnum, shstrndx = header[6], header[11], header[12], header[13]
        if ident[4] != 2:
            raise self._bad(f"ELF class {ident[4]} is not 2 (64-bit)")
        if ident[5] != 1:
            raise self._bad(f"ELF data encoding {ident[5]} is not 1 (little-endian)")
        if ident[6] != 1 or header[3] != 1:
            raise self._bad(f"ELF version {ident[6]}/{header[3]} is not 1")
        if machine != _EM_X86_64:
            raise self._bad(f"ELF machine {machine} is not {_EM_X86_64} (x86-64)")
        if kind != _ET_REL:
            raise self._bad(f"ELF type {kind} is not {_ET_REL} (relocatable object)")
        if shentsize != _SECTION_HEADER.size:
            raise self._bad(f"section header size {shentsize} is not {_SECTION_HEADER.size}")
        if not 1 <= shnum <= MAX_SECTIONS:
            raise self._bad(f"number of sections {shnum} is not within 1 to {MAX_SECTIONS}")
        if shoff < _HEADER.size or shoff + shnum * shentsize > len(data):
            raise self._bad(f"section headers at {shoff:#x} (truncated file of {len(data):#x} bytes?) lie outside the file")
        if shstrndx >= shnum:
            raise self._bad(f"section name table {shstrndx} is not among {shnum} sections")
        raw = [_SECTION_HEADER.unpack_from(data, shoff + n * shentsize) for n in range(shnum)]
        names = self._extent(raw[shstrndx], f"section name table {shstrndx}")
        for number, record in enumerate(raw):
            name = self._string(names, record[0], f"name of section {number}")
            self.headers.append(_Header(name, record[1], record[2], *record[4:]))
            if number and record[1] != _SHT_NOBITS:
                self._extent(record, f"section {number} ({name})")

    def _extent(self, record: tuple[int, ...], what: str) -> bytes:
        offset, size = record[4], record[5]
        if record[1] == 0:
            return b""
        if offset > len(self.data) or size > len(self.data) - offset:
            raise self._bad(f"{what} at {offset:#x}, {size:#x} bytes, lies outside the file of {len(self.data):#x} bytes")
        return self.data[offset : offset + size]

    def _string(self, table: bytes, offset: int, what: str) -> str:
        end = table.find(b"\0", offset)
        if offset >= len(table) or end < 0:
            if offset == 0 and not table:
                return ""
            raise self._bad(f"{what}: string {offset:#x} lies outside its table of {len(table):#x} bytes")
        if end - offset > 512:
            raise self._bad(f"{what} is longer than 512 characters")
        try:
            return table[offset:end].decode("utf-8")
        except UnicodeDecodeError:
            raise self._bad(f"{what} is not UTF-8") from None

    def _contents(self, number: int) -> bytes:
        header = self.headers[number]
        return self.data[header.offset : header.offset + header.size]

    def _load_sections(self) -> None:
        spans: list[tuple[int, int, str]] = []
        total = 0
        for number, header in enumerate(self.headers):
            if not header.flags & _SHF_ALLOC or header.name.startswith(_UNUSED) or number == 0:
                continue
            align = header.align or 1
            if align & (align - 1) or align > MAX_ALIGN:
                raise self._bad(f"section {header.name}: alignment {align:#x} is not a power of two up to {MAX_ALIGN}")
            total += header.size
            if header.size > MAX_SECTION_SIZE or total > MAX_SECTION_SIZE:
                raise self._bad(f"section {header.name}: size {header.size:#x} exceeds {MAX_SECTION_SIZE >> 20} MiB")
            if header.flags & _SHF_TLS:
                raise self._bad(f"section {header.name}: thread-local storage is not supported")
            kind = self._kind(header)
            if header.type != _SHT_NOBITS and header.size:
                spans.append((header.offset, header.offset + header.size, header.name))
            data = b"" if kind is SectionKind.BSS else self._bytes_of(header)
            self.loaded[number] = len(self.sections)
            self.sections.append(Section(header.name, kind, data, header.size, align))
        spans.sort()
        for (_, end, name), (start, _, other) in itertools.pairwise(spans):
            if start < end:
                raise self._bad(f"sections {name} and {other} overlap in the file")

    def _bytes_of(self, header: _Header) -> bytes:
        if header.type == _SHT_NOBITS:
            return bytes(header.size)
        return self.data[header.offset : header.offset + header.size]

    def _kind(self, header: _Header) -> SectionKind:
        if header.flags & _SHF_EXECINSTR:
            if header.flags & _SHF_WRITE:
                raise self._bad(f"section {header.name} is both writable and executable")
            return SectionKind.TEXT
        if header.name == ".data..ro_after_init":
            return SectionKind.RO_AFTER_INIT
        if not header.flags & _SHF_WRITE:
            return SectionKind.RODATA
        return SectionKind.BSS if header.type == _SHT_NOBITS else SectionKind.DATA

    def _read_symbols(self) -> list[Symbol]:
        tables = [n for n, h in enumerate(self.headers) if h.type == _SHT_SYMTAB]
        if len(tables) != 1:
            raise self._bad(f"{len(tables)} symbol tables instead of 1")
        if any(h.type == _SHT_SYMTAB_SHNDX for h in self.headers):
            raise self._bad("extended section indexes are not supported")
        header = self.headers[tables[0]]
        if header.entry_size != _SYMBOL.size or header.size % _SYMBOL.size:
            raise self._bad(f"symbol table: {header.size:#x} bytes of entries of {header.entry_size} (they have {_SYMBOL.size})")
        if header.size // _SYMBOL.size > MAX_SYMBOLS:
            raise self._bad(f"symbol table: more than {MAX_SYMBOLS} symbols")
        if not 0 < header.link < len(self.headers) or self.headers[header.link].type != _SHT_STRTAB:
            raise self._bad(f"symbol table: section {header.link} is not its string table")
        self.symbol_table = tables[0]
        strings = self._contents(header.link)
        symbols: list[Symbol] = []
        defined: set[str] = set()
        for number, record in enumerate(_SYMBOL.iter_unpack(self._contents(tables[0]))):
            symbol = self._symbol(number, record, strings)
            is_global = record[1] >> 4 != _STB_LOCAL
            if is_global and symbol.defined and symbol.name in defined:
                raise self._bad(f"symbol {symbol.name} is defined twice")
            if is_global and symbol.defined:
                defined.add(symbol.name)
            symbols.append(symbol)
        return symbols

    def _symbol(self, number: int, record: tuple[int, int, int, int, int, int], strings: bytes) -> Symbol:
        name_offset, info, _, section, value, size = record
        name = self._string(strings, name_offset, f"name of symbol {number}")
        what = f"symbol {number} ({name})" if name else f"symbol {number}"
        binding, kind = info >> 4, info & 15
        if binding not in (_STB_LOCAL, _STB_GLOBAL, _STB_WEAK):
            raise self._bad(f"{what}: binding {binding} is not supported")
        if kind in (_STT_TLS, _STT_GNU_IFUNC):
            raise self._bad(f"{what}: type {kind} is not supported")
        weak = binding == _STB_WEAK
        if section == _SHN_UNDEF:
            # The reserved first entry stands for "no symbol", which has the value 0.
            return Symbol(name, None, 0, weak, absolute=number == 0)
        if section == _SHN_ABS:
            return Symbol(name, None, value, weak, absolute=True)
        if section == _SHN_COMMON:
            return self._common(what, name, value, size)
        if section >= _SHN_LORESERVE or section >= len(self.headers):
            raise self._bad(f"{what}: section {section} is not among {len(self.headers)} sections")
        if section not in self.loaded:
            # It is only named by sections that are not loaded either.
            return Symbol("", None, 0, absolute=True)
        inside = self.sections[self.loaded[section]]
        if value > inside.size or size > inside.size - value:
            raise self._bad(f"{what}: [{value:#x}, {value + size:#x}) lies outside section {inside.name} of {inside.size:#x} bytes")
        return Symbol("" if kind == _STT_SECTION else name, self.loaded[section], value, weak)

    def _common(self, what: str, name: str, align: int, size: int) -> Symbol:
        if align < 1 or align & (align - 1) or align > MAX_ALIGN:
            raise self._bad(f"{what}: alignment {align:#x} is not a power of two up to {MAX_ALIGN}")
        if size > MAX_SECTION_SIZE:
            raise self._bad(f"{what}: size {size:#x} exceeds {MAX_SECTION_SIZE >> 20} MiB")
        offset = align_up(self.common_size, align)
        self.common_size = offset + max(size, 1)
        self.common_align = max(self.common_align, align)
        if self.common_size > MAX_SECTION_SIZE:
            raise self._bad(f"common symbols exceed {MAX_SECTION_SIZE >> 20} MiB")
        return Symbol(name, len(self.sections), offset)

    def _read_relocations(self, nr_symbols: int) -> list[Relocation]:
        relocations: list[Relocation] = []
        for number, header in enumerate(self.headers):
            if header.type == _SHT_REL and header.info in self.loaded:
                raise self._bad(f"section {header.name}: relocations without addend are not used on x86-64")
            if header.type != _SHT_RELA:
                continue
            if not 0 < header.info < len(self.headers):
                raise self._bad(f"section {header.name}: its target {header.info} is not among {len(self.headers)} sections")
            if header.info not in self.loaded:
                continue
            if header.link != self.symbol_table:
                raise self._bad(f"section {header.name}: section {header.link} is not the symbol table")
            if header.entry_size != _RELA.size or header.size % _RELA.size:
                raise self._bad(f"section {header.name}: {header.size:#x} bytes of entries of {header.entry_size}")
            if len(relocations) + header.size // _RELA.size > MAX_RELOCATIONS:
                raise self._bad(f"more than {MAX_RELOCATIONS} relocations")
            target = self.loaded[header.info]
            for entry, record in enumerate(_RELA.iter_unpack(self._contents(number))):
                relocations.append(self._relocation(f"{header.name}[{entry}]", target, record, nr_symbols))
        return relocations

    def _relocation(self, what: str, target: int, record: tuple[int, int, int], nr_symbols: int) -> Relocation:
        offset, info, addend = record
        try:
            kind = RelocationType(info & 0xFFFFFFFF)
        except ValueError:
            raise self._bad(f"{what}: relocation type {info & 0xFFFFFFFF} is not supported") from None
        if info >> 32 >= nr_symbols:
            raise self._bad(f"{what}: symbol {info >> 32} is not among {nr_symbols} symbols")
        section = self.sections[target]
        if section.kind is SectionKind.BSS:
            raise self._bad(f"{what}: relocation in {section.name}, which holds no bytes")
        if offset > section.size or kind.size > section.size - offset:
            raise self._bad(f"{what}: offset {offset:#x} lies outside section {section.name} of {section.size:#x} bytes")
        return Relocation(target, offset, kind, info >> 32, addend)
