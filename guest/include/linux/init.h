/* SPDX-License-Identifier: GPL-2.0-or-later */
#ifndef _LINUX_INIT_H
#define _LINUX_INIT_H

#include <linux/compiler.h>

/* A guest lives as long as its init function, so nothing is discarded: these keep everything in .text and .data. */
#define __init
#define __exit __maybe_unused
#define __initdata
#define __initconst

#endif
