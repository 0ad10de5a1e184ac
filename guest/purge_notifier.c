/*
 * Without address space the kernel purges, then asks the purge notifiers: what one of them frees makes the allocation succeed.
 * expect: return 0
 * expect: no-fault
 * expect: log "asked"
 */
#include <linux/errno.h>
#include <linux/module.h>
#include <linux/notifier.h>
#include <linux/printk.h>
#include <linux/vmalloc.h>

#define TIB (1UL << 40)

static struct vm_struct *hoard;

static int give_back(struct notifier_block *nb, unsigned long action, void *data)
{
	unsigned long *freed = data;

	printk("asked, %lu so far\n", *freed);
	if (!hoard)
		return NOTIFY_OK;
	free_vm_area(hoard);
	hoard = NULL;
	*freed += 1;
	return NOTIFY_OK;
}

static struct notifier_block block = { .notifier_call = give_back };

int init_module(void)
{
	struct vm_struct *second;

	hoard = get_vm_area(20 * TIB, VM_ALLOC);
	if (!hoard || register_vmap_purge_notifier(&block))
		return 1;
	if (register_vmap_purge_notifier(&block) != -EEXIST)
		return 2;
	second = get_vm_area(20 * TIB, VM_ALLOC);
	if (!second || hoard)
		return 3;
	if (get_vm_area(20 * TIB, VM_ALLOC))
		return 4;
	if (unregister_vmap_purge_notifier(&block) || unregister_vmap_purge_notifier(&block) != -ENOENT)
		return 5;
	free_vm_area(second);
	return 0;
}

MODULE_LICENSE("GPL");
