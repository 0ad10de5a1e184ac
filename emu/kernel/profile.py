"""Kernel versions as data: whatever differs between the kernels that are modelled stands here, once.

A profile describes one built kernel. 6.12 and 6.1 are Debian's amd64 kernels; 5.4 stands for x86-64 before v5.8 (commit
7f0a002b5a21), when the vmalloc region's top-level entries were not populated at boot but copied by a fault.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class SmpDesign:
    """How a kernel calls functions on other CPUs (kernel/smp.c)."""

    sync_calls_first: bool
    """A CPU runs the calls that somebody waits for before the others: from v5.8 on."""
    local_call_meanwhile: bool
    """on_each_cpu runs the function here while the other CPUs do, not after them: from v5.13 on."""
    single_ipi_for_one_left: bool
    """One IPI goes by the single vector even if the mask names several CPUs: from v5.13 on; before, only for a mask of one."""
    waits_for_refused: bool
    """The wait includes CPUs that the condition refused, should an earlier call to them be under way: not any more in v6.12."""
    warns_irqs_off: bool
    """smp_call_function_many WARNs with interrupts off; later lockdep alone asserts it, which Debian's kernels lack."""


@dataclass(frozen=True, slots=True)
class TlbDesign:
    """How a kernel flushes TLBs (arch/x86/mm/tlb.c)."""

    skips_old_generations: bool
    """A CPU that has caught up with the requested generation already does nothing, even if it is behind the mm's: v6.0 on."""
    skips_other_mms: bool
    """CPUs that have another mm loaded are not sent a flush (should_flush_tlb): in Debian's builds of 6.1 and 6.12."""
    local_flush_first: bool
    """flush_tlb_mm_range flushes here before it sends IPIs: until v5.12."""
    syncs_stack: bool
    """switch_mm copies the top-level entry of the stack into the next mm (sync_current_stack_to_mm): until v5.7."""
    single_page_flush_ceiling: int = 33
    """Above so many pages, everything is flushed (tlb_single_page_flush_ceiling)."""


@dataclass(frozen=True, slots=True)
class Profile:
    """One kernel version.

    Every flag is a fact about that kernel, not a wish: code asks `profile.noprof_symbols`, never which version it is.
    """

    name: str
    version: tuple[int, int]
    release: str
    """uname -r."""
    build: str
    """What follows the release in oops headers."""

    # Page tables (arch/x86)
    readonly_is_clean: bool
    """PAGE_KERNEL_RO and _ROX have D clear and set_memory_ro clears it: from v6.6 (shadow-stack support) on."""
    nx_checks_aliases: bool
    """set_memory_nx and _x look for aliases too, which NX is not carried over to, and so flush everything: from v6.2 on."""
    preallocated_vmalloc: bool
    """The vmalloc region's top-level entries are populated at boot: from v5.9 on. Otherwise they are copied to other mms."""
    syncs_mappings: bool
    """Whoever makes a top-level entry copies it to every mm (arch_sync_kernel_mappings): v5.8 on. Before, vmalloc_fault does."""

    # vmalloc (mm/vmalloc.c)
    noprof_symbols: bool
    """Allocation functions are called NAME_noprof (memory allocation profiling, v6.10)."""
    huge_vmalloc: bool
    """vmalloc may use 2 MiB leaves (CONFIG_HAVE_ARCH_HUGE_VMALLOC on x86: v5.15)."""
    max_vmap_nodes: int
    """Upper bound of vmap nodes; 0 where the kernel has no nodes (before v6.9)."""

    # Modules (kernel/module, mm/execmem.c)
    module_areas: tuple[str, ...]
    """The vmalloc areas that one module takes, in the order of allocation."""

    # Several CPUs
    smp: SmpDesign
    tlb: TlbDesign

    # Texts
    oops_shows_uid: bool
    """The "CPU: 0 UID: 0 PID: 1 Comm:" line has UID (v6.11)."""

    def symbol(self, function: str) -> str:
        """Name of an allocation function as kallsyms has it, e.g. "vmalloc" -> "vmalloc_noprof" in 6.12."""
        return f"{function}_noprof" if self.noprof_symbols else function

    def nr_vmap_nodes(self, possible_cpus: int) -> int:
        """Number of vmap nodes (v6.12 mm/vmalloc.c: vmap_init_nodes): one per possible CPU, at most 128; 0 before
        v6.9.
        """
        return max(1, min(possible_cpus, self.max_vmap_nodes)) if self.max_vmap_nodes else 0


_SMP_6_12 = SmpDesign(
    sync_calls_first=True, local_call_meanwhile=True, single_ipi_for_one_left=True, waits_for_refused=False, warns_irqs_off=False,
)
_SMP_5_4 = SmpDesign(
    sync_calls_first=False, local_call_meanwhile=False, single_ipi_for_one_left=False, waits_for_refused=False, warns_irqs_off=True,
)
_TLB_6 = TlbDesign(skips_old_generations=True, skips_other_mms=True, local_flush_first=False, syncs_stack=False)
_TLB_5_4 = TlbDesign(skips_old_generations=False, skips_other_mms=False, local_flush_first=True, syncs_stack=True)

V6_12 = Profile(
    name="6.12",
    version=(6, 12),
    release="6.12.117+deb12-amd64",
    build="#1  Debian 6.12.117-1~deb12u1",
    readonly_is_clean=True,
    nx_checks_aliases=True,
    preallocated_vmalloc=True,
    syncs_mappings=True,
    noprof_symbols=True,
    huge_vmalloc=True,
    max_vmap_nodes=128,
    module_areas=("text", "data", "rodata", "ro_after_init"),
    smp=_SMP_6_12,
    tlb=_TLB_6,
    oops_shows_uid=True,
)

V6_1 = Profile(
    name="6.1",
    version=(6, 1),
    release="6.1.0-56-amd64",
    build="#1  Debian 6.1.192-2",
    readonly_is_clean=False,
    nx_checks_aliases=False,
    preallocated_vmalloc=True,
    syncs_mappings=True,
    noprof_symbols=False,
    huge_vmalloc=True,
    max_vmap_nodes=0,
    module_areas=("core",),
    smp=replace(_SMP_6_12, waits_for_refused=True),
    tlb=_TLB_6,
    oops_shows_uid=False,
)

V5_4 = Profile(
    name="5.4",
    version=(5, 4),
    release="5.4.302",
    build="#1",
    readonly_is_clean=False,
    nx_checks_aliases=False,
    preallocated_vmalloc=False,
    syncs_mappings=False,
    noprof_symbols=False,
    huge_vmalloc=False,
    max_vmap_nodes=0,
    module_areas=("core",),
    smp=_SMP_5_4,
    tlb=_TLB_5_4,
    oops_shows_uid=False,
)

PROFILES = {profile.name: profile for profile in (V6_12, V6_1, V5_4)}
DEFAULT_PROFILE = V6_12


def find_profile(name: str) -> Profile:
    """The profile called `name` ("6.12", "6.1", "5.4"). Raises ValueError that lists the known ones."""
    if name not in PROFILES:
        raise ValueError(f"kernel version is {name!r}; known are {', '.join(PROFILES)}")
    return PROFILES[name]
