/*
 * set_memory_ro on vmalloc memory takes the write permission of the direct map's mapping of the same frame too.
 * expect: fault #PF error=0x0003 address=[direct]
 * expect: oops
 */
#include <linux/module.h>
#include <linux/set_memory.h>
#include <linux/vmalloc.h>

u8 *direct;

int init_module(void)
{
	u8 *p = vmalloc(PAGE_SIZE);

	direct = page_address(vmalloc_to_page(p));
	direct[0] = 1;
	set_memory_ro((unsigned long)p, 1);
	WRITE_ONCE(direct[0], 2);
	return 0;
}

MODULE_LICENSE("GPL");
