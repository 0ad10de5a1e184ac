"""What Unicorn tells about memory accesses in virtual TLB mode. A new Unicorn must not change it silently."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import pytest
import unicorn as uc_
from bare_unicorn import CODE, DATA, READ, WRITE, Bare
from unicorn import x86_const as x86
from unicorn.unicorn_py3.unicorn import uclib

from emu.native_log import ACCESS_WORDS, BLOCK_WORDS, KIND_SHIFT, LOGGED, REGISTER_AT, WRITE_KIND, NativeLog

HLT = "f4"
RAM_MASK = (4 << 20) - 1
_Callback = ctypes.CFUNCTYPE(
    None, ctypes.c_void_p, ctypes.c_int, ctypes.c_uint64, ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
)


@dataclass
class Seen:
    write: bool
    address: int
    size: int
    value: int
    rip: int
    rsp: int
    rcx: int


def listen(cpu: Bare) -> list[Seen]:
    """Hear of accesses as UC_HOOK_MEM_READ_AFTER, which the binding does not offer, and UC_HOOK_MEM_WRITE tell of them."""
    seen: list[Seen] = []

    def hear(_handle: int, kind: int, address: int, size: int, value: int, _data: int) -> None:
        reg = cpu.uc.reg_read
        seen.append(Seen(
            kind == uc_.UC_MEM_WRITE, address, size, value & (1 << 8 * size) - 1, reg(x86.UC_X86_REG_RIP), reg(x86.UC_X86_REG_RSP),
            reg(x86.UC_X86_REG_RCX),
        ))

    cpu.callback = _Callback(hear)  # type: ignore[attr-defined]
    for hook in (uc_.UC_HOOK_MEM_READ_AFTER, uc_.UC_HOOK_MEM_WRITE):
        status = uclib.uc_hook_add(
            cpu.uc._uch, ctypes.byref(ctypes.c_size_t()), hook, cpu.callback, None,  # type: ignore[attr-defined]
            ctypes.c_uint64(1), ctypes.c_uint64(0),
        )
        assert status == uc_.UC_ERR_OK
    return seen


def test_addresses_are_physical_and_the_registers_are_those_before_the_instruction() -> None:
    cpu = Bare()
    cpu.put(DATA, (0x1122334455667788).to_bytes(8, "little"))
    seen = listen(cpu)
    cpu.run("90" + "488b0f" + "51" + HLT, rdi=DATA, rcx=5)  # nop; mov rcx, [rdi]; push rcx
    read, push = seen
    assert (read.write, read.address, read.size, read.value) == (False, DATA & RAM_MASK, 8, 0x1122334455667788)
    assert (read.rip, read.rcx) == (CODE + 1, 5)
    assert (push.write, push.value, push.rip) == (True, 0x1122334455667788, CODE + 4)
    assert push.address == push.rsp - 8 & RAM_MASK


def test_an_access_that_fails_is_not_told_of() -> None:
    cpu = Bare()
    seen = listen(cpu)
    cpu.refuse.add(DATA)
    with pytest.raises(uc_.UcError):
        cpu.run("488b0f" + HLT, rdi=DATA)
    assert seen == []


def test_the_page_is_asked_for_before_the_access_is_told_of() -> None:
    cpu = Bare()
    seen = listen(cpu)
    order: list[int] = []
    cpu.on_fill = lambda page, access: order.append(len(seen)) if access in (READ, WRITE) else None
    cpu.run("488b0f" + "48890f" + HLT, rdi=DATA)
    assert order == [0, 1] and len(seen) == 2


@pytest.mark.parametrize("code", ["48890f", "488b0f"], ids=["store", "load"])
def test_an_access_that_crosses_into_another_page_is_told_of_once_with_the_address_of_its_first_byte(code: str) -> None:
    cpu = Bare()
    cpu.put(DATA + 0xFFD, (0x8877665544332211).to_bytes(8, "little"))
    seen = listen(cpu)
    cpu.run(code + HLT, rdi=DATA + 0xFFD, rcx=0x8877665544332211)
    assert [(one.address, one.size, one.value) for one in seen] == [(DATA + 0xFFD & RAM_MASK, 8, 0x8877665544332211)]


@pytest.mark.parametrize(("code", "told"), [("48890f", 1), ("488b0f", 0)], ids=["store", "load"])
def test_only_a_store_that_crosses_is_told_of_before_its_second_page_fails(code: str, told: int) -> None:
    cpu = Bare()
    seen = listen(cpu)
    cpu.refuse.add(DATA + 0x1000)
    with pytest.raises(uc_.UcError):
        cpu.run(code + HLT, rdi=DATA + 0xFFD, rcx=-1)
    assert len(seen) == told
    assert cpu.get(DATA + 0xFFD, 3) == bytes(3)


def test_each_element_of_a_repeated_instruction_is_told_of_with_its_own_registers() -> None:
    cpu = Bare()
    seen = listen(cpu)
    cpu.run("f348ab" + HLT, rdi=DATA, rcx=3, rax=7)  # rep stosq
    assert [(one.address, one.value, one.rcx) for one in seen] == [
        (DATA + 8 * n & RAM_MASK, 7, 3 - n) for n in range(3)
    ]


def test_the_native_log_says_the_same() -> None:
    cpu, other = Bare(), Bare()
    for one in (cpu, other):
        one.put(DATA, (3).to_bytes(8, "little"))
    code = "488b0f" + "51" + "48834708 05".replace(" ", "") + "f348ab" + HLT
    seen = listen(cpu)
    cpu.run(code, rdi=DATA, rcx=1, rax=9)
    log = NativeLog(other.uc, lambda: None, accesses=True)
    other.run(code, rdi=DATA, rcx=1, rax=9)
    words = log.take()
    told, blocks, at = [], 0, 0
    while at < len(words):
        if words[at] < 1 << KIND_SHIFT:
            blocks, at = blocks + 1, at + BLOCK_WORDS
            continue
        size = words[at] & 0xFFFF_FFFF
        registers = dict(zip(LOGGED, words[at + REGISTER_AT : at + ACCESS_WORDS], strict=True))
        told.append(Seen(
            words[at] >> KIND_SHIFT == WRITE_KIND, words[at + 1], size, words[at + 2] & (1 << 8 * size) - 1, registers["rip"],
            registers["rsp"], registers["rcx"],
        ))
        at += ACCESS_WORDS
    assert told == seen and blocks > 1
    assert log.take() == []


def test_a_full_log_is_drained_from_inside_the_run() -> None:
    cpu = Bare()
    drained: list[int] = []
    log = NativeLog(cpu.uc, lambda: drained.append(len(log.take())), accesses=True)
    cpu.run("f3aa" + HLT, rdi=DATA, rcx=20_000, rax=1)  # rep stosb
    rest = len(log.take())
    # Each element is an access, and from the second on a block of its own.
    assert len(drained) >= 2
    assert sum(drained) + rest >= 20_000 * ACCESS_WORDS
