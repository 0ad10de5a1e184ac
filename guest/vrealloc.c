/*
 * vrealloc shrinks in place and grows back in place, moves when the pages do not suffice, and keeps what was there.
 * The pages of a shrunken area stay: 6.12.
 * expect: return 0
 * expect: no-fault
 */
#include <linux/module.h>
#include <linux/string.h>
#include <linux/vmalloc.h>

int init_module(void)
{
	u8 *p = vmalloc(10 * PAGE_SIZE), *q;

	if (!p)
		return -ENOMEM;
	memset(p, 0x5a, 10 * PAGE_SIZE);
	if (vrealloc(p, 2 * PAGE_SIZE, GFP_KERNEL) != p || vrealloc(p, 5 * PAGE_SIZE, GFP_KERNEL) != p)
		return 1;
	q = vrealloc(p, 20 * PAGE_SIZE, GFP_KERNEL);
	if (!q || q == p)
		return 2;
	for (unsigned long i = 0; i < 2 * PAGE_SIZE; i++)
		if (q[i] != 0x5a)
			return 3;
	if (vrealloc(q, 0, GFP_KERNEL) || find_vm_area(q))
		return 4;
	return 0;
}

MODULE_LICENSE("GPL");
