"""Kernel functions that show up as callers of allocations and in call traces: how large they are and where they call from.

Sizes and offsets are facts of Debian's builds, read off their /proc/vmallocinfo; where none was recorded (v5.4, and what 6.12 did
not allocate), the nearest build's stand in.
"""

from __future__ import annotations

from dataclasses import dataclass

from emu.kernel.layout import PAGE_SIZE


@dataclass(frozen=True, slots=True)
class Caller:
    """A function's size in bytes, and the offsets of its return addresses."""

    size: int
    returns: tuple[int, ...]


_PCPU_CREATE_CHUNK = Caller(0x1B0, (0x4E, 0x75, 0x92, 0x167))
_PCPU_GET_VM_AREAS = Caller(0x1080, (0,))

CALLERS = {
    "6.12": {
        "kernel_clone": Caller(0x430, (0xC2,)),
        "load_module": Caller(PAGE_SIZE, (1,)),
        "irq_init_percpu_irqstack": Caller(0x130, (0xF4,)),
        "pcpu_create_chunk": _PCPU_CREATE_CHUNK,
        "pcpu_get_vm_areas": _PCPU_GET_VM_AREAS,
    },
    "6.1": {
        "kernel_clone": Caller(0x430, (0xBF,)),
        "load_module": Caller(PAGE_SIZE, (1,)),
        "irq_init_percpu_irqstack": Caller(0x120, (0xF0,)),
        "pcpu_create_chunk": _PCPU_CREATE_CHUNK,
        "pcpu_get_vm_areas": _PCPU_GET_VM_AREAS,
    },
    "5.4": {
        "_do_fork": Caller(0x430, (0xBF,)),
        "load_module": Caller(PAGE_SIZE, (1,)),
        "irq_init_percpu_irqstack": Caller(0x120, (0xF0,)),
        "pcpu_create_chunk": _PCPU_CREATE_CHUNK,
        "pcpu_get_vm_areas": _PCPU_GET_VM_AREAS,
    },
}

# What fork is called: _do_fork before v5.10.
FORK = {"6.12": "kernel_clone", "6.1": "kernel_clone", "5.4": "_do_fork"}
