/* SPDX-License-Identifier: GPL-2.0-or-later */
#ifndef _LINUX_SET_MEMORY_H
#define _LINUX_SET_MEMORY_H

/*
 * 0; -EFAULT with a WARN at the first page that is not mapped; -ENOMEM when a large leaf cannot be split. A change holds for the
 * direct map's mapping of the same frames too, but for the permission to execute. An unaligned address is a WARN, once.
 */
int set_memory_ro(unsigned long addr, int numpages);
int set_memory_rw(unsigned long addr, int numpages);
int set_memory_x(unsigned long addr, int numpages);
int set_memory_nx(unsigned long addr, int numpages);
int set_memory_rox(unsigned long addr, int numpages);
/*
 * Besides: -EBUSY with a message where the memory has another type already, which set_memory_wb() ends; RAM may not even get the
 * type it has. A count of 0 is -EINVAL with a WARN.
 */
int set_memory_uc(unsigned long addr, int numpages);
int set_memory_wc(unsigned long addr, int numpages);
int set_memory_wb(unsigned long addr, int numpages);

struct page;

/* set_memory_uc() and set_memory_wb() of the pages' addresses in the direct map. */
int set_pages_uc(struct page *page, int numpages);
int set_pages_wb(struct page *page, int numpages);

#endif
