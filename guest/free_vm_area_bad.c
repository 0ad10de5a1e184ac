/*
 * free_vm_area with a descriptor that is not the area's is a BUG.
 * expect: oops "kernel BUG at mm/vmalloc.c:4613!"
 */
#include <linux/module.h>
#include <linux/vmalloc.h>

int init_module(void)
{
	struct vm_struct copy = *get_vm_area(PAGE_SIZE, VM_ALLOC);

	free_vm_area(&copy);
	return 0;
}

MODULE_LICENSE("GPL");
