/* SPDX-License-Identifier: GPL-2.0-or-later */
#ifndef _LINUX_VMEMU_H
#define _LINUX_VMEMU_H

#include <linux/mm.h>
#include <linux/types.h>

/*
 * What no module could do, and a guest here can. An mm is the physical address of its PGD, which is what MOV CR3 takes. Results
 * are 0 or a negative errno; of vmemu_new_mm and vmemu_fork 0 is a lack of memory.
 */
unsigned long vmemu_new_mm(void);
long vmemu_destroy_mm(unsigned long mm);
unsigned long vmemu_init_mm(void);
unsigned long vmemu_user_pgd(unsigned long mm);
long vmemu_map_user(unsigned long mm, unsigned long addr, unsigned long size, int executable);
/* Go on in user mode of an mm, on its user PGD with page-table isolation; -EINVAL for no mm. Nothing leads back but exceptions. */
long vmemu_enter_user(unsigned long mm, unsigned long ip, unsigned long sp);
/* A shared writable mapping with nothing in it; NULL: no mm, a bad range or one in use, no memory. munmap puts its pages. */
struct vm_area_struct *vmemu_mmap(unsigned long mm, unsigned long uaddr, unsigned long size);
long vmemu_munmap(struct vm_area_struct *vma);
void vmemu_vmalloc_sync_mappings(void);
long vmemu_set_mempolicy(int mode, unsigned long nodes);
/* A thread that is never run, named by its stack. */
unsigned long vmemu_fork(int node);
long vmemu_exit(unsigned long stack);

/* A thread bound to a CPU: its handle, 0 on failure; what its function returned. */
unsigned long vmemu_run_on(unsigned int cpu, unsigned long (*function)(unsigned long argument), unsigned long argument);
unsigned long vmemu_join(unsigned long handle);
long vmemu_send_nmi(unsigned int cpu);
long vmemu_send_irq(unsigned int cpu, unsigned int vector);
/* handler(vector, data) is called in hard interrupt context. -EINVAL: a vector that is taken. */
long vmemu_request_irq(unsigned int vector, void (*handler)(unsigned long vector, void *data), void *data);
int vmemu_in_interrupt(void);

#endif
