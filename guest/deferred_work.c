/*
 * Work, timer, tasklet, irq_work and RCU callback each run once, in the context that Linux gives them.
 * vmemu: cpus=2
 * expect: return 0
 * expect: no-fault
 */
#include <linux/delay.h>
#include <linux/interrupt.h>
#include <linux/irq_work.h>
#include <linux/module.h>
#include <linux/rcupdate.h>
#include <linux/sched.h>
#include <linux/workqueue.h>

static int worked, delayed, timed, tasked, irqed, called;

static void work_function(struct work_struct *work)
{
	worked += in_task();
}

static void delayed_function(struct work_struct *work)
{
	delayed += in_task();
}

static void timer_function(struct timer_list *timer)
{
	timed += in_serving_softirq();
}

static void tasklet_function(struct tasklet_struct *tasklet)
{
	tasked += in_serving_softirq();
}

static void irq_function(struct irq_work *work)
{
	irqed += in_hardirq();
}

static void rcu_function(struct rcu_head *head)
{
	called += in_serving_softirq();
}

static DECLARE_WORK(work, work_function);
static DEFINE_TIMER(timer, timer_function);
static DECLARE_TASKLET(tasklet, tasklet_function);
static DEFINE_IRQ_WORK(irq_work, irq_function);
static struct delayed_work delayed_work;
static struct rcu_head head;

static void increment(void *info)
{
	atomic_inc(info);
}

int init_module(void)
{
	unsigned long start = jiffies;
	atomic_t calls = ATOMIC_INIT(0);

	INIT_DELAYED_WORK(&delayed_work, delayed_function);
	schedule_work_on(1, &work);
	schedule_delayed_work(&delayed_work, 3);
	mod_timer(&timer, jiffies + 5);
	tasklet_schedule(&tasklet);
	irq_work_queue(&irq_work);
	call_rcu(&head, rcu_function);
	flush_work(&work);
	rcu_barrier();
	msleep(40);
	on_each_cpu(increment, &calls, 1);
	if (atomic_read(&calls) != num_online_cpus() || time_before(jiffies, start + 10))
		return -EINVAL;
	return worked && delayed && timed && tasked && irqed && called ? 0 : -EIO;
}

MODULE_LICENSE("GPL");
