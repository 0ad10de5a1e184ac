/*
 * vm->pages of a small area is kmalloc memory; each element names the page that is mapped there.
 * expect: return 0
 * expect: no-fault
 */
#include <linux/module.h>
#include <linux/vmalloc.h>

int init_module(void)
{
	u8 *p = vmalloc(100 * PAGE_SIZE);
	struct vm_struct *area = find_vm_area(p);

	if (is_vmalloc_addr(area->pages) || area->size != 101 * PAGE_SIZE || get_vm_area_size(area) != 100 * PAGE_SIZE)
		return 1;
	for (int i = 0; i < 100; i++)
		if (area->pages[i] != vmalloc_to_page(p + i * PAGE_SIZE) || page_count(area->pages[i]) != 1)
			return 2;
	return 0;
}

MODULE_LICENSE("GPL");
