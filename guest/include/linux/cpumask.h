/* SPDX-License-Identifier: GPL-2.0-or-later */
#ifndef _LINUX_CPUMASK_H
#define _LINUX_CPUMASK_H

#include <linux/types.h>

#define NR_CPUS 8192

struct cpumask {
	unsigned long bits[NR_CPUS / 64];
};

typedef struct cpumask cpumask_t;

extern unsigned int nr_cpu_ids;
extern int __num_online_cpus;
extern struct cpumask __cpu_possible_mask, __cpu_online_mask;

#define cpu_possible_mask ((const struct cpumask *)&__cpu_possible_mask)
#define cpu_online_mask ((const struct cpumask *)&__cpu_online_mask)

static inline bool cpumask_test_cpu(int cpu, const struct cpumask *mask)
{
	return mask->bits[cpu / 64] >> (cpu % 64) & 1;
}

static inline void cpumask_set_cpu(unsigned int cpu, struct cpumask *mask)
{
	mask->bits[cpu / 64] |= 1UL << (cpu % 64);
}

static inline void cpumask_clear(struct cpumask *mask)
{
	for (int n = 0; n < NR_CPUS / 64; n++)
		mask->bits[n] = 0;
}

static inline unsigned int cpumask_next(int cpu, const struct cpumask *mask)
{
	unsigned int next = (unsigned int)(cpu + 1);

	while (next < nr_cpu_ids && !cpumask_test_cpu(next, mask))
		next++;
	return next;
}

#define num_online_cpus() ((unsigned int)*(volatile int *)&__num_online_cpus)
#define num_possible_cpus() nr_cpu_ids
#define cpu_online(cpu) cpumask_test_cpu((cpu), cpu_online_mask)
#define for_each_cpu(cpu, mask) for ((cpu) = cpumask_next(-1, (mask)); (cpu) < nr_cpu_ids; (cpu) = cpumask_next((cpu), (mask)))
#define for_each_online_cpu(cpu) for_each_cpu((cpu), cpu_online_mask)
#define for_each_possible_cpu(cpu) for_each_cpu((cpu), cpu_possible_mask)

#endif
