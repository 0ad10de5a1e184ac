/*
 * n * size that overflows is NULL, without a word.
 * expect: return 0
 * expect: no-fault
 * expect: no-log "WARNING"
 */
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/vmalloc.h>

int init_module(void)
{
	size_t n = 1UL << 33;

	if (vmalloc_array(n, 1UL << 32) || vcalloc(n, 1UL << 32) || __vmalloc_array(n, 1UL << 31, GFP_KERNEL))
		return 1;
	return kvmalloc_array(n, 1UL << 31, GFP_KERNEL) || kvcalloc(n, 1UL << 31, GFP_KERNEL) ? 2 : 0;
}

MODULE_LICENSE("GPL");
