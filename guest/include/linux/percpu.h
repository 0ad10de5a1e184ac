/* SPDX-License-Identifier: GPL-2.0-or-later */
#ifndef _LINUX_PERCPU_H
#define _LINUX_PERCPU_H

#include <linux/gfp.h>
#include <linux/types.h>

/* Zeroed, one copy a CPU; at most 32 KiB and page alignment, else NULL with a WARN. The copy of this CPU is at GS:pointer. */
void *__alloc_percpu(size_t size, size_t align);
void *__alloc_percpu_gfp(size_t size, size_t align, gfp_t gfp);
void free_percpu(void *p);

#define alloc_percpu(type) ((type *)__alloc_percpu(sizeof(type), __alignof__(type)))

#endif
