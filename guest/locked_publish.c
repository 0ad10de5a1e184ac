/*
 * The page is published, read and freed under a lock: no interleaving reads it when it is gone.
 * vmemu: cpus=2
 * expect: return 0
 * expect: no-fault
 */
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/vmalloc.h>
#include <linux/vmemu.h>

static DEFINE_MUTEX(lock);
static unsigned long *page;

static unsigned long look(unsigned long argument)
{
	unsigned long value = argument;

	mutex_lock(&lock);
	if (page)
		value = *page;
	mutex_unlock(&lock);
	return value;
}

int init_module(void)
{
	unsigned long thread = vmemu_run_on(1, look, 5), seen;

	mutex_lock(&lock);
	page = vzalloc(PAGE_SIZE);
	*page = 5;
	mutex_unlock(&lock);
	mutex_lock(&lock);
	vfree(page);
	page = NULL;
	mutex_unlock(&lock);
	seen = vmemu_join(thread);
	return seen == 5 ? 0 : 1;
}

MODULE_LICENSE("GPL");
