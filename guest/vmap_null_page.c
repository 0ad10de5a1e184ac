/*
 * A page array with a NULL in it cannot be mapped: vmap warns and gives everything back.
 * expect: return 0
 * expect: no-fault
 * expect: log "at mm/vmalloc.c:556 vmap_small_pages_range_noflush+0x"
 */
#include <linux/module.h>
#include <linux/vmalloc.h>

int init_module(void)
{
	struct page *pages[3] = { alloc_page(GFP_KERNEL), NULL, alloc_page(GFP_KERNEL) };
	void *before = vmap(pages, 1, VM_MAP, PAGE_KERNEL);
	void *mapped = vmap(pages, 3, VM_MAP, PAGE_KERNEL);

	if (mapped || !before || page_count(pages[0]) != 1)
		return 1;
	vunmap(before);
	return 0;
}

MODULE_LICENSE("GPL");
