import pytest
from kernel_floor import recorded_fact

from emu.kernel.pgprot import PAT, PAT_LARGE, PSE, large_prot, make_pgprots, small_prot
from emu.kernel.profile import PROFILES, V6_1, V6_12, find_profile

CONSTANTS = {
    "PAGE_KERNEL": "kernel",
    "PAGE_KERNEL_RO": "kernel_ro",
    "PAGE_KERNEL_EXEC": "kernel_exec",
    "PAGE_KERNEL_ROX": "kernel_rox",
    "PAGE_KERNEL_NOCACHE": "kernel_nocache",
}


@pytest.mark.parametrize("file", ["main-6.12-4l", "main-6.1-4l", "main-6.1-5l", "pti-6.12-4l", "pti-6.1-4l"])
def test_page_protections_are_those_of_the_recorded_kernel(file):
    recorded = recorded_fact(file, "consts")
    prots = make_pgprots(V6_12 if "6.12" in file else V6_1, pti="pti" in file)
    assert {name: getattr(prots, ours) for name, ours in CONSTANTS.items()} == {
        name: int(recorded[name], 16) for name in CONSTANTS
    }


@pytest.mark.parametrize("name", ["6.12", "6.1"])
def test_releases_and_node_counts_are_those_of_the_recorded_kernel(name):
    assert recorded_fact(f"main-{name}-4l", "layout")["ver"] == PROFILES[name].release
    assert recorded_fact(f"main-{name}-4l", "consts")["nr_vmap_nodes"] == PROFILES[name].nr_vmap_nodes(1)


def test_vmap_nodes_follow_the_possible_cpus_up_to_128():
    assert [V6_12.nr_vmap_nodes(cpus) for cpus in (1, 4, 128, 500)] == [1, 4, 128, 128]
    assert V6_1.nr_vmap_nodes(4) == 0


def test_allocation_functions_are_called_noprof_from_6_10_on():
    assert V6_12.symbol("vmalloc") == "vmalloc_noprof"
    assert V6_1.symbol("vmalloc") == "vmalloc"


def test_an_unknown_version_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'2\.4'; known are 6\.12, 6\.1, 5\.4"):
        find_profile("2.4")


def test_the_pat_bit_moves_between_leaf_sizes():
    assert large_prot(PAT) == PAT_LARGE | PSE
    assert small_prot(PAT_LARGE | PSE) == PAT
    assert small_prot(large_prot(0x8000000000000163)) == 0x8000000000000163
