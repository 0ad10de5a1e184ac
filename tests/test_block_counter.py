"""Counting by blocks: the same numbers, at every stop, as counting each instruction."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from bare_cpu import CODE, DATA, STACK, BareCpu, assemble

from emu.block_counter import BlockCounter
from emu.stop_reason import StopReason

pytestmark = pytest.mark.skipif(not BlockCounter.available(), reason="this host has no machine code for the counter")

ABSENT = DATA + 0x4000
GENERAL = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "r8", "r9", "rsp")
SNIPPETS = """
inc rax | add rbx, rax | xor r8, rbx; rol r8, 3 | mov rdx, [rsi] | mov [rsi], rax | add [rsi + 8], r8 | push rax; pop rbx | pause
lea r9, [rax + rbx*4] | imul rax, rbx | cmp rax, rbx; cmovc rbx, rax | nop | cpuid | rdtsc | ud2 | mov rdx, [r15] | pushfq; popfq
mov [r15 + 8], rax | xor edx, edx; xor r11d, r11d; div r11 | mov ecx, 5; rep movsb | mov ecx, 3; rep stosq | sti | cli
mov ecx, 4; repne scasb | lock inc qword ptr [rsi] | xchg rax, [rdi] | mov r11, cr0 | int 0x80 | movaps xmm0, [rsi + 1]
mov byte ptr [r14], 0x90 | mov byte ptr [r14 + rdx], 0x90 | mov dword ptr [r14 + 0x40], 0x90909090
"""
WHOLE = [assemble(snippet.strip()) for line in SNIPPETS.strip().splitlines() for snippet in line.split("|")]
# INT3, HLT, and encodings that Unicorn and the disassembler do not agree about.
PIECES = WHOLE + [bytes.fromhex(code) for code in "cc f4 0f1c00 0f1900 f30f1efa c508b32f 660f1f440000 62f17c48 d9c0 dd06".split()]
START = {
    "rax": 3, "rbx": 5, "rcx": 7, "rdx": 0,
    "rsi": DATA, "rdi": DATA + 0x800, "r8": 1, "r9": 2, "r15": ABSENT, "rsp": STACK, "rflags": 2,
}


def by_instructions(patch: pytest.MonkeyPatch) -> None:
    """Engines made from now on count each instruction."""
    patch.setattr(BlockCounter, "available", staticmethod(lambda: False))


def random_program(rng: random.Random) -> bytes:
    """Pieces in random order, with jumps among them and now and then bytes without sense."""
    code = b""
    for _ in range(rng.randrange(8, 60)):
        kind = rng.random()
        if kind < 0.75:
            code += rng.choice(PIECES)
        elif kind < 0.85:
            code += bytes((rng.choice((0x74, 0x75, 0x72, 0xEB, 0x79)), rng.randrange(0, 24)))
        elif kind < 0.9:
            code += bytes((0xE2, rng.randrange(0xE0, 0x100)))  # loop, backwards
        else:
            code += rng.randbytes(rng.randrange(1, 6))
    return code + b"\xeb\xfe"


def loaded(limit: int, code: bytes, at: int) -> BareCpu:
    """A CPU with a program and its registers; the page that r15 points to is absent."""
    cpu = BareCpu(limit=limit)
    cpu.memory.write(at, code)
    cpu.unmap(ABSENT)
    for name, value in START.items():
        cpu.engine.set_reg(name, value)
    cpu.engine.set_reg("r14", at + 0x20)
    return cpu


def trace(limit: int, code: bytes, at: int, budgets: Iterator[int | None], stops: int) -> list[tuple[object, ...]]:
    """Every stop of an engine that steps over one byte of what it cannot execute: reason, RIP, count, registers."""
    engine = loaded(limit, code, at).engine
    rip = at
    seen: list[tuple[object, ...]] = []
    for _ in range(stops):
        reason = engine.run(rip, next(budgets))
        assert engine.counter is not None
        rip = engine.reg("rip")
        # Where each instruction has a callback, Unicorn may stop with the flags of before the last instruction that set them.
        engine.set_reg("rflags", 2)
        seen.append((reason, rip, engine.counter.executed, *(engine.reg(name) for name in GENERAL)))
        if reason is StopReason.LIMIT:
            break
        if reason not in (StopReason.BUDGET, StopReason.HALT):
            if reason is StopReason.INTERRUPT:
                engine.forget_exception()
            rip += 1
        if not at <= rip < at + len(code) + 64:
            rip = at + len(seen)
    return seen


@pytest.mark.parametrize("seed", range(40))
def test_random_programs_are_counted_as_each_instruction_would_be(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(5):
        rng = random.Random(f"{seed} {number}")
        code = random_program(rng)
        at = CODE + rng.choice((0, 0x7F0, 0xFE0))
        budgets = [rng.choice((None, 1, 2, 3, 7, 30, 200, 1000)) if seed % 2 else None for _ in range(60)]
        limit = rng.choice((100, 999, 3000))
        blocks = trace(limit, code, at, iter(budgets), 60)
        with monkeypatch.context() as patch:
            by_instructions(patch)
            single = trace(limit, code, at, iter(budgets), 60)
        assert blocks == single, (number, code.hex())


@pytest.mark.parametrize("seed", range(20))
def test_a_run_that_is_cut_anywhere_ends_as_a_run_in_one(seed: int) -> None:
    rng = random.Random(f"cut {seed}")
    # An instruction that overwrites itself begins twice in one run: with a budget of one it would never end.
    pieces = [piece for piece in WHOLE if not piece.startswith((b"\x41\xc6", b"\x41\xc7"))]
    body = b"".join(rng.choice(pieces) + bytes((rng.choice((0x73, 0x74, 0x75, 0x79)), 0)) for _ in range(30))
    code = body + b"\xf4"
    ends = []
    for cut in (None, 1, 2, 3, 5, 17):
        engine = loaded(5000, code, CODE).engine
        rip = CODE
        while (reason := engine.run(rip, cut)) not in (StopReason.HALT, StopReason.LIMIT):
            rip = engine.reg("rip")
            if reason is not StopReason.BUDGET:
                if reason is StopReason.INTERRUPT:
                    engine.forget_exception()
                rip += 1
        assert engine.counter is not None
        ends.append((reason, engine.counter.executed, engine.reg("rip"), *(engine.reg(n) for n in ("rflags", *GENERAL))))
        if reason is StopReason.LIMIT:  # whatever a loop of modified code does until then
            break
    assert len(set(ends)) == 1
