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
	u64 *shared = vmalloc_user(2 * PAGE_SIZE), *plain = vmalloc(PAGE_SIZE);

	shared[PAGE_SIZE / 8] = 0x1234;
	if (vmemu_remap_vmalloc_range(mm, USER, plain, 0, PAGE_SIZE) != -EINVAL)
		return 1;
	if (vmemu_remap_vmalloc_range(mm, USER, shared, 1, 2 * PAGE_SIZE) != -EINVAL)
		return 2;
	if (vmemu_remap_vmalloc_range(mm, USER, shared, 0, 2 * PAGE_SIZE))
		return 3;
	return read_user(mm, USER + PAGE_SIZE) == 0x1234 ? 0 : 4;
}

MODULE_LICENSE("GPL");
