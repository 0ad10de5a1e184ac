"""GNU as as an independent oracle: random instructions mean the same to both assemblers, or ours refuses them."""

from __future__ import annotations

import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import capstone
import pytest

from emu.guest.asm import assemble
from emu.guest.error import GuestError

REGISTERS = {
    8: "rax rbx rcx rdx rsi rdi rbp rsp r8 r12 r13 r15".split(),
    4: "eax ebx ecx edx esi ebp esp r8d r12d r13d".split(),
    2: "ax bx cx dx si r9w r13w".split(),
    1: "al bl cl dl sil dil r8b r14b".split(),
}
SIZES = {8: "qword ptr", 4: "dword ptr", 2: "word ptr", 1: "byte ptr"}
TWO_OPERANDS = "mov add sub and or xor cmp adc sbb test".split()
OTHERS = "lea imul shl movzx movsx bt xadd cmpxchg inc not mul push pop cmovb setne bswap".split()


def memory(rng: random.Random, size: int) -> str:
    base = rng.choice([*REGISTERS[8], None])
    index = rng.choice([*(r for r in REGISTERS[8] if r != "rsp"), None])
    parts = [p for p in (base, f"{index}*{rng.choice([1, 2, 4, 8])}" if index else None) if p] or ["rbx"]
    return f"{SIZES[size]} [{'+'.join(parts)}{rng.choice(['', '+1', '-1', '+127', '-128', '+128', '+74565', '-2147483647'])}]"


def instruction(rng: random.Random) -> str:
    size = rng.choice([1, 2, 4, 8])
    register = rng.choice(REGISTERS[size])
    operand = rng.choice([register, memory(rng, size)])
    number = rng.choice([0, 1, -1, 127, -128, 128, 255, 4096, 65535, 0x7FFFFFFF, -0x80000000, rng.getrandbits(8 * min(size, 4))])
    name = rng.choice(rng.choice([TWO_OPERANDS, OTHERS]))
    if name in TWO_OPERANDS:
        operands = rng.choice([f"{operand}, {number}", f"{register}, {memory(rng, size)}", f"{memory(rng, size)}, {register}"])
        return f"{name} {operands}"
    if name in ("inc", "not", "mul"):
        return f"{name} {operand}"
    if name in ("xadd", "cmpxchg"):
        return f"{name} {operand}, {register}"
    narrow = rng.choice([1, 2])
    return {
        "lea": f"lea {rng.choice(REGISTERS[8])}, {memory(rng, 8).removeprefix('qword ptr ')}",
        "imul": f"imul {register}, {operand}, {number}",
        "shl": f"shl {operand}, {rng.choice(['cl', 1, 5])}",
        "bt": f"bt {operand}, {rng.choice([register, 5])}",
        "cmovb": f"cmovb {register}, {operand}",
        "setne": f"setne {rng.choice([rng.choice(REGISTERS[1]), memory(rng, 1)])}",
        "bswap": f"bswap {rng.choice(REGISTERS[rng.choice([4, 8])])}",
    }.get(
        name,
        f"{name} {rng.choice(REGISTERS[4])}, {memory(rng, narrow)}" if name.startswith("mov")
        else f"{name} {rng.choice([rng.choice(REGISTERS[8]), memory(rng, 8)])}",
    )  # fmt: skip


def by_gas(lines: list[str], folder: Path) -> Iterator[tuple[str, bytes]]:
    """(line, bytes) of the lines that GNU as accepts."""
    source, target, flat = folder / "t.s", folder / "t.o", folder / "t.bin"
    for _ in range(2):
        source.write_text(".intel_syntax noprefix\n" + "\n".join(lines) + "\n")
        done = subprocess.run(["as", "-o", str(target), str(source)], capture_output=True, text=True, check=False)
        bad = {int(m.split(":")[1]) - 2 for m in done.stderr.splitlines() if ": Error:" in m}
        lines = [line for number, line in enumerate(lines) if number not in bad]
    subprocess.run(["objcopy", "-O", "binary", "-j", ".text", str(target), str(flat)], check=True)
    insns = list(capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64).disasm(flat.read_bytes(), 0))
    assert len(insns) == len(lines)
    yield from ((line, bytes(i.bytes)) for line, i in zip(lines, insns, strict=True))


@pytest.mark.skipif(not (shutil.which("as") and shutil.which("objcopy")), reason="needs binutils")
def test_random_instructions_mean_what_gnu_as_makes_of_them(tmp_path: Path) -> None:
    rng = random.Random(20)
    engine = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)
    compared = refused = 0
    for line, theirs in by_gas([instruction(rng) for _ in range(1500)], tmp_path):
        try:
            ours = assemble(line, "t.asm").sections[0].data
        except GuestError:
            refused += 1
            continue
        compared += 1
        assert [(i.mnemonic, i.op_str) for i in engine.disasm(ours, 0)] == [
            (i.mnemonic, i.op_str) for i in engine.disasm(theirs, 0)
        ], line  # fmt: skip
    # GNU as cuts immediates to size without a word; ours refuses those, and nothing else.
    assert compared > 1000
    assert refused < compared / 10
