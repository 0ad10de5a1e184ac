"""Who makes an access: the CPU's registers and thread, and its call trace, read without touching its TLB."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from emu.kernel.kernel import Kernel
from emu.kernel.oops import dump_stack
from emu.memory import BusError
from emu.mmu.fault import Access, NonCanonical, PageFault
from emu.mmu.mmu import Mmu
from emu.mmu.walk import walk

PAGE = 4096


@dataclass(frozen=True, slots=True)
class Scene:
    """A CPU at the moment of an access.

    `size` of the access in bytes, 0 if unknown; `instructions` the CPU has executed, 0 where they are not counted. `call` names the
    exported function that the kernel model executes for it, `caller` the return address; `trace` makes the call trace. `operands`
    are the memory accesses of the instruction: address, size, whether it is written.
    """

    rip: int
    size: int = 0
    instructions: int = 0
    comm: str = "swapper"
    pid: int = 0
    call: str | None = None
    caller: int = 0
    trace: Callable[[], tuple[str, ...]] = tuple
    operands: tuple[tuple[int, int, bool], ...] = ()

    def access(self, la: int, access: int) -> tuple[int, int]:
        """Address and size of the access under way, of which the engine may know no more than that its page begins at `la`."""
        page = la & -PAGE
        if access == Access.FETCH:
            return (self.rip if self.rip & -PAGE == la else la), 0
        first, last = (page, page + PAGE) if la == page else (la, la + 1)
        for start, size, writes in self.operands:
            if (writes or access == Access.READ) and start < last and first < start + size:
                return max(start, first), size
        return la, self.size


class _Onlooker:
    """A KernelCpu that changes nothing: memory as this CPU sees it, without filling its TLB or setting A."""

    def __init__(self, number: int, mmu: Mmu, reg: Callable[[str], int]) -> None:
        self._number = number
        self._mmu = mmu
        self.reg = reg

    @property
    def id(self) -> int:
        return self._number

    def read(self, la: int, size: int) -> bytes:
        mmu = self._mmu
        data = b""
        while len(data) < size:
            at = la + len(data) & (1 << 64) - 1
            cached = mmu.query(at)
            pa = cached.pa(at) if cached else walk(mmu.memory, mmu.regs, at, Access.READ, False, ac=True, set_ad=False).pa
            try:
                data += mmu.memory.read(pa, min(size - len(data), 4096 - (at & 4095)))
            except BusError:
                # A report reads on: no device answers to it.
                data += bytes(min(size - len(data), 4096 - (at & 4095)))
        return data

    def __getattr__(self, name: str) -> object:
        raise NotImplementedError(f"{name} would change the CPU that is looked at")


def kernel_scene(
    kernel: Kernel, number: int, mmu: Mmu, reg: Callable[[str], int], size: int = 0, instructions: int = 0,
    operands: tuple[tuple[int, int, bool], ...] = (),
) -> Scene:
    """The scene of CPU `number` of a kernel, whose registers `reg` reads by their lower-case names."""
    rip = reg("rip")
    onlooker = _Onlooker(number, mmu, reg)
    thread = kernel.sched.running[number]
    if thread is None:
        # Nothing has been scheduled yet: boot, or the loading of the first module.
        return Scene(rip, size, instructions, operands=operands)
    export = kernel.symbols.exports.get(rip)

    def trace() -> tuple[str, ...]:
        try:
            found = list(dump_stack(kernel.exceptions.oops_source(onlooker), kernel.oops_state))  # type: ignore[arg-type]
        except (PageFault, NonCanonical) as fault:
            return (f"(the stack cannot be read: {fault})",)
        at = found.index("Call Trace:") + 1
        found.insert(at + found[at : at + 1].count(" <TASK>"), f" {kernel.symbol_text(rip)}")
        return tuple(found)

    return Scene(
        rip, size, instructions, thread.comm, thread.pid, None if export is None else export.name,
        0 if export is None else kernel.caller, trace, operands,
    )
