/* SPDX-License-Identifier: GPL-2.0-or-later */
#ifndef _LINUX_SPINLOCK_H
#define _LINUX_SPINLOCK_H

#include <linux/atomic.h>
#include <linux/irqflags.h>
#include <linux/preempt.h>
#include <linux/types.h>

/* A queued spinlock: byte 0 locked, byte 1 pending, bits 16-31 the tail of its queue. */
typedef struct { u32 val; } raw_spinlock_t;
typedef struct { u32 val; } spinlock_t;
typedef struct { u32 cnts, wait_lock; } rwlock_t;

#define __RAW_SPIN_LOCK_UNLOCKED(name) { 0 }
#define __SPIN_LOCK_UNLOCKED(name) { 0 }
#define DEFINE_SPINLOCK(name) spinlock_t name = { 0 }
#define DEFINE_RAW_SPINLOCK(name) raw_spinlock_t name = { 0 }
#define DEFINE_RWLOCK(name) rwlock_t name = { 0, 0 }
#define spin_lock_init(lock) do { (lock)->val = 0; } while (0)
#define raw_spin_lock_init(lock) spin_lock_init(lock)
#define rwlock_init(lock) do { (lock)->cnts = 0; (lock)->wait_lock = 0; } while (0)

void _raw_spin_lock(void *lock);
int _raw_spin_trylock(void *lock);
unsigned long _raw_spin_lock_irqsave(void *lock);
void _raw_spin_lock_irq(void *lock);
void _raw_spin_lock_bh(void *lock);
int _raw_spin_trylock_bh(void *lock);
void _raw_spin_unlock(void *lock);
void _raw_spin_unlock_irqrestore(void *lock, unsigned long flags);
void _raw_spin_unlock_irq(void *lock);
void _raw_spin_unlock_bh(void *lock);

#define spin_lock(lock) _raw_spin_lock(lock)
#define spin_trylock(lock) _raw_spin_trylock(lock)
#define spin_lock_irqsave(lock, flags) do { (flags) = _raw_spin_lock_irqsave(lock); } while (0)
#define spin_lock_irq(lock) _raw_spin_lock_irq(lock)
#define spin_lock_bh(lock) _raw_spin_lock_bh(lock)
#define spin_trylock_bh(lock) _raw_spin_trylock_bh(lock)
#define spin_unlock(lock) _raw_spin_unlock(lock)
#define spin_unlock_irqrestore(lock, flags) _raw_spin_unlock_irqrestore(lock, flags)
#define spin_unlock_irq(lock) _raw_spin_unlock_irq(lock)
#define spin_unlock_bh(lock) _raw_spin_unlock_bh(lock)
#define spin_is_locked(lock) (READ_ONCE((lock)->val) != 0)
#define raw_spin_lock(lock) spin_lock(lock)
#define raw_spin_unlock(lock) spin_unlock(lock)
#define raw_spin_lock_irqsave(lock, flags) spin_lock_irqsave(lock, flags)
#define raw_spin_unlock_irqrestore(lock, flags) spin_unlock_irqrestore(lock, flags)

void _raw_read_lock(rwlock_t *lock);
int _raw_read_trylock(rwlock_t *lock);
void _raw_read_unlock(rwlock_t *lock);
void _raw_write_lock(rwlock_t *lock);
int _raw_write_trylock(rwlock_t *lock);
void _raw_write_unlock(rwlock_t *lock);

#define read_lock(lock) _raw_read_lock(lock)
#define read_trylock(lock) _raw_read_trylock(lock)
#define read_unlock(lock) _raw_read_unlock(lock)
#define write_lock(lock) _raw_write_lock(lock)
#define write_trylock(lock) _raw_write_trylock(lock)
#define write_unlock(lock) _raw_write_unlock(lock)

#endif
