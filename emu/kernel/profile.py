"""Kernel versions as data: whatever differs between the kernels that are modelled stands here, once.

A profile describes one built kernel. 6.12 and 6.1 are Debian's amd64 kernels; 5.4 stands for x86-64 before v5.8 (commit
7f0a002b5a21), when the vmalloc region's top-level entries were not populated at boot but copied by a fault.
"""

from __future__ import annotations

from dataclasses import dataclass


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
    preallocated_vmalloc: bool
    """The vmalloc region's top-level entries are populated at boot: from v5.8 on. Otherwise vmalloc_fault copies
    them.
    """

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


V6_12 = Profile(
    name="6.12",
    version=(6, 12),
    release="6.12.117+deb12-amd64",
    build="#1  Debian 6.12.117-1~deb12u1",
    readonly_is_clean=True,
    preallocated_vmalloc=True,
    noprof_symbols=True,
    huge_vmalloc=True,
    max_vmap_nodes=128,
    module_areas=("text", "data", "rodata", "ro_after_init"),
    oops_shows_uid=True,
)

V6_1 = Profile(
    name="6.1",
    version=(6, 1),
    release="6.1.0-56-amd64",
    build="#1  Debian 6.1.192-2",
    readonly_is_clean=False,
    preallocated_vmalloc=True,
    noprof_symbols=False,
    huge_vmalloc=True,
    max_vmap_nodes=0,
    module_areas=("core",),
    oops_shows_uid=False,
)

V5_4 = Profile(
    name="5.4",
    version=(5, 4),
    release="5.4.302",
    build="#1",
    readonly_is_clean=False,
    preallocated_vmalloc=False,
    noprof_symbols=False,
    huge_vmalloc=False,
    max_vmap_nodes=0,
    module_areas=("core",),
    oops_shows_uid=False,
)

PROFILES = {profile.name: profile for profile in (V6_12, V6_1, V5_4)}
DEFAULT_PROFILE = V6_12


def find_profile(name: str) -> Profile:
    """The profile called `name` ("6.12", "6.1", "5.4"). Raises ValueError that lists the known ones."""
    if name not in PROFILES:
        raise ValueError(f"kernel version is {name!r}; known are {', '.join(PROFILES)}")
    return PROFILES[name]
