/*
 * get_vm_area reserves addresses and maps nothing; free_vm_area gives them back.
 * expect: fault #PF error=0x0002 address=[p]
 * expect: oops
 */
#include <linux/module.h>
#include <linux/vmalloc.h>

u8 *p;

int init_module(void)
{
	struct vm_struct *area = get_vm_area(3 * PAGE_SIZE, VM_ALLOC);
	struct vm_struct *other = get_vm_area(PAGE_SIZE, VM_ALLOC);

	if (!area || !other || area->size != 4 * PAGE_SIZE || find_vm_area(area->addr) != area)
		return 1;
	free_vm_area(other);
	p = area->addr;
	WRITE_ONCE(*p, 1);
	return 0;
}

MODULE_LICENSE("GPL");
