"""Page protections under Linux's names (v6.12 arch/x86/include/asm/pgtable_types.h).

Plain ints, as they are added to entries by the thousand. Values are for 4 KiB entries; large_prot converts them.
"""

from __future__ import annotations

from dataclasses import dataclass

from emu.kernel.profile import Profile
from emu.mmu.entry import ENTRY_BITS, PHYSICAL_MASK, Entry

PRESENT = int(Entry.P)
RW = int(Entry.RW)
USER = int(Entry.US)
PWT = int(Entry.PWT)
PCD = int(Entry.PCD)
ACCESSED = int(Entry.A)
DIRTY = int(Entry.D)
PSE = int(Entry.PS)
PAT = int(Entry.PAT)
GLOBAL = int(Entry.G)
PAT_LARGE = int(Entry.PAT_LARGE)
NX = int(Entry.XD)

KERNPG_TABLE = PRESENT | RW | ACCESSED | DIRTY
PAGE_TABLE = KERNPG_TABLE | USER
PGPROT_MASK = ENTRY_BITS & ~PHYSICAL_MASK
# What makes a table entry good: pmd_bad() and its kin compare all flags but these (_KERNPG_TABLE is what must remain).
TABLE_IGNORED = USER | ACCESSED


@dataclass(frozen=True, slots=True)
class Pgprots:
    """The kernel's protections in one machine. With page-table isolation they have no G (__default_kernel_pte_mask)."""

    kernel: int
    kernel_ro: int
    kernel_exec: int
    kernel_rox: int
    kernel_nocache: int
    kernel_wc: int
    kernel_vvar: int

    @property
    def kernel_large(self) -> int:
        """PAGE_KERNEL_LARGE: a 2 MiB or 1 GiB leaf of the direct map."""
        return self.kernel | PSE


def make_pgprots(profile: Profile, *, pti: bool = False) -> Pgprots:
    """PAGE_KERNEL and its variants for a kernel version."""
    kernel_exec = PRESENT | RW | ACCESSED | DIRTY | (0 if pti else GLOBAL)
    kernel = kernel_exec | NX
    clear = (RW | DIRTY) if profile.readonly_is_clean else RW
    return Pgprots(
        kernel=kernel,
        kernel_ro=kernel & ~clear,
        kernel_exec=kernel_exec,
        kernel_rox=kernel_exec & ~clear,
        kernel_nocache=kernel | PWT | PCD,
        kernel_wc=kernel | PWT,
        kernel_vvar=kernel & ~clear | USER,
    )


def large_prot(prot: int) -> int:
    """A 4 KiB protection for a 2 MiB or 1 GiB leaf: PAT moves from bit 7 to 12, PSE set (protval_4k_2_large)."""
    return prot & ~(PAT | PAT_LARGE) | (PAT_LARGE if prot & PAT else 0) | PSE


def small_prot(prot: int) -> int:
    """A large leaf's protection for a 4 KiB leaf (protval_large_2_4k)."""
    return prot & ~(PSE | PAT_LARGE) | (PAT if prot & PAT_LARGE else 0)
