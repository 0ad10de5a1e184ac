/*
 * ioremap is uncached (PCD), ioremap_wc write-combining (PWT), and any offset in the first page is kept.
 * expect: return 0
 * expect: no-fault
 */
#include <linux/io.h>
#include <linux/module.h>
#include <linux/vmalloc.h>

static unsigned long flags_of(void *addr)
{
	unsigned int level;

	return pte_val(*lookup_address((unsigned long)addr, &level)) & (_PAGE_PWT | _PAGE_PCD | _PAGE_RW | _PAGE_NX);
}

int init_module(void)
{
	void *uncached = ioremap(0xfed00010, 64);
	void *combining = ioremap_wc(0xfee00000, PAGE_SIZE);

	if (!uncached || offset_in_page(uncached) != 0x10)
		return 1;
	if (flags_of(uncached) != (_PAGE_PCD | _PAGE_RW | _PAGE_NX))
		return 2;
	if (flags_of(combining) != (_PAGE_PWT | _PAGE_RW | _PAGE_NX))
		return 3;
	iounmap(uncached);
	iounmap(combining);
	return find_vm_area(uncached) ? 4 : 0;
}

MODULE_LICENSE("GPL");
