/*
 * iounmap of an address that is not mapped says so, with the caller's stack.
 * expect: return 0
 * expect: log "iounmap: bad address"
 * expect: log "Call Trace:"
 * expect: no-fault
 */
#include <linux/io.h>
#include <linux/module.h>
#include <linux/vmalloc.h>

int init_module(void)
{
	iounmap((void *)0xffffe8fffffff000);
	return 0;
}

MODULE_LICENSE("GPL");
