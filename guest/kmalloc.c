/*
 * kmalloc memory lies in the direct map and vmalloc memory does not; both hold what is written to them.
 * expect: return 0
 * expect: no-fault
 */
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/slab.h>
#include <linux/string.h>
#include <linux/vmalloc.h>

static int __init kmalloc_init(void)
{
	u8 *small = kmalloc(96, GFP_KERNEL);
	u8 *large = vmalloc(3 * PAGE_SIZE);
	int problems = 0;

	if (!small || !large)
		return -ENOMEM;
	if (is_vmalloc_addr(small) || !is_vmalloc_addr(large))
		problems |= 1;
	memset(small, 0x11, 96);
	memset(large, 0x22, 3 * PAGE_SIZE);
	memcpy(large + PAGE_SIZE - 48, small, 96);
	for (int i = 0; i < 96; i++)
		if (large[PAGE_SIZE - 48 + i] != 0x11)
			problems |= 2;
	if (large[PAGE_SIZE - 49] != 0x22 || large[PAGE_SIZE + 48] != 0x22)
		problems |= 4;
	kfree(small);
	vfree(large);
	return problems;
}

module_init(kmalloc_init);
MODULE_LICENSE("GPL");
