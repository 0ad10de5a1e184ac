"""Give a program addresses: resolve its symbols and apply its relocations (x86-64 psABI 4.4, as module loading does them)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from emu.guest.error import GuestError
from emu.guest.program import Program, Relocation, RelocationType, SectionKind, Symbol

MASK64 = (1 << 64) - 1

# A section may itself be called "text"; as a key that word means the kind.
_KIND_VALUES = frozenset(kind.value for kind in SectionKind)


@dataclass(frozen=True, slots=True)
class Linked:
    """A placed program. `images` are (linear address, bytes) of every section that holds bytes, .bss as zeros."""

    images: dict[str, tuple[int, bytes]]
    symbols: dict[str, int]
    entry: int

    def where(self, la: int) -> tuple[str, int] | None:
        """(section, offset) that holds the address, None outside the program."""
        for name, (start, data) in self.images.items():
            if start <= la < start + len(data):
                return name, la - start
        return None


def link(program: Program, addresses: Mapping[SectionKind | str, int], resolve: Callable[[str], int | None]) -> Linked:
    """Place `program` and patch it.

    `addresses` gives the base of each kind's area (see Program.areas) or of a section by its name, which wins;
    `resolve` gives the address of an exported symbol or None. An unresolved weak symbol is 0, as in the module loader.
    Raises GuestError: undefined symbols (all of them, with their users), a relocation that overflows; ValueError when
    `addresses` lacks a kind that the program needs or breaks a section's alignment.
    """
    bases = _bases(program, addresses)
    values = _values(program, bases, resolve)
    patched = [bytearray(s.data) if s.kind is not SectionKind.BSS else bytearray(s.size) for s in program.sections]
    for relocation in program.relocations:
        _apply(program, relocation, bases, values, patched)
    images: dict[str, tuple[int, bytes]] = {}
    for number, section in enumerate(program.sections):
        if section.size:
            name = section.name if section.name not in images else f"{section.name}#{number}"
            images[name] = (bases[number], bytes(patched[number]))
    symbols = {s.name: values[n] for n, s in enumerate(program.symbols) if s.name and s.defined}
    return Linked(images, symbols, values[program.entry])


def _bases(program: Program, addresses: Mapping[SectionKind | str, int]) -> list[int]:
    bases = []
    for _, section, offset in program.placement():
        if section.name in addresses and section.name not in _KIND_VALUES:
            base = addresses[section.name]
        elif section.kind in addresses:
            base = addresses[section.kind] + offset
        elif not section.size:
            base = 0
        else:
            raise ValueError(f"no address for section {section.name} of kind {section.kind.value}")
        if base % section.align and section.size:
            raise ValueError(f"section {section.name} at {base:#x} is not aligned to {section.align}")
        bases.append(base)
    return bases


def _values(program: Program, bases: list[int], resolve: Callable[[str], int | None]) -> list[int]:
    values: list[int] = []
    missing: set[int] = set()
    for number, symbol in enumerate(program.symbols):
        if symbol.section is not None:
            values.append(bases[symbol.section] + symbol.offset & MASK64)
        elif symbol.absolute:
            values.append(symbol.offset & MASK64)
        else:
            value = resolve(symbol.name)
            if value is None and not symbol.weak:
                missing.add(number)
            values.append((value or 0) & MASK64)
    used = {r.symbol for r in program.relocations}
    if missing & used:
        raise _undefined(program, missing & used)
    return values


def _undefined(program: Program, missing: set[int]) -> GuestError:
    users: dict[str, list[str]] = {}
    first_line = 0
    for relocation in program.relocations:
        if relocation.symbol in missing:
            line = program.line_at(relocation.section, relocation.offset)
            first_line = first_line or line
            user = f"line {line}" if line else _user(program, relocation)
            known = users.setdefault(program.symbols[relocation.symbol].name, [])
            if user not in known:
                known.append(user)
    text = "; ".join(f"{name} (used by {', '.join(by[:4])}{', ...' if len(by) > 4 else ''})" for name, by in sorted(users.items()))
    return GuestError(program.path, first_line, f"undefined symbol{'s' if len(users) > 1 else ''}: {text}")


def _user(program: Program, relocation: Relocation) -> str:
    """The function or object around a relocation, as symbol+offset."""
    best: Symbol | None = None
    for symbol in program.symbols:
        before = symbol.section == relocation.section and symbol.name and symbol.offset <= relocation.offset
        if before and (best is None or symbol.offset > best.offset):
            best = symbol
    if best is None:
        return f"{program.sections[relocation.section].name}+{relocation.offset:#x}"
    return f"{best.name}+{relocation.offset - best.offset:#x}"


def _apply(program: Program, relocation: Relocation, bases: list[int], values: list[int], patched: list[bytearray]) -> None:
    kind = relocation.type
    if kind is RelocationType.NONE:
        return
    place = bases[relocation.section] + relocation.offset
    value = values[relocation.symbol] + relocation.addend
    if kind in (RelocationType.PC32, RelocationType.PLT32, RelocationType.PC64):
        value -= place
    signed = (value & MASK64) - ((value & 1 << 63) << 1)
    fits = True
    if kind is RelocationType.R32:
        fits = 0 <= value & MASK64 < 1 << 32
    elif kind.size == 4:
        fits = -(1 << 31) <= signed < 1 << 31
    if not fits:
        name = program.symbols[relocation.symbol].name or "a local symbol"
        raise GuestError(
            program.path,
            program.line_at(relocation.section, relocation.offset),
            f"relocation R_X86_64_{kind.name.removeprefix('R')} against {name} overflows: {signed:#x} at {place:#x} "
            f"({_user(program, relocation)})",
        )
    size = kind.size
    mask = (1 << 8 * size) - 1
    patched[relocation.section][relocation.offset : relocation.offset + size] = (value & mask).to_bytes(size, "little")
