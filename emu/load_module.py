"""Loading a guest program as a kernel module: its areas, symbols and __bug_table."""

from __future__ import annotations

from collections.abc import Callable

from emu.guest.error import GuestError
from emu.guest.link import Linked, link
from emu.guest.program import Program, SectionKind
from emu.kernel.bug_table import parse_bug_table
from emu.kernel.kernel import Kernel
from emu.kernel.module import DATA, RO_AFTER_INIT, RODATA, TEXT, Module
from emu.kernel.traps import BugEntry

# Padding in front of a module's first function, as CONFIG_CALL_PADDING has it; an oops shows 42 bytes of code before RIP.
_TEXT_HEADROOM = 64
_NOP = b"\x90"
_PART_OF = {
    SectionKind.TEXT: TEXT, SectionKind.RODATA: RODATA, SectionKind.RO_AFTER_INIT: RO_AFTER_INIT, SectionKind.DATA: DATA,
    SectionKind.BSS: DATA,
}


def load_module(program: Program, kernel: Kernel, write: Callable[[int, bytes], None]) -> tuple[Module, Linked]:
    """Allocate a program's areas, link, write by `write(la, data)`, protect. Raises GuestError."""
    sizes: dict[str, int] = {}
    offsets: dict[SectionKind, int] = {}
    for kind, area in program.areas().items():
        part = _PART_OF[kind]
        start = sizes.get(part, _TEXT_HEADROOM if part == TEXT else 0)
        offsets[kind] = start + area.align - 1 & -area.align
        sizes[part] = offsets[kind] + area.size
    name = module_name(program.path)
    module = kernel.module_loader.load(name, sizes, kernel.symbol("load_module") + 1)
    if module is None:
        raise GuestError(program.path, 0, f"no memory for the module: {sum(sizes.values()):#x} bytes")
    bases: dict[SectionKind | str, int] = {}
    for kind, offset in offsets.items():
        part_of = module.part(_PART_OF[kind])
        assert part_of is not None
        bases[kind] = part_of.la + offset
    try:
        linked = link(program, bases, kernel.symbols.exported_address)
    except GuestError:
        kernel.module_loader.unload(module)
        raise
    for la, data in linked.images.values():
        write(la, data)
    text = module.part(TEXT)
    if text is not None:
        write(text.la, _NOP * _TEXT_HEADROOM)
    if kernel.module_loader.protect(module):
        raise GuestError(program.path, 0, "no memory to protect the module's text")
    kernel.add_module(module, _module_symbols(linked), _bug_table(linked))
    return module, linked


def module_name(path: str) -> str:
    """The module name of a guest file: its name without directory and endings."""
    name = path.replace("\\", "/").rpartition("/")[2].partition(".")[0]
    return "".join(c if c.isalnum() else "_" for c in name) or "guest"


def _module_symbols(linked: Linked) -> list[tuple[str, int, int]]:
    """(name, address, size) of a guest's symbols; a symbol reaches to the next one in its section, or to the section's end."""
    symbols = []
    for start, data in linked.images.values():
        inside = sorted((la, name) for name, la in linked.symbols.items() if start <= la < start + len(data))
        for n, (la, name) in enumerate(inside):
            end = next((other for other, _ in inside[n + 1 :] if other > la), start + len(data))
            symbols.append((name, la, end - la))
    return symbols


def _bug_table(linked: Linked) -> dict[int, BugEntry]:
    def read_string(la: int) -> str | None:
        where = linked.where(la)
        if where is None:
            return None
        name, offset = where
        return linked.images[name][1][offset:].partition(b"\0")[0].decode("latin-1")

    if "__bug_table" not in linked.images:
        return {}
    return parse_bug_table(*linked.images["__bug_table"], read_string)
