/*
 * Runs instructions one at a time on the real CPU and reports the exception of each: vector, error code, CR2, RIP.
 *
 * stdin:  u32 regions, u32 cases; struct region[regions]; struct test_case[cases].   stdout: struct outcome[cases].
 *
 * Everything happens in one signal handler: it stores the outcome of the case that raised the signal, puts the registers
 * of the next into the frame, and returns. RFLAGS.TF makes an instruction that does not fault end in #DB. FS and GS belong
 * to the case, so nothing here may use thread-local storage (-fno-stack-protector).
 */
#define _GNU_SOURCE
#include <asm/prctl.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

enum { PAGE = 4096, MAX_REGIONS = 64, ALT_STACK = 1 << 18, FILL_BEHIND = 16, VECTOR_MEMORY = 512 };
enum { FX_SW_RESERVED = 464, XSTATE_BV = 512, XSTATE_X87_SSE = 3 };

struct region {
	uint64_t la;
	uint32_t pages;
	uint32_t prot;
};

struct test_case {
	uint64_t code_la;
	uint8_t code[15];
	uint8_t size;
	uint64_t rflags, fs_base, gs_base, vectors;
	uint64_t reg[16]; /* rax rcx rdx rbx rsp rbp rsi rdi r8..r15 */
};

struct outcome {
	uint32_t vector;
	uint32_t error;
	uint64_t cr2, rip;
};

static const int greg_of[16] = { REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
				 REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15 };

static struct region regions[MAX_REGIONS];
static uint32_t nr_regions, nr_cases;
static int64_t current = -1;
static struct test_case *cases;
static struct outcome *outcomes;
static uint64_t own_fs;
static char clean_vectors[VECTOR_MEMORY];

static long raw_syscall(long number, long a, long b, long c)
{
	long result;

	__asm__ volatile("syscall" : "=a"(result) : "a"(number), "D"(a), "S"(b), "d"(c) : "rcx", "r11", "memory");
	return result;
}

static void write_all(const char *data, size_t left)
{
	while (left) {
		long done = raw_syscall(SYS_write, 1, (long)data, (long)left);

		if (done <= 0)
			raw_syscall(SYS_exit_group, 3, 0, 0);
		data += done;
		left -= (size_t)done;
	}
}

static int writable(uint64_t la)
{
	for (uint32_t i = 0; i < nr_regions; i++)
		if (la - regions[i].la < (uint64_t)regions[i].pages * PAGE)
			return regions[i].prot & PROT_WRITE;
	return 0;
}

static void clear_data(void)
{
	for (uint32_t i = 0; i < nr_regions; i++)
		if (regions[i].prot == (PROT_READ | PROT_WRITE))
			memset((void *)regions[i].la, 0, (size_t)regions[i].pages * PAGE);
}

static void place_code(const struct test_case *c)
{
	for (unsigned i = 0; i < c->size + (unsigned)FILL_BEHIND; i++)
		if (writable(c->code_la + i))
			*(volatile uint8_t *)(c->code_la + i) = i < c->size ? c->code[i] : 0xcc;
}

static void load(ucontext_t *uc, const struct test_case *c)
{
	char *vectors = (char *)uc->uc_mcontext.fpregs;

	clear_data();
	place_code(c);
	memcpy(vectors, clean_vectors, 416); /* up to the reserved part, which holds the kernel's own frame facts */
	for (unsigned at = 32; at < 416; at += 8) /* x87 (MMX) and XMM registers */
		memcpy(vectors + at, &c->vectors, 8);
	if (*(uint32_t *)(vectors + FX_SW_RESERVED) == FP_XSTATE_MAGIC1)
		*(uint64_t *)(vectors + XSTATE_BV) |= XSTATE_X87_SSE;
	for (unsigned i = 0; i < 16; i++)
		uc->uc_mcontext.gregs[greg_of[i]] = (greg_t)c->reg[i];
	uc->uc_mcontext.gregs[REG_RIP] = (greg_t)c->code_la;
	uc->uc_mcontext.gregs[REG_EFL] = (greg_t)(c->rflags | 0x100);
	raw_syscall(SYS_arch_prctl, ARCH_SET_FS, (long)c->fs_base, 0);
	raw_syscall(SYS_arch_prctl, ARCH_SET_GS, (long)c->gs_base, 0);
}

static void next_case(int signal_number, siginfo_t *info, void *frame)
{
	ucontext_t *uc = frame;

	(void)signal_number;
	(void)info;
	raw_syscall(SYS_arch_prctl, ARCH_SET_FS, (long)own_fs, 0);
	if (current < 0) {
		memcpy(clean_vectors, uc->uc_mcontext.fpregs, sizeof(clean_vectors));
	} else {
		outcomes[current].vector = (uint32_t)uc->uc_mcontext.gregs[REG_TRAPNO];
		outcomes[current].error = (uint32_t)uc->uc_mcontext.gregs[REG_ERR];
		outcomes[current].cr2 = (uint64_t)uc->uc_mcontext.gregs[REG_CR2];
		outcomes[current].rip = (uint64_t)uc->uc_mcontext.gregs[REG_RIP];
	}
	if (++current == nr_cases) {
		write_all((const char *)outcomes, nr_cases * sizeof(*outcomes));
		raw_syscall(SYS_exit_group, 0, 0, 0);
	}
	load(uc, &cases[current]);
}

static int read_all(void *to, size_t left)
{
	char *at = to;

	while (left) {
		ssize_t got = read(0, at, left);

		if (got <= 0)
			return -1;
		at += got;
		left -= (size_t)got;
	}
	return 0;
}

static void *anonymous(void *at, size_t size, int flags)
{
	return mmap(at, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | flags, -1, 0);
}

/* Present pages are touched first: the error code shall speak of rights, not of demand paging. */
static int map_region(const struct region *r)
{
	size_t size = (size_t)r->pages * PAGE;
	char *at = anonymous((void *)r->la, size, MAP_FIXED_NOREPLACE);

	if (at != (char *)r->la)
		return -1;
	if (r->prot != PROT_NONE)
		memset(at, 0, size);
	return mprotect(at, size, (int)r->prot);
}

int main(void)
{
	static const int signals[] = { SIGSEGV, SIGBUS, SIGTRAP, SIGILL, SIGFPE };
	struct sigaction action = { .sa_sigaction = next_case, .sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER };
	stack_t stack = { .ss_size = ALT_STACK };

	alarm(120);
	if (read_all(&nr_regions, 4) || read_all(&nr_cases, 4) || nr_regions > MAX_REGIONS ||
	    read_all(regions, nr_regions * sizeof(*regions)))
		return 2;
	cases = anonymous(NULL, nr_cases * sizeof(*cases) + PAGE, 0);
	outcomes = anonymous(NULL, nr_cases * sizeof(*outcomes) + PAGE, 0);
	stack.ss_sp = anonymous(NULL, ALT_STACK, 0);
	if (cases == MAP_FAILED || outcomes == MAP_FAILED || stack.ss_sp == MAP_FAILED ||
	    read_all(cases, nr_cases * sizeof(*cases)))
		return 2;
	for (uint32_t i = 0; i < nr_regions; i++)
		if (map_region(&regions[i]))
			return 2;
	if (sigaltstack(&stack, NULL) || syscall(SYS_arch_prctl, ARCH_GET_FS, &own_fs))
		return 2;
	for (unsigned i = 0; i < sizeof(signals) / sizeof(*signals); i++)
		if (sigaction(signals[i], &action, NULL))
			return 2;
	__asm__ volatile("int3");
	return 3;
}
