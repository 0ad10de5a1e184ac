"""Several CPUs of one machine: who runs when, what interrupts whom, and when nobody can go on."""

from __future__ import annotations

import pytest

from emu.config import MachineConfig
from emu.guest.asm import assemble
from emu.guest.link import Linked
from emu.hub import Final
from emu.kernel.task import KernelThread
from emu.machine import Machine
from emu.trace import Delivery, Event
from emu.turns import RoundRobin, Scheduled, Step

MEMORY = 256 << 20
CODE = """
section .text
init_module:
    mov eax, 7
    ret
count:
    inc qword [counter]
    jmp count
steps:
    mov eax, 1
    mov eax, 2
    mov eax, 3
    mov eax, 4
    mov [counter], rax
    mov eax, 6
    ret
masked:
    cli
    mov qword [ready], 1
masked_wait:
    pause
    cmp qword [go], 0
    je masked_wait
    mov rax, [counter]
    mov [seen], rax
    sti
    nop
    ret
wait_for_ready:
    pause
    cmp qword [ready], 0
    je wait_for_ready
    mov eax, 9
    ret
spin:
    pause
    jmp spin
look:
    mov rax, [counter]
    ret
section .data
counter: dq 0
ready: dq 0
go: dq 0
seen: dq 0
"""


class Smp:
    """A machine of several CPUs with the code above loaded."""

    def __init__(self, cpus: int, limit: int = 10_000_000, **config: object) -> None:
        self.events: list[Event] = []
        self.machine = Machine(MachineConfig(cpus=cpus, memory=MEMORY, **config), limit=limit, sink=self.events.append)
        self.linked: Linked = self.machine.load(assemble(CODE, "hub.asm"))[1]
        self.kernel = self.machine.kernel
        self.returned: dict[int, int] = {}

    def la(self, name: str) -> int:
        return self.linked.symbols[name]

    def word(self, name: str) -> int:
        return int.from_bytes(self.machine.read(self.la(name), 8), "little")

    def set_word(self, name: str, value: int) -> None:
        self.machine.write(self.la(name), value.to_bytes(8, "little"))

    def thread(self, cpu: int, name: str) -> KernelThread:
        """A thread on a CPU that calls one of the functions, ready to run."""
        thread = self.kernel.create_thread(name, cpu, function=self.la(name), runs=False)
        thread.on_exit = lambda value: self.returned.update({cpu: value})
        self.kernel.sched.start(thread)
        return thread


@pytest.mark.parametrize("cpus", [1, 2, 4, 8, 64])
def test_every_cpu_runs_threads_of_its_own_on_tables_and_stacks_of_its_own(cpus):
    smp = Smp(cpus)
    for cpu in range(cpus):
        smp.thread(cpu, "steps")
    assert smp.machine.call(smp.la("init_module")) == ("returned", 7)
    assert smp.returned == dict.fromkeys(range(cpus), 6)
    tables = [smp.kernel.cpu_tables(cpu) for cpu in range(cpus)]
    assert len({table.gdt for table in tables}) == len({table.percpu for table in tables}) == cpus
    assert [cpu.gdtr.base for cpu in smp.machine.cpus] == [table.gdt for table in tables]
    assert [cpu.reg("gs_base") for cpu in smp.machine.cpus] == [table.percpu for table in tables]
    assert len({cpu.tss.base for cpu in smp.machine.cpus}) == cpus
    assert len({thread.stack for thread in smp.kernel.sched.idle}) == cpus


@pytest.mark.parametrize("quantum", [1, 7, 100, 1000])
def test_cpus_that_never_stop_get_the_same_number_of_instructions(quantum):
    smp = Smp(3, limit=90_000)
    for cpu in (1, 2):
        smp.thread(cpu, "count")
    smp.machine.hub.policy = RoundRobin(quantum)
    assert smp.machine.call(smp.la("count")) == ("limit", None)
    executed = [smp.machine.hub.executed(cpu) for cpu in range(3)]
    assert sum(executed) == 90_000
    assert max(executed) - min(executed) <= quantum + 100, executed


def test_the_bound_holds_over_all_cpus_to_the_instruction():
    for limit in (1, 10, 1001):
        smp = Smp(2, limit=limit)
        smp.thread(1, "count")
        assert smp.machine.call(smp.la("count")) == ("limit", None)
        assert sum(smp.machine.hub.executed(cpu) for cpu in range(2)) == limit


def test_a_cpu_is_preempted_at_the_very_instruction_that_the_schedule_names():
    """CPU 1 looks whether CPU 0 has stored: before some instruction it has not, from there on it has."""
    looked = []
    for at in range(20):
        smp = Smp(2)
        smp.thread(1, "look")
        smp.machine.hub.policy = Scheduled([Step(0, at, 1)])
        smp.machine.call(smp.la("steps"))
        looked.append(smp.returned[1])
    stored = looked.index(4)
    assert 0 < stored < 19
    assert looked == [0] * stored + [4] * (20 - stored)
    # The store is the fifth of six instructions before the RET of `steps`.
    plain = Smp(1)
    thread = plain.kernel.create_thread("plain", function=plain.la("steps"), runs=False)
    plain.machine.hub.start()
    plain.kernel.sched.start(thread)
    plain.machine.hub.policy = RoundRobin(1)
    plain.machine.hub.run(lambda: plain.machine.hub.executed(0) == stored - 1)
    assert plain.machine.cpu.rip == plain.la("steps") + 20


def test_an_interrupt_waits_until_the_cpu_has_interrupts_on():
    smp = Smp(2)
    arrived = []
    smp.kernel.irqs.handlers[0x40] = lambda vector: arrived.append((smp.kernel.cpus.current, smp.word("seen")))
    smp.set_word("counter", 5)
    thread = smp.thread(1, "masked")
    finish = smp.machine.hub.run(lambda: smp.word("ready") == 1)
    assert finish.final is Final.DONE
    smp.kernel.send_ipi(1, 0x40)
    budget = smp.machine.hub.executed(1) + 500
    smp.machine.hub.run(lambda: smp.machine.hub.executed(1) > budget)
    assert arrived == [], "RFLAGS.IF is clear"
    smp.set_word("go", 1)
    smp.machine.hub.quiesce()
    assert arrived == [(1, 5)], "taken behind STI, on CPU 1"
    assert thread.state.name == "DEAD"


def test_two_interrupts_of_one_vector_that_wait_are_one():
    smp = Smp(2)
    arrived = []
    smp.kernel.irqs.handlers[0x40] = arrived.append
    smp.kernel.irqs.handlers[0x41] = arrived.append
    for vector in (0x40, 0x41, 0x40):
        smp.kernel.send_ipi(1, vector)
    smp.machine.hub.quiesce()
    assert arrived == [0x40, 0x41]


def test_an_nmi_comes_though_interrupts_are_off():
    smp = Smp(2)
    arrived: list[int] = []

    def handler() -> bool:
        arrived.append(smp.kernel.cpus.current)
        return True

    smp.kernel.irqs.nmi_handlers.append(handler)
    smp.thread(1, "masked")
    smp.machine.hub.run(lambda: smp.word("ready") == 1)
    smp.kernel.send_nmi(1)
    smp.machine.hub.run(lambda: bool(arrived))
    assert arrived == [1]
    assert smp.word("go") == 0


@pytest.mark.parametrize("what", ["nmi", "0x40"])
def test_a_schedule_injects_what_it_names_before_the_instruction_it_names(what):
    smp = Smp(1, schedule=f"0@9!{what}")
    smp.kernel.irqs.handlers[0x40] = lambda vector: None
    smp.kernel.irqs.nmi_handlers.append(lambda: True)
    smp.machine.call(smp.la("steps"))
    entered, = (event for event in smp.events if isinstance(event, Delivery))
    assert entered.vector == (2 if what == "nmi" else 0x40)
    plain = Smp(1)
    plain.machine.hub.policy = RoundRobin(9)
    thread = plain.kernel.create_thread("plain", function=plain.la("steps"), runs=False)
    plain.machine.hub.start()
    plain.kernel.sched.start(thread)
    plain.machine.hub.run(lambda: plain.machine.hub.executed(0) >= 9)
    assert plain.machine.cpu.rip == entered.rip


def test_pause_ends_a_turn_when_others_wait():
    smp = Smp(2, limit=10_000)
    smp.thread(1, "count")
    smp.machine.hub.policy = RoundRobin(1000)
    smp.machine.call(smp.la("spin"))
    spun, counted = (smp.machine.hub.executed(cpu) for cpu in range(2))
    assert spun < 100 < 9000 < counted


def test_a_guest_that_waits_for_what_nobody_will_do_is_a_deadlock_with_every_stack():
    smp = Smp(2)
    thread = smp.kernel.create_thread("sleeper", 1, function=smp.la("steps"), runs=False)
    smp.kernel.sched.start(thread)
    smp.machine.hub.quiesce()

    def sleep_for_ever() -> None:
        smp.kernel.sched.current().waiting_for = "a wake-up that never comes"
        smp.kernel.sched.block()

    export = smp.kernel.symbols.register("vmemu_test_sleep", sleep_for_ever, 0)
    program = assemble(f"section .text\ninit_module:\n mov rax, {export:#x}\n call rax\n ret\n", "sleeper.asm")
    outcome = smp.machine.run(program)
    assert outcome.ended == "deadlock"
    text = "\n".join(outcome.log)
    assert "vmemu: deadlock: no CPU can go on" in text
    assert "CPU 0: idle" in text and "CPU 1: idle" in text
    assert "task:sleeper state:D" in text and "waits for a wake-up that never comes" in text
    assert "init_module+" in text


def test_two_runs_of_one_machine_are_the_same_to_the_byte():
    def run(quantum: int) -> list[str]:
        smp = Smp(4, limit=20_000)
        for cpu in (1, 2, 3):
            smp.thread(cpu, "count")
        smp.machine.hub.policy = RoundRobin(quantum)
        smp.machine.call(smp.la("count"))
        registers = [str(cpu.save_context()) for cpu in smp.machine.cpus]
        return [*map(str, smp.events), *registers, str(smp.word("counter"))]

    assert run(37) == run(37)
    assert run(37) != run(38)


def test_time_stands_still_only_for_those_who_do_not_count():
    smp = Smp(2)
    before = smp.kernel.sched.time()
    smp.machine.call(smp.la("steps"))
    assert smp.kernel.sched.time() > before


def test_when_all_cpus_idle_time_jumps_to_the_next_timer():
    smp = Smp(2)
    sched = smp.kernel.sched
    fired: list[tuple[int, int]] = []
    due = sched.time() + 1_000_000_000
    sched.call_at(due, lambda: fired.append((smp.kernel.cpus.current, sched.time())), 1)
    finish = smp.machine.hub.run(lambda: bool(fired))
    assert finish.final is Final.DONE
    (cpu, time), = fired
    assert cpu == 1 and due <= time < due + 1000
    assert sum(smp.machine.hub.executed(number) for number in range(2)) < 1000


def test_a_cancelled_timer_never_fires():
    smp = Smp(1)
    sched = smp.kernel.sched
    fired: list[int] = []
    timer = sched.call_at(sched.time() + 10, lambda: fired.append(1), 0)
    assert sched.cancel(timer) and not sched.cancel(timer)
    assert smp.machine.hub.run(lambda: bool(fired)).final is Final.DEADLOCK
    assert fired == []
