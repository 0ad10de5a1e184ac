"""Native mode is the same machine: the same outcome of every guest, the same faults of random instructions, and faster misses."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from bare_cpu import CODE, KERNEL, KERNEL_PT, PD, PDPT, PML4, USER_CODE, USER_DATA, BareCpu, Entered
from hardware.instructions import CODE_BEFORE_ABSENT, CODE_BEFORE_NX, DATA, GPR, PAGE, RIGHTS, Case, cases
from unicorn import UC_HOOK_EDGE_GENERATED

from emu.config import MachineConfig
from emu.cpu import Cpu, Halted, Interrupted
from emu.exceptions import TripleFault, Vector
from emu.guest.asm import assemble
from emu.guest.directives import MachineOptions
from emu.guest.error import GuestError
from emu.guest.load import load
from emu.guest.program import Program
from emu.machine import Machine
from emu.memory import BusError
from emu.mmu.entry import RW, US, XD, A, D, P
from emu.mmu.fault import PfError
from emu.mmu.registers import RESET_EFER, Cr4, Efer
from emu.native import EngineError, NativeEngine
from emu.run import RunResult, run_program

GUEST = Path(__file__).resolve().parent.parent / "guest"
PROGRAMS = sorted(path for path in GUEST.iterdir() if path.suffix in (".asm", ".c", ".S"))
NEEDS_GCC = pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed: .c and .S guests cannot be compiled")
# Guests whose outcome depends on how long a TLB keeps an entry, or on PCIDs: file name to reason.
DIFFERENT = {
    "stale_tlb.asm": "it reads through an entry that our TLB keeps and Unicorn's has lost with the blocks translated since",
    "global_survives_cr3.asm": "it reads through an entry that our TLB keeps after its page was freed",
    "pcid_reuse.asm": "it reads through an entry that our TLB keeps under its PCID; Unicorn's has none",
}
LONG = frozenset(("stream.asm", "hash.c"))
NATIVE, OURS = MachineOptions(native=True), MachineOptions(native=False)
SEED, CASES = 31, 1500
# They replace state that the machine of the random cases stands on.
REPLACES_STATE = frozenset(("lgdt", "lidt", "lldt", "ltr", "lmsw"))


def same(ours: RunResult, native: RunResult) -> None:
    """Assert that two runs had the same outcome."""
    assert (native.outcome.ended, native.outcome.returned) == (ours.outcome.ended, ours.outcome.returned)
    assert list(map(str, native.outcome.faults)) == list(map(str, ours.outcome.faults))
    assert list(native.outcome.faults) == list(ours.outcome.faults)
    assert list(native.outcome.log) == list(ours.outcome.log)
    assert native.outcome.registers == ours.outcome.registers
    assert native.statistics == ours.statistics
    assert native.failures == ours.failures


def both(program: Program) -> RunResult:
    """Run a program in both modes, compare, and return the native run."""
    native = run_program(program, NATIVE)
    same(run_program(program, OURS), native)
    return native


@pytest.mark.parametrize(
    "path", [pytest.param(p, marks=NEEDS_GCC if p.suffix != ".asm" else ()) for p in PROGRAMS], ids=lambda p: p.name
)
def test_a_guest_has_the_same_outcome_in_both_modes(path: Path) -> None:
    if path.name in DIFFERENT:
        pytest.skip(DIFFERENT[path.name])
    program = load(path)
    if (program.directives.machine.cpus or 1) > 1:
        pytest.skip("it wants several CPUs, and a native machine has one")
    both(program)


@pytest.mark.parametrize("kernel", ["6.1", "5.4"])
@pytest.mark.parametrize("levels", [4, 5])
def test_every_short_guest_has_the_same_outcome_under_other_kernels_and_paging_depths(kernel: str, levels: int) -> None:
    for path in PROGRAMS:
        if path.suffix == ".asm" and path.name not in LONG | DIFFERENT.keys():
            program = load(path)
            if (program.directives.machine.cpus or 1) > 1:
                continue
            ours, native = (MachineOptions(kernel=kernel, levels=levels, native=mode) for mode in (False, True))
            try:
                expected = run_program(program, ours)
            except GuestError:  # it calls a function that this kernel does not have
                with pytest.raises(GuestError):
                    run_program(program, native)
                continue
            same(expected, run_program(program, native))


def test_a_tlb_mode_cannot_be_asked_of_a_native_machine() -> None:
    with pytest.raises(ValueError, match="TLB mode is 'finite'"):
        MachineConfig(native=True, tlb="finite")


# ---- random instructions


class Pages(BareCpu):
    """A CPU with the pages of the random cases; every exception is taken on a stack of its own."""

    def __init__(self) -> None:
        super().__init__(cr4=int(Cr4.SMEP))
        put = self.memory.write_u64
        for at, (table, la) in enumerate(((0x7000, DATA), (0x8000, CODE_BEFORE_ABSENT))):
            put(PD + 8 * (la >> 21), table | P | RW)
            self.frames = 0x100_0000, 0x110_0000
            for n in range(16 if at else len(RIGHTS)):
                right = RIGHTS[n] if not at else "N"
                put(table + 8 * n, 0 if right == "N" else self.frames[at] + PAGE * n | P | XD | (RW if right == "W" else 0))
        for la, flags in ((CODE_BEFORE_ABSENT, 0), (CODE_BEFORE_NX, 0), (CODE_BEFORE_NX + PAGE, XD)):
            put(0x8000 + 8 * (la >> 12 & 511), self._frame(la) | P | RW | flags)
        for vector in range(256):
            self.put_gate(vector, ist=1)
        self.delivered: list[tuple[int, int | None, int | None, int]] = []
        self.on_delivery = lambda e: self.delivered.append((e.vector, e.error, e.cr2, self.rip))

    def _frame(self, la: int) -> int:
        return self.frames[1] + (la & 0xF_F000)

    def try_case(self, case: Case) -> tuple[object, ...]:
        """What became of a case: everything that a program can see."""
        memory = self.memory
        for n in range(len(RIGHTS)):
            memory.fill(self.frames[0] + PAGE * n, PAGE)
        code = case.code + b"\xf4"
        for la, byte in enumerate(code, case.code_la):
            if la & -PAGE in (CODE_BEFORE_ABSENT, CODE_BEFORE_NX, CODE_BEFORE_NX + PAGE):
                memory.write(self._frame(la) | la & PAGE - 1, bytes((byte,)))
        self.delivered.clear()
        self.at_level(0)
        for name, value in case.registers.items():
            self.set_reg(name, value)
        for n in range(16):
            self.set_reg(f"xmm{n}", case.vectors)
        self.set_reg("rflags", case.rflags)
        self.set_reg("cr2", 0)
        self.rip = case.code_la
        try:
            stop: object = self.go_on()
        except (TripleFault, BusError) as error:
            stop = str(error)
        data = memory.read(self.frames[0], PAGE * len(RIGHTS))
        registers = {name: self.reg(name) for name in (*GPR, "rip", "rflags", "cr2", "cs", "ss")}
        return stop, tuple(self.delivered), registers, data


@pytest.fixture
def native_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """CPUs that are made from here on are native; undone by `.undo()`."""
    assert Cpu.__init__.__kwdefaults__ is not None
    monkeypatch.setitem(Cpu.__init__.__kwdefaults__, "engine", NativeEngine)
    yield monkeypatch


def test_random_instructions_fault_alike_and_leave_the_same_registers_and_memory(native_cpu: pytest.MonkeyPatch) -> None:
    native = Pages()
    native_cpu.undo()
    ours = Pages()
    assert isinstance(native.engine, NativeEngine) and not isinstance(ours.engine, NativeEngine)
    faults = 0
    for case in cases(SEED, CASES, user=False):
        if case.instruction.mnemonic not in REPLACES_STATE:
            expected, got = ours.try_case(case), native.try_case(case)
            assert got[:3] == expected[:3], case
            assert got[3] == expected[3], case
            faults += Vector.PF in [vector for vector, *_ in ours.delivered]
    assert faults > CASES // 5
    assert native.engine.disagreements == []


# ---- what Unicorn would do by itself, and must not


def program(body: str) -> Program:
    """A guest of the body of `init_module`, with room for pointers."""
    return assemble(f"section .text\ninit_module:\n{body}\nsection .bss\np: resq 1\nq: resq 1\nlevel: resq 1\n", "guest.asm")


def test_a_privileged_instruction_that_the_guest_writes_at_run_time_is_executed_by_the_machine() -> None:
    # CPUID leaf 80000002H: the brand string is this machine's, not Unicorn's. Written twice in one place, in between run as a NOP.
    run = both(program("""
        push rbx
        mov edi, 4096
        call vmalloc
        mov [p], rax
        mov rdi, rax
        mov esi, 1
        call set_memory_x
        mov rdx, [p]
        mov dword [rdx], 0xc3909090
        call rdx
        mov rdx, [p]
        mov dword [rdx], 0xc390a20f
        mov eax, 0x80000002
        call rdx
        pop rbx
        ret"""))
    assert run.outcome.returned == int.from_bytes(b"vmem", "little")


def test_code_changed_through_another_mapping_of_its_frame_runs_in_its_new_form() -> None:
    # The writable alias is in the TLB before the code is translated, each time.
    run = both(program("""
        push rbx
        push r12
        push r13
        mov edi, 0xcc0
        xor esi, esi
        call alloc_pages
        mov [q], rax
        lea rdi, [q]
        mov esi, 1
        mov edx, 4
        mov rcx, 0x8000000000000163
        call vmap
        mov rbx, rax
        lea rdi, [q]
        mov esi, 1
        mov edx, 4
        mov rcx, 0x121
        call vmap
        mov r12, rax
        mov rdi, rax
        mov esi, 1
        call set_memory_x
        xor r13d, r13d
        mov dword [rbx], 0xb8
        mov byte [rbx + 5], 0xc3
        mov ecx, 1
    .next:
        mov [rbx + 1], ecx
        call r12
        add r13d, eax
        inc ecx
        cmp ecx, 101
        jne .next
        mov eax, r13d
        pop r13
        pop r12
        pop rbx
        ret"""))
    assert run.outcome.returned == 5050


@pytest.mark.parametrize(("instruction", "vector", "error"), [
    ("add [rax + 4096], ecx", Vector.PF, 2),
    ("lock xadd [rax + 4096], ecx", Vector.PF, 2),
    ("xchg [rax + 4094], ecx", Vector.PF, 2),
    ("cmp [rax + 4096], ecx", Vector.PF, 0),
    ("mov rcx, 0x8000000000000000\nmov [rcx], eax", Vector.GP, 0),
    ("mov rsp, 0x8000000000000000\npush rax", Vector.DF, 0),
    ("mov rbp, 0x8000000000000000\nmov eax, [rbp]", Vector.SS, 0),
    ("mov rcx, 0x8000000000000000\njmp rcx", Vector.GP, 0),
])
def test_the_real_cpus_fault_is_delivered_where_unicorns_differs(instruction: str, vector: int, error: int) -> None:
    run = both(program(f"mov edi, 4096\ncall vmalloc\n{instruction}\nret"))
    assert (run.outcome.faults[0].vector, run.outcome.faults[0].error) == (vector, error)


def test_two_thousand_faults_in_a_row_are_all_page_faults(native_cpu: pytest.MonkeyPatch) -> None:
    cpu = Pages()
    for _ in range(2_000):
        entered = cpu.run_code(b"\x8b\x00", rax=DATA + 2 * PAGE)
        assert isinstance(entered, Entered) and (entered.vector, entered.error) == (Vector.PF, 0)


def test_a_fetch_is_told_from_a_read_where_the_error_code_does_not(native_cpu: pytest.MonkeyPatch) -> None:
    cpu = BareCpu(efer=int(RESET_EFER & ~Efer.NXE))
    cpu.unmap(KERNEL + 0x8000)
    entered = cpu.run_code(b"\xff\xe0", rax=KERNEL + 0x8010)
    assert isinstance(entered, Entered)
    assert (entered.vector, entered.error, entered.rip, cpu.cr2) == (Vector.PF, 0, KERNEL + 0x8010, KERNEL + 0x8010)
    # An instruction that runs into the absent page, and one in front of it that reads its first byte.
    entered = cpu.run_code(b"\xb8\1\2\3\4", at=KERNEL + 0x7FFE)
    assert isinstance(entered, Entered)
    assert (entered.vector, entered.error, entered.rip, cpu.cr2) == (Vector.PF, 0, KERNEL + 0x7FFE, KERNEL + 0x8000)
    entered = cpu.run_code(b"\x8b\x00\xeb\x00", at=KERNEL + 0x7FFC, rax=KERNEL + 0x7FFE)
    assert isinstance(entered, Entered)
    assert (entered.vector, entered.error, entered.rip, cpu.cr2) == (Vector.PF, 0, KERNEL + 0x7FFC, KERNEL + 0x8000)


def test_protection_keys_are_those_of_the_machines_pkru(native_cpu: pytest.MonkeyPatch) -> None:
    cpu = BareCpu(cr4=int(Cr4.PKE))
    cpu.set_pte(USER_DATA, USER_DATA | P | RW | US | A | D | 5 << 59)
    read = b"\x8b\x00\x0f\x0b"
    assert cpu.vector_of(read, 3, rax=USER_DATA) == (Vector.UD, None)
    cpu.run_code(b"\x0f\x01\xef\xf4", rax=1 << 10, rcx=0, rdx=0)
    assert cpu.mmu.pkru == 1 << 10
    assert cpu.vector_of(read, 3, rax=USER_DATA) == (Vector.PF, int(PfError.P | PfError.U | PfError.PK))
    cpu.set_reg("pkru", 0)
    assert cpu.vector_of(read, 3, rax=USER_DATA) == (Vector.UD, None)


def test_pcids_and_invpcid_work_though_unicorn_has_none(native_cpu: pytest.MonkeyPatch) -> None:
    cpu = BareCpu()
    cpu.set_reg("cr4", cpu.reg("cr4") | Cr4.PCIDE)
    cr3 = cpu.reg("cr3")
    cpu.memory.write(KERNEL + 0x9000, bytes(16))
    stop = cpu.run_code(b"\x0f\x22\xd8\x66\x0f\x38\x82\x0a\xf4", rax=cr3 | 7, rcx=2, rdx=KERNEL + 0x9000)  # mov cr3, rax; invpcid
    assert isinstance(stop, Halted)
    assert cpu.reg("cr3") == cr3 | 7


@pytest.mark.parametrize("code", [b"\x8b\x00", b"\x89\x00", b"\xff\xe0"])
def test_an_access_outside_ram_is_the_same_bus_error(code: bytes, native_cpu: pytest.MonkeyPatch) -> None:
    def outside(cpu: BareCpu) -> str:
        cpu.set_pte(KERNEL + 0x8000, 0x4_0000_0000 | P | RW | A | D)
        with pytest.raises(BusError) as error:
            cpu.run_code(code, rax=KERNEL + 0x8010)
        return str(error.value)

    native = outside(BareCpu())
    native_cpu.undo()
    assert native == outside(BareCpu())


def test_a_fetch_that_runs_into_a_page_outside_ram_is_a_bus_error(native_cpu: pytest.MonkeyPatch) -> None:
    cpu = BareCpu()
    cpu.memory.write_u64(cpu.pte_pa(KERNEL + 0x8000), 0x4_0000_0000 | P | RW | A | D)
    with pytest.raises(BusError, match="0x400000000"):
        cpu.run_code(b"\xb8\1\2\3\4", at=KERNEL + 0x7FFE)
    assert cpu.rip == KERNEL + 0x7FFE


def test_a_new_cr3_is_another_address_space(native_cpu: pytest.MonkeyPatch) -> None:
    cpu = BareCpu()
    memory, here, there = cpu.memory, KERNEL + 0x8000, KERNEL + 0x9000
    for n, table in enumerate((PML4, PDPT, PD, KERNEL_PT)):
        memory.write(0x7000 + PAGE * n, memory.read(table, PAGE))
    for n, (slot, table) in enumerate(((0, 0x8000), (0, 0x9000), (KERNEL >> 21, 0xA000))):
        memory.write_u64(0x7000 + PAGE * n + 8 * slot, table | P | RW)
    memory.write_u64(0xA000 + 8 * (here >> 12 & 511), there | P | RW)
    memory.write(there, b"\x33")
    stop = cpu.run_code(b"\x8a\x1a\x0f\x22\xd8\x8a\x0a\xf4", rax=0x7000, rdx=here)  # mov bl, [rdx]; mov cr3, rax; mov cl, [rdx]
    assert isinstance(stop, Halted)
    assert (cpu.reg("rbx") & 0xFF, cpu.reg("rcx") & 0xFF) == (0, 0x33)


def test_code_that_comes_by_a_changed_entry_without_invlpg_is_searched_as_it_is_fetched(native_cpu: pytest.MonkeyPatch) -> None:
    cpu = BareCpu()
    here, there = KERNEL + 0x8000, KERNEL + 0x9000
    cpu.run_code(b"\x90\xf4", at=here)
    cpu.memory.write(there, b"\x90\x0f\xa2\xf4")  # nop; cpuid
    code = b"\x48\x89\x1a\xff\xe1"  # mov [rdx], rbx; jmp rcx
    cpu.run_code(code, rax=0x8000_0002, rbx=there | P | RW | A | D, rcx=here, rdx=cpu.pte_pa(here))
    assert cpu.reg("rax") == int.from_bytes(b"vmem", "little")


def test_a_stop_that_comes_while_a_block_is_thrown_away_is_not_lost(native_cpu: pytest.MonkeyPatch) -> None:
    cpu = BareCpu()
    asks = [True]

    def ask(*_: object) -> None:
        if asks:
            cpu.engine._asked = asks.pop()

    cpu.engine.uc.hook_add(UC_HOOK_EDGE_GENERATED, ask)
    assert isinstance(cpu.run_code(b"\x0f\xa2\xf4"), Interrupted)
    assert isinstance(cpu.run(), Halted)


def test_the_privilege_level_is_the_machines_after_every_way_to_change_it(native_cpu: pytest.MonkeyPatch) -> None:
    cpu = BareCpu()
    for _ in range(3):
        assert cpu.vector_of(b"\x8b\x00", 3, rax=KERNEL) == (Vector.PF, int(PfError.P | PfError.U))
        assert cpu.mmu.cpl == 0
        assert isinstance(cpu.run_code(b"\x8b\x00\xf4", rax=KERNEL), Halted)
        assert cpu.vector_of(b"\xcd\x80", 3) == (0x80, None)
    assert cpu.vector_of(b"\xfa", 3) == (Vector.GP, 0)


def test_invlpg_and_the_kernels_flushes_reach_unicorns_tlb(native_cpu: pytest.MonkeyPatch) -> None:
    cpu = BareCpu()
    here, there = KERNEL + 0x8000, KERNEL + 0x9000
    cpu.memory.write(there, b"\x22")
    for flush in (cpu.mmu.invlpg, lambda la: cpu.mmu.load_cr4(cpu.mmu.cr4 ^ Cr4.PGE), lambda la: cpu.mmu.load_cr3(cpu.mmu.cr3)):
        cpu.set_pte(here, here | P | RW | A | D)
        cpu.run_code(b"\x8a\x08\xf4", rax=here)
        assert cpu.reg("rcx") & 0xFF == 0
        cpu.memory.write_u64(cpu.pte_pa(here), there | P | RW | A | D)
        flush(here)
        cpu.rip = CODE
        cpu.go_on()
        assert cpu.reg("rcx") & 0xFF == 0x22


def test_code_that_the_machine_writes_is_translated_again(native_cpu: pytest.MonkeyPatch) -> None:
    cpu = BareCpu()
    for value in range(1, 50):
        cpu.run_code(b"\xb0" + bytes((value,)) + b"\xf4")
        assert cpu.reg("rax") & 0xFF == value
        cpu.vector_of(b"\xb0" + bytes((value,)) + b"\x0f\x0b", 3, at=USER_CODE)


def test_code_that_the_machine_writes_behind_a_page_boundary_is_translated_again(native_cpu: pytest.MonkeyPatch) -> None:
    cpu = BareCpu()
    cpu.memory.write(KERNEL + 0x7FFF, b"\xb8")
    for value in range(1, 5):
        cpu.memory.write(KERNEL + 0x8000, bytes((value, 0, 0, 0, 0xF4)))
        cpu.rip = KERNEL + 0x7FFF
        assert isinstance(cpu.go_on(), Halted)
        assert cpu.reg("rax") == value


def test_a_unicorn_that_does_not_report_its_blocks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("emu.native._TWO_BLOCKS", b"\x90\x90\xf4")
    with pytest.raises(EngineError, match="does not report every block"):
        Machine(MachineConfig(native=True))


# ---- speed

TOUCH = """
section .text
init_module:
    mov rax, [rdi]
    add rdi, 4096
    dec rcx
    jnz init_module
    hlt
"""
