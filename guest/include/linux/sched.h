/* SPDX-License-Identifier: GPL-2.0-or-later */
#ifndef _LINUX_SCHED_H
#define _LINUX_SCHED_H

#include <linux/atomic.h>
#include <linux/smp.h>
#include <linux/types.h>

#define TASK_RUNNING 0
#define TASK_INTERRUPTIBLE 1
#define TASK_UNINTERRUPTIBLE 2
#define TASK_NORMAL (TASK_INTERRUPTIBLE | TASK_UNINTERRUPTIBLE)
#define MAX_SCHEDULE_TIMEOUT 0x7fffffffffffffffL

/* Its first fields, as they are since 5.16; what follows is not there. */
struct task_struct {
	unsigned long flags_of_thread_info;
	unsigned long syscall_work;
	u32 status;
	u32 cpu;
	unsigned int __state;
	unsigned int saved_state;
	void *stack;
	int usage;
	unsigned int flags;
};

static __always_inline struct task_struct *get_current(void)
{
	struct task_struct *task;

	__asm__("mov %%gs:pcpu_hot, %0" : "=r" (task));
	return task;
}

#define current get_current()
#define __set_current_state(state) WRITE_ONCE(current->__state, (state))
#define set_current_state(state) smp_store_mb(current->__state, (state))
#define task_cpu(task) READ_ONCE((task)->cpu)

void schedule(void);
void yield(void);
int wake_up_process(struct task_struct *task);
int set_cpus_allowed_ptr(struct task_struct *task, const struct cpumask *mask);
long schedule_timeout(long timeout);
long schedule_timeout_interruptible(long timeout);
long schedule_timeout_uninterruptible(long timeout);
long schedule_timeout_idle(long timeout);
int __cond_resched(void);
void migrate_disable(void);
void migrate_enable(void);

#define cond_resched() __cond_resched()
#define might_sleep() do { __cond_resched(); } while (0)
#define cpu_relax() __asm__ __volatile__("pause" ::: "memory")

#endif
