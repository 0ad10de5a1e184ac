/* SPDX-License-Identifier: GPL-2.0-or-later */
#ifndef _LINUX_IO_H
#define _LINUX_IO_H

#include <linux/compiler.h>
#include <linux/types.h>

void __iomem *ioremap(phys_addr_t phys_addr, unsigned long size);
void iounmap(volatile void __iomem *addr);

#define __raw_readl(addr) (*(const volatile u32 *)(addr))
#define __raw_writel(value, addr) (*(volatile u32 *)(addr) = (value))
#define readl(addr) __raw_readl(addr)
#define writel(value, addr) __raw_writel(value, addr)

#endif
