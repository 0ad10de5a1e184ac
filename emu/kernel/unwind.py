"""Kernel stacks and the call trace (v6.12 arch/x86/kernel/dumpstack.c and dumpstack_64.c).

The scan is the kernel's: every word from the stack pointer to the end of each stack that is a kernel text address
is printed, and prefixed with '? ' unless the unwinder vouches for the slot it stands in.

The unwinder is not the kernel's. Linux uses ORC tables made from its own object code; guests have none. A slot counts
as a return address, and is printed without '? ', by the first of these rules that says so:

1. `hint(slot)` answers True or False: the caller knows (it pushed the frame itself).
2. The frame pointer chain that starts in RBP runs through the slot (push %rbp; mov %rsp,%rbp code).
3. The word stands behind a call instruction, and that call leads to the function found below: its direct target is the
   start of the function that holds the inner address, or the call is indirect and may lead anywhere.

Rule 3 can be fooled by a stale word of an earlier call to the same function, and by a tail call (the direct target is
then not the function that runs): such a frame and, if it is left out, its outer frames' lines are marked accordingly
('? ' on a true frame, none on a stale one), but no line is ever added or lost.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

from emu.kernel.ptrace import PT_REGS_SIZE, PtRegs

_PAGE_SIZE = 4096
_MASK = (1 << 64) - 1

ReadWord = Callable[[int], int]
Symbolize = Callable[[int], str | None]
"""Linear address to "name+0x1f/0x40" or "name+0x1f/0x40 [module]"; None when no symbol covers it (printk %pS)."""


class StackType(IntEnum):
    """enum stack_type; the exception stacks follow EXCEPTION in the order of enum exception_stack_ordering."""

    UNKNOWN = 0
    TASK = 1
    IRQ = 2
    SOFTIRQ = 3
    ENTRY = 4
    DF = 5
    NMI = 6
    DB = 7
    MCE = 8
    VC = 9
    VC2 = 10


_STACK_TYPE_NAMES = {
    StackType.TASK: "TASK",
    StackType.IRQ: "IRQ",
    StackType.SOFTIRQ: "SOFTIRQ",
    StackType.ENTRY: "ENTRY_TRAMPOLINE",
    StackType.DF: "#DF",
    StackType.NMI: "NMI",
    StackType.DB: "#DB",
    StackType.MCE: "#MC",
    StackType.VC: "#VC",
    StackType.VC2: "#VC2",
}


def stack_type_name(stack_type: StackType) -> str | None:
    """The tag of a stack in call traces and overflow messages; None for UNKNOWN."""
    return _STACK_TYPE_NAMES.get(stack_type)


@dataclass(frozen=True, slots=True)
class StackInfo:
    """One stack: [begin, end), and where the stack it was entered from continues (0: nowhere)."""

    type: StackType
    begin: int
    end: int
    next_sp: int = 0

    def on_stack(self, la: int) -> bool:
        """Whether the address lies on this stack."""
        return self.begin <= la < self.end


@dataclass(frozen=True, slots=True)
class Stacks:
    """Every stack the current CPU and task may run on, in the order the kernel looks them up."""

    infos: tuple[StackInfo, ...]

    def get_stack_info(self, la: int) -> StackInfo | None:
        """The stack that holds the address (get_stack_info_noinstr); None when none does."""
        return next((info for info in self.infos if info.on_stack(la)), None)

    def get_stack_guard_info(self, la: int) -> StackInfo | None:
        """The stack whose guard page holds the address: it is on no stack, but one page further up is one."""
        if self.get_stack_info(la) is not None:
            return None
        return self.get_stack_info((la + _PAGE_SIZE) & _MASK)


@dataclass(frozen=True, slots=True)
class TraceLine:
    """One text address found on a stack."""

    la: int
    reliable: bool


@dataclass(frozen=True, slots=True)
class StackSection:
    """What a trace shows of one stack: addresses, and register frames of contexts interrupted there."""

    type: StackType
    items: tuple[TraceLine | PtRegs, ...]


def sprint_symbol(symbolize: Symbolize, la: int) -> str:
    """%pS: the symbol, or the bare address when there is none (v6.12 kernel/kallsyms.c: sprint_symbol)."""
    return symbolize(la) or f"0x{la:x}"


_OFFSET = re.compile(r"\+0x([0-9a-f]+)/")


def sprint_backtrace(symbolize: Symbolize, la: int) -> str:
    """%pB: as %pS, but looked up one byte below, so that a return address behind a last call names its function."""
    text = symbolize((la - 1) & _MASK)
    if text is None:
        return f"0x{la:x}"
    return _OFFSET.sub(lambda match: f"+0x{int(match[1], 16) + 1:x}/", text, count=1)


def function_start(symbolize: Symbolize, la: int) -> int | None:
    """First address of the function that holds `la`; None when no symbol covers it."""
    match = _OFFSET.search(symbolize(la) or "")
    return None if match is None else la - int(match[1], 16)


@dataclass(frozen=True, slots=True)
class Call:
    """A call instruction in front of a return address; target is None for an indirect call."""

    target: int | None


def call_before(read: Callable[[int, int], bytes | None], la: int) -> Call | None:
    """The call instruction that ends at `la`, or None.

    Near calls only (SDM vol. 2A CALL): E8 rel32, and FF /2 in its encodings of 2 to 7 bytes with an optional REX prefix.
    `read` gives bytes of text, or None where there are none.
    """
    code = read(la - 7, 7)
    if code is None:
        code = (read(la - 2, 2) or b"").rjust(7, b"\0")
    if code[2] == 0xE8:
        return Call((la + int.from_bytes(code[3:7], "little", signed=True)) & _MASK)
    for length in (2, 3, 4, 6, 7):
        opcode = code[7 - length :]
        if opcode[0] == 0xFF and opcode[1] >> 3 & 7 == 2 and _modrm_length(opcode) == length:
            return Call(None)
    return None


def _modrm_length(opcode: bytes) -> int:
    """Length of an FF /2 instruction from its ModRM and SIB bytes (SDM vol. 2A 2.1.3)."""
    mod, rm = opcode[1] >> 6, opcode[1] & 7
    if mod == 3:
        return 2
    sib = 1 if rm == 4 else 0
    if mod == 0 and (rm == 5 or (sib and len(opcode) > 2 and opcode[2] & 7 == 5)):
        return 2 + sib + 4
    return 2 + sib + {0: 0, 1: 1, 2: 4}[mod]


@dataclass(slots=True)
class _Context:
    """The innermost frame not yet left: start of its function, and RBP as far as it is known."""

    function: int | None
    bp: int


@dataclass(frozen=True, slots=True)
class Unwinder:
    """What is needed to walk stacks: reads that give None outside mapped memory, symbols, and optional knowledge.

    `hint(slot)`: True or False when the caller knows whether a slot holds a return address, None otherwise.
    `entry_regs`: linear address of a pt_regs frame on a stack -> its registers, for contexts interrupted on the way.
    """

    read: Callable[[int, int], bytes | None]
    is_kernel_text: Callable[[int], bool]
    symbolize: Symbolize
    hint: Callable[[int], bool | None] = lambda slot: None
    entry_regs: Mapping[int, PtRegs] = field(default_factory=dict)

    def _word(self, la: int) -> int | None:
        data = self.read(la, 8)
        return None if data is None else int.from_bytes(data, "little")

    def _frame_pointer_slots(self, bp: int, stack: StackInfo) -> frozenset[int]:
        slots: list[int] = []
        while stack.begin <= bp <= stack.end - 16 and bp % 8 == 0:
            slots.append(bp + 8)
            saved = self._word(bp)
            if saved is None or saved <= bp:
                break
            bp = saved
        return frozenset(slots)

    def _scan(self, sp: int, stack: StackInfo, context: _Context) -> Iterator[TraceLine | PtRegs]:
        chain = self._frame_pointer_slots(context.bp, stack)
        slot = sp
        while slot + 8 <= stack.end:
            regs = self.entry_regs.get(slot)
            if regs is not None:
                yield regs
                context.bp = regs.bp
                context.function = function_start(self.symbolize, regs.ip)
                chain |= self._frame_pointer_slots(regs.bp, stack)
                slot += PT_REGS_SIZE
                continue
            la = self._word(slot)
            if la is not None and self.is_kernel_text(la):
                reliable = self._vouch(slot, la, context.function, chain)
                if reliable:
                    context.function = function_start(self.symbolize, la - 1)
                yield TraceLine(la, reliable)
            slot += 8

    def _vouch(self, slot: int, la: int, inner: int | None, chain: frozenset[int]) -> bool:
        known = self.hint(slot)
        if known is not None:
            return known
        if slot in chain:
            return True
        call = call_before(self.read, la)
        return call is not None and (call.target is None or call.target == inner)

    def show_trace(self, stacks: Stacks, *, sp: int, ip: int, bp: int) -> tuple[StackSection, ...]:
        """The call trace from `sp` up, one section per stack, following each stack's next_sp.

        A pointer off every stack is rounded up to the next page once: that is how an overflowed stack is still shown
        (v6.12 dumpstack.c: __show_trace_log_lvl). Each stack is visited once.
        """
        context = _Context(function_start(self.symbolize, ip), bp)
        sections: list[StackSection] = []
        visited: set[StackType] = set()
        while sp:
            sp = (sp + 7) & ~7
            info = stacks.get_stack_info(sp)
            if info is None:
                sp = (sp + _PAGE_SIZE - 1) & ~(_PAGE_SIZE - 1) & _MASK
                info = stacks.get_stack_info(sp)
            if info is None or info.type in visited:
                break
            visited.add(info.type)
            sections.append(StackSection(info.type, tuple(self._scan(sp, info, context))))
            sp = info.next_sp
        return tuple(sections)


def trace_addresses(sections: Sequence[StackSection], *, reliable_only: bool = False) -> tuple[int, ...]:
    """The addresses of a trace in order, for tools that want no text."""
    return tuple(
        item.la
        for section in sections
        for item in section.items
        if isinstance(item, TraceLine) and (item.reliable or not reliable_only)
    )
