/* SPDX-License-Identifier: GPL-2.0-or-later */
#ifndef _LINUX_VMALLOC_H
#define _LINUX_VMALLOC_H

#include <linux/gfp.h>
#include <linux/mm.h>
#include <linux/pgtable.h>
#include <linux/types.h>

#define VM_IOREMAP 0x00000001
#define VM_ALLOC 0x00000002
#define VM_MAP 0x00000004
#define VM_USERMAP 0x00000008
#define VM_DMA_COHERENT 0x00000010
#define VM_UNINITIALIZED 0x00000020
#define VM_NO_GUARD 0x00000040
#define VM_FLUSH_RESET_PERMS 0x00000100
#define VM_MAP_PUT_PAGES 0x00000200
#define VM_ALLOW_HUGE_VMAP 0x00000400

/* What the kernel keeps of an area; 6.12. find_vm_area() and its kin hand out a copy as of the call. */
struct vm_struct {
	struct vm_struct *next;
	void *addr;
	unsigned long size;		/* with the guard page */
	unsigned long flags;
	struct page **pages;
	unsigned int page_order;
	unsigned int nr_pages;
	phys_addr_t phys_addr;
	const void *caller;
	unsigned long requested_size;
};

/*
 * Every allocation is NULL on failure, with a message and a stack unless __GFP_NOWARN. Size 0 is NULL with a WARN, once; more
 * than all memory is NULL. The array forms are NULL without a word when n * size overflows.
 */
void *vmalloc(unsigned long size);
void *vzalloc(unsigned long size);
void *vmalloc_node(unsigned long size, int node);
void *vzalloc_node(unsigned long size, int node);
void *vmalloc_user(unsigned long size);
void *vmalloc_32(unsigned long size);
void *vmalloc_32_user(unsigned long size);
void *vmalloc_array(size_t n, size_t size);
void *vcalloc(size_t n, size_t size);
void *__vmalloc_array(size_t n, size_t size, gfp_t gfp);
void *__vcalloc(size_t n, size_t size, gfp_t gfp);
void *vmalloc_huge(unsigned long size, gfp_t gfp);
struct notifier_block;
int register_vmap_purge_notifier(struct notifier_block *nb);
int unregister_vmap_purge_notifier(struct notifier_block *nb);
void *__vmalloc(unsigned long size, gfp_t gfp);
void *__vmalloc_node(unsigned long size, unsigned long align, gfp_t gfp, int node, const void *caller);

/* 0 frees and is NULL; NULL allocates; an unknown pointer is NULL with a WARN. The old memory stays when there is no new. */
void *vrealloc(const void *p, size_t size, gfp_t gfp);

/* NULL is nothing. Any page-aligned address of an area frees it whole; an unaligned or unknown one is a WARN and frees nothing. */
void vfree(const void *addr);
void vfree_atomic(const void *addr);

/* NULL: count is 0 or beyond all memory, no address space, a bad page (WARN). Never executable. */
void *vmap(struct page **pages, unsigned int count, unsigned long flags, pgprot_t prot);
void vunmap(const void *addr);
/* Frames without a struct page only: any other is NULL with a WARN, once. */
void *vmap_pfn(unsigned long *pfns, unsigned int count, pgprot_t prot);

/* NULL on failure, with a WARN for count 0. The same count must be given back; BUG for NULL, outside and unaligned addresses. */
void *vm_map_ram(struct page **pages, unsigned int count, int node);
void vm_unmap_ram(const void *mem, unsigned int count);
void vm_unmap_aliases(void);

/* Address space without pages, and its descriptor; NULL on failure. free_vm_area: BUG if the descriptor is not the area's. */
struct vm_struct *get_vm_area(unsigned long size, unsigned long flags);
struct vm_struct *find_vm_area(const void *addr);
struct vm_struct *remove_vm_area(const void *addr);
void free_vm_area(struct vm_struct *area);

static inline size_t get_vm_area_size(const struct vm_struct *area)
{
	return area->flags & VM_NO_GUARD ? area->size : area->size - PAGE_SIZE;
}

/* About the frames, not about the leaves that are in use. */
bool is_vm_area_hugepages(const void *addr);
/* vfree() is to give the memory back writable and not executable, wherever it is mapped. */
void set_vm_flush_reset_perms(void *addr);
bool is_vmalloc_or_module_addr(const void *x);
unsigned long vmalloc_nr_pages(void);

/*
 * Give memory of vmalloc_user() to user space: the whole mapping, or `size` bytes of it. -EINVAL: unaligned, no area, memory of
 * another kind, beyond its end; else what vm_insert_page() says.
 */
int remap_vmalloc_range(struct vm_area_struct *vma, void *addr, unsigned long pgoff);
int remap_vmalloc_range_partial(struct vm_area_struct *vma, unsigned long uaddr, void *kaddr, unsigned long pgoff,
				unsigned long size);

/* NULL where nothing is mapped; the number is then meaningless. */
struct page *vmalloc_to_page(const void *addr);
unsigned long vmalloc_to_pfn(const void *addr);

#endif
