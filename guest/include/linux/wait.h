/* SPDX-License-Identifier: GPL-2.0-or-later */
#ifndef _LINUX_WAIT_H
#define _LINUX_WAIT_H

#include <linux/list.h>
#include <linux/sched.h>
#include <linux/spinlock.h>

#define WQ_FLAG_EXCLUSIVE 0x01
#define WQ_FLAG_WOKEN 0x02

struct wait_queue_entry;
typedef int (*wait_queue_func_t)(struct wait_queue_entry *entry, unsigned int mode, int flags, void *key);

struct wait_queue_entry {
	unsigned int flags;
	void *private;
	wait_queue_func_t func;
	struct list_head entry;
};

struct wait_queue_head {
	spinlock_t lock;
	struct list_head head;
};

typedef struct wait_queue_head wait_queue_head_t;
typedef struct wait_queue_entry wait_queue_entry_t;

#define DECLARE_WAIT_QUEUE_HEAD(name) struct wait_queue_head name = { { 0 }, LIST_HEAD_INIT((name).head) }

void __init_waitqueue_head(struct wait_queue_head *head, const char *name, void *key);
#define init_waitqueue_head(head) __init_waitqueue_head((head), #head, NULL)

int default_wake_function(struct wait_queue_entry *entry, unsigned int mode, int flags, void *key);
int autoremove_wake_function(struct wait_queue_entry *entry, unsigned int mode, int flags, void *key);
int woken_wake_function(struct wait_queue_entry *entry, unsigned int mode, int flags, void *key);
int __wake_up(struct wait_queue_head *head, unsigned int mode, int nr, void *key);
void init_wait_entry(struct wait_queue_entry *entry, int flags);
void add_wait_queue(struct wait_queue_head *head, struct wait_queue_entry *entry);
void add_wait_queue_exclusive(struct wait_queue_head *head, struct wait_queue_entry *entry);
void remove_wait_queue(struct wait_queue_head *head, struct wait_queue_entry *entry);
void prepare_to_wait(struct wait_queue_head *head, struct wait_queue_entry *entry, int state);
long prepare_to_wait_event(struct wait_queue_head *head, struct wait_queue_entry *entry, int state);
void finish_wait(struct wait_queue_head *head, struct wait_queue_entry *entry);
long wait_woken(struct wait_queue_entry *entry, unsigned int mode, long timeout);

#define wake_up(head) __wake_up(head, TASK_NORMAL, 1, NULL)
#define wake_up_nr(head, nr) __wake_up(head, TASK_NORMAL, nr, NULL)
#define wake_up_all(head) __wake_up(head, TASK_NORMAL, 0, NULL)
#define wake_up_interruptible(head) __wake_up(head, TASK_INTERRUPTIBLE, 1, NULL)
#define wake_up_interruptible_all(head) __wake_up(head, TASK_INTERRUPTIBLE, 0, NULL)

static inline bool waitqueue_active(struct wait_queue_head *head)
{
	return !list_empty(&head->head);
}

#define ___wait_event(head, condition, state, exclusive, sleep) do { \
	struct wait_queue_entry __entry; \
	init_wait_entry(&__entry, (exclusive) ? WQ_FLAG_EXCLUSIVE : 0); \
	for (;;) { \
		prepare_to_wait_event(&(head), &__entry, (state)); \
		if (condition) \
			break; \
		sleep; \
	} \
	finish_wait(&(head), &__entry); \
} while (0)

#define wait_event(head, condition) do { \
	if (!(condition)) \
		___wait_event(head, condition, TASK_UNINTERRUPTIBLE, 0, schedule()); \
} while (0)
#define wait_event_interruptible(head, condition) ({ \
	if (!(condition)) \
		___wait_event(head, condition, TASK_INTERRUPTIBLE, 0, schedule()); \
	0; \
})
/* 0 when the time is up and the condition does not hold; else the ticks left, at least 1. */
#define wait_event_timeout(head, condition, timeout) ({ \
	long __left = (timeout); \
	bool __holds = !!(condition); \
	if (!__holds) \
		___wait_event(head, (__holds = !!(condition)) || !__left, TASK_UNINTERRUPTIBLE, 0, \
			      __left = schedule_timeout(__left)); \
	__holds ? (__left ? __left : 1) : 0; \
})

#endif
