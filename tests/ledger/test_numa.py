"""Ledger rows about nodes."""

from __future__ import annotations

from booted import MIB, boot, machine, row_of, run

from emu.kernel.gfp import GFP_KERNEL, Gfp
from emu.kernel.kernel import Kernel
from emu.kernel.mempolicy import Mempolicy, Mpol

PAGE = 4096


def two_nodes() -> Kernel:
    return boot(cpus=2, nodes=2, size=128 * MIB)


def leave_free(k: Kernel, node: int, frames: int) -> None:
    """Take all frames of a node but so many."""
    while k.pages.nr_free_pages(node) > frames:
        pfns = k.pages.alloc_pages_bulk(GFP_KERNEL | Gfp.THISNODE, node, k.pages.nr_free_pages(node) - frames)
        assert len(pfns)


def numa(k: Kernel, la: int) -> str:
    return row_of(k, la).partition(" vmalloc ")[2]


def test_C63_without_a_policy_pages_are_of_the_node_of_the_cpu():
    k = two_nodes()
    assert numa(k, k.vmalloc.vmalloc(8 * PAGE)) == "N0=8"
    k.cpus.current = 1
    assert numa(k, k.vmalloc.vmalloc(8 * PAGE)) == "N1=8"


def test_C63_interleaving_shares_the_pages_out_evenly():
    k = two_nodes()
    k.create_thread("guest").mempolicy = Mempolicy(Mpol.INTERLEAVE, (0, 1))
    assert numa(k, k.vmalloc.vmalloc(8 * PAGE)) == "N0=4 N1=4"


def test_C63_a_preferred_node_comes_first_and_a_full_one_spills():
    k = two_nodes()
    k.create_thread("guest").mempolicy = Mempolicy(Mpol.PREFERRED, (1,))
    k.vmalloc.vmalloc(8 * PAGE)
    leave_free(k, 1, 5)
    assert numa(k, k.vmalloc.vmalloc(8 * PAGE)) == "N0=3 N1=5"


def test_C64_a_named_node_is_preferred_and_falls_back_without_a_word():
    k = two_nodes()
    k.vmalloc.vmalloc_node(8 * PAGE, 1)
    leave_free(k, 1, 3)
    lines = len(k.log.lines)
    assert numa(k, k.vmalloc.vmalloc_node(8 * PAGE, 1)) == "N0=5 N1=3"
    assert len(k.log.lines) == lines


def test_C64_with_thisnode_nothing_falls_back_and_the_failure_is_logged():
    on = machine(nodes=2, memory=128 * MIB)
    k = on.kernel
    k.vmalloc.vmalloc_node(8 * PAGE, 1)
    leave_free(k, 1, 3)
    free = k.pages.nr_free_pages(1)
    k.symbols.register(
        "thisnode", lambda: k.vmalloc.vmalloc_node_align(8 * PAGE, 1, int(GFP_KERNEL | Gfp.THISNODE), 1, k.caller), 0
    )
    outcome = run(on, "    sub rsp, 8\n    call thisnode\n    add rsp, 8\n    ret")
    assert outcome.returned == 0
    assert any("vmalloc error: size 12288, failed to allocate pages" in line for line in outcome.log)
    k.vmalloc.space.reclaim_and_purge()
    assert k.pages.nr_free_pages(1) == free


def test_C65_a_cpu_reads_and_writes_another_nodes_page_through_the_same_address():
    on = machine(nodes=2)
    outcome = run(on, """
    sub rsp, 8
    mov edi, 4096
    mov esi, 1
    call vmalloc_node
    mov [rax], rax
    mov rax, [rax]
    add rsp, 8
    ret""")
    pfn = on.kernel.vmalloc.vmalloc_to_pfn(outcome.returned)
    assert on.kernel.pages.page_to_nid(pfn) == 1
    assert on.memory.read_u64(pfn * PAGE) == outcome.returned
    assert outcome.faults == ()


def test_C66_a_thread_bound_to_a_node_has_its_stack_there():
    k = two_nodes()
    thread = k.create_thread("kcompactd1", node=1, runs=False)
    assert numa(k, thread.stack) == "N1=4"
