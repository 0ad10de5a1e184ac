/*
 * The frames of vmalloc_32 lie below 4 GiB where RAM goes beyond; ordinary ones come from above.
 * vmemu: memory=6G
 * expect: return 0
 * expect: no-fault
 */
#include <linux/module.h>
#include <linux/vmalloc.h>

int init_module(void)
{
	u8 *low = vmalloc_32(64 * PAGE_SIZE), *any = vmalloc(PAGE_SIZE);

	for (int i = 0; i < 64; i++)
		if (vmalloc_to_pfn(low + i * PAGE_SIZE) >= 1UL << 20)
			return 1;
	return vmalloc_to_pfn(any) >= 1UL << 20 ? 0 : 2;
}

MODULE_LICENSE("GPL");
