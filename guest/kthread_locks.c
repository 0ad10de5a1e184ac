/*
 * Threads on two CPUs count under a mutex, a spinlock and an rw_semaphore, wait for an event and for completions, and are stopped.
 * vmemu: cpus=2
 * expect: return 0
 * expect: no-fault
 */
#include <linux/completion.h>
#include <linux/delay.h>
#include <linux/kthread.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/rwsem.h>
#include <linux/wait.h>

#define THREADS 4
#define ROUNDS 50

static DEFINE_MUTEX(mutex);
static DEFINE_SPINLOCK(spinlock);
static DECLARE_RWSEM(rwsem);
static DECLARE_WAIT_QUEUE_HEAD(queue);
static DECLARE_COMPLETION(counted);
static int counter, go;

static int count(void *data)
{
	for (int i = 0; i < ROUNDS; i++) {
		mutex_lock(&mutex);
		counter++;
		mutex_unlock(&mutex);
		spin_lock(&spinlock);
		counter++;
		spin_unlock(&spinlock);
		down_write(&rwsem);
		counter++;
		up_write(&rwsem);
	}
	wait_event(queue, READ_ONCE(go));
	complete(&counted);
	while (!kthread_should_stop())
		msleep(1);
	return (long)data;
}

int init_module(void)
{
	struct task_struct *threads[THREADS];
	int sum = 0;

	for (long i = 0; i < THREADS; i++) {
		threads[i] = kthread_create(count, (void *)i, "count/%ld", i);
		if (IS_ERR(threads[i]))
			return PTR_ERR(threads[i]);
		kthread_bind(threads[i], i % num_online_cpus());
		wake_up_process(threads[i]);
	}
	WRITE_ONCE(go, 1);
	wake_up_all(&queue);
	for (int i = 0; i < THREADS; i++)
		wait_for_completion(&counted);
	for (int i = 0; i < THREADS; i++)
		sum += kthread_stop(threads[i]);
	if (sum != 0 + 1 + 2 + 3 || preempt_count())
		return -EINVAL;
	return counter - 3 * THREADS * ROUNDS ? -EIO : 0;
}

MODULE_LICENSE("GPL");
