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

#define VM_READ 0x00000001
#define VM_WRITE 0x00000002
#define VM_SHARED 0x00000008
#define VM_PFNMAP 0x00000400
#define VM_DONTEXPAND 0x00040000
#define VM_DONTDUMP 0x04000000
#define VM_MIXEDMAP 0x10000000

struct mm_struct;

/* A mapping of user space, as far as it is modelled; 6.1 and 6.12. */
struct vm_area_struct {
	unsigned long vm_start;
	unsigned long vm_end;
	struct mm_struct *vm_mm;
	pgprot_t vm_page_prot;
	unsigned long vm_flags;
	unsigned long __not_modelled[19];
};

/* 0, -EFAULT outside the mapping, -EINVAL for a page of the slab or of nobody, -EBUSY where a page is mapped, -ENOMEM. */
int vm_insert_page(struct vm_area_struct *vma, unsigned long addr, struct page *page);

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
void *kvmalloc_array_node(size_t n, size_t size, gfp_t gfp, int node);
void *kvcalloc_node(size_t n, size_t size, gfp_t gfp, int node);
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
