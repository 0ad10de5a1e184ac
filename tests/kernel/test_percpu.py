"""The per-CPU allocator: its first chunk, and what happens at its limits."""

from __future__ import annotations

import pytest
from booted import boot, rows

from emu.kernel.gfp import GFP_KERNEL, GFP_NOWAIT, Gfp
from emu.kernel.kernel import Kernel
from emu.kernel.percpu_chunk import PcpuChunk
from emu.kernel.percpu_first_chunk import PCPU_SIZES, STATIC_VARIABLES, pcpu_build_alloc_info
from emu.kernel.profile import V6_1, V6_12

PAGE = 4096


@pytest.mark.parametrize(
    ("cpus", "nodes", "unit", "groups"),
    [
        (1, 1, 2 << 20, [[0]]),
        (2, 1, 1 << 20, [[0, 1]]),
        (3, 1, 512 << 10, [[0, 1, 2, None]]),
        (4, 1, 512 << 10, [[0, 1, 2, 3]]),
        (5, 1, 1 << 20, [[0, 1, 2, 3, 4, None]]),
        (4, 2, 1 << 20, [[0, 1], [2, 3]]),
        (4, 4, 2 << 20, [[0], [1], [2], [3]]),
        (16, 2, 256 << 10, [[*range(8)], [*range(8, 16)]]),
    ],
)
def test_units_share_2_mib_as_long_as_few_stay_unused(cpus, nodes, unit, groups):
    info = pcpu_build_alloc_info(PCPU_SIZES["6.1"], 2 << 20, cpus, lambda cpu: cpu * nodes // cpus)
    assert info.unit_size == unit
    assert [list(group.cpu_map) for group in info.groups] == groups


def test_boot_prints_the_first_chunks_sizes_as_debian_does():
    info = pcpu_build_alloc_info(PCPU_SIZES["6.1"], 2 << 20, 1, lambda cpu: 0)
    assert info.line() == "percpu: Embedded 61 pages/cpu s212992 r8192 d28672 u2097152"


def test_what_a_unit_does_not_use_goes_back_to_the_page_allocator():
    k = boot(V6_1)
    first = k.layout.pa(k.percpu.per_cpu_offset(0)) >> 12
    used = [k.pages.page_count(pfn) for pfn in range(first, first + 61)]
    assert used == [0] * 61
    taken = k.pages.alloc_pages_bulk(int(GFP_KERNEL), -1, k.pages.nr_free_pages())
    assert not set(range(first, first + 61)) & set(taken.tolist())
    assert len(set(range(first + 61, first + 512)) & set(taken.tolist())) > 300


def test_each_cpu_finds_its_offset_number_and_node_in_its_static_variables():
    k = boot(cpus=4, nodes=2, size=128 << 20)
    for cpu in range(4):
        base = k.layout.pa(k.percpu.per_cpu_offset(cpu))
        values = {
            name: int.from_bytes(k.memory.read(base + STATIC_VARIABLES[name][0], STATIC_VARIABLES[name][1]), "little")
            for name in ("this_cpu_off", "cpu_number", "numa_node")
        }
        assert values == {"this_cpu_off": k.percpu.per_cpu_offset(cpu), "cpu_number": cpu, "numa_node": cpu // 2}
        assert k.memory.node_of(base) == cpu // 2


def test_a_pointer_is_an_offset_behind_the_static_and_reserved_parts_and_room_is_reused_lowest_first():
    k = boot(V6_1)
    start = 212992 + 8192
    a, b, c = (k.percpu.alloc_percpu(size, 8) for size in (10, 100, 8))
    assert (a, b, c) == (start, start + 16, start + 120)
    k.percpu.free_percpu(b)
    assert k.percpu.alloc_percpu(64, 8) == b
    assert k.percpu.alloc_percpu(32, 8) == b + 64
    assert k.percpu.alloc_percpu(16, 8) == c + 8
    assert k.percpu.alloc_percpu(64, 8, reserved=True) == 212992
    k.percpu.validate()


def test_a_request_that_cannot_wait_passes_over_pages_that_are_not_there():
    chunk = PcpuChunk(0, 0, 8 * PAGE, 8)
    chunk.populated[2:4] = [True, True]
    assert chunk.find_block_fit(2 * PAGE, 4, pop_only=True) == 2 * PAGE
    assert chunk.find_block_fit(2 * PAGE + 4, 4, pop_only=True) == -1
    assert chunk.find_block_fit(2 * PAGE + 4, 4, pop_only=False) == 0


def test_memory_is_zeroed_in_every_unit():
    k = boot(cpus=2)
    ptr = k.percpu.alloc_percpu(64, 8)
    for cpu in range(2):
        k.memory.fill(k.layout.pa(k.percpu.per_cpu_ptr(ptr, cpu)), 64, 0xAA)
    k.percpu.free_percpu(ptr)
    assert k.percpu.alloc_percpu(64, 8) == ptr
    assert [k.memory.read(k.layout.pa(k.percpu.per_cpu_ptr(ptr, cpu)), 64) for cpu in range(2)] == [bytes(64)] * 2


@pytest.mark.parametrize(("size", "align"), [(0, 8), ((32 << 10) + 1, 8), (8, 8192), (8, 24)])
def test_illegal_sizes_and_alignments_are_null(size, align):
    k = boot()
    assert k.percpu.alloc_percpu(size, align) == 0
    k.percpu.validate()


def test_without_memory_a_request_is_null_with_a_line_and_gives_back_what_it_took():
    k = boot(V6_1, cpus=4)
    while not k.layout.is_vmalloc_addr(k.percpu.per_cpu_ptr(k.percpu.alloc_percpu(16 << 10, 4), 0)):
        pass
    k.rcu_barrier()
    free = k.pages.nr_free_pages()
    k.pages.alloc_pages_bulk(int(GFP_KERNEL), -1, free - 10)
    before = len(k.log.lines)
    assert k.percpu.alloc_percpu(32 << 10, 4096) == 0
    assert [line.text for line in k.log.lines[before:]] == [
        "percpu: allocation failed, size=32768 align=4096 atomic=0, failed to populate"
    ]
    assert k.pages.nr_free_pages() == 10
    assert k.percpu.alloc_percpu(32 << 10, 4096, int(GFP_KERNEL | Gfp.NOWARN)) == 0
    assert len(k.log.lines) == before + 1
    k.percpu.validate()


def test_after_ten_failures_the_allocator_says_no_more():
    k = boot(V6_1)
    while k.percpu.alloc_percpu(1 << 10, 4, int(GFP_NOWAIT)):
        pass
    before = len(k.log.lines)
    for _ in range(12):
        k.percpu.alloc_percpu(4, 4, int(GFP_NOWAIT & ~Gfp.NOWARN))
    texts = [line.text for line in k.log.lines[before:]]
    assert texts == ["percpu: allocation failed, size=4 align=4 atomic=1, atomic alloc failed, no space left"] * 10 + [
        "percpu: limit reached, disable warning"
    ]


def test_a_new_chunk_shows_the_rows_that_a_real_kernel_shows():
    k = boot(V6_1)
    before = set(rows(k))
    while not k.layout.is_vmalloc_addr(k.percpu.per_cpu_ptr(k.percpu.alloc_percpu(16 << 10, 4), 0)):
        pass
    made = [row.partition(" ")[2].strip() for row in rows(k) if row not in before]
    assert sorted(made) == sorted([
        "69632 pcpu_create_chunk+0x4e/0x1b0 pages=16 vmalloc N0=16",
        "73728 pcpu_create_chunk+0x75/0x1b0 pages=17 vmalloc N0=17",
        "20480 pcpu_create_chunk+0x92/0x1b0 pages=4 vmalloc N0=4",
        "4198400 pcpu_create_chunk+0x167/0x1b0 pages=1024 vmalloc vpages N0=1024",
        "12288 pcpu_create_chunk+0x167/0x1b0 pages=2 vmalloc N0=2",
        "2097152 pcpu_get_vm_areas+0x0/0x1080 vmalloc",
    ])
    area = next(row for row in rows(k) if "pcpu_get_vm_areas" in row)
    assert area.startswith("0xffffe8ffffc00000-0xffffe8ffffe00000")


def fill_and_empty(k: Kernel) -> None:
    ptrs = [k.percpu.alloc_percpu(32 << 10, 4) for _ in range(200)]
    for ptr in ptrs:
        k.percpu.free_percpu(ptr)
    k.rcu_barrier()


def test_of_the_chunks_that_became_free_one_of_each_kind_is_kept_and_nothing_leaks():
    k = boot(V6_12, size=128 << 20)
    fill_and_empty(k)
    k.vmalloc.space.reclaim_and_purge()
    free, chunks = k.pages.nr_free_pages(), len(list(k.percpu.chunks()))
    # The reserved and the first chunk, one without pages, and one whose pages are ready for requests that cannot wait.
    assert chunks == 4
    fill_and_empty(k)
    k.vmalloc.space.reclaim_and_purge()
    assert (k.pages.nr_free_pages(), len(list(k.percpu.chunks()))) == (free, chunks)
    k.percpu.validate()
    k.vmalloc.validate()
