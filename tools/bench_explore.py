"""How fast schedules are explored, and whether what is found shows itself every time.

    python tools/bench_explore.py [--quick] [--schedules N]

The guest is small: two CPUs, a vmalloc, a vfree, a flush that interrupts the other CPU. Times are CPU time of this process and of
those that it forked, so that other work of the host does not count; booting the machines counts. Each line: name, value, unit,
bound, whether it holds. `--quick` shows that it runs; its values mean nothing.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from emu.explore import Explorer, explore_file
from emu.guest.asm import assemble
from emu.guest.directives import MachineOptions
from emu.guest.load import load
from emu.guest.program import Program
from emu.run import configure, run_file

ROOT = Path(__file__).resolve().parent.parent
SMALL = """
; vmemu: cpus=2
; expect: return 0
; expect: no-fault
section .text
init_module:
    push rbx
    push r12
    sub rsp, 8
    mov edi, 1
    lea rsi, [look]
    xor edx, edx
    call vmemu_run_on
    mov r12, rax
    mov edi, 4096
    call vmalloc
    mov rbx, rax
    mov [page], rax
    mov qword [page], 0
    mov rdi, rbx
    call vfree
    call vm_unmap_aliases
    mov rdi, r12
    call vmemu_join
    xor eax, eax
    add rsp, 8
    pop r12
    pop rbx
    ret
look:
    mov rax, [page]
    ret
section .data
page: dq 0
"""


def seconds() -> float:
    """CPU time of this process and of its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def explored(program: Program, schedules: int, preemptions: int) -> float:
    """Schedules explored in a second of CPU time. Raises AssertionError if one fails."""
    config, limit = configure(program.directives.machine, MachineOptions())
    began = seconds()
    result = Explorer(program, config, limit).explore(schedules, preemptions, 0)
    assert result.found is None, f"{program.path} fails by {result.found}"
    return result.schedules / (seconds() - began)


def repeated(path: str, times: int) -> tuple[int, str]:
    """How many of so many runs of a guest show what its exploration found, to the letter, and by which schedule."""
    found = explore_file(path, MachineOptions(), 1000, 2, 1)
    assert found.result is not None, f"nothing is found in {path}"
    first = found.result.failures, found.result.outcome.log, found.result.outcome.registers
    same = 0
    for _ in range(times):
        result = run_file(path, MachineOptions(schedule=found.schedule))
        same += (result.failures, result.outcome.log, result.outcome.registers) == first
    return same, found.schedule


def main() -> int:
    """Measure and print; 1 if a bound is missed."""
    parser = argparse.ArgumentParser(description="measure the exploration of schedules, against bounds")
    parser.add_argument("--quick", action="store_true", help="few schedules: shows that it runs, the values mean nothing")
    parser.add_argument("--schedules", type=int, default=2000, help="how many (default 2000)")
    arguments = parser.parse_args()
    schedules, times = (40, 3) if arguments.quick else (arguments.schedules, 100)
    missed = False

    def show(name: str, value: float, unit: str, bound: float | None = None) -> None:
        nonlocal missed
        ok = bound is None or value >= bound
        missed |= not ok and not arguments.quick
        held = "" if bound is None else f"{f'>= {bound:g}':<10}{'ok' if ok else 'MISSED'}"
        print(f"{name:<34}{value:>10.4g} {unit:<12}{held}".rstrip())

    program = assemble(SMALL, "small.asm")
    show("systematic schedules", explored(program, schedules, 3), "1/s", 300)
    show("random schedules", explored(program, schedules, 0), "1/s")
    show("with a mutex (locked_publish.c)", explored(load(str(ROOT / "guest" / "locked_publish.c")), schedules, 3), "1/s")
    for name in ("racy_publish", "racy_counter", "racy_vfree", "racy_stale_read"):
        same, schedule = repeated(str(ROOT / "guest" / f"{name}.asm"), times)
        show(f"{name} {schedule}", same, f"of {times}", times)
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
