/*
 * WARN_ON_ONCE reports the first time only, though its instruction traps each time.
 * expect: return 3
 * expect: faults #UD 3
 * expect: log "WARNING: CPU: 0 PID: 100 at "
 */
#include <linux/kernel.h>
#include <linux/module.h>

static noinline int check(int value)
{
	return WARN_ON_ONCE(value > 0);
}

int init_module(void)
{
	return check(1) + check(2) + check(3) + check(-1);
}

MODULE_LICENSE("GPL");
