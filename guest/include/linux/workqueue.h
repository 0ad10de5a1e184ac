/* SPDX-License-Identifier: GPL-2.0-or-later */
#ifndef _LINUX_WORKQUEUE_H
#define _LINUX_WORKQUEUE_H

#include <linux/cpumask.h>
#include <linux/list.h>
#include <linux/timer.h>

struct workqueue_struct;
struct work_struct;
typedef void (*work_func_t)(struct work_struct *work);

struct work_struct {
	unsigned long data;
	struct list_head entry;
	work_func_t func;
};

struct delayed_work {
	struct work_struct work;
	struct timer_list timer;
	struct workqueue_struct *wq;
	int cpu;
};

#define WQ_UNBOUND (1 << 1)
#define WQ_FREEZABLE (1 << 2)
#define WQ_MEM_RECLAIM (1 << 3)
#define WQ_HIGHPRI (1 << 4)
#define __WQ_ORDERED (1 << 17)
#define WORK_CPU_UNBOUND NR_CPUS
/* Of 6.12. */
#define WORK_STRUCT_NO_POOL 0xfffffffe00000UL

#define __WORK_INITIALIZER(n, f) { WORK_STRUCT_NO_POOL, LIST_HEAD_INIT((n).entry), (f) }
#define DECLARE_WORK(n, f) struct work_struct n = __WORK_INITIALIZER(n, f)
#define INIT_WORK(work, f) do { \
	(work)->data = WORK_STRUCT_NO_POOL; \
	INIT_LIST_HEAD(&(work)->entry); \
	(work)->func = (f); \
} while (0)
#define INIT_DELAYED_WORK(dwork, f) do { \
	INIT_WORK(&(dwork)->work, (f)); \
	timer_setup(&(dwork)->timer, delayed_work_timer_fn, TIMER_IRQSAFE); \
} while (0)
#define to_delayed_work(w) container_of(w, struct delayed_work, work)
#define work_pending(work) (READ_ONCE((work)->data) & 1)

extern struct workqueue_struct *system_wq, *system_highpri_wq, *system_long_wq, *system_unbound_wq;

struct workqueue_struct *alloc_workqueue(const char *fmt, unsigned int flags, int max_active, ...) __printf(1, 4);
void destroy_workqueue(struct workqueue_struct *wq);
void __flush_workqueue(struct workqueue_struct *wq);
void drain_workqueue(struct workqueue_struct *wq);
bool queue_work_on(int cpu, struct workqueue_struct *wq, struct work_struct *work);
bool flush_work(struct work_struct *work);
bool cancel_work(struct work_struct *work);
bool cancel_work_sync(struct work_struct *work);
bool queue_delayed_work_on(int cpu, struct workqueue_struct *wq, struct delayed_work *dwork, unsigned long delay);
bool mod_delayed_work_on(int cpu, struct workqueue_struct *wq, struct delayed_work *dwork, unsigned long delay);
bool flush_delayed_work(struct delayed_work *dwork);
bool cancel_delayed_work(struct delayed_work *dwork);
bool cancel_delayed_work_sync(struct delayed_work *dwork);
void delayed_work_timer_fn(struct timer_list *timer);

#define alloc_ordered_workqueue(fmt, flags, ...) alloc_workqueue(fmt, WQ_UNBOUND | __WQ_ORDERED | (flags), 1, ##__VA_ARGS__)
#define flush_workqueue(wq) __flush_workqueue(wq)
#define queue_work(wq, work) queue_work_on(WORK_CPU_UNBOUND, (wq), (work))
#define schedule_work(work) queue_work(system_wq, (work))
#define schedule_work_on(cpu, work) queue_work_on((cpu), system_wq, (work))
#define queue_delayed_work(wq, dwork, delay) queue_delayed_work_on(WORK_CPU_UNBOUND, (wq), (dwork), (delay))
#define schedule_delayed_work(dwork, delay) queue_delayed_work(system_wq, (dwork), (delay))
#define mod_delayed_work(wq, dwork, delay) mod_delayed_work_on(WORK_CPU_UNBOUND, (wq), (dwork), (delay))

#endif
