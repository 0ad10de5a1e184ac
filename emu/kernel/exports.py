"""Kernel symbols: exported functions, other code and data of the kernel image, and the symbols of loaded modules.

An exported function that the model implements in Python is a stub in kernel text: `hlt; ret`. A CPU that reaches it stops
behind the HLT; the stub's address names the function to run; then the CPU returns to its caller. Other code (string
operations, entry points) stands there as real machine code. Addresses go up in the order of registration, 16 bytes apart
at least, so a symbol's size is the distance to the next, as kallsyms has it.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from emu.kernel.init_64 import STATIC_TABLES_SIZE
from emu.kernel.layout import PAGE_SIZE, Layout
from emu.kernel.string_ops import ALIASES, STRING_OPS, THUNKS, machine_code
from emu.memory import Memory

# A kernel function takes its u64 arguments and returns a u64, or None for void.
KernelFunction = Callable[..., int | None]

STUB = bytes.fromhex("f4 c3")
STUB_ALIGN = 16
STUB_PAD = 0xCC
MAX_REGISTER_ARGUMENTS = 6
# _text begins with the entry point; functions come after it (_stext is on the next page here).
FIRST_FUNCTION = PAGE_SIZE


@dataclass(frozen=True, slots=True)
class Symbol:
    """A named range [address, address + size); `module` is None for the kernel itself."""

    name: str
    address: int
    size: int
    module: str | None = None


@dataclass(frozen=True, slots=True)
class Export:
    """An exported function: takes `arguments` u64 and, with `varargs`, a callable next_argument() for the rest.

    `gpl`: EXPORT_SYMBOL_GPL, which a module under another licence cannot link against.
    """

    name: str
    address: int
    function: KernelFunction
    arguments: int
    varargs: bool
    gpl: bool


class KernelSymbols:
    """All symbols of one machine, and the bytes of the kernel's text.

    Raises ValueError when a name is registered twice or the image is full.
    """

    def __init__(self, layout: Layout, memory: Memory) -> None:
        self.layout = layout
        self.memory = memory
        self.exports: dict[int, Export] = {}
        self._next_text = layout.kernel_text + FIRST_FUNCTION
        self._next_data = layout.kernel_data + STATIC_TABLES_SIZE
        self._by_name: dict[str, Symbol] = {}
        self._exported: dict[str, bool] = {}
        self._absolute: dict[str, int] = {}
        self._addresses: list[int] = []
        self._names: dict[int, str] = {}
        self._modules: dict[str, tuple[Symbol, ...]] = {}
        # Untouched text traps, as the padding between real functions does.
        memory.fill(layout.kernel_phys, layout.kernel_rodata - layout.kernel_text, STUB_PAD)
        self._add("_text", layout.kernel_text)
        self._add("_stext", self._next_text)
        self._add("_etext", layout.kernel_rodata)
        self._add("_sdata", layout.kernel_data)
        self._add("_end", layout.kernel_end)

    def _add(self, name: str, address: int) -> None:
        if name in self._by_name:
            raise ValueError(f"kernel symbol {name} is defined twice")
        self._by_name[name] = Symbol(name, address, 0)
        # Of several names for one address the first is the one that is printed.
        if address not in self._names:
            insort(self._addresses, address)
            self._names[address] = name

    # Registration

    def register(
        self, name: str, function: KernelFunction, arguments: int, *, varargs: bool = False, gpl: bool = False
    ) -> int:
        """Export `function` under `name`; returns the stub's address. ValueError for more than six arguments."""
        if not 0 <= arguments <= MAX_REGISTER_ARGUMENTS:
            raise ValueError(f"{name} takes {arguments} arguments; only {MAX_REGISTER_ARGUMENTS} come in registers")
        address = self.add_code(name, STUB, exported=True, gpl=gpl)
        self.exports[address] = Export(name, address, function, arguments, varargs, gpl)
        return address

    def export(
        self, name: str, arguments: int, *, varargs: bool = False, gpl: bool = False
    ) -> Callable[[KernelFunction], KernelFunction]:
        """Decorator form of register."""

        def decorate(function: KernelFunction) -> KernelFunction:
            self.register(name, function, arguments, varargs=varargs, gpl=gpl)
            return function

        return decorate

    def add_code(self, name: str, code: bytes, *, exported: bool = False, gpl: bool = False, align: int = STUB_ALIGN) -> int:
        """Place machine code in kernel text, padded with INT3; returns its address."""
        address = (self._next_text + align - 1) & -align
        end = (address + max(len(code), 1) + STUB_ALIGN - 1) & -STUB_ALIGN
        if end > self.layout.kernel_rodata:
            raise ValueError(f"kernel text is full: {name} does not fit")
        # The first function stands where _stext does, and its own name is the one to print.
        if self._names.get(address) == "_stext":
            del self._names[address]
            self._addresses.remove(address)
        self._add(name, address)
        if exported:
            self._exported[name] = gpl
        self.memory.write(self.layout.pa(address), code)
        self._next_text = end
        return address

    def add_data(self, name: str, size: int, *, align: int = 8, exported: bool = False, gpl: bool = False) -> int:
        """Reserve zeroed bytes in the image's data; returns their address."""
        address = (self._next_data + align - 1) & -align
        if address + size > self.layout.kernel_end:
            raise ValueError(f"kernel data is full: {name} does not fit")
        self._add(name, address)
        if exported:
            self._exported[name] = gpl
        self._next_data = address + size
        return address

    def add_absolute(self, name: str, value: int, *, gpl: bool = False) -> None:
        """Export a number under a name, as per-CPU variables are: what GS adds its base to."""
        self._absolute[name] = value
        self._exported[name] = gpl

    def add_alias(self, alias: str, name: str) -> None:
        """Let a second name stand for a symbol, exported if that is. Raises ValueError for an unknown `name`."""
        address = self.address_of(name)
        self._add(alias, address)
        if name in self._exported:
            self._exported[alias] = self._exported[name]

    def add_string_ops(self) -> None:
        """Place memset, strlen and their kin, and the thunks that compiled modules call."""
        for name, instructions in STRING_OPS.items():
            self.add_code(name, machine_code(instructions), exported=True)
        for name, instructions in THUNKS.items():
            self.add_code(name, machine_code(instructions), exported=True)
        for alias, name in ALIASES.items():
            self.add_alias(alias, name)

    def add_module(self, module: str, symbols: Iterable[tuple[str, int, int]]) -> None:
        """Know a module's symbols, as (name, address, size). Raises ValueError when it is loaded already."""
        if module in self._modules:
            raise ValueError(f"module {module} is loaded already")
        ordered = sorted((Symbol(name, address, size, module) for name, address, size in symbols), key=lambda s: s.address)
        self._modules[module] = tuple(ordered)

    def remove_module(self, module: str) -> None:
        """Forget a module's symbols. Raises ValueError when it is not loaded."""
        if module not in self._modules:
            raise ValueError(f"module {module} is not loaded")
        del self._modules[module]

    # Look-up

    def address_of(self, name: str) -> int:
        """Address of a kernel symbol, exported or not. Raises ValueError for an unknown name."""
        if name not in self._by_name:
            raise ValueError(f"unknown kernel symbol {name}")
        return self._by_name[name].address

    def exported_address(self, name: str, *, gpl: bool = True) -> int | None:
        """What a module links `name` to: None when it is not exported, or only to GPL modules and `gpl` is false."""
        if name not in self._exported or (self._exported[name] and not gpl):
            return None
        return self._absolute[name] if name in self._absolute else self._by_name[name].address

    def exported_names(self) -> tuple[str, ...]:
        """Names a module may link to, sorted."""
        return tuple(sorted(self._exported))

    def find(self, la: int) -> Symbol | None:
        """The symbol that covers `la`, in the kernel image or a module; None where there is none."""
        if self.layout.kernel_text <= la < self.layout.kernel_end:
            i = bisect_right(self._addresses, la) - 1
            address = self._addresses[i]
            end = self._addresses[i + 1] if i + 1 < len(self._addresses) else self.layout.kernel_end
            return Symbol(self._names[address], address, end - address)
        for symbols in self._modules.values():
            for symbol in symbols:
                if symbol.address <= la < symbol.address + symbol.size:
                    return symbol
        return None

    def symbolize(self, la: int) -> str | None:
        """"name+0x1f/0x40", with " [module]" behind a module's; None where no symbol is (v6.12 kernel/kallsyms.c)."""
        symbol = self.find(la)
        if symbol is None:
            return None
        module = f" [{symbol.module}]" if symbol.module else ""
        return f"{symbol.name}+{la - symbol.address:#x}/{symbol.size:#x}{module}"

    def kallsyms(self) -> tuple[Symbol, ...]:
        """Every symbol by address, the kernel's first."""
        image = [self.find(address) for address in self._addresses if address < self.layout.kernel_end]
        modules = [symbol for symbols in self._modules.values() for symbol in symbols]
        return tuple([symbol for symbol in image if symbol is not None] + modules)

    def validate(self) -> None:
        """Stubs are where they are said to be, in text, and names and addresses agree."""
        assert self._addresses == sorted(set(self._addresses)), "addresses ascend"
        for name, symbol in self._by_name.items():
            assert symbol.address in self._names, f"{name} is printed under some name"
        for address, export in self.exports.items():
            assert self._by_name[export.name].address == address, "an export stands at its symbol"
            assert address % STUB_ALIGN == 0 and self.layout.is_kernel_text(address), "stubs are aligned, in text"
            assert self.memory.read(self.layout.pa(address), len(STUB)) == STUB, "the stub's bytes are there"
