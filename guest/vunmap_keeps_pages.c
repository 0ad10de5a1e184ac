/*
 * vunmap removes the mapping only: the page and what is in it stay.
 * expect: return 0x66
 * expect: no-fault
 */
#include <linux/module.h>
#include <linux/vmalloc.h>

int init_module(void)
{
	struct page *page = alloc_page(GFP_KERNEL);
	u8 *p = vmap(&page, 1, VM_MAP, PAGE_KERNEL);
	int value;

	p[9] = 0x66;
	vunmap(p);
	value = ((u8 *)page_address(page))[9];
	__free_page(page);
	return value;
}

MODULE_LICENSE("GPL");
