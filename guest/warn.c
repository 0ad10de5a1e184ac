/*
 * WARN() prints its text and a splat, and the code goes on.
 * expect: return 5
 * expect: fault #UD
 * expect: log "the answer is 42"
 * expect: log "WARNING: CPU: 0 PID: 100 at "
 * expect: no-log "kernel BUG"
 */
#include <linux/kernel.h>
#include <linux/module.h>

int init_module(void)
{
	int answer = 42;

	if (!WARN(answer == 42, "the answer is %d\n", answer))
		return 1;
	return 5;
}

MODULE_LICENSE("GPL");
