"""Recordings of real kernels' vmalloc traces: what NAME.ops, NAME.trace and NAME.freetree.jsonl.gz say, in one piece."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emu.kernel.vmap_node import V6_1, V6_12

Record = dict[str, Any]
ALLOCATING = ("vmalloc", "vzalloc", "vmalloc_huge", "vnr_align", "vmap", "ioremap", "vm_map_ram")
WITH_PAGE_ARRAY = ("vmalloc", "vzalloc", "vmalloc_huge", "vnr_align")
PAGE_SIZE = 4096
POINTERS_PER_PAGE = PAGE_SIZE // 8


def records(path: Path) -> list[Record]:
    """The JSON records of a gzipped file, one a line."""
    with gzip.open(path, "rt") as lines:
        return [json.loads(line) for line in lines]


@dataclass
class Request:
    """One alloc_vmap_area call with its recorded result; `cpu` is None where the recording does not tell."""

    size: int
    align: int
    vstart: int
    vend: int
    start: int
    ok: bool
    cpu: int | None = None
    task: str = ""


@dataclass
class Event:
    """A request, or a free of the area at `start`, or a purge of [start, end)."""

    kind: str
    start: int = 0
    end: int = 0
    request: Request | None = None


class Recording:
    """One trace: initial state, events in order, final state."""

    def __init__(self, ops_path: Path) -> None:
        name = str(ops_path)
        if ".ops." not in name:
            raise ValueError(f"not an .ops.jsonl.gz file: {name}")
        ops = records(ops_path)
        tree = records(Path(name.replace(".ops.", ".freetree.")))
        self.header = ops[0]
        self.ops = [row for row in ops if row["t"] == "op"]
        self.initial = [row for row in ops if row["t"].startswith("init_")]
        self.final = [row for row in ops if row["t"].startswith("final_")]
        self.initial_tree = [row for row in tree if row["when"] == "init"]
        self.final_tree = [row for row in tree if row["when"] == "final"]
        nodes = self.header["nodes"]
        self.design = V6_1 if nodes is None else V6_12
        self.nr_nodes = 1 if nodes is None else int(nodes["n"])
        self.vmalloc_start = int(self.header["VMALLOC_START"], 16)
        self.vmalloc_end = int(self.header["VMALLOC_END"], 16)
        trace = records(Path(name.replace(".ops.", ".trace.")))
        part = self._recorded_part(trace)
        self.events = list(self._events(part))
        # Requests of different tasks may overlap; then the later of two may have been served first.
        self.events_by_result = list(self._events(part, by_result=True))
        self.overlapping = [e.request for e in self.events] != [e.request for e in self.events_by_result]

    def _recorded_part(self, trace: list[Record]) -> list[Record]:
        """The events between the two dumps of the state.

        The recorder purges, dumps, operates, dumps. Other tasks go on before the first dump and after the second, which
        shows in the dumps.
        """
        tasks = [row["who"] for row in trace if row["ev"] == "kalloc_req"]
        self.recorder = max(sorted(set(tasks)), key=tasks.count)
        busy = {int(row["s"], 16) for row in self.initial if row["t"] == "init_busy"}
        own = next(i for i, row in enumerate(trace) if row["ev"] == "kalloc_req" and row["who"] == self.recorder)
        purges = [i for i in range(own) if trace[i]["ev"] == "kpurge" and trace[i]["who"] == self.recorder]
        first_alloc = next((i for i, op in enumerate(self.ops) if op["op"] in ALLOCATING), 0)
        asked = sum(op["op"] == "vm_unmap_aliases" for op in self.ops[:first_alloc])
        first = purges[-asked - 1] + 1 if len(purges) > asked else 0
        before = {
            i
            for i in range(first, own)
            if (trace[i]["ev"] == "kfree_va" and int(trace[i]["s"], 16) not in busy)
            or (trace[i]["ev"] == "kalloc_va" and int(trace[i]["s"], 16) in busy)
        }
        start = max(before, default=first - 1) + 1
        return trace[start : self._final_dump(trace)]

    def _final_dump(self, trace: list[Record]) -> int:
        """Index of the first event after the final dump: what it did to the busy areas does not show there."""
        busy = {int(row["s"], 16) for row in self.final if row["t"] == "final_busy"}
        end = len(trace)
        settled: set[int] = set()
        for i in reversed(range(len(trace))):
            row = trace[i]
            if row["ev"] not in ("kfree_va", "kalloc_va") or not row.get("ok", True):
                continue
            start = int(row["s"], 16)
            if start not in settled and (start in busy) == (row["ev"] == "kfree_va"):
                end = i
            else:
                settled.add(start)
        while end > 0 and trace[end - 1]["ev"] == "kalloc_req":
            end -= 1
        return end

    def _events(self, trace: list[Record], by_result: bool = False) -> Iterator[Event]:
        """Requests joined with their results, in the order of one or the other; purges that a request makes are its own."""
        waiting: dict[str, Request] = {}
        cpus = OperationCpus(self)
        for row in trace:
            who = row["who"]
            if row["ev"] == "kalloc_req":
                size, align, vstart, vend = (int(row[key], 16) for key in ("size", "align", "vs", "ve"))
                waiting[who] = request = Request(size, align, vstart, vend, start=0, ok=False, task=who)
                if not by_result:
                    yield Event("alloc", request=request)
            elif row["ev"] == "kalloc_va" and who in waiting:
                request = waiting.pop(who)
                request.start = int(row["s"], 16)
                request.ok = bool(row["ok"])
                if who == self.recorder:
                    request.cpu = cpus.of(request)
                if by_result:
                    yield Event("alloc", request=request)
            elif row["ev"] == "kfree_va":
                yield Event("free", int(row["s"], 16), int(row["e"], 16))
            elif row["ev"] == "kpurge" and who not in waiting:
                yield Event("purge", int(row["start"], 16), int(row["end"], 16))


class OperationCpus:
    """Tells on which CPU the recorder made a request: operation i runs on CPU i mod `mode`, or all on one."""

    def __init__(self, recording: Recording) -> None:
        self.ops = recording.ops
        self.mode = int(recording.header["mode"])
        self.fixed = int(recording.header["cpu"])
        self.next = 0
        self.array_size = 0

    def of(self, request: Request) -> int:
        """The CPU of the recorder's next request. Its operation is found by the address and size that it returned."""
        if self.mode == 0:
            return self.fixed
        if self.array_size and request.size == self.array_size:
            self.array_size = 0
            return (self.next - 1) % self.mode
        for index in range(self.next, len(self.ops)):
            op = self.ops[index]
            if op["op"] not in ALLOCATING or op["va_len"] != request.size:
                continue
            if 0 <= int(op["ret"], 16) - request.start < request.size:
                self.next = index + 1
                nr_pages = request.size // PAGE_SIZE - 1
                self.array_size = 0
                if op["op"] in WITH_PAGE_ARRAY and nr_pages > POINTERS_PER_PAGE:
                    self.array_size = (-(-nr_pages // POINTERS_PER_PAGE) + 1) * PAGE_SIZE
                return index % self.mode
        # An attempt with huge pages that failed: it belongs to the next operation that gets an address.
        index = next((i for i in range(self.next, len(self.ops)) if self.ops[i]["op"] == "vmalloc_huge"), self.next)
        return index % self.mode


