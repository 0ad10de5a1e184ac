"""The history of an address: what became of it, when, by whom; the ring and the file that keep it."""

from __future__ import annotations

import os
import resource
import signal
from pathlib import Path

import pytest
from replayed import Recorded

from emu.debug.address_history import AddressEvent
from emu.debug.history import RING, History
from emu.debug.history_records import FlushAsked, Flushed, Invalidated, TlbFilled
from emu.debug.recording import MAGIC, Recording, RecordingError, history_of, load_recording, record
from emu.guest.asm import assemble
from emu.guest.directives import MachineOptions
from emu.guest.program import Program
from emu.machine import Machine, MachineConfig

PLAIN = MachineOptions()
HEAD = """
; vmemu: memory=64M
section .text
init_module:
    mov edi, 8192
    call vmalloc
    mov [p], rax
"""
TAIL = """
    xor eax, eax
    ret
section .bss
p: resq 1
level: resq 1
"""


def program(body: str, header: str = "") -> Program:
    """A guest that has two pages of vmalloc memory at [p], and does something with them."""
    return assemble(header + HEAD + body + TAIL, "guest.asm")


def area_of(body: str, header: str = "", offset: int = 0) -> tuple[Recording, list[AddressEvent]]:
    """The recording of such a guest, and the events of an address in its area without those of paging-structure caches."""
    recording, result, _ = record(program(body, header), PLAIN)
    la = result.outcome.read_u64(recording.tail.symbols["p"]) + offset
    return recording, [event for event in recording.address(la) if not event.what.startswith("table")]


def whats(events: list[AddressEvent]) -> list[str]:
    return [event.what for event in events]


def test_an_address_is_mapped_cached_unmapped_stale_and_dropped_each_by_its_function() -> None:
    recording, events = area_of("""
        mov [rax], rax
        mov rdi, rax
        call vfree
        call vm_unmap_aliases
    """)
    assert whats(events) == ["mapped", "cached", "unmapped", "stale", "dropped"]
    mapped, cached, unmapped, stale, dropped = events
    assert (mapped.function, mapped.call) == ("vmap_pages_range_noflush", "vmalloc")
    assert mapped.place == "init_module+0xa/0x24 [guest]"
    assert (cached.function, cached.call, cached.place, cached.cpus) == ("", "", "init_module+0x11/0x24 [guest]", (0,))
    assert (unmapped.function, unmapped.call) == ("vunmap_range_noflush", "vfree")
    assert (stale.step, stale.differs, stale.cpus) == (unmapped.step, ("P",), (0,))
    assert (dropped.function, dropped.call) == ("__purge_vmap_area_lazy", "vm_unmap_aliases")
    assert [event.step for event in events] == [6, 8, 12, 12, 15]
    assert recording.tail.steps == 20


def test_a_pages_rights_are_told_as_they_change_and_that_the_tlb_still_had_the_old_ones() -> None:
    _, events = area_of("""
        mov [rax], rax
        mov rdi, rax
        mov esi, 1
        call set_memory_ro
        mov rdi, [p]
        mov esi, 1
        call set_memory_rw
    """)
    assert whats(events) == ["mapped", "cached", "read-only", "stale", "dropped", "writable"]
    assert {(event.function, event.call) for event in events if event.what in ("read-only", "stale")} == {
        ("__change_page_attr", "set_memory_ro")
    }
    assert "RW" in events[3].differs


def test_a_store_of_the_guest_to_a_page_table_is_told_with_its_instruction_though_nobody_has_walked_there() -> None:
    for tlbsan in ("on", "off"):
        _, events = area_of("""
            mov rdi, rax
            lea rsi, [level]
            call lookup_address
        stores:
            mov qword [rax], 0
            nop
        """, f"; vmemu: tlbsan={tlbsan}")
        assert whats(events) == ["mapped", "unmapped"]
        unmapped = events[1]
        assert (unmapped.function, unmapped.call, unmapped.place) == ("", "", "stores+0x0/0xb [guest]")


# A copy of the PTE table in a page of its own, which the PDE is made to name. R12 is the copy, R13 the offset of [p]'s PTE in it.
OWN_TABLE = """
        mov edi, 4096
        mov esi, 0xcc0
        call kmalloc
        mov r12, rax
        mov rdi, [p]
        lea rsi, [level]
        call lookup_address
        mov r13, rax                        ; the PTE
        mov rsi, rax
        and rsi, -4096
        mov rdi, r12
        mov ecx, 512
        rep movsq
        mov rax, cr3
        and rax, -4096
        mov rbx, 0xffff888000000000
        mov rdx, 0xffffffffff000
        mov rcx, [rbx + rax + 402*8]        ; vmalloc's PML4E, then its first PDPTE and PDE
        and rcx, rdx
        mov rcx, [rbx + rcx]
        and rcx, rdx
        lea rdi, [rbx + rcx]
        mov rax, r12
        sub rax, rbx
        or rax, 0x67
    links:
        mov [rdi], rax
        and r13, 4095
"""


def test_a_table_that_the_guest_puts_in_place_is_followed_from_then_on() -> None:
    _, events = area_of(OWN_TABLE + "clears:\n mov qword [r12 + r13], 0")
    # The PDE's old table was cached, as the stack is in the same 2 MiB.
    assert whats(events) == ["mapped", "stale", "unmapped"]
    assert (events[1].differs, events[1].place.partition("+")[0]) == (("frame",), "links")
    assert events[2].place.startswith("clears+0x0")


def test_stores_of_the_kernel_to_a_table_that_the_guest_has_put_in_place_are_seen_there() -> None:
    _, events = area_of(OWN_TABLE + "mov rdi, [p]\n call vfree")
    assert whats(events) == ["mapped", "stale", "unmapped"]
    assert (events[2].function, events[2].call) == ("vunmap_range_noflush", "vfree")


def test_the_fetch_of_another_page_is_not_taken_for_the_access_of_the_block_before_it() -> None:
    recorded = Recorded(program("jmp next\nnext:\n mov rcx, [rax]\n jmp other\nalign 4096\nother:\n nop"))
    other = recorded.outcome.symbol("other") or 0
    fetch = next(change for change in recorded.changes if isinstance(change, TlbFilled) and change.number == other >> 12)
    assert fetch.place.startswith("other+0x0/")
    assert (fetch.step, fetch.since) == (11, 11)


def test_the_instruction_that_fills_the_tlb_is_told_exactly_inside_its_block() -> None:
    recorded = Recorded(program("nop\n nop\n mov rcx, [rax]\n nop\n mov rdx, [rax + 4096]\n nop"))
    la = recorded.outcome.read_u64(recorded.outcome.symbol("p") or 0)
    fills = {
        change.number << 12: (change.step, change.place) for change in recorded.changes
        if isinstance(change, TlbFilled) and not change.table and change.level == 1
    }
    assert fills[la] == (10, "init_module+0x13/0x22 [guest]")
    assert fills[la + 4096] == (12, "init_module+0x17/0x22 [guest]")


def test_stale_entries_are_told_of_the_cpus_that_hold_them() -> None:
    recording, result, _ = record(assemble("""
; vmemu: memory=64M cpus=3
section .text
init_module:
    push rbx
    mov edi, 4096
    call vmalloc
    mov [p], rax
    mov [rax], rax
    mov edi, 2
    lea rsi, [reader]
    xor edx, edx
    call vmemu_run_on
    mov rdi, rax
    call vmemu_join
    mov rdi, [p]
    call vfree
    pop rbx
    xor eax, eax
    ret
reader:
    mov rax, [p]
    mov rcx, [rax]
    ret
section .bss
p: resq 1
""", "guest.asm"), PLAIN)
    la = result.outcome.read_u64(recording.tail.symbols["p"])
    events = [event for event in recording.address(la) if not event.what.startswith("table")]
    assert [(event.what, event.cpus) for event in events[-4:]] == [
        ("cached", (0,)), ("cached", (2,)), ("unmapped", ()), ("stale", (0, 2)),
    ]
    assert events[-3].cpu == 2


def test_a_fault_drops_what_is_cached_for_its_address() -> None:
    _, events = area_of("""
        mov rcx, [rax]
        mov rdi, rax
        mov esi, 1
        call set_memory_ro
        mov rax, [p]
        mov rcx, [rax]
        mov [rax], rcx
    """)
    assert (events[-1].what, events[-1].function) == ("dropped", "#PF")


def test_an_address_that_boot_has_mapped_says_so() -> None:
    events = history_of(program("nop"), PLAIN, 0xFFFF_8880_0000_0000)
    assert (events[0].what, events[0].place, events[0].page_size) == ("mapped", "boot", 4096)


def test_what_maps_the_module_comes_before_the_guests_call() -> None:
    recording, _, _ = record(program("nop"), PLAIN)
    first = recording.address(recording.tail.symbols["init_module"])[0]
    assert (first.what, first.step, first.place) == ("mapped", 0, "before the guest's call")


def test_an_address_that_is_not_canonical_is_refused() -> None:
    with pytest.raises(ValueError, match="0x8000000000000000 is not a canonical address"):
        history_of(program("nop"), PLAIN, 1 << 63)


def test_flushes_are_recorded_also_when_they_find_nothing() -> None:
    recorded = Recorded(program("mov rdi, rax\n invlpg [rdi]\n call vm_unmap_aliases"))
    la = recorded.outcome.read_u64(recorded.outcome.symbol("p") or 0)
    invalidated = [change for change in recorded.changes if isinstance(change, Invalidated) and change.step]
    assert [(change.pcid, change.la, change.shared, change.call, change.step) for change in invalidated] == [(0, la, True, "", 10)]
    asked = [change for change in recorded.changes if isinstance(change, FlushAsked)]
    done = [change for change in recorded.changes if isinstance(change, Flushed)]
    assert [one.number for one in asked] == [one.number for one in done] and asked
    assert (asked[0].start, asked[0].last, asked[0].place) == (0, (1 << 64) - 1, "before the guest's call")


# ---------------------------------------------------------------- the ring


def test_a_ring_forgets_the_oldest_and_still_knows_the_state_that_the_rest_begins_with() -> None:
    guest = program("mov [rax], rax\n mov rdi, rax\n call vfree\n call vm_unmap_aliases")
    whole, result, _ = record(guest, PLAIN)
    la = result.outcome.read_u64(whole.tail.symbols["p"])
    assert whole.forgotten == 0
    for ring in (2, 7, 20):
        some = record(guest, PLAIN, ring=ring)[0]
        kept = list(some.changes)
        assert 0 < len(kept) <= ring and some.forgotten + len(kept) == some.tail.records == whole.tail.records
        assert kept == list(whole.changes)[some.forgotten :]
        events = [event for event in some.address(la) if event.place != "boot"]
        assert events == whole.address(la)[len(whole.address(la)) - len(events) :]


def test_a_ring_too_small_is_refused() -> None:
    with pytest.raises(ValueError, match="a ring of 1 records is too small"):
        record(program("nop"), PLAIN, ring=1)


def test_a_machine_without_a_tlb_of_ours_or_without_a_count_is_refused() -> None:
    with pytest.raises(ValueError, match="native"):
        record(program("nop"), MachineOptions(native=True))
    with pytest.raises(ValueError, match="count"):
        History(Machine(MachineConfig(memory=64 << 20)))


def test_the_command_line_names_the_rings_size() -> None:
    from emu.debug import history_command

    assert f"default {RING})" in Path(history_command.__file__).read_text()


# ---------------------------------------------------------------- the file


def test_a_file_has_the_whole_history_whatever_the_ring(tmp_path: Path) -> None:
    guest = program("mov [rax], rax\n mov rdi, rax\n call vfree")
    path = tmp_path / "run.history"
    whole, result, _ = record(guest, PLAIN)
    record(guest, PLAIN, ring=10, path=str(path))
    read = load_recording(str(path))
    assert path.read_bytes().startswith(MAGIC)
    assert list(read.changes) == list(whole.changes)
    assert (read.head, read.tail) == (whole.head, whole.tail)
    la = result.outcome.read_u64(whole.tail.symbols["p"])
    assert read.address(la) == whole.address(la)
    assert os.listdir(tmp_path) == ["run.history"]


@pytest.mark.parametrize("cut", [1, 40, 5000])
def test_a_file_that_is_cut_off_is_refused(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "run.history"
    record(program("nop"), PLAIN, path=str(path))
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(RecordingError, match=r"run\.history: the recording is cut off or was changed"):
        load_recording(str(path))


def test_a_file_of_which_a_byte_was_changed_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.history"
    record(program("nop"), PLAIN, path=str(path))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(RecordingError, match="cut off or was changed"):
        load_recording(str(path))


def test_a_full_disk_is_an_error_that_leaves_no_file_and_keeps_an_older_one(tmp_path: Path) -> None:
    path = tmp_path / "run.history"
    path.write_text("older")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(RecordingError, match=r"run.history: cannot be written: .*; nothing is kept"):
            record(program("nop"), PLAIN, path=str(path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert os.listdir(tmp_path) == ["run.history"] and path.read_text() == "older"


def test_a_folder_that_is_not_there_is_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(RecordingError, match="No such file or directory"):
        record(program("nop"), PLAIN, path=str(tmp_path / "missing" / "run.history"))
