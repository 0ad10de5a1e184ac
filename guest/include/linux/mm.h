/* SPDX-License-Identifier: GPL-2.0-or-later */
#ifndef _LINUX_MM_H
#define _LINUX_MM_H

#include <linux/errno.h>
#include <linux/gfp.h>
#include <linux/pgtable.h>
#include <linux/types.h>

#define PAGE_SHIFT 12
#define PAGE_SIZE (1UL << PAGE_SHIFT)
#define PAGE_MASK (~(PAGE_SIZE - 1))
#define PMD_SHIFT 21
#define PMD_SIZE (1UL << PMD_SHIFT)
#define PUD_SHIFT 30
#define PUD_SIZE (1UL << PUD_SHIFT)
#define PAGE_ALIGN(x) (((x) + PAGE_SIZE - 1) & PAGE_MASK)
#define PAGE_ALIGNED(x) ((((unsigned long)(x)) & ~PAGE_MASK) == 0)
#define offset_in_page(p) ((unsigned long)(p) & ~PAGE_MASK)

void *page_address(const struct page *page);
unsigned long page_to_pfn(const struct page *page);
struct page *pfn_to_page(unsigned long pfn);
struct page *virt_to_page(const void *addr);
int page_count(const struct page *page);
void get_page(struct page *page);
void put_page(struct page *page);
bool is_vmalloc_addr(const void *x);

/*
 * kmalloc, and vmalloc where that fails for more than a page. NULL: no memory; gfp may not sleep; above INT_MAX, with a WARN
 * unless __GFP_NOWARN.
 */
void *kvmalloc(size_t size, gfp_t gfp);
void *kvzalloc(size_t size, gfp_t gfp);
void *kvmalloc_node(size_t size, gfp_t gfp, int node);
void *kvzalloc_node(size_t size, gfp_t gfp, int node);
void *kvmalloc_array(size_t n, size_t size, gfp_t gfp);
void *kvcalloc(size_t n, size_t size, gfp_t gfp);
/* As in 6.12; in 6.1 it takes the old size before the new one. */
void *kvrealloc(const void *p, size_t size, gfp_t gfp);
void kvfree(const void *addr);
void kvfree_sensitive(const void *addr, size_t len);
void *kvmemdup(const void *src, size_t len, gfp_t gfp);
/* An ERR_PTR on failure: -ENOMEM, -EFAULT. */
void *vmemdup_user(const void *src, size_t len);

void kvfree_call_rcu(void *head, void *p);
#define kvfree_rcu_mightsleep(p) kvfree_call_rcu(NULL, (void *)(p))

#endif
