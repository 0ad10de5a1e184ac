"""What the hot path of the MMU may grant, as masks to compare a packed leaf with (SDM vol. 3A 4.6)."""

from __future__ import annotations

from enum import IntFlag

from emu.mmu.entry import ABOVE_MAXPHYADDR, RW, US, XD, A, D, P
from emu.mmu.fault import Access
from emu.mmu.walk import PagingRegisters


class Grant(IntFlag):
    """Rights that `Mmu.fill` adds to the pa of a page, in its low bits."""

    R = 1
    W = 2
    X = 4


_R, _W, _X = int(Grant.R), int(Grant.W), int(Grant.X)

# What the hot path needs for one access kind at one privilege: a packed leaf passes if leaf & mask == want and then
# grants `grant`, and `more` besides if leaf & more_mask == more_want. The access sets `flags` (A, or A and D).
Test = tuple[int, int, int, int, int, int, int]
_NEVER = (0, 1)


def fill_tests(regs: PagingRegisters, user: bool) -> tuple[Test, ...]:
    """The hot path's tests, indexed by Access.

    They may refuse what the walker permits (a cached page with D clear, a user page under SMAP or PKU), never the
    reverse. All of them ask for P, which a watched entry lacks.
    """
    keyed = regs.pke and regs.pkru != 0
    mask, want = P | A | ABOVE_MAXPHYADDR, P | A
    if not regs.nxe:
        mask, want = mask | XD, want | XD
    if user:
        mask, want = mask | US, want | US
    read, write, fetch = (mask, want), (mask | D, want | D), (mask | XD, want | XD)
    if user or regs.wp:
        write = (write[0] | RW, write[1] | RW)
    if user and keyed:
        read = write = _NEVER
    elif not user and (keyed or regs.smap):
        read, write = (read[0] | US, read[1]), (write[0] | US, write[1])
    if not user and regs.smep:
        fetch = (fetch[0] | US, fetch[1])
    table: list[Test] = [(*_NEVER, 0, *_NEVER, 0, 0)] * (Access.FETCH + 1)
    table[Access.READ] = (*read, _R, *write, _R | _W, int(A))
    table[Access.WRITE] = (*write, _R | _W, *_NEVER, 0, A | D)
    table[Access.FETCH] = (*fetch, _X, *read, _X | _R, int(A))
    return tuple(table)
