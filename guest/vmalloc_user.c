/*
 * vmalloc_user memory is zero and may be mapped to user space: VM_USERMAP.
 * expect: return 0
 * expect: no-fault
 */
#include <linux/module.h>
#include <linux/vmalloc.h>

int init_module(void)
{
	u64 *p = vmalloc_user(PAGE_SIZE);

	return p[0] == 0 && p[511] == 0 && find_vm_area(p)->flags & VM_USERMAP ? 0 : 1;
}

MODULE_LICENSE("GPL");
