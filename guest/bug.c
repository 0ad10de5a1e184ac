/*
 * BUG() is ud2 with a record of where it stands.
 * expect: fault #UD
 * expect: oops "kernel BUG at"
 */
#include <linux/module.h>

static int __init bug_init(void)
{
	BUG();
}

module_init(bug_init);
MODULE_LICENSE("GPL");
