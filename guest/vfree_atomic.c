/*
 * vfree_atomic frees later, from a worker that runs once the caller has let go of the CPU.
 * expect: return 0
 * expect: no-fault
 */
#include <linux/module.h>
#include <linux/vmalloc.h>

int init_module(void)
{
	void *a = vmalloc(PAGE_SIZE), *b = vmalloc(PAGE_SIZE);

	vfree_atomic(a);
	vfree_atomic(b);
	return find_vm_area(a) || find_vm_area(b) ? 1 : 0;
}

MODULE_LICENSE("GPL");
