/*
 * One frame mapped twice by vmap is the same memory at two addresses, and its own page in the direct map is a third.
 * expect: return 3
 * expect: no-fault
 */
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/vmalloc.h>

static int __init alias_init(void)
{
	struct page *page = alloc_page(GFP_KERNEL | __GFP_ZERO);
	struct page *twice[2] = { page, page };
	volatile u64 *both, *direct;
	int aliases = 0;

	if (!page)
		return -ENOMEM;
	both = vmap(twice, 2, VM_MAP, PAGE_KERNEL);
	direct = page_address(page);
	if (!both)
		return -ENOMEM;
	both[0] = 0x1122334455667788;
	aliases += both[PAGE_SIZE / 8] == 0x1122334455667788;
	aliases += *direct == 0x1122334455667788;
	aliases += vmalloc_to_page((void *)both) == page && vmalloc_to_page((void *)both + PAGE_SIZE) == page;
	vunmap((void *)both);
	__free_page(page);
	return aliases;
}

module_init(alias_init);
MODULE_LICENSE("GPL");
