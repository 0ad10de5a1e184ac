/*
 * vzalloc memory is zero though its frames were used before.
 * expect: return 0
 * expect: no-fault
 */
#include <linux/module.h>
#include <linux/string.h>
#include <linux/vmalloc.h>

int init_module(void)
{
	u64 *p = vmalloc(64 * PAGE_SIZE);
	unsigned long pfn = vmalloc_to_pfn(p);

	memset(p, 0xff, 64 * PAGE_SIZE);
	vfree(p);
	p = vzalloc(64 * PAGE_SIZE);
	for (unsigned long i = 0; i < 64 * PAGE_SIZE / 8; i++)
		if (p[i])
			return 1;
	for (int i = 0; i < 64; i++)
		if (vmalloc_to_pfn((u8 *)p + i * PAGE_SIZE) == pfn)
			return 0;
	return 2;
}

MODULE_LICENSE("GPL");
