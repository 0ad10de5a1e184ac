/*
 * Two threads that take two mutexes in opposite orders wait for each other for ever.
 * vmemu: cpus=2
 * expect: deadlock
 */
#include <linux/kthread.h>
#include <linux/module.h>
#include <linux/mutex.h>

static DEFINE_MUTEX(first);
static DEFINE_MUTEX(second);
static int held;

static int other(void *data)
{
	mutex_lock(&second);
	WRITE_ONCE(held, 1);
	mutex_lock(&first);
	return 0;
}

int init_module(void)
{
	struct task_struct *task = kthread_create(other, NULL, "other");

	mutex_lock(&first);
	kthread_bind(task, 1);
	wake_up_process(task);
	while (!READ_ONCE(held))
		cpu_relax();
	mutex_lock(&second);
	return 0;
}

MODULE_LICENSE("GPL");
