"""What several CPUs cost: ratios of runs measured side by side in one process, in CPU time.

    python tools/bench_smp.py [--quick]

Each line: name, value, unit, bound, whether it holds. `--quick` shows that it runs; its values mean nothing.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from emu.config import MachineConfig
from emu.guest.asm import assemble
from emu.machine import Machine
from emu.turns import Alone, Policy, RoundRobin

ROOT = Path(__file__).resolve().parent.parent
MEMORY = 256 << 20
CODE = """
section .text
init_module:
    mov rcx, rdi
turn:
    add rax, rcx
    xor rdx, rax
    rol rdx, 3
    lea rbx, [rdx + rax]
    dec rcx
    jnz turn
    ret
stride:
    mov rcx, 4096
page:
    mov rax, [rsi]
    add rsi, 4096
    dec rcx
    jnz page
    ret
section .data
unused: dq 0
"""


def spent(work: Callable[[], object]) -> float:
    """CPU seconds of a call."""
    began = time.process_time()
    work()
    return time.process_time() - began


def aggregate(cpus: int, loops: int, policy: Policy, *, counted: bool = True, threads: int = 8) -> float:
    """CPU seconds in which `threads` threads on `cpus` CPUs run their loops to the end."""
    machine = Machine(MachineConfig(cpus=cpus, memory=MEMORY), limit=1 << 40 if counted else None)
    linked = machine.load(assemble(CODE, "bench.asm"))[1]
    kernel = machine.kernel
    machine.hub.policy = policy
    begun = []
    for number in range(threads):
        begun.append(kernel.create_thread("bench", number % cpus, function=linked.entry, argument=loops, runs=False))
        kernel.sched.start(begun[-1])
    return spent(lambda: machine.hub.run(lambda: all(thread.state.name == "DEAD" for thread in begun)))


def misses(tlbsan: bool, rounds: int) -> float:
    """CPU seconds of TLB misses over 16 MiB of vmalloc memory, nothing of which is ever freed."""
    machine = Machine(MachineConfig(memory=MEMORY, tlbsan=tlbsan))
    linked = machine.load(assemble(CODE, "bench.asm"))[1]
    la = machine.kernel.vmalloc.vmalloc(4096 * 4096)

    def run() -> None:
        for _ in range(rounds):
            machine.cpu.mmu.tlb.flush_all()
            machine.cpu.engine.drop_soft_tlb()
            machine.call(linked.symbols["stride"], rsi=la)

    run()
    return spent(run)


def shootdown(cpus: int, flushes: int) -> float:
    """CPU seconds of one flush of one page on every CPU of a machine, each of which idles."""
    machine = Machine(MachineConfig(cpus=cpus, memory=MEMORY), limit=1 << 40)
    la = machine.kernel.layout.vmalloc_start

    def run() -> None:
        for _ in range(flushes):
            machine.flushes.flush_tlb_kernel_range(la, la + 4096)

    run()
    return spent(run) / flushes


def boot(cpus: int) -> tuple[float, float]:
    """Seconds in which a process of its own boots a machine, and its resident megabytes."""
    code = (
        "import resource, time; began = time.perf_counter()\n"
        f"from emu.config import MachineConfig; from emu.machine import Machine; Machine(MachineConfig(cpus={cpus}))\n"
        "print(time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    seconds, kilobytes = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    return float(seconds), float(kilobytes) / 1024


def show(name: str, value: float, unit: str, bound: str = "-", ok: bool | None = None) -> None:
    """One line of the table."""
    print(f"{name:<24}{value:>12.4g} {unit:<16}{bound:<10}{'' if ok is None else 'ok' if ok else 'MISSED'}")


def main() -> int:
    """Measure and print; 1 if a bound is missed."""
    parser = argparse.ArgumentParser(description="measure what several CPUs cost, against bounds")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, once: shows that it runs, the values mean nothing")
    quick = parser.parse_args().quick
    loops, repeats = (10_000, 1) if quick else (10_000_000, 3)
    missed = False

    def bounded(name: str, value: float, unit: str, bound: float, *, least: bool) -> None:
        nonlocal missed
        ok = value >= bound if least else value <= bound
        missed |= not ok and not quick
        show(name, value, unit, f"{'>=' if least else '<='} {bound:g}", ok)

    one_to_eight = [aggregate(1, loops, RoundRobin()) / aggregate(8, loops, RoundRobin()) for _ in range(repeats)]
    bounded("aggregate_8_cpus", statistics.median(one_to_eight), "of one CPU", 0.8, least=True)
    bare = min(aggregate(1, loops, Alone(), counted=False, threads=1) for _ in range(repeats))
    for name, policy in (("counted", Alone()), ("quantum_100k", RoundRobin(100_000)), ("quantum_10k", RoundRobin(10_000))):
        show(f"preemptible_{name}", bare / min(aggregate(1, loops, policy, threads=1) for _ in range(repeats)), "of bare speed")
    rounds = 1 if quick else 40
    costs = [misses(True, rounds) / misses(False, rounds) for _ in range(repeats + 2)]
    bounded("tlbsan_nothing_stale", statistics.median(costs), "x", 1.05, least=False)
    for cpus in (2, 8, 64):
        show(f"shootdown_{cpus}", 1e6 * shootdown(cpus, 2 if quick else 50) / cpus, "us a CPU")
    seconds, megabytes = boot(4 if quick else 64)
    bounded("boot_64_cpus", seconds, "s", 1.5, least=False)
    bounded("resident_64_cpus", megabytes, "MB", 400, least=False)
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
