/*
 * The sieve of Eratosthenes over vmalloc memory: there are 9592 primes below 100000.
 * expect: return 9592
 * expect: no-fault
 * expect: log "9592 primes below 100000"
 */
#include <linux/module.h>
#include <linux/vmalloc.h>

#define LIMIT 100000

static int __init sieve_init(void)
{
	u8 *composite = vzalloc(LIMIT);
	int primes = 0;

	if (!composite)
		return -ENOMEM;
	for (unsigned int n = 2; n < LIMIT; n++) {
		if (composite[n])
			continue;
		primes++;
		for (unsigned int multiple = 2 * n; multiple < LIMIT; multiple += n)
			composite[multiple] = 1;
	}
	vfree(composite);
	pr_info("%d primes below %d\n", primes, LIMIT);
	return primes;
}

module_init(sieve_init);
MODULE_LICENSE("GPL");
