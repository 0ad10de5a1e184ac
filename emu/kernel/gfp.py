"""GFP flags: how a caller may get memory, and their text as printk's %pGg prints it.

Values of v6.12 include/linux/gfp_types.h; names and printing order of include/trace/events/mmflags.h. Members are
spelled without the leading underscores of the single-bit flags: Gfp.ZERO is __GFP_ZERO, GFP_KERNEL is GFP_KERNEL.
"""

from __future__ import annotations

from enum import IntFlag


class Gfp(IntFlag):
    """__GFP_* bits."""

    DMA = 0x01
    HIGHMEM = 0x02
    DMA32 = 0x04
    MOVABLE = 0x08
    RECLAIMABLE = 0x10
    HIGH = 0x20
    IO = 0x40
    FS = 0x80
    ZERO = 0x100
    DIRECT_RECLAIM = 0x400
    KSWAPD_RECLAIM = 0x800
    WRITE = 0x1000
    NOWARN = 0x2000
    RETRY_MAYFAIL = 0x4000
    NOFAIL = 0x8000
    NORETRY = 0x10000
    MEMALLOC = 0x20000
    COMP = 0x40000
    NOMEMALLOC = 0x80000
    HARDWALL = 0x100000
    THISNODE = 0x200000
    ACCOUNT = 0x400000
    ZEROTAGS = 0x800000


GFP_RECLAIM = Gfp.DIRECT_RECLAIM | Gfp.KSWAPD_RECLAIM
GFP_ATOMIC = Gfp.HIGH | Gfp.KSWAPD_RECLAIM
GFP_KERNEL = GFP_RECLAIM | Gfp.IO | Gfp.FS
GFP_KERNEL_ACCOUNT = GFP_KERNEL | Gfp.ACCOUNT
GFP_NOWAIT = Gfp.KSWAPD_RECLAIM | Gfp.NOWARN
GFP_NOIO = GFP_RECLAIM
GFP_NOFS = GFP_RECLAIM | Gfp.IO
GFP_USER = GFP_KERNEL | Gfp.HARDWALL
GFP_DMA = Gfp.DMA
GFP_DMA32 = Gfp.DMA32
GFP_HIGHUSER = GFP_USER | Gfp.HIGHMEM
GFP_HIGHUSER_MOVABLE = GFP_HIGHUSER | Gfp.MOVABLE
GFP_TRANSHUGE_LIGHT = (GFP_HIGHUSER_MOVABLE | Gfp.COMP | Gfp.NOMEMALLOC | Gfp.NOWARN) & ~GFP_RECLAIM
GFP_TRANSHUGE = GFP_TRANSHUGE_LIGHT | Gfp.DIRECT_RECLAIM

# v6.12 include/linux/gfp.h: what a caller may ask of the page tables of the kernel (asm-generic/pgalloc.h).
GFP_PGTABLE_KERNEL = GFP_KERNEL | Gfp.ZERO
GFP_PGTABLE_USER = GFP_PGTABLE_KERNEL | Gfp.ACCOUNT

# Masks with most bits come first, as each match takes its bits away.
_NAMES: tuple[tuple[int, str], ...] = (
    (int(GFP_TRANSHUGE), "GFP_TRANSHUGE"),
    (int(GFP_TRANSHUGE_LIGHT), "GFP_TRANSHUGE_LIGHT"),
    (int(GFP_HIGHUSER_MOVABLE), "GFP_HIGHUSER_MOVABLE"),
    (int(GFP_HIGHUSER), "GFP_HIGHUSER"),
    (int(GFP_USER), "GFP_USER"),
    (int(GFP_KERNEL_ACCOUNT), "GFP_KERNEL_ACCOUNT"),
    (int(GFP_KERNEL), "GFP_KERNEL"),
    (int(GFP_NOFS), "GFP_NOFS"),
    (int(GFP_ATOMIC), "GFP_ATOMIC"),
    (int(GFP_NOIO), "GFP_NOIO"),
    (int(GFP_NOWAIT), "GFP_NOWAIT"),
    (int(GFP_DMA), "GFP_DMA"),
    (int(Gfp.HIGHMEM), "__GFP_HIGHMEM"),
    (int(GFP_DMA32), "GFP_DMA32"),
    (int(Gfp.HIGH), "__GFP_HIGH"),
    (int(Gfp.IO), "__GFP_IO"),
    (int(Gfp.FS), "__GFP_FS"),
    (int(Gfp.NOWARN), "__GFP_NOWARN"),
    (int(Gfp.RETRY_MAYFAIL), "__GFP_RETRY_MAYFAIL"),
    (int(Gfp.NOFAIL), "__GFP_NOFAIL"),
    (int(Gfp.NORETRY), "__GFP_NORETRY"),
    (int(Gfp.COMP), "__GFP_COMP"),
    (int(Gfp.ZERO), "__GFP_ZERO"),
    (int(Gfp.NOMEMALLOC), "__GFP_NOMEMALLOC"),
    (int(Gfp.MEMALLOC), "__GFP_MEMALLOC"),
    (int(Gfp.HARDWALL), "__GFP_HARDWALL"),
    (int(Gfp.THISNODE), "__GFP_THISNODE"),
    (int(Gfp.RECLAIMABLE), "__GFP_RECLAIMABLE"),
    (int(Gfp.MOVABLE), "__GFP_MOVABLE"),
    (int(Gfp.ACCOUNT), "__GFP_ACCOUNT"),
    (int(Gfp.WRITE), "__GFP_WRITE"),
    (int(GFP_RECLAIM), "__GFP_RECLAIM"),
    (int(Gfp.DIRECT_RECLAIM), "__GFP_DIRECT_RECLAIM"),
    (int(Gfp.KSWAPD_RECLAIM), "__GFP_KSWAPD_RECLAIM"),
    (int(Gfp.ZEROTAGS), "__GFP_ZEROTAGS"),
)


def gfp_text(gfp: int) -> str:
    """The flags as %pGg prints them, e.g. "GFP_KERNEL|__GFP_ZERO"; bits without a name in hex; nothing at all for 0.

    Source: v6.12 lib/vsprintf.c format_flags.
    """
    parts = []
    for mask, name in _NAMES:
        if not gfp:
            break
        if gfp & mask == mask:
            parts.append(name)
            gfp &= ~mask
    if gfp:
        parts.append(f"{gfp:#x}")
    return "|".join(parts)


def gfpflags_allow_blocking(gfp: int) -> bool:
    """Whether the allocation may sleep (v6.12 include/linux/gfp.h)."""
    return bool(gfp & Gfp.DIRECT_RECLAIM)
