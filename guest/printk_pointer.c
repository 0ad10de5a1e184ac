/*
 * %p prints a hash of the pointer, the same each time, and %px the pointer.
 * expect: return 0
 * expect: log "plain 0000000000001000"
 * expect: no-log "hashed 0000000000001000"
 */
#include <linux/kernel.h>
#include <linux/module.h>
#include <linux/string.h>

int init_module(void)
{
	char one[32], two[32];

	pr_info("plain %px\n", (void *)0x1000);
	pr_info("hashed %p\n", (void *)0x1000);
	snprintf(one, sizeof(one), "%p", (void *)0x1000);
	snprintf(two, sizeof(two), "%p", (void *)0x1000);
	return strcmp(one, two) || strlen(one) != 16;
}

MODULE_LICENSE("GPL");
