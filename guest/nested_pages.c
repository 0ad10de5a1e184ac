/*
 * The page array of an area of more than 512 pages is vmalloc memory itself, and its elements are the pages in order.
 * expect: return 0
 * expect: no-fault
 */
#include <linux/module.h>
#include <linux/vmalloc.h>

#define PAGES 1500

int init_module(void)
{
	u8 *p = vmalloc(PAGES * PAGE_SIZE);
	struct vm_struct *area = find_vm_area(p);

	if (!area || area->nr_pages != PAGES || !is_vmalloc_addr(area->pages))
		return 1;
	for (int i = 0; i < PAGES; i++)
		if (area->pages[i] != vmalloc_to_page(p + i * PAGE_SIZE))
			return 2;
	return find_vm_area(area->pages)->nr_pages == 3 ? 0 : 3;
}

MODULE_LICENSE("GPL");
