"""Measure what the model of vmalloc costs, against bounds.

    python tools/bench_vmalloc.py             everything, as a table
    python tools/bench_vmalloc.py NAME...     some of it (--list names them)
    python tools/bench_vmalloc.py --json      one JSON object a line instead
    python tools/bench_vmalloc.py --quick     tiny sizes: does it run, not how fast

Times are CPU times of this process. A pair is a vfree of a random live area and a vmalloc of 1 to 4 pages in its stead, purges
included; areas, frames, slab objects and page tables are all made as the kernel makes them. The list_* figures compare the address
space alone with a list of busy ranges kept sorted by bisect, on the same sequence. Exit code 0: every bound kept, 1: one missed,
2: bad usage.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from bisect import bisect_left, insort
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from emu.kernel.kernel import Kernel  # noqa: E402
from emu.kernel.vmap_area import VmapArea  # noqa: E402
from emu.machine import Machine, MachineConfig  # noqa: E402

PAGE = 4096
MIB, GIB = 1 << 20, 1 << 30
PAIRS = 20_000
MILLION = 1_000_000


@dataclass(frozen=True, slots=True)
class Measured:
    """A value and what it was made of."""

    value: float
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Benchmark:
    """`bound` is the largest value allowed, with `at_least` the smallest; None for a figure that is only told."""

    name: str
    title: str
    unit: str
    measure: Callable[[bool], Measured]
    bound: float | None = None
    at_least: bool = False

    def result(self, measured: Measured) -> dict[str, Any]:
        value, bound = measured.value, self.bound
        ok = None if bound is None else value >= bound if self.at_least else value <= bound
        result = {"name": self.name, "value": float(f"{value:.4g}"), "unit": self.unit, "bound": bound,
                  "sense": None if bound is None else ">=" if self.at_least else "<=", "ok": ok}
        if measured.detail:
            result["detail"] = measured.detail
        return result


def booted(memory: int) -> Kernel:
    """A kernel with `memory` bytes of RAM."""
    return Machine(MachineConfig(memory=memory)).kernel


class Live:
    """A kernel with `count` live areas of 1 to 4 pages."""

    def __init__(self, count: int) -> None:
        self.random = Random(count)
        self.kernel = booted(max(GIB, -(-count * 16 * 1024 // (4 * MIB)) * 4 * MIB))
        self.areas = [self._vmalloc() for _ in range(count)]

    def _vmalloc(self) -> int:
        la = self.kernel.vmalloc.vmalloc(self.random.randrange(1, 5) * PAGE)
        if not la:
            raise MemoryError("the emulated machine has too little memory for this many areas")
        return la

    def pairs(self, count: int) -> float:
        """Seconds a pair takes."""
        vfree, areas, work, random = self.kernel.vmalloc.vfree, self.areas, self.kernel.cond_resched, self.random
        began = time.process_time()
        for _ in range(count):
            i = random.randrange(len(areas))
            vfree(areas[i])
            areas[i] = self._vmalloc()
            work()
        return (time.process_time() - began) / count


def _best_pair(live: Live, pairs: int) -> float:
    live.pairs(pairs // 4)
    return statistics.median(live.pairs(pairs // 4) for _ in range(4))


def pairs_per_second(quick: bool) -> Measured:
    """vmalloc+vfree pairs at 1,000 live areas."""
    cost = _best_pair(Live(1000), 100 if quick else PAIRS)
    return Measured(1 / cost, f"{cost * 1e6:.1f} us a pair")


def growth(quick: bool) -> Measured:
    """How much dearer a pair is at 1,000,000 live areas."""
    few, many = (100, 1000) if quick else (1000, MILLION)
    pairs = 100 if quick else PAIRS
    small = _best_pair(Live(few), pairs)
    large = _best_pair(Live(many), pairs)
    return Measured(large / small, f"{small * 1e6:.1f} us at {few:,} areas, {large * 1e6:.1f} us at {many:,}")


def _gibibyte(zeroed: bool, quick: bool) -> Measured:
    kernel = booted(64 * MIB if quick else 4 * GIB)
    size = 8 * MIB if quick else GIB
    times = []
    for _ in range(1 if quick else 3):
        began = time.process_time()
        la = kernel.vmalloc.vzalloc(size) if zeroed else kernel.vmalloc.vmalloc(size)
        times.append(time.process_time() - began)
        kernel.vmalloc.vfree(la)
        kernel.cond_resched()
    return Measured(statistics.median(times))


def vmalloc_1g(quick: bool) -> Measured:
    """One vmalloc of 1 GiB in 4 KiB pages."""
    return _gibibyte(False, quick)


def vzalloc_1g(quick: bool) -> Measured:
    """One vzalloc of 1 GiB."""
    return _gibibyte(True, quick)


def resident(quick: bool) -> Measured:
    """Resident memory of a process with 1,000,000 live areas."""
    count = 1000 if quick else MILLION
    program = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'tools')!r})\n"
        "import resource\nfrom bench_vmalloc import Live\n"
        f"live = Live({count})\n"
        "print(int(open('/proc/self/statm').read().split()[1]) * resource.getpagesize())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the measured process failed: {done.stderr.strip().splitlines()[-1]}")
    size = int(done.stdout)
    return Measured(size / 1e9, f"{size / count:.0f} bytes an area")


class SortedList:
    """The baseline: busy and lazy ranges in one list in address order, searched from its start for the first gap that fits."""

    def __init__(self, start: int, end: int, lazy_max: int) -> None:
        self.start, self.end, self.lazy_max = start, end, lazy_max
        self.ranges: list[tuple[int, int]] = []
        self.lazy: list[tuple[int, int]] = []
        self.lazy_pages = 0

    def alloc(self, size: int) -> int:
        """The lowest address with `size` free bytes."""
        at = self.start
        for start, end in self.ranges:
            if start - at >= size:
                break
            at = end
        if at + size > self.end:
            raise MemoryError("the address space is full")
        insort(self.ranges, (at, at + size))
        return at

    def free(self, start: int) -> None:
        """Make a range lazy, and purge all lazy ones when they are too many."""
        found = self.ranges[bisect_left(self.ranges, (start, 0))]
        self.lazy.append(found)
        self.lazy_pages += found[1] - found[0] >> 12
        if self.lazy_pages > self.lazy_max:
            for one in self.lazy:
                del self.ranges[bisect_left(self.ranges, one)]
            self.lazy, self.lazy_pages = [], 0


def _against_list(count: int, pairs: int) -> Measured:
    kernel = booted(GIB)
    space = kernel.vmalloc.space
    low, high = space.vmalloc_start, space.vmalloc_end
    sizes = Random(count)
    wanted = [sizes.randrange(2, 18) * PAGE for _ in range(count + pairs)]
    picks = [sizes.randrange(count) for _ in range(pairs)]

    def model_alloc(size: int) -> int:
        va = space.alloc_vmap_area(size, 1, low, high)
        if not isinstance(va, VmapArea):
            raise MemoryError("the address space is full")
        return va.va_start

    def model_free(start: int) -> None:
        va = space.nodes.find_unlink(start)
        assert va is not None
        space.free_vmap_area_noflush(va)
        kernel.cond_resched()

    plain = SortedList(low, high, space.lazy_max_pages())
    taken = []
    for alloc, free in ((model_alloc, model_free), (plain.alloc, plain.free)):
        if alloc == plain.alloc:
            at = low
            # The list is filled from its end, which is where each of these lands; a search for each would take hours.
            live = []
            for size in wanted[:count]:
                live.append(at)
                plain.ranges.append((at, at + size))
                at += size
        else:
            live = [alloc(size) for size in wanted[:count]]
        began = time.process_time()
        for i, size in zip(picks, wanted[count:], strict=True):
            free(live[i])
            live[i] = alloc(size)
        taken.append((time.process_time() - began) / pairs)
    return Measured(taken[0] / taken[1], f"{taken[0] * 1e6:.1f} us a pair, the list {taken[1] * 1e6:.1f} us")


def list_1k(quick: bool) -> Measured:
    """Address space alone against a sorted list, 1,000 areas."""
    return _against_list(100 if quick else 1000, 100 if quick else 10_000)


def list_100k(quick: bool) -> Measured:
    """Address space alone against a sorted list, 100,000 areas."""
    return _against_list(200 if quick else 100_000, 100 if quick else 2000)


BENCHMARKS = (
    Benchmark("pairs", "vmalloc+vfree pairs a second at 1,000 areas", "1/s", pairs_per_second, 10_000, at_least=True),
    Benchmark("growth", "cost of a pair from 1,000 to 1,000,000 areas", "x", growth, 2.5),
    Benchmark("vmalloc_1g", "one vmalloc of 1 GiB", "s", vmalloc_1g, 0.5),
    Benchmark("vzalloc_1g", "one vzalloc of 1 GiB", "s", vzalloc_1g),
    Benchmark("resident", "resident with 1,000,000 areas", "GB", resident, 1.2),
    Benchmark("list_1k", "address space, time against a sorted list at 1,000 areas", "x", list_1k),
    Benchmark("list_100k", "address space, time against a sorted list at 100,000 areas", "x", list_100k),
)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"bench_vmalloc.py: error: {message} (see bench_vmalloc.py --help)", file=sys.stderr)
        raise SystemExit(2)


def _row(result: dict[str, Any]) -> str:
    bound = "" if result["bound"] is None else f"{result['sense']} {result['bound']:g}"
    verdict = {True: "ok", False: "MISSED", None: "-"}[result["ok"]]
    value = f"{result['value']:>9.4g} {result['unit']:<4}"
    return f"{result['name']:<12} {value} {bound:>9}  {verdict:<7} {result.get('detail', '')}".rstrip()


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = _Parser(prog="bench_vmalloc.py", description="measure what the model of vmalloc costs, against bounds")
    parser.add_argument("names", nargs="*", metavar="NAME", help="benchmarks to run (default: all)")
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")
    parser.add_argument("--list", action="store_true", help="name the benchmarks and end")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, once: shows that it runs, the values mean nothing")
    options = parser.parse_args(arguments)
    known = {benchmark.name: benchmark for benchmark in BENCHMARKS}
    for name in options.names:
        if name not in known:
            parser.error(f"unknown benchmark {name!r}; known: {', '.join(known)}")
    chosen = [known[name] for name in options.names] or list(BENCHMARKS)
    if options.list:
        for benchmark in chosen:
            print(f"{benchmark.name:<12} {benchmark.title}")
        return 0
    kept = True
    for benchmark in chosen:
        result = benchmark.result(benchmark.measure(options.quick))
        kept = kept and result["ok"] is not False
        print(json.dumps(result) if options.json else _row(result), flush=True)
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
