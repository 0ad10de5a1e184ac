/* SPDX-License-Identifier: GPL-2.0-or-later */
#ifndef _LINUX_IRQFLAGS_H
#define _LINUX_IRQFLAGS_H

#include <linux/compiler.h>
#include <linux/types.h>

#define X86_EFLAGS_IF 0x200UL

static __always_inline unsigned long __local_flags(void)
{
	unsigned long flags;

	__asm__ __volatile__("pushfq\n\tpop %0" : "=rm" (flags) : : "memory");
	return flags;
}

#define local_irq_disable() __asm__ __volatile__("cli" ::: "memory")
#define local_irq_enable() __asm__ __volatile__("sti" ::: "memory")
#define local_save_flags(flags) do { (flags) = __local_flags(); } while (0)
#define local_irq_save(flags) do { (flags) = __local_flags(); local_irq_disable(); } while (0)
#define local_irq_restore(flags) do { if ((flags) & X86_EFLAGS_IF) local_irq_enable(); } while (0)
#define irqs_disabled() (!(__local_flags() & X86_EFLAGS_IF))

#endif
