/* SPDX-License-Identifier: GPL-2.0-or-later */
#ifndef _LINUX_IRQ_WORK_H
#define _LINUX_IRQ_WORK_H

#include <linux/list.h>
#include <linux/types.h>

struct irq_work {
	struct llist_node llist;
	u32 a_flags;
	u16 src, dst;
	void (*func)(struct irq_work *work);
	void *irqwait;
};

#define DEFINE_IRQ_WORK(name, fn) struct irq_work name = { .func = (fn) }

static inline void init_irq_work(struct irq_work *work, void (*func)(struct irq_work *))
{
	*work = (struct irq_work){ .func = func };
}

bool irq_work_queue(struct irq_work *work);
bool irq_work_queue_on(struct irq_work *work, int cpu);
void irq_work_sync(struct irq_work *work);

#endif
