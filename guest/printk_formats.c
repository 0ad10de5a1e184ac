/*
 * printk prints the kernel's own formats: pointers in the clear, bytes in hex, levels.
 * expect: return 0
 * expect: log "px 0000000000001000 dec -7 hex 0xff"
 * expect: log "bytes de ad be ef"
 * expect: log "symbol init_module+0x"
 * expect: log "string [   right] [left    ] char A"
 * expect: log "long 9223372036854775807 unsigned 4294967295 percent %"
 */
#include <linux/module.h>

static const u8 bytes[] = { 0xde, 0xad, 0xbe, 0xef };

int init_module(void)
{
	pr_info("px %px dec %d hex %#x\n", (void *)0x1000, -7, 255);
	pr_info("bytes %*ph\n", 4, bytes);
	pr_info("symbol %pS\n", init_module);
	pr_warn("string [%8s] [%-8s] char %c\n", "right", "left", 'A');
	printk(KERN_NOTICE "long %ld unsigned %u percent %%\n", LONG_MAX, UINT_MAX);
	return 0;
}

MODULE_LICENSE("GPL");
