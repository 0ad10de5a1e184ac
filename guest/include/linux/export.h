/* SPDX-License-Identifier: GPL-2.0-or-later */
#ifndef _LINUX_EXPORT_H
#define _LINUX_EXPORT_H

/* A guest has nobody to export to. */
#define EXPORT_SYMBOL(symbol) extern __typeof__(symbol) symbol
#define EXPORT_SYMBOL_GPL(symbol) extern __typeof__(symbol) symbol

#endif
