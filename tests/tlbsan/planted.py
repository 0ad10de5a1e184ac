"""Bugs planted in the kernel's TLB maintenance, and the guests that come upon them: one line of Linux wrong in each."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import pytest

from emu.guest.asm import assemble
from emu.guest.directives import MachineOptions
from emu.guest.program import Program
from emu.kernel.layout import PAGE_SIZE
from emu.kernel.mmu_context import MmContext, MmuContexts, TlbState
from emu.kernel.smp import SmpCalls
from emu.kernel.tlbflush import TlbFlushes
from emu.kernel.vm_struct import VmAreas
from emu.kernel.vmap_area import VmapArea
from emu.machine import Machine
from emu.run import RunResult, run_to_end

# CPU 0 makes something and changes it; the last CPU touches it before, and uses it after. The first use is at `use`.
_GUEST = """
section .text
init_module:
    push rbx
    push r12
{make}
    mov [p], rax
    mov edi, {cpu}
    lea rsi, [toucher]
    xor edx, edx
    call vmemu_run_on
    mov rbx, rax
touched_wait:
    pause
    cmp qword [touched], 0
    je touched_wait
{change}
    mov qword [changed], 1
    mov rdi, rbx
    call vmemu_join
    xor eax, eax
    pop r12
    pop rbx
    ret
toucher:
    mov rax, [p]
{touch}
changed_wait:
    pause
{meanwhile}
    cmp qword [changed], 0
    je changed_wait
{after}
use:
{use}
    ret
section .data
p: dq 0
touched: dq 0
changed: dq 0
section .bss
pages: resq 4
"""
_VMALLOC = "    mov edi, {size}\n    call vmalloc"
_VFREE = "    mov rdi, [p]\n    call vfree\n    call vm_unmap_aliases"
# Four pages of another area, mapped once more by vm_map_ram: no guard page behind them.
_VM_MAP_RAM = """    mov edi, 0x4000
    call vmalloc
    mov rbx, rax
    xor r12d, r12d
more:
    mov rdi, r12
    shl rdi, 12
    add rdi, rbx
    call vmalloc_to_page
    lea rcx, [pages]
    mov [rcx + r12 * 8], rax
    inc r12
    cmp r12, 4
    jb more
    lea rdi, [pages]
    mov esi, 4
    mov edx, -1
    call vm_map_ram"""
_VM_UNMAP_RAM = "    mov rdi, [p]\n    mov esi, 4\n    call vm_unmap_ram\n    call vm_unmap_aliases"
_TOUCHED = "    mov qword [touched], 1"


@dataclass(frozen=True, slots=True)
class Scenario:
    """What a guest does; `plant` breaks the kernel for the CPU that comes upon it."""

    make: str
    change: str
    touch: str
    use: str
    plant: Callable[[pytest.MonkeyPatch, int], None]
    meanwhile: str = ""
    after: str = ""
    debug_pagealloc: bool = False

    def program(self, cpu: int) -> Program:
        """The guest whose CPU `cpu` uses what is stale."""
        text = _GUEST.format(
            make=self.make, change=self.change, touch=self.touch + "\n" + _TOUCHED, meanwhile=self.meanwhile, after=self.after,
            use=self.use, cpu=cpu,
        )
        return assemble(text, "planted.asm")

    def run(self, cpus: int) -> tuple[RunResult, Machine]:
        """As `vmemu run` does: once more, to track fills and call traces, if anything was found."""
        options = MachineOptions(cpus=cpus, memory=64 << 20, debug_pagealloc=self.debug_pagealloc, max_instructions=1_000_000)
        return run_to_end(self.program(cpus - 1), options)


def skip_the_call(patch: pytest.MonkeyPatch, cpu: int) -> None:
    """on_each_cpu forgets one CPU: the flush is asked of it, and it never hears of that."""
    online = SmpCalls._online

    def without(self: SmpCalls, mask: Collection[int]) -> list[int]:
        return [number for number in online(self, mask) if number != cpu]

    patch.setattr(SmpCalls, "_online", without)


def skip_in_the_mask(patch: pytest.MonkeyPatch, cpu: int) -> None:
    """The mask of CPUs that the flush is asked of lacks one."""
    issue = TlbFlushes._issue
    patch.setattr(
        TlbFlushes, "_issue",
        lambda self, start, end, cause, cpus: issue(self, start, end, cause, tuple(n for n in cpus if n != cpu)),
    )
    skip_the_call(patch, cpu)


def _range(change: Callable[[int, int], tuple[int, int]]) -> Callable[[pytest.MonkeyPatch, int], None]:
    def plant(patch: pytest.MonkeyPatch, cpu: int) -> None:
        flush = TlbFlushes.flush_tlb_kernel_range

        def changed(self: TlbFlushes, start: int, end: int, *, cause: str = "flush_tlb_kernel_range") -> None:
            flush(self, *change(start, end), cause=cause)

        patch.setattr(TlbFlushes, "flush_tlb_kernel_range", changed)

    return plant


def flush_first(patch: pytest.MonkeyPatch, cpu: int) -> None:
    """free_unmap_vmap_area flushes before it clears the entries."""

    def free_unmap_vmap_area(self: VmAreas, va: VmapArea) -> None:
        self.space.tlb.flush_tlb_kernel_range(va.va_start, va.va_end, cause="free_unmap_vmap_area")
        self.mm.vunmap_range_noflush(va.va_start, va.va_end).defer()
        self.space.free_vmap_area_noflush(va)

    patch.setattr(VmAreas, "free_unmap_vmap_area", free_unmap_vmap_area)


def keep_what_is_there(patch: pytest.MonkeyPatch) -> None:
    """switch_mm never has an ASID flushed."""
    choose = MmuContexts._choose_new_asid

    def chosen(self: MmuContexts, state: TlbState, following: MmContext) -> tuple[int, bool]:
        return choose(self, state, following)[0], False

    patch.setattr(MmuContexts, "_choose_new_asid", chosen)


_READ = "    mov rcx, [rax]"
_READ_2 = "    mov rcx, [rax + 0x1000]"
SCENARIOS = {
    "call-skipped": Scenario(_VMALLOC.format(size=0x1000), _VFREE, _READ, _READ, skip_the_call),
    "mask-skipped": Scenario(_VMALLOC.format(size=0x1000), _VFREE, _READ, "    mov qword [rax + 8], 1", skip_in_the_mask),
    "short-at-start": Scenario(
        _VMALLOC.format(size=0x3000), _VFREE, _READ + "\n" + _READ_2, _READ,
        _range(lambda start, end: (start + PAGE_SIZE, end)),
    ),
    "short-at-end": Scenario(
        _VM_MAP_RAM, _VM_UNMAP_RAM, "    mov ecx, [rax + 0x2000]\n    mov ecx, [rax + 0x3ffc]", "    mov ecx, [rax + 0x3ffc]",
        _range(lambda start, end: (start, end - PAGE_SIZE)),
    ),
    "flush-before-store": Scenario(
        _VMALLOC.format(size=0x1000), "    mov rdi, [p]\n    call vfree", _READ, _READ, flush_first, debug_pagealloc=True,
        meanwhile="use_meanwhile:\n    mov cl, [rax + 5]",
    ),
    "huge-as-one-page": Scenario(
        "    mov edi, 0x400000\n    mov esi, 0xcc0\n    call vmalloc_huge", "    mov rdi, [p]\n    call vfree",
        "    mov rcx, [rax]\n    mov rcx, [rax + 0x201000]", "    mov rcx, [rax + 0x203000]",
        _range(lambda start, end: (start, start + PAGE_SIZE)), debug_pagealloc=True,
    ),
}
