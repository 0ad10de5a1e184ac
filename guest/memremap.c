/*
 * memremap of RAM is the direct map for write-back, and NULL with a warning for another type.
 * expect: return 0
 * expect: no-fault
 * expect: log "memremap attempted on ram"
 */
#include <linux/io.h>
#include <linux/mm.h>
#include <linux/module.h>

int init_module(void)
{
	struct page *page = alloc_page(GFP_KERNEL);
	phys_addr_t phys = page_to_pfn(page) << PAGE_SHIFT;

	if (memremap(phys, PAGE_SIZE, MEMREMAP_WB) != page_address(page))
		return 1;
	return memremap(phys, PAGE_SIZE, MEMREMAP_WC) ? 2 : 0;
}

MODULE_LICENSE("GPL");
