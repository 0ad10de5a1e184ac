"""Replay recorded vmalloc traces of real kernels on the model, address by address.

Usage: python tools/replay_oracle.py NAME.ops.jsonl.gz...   (NAME.trace.jsonl.gz and NAME.freetree.jsonl.gz beside each)

For each trace the model starts from the recorded areas and the recorded shape of the free tree, and serves every recorded
request, free and purge, those of other tasks included. Printed are the operations, how many addresses differ from the
recorded ones, and whether the final free tree has the recorded shape, colours and maxima. Exit status 0 only if all agree.

Some inputs of the kernel are not in a recording: which of two overlapping requests was served first and, where there are
several vmap_nodes, on which CPU a task other than the recorder made a request, and for which node an area older than the
recording was allocated. They are searched for, the likeliest value first, until the rest of the recording follows; the
output says how many there were.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

TOOLS = Path(__file__).resolve().parent
sys.path[:0] = [str(TOOLS.parent), str(TOOLS)]

from oracle_recording import PAGE_SIZE, Record, Recording, Request  # noqa: E402

from emu.kernel.purge import VmapSpace  # noqa: E402
from emu.kernel.rbtree import RB_BLACK, RB_RED  # noqa: E402
from emu.kernel.vmap_area import FreeVmapAreas, VmapArea  # noqa: E402

SEARCH_LIMIT = 10_000


@dataclass
class Machine:
    """What the address space model needs around it: CPUs, TLBs, a work queue and a log."""

    possible: int
    current: int = 0
    warnings: list[str] = field(default_factory=list)

    @property
    def online(self) -> int:
        return self.possible

    def flush_tlb_kernel_range(self, start: int, end: int, *, cause: str = "") -> None:
        """Nothing is translated here."""

    def flush_tlb_all(self, *, cause: str = "") -> None:
        """As above."""

    def schedule_work(self, work: Callable[[], None]) -> None:
        """Dropped: the recording says when a drain ran."""

    def warn(self, function: str, text: str = "") -> None:
        self.warnings.append(f"{function}: {text}")

    def bug(self, function: str, text: str = "") -> None:
        self.warnings.append(f"BUG {function}: {text}")

    def printk(self, text: str) -> None:
        self.warnings.append(text)


@dataclass
class Result:
    """Outcome of one replay."""

    operations: int
    requests: int
    differing: list[tuple[int, int]]
    tree_matches: bool
    tree_nodes: int
    lists_match: bool
    inferred: int
    warnings: list[str]

    @property
    def ok(self) -> bool:
        """Do the addresses and the free tree agree? The other lists depend on when exactly the final dump was taken."""
        return not self.differing and self.tree_matches and not self.warnings


class Hidden:
    """The inputs that the recording lacks, as a path through a tree of choices."""

    def __init__(self) -> None:
        self.path: list[tuple[int, int]] = []
        self.depth = 0

    def choose(self, options: list[int]) -> int:
        """The value for the next hidden input; `options` in order of likelihood."""
        if self.depth == len(self.path):
            self.path.append((0, len(options)))
        taken = self.path[self.depth][0]
        self.depth += 1
        return options[taken]

    def advance(self) -> bool:
        """Go to the next path after the present one failed; false if there is none."""
        del self.path[self.depth :]
        self.depth = 0
        while self.path:
            taken, count = self.path.pop()
            if taken + 1 < count:
                self.path.append((taken + 1, count))
                return True
        return False


class Replay:
    """One run of the model over a recording with given hidden inputs."""

    def __init__(self, recording: Recording, hidden: Hidden) -> None:
        self.recording = recording
        self.hidden = hidden
        self.machine = Machine(recording.nr_nodes)
        bounds = (recording.vmalloc_start, recording.vmalloc_end)
        machine = self.machine
        self.space = VmapSpace(recording.design, bounds, machine, machine, machine, machine)
        self.by_start: dict[int, VmapArea] = {}
        self.unknown_owner: set[int] = set()
        self.differing: list[tuple[int, int]] = []
        self.requests = 0
        self.inferred = 0
        restore_free_tree(self.space.free, recording.initial_tree)
        for row in recording.initial:
            self._restore(row)
        self.space.vmap_initialized = True

    def _restore(self, row: Record) -> None:
        space = self.space
        if row["t"] == "init_free":
            return
        va = VmapArea(int(row["s"], 16), int(row["e"], 16))
        space.cache.live += 1
        number = int(row["list"].lstrip("abcdefghijklmnopqrstuvwxyz") or 0)
        pooled = space.nodes.nr > 1 and self._in_vmalloc_range(va)
        if row["t"] == "init_busy":
            space.nodes.addr_to_node(va.va_start).busy.insert(va)
            self.by_start[va.va_start] = va
            if pooled:
                self.unknown_owner.add(va.va_start)
            return
        node = space.nodes.nodes[number]
        if pooled:
            va.flags = space.nodes.encode_vn_id(number)
        if row["t"] == "init_lazy":
            node.lazy.insert(va)
            space.vmap_lazy_nr += (va.va_end - va.va_start) // PAGE_SIZE
        else:
            index = (va.va_end - va.va_start) // PAGE_SIZE - 1
            node.pool.setdefault(index, deque()).append(va)

    def _in_vmalloc_range(self, va: VmapArea) -> bool:
        return self.recording.vmalloc_start <= va.va_start and va.va_end <= self.recording.vmalloc_end

    def run(self, until_difference: bool) -> bool:
        """Serve the events; returns whether all addresses agreed. Stops at the first that does not, if asked to."""
        events = self.recording.events
        if self.recording.overlapping and self.hidden.choose([0, 1]):
            events = self.recording.events_by_result
        for event in events:
            if event.kind == "alloc":
                assert event.request is not None
                self._alloc(event.request)
            elif event.kind == "free":
                self._free(event.start)
            else:
                self.space.purge_vmap_area_lazy(event.start, event.end)
            if self.differing and until_difference:
                return False
        return not self.differing

    def _alloc(self, request: Request) -> None:
        self.requests += 1
        cpu = request.cpu
        if cpu is None:
            cpu = self._background_cpu(request.task)
        self.machine.current = cpu
        got = self.space.alloc_vmap_area(request.size, request.align, request.vstart, request.vend)
        if isinstance(got, VmapArea):
            self.by_start[request.start] = got
        address = got.va_start if isinstance(got, VmapArea) else 0
        wanted = request.start if request.ok else 0
        if address != wanted:
            self.differing.append((wanted, address))

    def _background_cpu(self, task: str) -> int:
        nr = self.space.nodes.nr
        if nr == 1:
            return 0
        bound = re.match(r"kworker/(\d+):", task)
        if bound:
            return int(bound.group(1))
        likely = self.machine.current
        return self.hidden.choose([likely, *(cpu for cpu in range(nr) if cpu != likely)])

    def _free(self, start: int) -> None:
        va = self.by_start.pop(start, None)
        if va is None:
            self.differing.append((start, 0))
            return
        if start in self.unknown_owner:
            self.unknown_owner.discard(start)
            likely = self._final_owner(start)
            nr = self.space.nodes.nr
            options = [likely, *(node for node in range(nr) if node != likely)]
            va.flags |= self.space.nodes.encode_vn_id(self.hidden.choose(options))
        if self.recording.design.sharded:
            self.space.nodes.addr_to_node(va.va_start).busy.unlink(va)
        self.space.free_vmap_area_noflush(va)

    def _final_owner(self, start: int) -> int:
        for row in self.recording.final:
            if int(row["s"], 16) == start and row["t"] in ("final_lazy", "final_pool"):
                return int(row["list"].lstrip("abcdefghijklmnopqrstuvwxyz"))
        return int(self.recording.header["cpu"])

    def result(self) -> Result:
        """The outcome, after a check of the model's own invariants."""
        self.space.validate()
        return Result(
            operations=len(self.recording.ops),
            requests=self.requests,
            differing=self.differing,
            tree_matches=self.tree_matches(),
            tree_nodes=len(self.recording.final_tree),
            lists_match=self.lists_match(),
            inferred=self.inferred,
            warnings=self.machine.warnings,
        )

    def tree_matches(self) -> bool:
        """Has the free tree the recorded shape, colours and maxima?"""
        rows = self.recording.final_tree
        wanted = [(int(row["s"], 16), int(row["e"], 16), row["d"], row["side"], row["black"], row["max"]) for row in rows]
        return wanted == list(preorder(self.space.free))

    def lists_match(self) -> bool:
        """Are the busy, lazy and pooled areas the recorded ones, in their recorded nodes and order?"""
        suffix = bool(self.space.nodes.design.sharded)
        have: dict[str, list[tuple[int, int]]] = {}
        for node in self.space.nodes.nodes:
            number = str(node.id) if suffix else ""
            for name, areas in (("busy", node.busy), ("lazy", node.lazy), ("pool", node.pooled())):
                spans = [(va.va_start, va.va_end) for va in areas]
                if spans:
                    have[name + number] = spans
        want: dict[str, list[tuple[int, int]]] = {}
        for row in self.recording.final:
            if row["t"] != "final_free":
                want.setdefault(row["list"], []).append((int(row["s"], 16), int(row["e"], 16)))
        return have == want


def restore_free_tree(free: FreeVmapAreas, rows: list[Record]) -> None:
    """Build the free tree from its recorded nodes, which are in preorder with their depth and side."""
    path: list[VmapArea] = []
    areas: list[VmapArea] = []
    for row in rows:
        va = VmapArea(int(row["s"], 16), int(row["e"], 16))
        va.subtree_max_size = row["max"]
        va.rb_color = RB_BLACK if row["black"] else RB_RED
        del path[row["d"] :]
        if not path:
            free.rb_node = va
        else:
            va.rb_parent = path[-1]
            if row["side"] == "L":
                path[-1].rb_left = va
            else:
                path[-1].rb_right = va
        path.append(va)
        areas.append(va)
    free.cache.live += len(areas)
    previous = free.head
    for va in sorted(areas, key=lambda area: area.va_start):
        previous.list_next = va
        va.list_prev = previous
        previous = va
    previous.list_next = free.head
    free.head.list_prev = previous
    free.validate()


def preorder(free: FreeVmapAreas) -> Iterator[tuple[int, int, int, str, int, int]]:
    """Start, end, depth, side, blackness and maximum of every node of the free tree."""
    stack: list[tuple[VmapArea | None, int, str]] = [(free.rb_node, 0, "T")]
    while stack:
        va, depth, side = stack.pop()
        if va is None:
            continue
        black = int(va.rb_color == RB_BLACK)
        yield va.va_start, va.va_end, depth, side, black, va.subtree_max_size
        stack.append((va.rb_right, depth + 1, "R"))
        stack.append((va.rb_left, depth + 1, "L"))


def replay(ops_path: Path) -> Result:
    """Replay one recording. The hidden inputs are searched for only while something differs."""
    recording = Recording(ops_path)
    hidden = Hidden()
    best: Replay | None = None
    for _ in range(SEARCH_LIMIT):
        attempt = Replay(recording, hidden)
        agrees = attempt.run(until_difference=True) and attempt.tree_matches()
        attempt.inferred = hidden.depth
        if agrees and attempt.lists_match():
            best = attempt
            break
        if agrees and best is None:
            best = attempt
        if not hidden.advance():
            break
    if best is None:
        best = Replay(recording, Hidden())
        best.run(until_difference=False)
    return best.result()


def print_result(name: str, result: Result) -> None:
    print(f"{name}: {result.operations} operations, {result.requests} requests")
    print(f"  differing addresses: {len(result.differing)}")
    for wanted, got in result.differing[:5]:
        print(f"    recorded {wanted:#x}, model {got:#x}")
    print(f"  final tree: {'matches' if result.tree_matches else 'differs'} ({result.tree_nodes} nodes)")
    print(f"  busy, lazy and pooled areas: {'match' if result.lists_match else 'differ'}")
    if result.inferred:
        print(f"  inputs that the recording lacks: {result.inferred}")
    for warning in result.warnings:
        print(f"  warning: {warning}")


def main() -> int:
    parser = argparse.ArgumentParser(description="Replay recorded vmalloc traces on the model.")
    parser.add_argument("files", nargs="+", type=Path, metavar="NAME.ops.jsonl.gz")
    failed = 0
    for path in parser.parse_args().files:
        result = replay(path)
        print_result(path.name.replace(".ops.jsonl.gz", ""), result)
        failed += not result.ok
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
