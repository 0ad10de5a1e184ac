/*
 * kvrealloc moves from kmalloc to vmalloc memory when it must, keeps the contents, and never loses the old memory.
 * expect: return 0
 * expect: no-fault
 */
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/slab.h>
#include <linux/string.h>

int init_module(void)
{
	u8 *p = kvmalloc(8192, GFP_KERNEL), *q;

	memset(p, 0x33, 8192);
	q = kvrealloc(p, KMALLOC_MAX_SIZE + 1, GFP_KERNEL);
	if (!q || !is_vmalloc_addr(q) || q[0] != 0x33 || q[8191] != 0x33)
		return 1;
	if (kvrealloc(q, 1UL << 62, GFP_KERNEL | __GFP_NOWARN) || q[8191] != 0x33)
		return 2;
	kvfree(q);
	return 0;
}

MODULE_LICENSE("GPL");
