/*
 * set_memory_ro of one page splits the 2 MiB leaf it is in: the other pages stay writable, the frames stay what they were.
 * expect: return 0
 * expect: no-fault
 */
#include <linux/module.h>
#include <linux/set_memory.h>
#include <linux/vmalloc.h>

int init_module(void)
{
	u8 *p = vmalloc_huge(PMD_SIZE, GFP_KERNEL);
	unsigned long pfn = vmalloc_to_pfn(p + 7 * PAGE_SIZE);
	unsigned int level;
	pte_t *pte;

	lookup_address((unsigned long)p, &level);
	if (level != PG_LEVEL_2M)
		return 1;
	if (set_memory_ro((unsigned long)p + 7 * PAGE_SIZE, 1))
		return 2;
	pte = lookup_address((unsigned long)p + 7 * PAGE_SIZE, &level);
	if (level != PG_LEVEL_4K || pte_val(*pte) & _PAGE_RW || vmalloc_to_pfn(p + 7 * PAGE_SIZE) != pfn)
		return 3;
	p[6 * PAGE_SIZE] = p[8 * PAGE_SIZE] = 1;
	return p[7 * PAGE_SIZE] + p[8 * PAGE_SIZE] - p[6 * PAGE_SIZE];
}

MODULE_LICENSE("GPL");
