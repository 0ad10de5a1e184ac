"""vmemu_switch_mm and its kin on several CPUs: whose mm is loaded where, and what unmapping and destroying it costs."""

from __future__ import annotations

import pytest

from emu.config import MachineConfig
from emu.guest.asm import assemble
from emu.kernel.task import KernelThread
from emu.machine import Machine
from emu.trace import Event, FlushIssued

USER, PAGE = 0x400000, 4096
EINVAL, EBUSY = (1 << 64) - 22, (1 << 64) - 16
CODE = """
section .text
init_module:
    ret
load:                                   ; an mm, and read USER under it
    push rbx
    call vmemu_switch_mm
    test rax, rax
    jnz .out
    stac
    mov eax, [0x400000]
    clac
.out:
    pop rbx
    ret
stay:                                   ; the same, and keep the CPU
    push rbx
    call vmemu_switch_mm
    stac
    mov eax, [0x400000]
    mov qword [ready], 1
.wait:
    pause
    cmp qword [go], 0
    je .wait
    mov eax, [0x400000]
    clac
    pop rbx
    ret
wait_ready:
    pause
    cmp qword [ready], 0
    je wait_ready
    ret
raw:
    mov rax, cr3
    mov cr3, rdi
    mov qword [ready], 1
.wait:
    pause
    cmp qword [go], 0
    je .wait
    mov cr3, rax
    ret
destroy:
    jmp vmemu_destroy_mm
unmap:
    mov esi, 0x400000
    mov edx, 4096
    jmp vmemu_unmap_user
alternate:                              ; another thread of the CPU runs meanwhile, with its mm
    push rbx
    push r12
    mov ebx, 4
    call vmemu_switch_mm
.more:
    call schedule
    stac
    mov r12, [0x400000]
    clac
    dec ebx
    jnz .more
    mov rax, r12
    pop r12
    pop rbx
    ret
section .data
ready: dq 0
go: dq 0
""".replace("[0x400000]", "[rcx]").replace("    mov eax, [rcx]", "    mov ecx, 0x400000\n    mov eax, [rcx]").replace(
    "    mov r12, [rcx]", "    mov ecx, 0x400000\n    mov r12, [rcx]"
)


class Cpus:
    """A machine that calls the functions above on its CPUs."""

    def __init__(self, cpus: int, **config: object) -> None:
        self.events: list[Event] = []
        self.machine = Machine(
            MachineConfig(cpus=cpus, memory=128 << 20, **config), limit=1_000_000, sink=self.events.append
        )
        self.kernel = self.machine.kernel
        self.linked = self.machine.load(assemble(CODE, "mm.asm"))[1]
        self.returned: dict[KernelThread, int] = {}

    def mm(self, value: int = 0) -> int:
        pgd = self.kernel.symbols.exports[self.kernel.symbol("vmemu_new_mm")].function()
        mm = self.machine.mm_api.mms[pgd]
        assert mm.map_user(USER, PAGE, 0x8000_0000_0000_0067) == 0
        self.kernel.memory.write_u64(mm.to_pa(USER), value)
        return pgd

    def start(self, cpu: int, name: str, argument: int) -> KernelThread:
        thread = self.kernel.create_thread(name, cpu, function=self.linked.symbols[name], argument=argument, runs=False)
        thread.on_exit = lambda value: self.returned.update({thread: value})
        self.kernel.sched.start(thread)
        return thread

    def call(self, name: str, argument: int = 0) -> int | None:
        self.kernel.cpus.current = 0
        thread = self.start(0, name, argument)
        self.machine.hub.run(lambda: thread.state.name == "DEAD")
        return self.returned.get(thread)

    def others(self, name: str, pgd: int) -> KernelThread:
        """CPU 1 runs a function that waits; return when it does."""
        thread = self.start(1, name, pgd)
        ready = self.linked.symbols["ready"]
        self.machine.hub.run(lambda: self.machine.read(ready, 1) == b"\1")
        return thread

    def go(self, thread: KernelThread) -> None:
        self.machine.write(self.linked.symbols["go"], b"\1")
        self.machine.hub.run(lambda: thread.state.name == "DEAD")


def causes(on: Cpus) -> list[tuple[str, tuple[int, ...]]]:
    return [(event.cause, event.cpus) for event in on.events if isinstance(event, FlushIssued) and event.start < 1 << 47
            and event.end <= 1 << 47]


@pytest.mark.parametrize("pcid", [False, True])
def test_switching_to_no_mm_is_einval_and_to_init_mm_leaves_the_one_that_was_loaded(pcid):
    on = Cpus(1, pcid=pcid)
    pgd = on.mm(5)
    assert on.call("load", pgd + PAGE) == EINVAL
    assert on.call("load", pgd) == 5
    context = on.machine.mm_api.mms[pgd].context
    assert context.cpumask == {0}
    assert on.kernel.contexts.cpu_tlbstate[0].is_lazy, "its thread is dead, and the idle thread goes on with it"
    on.kernel.contexts.validate()


@pytest.mark.parametrize("pcid", [False, True])
def test_threads_of_one_cpu_that_take_turns_each_see_their_own_mm(pcid):
    on = Cpus(2, pcid=pcid)
    threads = [on.start(1, "alternate", on.mm(value)) for value in (11, 22, 33)]
    on.machine.hub.run(lambda: all(thread.state.name == "DEAD" for thread in threads))
    assert [on.returned[thread] for thread in threads] == [11, 22, 33]
    counters = on.kernel.contexts.counters
    assert counters.flushed[1] + counters.kept[1] > 6
    assert bool(counters.kept[1]) is pcid
    on.kernel.contexts.validate()


@pytest.mark.parametrize("pcid", [False, True])
def test_unmapping_user_pages_raises_the_mms_generation_and_flushes_the_cpu_that_uses_it_alone(pcid):
    on = Cpus(4, pcid=pcid)
    pgd = on.mm(5)
    context = on.machine.mm_api.mms[pgd].context
    thread = on.others("stay", pgd)
    before, ipis = context.tlb_gen, on.kernel.smp.counters.sent.total()
    assert on.machine.cpus[1].mmu.query(USER) is not None
    assert on.call("unmap", pgd) == 0
    assert context.tlb_gen == before + 1
    assert causes(on) == [("zap_page_range", (1,))]
    assert on.kernel.smp.counters.sent.total() == ipis + 1
    assert on.machine.cpus[1].mmu.query(USER) is None
    assert on.call("unmap", pgd) == 0
    assert context.tlb_gen == before + 1, "nothing was mapped: there is nothing to flush"
    assert on.call("unmap", pgd + PAGE) == EINVAL
    assert thread.state.name != "DEAD"


@pytest.mark.parametrize("how", ["stay", "raw"])
def test_an_mm_that_another_cpu_uses_is_not_destroyed(how):
    on = Cpus(2)
    pgd = on.mm(5)
    thread = on.others(how, pgd)
    assert on.call("destroy", pgd) == EBUSY
    on.go(thread)
    assert on.call("destroy", pgd) == 0
    assert on.call("destroy", pgd) == EINVAL


@pytest.mark.parametrize("pcid", [False, True])
@pytest.mark.parametrize("kernel", ["6.12", "6.1", "5.4"])
def test_cpus_that_have_a_dying_mm_loaded_lazily_go_over_to_init_mm_by_the_flush_of_exit_mmap(kernel, pcid):
    on = Cpus(2, kernel=kernel, pcid=pcid)
    free = on.kernel.pages.nr_free_pages()
    pgd = on.mm(5)
    context = on.machine.mm_api.mms[pgd].context
    thread = on.start(1, "load", pgd)
    on.machine.hub.run(lambda: thread.state.name == "DEAD")
    on.machine.hub.quiesce()
    state = on.kernel.contexts.cpu_tlbstate[1]
    assert (context.cpumask, state.is_lazy, state.loaded_mm is context) == ({1}, True, True)
    assert on.call("destroy", pgd) == 0
    assert [cause for cause, _ in causes(on)] == ["exit_mmap"]
    assert state.loaded_mm is on.kernel.contexts.init_mm and not state.is_lazy
    on.kernel.contexts.validate()
    assert pgd not in on.kernel.init_mm.pgds
    assert free - on.kernel.pages.nr_free_pages() < 16, "only the threads' stacks are left"


def test_an_mm_whose_thread_is_off_its_cpu_is_not_destroyed():
    on = Cpus(1)
    pgd = on.mm(5)
    thread = on.kernel.create_thread("sleeper", runs=False)
    thread.mm = on.machine.mm_api.mms[pgd]
    assert on.call("destroy", pgd) == EBUSY
    thread.mm = None
    assert on.call("destroy", pgd) == 0
