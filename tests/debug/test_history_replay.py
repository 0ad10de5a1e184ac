"""A history says of every step what a machine shows that is stopped there: each page table, each TLB entry, each CR3."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
from replayed import Recorded

from emu.guest.directives import MachineOptions
from emu.guest.load import load

GUEST = Path(__file__).resolve().parent.parent.parent / "guest"
PLAIN = MachineOptions()


@pytest.mark.parametrize("name", [
    "asid_reuse.asm", "cr3_behind_the_kernel.asm", "demand_fault.asm", "global_survives_cr3.asm", "huge_leaf.asm",
    "invlpg_one_cpu.asm", "lazy_tlb.asm", "own_page_tables.asm", "pcid_reuse.asm", "percpu_every_cpu.asm", "pti_user.asm",
    "self_modifying.asm", "set_memory_x.asm", "stale_write_other_owner.asm", "user_access.asm", "vmalloc_fault_each_cpu.asm",
    "vmalloc_fault_in_nmi.asm",
])
def test_tables_and_tlbs_replayed_to_a_step_are_those_of_a_machine_stopped_there(name: str) -> None:
    recorded = Recorded(load(str(GUEST / name)))
    for step in recorded.some_steps(4, seed=len(name)):
        assert recorded.differences(step) == []


@pytest.mark.parametrize("options", [
    MachineOptions(tlb="finite"), MachineOptions(tlb="none"), MachineOptions(levels=5), MachineOptions(kernel="5.4"),
    MachineOptions(kernel="6.1", pcid=True, cpus=2), MachineOptions(tlbsan=False), MachineOptions(pti=True),
    MachineOptions(cpus=3, quantum=7), MachineOptions(invlpgb=True, cpus=2),
], ids=str)
@pytest.mark.parametrize("name", ["stale_tlb.asm", "user_access.asm"])
def test_it_is_so_on_every_kind_of_machine(name: str, options: MachineOptions) -> None:
    recorded = Recorded(load(str(GUEST / name)), options)
    for step in recorded.some_steps(3, seed=7):
        assert recorded.differences(step) == []


AREAS = 6
HEADER = """
; vmemu: memory=64M {options}
section .text
init_module:
    push rbx
"""
FOOTER = """
    xor eax, eax
    pop rbx
    ret
section .bss
areas: resq 8
level: resq 1
"""


class RandomGuest:
    """A guest that maps, touches, protects and unmaps areas, and changes their PTEs by stores of its own."""

    def __init__(self, seed: int, options: str = "") -> None:
        self.random = Random(seed)
        self.lines = [HEADER.format(options=options)]
        self.pages: dict[int, int] = {}
        for _ in range(60):
            self._do()
        self.text = "\n".join([*self.lines, FOOTER])

    def _do(self) -> None:
        i = self.random.randrange(AREAS)
        if i not in self.pages:
            self.pages[i] = self.random.choice([1, 1, 2, 5, 600])
            self.lines += [f"mov edi, {self.pages[i] * 4096}", "call vmalloc", f"mov [areas + {8 * i}], rax"]
            return
        page = self.random.randrange(self.pages[i]) * 4096
        kind = self.random.choice(["read", "read", "write", "free", "ro", "rw", "pte", "pte", "invlpg", "aliases", "cr3"])
        area = [f"mov rdi, [areas + {8 * i}]"]
        if kind == "read":
            self.lines += [*area, f"mov rax, [rdi + {page}]"]
        elif kind == "write":
            self.lines += [*area, f"mov esi, {self.pages[i]}", "call set_memory_rw", *area, f"mov [rdi + {page}], rax"]
        elif kind == "free":
            self.lines += [*area, "call vfree"]
            del self.pages[i]
        elif kind in ("ro", "rw"):
            self.lines += [*area, f"mov esi, {self.pages[i]}", f"call set_memory_{kind}"]
        elif kind == "pte":
            bit = self.random.choice([2, 8, 0x20, 0x40, 0x200])
            self.lines += [*area, f"add rdi, {page}", "lea rsi, [level]", "call lookup_address", f"xor qword [rax], {bit}"]
        elif kind == "invlpg":
            self.lines += [*area, f"invlpg [rdi + {page}]"]
        elif kind == "aliases":
            self.lines.append("call vm_unmap_aliases")
        else:
            self.lines += ["mov rax, cr3", "mov cr3, rax"]


@pytest.mark.parametrize("seed", range(6))
def test_it_is_so_for_random_guests_that_change_their_page_tables_themselves(seed: int) -> None:
    recorded = Recorded(RandomGuest(seed, "tlb=finite" if seed % 2 else "").text)
    for step in recorded.some_steps(6, seed):
        assert recorded.differences(step) == []


def test_the_same_run_has_the_same_history() -> None:
    first, second = (Recorded(RandomGuest(3).text) for _ in range(2))
    assert first.changes == second.changes and len(first.changes) > 100


def test_changes_ascend_by_the_first_limit_that_lets_them_happen() -> None:
    since = [change.since for change in Recorded(load(str(GUEST / "stale_write_other_owner.asm"))).changes]
    assert since == sorted(since)
