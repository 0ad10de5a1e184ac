/*
 * vmalloc_user memory mapped into user space is the same memory there; plain vmalloc memory is refused.
 * expect: return 0
 * expect: no-fault
 */
#include <linux/errno.h>
#include <linux/module.h>
#include <linux/vmalloc.h>
#include <linux/vmemu.h>

#define USER 0x400000UL

static u64 read_user(unsigned long mm, unsigned long addr)
{
	unsigned long old;
	u64 value;

	__asm__ __volatile__("mov %%cr3, %0; mov %2, %%cr3; stac; mov (%3), %1; clac; mov %0, %%cr3"
			     : "=&r" (old), "=&r" (value) : "r" (mm), "r" (addr) : "memory");
	return value;
}

int init_module(void)
{
	unsigned long mm = vmemu_new_mm();
	struct vm_area_struct *vma = vmemu_mmap(mm, USER, 2 * PAGE_SIZE);
	u64 *shared = vmalloc_user(2 * PAGE_SIZE), *plain = vmalloc(2 * PAGE_SIZE);
	struct page *page = vmalloc_to_page(shared);

	shared[PAGE_SIZE / 8] = 0x1234;
	if (vma->vm_start != USER || vma->vm_end != USER + 2 * PAGE_SIZE)
		return 1;
	if (remap_vmalloc_range(vma, plain, 0) != -EINVAL || remap_vmalloc_range(vma, shared, 1) != -EINVAL)
		return 2;
	if (vma->vm_flags & (VM_MIXEDMAP | VM_DONTEXPAND))
		return 3;
	if (remap_vmalloc_range(vma, shared, 0))
		return 4;
	if (!(vma->vm_flags & VM_MIXEDMAP) || !(vma->vm_flags & VM_DONTEXPAND) || !(vma->vm_flags & VM_DONTDUMP))
		return 5;
	if (remap_vmalloc_range_partial(vma, USER, shared, 0, PAGE_SIZE) != -EBUSY)
		return 6;
	if (remap_vmalloc_range_partial(vma, USER + 2 * PAGE_SIZE, shared, 0, PAGE_SIZE) != -EFAULT)
		return 7;
	if (read_user(mm, USER + PAGE_SIZE) != 0x1234 || page_count(page) != 2)
		return 8;
	return vmemu_munmap(vma) || page_count(page) != 1 ? 9 : 0;
}

MODULE_LICENSE("GPL");
