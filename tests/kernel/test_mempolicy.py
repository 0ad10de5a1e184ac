"""Which node a page comes from."""

from __future__ import annotations

import pytest
from kernel_floor import make_floor

from emu.kernel.gfp import GFP_KERNEL, Gfp
from emu.kernel.mempolicy import Mempolicy, Mpol, TaskMempolicy

MIB = 1 << 20


def pages_with(policy, *, node=0, in_interrupt=False):
    floor = make_floor(size=256 * MIB, nodes=4)
    floor.pages.policy = TaskMempolicy(4, lambda: node, lambda: policy, lambda: in_interrupt)
    return floor.pages


def nodes_of(pages, count, gfp=GFP_KERNEL):
    return [pages.page_to_nid(pages.alloc_pages(gfp)) for _ in range(count)]


def bulk(pages, count, gfp=GFP_KERNEL):
    got = [pages.page_to_nid(pfn) for pfn in pages.alloc_pages_bulk(gfp, -1, count).tolist()]
    return [got.count(nid) for nid in range(4)]


def test_without_a_policy_the_cpus_node_comes_first():
    assert nodes_of(pages_with(None, node=2), 3) == [2, 2, 2]
    assert bulk(pages_with(None, node=2), 7) == [0, 0, 7, 0]


def test_interleaving_goes_round_page_by_page_and_in_shares_when_asked_in_bulk():
    policy = Mempolicy(Mpol.INTERLEAVE, (0, 1, 3))
    assert nodes_of(pages_with(policy), 5) == [0, 1, 3, 0, 1]
    # The remainder goes to the nodes that come next.
    assert bulk(pages_with(policy), 8) == [3, 2, 0, 3]


def test_a_bound_task_gets_nothing_from_other_nodes():
    pages = pages_with(Mempolicy(Mpol.BIND, (1, 2)), node=3)
    assert nodes_of(pages, 2) == [1, 1]
    while pages.alloc_pages(GFP_KERNEL, 3) is not None:
        pass
    assert pages.nr_free_pages(0) > 10_000
    assert pages.nr_free_pages(1) + pages.nr_free_pages(2) < 64


def test_preferred_nodes_come_first_and_the_others_when_these_are_full():
    pages = pages_with(Mempolicy(Mpol.PREFERRED_MANY, (2, 3)))
    assert nodes_of(pages, 1) == [2]
    wanted = pages.nr_free_pages(2) + pages.nr_free_pages(3) + 5
    got = bulk(pages, wanted)
    assert got[0] == 5
    assert pages.nr_free_pages(2) == pages.nr_free_pages(3) == 0


def test_interrupts_and_thisnode_requests_know_no_policy_and_a_named_node_overrides_it():
    policy = Mempolicy(Mpol.PREFERRED, (3,))
    assert nodes_of(pages_with(policy), 1) == [3]
    assert nodes_of(pages_with(policy, node=1, in_interrupt=True), 1) == [1]
    assert nodes_of(pages_with(policy, node=1), 1, GFP_KERNEL | Gfp.THISNODE) == [1]
    pages = pages_with(policy)
    assert pages.page_to_nid(pages.alloc_pages(GFP_KERNEL, 0, 2)) == 2
    bulk(pages, pages.nr_free_pages(0), GFP_KERNEL | Gfp.THISNODE)
    assert pages.alloc_pages(GFP_KERNEL | Gfp.THISNODE) is None


@pytest.mark.parametrize(("mode", "nodes"), [(Mpol.DEFAULT, (0,)), (Mpol.BIND, ()), (Mpol.INTERLEAVE, (1, 0)), (Mpol.BIND, (1, 1))])
def test_policies_that_make_no_sense_are_refused(mode, nodes):
    with pytest.raises(ValueError, match="policy"):
        Mempolicy(mode, nodes)
