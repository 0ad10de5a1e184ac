/*
 * A piece of a vmap block that was unmapped is not handed out again before the whole block is purged.
 * expect: return 0
 * expect: no-fault
 */
#include <linux/module.h>
#include <linux/vmalloc.h>

int init_module(void)
{
	struct page *page = alloc_page(GFP_KERNEL);
	void *first = vm_map_ram(&page, 1, NUMA_NO_NODE), *again;

	vm_unmap_ram(first, 1);
	again = vm_map_ram(&page, 1, NUMA_NO_NODE);
	return again == first + PAGE_SIZE ? 0 : 1;
}

MODULE_LICENSE("GPL");
