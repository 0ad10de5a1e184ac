"""What being preemptible costs: speed of counted and of bounded runs against an unbounded one.

    python tools/bench_preempt.py [--quick]

Each row is a loop; each column a speed relative to the engine without a limit, which does not count.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from bare_cpu import CODE, DATA, BareCpu, assemble  # noqa: E402

from emu.engine import Engine  # noqa: E402
from emu.stop_reason import StopReason  # noqa: E402

QUANTA = (1_000_000, 100_000, 10_000)
_MANY = 1 << 60
# Source, and instructions an iteration of RCX.
LOOPS = {
    "alu": ("a: add rax, rcx; xor rbx, rax; add rdx, rbx; add rsi, rdx; xor rdi, rsi; add r8, rdi; dec rcx; jnz a; hlt", 8),
    "short": ("a: inc rax; dec rcx; jnz a; hlt", 3),
    "stream": ("a: mov edx, ecx; and edx, 0x7fff; mov [rbp + rdx], al; add rax, [rbp + rdx]; dec rcx; jnz a; hlt", 6),
    "sieve": (
        "a: mov edx, ecx; and edx, 0x7fff; cmp byte ptr [rbp + rdx], 0; jne b; mov byte ptr [rbp + rdx], 1; b: dec rcx; jnz a; hlt",
        6,
    ),
}


def timed(engine: Engine, count: int, quantum: int | None, exact: bool) -> float:
    """Seconds of a loop of `count` iterations in runs of `quantum` instructions."""
    engine.set_reg("rcx", count)
    rip = CODE
    began = time.perf_counter()
    while (reason := engine.run(rip, quantum, exact=exact)) is StopReason.BUDGET:
        rip = engine.reg("rip")
    taken = time.perf_counter() - began
    if reason is not StopReason.HALT:
        raise RuntimeError(f"the loop ended with {reason}")
    return taken


def measure(name: str, instructions: int) -> list[str]:
    """The cells of a row."""
    source, length = LOOPS[name]
    engines = []
    for limit in (None, _MANY):
        cpu = BareCpu(limit=limit)
        cpu.memory.write(CODE, assemble(source))
        cpu.engine.set_reg("rbp", DATA)
        timed(cpu.engine, 10, None, True)
        engines.append(cpu.engine)
    count = instructions // length
    bare, counted = engines
    rows: list[tuple[Engine, int | None, bool]] = [(bare, None, True), (counted, None, True)]
    rows += [(counted, quantum, exact) for quantum in QUANTA for exact in (True, False)]
    best = [min(timed(engine, count, quantum, exact) for _ in range(3)) for engine, quantum, exact in rows]
    return [f"{count * length / best[0] / 1e6:.0f} MIPS", *(f"{best[0] / taken:.2f}" for taken in best[1:])]


def main() -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="bench_preempt.py", description="measure what bounded runs cost")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it runs, the values mean nothing")
    instructions = 200_000 if parser.parse_args().quick else 40_000_000
    heads = ["unbounded", "counted", *(f"{quantum // 1000}k{kind}" for quantum in QUANTA for kind in ("", " blocks"))]
    print(f"{'loop':<8}" + "".join(f"{head:>14}" for head in heads))
    for name in LOOPS:
        print(f"{name:<8}" + "".join(f"{cell:>14}" for cell in measure(name, instructions)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
