"""Whatever a guest passes to an exported function, the run ends as a run may: never in an exception of the emulator's own."""

from __future__ import annotations

import random

import pytest

from emu.config import MachineConfig
from emu.guest.asm import assemble
from emu.guest.directives import ENDS, MachineOptions
from emu.machine import Machine
from emu.run import run_program

LIMIT = 200_000
RUNS = 20
CALLS = 14
SLOTS = 16
MEMORY = 64 << 20
# They print what they are told to, or wait for arguments that a random call does not have.
SKIPPED = {"panic"}
SIZES = (0, 1, 8, 4095, 4096, 4097, 8192, 65536, 1 << 20, (2 << 20) + 1, 4 << 20, 1 << 25, 1 << 31, 1 << 40, (1 << 64) - 1, 1 << 63)
COUNTS = (0, 1, 2, 63, 64, 65, 512, 513, 0xFFFF_FFFF, 0x8000_0000, 0xFFFF_FFFF_FFFF_FFFE)
FLAGS = (0, 0xCC0, 0xDC0, 0x820, 0x2CC0, 0x8CC0, 0x200CC0, 5, 0x306, 0xFFFF_FFFF, 4, 0x204, 0x100, 0x40, 0x163, 1 << 63)
# What a careful caller passes: Size, Flags of gfp, Array of pages, Number of pages, D for a node; and results of earlier calls:
# Vmalloc memory, pages (G), Kmalloc memory, Ioremap memory, map_ram blocks (R), vm_struct (T). Behind the colon the result.
SANE = {
    "vmalloc": "S:V", "vzalloc": "S:V", "vmalloc_node": "SD:V", "vmalloc_user": "S:V", "vmalloc_32": "S:V", "__vmalloc": "SF:V",
    "__vmalloc_node": "SNFDP:V", "vmalloc_huge": "SF:V", "__vmalloc_array": "NSF:V", "vcalloc": "NS:V", "vrealloc": "VSF:V",
    "vfree": "V", "vfree_atomic": "V", "free_vm_area": "T", "get_vm_area": "SF:T", "find_vm_area": "V:T", "remove_vm_area": "V:T",
    "vmap": "ANFF:V", "vunmap": "V", "vm_map_ram": "AND:R", "vm_unmap_ram": "RN", "vmap_pfn": "ANF:V", "kmalloc": "SF:K",
    "kvmalloc": "SF:V", "kvmalloc_node": "SFD:K", "kvrealloc": "VSF:V", "kvfree": "V", "kfree": "K", "krealloc": "KSF:K",
    "ksize": "K",
    "kvmemdup": "VSF:V", "alloc_pages": "FN:G", "__free_pages": "GN", "put_page": "G", "get_page": "G", "virt_to_page": "K:G",
    "page_address": "G:K", "vmalloc_to_page": "V:G", "set_memory_ro": "VN", "set_memory_rw": "VN", "set_memory_nx": "VN",
    "set_memory_uc": "VN", "lookup_address": "VA", "memset": "VSS", "kvfree_call_rcu": "SV", "ioremap": "OS:I", "iounmap": "I",
    "memremap": "OSN:I", "kvfree_sensitive": "VS", "vm_unmap_aliases": "",
}
POINTERS = (
    0, 16, 0x1000, 0x7FFF_FFFF_F000, 0x8000_0000_0000, 0xFFFF_8880_0000_0000, 0xFFFF_8880_0123_4560, 0xFFFF_8880_0400_0000,
    0xFFFF_C900_0000_0000, 0xFFFF_C900_0000_1000, 0xFFFF_E8FF_FFFF_F000, 0xFFFF_E8FF_FFFF_FFFF, 0xFFFF_EA00_0000_0000,
    0xFFFF_EA00_0008_0040, 0xFFFF_EA00_0008_0041, 0xFFFF_FFFF_8100_0000, 0xFFFF_FFFF_C000_0000, 0xFFFF_FFFF_FFFF_FFFF,
    0xFEDC_BA98_7654_3210, 0xFED0_0000, 1 << 39, (1 << 40) + 5,
)


def exported(kernel: str) -> list[tuple[str, int]]:
    """The functions of a kernel with the number of their arguments."""
    exports = Machine(MachineConfig(memory=MEMORY, kernel=kernel)).kernel.symbols.exports.values()
    return sorted((export.name, export.arguments) for export in exports if export.name not in SKIPPED)


def argument(generator: random.Random) -> str:
    """One statement that sets {0}: a result of an earlier call, near it, an array of such, or a number."""
    match generator.randrange(8):
        case 0 | 1 | 2:
            return f"mov {{0}}, [slots + {8 * generator.randrange(SLOTS)}]"
        case 3:
            return f"lea {{0}}, [slots + {8 * generator.randrange(SLOTS)}]"
        case 4:
            offset = generator.choice((1, 8, 0x1000, 0x2000, 0x10_0000))
            return f"mov {{0}}, [slots + {8 * generator.randrange(SLOTS)}]\n    add {{0}}, {offset}"
        case 5:
            return f"mov {{0}}, {generator.choice(SIZES):#x}"
        case 6:
            return f"mov {{0}}, {generator.choice(generator.choice((COUNTS, FLAGS))):#x}"
        case _:
            return f"mov {{0}}, {generator.choice(POINTERS):#x}"


def sane_argument(generator: random.Random, kind: str, slots: list[str]) -> str:
    """One statement that sets {0} to something of a kind; `slots` has the kinds of earlier results."""
    match kind:
        case "A":
            return f"lea {{0}}, [slots + {8 * max(slots.index('G') if 'G' in slots else 0, 0)}]"
        case "S":
            return f"mov {{0}}, {generator.choice(SIZES[:12]):#x}"
        case "F":
            return f"mov {{0}}, {generator.choice(FLAGS[:3]):#x}"
        case "N":
            return f"mov {{0}}, {generator.choice((1, 1, 1, 2, 3)):#x}"
        case "O":
            return f"mov {{0}}, {generator.choice((0xFED0_0000, 1 << 32, (1 << 36) + 0x1234)):#x}"
        case "D":
            return f"mov {{0}}, {generator.choice((0, 0xFFFF_FFFF)):#x}"
    fitting = [n for n, result in enumerate(slots) if result == kind] or range(SLOTS)
    return f"mov {{0}}, [slots + {8 * generator.choice(fitting)}]"


def wild_guest(generator: random.Random, functions: list[tuple[str, int]]) -> str:
    """A guest that calls functions, with more or less care, and keeps what they return."""
    lines = ["section .text", "init_module:", "    push rbx"]
    care = generator.choice((0.0, 0.5, 0.95, 1.0))
    if care:
        functions = [(name, arguments) for name, arguments in functions if name in SANE]
    slots: list[str] = []
    for call in range(CALLS):
        name, arguments = generator.choice(functions)
        kinds, _, result = SANE.get(name, "").partition(":")
        careful = generator.random() < care
        for n, register in enumerate(("rdi", "rsi", "rdx", "rcx", "r8", "r9")[:arguments]):
            known = careful and n < len(kinds)
            text = sane_argument(generator, kinds[n], slots) if known else argument(generator)
            lines.append("    " + text.format(register))
        lines += ["    xor eax, eax", f"    call {name}", f"    mov [slots + {8 * call}], rax"]
        slots.append(result)
    lines += ["    xor eax, eax", "    pop rbx", "    ret", "section .bss", "align 16", f"slots: resq {SLOTS}", ""]
    return "\n".join(lines)


@pytest.mark.parametrize("kernel", ["6.12", "6.1", "5.4"])
@pytest.mark.parametrize("seed", range(8))
def test_random_calls_always_come_to_an_end(kernel: str, seed: int) -> None:
    generator = random.Random(f"{kernel} {seed}")
    functions = exported(kernel)
    options = MachineOptions(max_instructions=LIMIT, memory=MEMORY, kernel=kernel, nodes=1 + seed % 2)
    for _ in range(RUNS):
        text = wild_guest(generator, functions)
        result = run_program(assemble(text, "wild.asm"), options)
        assert result.outcome.ended in ENDS, text


@pytest.mark.parametrize("name", ["vmalloc", "kvmalloc", "kmalloc", "alloc_pages"])
def test_an_allocation_storm_ends_in_null(name: str) -> None:
    text = f"""
section .text
init_module:
    push rbx
    xor ebx, ebx
.again:
    mov edi, {0x10_0000 if name != 'alloc_pages' else 0xCC0}
    mov esi, {0xCC0 if name != 'alloc_pages' else 8}
    call {name}
    inc ebx
    test rax, rax
    jnz .again
    mov eax, ebx
    pop rbx
    ret
"""
    result = run_program(assemble(text, "storm.asm"), MachineOptions(memory=MEMORY))
    assert result.outcome.ended == "returned" and 10 < result.outcome.returned <= 64
