/* SPDX-License-Identifier: GPL-2.0-or-later */
#ifndef _LINUX_PGTABLE_H
#define _LINUX_PGTABLE_H

#include <linux/types.h>

typedef struct { unsigned long pte; } pte_t;
typedef struct { unsigned long pgprot; } pgprot_t;

#define __pgprot(x) ((pgprot_t){ (x) })
#define pgprot_val(x) ((x).pgprot)
#define pte_val(x) ((x).pte)

#define _PAGE_PRESENT 0x001UL
#define _PAGE_RW 0x002UL
#define _PAGE_USER 0x004UL
#define _PAGE_PWT 0x008UL
#define _PAGE_PCD 0x010UL
#define _PAGE_ACCESSED 0x020UL
#define _PAGE_DIRTY 0x040UL
#define _PAGE_PSE 0x080UL
#define _PAGE_GLOBAL 0x100UL
#define _PAGE_NX 0x8000000000000000UL

/* Values of 6.12. */
#define PAGE_KERNEL __pgprot(0x8000000000000163UL)
#define PAGE_KERNEL_RO __pgprot(0x8000000000000121UL)
#define PAGE_KERNEL_EXEC __pgprot(0x163UL)
#define PAGE_KERNEL_ROX __pgprot(0x121UL)
#define PAGE_KERNEL_NOCACHE __pgprot(0x800000000000017bUL)

enum pg_level { PG_LEVEL_NONE, PG_LEVEL_4K, PG_LEVEL_2M, PG_LEVEL_1G, PG_LEVEL_512G };

/* The entry that maps an address, through the direct map, and its level; NULL when none is there. */
pte_t *lookup_address(unsigned long address, unsigned int *level);
/* BUG where a table is missing. */
phys_addr_t slow_virt_to_phys(void *addr);

#endif
