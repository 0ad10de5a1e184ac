/* SPDX-License-Identifier: GPL-2.0-or-later */
#ifndef _LINUX_BUG_H
#define _LINUX_BUG_H

#include <linux/compiler.h>

/*
 * BUG and WARN are ud2 with a record in __bug_table, 12 bytes as on x86-64 Linux: distance to the instruction, distance to
 * the file name, line, flags.
 */
#define BUGFLAG_WARNING (1 << 0)
#define BUGFLAG_ONCE (1 << 1)
#define BUGFLAG_NO_CUT_HERE (1 << 3)
#define BUGFLAG_TAINT(taint) ((taint) << 8)
#define TAINT_WARN 9

#define __BUG_RECORD(flags) \
	__asm__ __volatile__("1:\tud2\n" \
			     "\t.pushsection __bug_table,\"aw\"\n" \
			     "2:\t.long 1b - .\n" \
			     "\t.long %c0 - .\n" \
			     "\t.word %c1\n" \
			     "\t.word %c2\n" \
			     "\t.popsection\n" \
			     : : "i" (__FILE__), "i" (__LINE__), "i" (flags))

#define BUG() do { __BUG_RECORD(0); unreachable(); } while (0)
#define BUG_ON(condition) do { if (unlikely(condition)) BUG(); } while (0)

void __warn_printk(const char *fmt, ...) __printf(1, 2);

#define WARN_ON(condition) ({ \
	int __warned = !!(condition); \
	if (unlikely(__warned)) \
		__BUG_RECORD(BUGFLAG_WARNING | BUGFLAG_TAINT(TAINT_WARN)); \
	unlikely(__warned); \
})

#define WARN(condition, fmt, ...) ({ \
	int __warned = !!(condition); \
	if (unlikely(__warned)) { \
		__warn_printk(fmt, ##__VA_ARGS__); \
		__BUG_RECORD(BUGFLAG_WARNING | BUGFLAG_NO_CUT_HERE | BUGFLAG_TAINT(TAINT_WARN)); \
	} \
	unlikely(__warned); \
})

#define WARN_ON_ONCE(condition) ({ \
	int __warned = !!(condition); \
	if (unlikely(__warned)) \
		__BUG_RECORD(BUGFLAG_WARNING | BUGFLAG_ONCE | BUGFLAG_TAINT(TAINT_WARN)); \
	unlikely(__warned); \
})

#endif
