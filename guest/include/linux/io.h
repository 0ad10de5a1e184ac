/* SPDX-License-Identifier: GPL-2.0-or-later */
#ifndef _LINUX_IO_H
#define _LINUX_IO_H

#include <linux/compiler.h>
#include <linux/types.h>

/*
 * NULL: size 0, a range that wraps, RAM in use (WARN, once), an address beyond what the CPU has (WARN, once), a memory type that
 * does not agree with a mapping that is there. No device answers in this machine: to touch the mapping is a bus error.
 */
void __iomem *ioremap(phys_addr_t phys, unsigned long size);
void __iomem *ioremap_uc(phys_addr_t phys, unsigned long size);
void __iomem *ioremap_wc(phys_addr_t phys, unsigned long size);
void __iomem *ioremap_wt(phys_addr_t phys, unsigned long size);
void __iomem *ioremap_cache(phys_addr_t phys, unsigned long size);
/* The memory type that a page with this protection has; the rest of it does not count. */
void __iomem *ioremap_prot(phys_addr_t phys, unsigned long size, unsigned long prot);
void iounmap(volatile void __iomem *addr);

enum { MEMREMAP_WB = 1 << 0, MEMREMAP_WT = 1 << 1, MEMREMAP_WC = 1 << 2 };

/* RAM is found in the direct map with MEMREMAP_WB; other types of RAM, and ranges that are RAM in part, are NULL with a WARN. */
void *memremap(phys_addr_t phys, size_t size, unsigned long flags);
void memunmap(void *addr);

#endif
