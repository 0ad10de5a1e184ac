"""Code translated before it runs: what every fork of a machine would have to translate again is translated once, in its parent.

Nothing that a program, the MMU or TLBSan can see is changed by it: addresses are looked up in the page tables, past the TLB and
without setting accessed bits, and the soft TLB is dropped afterwards. Left are Unicorn's translations, which it finds again by
physical address, the hooks of the pages they lie in, and the counter's knowledge of how long they are.
"""

from __future__ import annotations

from collections.abc import Iterable

from emu.block_counter import Block
from emu.engine import Engine
from emu.memory import PAGE_SIZE, BusError
from emu.mmu.fault import Access, NonCanonical, PageFault
from emu.mmu.walk import walk

_OFFSET = PAGE_SIZE - 1
_READ, _EXEC = 1, 4


def translate_ahead(engine: Engine, blocks: Iterable[Block]) -> int:
    """Translate blocks that another engine ran, as far as the same code can be fetched in kernel mode; returns how many."""
    counter = engine.block_counter
    if counter is None:
        return 0
    mmu, memory = engine.mmu, engine.memory

    def look_up(page_la: int, access: int, user: bool) -> int:
        return walk(memory, mmu.regs, page_la, Access(access), user, set_ad=False).pa & ~_OFFSET | _READ | _EXEC

    done = 0
    engine.fill_by(look_up)
    try:
        for block in blocks:
            page_la = block.start & ~_OFFSET
            if (block.start & _OFFSET) + block.size > PAGE_SIZE:
                continue
            try:
                page = look_up(page_la, Access.FETCH, False) & ~_OFFSET
                code = memory.read(page + (block.start & _OFFSET), block.size)
            except (PageFault, NonCanonical, BusError):
                continue
            if code == block.code and engine.translate(block.start, page >> 12) == (block.count, block.size):
                counter.learn(block)
                done += 1
    finally:
        engine.fill_by(mmu.fill)
        engine.drop_soft_tlb()
    return done
