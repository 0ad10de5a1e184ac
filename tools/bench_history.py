"""Measure what recording a run's history costs, against the same run without: side by side, in turn, in one process.

    python tools/bench_history.py             everything, as a table
    python tools/bench_history.py NAME...     some of it (--list names them)
    python tools/bench_history.py --json      one JSON object a line instead
    python tools/bench_history.py --quick     tiny sizes: does it run, not how fast

A value is the median, over neighbouring pairs of runs, of CPU time with a history by CPU time without. Both runs are counted, as
those of several CPUs always are; `uncounted` in the detail is what counting alone adds to a run of one CPU. Booting and loading are
not part of it, asking the history is not either. Exit code 0: every bound kept, 1: one missed, 2: bad usage.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from emu.debug.history import WIDTH, History  # noqa: E402
from emu.guest.asm import assemble  # noqa: E402
from emu.machine import Machine, MachineConfig  # noqa: E402

LIMIT = 1 << 60
_HEAD = """
section .text
init_module:
    push rbx
    push r12
    mov ebx, {count}
"""
_TAIL = """
    dec ebx
    jnz again
    xor eax, eax
    pop r12
    pop rbx
    ret
section .bss
align 4096
data: resb 65536
"""
# Four pages allocated, each written to, and freed; purges come as they come.
_MAP = """
again:
    mov edi, 16384
    call vmalloc
    mov [rax], rax
    mov [rax + 4096], rax
    mov [rax + 8192], rax
    mov [rax + 12288], rax
    mov rdi, rax
    call vfree
"""
# 256 pages allocated, each written to, and freed.
_MAP_LARGE = """
again:
    mov edi, 0x100000
    call vmalloc
    mov rdi, rax
    mov ecx, 256
.touch:
    mov [rax], rcx
    add rax, 4096
    dec ecx
    jnz .touch
    call vfree
"""
# A page made read-only, read, made writable again, written.
_PROTECT = """
    mov edi, 4096
    call vmalloc
    mov r12, rax
again:
    mov rdi, r12
    mov esi, 1
    call set_memory_ro
    mov rax, [r12]
    mov rdi, r12
    mov esi, 1
    call set_memory_rw
    mov [r12], rax
"""
# Nothing but misses: 1024 pages are read after each flush of everything.
_MISS = """
    mov edi, 0x400000
    call vmalloc
    mov r12, rax
again:
    mov rax, cr4
    mov rdx, rax
    xor rdx, 0x80
    mov cr4, rdx
    mov cr4, rax
    mov rax, r12
    mov ecx, 1024
.touch:
    mov rdx, [rax]
    add rax, 4096
    dec ecx
    jnz .touch
"""
_ALU = """
again:
    mov ecx, 100000
.loop:
    add rax, rcx
    xor rdx, rax
    lea rsi, [rax + rdx*4]
    rol rax, 7
    sub rdx, rsi
    and rsi, rax
    dec rcx
    jnz .loop
"""
_STREAM = """
again:
    lea rdi, [data]
    mov ecx, 8192
    rep stosq
    lea rsi, [data]
    mov ecx, 8192
.loop:
    add rax, [rsi]
    mov [rsi], rax
    add rsi, 8
    dec ecx
    jnz .loop
"""
_CALLS = """
again:
    mov edi, 64
    mov esi, 0xcc0
    call kmalloc
    mov rdi, rax
    call kfree
"""


@dataclass(frozen=True, slots=True)
class Guest:
    """A loop of `count` rounds (`quick` for --quick), and the largest ratio allowed; None for a figure that is only told."""

    name: str
    title: str
    body: str
    count: int
    quick: int
    bound: float | None


GUESTS = (
    Guest("map", "vmalloc of 4 pages, a write to each, vfree", _MAP, 1000, 20, 1.10),
    Guest("map_large", "vmalloc of 256 pages, a write to each, vfree", _MAP_LARGE, 40, 2, None),
    Guest("protect", "set_memory_ro and set_memory_rw of a page, an access after each", _PROTECT, 1000, 20, 1.10),
    Guest("miss", "a read of each of 1024 pages after a flush of everything: TLB misses only", _MISS, 40, 2, None),
    Guest("calls", "kmalloc and kfree: calls of the kernel only", _CALLS, 3000, 20, None),
    Guest("alu", "register instructions", _ALU, 1500, 2, 1.02),
    Guest("stream", "stores and loads in 64 KiB", _STREAM, 4000, 2, 1.02),
)


def timed(guest: Guest, count: int, limit: int | None, record: bool) -> tuple[float, int]:
    """Seconds of CPU time of a guest's run, and the records it left."""
    machine = Machine(MachineConfig(), limit=limit)
    history = History(machine) if record else None
    source = _HEAD.format(count=count) + guest.body + _TAIL
    program = assemble(source, f"{guest.name}.asm")
    _, linked = machine.load(program)
    gc.collect()
    began = time.process_time()
    outcome = machine.run_loaded(program, linked)
    taken = time.process_time() - began
    if outcome.ended != "returned":
        raise RuntimeError(f"{guest.name} ended by {outcome.ended}: {list(outcome.log)[-3:]}")
    return taken, 0 if history is None else len(history.raw) // WIDTH


def measure(guest: Guest, quick: bool) -> dict[str, object]:
    """A guest's ratio, and what it was made of."""
    count = guest.quick if quick else guest.count
    pairs, uncounted, records = [], [], 0
    for number in range(2 if quick else 16):
        plain = timed(guest, count, LIMIT, False)[0]
        with_history, records = timed(guest, count, LIMIT, True)
        free = timed(guest, count, None, False)[0]
        if number:
            # The first of each warms up.
            pairs.append((with_history, plain))
            uncounted.append(plain / free)
    ratio = statistics.median(one / other for one, other in pairs)
    one, other = (statistics.median(side) for side in zip(*pairs, strict=True))
    detail = f"{one * 1e3:.1f} ms, without {other * 1e3:.1f} ms, {records} records, uncounted x {statistics.median(uncounted):.3f}"
    if records:
        detail += f", {(one - other) / records * 1e6:.2f} us a record"
    bounded = guest.bound is not None
    return {
        "name": guest.name, "value": round(ratio, 4), "unit": "x", "bound": guest.bound, "sense": "<=" if bounded else None,
        "ok": None if guest.bound is None or quick else ratio <= guest.bound, "detail": detail,
    }


def main(argv: list[str] | None = None) -> int:
    """Run the benchmarks; the exit status."""
    parser = argparse.ArgumentParser(prog="bench_history.py", description="What recording a run's history costs.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="which benchmarks (default: all)")
    parser.add_argument("--list", action="store_true", help="name the benchmarks and do nothing else")
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it runs, not how fast")
    arguments = parser.parse_args(argv)
    if arguments.list:
        for guest in GUESTS:
            print(f"{guest.name:<10} {guest.title}")
        return 0
    known = {guest.name: guest for guest in GUESTS}
    for name in arguments.names:
        if name not in known:
            parser.error(f"unknown benchmark {name!r}; there are {', '.join(known)}")
    missed = False
    for guest in [known[name] for name in arguments.names] or list(GUESTS):
        result = measure(guest, arguments.quick)
        missed |= result["ok"] is False
        if arguments.json:
            print(json.dumps(result), flush=True)
        else:
            bound = "" if guest.bound is None else f"<= {guest.bound:g}"
            verdict = {True: "ok", False: "MISSED", None: ""}[result["ok"]]  # type: ignore[index]
            print(f"{guest.name:<10} {result['value']:>7.3f} x {bound:>8}  {verdict:<6}  {result['detail']}", flush=True)
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
