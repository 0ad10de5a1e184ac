/*
 * Small mappings of vm_map_ram stand side by side in a block of 1 MiB without guard pages, in the order of the calls.
 * expect: return 0
 * expect: no-fault
 */
#include <linux/module.h>
#include <linux/vmalloc.h>

int init_module(void)
{
	struct page *pages[4];
	u64 *a, *b;

	for (int i = 0; i < 4; i++)
		pages[i] = alloc_page(GFP_KERNEL | __GFP_ZERO);
	a = vm_map_ram(pages, 4, NUMA_NO_NODE);
	b = vm_map_ram(pages, 1, NUMA_NO_NODE);
	if (!a || !b || (unsigned long)a % (1UL << 20))
		return 1;
	if ((void *)b != (void *)a + 4 * PAGE_SIZE)
		return 2;
	a[0] = 0x77;
	if (b[0] != 0x77)
		return 3;
	vm_unmap_ram(a, 4);
	vm_unmap_ram(b, 1);
	return 0;
}

MODULE_LICENSE("GPL");
