/*
 * Allocation until NULL and freeing gives everything back: the second storm gets as far as the first.
 * vmemu: memory=256M
 * expect: return 0
 * expect: no-fault
 */
#include <linux/module.h>
#include <linux/vmalloc.h>

static int storm(void)
{
	void **last = NULL, **p;
	int count = 0;

	while ((p = __vmalloc(1UL << 20, GFP_KERNEL | __GFP_NOWARN))) {
		*p = last;
		last = p;
		count++;
	}
	for (; last; last = p) {
		p = *last;
		vfree(last);
	}
	vm_unmap_aliases();
	return count;
}

int init_module(void)
{
	int first = storm();

	return first > 100 && storm() == first ? 0 : first;
}

MODULE_LICENSE("GPL");
