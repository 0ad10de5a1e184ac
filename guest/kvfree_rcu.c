/*
 * kvfree_rcu_mightsleep frees kmalloc and vmalloc memory alike, after a grace period.
 * expect: return 0
 * expect: no-fault
 */
#include <linux/delay.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/rcupdate.h>
#include <linux/slab.h>
#include <linux/vmalloc.h>

int init_module(void)
{
	void *small = kvmalloc(100, GFP_KERNEL), *large = kvmalloc(8UL << 20, GFP_KERNEL);

	kvfree_rcu_mightsleep(small);
	kvfree_rcu_mightsleep(large);
	if (!find_vm_area(large))
		return 2;
	/* The callbacks have run after this, and the worker that frees after that. */
	rcu_barrier();
	msleep(1);
	return find_vm_area(large) ? 1 : 0;
}

MODULE_LICENSE("GPL");
