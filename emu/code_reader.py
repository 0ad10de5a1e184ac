"""The bytes of code as a CPU fetches them."""

from __future__ import annotations

from unicorn import Uc

from emu.engine_registers import RegisterFile
from emu.memory import PAGE_SIZE, BusError, Memory, MmioRegion
from emu.mmu.fault import Access, NonCanonical, PageFault
from emu.mmu.mmu import Mmu
from emu.mmu.walk import walk

_PAGE_MASK = ~(PAGE_SIZE - 1)


class CodeReader(RegisterFile):
    """Reads code of `memory` by the translations of `mmu`."""

    def __init__(self, uc: Uc, memory: Memory, mmu: Mmu) -> None:
        super().__init__(uc, mmu)
        self.memory = memory
        # Pages this CPU may fetch from now, by linear address: what the soft TLB holds with the right to execute.
        self._fetched: dict[int, int] = {}

    def peek(self, la: int, size: int) -> bytes:
        """Up to `size` bytes of code at `la` as this CPU would fetch them, without a change of state; at least one.

        Raises PageFault, NonCanonical or BusError when the first byte cannot be fetched.
        """
        offset = la & (PAGE_SIZE - 1)
        page = self._fetched.get(la - offset)
        if page is not None and offset + size <= PAGE_SIZE:
            return self.memory.read(page + offset, size)
        first = min(size, PAGE_SIZE - offset)
        code = self.memory.read(self._peek_fetch(la), first)
        if first < size:
            try:
                code += self.memory.read(self._peek_fetch(la + first & 0xFFFF_FFFF_FFFF_FFFF), size - first)
            except (PageFault, NonCanonical, BusError):
                return code
        return code

    def _peek_fetch(self, la: int) -> int:
        page = self._fetched.get(la & _PAGE_MASK)
        if page is not None:
            return page | la & (PAGE_SIZE - 1)
        mmu = self.mmu
        cached = mmu.query(la)
        if cached is not None:
            return cached.pa(la)
        return walk(self.memory, mmu.regs, la, Access.FETCH, mmu.cpl == 3, set_ad=False).pa

    def _region_of(self, pa: int) -> MmioRegion | None:
        for region in self.memory.mmio:
            if region.start <= pa < region.start + region.size:
                return region
        return None
