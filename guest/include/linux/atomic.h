/* SPDX-License-Identifier: GPL-2.0-or-later */
#ifndef _LINUX_ATOMIC_H
#define _LINUX_ATOMIC_H

#include <linux/compiler.h>
#include <linux/types.h>

typedef struct { int counter; } atomic_t;
typedef struct { s64 counter; } atomic64_t;
typedef atomic64_t atomic_long_t;

#define ATOMIC_INIT(i) { (i) }
#define ATOMIC64_INIT(i) { (i) }
#define ATOMIC_LONG_INIT(i) { (i) }

/* What may reorder on x86 is a store and a later load: smp_mb() is a locked instruction, the others bind the compiler only. */
#define mb() __asm__ __volatile__("mfence" ::: "memory")
#define rmb() __asm__ __volatile__("lfence" ::: "memory")
#define wmb() __asm__ __volatile__("sfence" ::: "memory")
#define smp_mb() __asm__ __volatile__("lock; addl $0, -4(%%rsp)" ::: "memory", "cc")
#define smp_rmb() barrier()
#define smp_wmb() barrier()
#define smp_mb__before_atomic() barrier()
#define smp_mb__after_atomic() barrier()
#define smp_store_mb(variable, value) do { (void)xchg(&(variable), (value)); } while (0)
#define smp_load_acquire(p) ({ __typeof__(*(p)) __v = READ_ONCE(*(p)); barrier(); __v; })
#define smp_store_release(p, value) do { barrier(); WRITE_ONCE(*(p), (value)); } while (0)

#define xchg(p, value) __atomic_exchange_n((p), (value), __ATOMIC_SEQ_CST)
#define cmpxchg(p, old, new) ({ \
	__typeof__(*(p)) __old = (old); \
	__atomic_compare_exchange_n((p), &__old, (new), 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST); \
	__old; \
})

#define __ATOMIC_OPERATIONS(type, name, word) \
static inline word name##_read(const type *v) { return READ_ONCE(v->counter); } \
static inline void name##_set(type *v, word i) { WRITE_ONCE(v->counter, i); } \
static inline void name##_add(word i, type *v) { __atomic_fetch_add(&v->counter, i, __ATOMIC_SEQ_CST); } \
static inline void name##_sub(word i, type *v) { __atomic_fetch_sub(&v->counter, i, __ATOMIC_SEQ_CST); } \
static inline void name##_inc(type *v) { name##_add(1, v); } \
static inline void name##_dec(type *v) { name##_sub(1, v); } \
static inline word name##_add_return(word i, type *v) { return __atomic_add_fetch(&v->counter, i, __ATOMIC_SEQ_CST); } \
static inline word name##_sub_return(word i, type *v) { return __atomic_sub_fetch(&v->counter, i, __ATOMIC_SEQ_CST); } \
static inline word name##_fetch_add(word i, type *v) { return __atomic_fetch_add(&v->counter, i, __ATOMIC_SEQ_CST); } \
static inline word name##_inc_return(type *v) { return name##_add_return(1, v); } \
static inline word name##_dec_return(type *v) { return name##_sub_return(1, v); } \
static inline bool name##_dec_and_test(type *v) { return name##_sub_return(1, v) == 0; } \
static inline bool name##_inc_and_test(type *v) { return name##_add_return(1, v) == 0; } \
static inline word name##_xchg(type *v, word i) { return xchg(&v->counter, i); } \
static inline word name##_cmpxchg(type *v, word old, word i) { return cmpxchg(&v->counter, old, i); }

__ATOMIC_OPERATIONS(atomic_t, atomic, int)
__ATOMIC_OPERATIONS(atomic64_t, atomic64, s64)
__ATOMIC_OPERATIONS(atomic_long_t, atomic_long, s64)

static inline void set_bit(long nr, volatile unsigned long *addr)
{
	__atomic_fetch_or(addr + (nr >> 6), 1UL << (nr & 63), __ATOMIC_SEQ_CST);
}

static inline void clear_bit(long nr, volatile unsigned long *addr)
{
	__atomic_fetch_and(addr + (nr >> 6), ~(1UL << (nr & 63)), __ATOMIC_SEQ_CST);
}

static inline bool test_and_set_bit(long nr, volatile unsigned long *addr)
{
	return __atomic_fetch_or(addr + (nr >> 6), 1UL << (nr & 63), __ATOMIC_SEQ_CST) >> (nr & 63) & 1;
}

static inline bool test_and_clear_bit(long nr, volatile unsigned long *addr)
{
	return __atomic_fetch_and(addr + (nr >> 6), ~(1UL << (nr & 63)), __ATOMIC_SEQ_CST) >> (nr & 63) & 1;
}

static inline bool test_bit(long nr, const volatile unsigned long *addr)
{
	return addr[nr >> 6] >> (nr & 63) & 1;
}

#endif
