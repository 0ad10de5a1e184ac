"""Whatever bytes a guest executes, the machine ends the run with one of its endings: never a Python exception, never a hang."""

from __future__ import annotations

import random

import pytest

from emu.guest.asm import assemble
from emu.guest.directives import ENDS, MachineOptions
from emu.run import run_program

LIMIT = 20_000
RUNS = 40
# Opcodes of privileged, string, stack and control instructions, which random bytes would rarely make.
SEEDS = [bytes.fromhex(text) for text in (
    "0f20c0 0f22c0 0f22d8 0f22e0 0f01f8 0f0115 0f011d 0f0138 660f3882 0f30 0f32 48cf cf cd80 cc 0f05 480f07 0f34 "
    "cb 48cb f4 fa fb 9d f3a4 f348ab 50 58 c3 e8 ff20 ff10 ff28 0f00d8 0f00d0 8ed8 8ee0 8ed0 0fa1 0f01ef 0f01ee "
    "0f31 0fa2 0fc7f0 0f0b 0f08 0f09 0fae 0f23f8 0f21f8 6c 6e ec ee 0f01d0 0f01c1 0f01ca 0f01cb 48a1 c8 c9 9a ea "
    "62 c4 c5 d6 f1 0f18 f00fc7 0f0d 8f 0fb2 0f03 0f02"
).split()]


def wild_code(generator: random.Random) -> bytes:
    """A hundred or so bytes, half of them from the list above."""
    pieces = [
        generator.choice(SEEDS) if generator.random() < 0.5 else generator.randbytes(generator.randrange(1, 8)) for _ in range(24)
    ]
    return b"".join(pieces)


@pytest.mark.parametrize("seed", range(16))
def test_random_code_always_comes_to_an_end(seed: int) -> None:
    generator = random.Random(seed)
    for _ in range(RUNS):
        code = wild_code(generator)
        text = "section .text\ninit_module:\n    db " + ", ".join(f"{byte:#04x}" for byte in code) + "\n"
        result = run_program(assemble(text, "wild.asm"), MachineOptions(max_instructions=LIMIT, memory=64 << 20))
        assert result.outcome.ended in ENDS
