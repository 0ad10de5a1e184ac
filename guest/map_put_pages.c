/*
 * With VM_MAP_PUT_PAGES the pages belong to the mapping: vfree frees them and the array.
 * expect: return 0
 * expect: no-fault
 */
#include <linux/module.h>
#include <linux/slab.h>
#include <linux/vmalloc.h>

int init_module(void)
{
	struct page **pages = kmalloc(2 * sizeof(*pages), GFP_KERNEL), *first;
	void *p;

	first = pages[0] = alloc_page(GFP_KERNEL);
	pages[1] = alloc_page(GFP_KERNEL);
	p = vmap(pages, 2, VM_MAP | VM_MAP_PUT_PAGES, PAGE_KERNEL);
	if (!p || find_vm_area(p)->nr_pages != 2 || page_count(first) != 1)
		return 1;
	vfree(p);
	return page_count(first) ? 2 : 0;
}

MODULE_LICENSE("GPL");
