/*
 * A device range of 1 GiB on a boundary of 1 GiB is one leaf.
 * expect: return 3
 * expect: no-fault
 */
#include <linux/io.h>
#include <linux/module.h>
#include <linux/vmalloc.h>

int init_module(void)
{
	void *p = ioremap(8UL << 30, 1UL << 30);
	unsigned int level = 0;

	lookup_address((unsigned long)p, &level);
	iounmap(p);
	return level;
}

MODULE_LICENSE("GPL");
