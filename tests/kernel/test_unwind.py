"""The call trace: what is found on the stacks, and what is vouched for."""

from __future__ import annotations

from dataclasses import replace

import pytest

from emu.kernel.ptrace import PT_REGS_SIZE, PtRegs
from emu.kernel.unwind import (
    Call,
    StackInfo,
    Stacks,
    StackSection,
    StackType,
    TraceLine,
    Unwinder,
    call_before,
    sprint_backtrace,
    sprint_symbol,
    stack_type_name,
    trace_addresses,
)

# Three functions of 0x100 bytes: a() calls b() directly, b() calls c() through a register, c() calls a().
A, B, C = 0xFFFFFFFF81000000, 0xFFFFFFFF81000100, 0xFFFFFFFF81000200
TEXT = bytearray(b"\x90" * 0x300)
TEXT[0x10:0x15] = b"\xe8" + (B - (A + 0x15)).to_bytes(4, "little")
TEXT[0x120:0x122] = b"\xff\xd0"
TEXT[0x230:0x235] = b"\xe8" + (A - (C + 0x35)).to_bytes(4, "little", signed=True)
RET_A, RET_B, RET_C = A + 0x15, B + 0x22, C + 0x35
STACK = StackInfo(StackType.TASK, 0xFFFFC90000008000, 0xFFFFC9000000C000)


def symbolize(la: int) -> str | None:
    if A <= la < A + 0x300:
        return f"{'abc'[(la - A) >> 8]}+0x{la & 0xFF:x}/0x100"
    return None


class Machine:
    """Text and a few stack words; everything else is unmapped."""

    def __init__(self, words: dict[int, int] | None = None) -> None:
        self.words = words or {}

    def read(self, la: int, size: int) -> bytes | None:
        if la >= A and la + size <= A + len(TEXT):
            return bytes(TEXT[la - A : la - A + size])
        if STACK.begin <= la < STACK.end or la in self.words:
            return self.words.get(la, 0).to_bytes(8, "little")
        return None

    def unwinder(self) -> Unwinder:
        return Unwinder(self.read, lambda la: A <= la < A + 0x300, symbolize)


def trace(words: dict[int, int], *, sp: int, ip: int, bp: int = 0, **more: object) -> list[tuple[int, bool]]:
    unwinder = replace(Machine(words).unwinder(), **more)  # type: ignore[arg-type]
    (section,) = unwinder.show_trace(Stacks((STACK,)), sp=sp, ip=ip, bp=bp)
    return [(item.la, item.reliable) for item in section.items if isinstance(item, TraceLine)]


TOP = STACK.end - 0x100


def test_a_chain_of_calls_is_reliable_without_frame_pointers() -> None:
    words = {TOP + 8: RET_B, TOP + 0x20: RET_A, TOP + 0x48: RET_C}
    assert trace(words, sp=TOP, ip=C + 0x50) == [(RET_B, True), (RET_A, True), (RET_C, True)]


def test_a_stale_word_of_another_call_is_a_clue_only() -> None:
    words = {TOP + 8: RET_C, TOP + 0x20: RET_A}
    assert trace(words, sp=TOP, ip=B + 0x50) == [(RET_C, False), (RET_A, True)]


def test_a_text_address_behind_no_call_is_a_clue_only() -> None:
    assert trace({TOP: A + 0x80, TOP + 8: B}, sp=TOP, ip=B + 1) == [(A + 0x80, False), (B, False)]


def test_words_that_are_no_text_are_left_out() -> None:
    assert trace({TOP: 0x1234, TOP + 8: STACK.begin}, sp=TOP, ip=A) == []


def test_a_frame_pointer_chain_vouches_for_its_slots() -> None:
    words = {TOP + 0x10: TOP + 0x40, TOP + 0x18: A + 0x80, TOP + 0x40: 0, TOP + 0x48: B + 0x80, TOP + 0x50: C + 0x80}
    assert trace(words, sp=TOP, ip=A, bp=TOP + 0x10) == [(A + 0x80, True), (B + 0x80, True), (C + 0x80, False)]


def test_a_frame_pointer_that_runs_downwards_ends_the_chain() -> None:
    words = {TOP + 0x40: TOP + 0x10, TOP + 0x48: A + 0x80, TOP + 0x18: B + 0x80}
    assert trace(words, sp=TOP, ip=A, bp=TOP + 0x40) == [(B + 0x80, False), (A + 0x80, True)]


def test_the_hint_decides_before_any_rule() -> None:
    known = {TOP: False, TOP + 8: True}
    assert trace({TOP: RET_A, TOP + 8: A + 0x80}, sp=TOP, ip=B, hint=known.get) == [(RET_A, False), (A + 0x80, True)]


def test_an_interrupted_context_on_the_way_is_shown_by_its_registers() -> None:
    regs = PtRegs(ip=B + 0x40, cs=0x10, bp=0)
    words = {TOP + 8: RET_A, TOP + PT_REGS_SIZE + 8: RET_A}
    unwinder = replace(Machine(words).unwinder(), entry_regs={TOP: regs})
    (section,) = unwinder.show_trace(Stacks((STACK,)), sp=TOP, ip=C, bp=0)
    assert section == StackSection(StackType.TASK, (regs, TraceLine(RET_A, True)))


def test_an_overflowed_stack_is_shown_from_its_first_page_on() -> None:
    words = {STACK.begin + 8: RET_A}
    assert trace(words, sp=STACK.begin - 0x80, ip=B) == [(RET_A, True)]


def test_a_stack_pointer_far_off_every_stack_shows_nothing() -> None:
    assert Machine().unwinder().show_trace(Stacks((STACK,)), sp=STACK.begin - 0x1001, ip=A, bp=0) == ()


def test_each_stack_leads_to_the_one_it_was_entered_from_once() -> None:
    df = StackInfo(StackType.DF, 0xFFFFFE0000009000, 0xFFFFFE000000B000, next_sp=TOP)
    words = {df.end - 8: RET_A, TOP: RET_C}
    sections = Machine(words).unwinder().show_trace(Stacks((STACK, df)), sp=df.end - 16, ip=B, bp=0)
    assert [section.type for section in sections] == [StackType.DF, StackType.TASK]
    assert trace_addresses(sections) == (RET_A, RET_C)
    looping = replace(df, next_sp=df.begin)
    assert len(Machine(words).unwinder().show_trace(Stacks((looping,)), sp=df.begin, ip=B, bp=0)) == 1


def test_the_context_that_an_exception_interrupted_goes_on_on_its_own_stack() -> None:
    df = StackInfo(StackType.DF, 0xFFFFFE0000009000, 0xFFFFFE000000B000, next_sp=TOP)
    frame = df.end - PT_REGS_SIZE
    unwinder = replace(Machine({TOP: RET_A}).unwinder(), entry_regs={frame: PtRegs(ip=B + 0x40, cs=0x10)})
    sections = unwinder.show_trace(Stacks((STACK, df)), sp=frame, ip=C, bp=0)
    assert sections[1].items == (TraceLine(RET_A, True),)


@pytest.mark.parametrize(
    ("code", "call"),
    [
        ("9090e8fbffffff", Call(0x1000 - 5)),
        ("9090909090ffd0", Call(None)),
        ("909090ff542408", Call(None)),
        ("90909090ff5008", Call(None)),
        ("90ff9000010000", Call(None)),
        ("90ff1500010000", Call(None)),
        ("ff942400010000", Call(None)),
        ("ff142500010000", Call(None)),
        ("90909090ff1424", Call(None)),
        ("9090909041ffd3", Call(None)),
        ("9090909090ffe0", None),
        ("90909090909090", None),
        ("ff900001000090", None),
    ],
)
def test_call_instructions_are_recognised_by_their_last_byte(code: str, call: Call | None) -> None:
    assert call_before(lambda la, size: bytes.fromhex(code)[la - 0xFF9 :][:size], 0x1000) == call


def test_a_call_at_the_very_start_of_text_is_still_seen() -> None:
    assert call_before(lambda la, size: b"\xff\xd0" if size == 2 else None, 0x1000) == Call(None)
    assert call_before(lambda la, size: None, 0x1000) is None


def test_a_return_address_behind_the_last_call_names_its_own_function() -> None:
    assert sprint_symbol(symbolize, B) == "b+0x0/0x100"
    assert sprint_backtrace(symbolize, B) == "a+0x100/0x100"
    assert sprint_symbol(symbolize, 0x1234) == sprint_backtrace(symbolize, 0x1234) == "0x1234"


def test_guard_pages_belong_to_the_stack_above_them() -> None:
    stacks = Stacks((STACK,))
    assert stacks.get_stack_guard_info(STACK.begin - 1) == STACK
    assert stacks.get_stack_guard_info(STACK.begin - 0x1000) == STACK
    assert stacks.get_stack_guard_info(STACK.begin - 0x1001) is None
    assert stacks.get_stack_guard_info(STACK.begin) is None
    assert stacks.get_stack_info(STACK.end) is None


def test_stacks_have_the_names_of_call_traces() -> None:
    names = [stack_type_name(stack_type) for stack_type in StackType]
    assert names == [None, "TASK", "IRQ", "SOFTIRQ", "ENTRY_TRAMPOLINE", "#DF", "NMI", "#DB", "#MC", "#VC", "#VC2"]
