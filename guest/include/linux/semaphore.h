/* SPDX-License-Identifier: GPL-2.0-or-later */
#ifndef _LINUX_SEMAPHORE_H
#define _LINUX_SEMAPHORE_H

#include <linux/list.h>
#include <linux/spinlock.h>

struct semaphore {
	raw_spinlock_t lock;
	unsigned int count;
	struct list_head wait_list;
};

#define DEFINE_SEMAPHORE(name, n) struct semaphore name = { { 0 }, (n), LIST_HEAD_INIT((name).wait_list) }

static inline void sema_init(struct semaphore *sem, int value)
{
	sem->lock.val = 0;
	sem->count = value;
	INIT_LIST_HEAD(&sem->wait_list);
}

void down(struct semaphore *sem);
int down_interruptible(struct semaphore *sem);
int down_killable(struct semaphore *sem);
int down_trylock(struct semaphore *sem);
int down_timeout(struct semaphore *sem, long timeout);
void up(struct semaphore *sem);

#endif
