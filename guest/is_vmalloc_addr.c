/*
 * The vmalloc region is [VMALLOC_START, VMALLOC_END), without its last byte; modules are beside it.
 * expect: return 0
 * expect: no-fault
 */
#include <linux/module.h>
#include <linux/vmalloc.h>

#define VMALLOC_START 0xffffc90000000000
#define VMALLOC_END 0xffffe8ffffffffff

int init_module(void)
{
	if (!is_vmalloc_addr((void *)VMALLOC_START) || is_vmalloc_addr((void *)(VMALLOC_START - 1)))
		return 1;
	if (is_vmalloc_addr((void *)VMALLOC_END) || !is_vmalloc_addr((void *)(VMALLOC_END - 1)))
		return 2;
	return is_vmalloc_addr(init_module) || !is_vmalloc_or_module_addr(init_module) ? 3 : 0;
}

MODULE_LICENSE("GPL");
