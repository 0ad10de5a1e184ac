"""Measure what the machine costs, against bounds.

    python tools/bench.py                     everything, as a table
    python tools/bench.py NAME...             some of it (--list names them)
    python tools/bench.py --json              one JSON object a line instead
    python tools/bench.py --quick             tiny sizes: does it run, not how fast

A comparison runs both sides in this process, in turn, and takes the median of the ratios of neighbours. What runs in this process
is measured in CPU time, which is the wall time of an idle host: nothing here waits for anything. docs/benchmarks.md says what each
benchmark measures. Exit code 0: every bound kept, 1: one missed, 2: bad usage.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

try:
    import numpy as np
    from bench_guests import ALU, FAULTS, STREAM, TOUCH
    from unicorn import UC_ARCH_X86, UC_CTL_IO_WRITE, UC_CTL_TLB_FLUSH, UC_HOOK_TLB_FILL, UC_MODE_64, UC_TLB_VIRTUAL, Uc
    from unicorn.x86_const import UC_CPU_X86_ICELAKE_SERVER, UC_X86_REG_RCX, UC_X86_REG_RDI, UC_X86_REG_RSP

    from emu.config import MachineConfig
    from emu.cpu import Halted
    from emu.guest.asm import assemble
    from emu.kernel.gfp import GFP_KERNEL
    from emu.kernel.task import initial_rsp
    from emu.machine import Machine
except ModuleNotFoundError as error:
    print(f"bench.py: error: {error}; install the project first (README.md)", file=sys.stderr)
    sys.exit(2)

MIB, GIB = 1 << 20, 1 << 30
PAGE = 4096
A, D = 1 << 5, 1 << 6
CODE_LA = 0x10000
DATA_LA = 1 << 30


@dataclass(frozen=True, slots=True)
class Scale:
    """How much of everything: `quick` only shows that a benchmark runs."""

    quick: bool

    def size(self, full: int, quick: int) -> int:
        return quick if self.quick else full

    @property
    def repeats(self) -> int:
        return 1 if self.quick else 7


@dataclass(frozen=True, slots=True)
class Measured:
    """A value and what it was made of; `skipped` says why there is none."""

    value: float | None
    detail: str = ""
    skipped: str = ""


@dataclass(frozen=True, slots=True)
class Benchmark:
    """`bound` is the largest value allowed, with `at_least` the smallest; None for a figure that is only told."""

    name: str
    title: str
    unit: str
    measure: Callable[[Scale], Measured]
    bound: float | None = None
    at_least: bool = False

    def result(self, measured: Measured) -> dict[str, Any]:
        value = measured.value
        ok = None
        if value is not None and self.bound is not None:
            ok = value >= self.bound if self.at_least else value <= self.bound
        result = {"name": self.name, "value": None if value is None else float(f"{value:.4g}"), "unit": self.unit,
                  "bound": self.bound, "sense": None if self.bound is None else ">=" if self.at_least else "<=", "ok": ok}
        if measured.detail:
            result["detail"] = measured.detail
        if measured.skipped:
            result["skipped"] = measured.skipped
        return result


def paired(ours: Callable[[], float], other: Callable[[], float], repeats: int) -> tuple[float, float, float]:
    """Median of ours/other over neighbouring runs, and the median of each; the first pair warms up and does not count."""
    ours(), other()
    pairs = [(ours(), other()) for _ in range(repeats)]
    ratio = statistics.median(a / b for a, b in pairs)
    return ratio, statistics.median(a for a, _ in pairs), statistics.median(b for _, b in pairs)


def median_of(run: Callable[[], float], repeats: int) -> float:
    """Median of several runs after one that warms up."""
    run()
    return statistics.median(run() for _ in range(repeats))


class Bench:
    """A booted machine with a loop of ours in a module, called without the kernel thread that a guest would have."""

    def __init__(self, source: str, *, memory: int = GIB, **config: Any) -> None:
        self.machine = Machine(MachineConfig(memory=memory, **config))
        _, linked = self.machine.load(assemble(source, "bench.asm"))
        self.symbols = linked.symbols
        self.code = next(data for la, data in linked.images.values() if la <= linked.entry < la + len(data))
        self.stack = initial_rsp(self.machine.kernel.create_thread("bench"))

    def call(self, name: str = "init_module", **registers: int) -> float:
        """Seconds from a label to the HLT that ends the loop."""
        cpu = self.machine.cpu
        for register, value in registers.items():
            cpu.set_reg(register, value)
        cpu.set_reg("rsp", self.stack)
        cpu.set_reg("rflags", 2)
        cpu.rip = self.symbols[name]
        began = time.process_time()
        stop = cpu.run()
        taken = time.process_time() - began
        if not isinstance(stop, Halted):
            raise RuntimeError(f"the loop did not end by HLT: {stop}, {list(self.machine.log_lines())[-3:]}")
        return taken

    def vmalloc(self, size: int) -> int:
        """vmalloc memory of 4 KiB pages whose host memory is there already."""
        la = self.machine.kernel.vmalloc.vmalloc(size, self.symbols["init_module"])
        if not la:
            raise RuntimeError(f"no memory for {size:#x} bytes of vmalloc")
        for page in range(la, la + size, PAGE):
            self.machine.write(page, b"\1")
        return la

    def forget(self) -> None:
        """Empty the TLB and the engine's cache of it."""
        self.machine.cpu.mmu.tlb.flush_all()
        self.machine.cpu.engine.drop_soft_tlb()

    def clear_accessed(self, la: int, size: int) -> None:
        """Clear A and D of every leaf, so that each access has to set them."""
        machine = self.machine
        for page in range(la, la + size, 512 * PAGE):
            entry_pa = machine.kernel.init_mm.lookup(page).entry_pa
            machine.memory.view_u64(entry_pa, min(512, (la + size - page) // PAGE))[:] &= np.uint64(~(A | D) & (1 << 64) - 1)


class Bare:
    """Unicorn alone: flat memory, everything readable, writable and executable, no paging."""

    def __init__(self, code: bytes, *, data: int = 0, virtual: bool = False) -> None:
        self.uc = Uc(UC_ARCH_X86, UC_MODE_64)
        self.uc.ctl_set_cpu_model(UC_CPU_X86_ICELAKE_SERVER)
        if virtual:
            self.uc.ctl_set_tlb_mode(UC_TLB_VIRTUAL)
            self.uc.hook_add(UC_HOOK_TLB_FILL, fill_with_everything)
        self.uc.mem_map(CODE_LA, 16 * PAGE)
        self.uc.mem_write(CODE_LA, code)
        if data:
            self.uc.mem_map(DATA_LA, data)
            for la in range(DATA_LA, DATA_LA + data, PAGE):
                self.uc.mem_write(la, b"\1")

    def call(self, rdi: int = DATA_LA, rcx: int = 0) -> float:
        """Seconds from the first byte of the code to HLT."""
        self.uc.reg_write(UC_X86_REG_RDI, rdi)
        self.uc.reg_write(UC_X86_REG_RCX, rcx)
        self.uc.reg_write(UC_X86_REG_RSP, CODE_LA + 15 * PAGE)
        began = time.process_time()
        self.uc.emu_start(CODE_LA, 0)
        return time.process_time() - began

    def forget(self) -> None:
        """Empty the soft TLB."""
        self.uc.ctl(UC_CTL_TLB_FLUSH, UC_CTL_IO_WRITE)


def fill_with_everything(_uc: Uc, la: int, _access: int, entry: Any, _data: object) -> bool:
    """The smallest fill callback there can be: each page is itself, with all rights."""
    entry.paddr = la
    entry.perms = 7
    return True


def alu(scale: Scale) -> Measured:
    """Speed of a loop of register instructions against the faster of both ways to run bare Unicorn."""
    count = scale.size(25_000_000, 100_000)
    bench = Bench(ALU)
    bares = {name: Bare(bench.code, virtual=name == "virtual") for name in ("default", "virtual")}
    ratios = {name: paired(lambda b=bare: b.call(rcx=count), lambda: bench.call(rcx=count), scale.repeats)
              for name, bare in bares.items()}
    name, (ratio, bare_time, ours) = min(ratios.items(), key=lambda item: item[1][0])
    mips = 8 * count / 1e6
    return Measured(ratio, f"{mips / ours:.0f} of {mips / bare_time:.0f} MIPS ({name} bare)")


def stream(scale: Scale) -> Measured:
    """Speed of a write pass and a read pass over vmalloc memory, TLBs cold, against flat memory in Unicorn's default mode."""
    size = scale.size(64 * MIB, MIB)
    bench = Bench(STREAM)
    la = bench.vmalloc(size)
    bare = Bare(bench.code, data=size)

    def ours() -> float:
        bench.forget()
        return bench.call(rdi=la, rcx=size // 8)

    def flat() -> float:
        bare.forget()
        return bare.call(rcx=size // 8)

    ratio, flat_time, our_time = paired(flat, ours, scale.repeats)
    return Measured(ratio, f"{our_time * 1e3:.1f} ms, flat {flat_time * 1e3:.1f} ms")


def _miss(scale: Scale, accessed: bool) -> Measured:
    pages = scale.size(16384, 256)
    bench = Bench(TOUCH)
    la = bench.vmalloc(pages * PAGE)
    bare = Bare(bench.code, data=pages * PAGE, virtual=True)

    def ours() -> float:
        if not accessed:
            bench.clear_accessed(la, pages * PAGE)
        bench.forget()
        return bench.call(rdi=la, rcx=pages)

    def empty() -> float:
        bare.forget()
        return bare.call(rcx=pages)

    ratio, our_time, empty_time = paired(ours, empty, scale.repeats)
    return Measured(ratio, f"{our_time / pages * 1e6:.2f} us, empty callback {empty_time / pages * 1e6:.2f} us")


def tlb_miss(scale: Scale) -> Measured:
    """Time of a miss on a page whose leaf has A and D, as the kernel's own mappings do, against an empty fill callback."""
    return _miss(scale, accessed=True)


def tlb_miss_set_a(scale: Scale) -> Measured:
    """The same where the walk has to set A."""
    return _miss(scale, accessed=False)


def _map(scale: Scale, page_shift: int) -> Measured:
    size = scale.size(GIB, 8 * MIB)
    machine = Machine(MachineConfig(memory=4 * GIB))
    kernel = machine.kernel
    mm = kernel.init_mm
    if page_shift == 12:
        pfns = kernel.pages.alloc_pages_bulk(GFP_KERNEL, 0, size // PAGE)
    else:
        pfns = np.arange(GIB // PAGE, (GIB + size) // PAGE, dtype=np.int64)
    la = kernel.layout.vmalloc_start + (1 << 40)

    def run() -> float:
        nonlocal la
        start = la
        la += GIB
        began = time.process_time()
        failed = mm.vmap_pages_range_noflush(start, start + size, mm.prots.kernel, pfns, page_shift)
        taken = time.process_time() - began
        if failed or mm.to_pa(start + size - PAGE) != int(pfns[-1]) * PAGE:
            raise RuntimeError(f"mapping failed: {failed}")
        return taken * 1e3

    return Measured(median_of(run, scale.repeats), f"{size >> page_shift} leaves")


def map_4k(scale: Scale) -> Measured:
    """vmap_pages_range_noflush of 1 GiB in 4 KiB leaves, tables made on the way."""
    return _map(scale, 12)


def map_2m(scale: Scale) -> Measured:
    """The same in 2 MiB leaves."""
    return _map(scale, 21)


def _faults(scale: Scale, present: bool) -> Measured:
    # Fewer than a machine keeps for its report (KEPT_FAULTS), so that each one pays for being kept.
    count = scale.size(1000, 32)
    bench = Bench(FAULTS)
    la = bench.vmalloc(count * PAGE)
    machine = bench.machine
    entries = [machine.kernel.init_mm.lookup(page).entry_pa for page in range(la, la + count * PAGE, PAGE)]
    where = bench.vmalloc(8 * count)
    machine.write(where, b"".join(machine.kernel.layout.va(pa).to_bytes(8, "little") for pa in entries))
    bench.call("set_idt", rdi=bench.vmalloc(PAGE))

    def run() -> float:
        for pa in entries:
            machine.memory.u64[pa >> 3] &= ~1
        machine.forget_faults()
        bench.forget()
        taken = bench.call("demand" if present else "skip", rdi=la, rcx=count, r8=where)
        faults = machine.statistics.exceptions[14]
        machine.statistics.exceptions.clear()
        if faults != count:
            raise RuntimeError(f"{faults} page faults instead of {count}")
        return taken / count * 1e6

    return Measured(median_of(run, scale.repeats), f"{count} faults a run")


def page_fault(scale: Scale) -> Measured:
    """#PF to the guest's own handler, which steps over the instruction, and IRETQ."""
    return _faults(scale, present=False)


def page_fault_demand(scale: Scale) -> Measured:
    """#PF on one absent page after the other, whose entries the guest's handler makes present; the access runs again."""
    return _faults(scale, present=True)


@contextmanager
def _child_environment() -> Iterator[dict[str, str]]:
    """As a user's shell has it: byte code is cached, wherever this process keeps its own."""
    with tempfile.TemporaryDirectory(prefix="vmemu-bench-") as cache:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        yield environment | {"PYTHONPYCACHEPREFIX": cache, "PYTHONPATH": str(ROOT)}


def _child(arguments: list[str], environment: dict[str, str]) -> str:
    done = subprocess.run([sys.executable, *arguments], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120)
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)} ended with {done.returncode}: {done.stderr.strip()[-300:]}")
    return done.stdout


def _wall(arguments: list[str], environment: dict[str, str]) -> float:
    began = time.perf_counter()
    _child(arguments, environment)
    return time.perf_counter() - began


def run_smallest(scale: Scale) -> Measured:
    """Wall time of `vmemu run guest/hello.asm` from the process's start to its end, byte code cached."""
    with _child_environment() as environment:
        command = ["-m", "emu", "run", "guest/hello.asm"]
        taken = median_of(lambda: _wall(command, environment), scale.repeats)
        python = median_of(lambda: _wall(["-c", "import numpy, unicorn, capstone"], environment), scale.repeats)
    return Measured(taken, f"of which Python, NumPy, Unicorn and Capstone {python:.3f} s")


_BOOT = """
import time
from emu.config import MachineConfig
from emu.machine import Machine
began = time.perf_counter()
Machine(MachineConfig())
print(time.perf_counter() - began)
"""


def boot(scale: Scale) -> Measured:
    """The first machine of a new process, from nothing to booted."""
    with _child_environment() as environment:
        return Measured(median_of(lambda: float(_child(["-c", _BOOT], environment)), scale.repeats))


# VmHWM, since ru_maxrss of a new process begins with its parent's.
_RESIDENT = """
from emu.guest.load import load
from emu.config import MachineConfig
from emu.machine import Machine
machine = Machine(MachineConfig(memory=64 << 30))
assert machine.run(load("guest/hello.asm")).returned == 0
for line in open("/proc/self/status"):
    if line.startswith("VmHWM:"):
        print(line.split()[1])
"""


def memory_64g(scale: Scale) -> Measured:
    """Most memory resident in a process that boots a machine with 64 GiB of RAM and runs the smallest guest."""
    if not Path("/proc/self/status").exists():
        return Measured(None, skipped="no /proc/self/status on this host")
    with _child_environment() as environment:
        return Measured(int(_child(["-c", _RESIDENT], environment)) * 1024 / 1e6)


def native(scale: Scale) -> Measured:
    """Speed of a loop that misses the TLB on every page, Unicorn's own walker against ours."""
    pages = scale.size(16384, 256)
    ours, other = Bench(TOUCH), Bench(TOUCH, native=True)
    places = {id(bench): bench.vmalloc(pages * PAGE) for bench in (ours, other)}

    def run(bench: Bench) -> float:
        bench.forget()
        return bench.call(rdi=places[id(bench)], rcx=pages)

    ratio, our_time, native_time = paired(lambda: run(ours), lambda: run(other), scale.repeats)
    return Measured(ratio, f"{native_time / pages * 1e6:.2f} us a page, ours {our_time / pages * 1e6:.2f} us")


BENCHMARKS = (
    Benchmark("alu", "register instructions, speed against bare Unicorn", "x", alu, 0.9, at_least=True),
    Benchmark("stream", "64 MiB over 4K pages, speed against flat memory", "x", stream, 1.0, at_least=True),
    Benchmark("tlb_miss", "a TLB miss against an empty fill callback", "x", tlb_miss, 4),
    Benchmark("tlb_miss_set_a", "the same, setting A", "x", tlb_miss_set_a, 4),
    Benchmark("map_4k", "mapping 1 GiB in 4K leaves", "ms", map_4k, 40),
    Benchmark("map_2m", "mapping 1 GiB in 2M leaves", "ms", map_2m, 1),
    Benchmark("page_fault", "#PF to the guest's handler and back", "us", page_fault, 60),
    Benchmark("page_fault_demand", "#PF, entry made present, access repeated", "us", page_fault_demand),
    Benchmark("run_smallest", "vmemu run guest/hello.asm", "s", run_smallest, 0.6),
    Benchmark("boot", "booting a machine", "s", boot, 0.1),
    Benchmark("memory_64g", "resident with 64 GiB of RAM", "MB", memory_64g, 150),
    Benchmark("native", "TLB misses, speed of native mode against ours", "x", native),
)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"bench.py: error: {message} (see bench.py --help)", file=sys.stderr)
        raise SystemExit(2)


def _chosen(names: list[str]) -> list[Benchmark]:
    known = {benchmark.name: benchmark for benchmark in BENCHMARKS}
    for name in names:
        if name not in known:
            raise ValueError(f"unknown benchmark {name!r}; known: {', '.join(known)}")
    return [known[name] for name in names] if names else list(BENCHMARKS)


def _row(result: dict[str, Any]) -> str:
    bound = "" if result["bound"] is None else f"{result['sense']} {result['bound']:g}"
    verdict = {True: "ok", False: "MISSED", None: "-"}[result["ok"]]
    value = "" if result["value"] is None else f"{result['value']:.4g} {result['unit']}"
    return f"{result['name']:<18} {value:>11} {bound:>8}  {verdict:<7} {result.get('skipped') or result.get('detail', '')}".rstrip()


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = _Parser(prog="bench.py", description="measure what the machine costs, against bounds")
    parser.add_argument("names", nargs="*", metavar="NAME", help="benchmarks to run (default: all)")
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")
    parser.add_argument("--list", action="store_true", help="name the benchmarks and end")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, once: shows that it runs, the values mean nothing")
    options = parser.parse_args(arguments)
    try:
        chosen = _chosen(options.names)
    except ValueError as error:
        parser.error(str(error))
    if options.list:
        for benchmark in chosen:
            print(f"{benchmark.name:<18} {benchmark.title}")
        return 0
    kept = True
    for benchmark in chosen:
        result = benchmark.result(benchmark.measure(Scale(options.quick)))
        kept = kept and result["ok"] is not False
        print(json.dumps(result) if options.json else _row(result), flush=True)
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
