"""The memory accesses of single instructions, and which byte of them a page fault names."""

from __future__ import annotations

import pytest

from emu.operands import (
    FaultAddress,
    MemoryAccess,
    Undecodable,
    accesses,
    checks,
    decode,
    descriptor_access,
    fault,
    fetch_boundary,
    first_fault,
)

RIP = 0xFFFF_FFFF_C000_0100
PAGE = 4096
P = 0x7F00_0000_3000
READ, WRITE, FETCH = 16, 17, 18

REGISTERS = {
    "rax": 0x1_0000_0A77,
    "rcx": 3,
    "rdx": 0x40,
    "rbx": P,
    "rsp": 0x7FFE_0000_8000,
    "rbp": 0x7FFE_0000_9000,
    "rsi": 0x5555_0000_1000,
    "rdi": 0x5555_0000_2000,
    **{f"r{n}": 0x6000_0000_0000 + 0x1_0000 * n for n in range(8, 16)},
    "fs_base": 0x1234_0000,
    "gs_base": 0xFFFF_8880_0000_0000,
}


def touched(code: str, **registers: int) -> list[tuple[int, int, str]]:
    """(address, size, "r"/"w"/"rw") of each access of the instruction."""
    instruction = decode(bytes.fromhex(code), RIP)
    found = accesses(instruction, RIP, (REGISTERS | registers).__getitem__)
    return [(a.la, a.size, "r" * a.read + "w" * a.write) for a in found]


def only(code: str, **registers: int) -> MemoryAccess:
    instruction = decode(bytes.fromhex(code), RIP)
    (access,) = accesses(instruction, RIP, (REGISTERS | registers).__getitem__)
    return access


# What oracle/hardware/user-faults.txt says of an AMD Zen 4: instruction at [rbx], or at [rdi] for the strings;
# error code and CR2 - p with p's page absent; the same with the page read-only, None for no fault.
USER_FAULTS = {
    "mov r,[m]": ("488b03", (0x4, 0), None),
    "mov [m],r": ("488903", (0x6, 0), (0x7, 0)),
    "add [m],r": ("480103", (0x6, 0), (0x7, 0)),
    "inc [m]": ("48ff03", (0x6, 0), (0x7, 0)),
    "lock add": ("f0480103", (0x6, 0), (0x7, 0)),
    "xchg": ("488703", (0x6, 0), (0x7, 0)),
    "lock cmpxchg": ("f0480fb10b", (0x6, 0), (0x7, 0)),
    "cmpxchg": ("480fb10b", (0x6, 0), (0x7, 0)),
    "xadd": ("480fc103", (0x6, 0), (0x7, 0)),
    "bts [m],r": ("480fab03", (0x6, 0), (0x7, 0)),
    "bt [m],64*9": ("480fa303", (0x4, 72), None),
    "cmp [m],r": ("483903", (0x4, 0), None),
    "test": ("488503", (0x4, 0), None),
    "movsq dst": ("48a5", (0x6, 0), (0x7, 0)),
    "stosq": ("48ab", (0x6, 0), (0x7, 0)),
    "rol [m]": ("48d103", (0x6, 0), (0x7, 0)),
    "neg": ("48f71b", (0x6, 0), (0x7, 0)),
    "setz": ("0f9403", (0x6, 0), (0x7, 0)),
    "prefetcht0": ("0f180b", None, None),
    "clflush": ("0fae3b", (0x4, 0), None),
    "cmpxchg16b": ("480fc70b", (0x6, 0), (0x7, 0)),
    "movdqu st": ("f30f7f03", (0x6, 0), (0x7, 0)),
    "shld": ("480fa40305", (0x6, 0), (0x7, 0)),
    "push m": ("ff33", (0x4, 0), None),
    "pop m": ("8f03", (0x6, 0), (0x7, 0)),
    "movnti": ("480fc303", (0x6, 0), (0x7, 0)),
    "fxsave": ("0fae03", (0x6, 511), (0x7, 511)),
    "maskmov": ("660ff7c1", (0x6, 0), (0x7, 0)),
    "cross mov [m],r": ("488903", (0x6, 4), (0x7, 4)),
    "cross mov r,[m]": ("488b03", (0x4, 4), None),
    "cross add": ("480103", (0x6, 4), (0x7, 4)),
    "cross-out mov [m],r": ("488903", (0x6, 0), (0x7, 0)),
    "cross-out add": ("480103", (0x6, 0), (0x7, 0)),
}  # fmt: skip


@pytest.mark.parametrize("name", USER_FAULTS)
def test_the_faults_measured_on_a_zen_4_are_reproduced(name: str) -> None:
    code, absent, read_only = USER_FAULTS[name]
    p = P + (-4 if name.startswith("cross ") else PAGE - 4 if name.startswith("cross-out") else 0)
    rax = 64 * 9 if name == "bt [m],64*9" else 0
    values = REGISTERS | {"rbx": p, "rdi": p, "rax": rax}
    parts = accesses(decode(bytes.fromhex(code), RIP), RIP, values.__getitem__)
    for present, measured in ((False, absent), (True, read_only)):
        found = first_fault(parts, lambda part, present=present: part.la & -PAGE != P or (present and not part.write))
        answer = found and (4 | found.write << 1 | present, found.cr2 - p)
        assert answer == measured


def test_push_of_memory_reads_the_operand_and_then_writes_the_stack() -> None:
    assert touched("ff33") == [(P, 8, "r"), (0x7FFE_0000_7FF8, 8, "w")]


def test_call_through_memory_reads_the_target_and_then_pushes() -> None:
    assert touched("ff13") == [(P, 8, "r"), (0x7FFE_0000_7FF8, 8, "w")]
    assert touched("e800000000") == [(0x7FFE_0000_7FF8, 8, "w")]
    assert touched("ff23") == [(P, 8, "r")]


def test_pop_to_an_rsp_relative_operand_addresses_with_the_incremented_rsp() -> None:
    assert touched("8f0424") == [(0x7FFE_0000_8000, 8, "r"), (0x7FFE_0000_8008, 8, "w")]
    assert touched("668f442408") == [(0x7FFE_0000_8000, 2, "r"), (0x7FFE_0000_800A, 2, "w")]
    assert touched("ff3424") == [(0x7FFE_0000_8000, 8, "r"), (0x7FFE_0000_7FF8, 8, "w")]


def test_returns_pop_what_they_return_to() -> None:
    assert touched("c3") == touched("c21000") == [(0x7FFE_0000_8000, 8, "r")]
    assert touched("48cb") == [(0x7FFE_0000_8008, 8, "r"), (0x7FFE_0000_8000, 8, "r")]
    assert sorted(touched("48cf")) == [(0x7FFE_0000_8000 + 8 * n, 8, "r") for n in range(5)]


def test_far_call_reads_a_far_pointer_and_pushes_cs_and_rip() -> None:
    rsp = 0x7FFE_0000_8000
    assert touched("48ff1b") == [(P, 10, "r"), (rsp - 8, 8, "w"), (rsp - 16, 8, "w")]
    assert touched("ff1b") == [(P, 6, "r"), (rsp - 4, 4, "w"), (rsp - 8, 4, "w")]


def test_enter_copies_the_frame_pointers_of_its_level_and_probes_the_new_stack_pointer() -> None:
    rsp, rbp = 0x7FFE_0000_8000, 0x7FFE_0000_9000
    assert touched("c8100000") == [(rsp - 8, 8, "w"), (rsp - 24, 1, "w")]
    assert touched("c8000003") == [
        (rsp - 8, 8, "w"),
        (rbp - 8, 8, "r"),
        (rsp - 16, 8, "w"),
        (rbp - 16, 8, "r"),
        (rsp - 24, 8, "w"),
        (rsp - 32, 8, "w"),
        (rsp - 32, 1, "w"),
    ]


def test_leave_reads_at_the_frame_pointer() -> None:
    assert touched("c9") == [(0x7FFE_0000_9000, 8, "r")]


def test_string_instructions_touch_the_element_that_rsi_and_rdi_point_at() -> None:
    rsi, rdi = 0x5555_0000_1000, 0x5555_0000_2000
    assert touched("48a5") == touched("f348a5") == [(rsi, 8, "r"), (rdi, 8, "w")]
    assert touched("a6") == [(rdi, 1, "r"), (rsi, 1, "r")]
    assert touched("66af") == [(rdi, 2, "r")]
    assert touched("ab") == [(rdi, 4, "w")]
    assert touched("ac") == [(rsi, 1, "r")]
    assert touched("6d") == [(rdi, 4, "w")]
    assert touched("666f") == [(rsi, 2, "r")]


def test_a_repeated_string_instruction_with_count_zero_touches_nothing() -> None:
    assert touched("f348a5", rcx=0) == []
    assert touched("48a5", rcx=0) != []
    assert touched("67f348a5", rcx=1 << 32) == []
    assert touched("f348a5", rcx=1 << 32) != []


def test_a_segment_override_moves_the_source_of_a_string_instruction_only() -> None:
    assert touched("6548a5") == [(0xFFFF_8880_0000_0000 + 0x5555_0000_1000, 8, "r"), (0x5555_0000_2000, 8, "w")]


@pytest.mark.parametrize(("offset", "moved"), [(0, 0), (63, 0), (64, 8), (576, 72), (-1, -8), (-64, -8), (-65, -16)])
def test_bit_tests_reach_whole_operands_beyond_their_address(offset: int, moved: int) -> None:
    assert touched("480fa303", rax=offset % (1 << 64)) == [(P + moved, 8, "r")]
    assert touched("480fbb03", rax=offset % (1 << 64)) == [(P + moved, 8, "rw")]


def test_a_narrow_bit_offset_is_the_low_part_of_its_register_sign_extended() -> None:
    assert touched("660fa303", rax=0xABCD_0010) == [(P + 2, 2, "r")]
    assert touched("0fa303", rax=0x1_FFFF_FFFF) == [(P - 4, 4, "r")]


def test_an_immediate_bit_offset_stays_inside_the_operand() -> None:
    assert touched("480fba23ff") == [(P, 8, "r")]


def test_addresses_are_computed_modulo_the_address_size_before_the_segment_base() -> None:
    assert touched("67488b4301", rbx=0xFFFF_FFFF) == [(0, 8, "r")]
    assert touched("6567488b4301", rbx=0xFFFF_FFFF) == [(0xFFFF_8880_0000_0000, 8, "r")]
    assert touched("488b4308", rbx=(1 << 64) - 4) == [(4, 8, "r")]
    assert touched("65488b042528000000") == [(0xFFFF_8880_0000_0028, 8, "r")]
    assert touched("64488b042528000000") == [(0x1234_0028, 8, "r")]


def test_rip_relative_addresses_count_from_the_next_instruction() -> None:
    assert touched("488b0510000000") == [(RIP + 7 + 16, 8, "r")]
    assert touched("48c7051000000001000000") == [(RIP + 11 + 16, 8, "w")]
    assert touched("67488b0510000000") == [((RIP + 8 + 16) & 0xFFFF_FFFF, 8, "r")]


def test_xlat_indexes_with_al() -> None:
    assert touched("d7") == [(P + 0x77, 1, "r")]


def test_a_moffs_is_an_absolute_64_bit_address() -> None:
    assert touched("48a1efcdab8967452301") == [(0x0123_4567_89AB_CDEF, 8, "r")]
    assert touched("a2efcdab8967452301") == [(0x0123_4567_89AB_CDEF, 1, "w")]


@pytest.mark.parametrize("code", ["488d03", "0f1f03", "0f013b", "0f180b", "0f0d0b", "90", "4889c0", "0f0b"])
def test_address_only_operands_and_registers_are_no_access(code: str) -> None:
    assert touched(code) == []


SIZES = {
    "0f0103": (10, "w"), "0f010b": (10, "w"), "0f0113": (10, "r"), "0f011b": (10, "r"), "0f0003": (2, "w"),
    "0f000b": (2, "w"), "0f0123": (2, "w"), "0f0013": (2, "r"), "0f001b": (2, "r"), "660f388203": (16, "r"),
    "0fae3b": (1, "r"), "660fae3b": (1, "r"), "660fae33": (1, "r"), "480fae03": (512, "w"), "0fae0b": (512, "r"),
    "d933": (28, "w"), "66d933": (14, "w"), "d923": (28, "r"), "dd33": (108, "w"), "dd23": (108, "r"), "db3b": (10, "w"),
    "db2b": (10, "r"), "df33": (10, "w"), "df23": (10, "r"), "d93b": (2, "w"), "d92b": (2, "r"), "dd3b": (2, "w"),
    "0fae1b": (4, "w"), "0fae13": (4, "r"), "480fc303": (8, "w"), "660fe703": (16, "w"), "f30f1003": (4, "r"),
    "f20f1103": (8, "w"), "0f1603": (8, "r"), "0f1303": (8, "w"), "0f2f03": (4, "r"), "660f2f03": (8, "r"),
    "660fc40301": (2, "r"), "660f3a150301": (2, "w"), "660f3a160301": (4, "w"), "66480f3a160301": (8, "w"),
    "660f3a140301": (1, "w"), "660f382003": (8, "r"), "660f382203": (2, "r"), "480fc70b": (16, "rw"), "0fc70b": (8, "rw"),
    "f20f38f003": (1, "r"), "66f20f38f103": (2, "r"), "480f38f003": (8, "r"), "480f38f103": (8, "w"), "48ad": (8, "r"),
    "0fb703": (2, "r"), "486303": (4, "r"), "8c03": (2, "w"), "488c03": (2, "w"), "8e03": (2, "r"), "480fb203": (10, "r"),
    "f30fbc03": (4, "r"), "66480fbc03": (8, "r"), "0f9003": (1, "w"), "f00fb003": (1, "rw"), "8613": (1, "rw"),
    "48d35b08": (8, "rw"), "480fad03": (8, "rw"), "480fc003": (1, "rw"), "f7f3": None, "48f733": (8, "r"), "f62b": (1, "r"),
}  # fmt: skip


@pytest.mark.parametrize("code", SIZES)
def test_size_and_direction_of_an_operand_are_those_of_the_manual(code: str) -> None:
    wanted = SIZES[code]
    found = [(size, how) for _, size, how in touched(code)]
    assert found == ([] if wanted is None else [wanted])


def test_stack_operands_are_those_based_on_rsp_or_rbp_without_an_fs_or_gs_override() -> None:
    for code in ("488b0424", "488b4500", "3e488b4500", "58", "50", "c9", "c3"):
        assert only(code).stack
    for code in ("488b03", "64488b4500", "65488b0424", "498b0424", "498b4500", "36488b03", "488b042500100000", "ac"):
        assert not only(code).stack


def test_descriptor_tables_are_read_as_supervisor_through_the_selector() -> None:
    gdt, ldt = 0xFFFF_FE00_0000_1000, 0xFFFF_FE00_0000_5000
    assert descriptor_access(0x2B, gdt, ldt) == MemoryAccess(gdt + 0x28, 8, True, False, implicit=True)
    assert descriptor_access(0x0C, gdt, ldt) == MemoryAccess(ldt + 0x08, 8, True, False, implicit=True)
    assert descriptor_access(3, gdt, ldt) is None
    for code in ("8ed8", "8e1b", "0fa1", "0f02c3", "0f03c3", "0f00e3", "0f00eb", "48cf", "48cb", "48ff1b", "0f00d3", "0f00db"):
        assert decode(bytes.fromhex(code), RIP).descriptors
    for code in ("8cd8", "48c7c001000000", "c3", "0fa0"):
        assert not decode(bytes.fromhex(code), RIP).descriptors


def test_a_refused_page_names_the_first_byte_of_the_access_in_it() -> None:
    crossing = [MemoryAccess(P - 4, 8, True, False)]
    assert fault(crossing, RIP, P - PAGE, READ) == FaultAddress(P - 4, False, False, False)
    assert fault(crossing, RIP, P, READ) == FaultAddress(P, False, False, False)


def test_a_refused_read_of_a_read_modify_write_operand_is_a_write_fault() -> None:
    assert fault([MemoryAccess(P, 8, True, True)], RIP, P, READ) == FaultAddress(P, True, False, False)


def test_of_two_accesses_to_one_page_the_refused_kind_decides() -> None:
    both = [MemoryAccess(P + 8, 8, True, False), MemoryAccess(P, 8, False, True, stack=True)]
    assert fault(both, RIP, P, READ) == FaultAddress(P + 8, False, False, False)
    assert fault(both, RIP, P, WRITE) == FaultAddress(P, True, False, True)


def test_a_refused_fetch_names_rip_or_the_start_of_the_page_it_runs_into() -> None:
    assert fault((), P + 0xFFE, P, FETCH) == FaultAddress(P + 0xFFE, False, False, False)
    assert fault((), P + 0xFFE, P + PAGE, FETCH) == FaultAddress(P + PAGE, False, False, False)


def test_an_access_that_the_instruction_does_not_explain_is_implicit() -> None:
    assert fault((), RIP, P, WRITE) == FaultAddress(P, True, True, False)


def test_an_access_may_wrap_around_the_end_of_the_address_space() -> None:
    wrapped = [MemoryAccess((1 << 64) - 2, 8, True, False)]
    assert [(part.la, part.size) for part in checks(wrapped)] == [((1 << 64) - 2, 2), (0, 6)]
    assert fault(wrapped, RIP, 0, READ).cr2 == 0


def test_when_both_pages_of_a_modified_operand_fail_the_lower_one_is_reported() -> None:
    crossing = [MemoryAccess(P - 4, 8, True, True)]
    read_only, absent = P - PAGE, P
    found = first_fault(crossing, lambda part: part.la & -PAGE == read_only and not part.write)
    assert found == FaultAddress(P - 4, True, False, False)
    assert fault(crossing, RIP, absent, READ).cr2 == P


@pytest.mark.parametrize("code", ["", "48", "0f", "66", "48b8", "0f04", "06", "c5f877", "62f17c4810", "8fe97801"])
def test_bytes_that_are_no_instruction_of_the_model_raise_undecodable(code: str) -> None:
    with pytest.raises(Undecodable) as refused:
        decode(bytes.fromhex(code), RIP)
    assert refused.value.la == RIP
    assert refused.value.code == bytes.fromhex(code)


def test_the_fetch_boundary_is_the_first_instruction_that_the_bytes_do_not_hold() -> None:
    increment, load = bytes.fromhex("48ffc0"), bytes.fromhex("488b0510000000")
    assert fetch_boundary(increment * 3, RIP) == RIP + 9
    assert fetch_boundary(increment * 3 + load[:6], RIP) == RIP + 9
    assert fetch_boundary(load[:6], RIP) == RIP
    assert fetch_boundary(increment * 3 + b"\x06" + increment * 6, RIP) == RIP + 9


def test_the_same_bytes_give_the_same_object() -> None:
    assert decode(bytes.fromhex("488b03") + b"\xcc" * 12, 1) is decode(bytes.fromhex("488b03") + b"\xcc" * 12, 2)


def test_no_bytes_at_all_break_the_decoder() -> None:
    for first in range(256):
        for second in range(256):
            for tail in (b"", bytes(13), b"\xff" * 13, b"\x0f" * 13):
                try:
                    instruction = decode(bytes((first, second)) + tail, RIP)
                except Undecodable:
                    continue
                accesses(instruction, RIP, REGISTERS.__getitem__)
                assert 0 < instruction.size <= 15
