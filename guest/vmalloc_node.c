/*
 * vmalloc_node takes the pages of the node it is told, the second half of memory here.
 * vmemu: memory=512M nodes=2
 * expect: return 0
 * expect: no-fault
 */
#include <linux/module.h>
#include <linux/vmalloc.h>

int init_module(void)
{
	u8 *p = vmalloc_node(16 * PAGE_SIZE, 1);

	for (int i = 0; i < 16; i++)
		if (vmalloc_to_pfn(p + i * PAGE_SIZE) < 1UL << 16)
			return 1;
	return 0;
}

MODULE_LICENSE("GPL");
