/*
 * kvmalloc is kmalloc as long as that can serve, vmalloc above, NULL beyond INT_MAX (a warning) and where it may not sleep.
 * expect: return 0
 * expect: no-fault
 * expect: log "at mm/util.c:670 __kvmalloc_node_noprof+0x"
 */
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/slab.h>

int init_module(void)
{
	void *small = kvmalloc(64 << 10, GFP_KERNEL);
	void *large = kvmalloc(KMALLOC_MAX_SIZE + 1, GFP_KERNEL);

	if (!small || is_vmalloc_addr(small) || !large || !is_vmalloc_addr(large))
		return 1;
	if (kvmalloc(KMALLOC_MAX_SIZE + 1, GFP_ATOMIC))
		return 2;
	if (kvmalloc(1UL << 31, GFP_KERNEL))
		return 3;
	kvfree(small);
	kvfree(large);
	kvfree(NULL);
	return 0;
}

MODULE_LICENSE("GPL");
