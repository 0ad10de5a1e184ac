/* SPDX-License-Identifier: GPL-2.0-or-later */
#ifndef _LINUX_MODULE_H
#define _LINUX_MODULE_H

#include <linux/errno.h>
#include <linux/export.h>
#include <linux/init.h>
#include <linux/kernel.h>
#include <linux/types.h>

struct module;
#define THIS_MODULE ((struct module *)0)

#define __MODULE_INFO(line, tag, text) \
	static const char __modinfo_##tag##_##line[] __used __section(".modinfo") __aligned(1) = #tag "=" text
#define __MODULE_INFO_AT(line, tag, text) __MODULE_INFO(line, tag, text)
#define MODULE_LICENSE(text) __MODULE_INFO_AT(__LINE__, license, text)
#define MODULE_AUTHOR(text) __MODULE_INFO_AT(__LINE__, author, text)
#define MODULE_DESCRIPTION(text) __MODULE_INFO_AT(__LINE__, description, text)
#define MODULE_VERSION(text) __MODULE_INFO_AT(__LINE__, version, text)

/* The machine calls init_module and ends when it returns; an exit function is compiled and never called. */
#define module_init(function) \
	int init_module(void) __attribute__((__copy__(function), __alias__(#function)))
#define module_exit(function) \
	void cleanup_module(void) __attribute__((__copy__(function), __alias__(#function)))

#endif
