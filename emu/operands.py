"""Effective addresses: the memory accesses of an instruction, and which of them a page fault belongs to.

Unicorn names only the page and the kind (read, write, fetch) of a failed access, and asks for a read where a real CPU
asks for a write. CR2 to the byte and the W bit of the error code come from here; so do the accesses that a trace shows.

What a real CPU does, measured in user mode (tests/test_cr2_hardware.py):
- An operand that is read and written is asked for with the intent to write: W=1, and a read-only page fails at once.
- An access that crosses into another page reports the first of its bytes that lies in the page that fails; the lower
  page is checked first, for the right to write too if the operand is written.
- Several accesses are checked in the order of the operation: PUSH m and CALL m read the operand before they push, POP m
  pops before it writes, MOVS reads before it writes. CMPS reads ES:RDI before DS:RSI, RETF reads CS before RIP, IRET
  reads RFLAGS, CS, RIP; ENTER probes the final stack pointer last.
- The large ones probe some bytes first: FXSAVE, FXRSTOR and XSAVE the last one, FNSTENV, FLDENV, FNSAVE and FRSTOR both
  ends, XRSTOR the header.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Final, NamedTuple

from emu.decode import MASK64, Instruction, Operand, Undecodable, decode

__all__ = [
    "FaultAddress",
    "Instruction",
    "MemoryAccess",
    "Undecodable",
    "accesses",
    "checks",
    "decode",
    "descriptor_access",
    "fault",
    "fetch_boundary",
    "first_fault",
]

PAGE_SIZE: Final = 4096
_PAGE_MASK: Final = MASK64 & ~(PAGE_SIZE - 1)
_FETCH: Final = 18
_WRITE: Final = 17


class MemoryAccess(NamedTuple):
    """`size` bytes at linear address `la`, which may wrap around 2^64 and cross pages.

    read and write both set: read-modify-write, checked as a write. `implicit`: a supervisor access at any CPL (SDM
    vol. 3A 4.6.1). `stack`: SS-relative, so that a non-canonical address gives #SS and not #GP. `probes`: (offset,
    size) of the parts that are checked before the whole (FXSAVE and its like).
    """

    la: int
    size: int
    read: bool
    write: bool
    implicit: bool = False
    stack: bool = False
    probes: tuple[tuple[int, int], ...] = ()


class FaultAddress(NamedTuple):
    """CR2, whether the error code has W, and of what kind the access was (see MemoryAccess)."""

    cr2: int
    write: bool
    implicit: bool
    stack: bool


def accesses(instruction: Instruction, rip: int, reg: Callable[[str], int]) -> tuple[MemoryAccess, ...]:
    """The memory accesses of `instruction` at `rip`, in the order in which the CPU checks them.

    `reg` gives a register by lower-case name (rax..r15, fs_base, gs_base) before the instruction. Of a repeated string
    instruction, the accesses of the element that is due; none when the count is zero. Descriptor-table accesses are not
    here: see Instruction.descriptors and descriptor_access.
    """
    if instruction.repeat_mask and not reg("rcx") & instruction.repeat_mask:
        return ()
    return tuple([
        MemoryAccess(_address(op, rip, reg), op.size, op.read, op.write, op.implicit, op.stack, op.probes)
        for op in instruction.operands
    ])


def _address(operand: Operand, rip: int, reg: Callable[[str], int]) -> int:
    ea = operand.disp
    if operand.base is not None:
        ea += rip if operand.base == "rip" else reg(operand.base)
    if operand.index is not None:
        ea += (reg(operand.index) & operand.index_mask) * operand.scale
    if operand.bit_offset is not None:
        bits = 8 * operand.size
        offset = reg(operand.bit_offset) & ((1 << bits) - 1)
        if offset >> (bits - 1):
            offset -= 1 << bits
        ea += offset // bits * operand.size
    ea &= operand.mask
    if operand.segment is not None:
        ea += reg(operand.segment)
    return ea & MASK64


def descriptor_access(selector: int, gdt_base: int, ldt_base: int, size: int = 8) -> MemoryAccess | None:
    """The implicit read of the descriptor that `selector` names (SDM vol. 3A 3.4.2), None for a null selector.

    `size` is 16 for the system descriptors of LLDT, LTR and call gates. The CPU reads the descriptor; only when it has
    to set the accessed or busy bit it also writes, which it asks for separately.
    """
    if not selector & ~3:
        return None
    base = ldt_base if selector & 4 else gdt_base
    return MemoryAccess((base + (selector & 0xFFF8)) & MASK64, size, True, False, implicit=True)


def checks(memory_accesses: Sequence[MemoryAccess]) -> Iterator[MemoryAccess]:
    """The accesses cut at page boundaries: the translations the CPU needs, in the order in which it checks them.

    An access with `probes` comes in pieces that overlap; `size` of a piece is what lies in that page.
    """
    for access in memory_accesses:
        if not access.probes and 0 < access.size <= PAGE_SIZE - access.la % PAGE_SIZE:
            yield access
            continue
        for offset, size in access.probes:
            yield from _pages(access, (access.la + offset) & MASK64, size)
        yield from _pages(access, access.la, access.size)


def _pages(access: MemoryAccess, la: int, size: int) -> Iterator[MemoryAccess]:
    while size:
        part = min(size, PAGE_SIZE - la % PAGE_SIZE)
        yield MemoryAccess(la, part, access.read, access.write, access.implicit, access.stack)
        la, size = (la + part) & MASK64, size - part


def first_fault(memory_accesses: Sequence[MemoryAccess], allowed: Callable[[MemoryAccess], bool]) -> FaultAddress | None:
    """The page fault that the CPU reports: the first of `checks` that `allowed` denies, None if none is.

    This is the exact answer where several pages fail at once: Unicorn asks for pages in an order of its own.
    """
    for part in checks(memory_accesses):
        if not allowed(part):
            return FaultAddress(part.la, part.write, part.implicit, part.stack)
    return None


def fetch_boundary(code: bytes, rip: int) -> int:
    """Address of the first instruction, in a straight line from `rip`, that `code` does not hold whole.

    Unicorn translates a block before it runs any of it, so that a page behind the block is asked for, and refused, with RIP at
    the block's start. With `code` all bytes from `rip` to the end of its page, the result is where the CPU would fault: `rip`
    itself if the instruction there reaches into the next page; else, drop the translations of [rip, boundary + 15) and run with
    `until` = boundary, which ends the block there. Bytes that are no instruction end the line too.
    """
    at = 0
    while at < len(code):
        try:
            at += decode(code[at : at + 15], rip + at).size
        except Undecodable:
            break
    return (rip + at) & MASK64


def fault(memory_accesses: Sequence[MemoryAccess], rip: int, page_la: int, access: int) -> FaultAddress:
    """Which byte is CR2, and is it a write, when page `page_la` failed for `access` (16 read, 17 write, 18 fetch).

    `memory_accesses` are those of the instruction at `rip`, empty if it could not be fetched or decoded. Of several
    accesses to the page, the first of that kind counts. A fetch reports `rip`, or the first byte of the page when the
    instruction runs into it. A data access that none of `memory_accesses` explains is taken for an implicit one, to a
    descriptor table, and reports the first byte of the page.
    """
    page_la &= _PAGE_MASK
    if access == _FETCH:
        return FaultAddress(rip if rip & _PAGE_MASK == page_la else page_la, False, False, False)
    asks_write = access == _WRITE
    second: MemoryAccess | None = None
    for part in checks(memory_accesses):
        if part.la & _PAGE_MASK != page_la:
            continue
        if part.write if asks_write else part.read:
            break
        second = second or part
    else:
        if second is None:
            return FaultAddress(page_la, asks_write, True, False)
        part = second
    return FaultAddress(part.la, part.write or asks_write, part.implicit, part.stack)
