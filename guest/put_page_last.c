/*
 * A page that vmalloc memory holds and a module has taken a reference to outlives vfree.
 * expect: return 0x99
 * expect: no-fault
 */
#include <linux/module.h>
#include <linux/vmalloc.h>

int init_module(void)
{
	u8 *p = vmalloc(PAGE_SIZE), value;
	struct page *page = vmalloc_to_page(p);

	p[0] = 0x99;
	get_page(page);
	vfree(p);
	if (page_count(page) != 1)
		return 1;
	value = *(u8 *)page_address(page);
	put_page(page);
	return value;
}

MODULE_LICENSE("GPL");
