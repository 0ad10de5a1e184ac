"""Which CPUs a kernel has: their numbers, their nodes, and where each finds its tables."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CpuTables:
    """Where a CPU finds its descriptor tables and per-CPU area (linear addresses).

    `gdt_direct` is the writable alias of the read-only GDT, through which LTR marks the TSS busy.
    """

    idt: int
    idt_limit: int
    gdt: int
    gdt_direct: int
    gdt_limit: int
    tss_selector: int
    percpu: int


class OnlineCpus:
    """How many CPUs there are, and which one runs the model; their nodes share them out evenly, in order."""

    def __init__(self, nr_cpus: int, nr_nodes: int = 1) -> None:
        self.online = self.possible = nr_cpus
        self.nr_nodes = nr_nodes
        self.current = 0

    def cpu_to_node(self, cpu: int) -> int:
        """Node of a CPU."""
        return cpu * self.nr_nodes // max(self.possible, self.nr_nodes)

    def numa_node_id(self) -> int:
        """Node of the current CPU."""
        return self.cpu_to_node(self.current)
