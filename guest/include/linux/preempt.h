/* SPDX-License-Identifier: GPL-2.0-or-later */
#ifndef _LINUX_PREEMPT_H
#define _LINUX_PREEMPT_H

#include <linux/compiler.h>
#include <linux/types.h>

/* struct pcpu_hot of 6.12: current at 0, preempt_count at 8, the CPU's number at 12. */
#define __hot_read(offset, width, constraint) ({ \
	width __v; \
	__asm__ __volatile__("mov %%gs:pcpu_hot+" #offset ", %0" : constraint (__v) : : "memory"); \
	__v; \
})

#define preempt_count() ((int)(__hot_read(8, u32, "=r") & 0x7fffffff))
#define PREEMPT_MASK 0xff
#define SOFTIRQ_MASK 0xff00
#define HARDIRQ_MASK 0xf0000
#define NMI_MASK 0xf00000
#define SOFTIRQ_OFFSET 0x100
#define SOFTIRQ_DISABLE_OFFSET 0x200

#define in_nmi() (!!(preempt_count() & NMI_MASK))
#define in_hardirq() (!!(preempt_count() & HARDIRQ_MASK))
#define in_irq() in_hardirq()
#define in_serving_softirq() (!!(preempt_count() & SOFTIRQ_OFFSET))
#define in_interrupt() (!!(preempt_count() & (NMI_MASK | HARDIRQ_MASK | SOFTIRQ_MASK)))
#define in_task() (!(preempt_count() & (NMI_MASK | HARDIRQ_MASK | SOFTIRQ_OFFSET)))
#define in_atomic() (preempt_count() != 0)

static __always_inline void preempt_disable(void)
{
	__asm__ __volatile__("incl %%gs:pcpu_hot+8" ::: "memory", "cc");
}

static __always_inline void preempt_enable(void)
{
	__asm__ __volatile__("decl %%gs:pcpu_hot+8" ::: "memory", "cc");
}

#define preempt_enable_no_resched() preempt_enable()

#endif
