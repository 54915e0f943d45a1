// SPDX-License-Identifier: Apache-2.0
/*
 * User code that jumps to the kernel's system call entry must gain nothing.
 *
 *   syscall-entry [ADDRESS]
 *
 * On a PVM host the kernel takes a page fault at entry_SYSCALL_64 for a SYSCALL
 * instruction, so user code can present any RCX and R11 there. On other hosts the
 * jump is an ordinary fault. Both are right; privilege in the flags, kernel code
 * reached, a filter evaded or I/O allowed is not. Run as root, since the address
 * comes from /proc/kallsyms. Exit status 0 if nothing was gained.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/seccomp.h>
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define IF 0x200ul
#define IOPL 0x3000ul
#define NOT_FOR_USERS (IOPL | 0x4000ul | 0x20000ul | 0x180000ul) /* IOPL NT VM VIF VIP */

static unsigned long entry;
static int failures;
static sigjmp_buf back;
static volatile int caught;

static void on_fault(int number)
{
	caught = number;
	siglongjmp(back, 1);
}

/* Jump to the entry; the flags found after the return, and RAX. */
static unsigned long jump(unsigned long rax, unsigned long r11, long *result)
{
	unsigned long flags;

	asm volatile(
		"leaq 1f(%%rip), %%rcx\n\t"
		"movq %[r11], %%r11\n\t"
		"subq $128, %%rsp\n\t" /* the red zone */
		"jmp *%[entry]\n"
		"1:\tpushfq\n\t"
		"popq %%r11\n\t"
		"pushq $0x202\n\t"
		"popfq\n\t"
		"cld\n\t"
		"addq $128, %%rsp\n\t"
		"movq %%r11, %[flags]\n\t"
		: "+a"(rax), [flags] "=r"(flags)
		: [r11] "r"(r11), [entry] "r"(entry)
		: "rcx", "r11", "memory", "cc");
	*result = rax;
	return flags;
}

static void jump_to(unsigned long rax, unsigned long rcx, unsigned long r11)
{
	asm volatile("movq %[r11], %%r11\n\tjmp *%[entry]\n"
		     : "+a"(rax)
		     : "c"(rcx), [r11] "r"(r11), [entry] "r"(entry)
		     : "r11", "memory", "cc");
}

static void fail(const char *what, unsigned long value)
{
	printf("syscall-entry: GAINED: %s (0x%lx)\n", what, value);
	failures++;
}

static int io_allowed(void)
{
	if (sigsetjmp(back, 1))
		return 0;
	asm volatile("outb %%al, $0x80" : : "a"(0));
	return 1;
}

static int cli_allowed(void)
{
	if (sigsetjmp(back, 1))
		return 0;
	asm volatile("cli; sti");
	return 1;
}

static const char *const entry_names[] = { "entry_SYSCALL_64", "ignore_sysret",
					   "entry_SYSCALL_compat", "entry_SYSENTER_compat" };
#define ENTRIES (sizeof entry_names / sizeof *entry_names)
static unsigned long entries[ENTRIES];

/* One pass: the file is long, and slow to read where kernel code is emulated. */
static void read_entries(void)
{
	FILE *f = fopen("/proc/kallsyms", "re");
	char line[256], name[128], type;
	unsigned long address;

	if (!f)
		return;
	while (fgets(line, sizeof line, f)) {
		if (strstr(line, "__entry_text_end")) /* all entries lie before it */
			break;
		if (!strstr(line, "entry_SYS") && !strstr(line, "ignore_sysret"))
			continue;
		if (sscanf(line, "%lx %c %127s", &address, &type, name) != 3)
			continue;
		for (size_t i = 0; i < ENTRIES; i++)
			if (!strcmp(name, entry_names[i]))
				entries[i] = address;
	}
	fclose(f);
}

/* Flags of every kind in R11. */
static void hostile_flags(void)
{
	static const unsigned long tries[] = {
		IF | 2, IOPL | IF | 2, IOPL, 0, 0x4000 | IF, 0x20000 | IF, 0x80000 | IF,
		0x100000 | IF, 0x200000 | IF, 0x40000 | IF, 0x10000 | IF, 0x400 | IF,
		~0ul & ~0x100ul, 0xffffffff00000000ul | IOPL, 0x8000 | IF,
	};
	volatile int taken = 0, refused = 0;

	for (volatile size_t i = 0; i < sizeof tries / sizeof *tries; i++) {
		long result = 0;
		if (sigsetjmp(back, 1)) {
			refused++;
		} else {
			unsigned long flags = jump(SYS_getppid, tries[i], &result);
			taken++;
			if (flags & NOT_FOR_USERS)
				fail("privileged flags", flags);
			if (!(flags & IF))
				fail("interrupts off", flags);
			if (result != getppid())
				fail("a wrong result", result);
		}
		if (io_allowed())
			fail("port access after R11", tries[i]);
		if (cli_allowed())
			fail("CLI after R11", tries[i]);
	}
	printf("syscall-entry: hostile flags: %d taken as system calls, %d faults\n", taken, refused);
	if (taken && refused)
		fail("neither one nor the other", taken);
}

/* Return addresses that are not user space: all must end in a signal. */
static void hostile_return(void)
{
	const unsigned long tries[] = {
		entry, entry + 1, 0xffffffffffffffff, 0xffff800000000000, 0x8000000000000000,
		0x0000800000000000, 0x00007ffffffff000, 0xffffffffff600000, 0,
	};

	for (volatile size_t i = 0; i < sizeof tries / sizeof *tries; i++) {
		caught = 0;
		if (!sigsetjmp(back, 1)) {
			jump_to(SYS_getppid, tries[i], IOPL | IF | 2);
			fail("came back from", tries[i]);
		}
		if (caught != SIGSEGV && caught != SIGBUS && caught != SIGILL)
			fail("another signal than a fault", caught);
		if (io_allowed())
			fail("port access after RCX", tries[i]);
	}
	printf("syscall-entry: hostile return addresses: all faults\n");
}

/* The entry and its neighbourhood from 32-bit code, and from other offsets. */
static void other_addresses(void)
{
	unsigned long saved = entry;

	for (volatile int offset = -64; offset <= 256; offset++) {
		long result;
		if (offset == 0)
			continue;
		entry = saved + offset;
		if (!sigsetjmp(back, 1)) {
			jump(SYS_getppid, IOPL | IF | 2, &result);
			fail("kernel code at an offset from the entry", offset);
		}
	}
	entry = saved;
	printf("syscall-entry: neighbouring addresses: all faults\n");
}

static int in_child(void (*body)(void))
{
	int status = 0;
	pid_t pid;

	fflush(stdout);
	pid = fork();
	if (pid == 0) {
		body();
		_exit(0);
	}
	waitpid(pid, &status, 0);
	return status;
}

static void strict_then_jump(void)
{
	long result;

	if (prctl(PR_SET_SECCOMP, SECCOMP_MODE_STRICT))
		_exit(42);
	jump(SYS_getppid, IF | 2, &result);
	syscall(SYS_exit, 43);
}

/*
 * 32-bit code: getpid by some instruction, then a far jump to 64-bit code. There and
 * back by jumps, since QEMU's emulation reads the stack of a far return as the kernel
 * would, which SMAP forbids.
 */
enum { BACK = 8 }; /* where the jump's target stands */

static void put_program(unsigned char *code, unsigned char opcode0, unsigned char opcode1)
{
	const unsigned char program[] = {
		0xb8, 20, 0, 0, 0, opcode0, opcode1, 0xea, 0, 0, 0, 0, 0x33, 0,
	};
	memcpy(code, program, sizeof program);
}

/* In: RDI a stack with room, RSI the code, both below 4 GiB. */
#define RUN_PROGRAM							\
	"pushq %%rbp\n\tpushq %%rbx\n\t"				\
	"movq %%rsp, %%rbx\n\t"						\
	"movq %[stack], %%rsp\n\t"					\
	"leaq 1f(%%rip), %%r15\n\t"					\
	"movl %%r15d, %c[back](%[code])\n\t"				\
	"movl %k[code], (%%rsp)\n\t"					\
	"movw $0x23, 4(%%rsp)\n\t"					\
	"ljmpl *(%%rsp)\n"						\
	"1:\tmovq %%rbx, %%rsp\n\t"					\
	"popq %%rbx\n\tpopq %%rbp\n\t"

/* 32-bit code segment: SYSCALL, SYSENTER and INT 0x80 from there. */
static void compat(unsigned char opcode0, unsigned char opcode1)
{
	unsigned char *code = mmap(NULL, 4096, PROT_READ | PROT_WRITE | PROT_EXEC,
				   MAP_PRIVATE | MAP_ANONYMOUS | MAP_32BIT, -1, 0);

	if (code == MAP_FAILED)
		_exit(42);
	put_program(code, opcode0, opcode1);
	unsigned long stack = (unsigned long)code + 4096 - 64;
	if (sigsetjmp(back, 1))
		return;
	asm volatile(RUN_PROGRAM
		: : [stack] "D"(stack), [code] "S"((unsigned long)code), [back] "i"(BACK)
		: "rax", "rcx", "rdx", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15",
		  "memory", "cc");
}

static void compat_syscall(void)
{
	compat(0x0f, 0x05);
	if (io_allowed() || cli_allowed())
		_exit(44);
}

static void compat_sysenter(void)
{
	compat(0x0f, 0x34);
	if (io_allowed() || cli_allowed())
		_exit(44);
}

static void compat_int80(void)
{
	compat(0xcd, 0x80);
	if (io_allowed() || cli_allowed())
		_exit(44);
}

/*
 * A host that emulates 32-bit SYSCALL or SYSENTER wrongly may enter kernel mode at
 * the low half of the kernel's entry address. Put code there that says which
 * privilege it runs with and returns to user mode by IRET.
 */
static void alias(unsigned char opcode1)
{
	const unsigned char payload[] = {
		0x66, 0x8c, 0xc8,		/* mov %cs, %ax */
		0x66, 0xa3, 0, 0, 0, 0, 0, 0, 0, 0, /* mov %ax, shared (64-bit form) */
		0x6a, 0x2b,			/* push $ss */
		0x53,				/* push %rbx: the 64-bit stack */
		0x68, 0x02, 0x02, 0, 0,		/* push $flags */
		0x6a, 0x33,			/* push $cs */
		0x41, 0x57,			/* push %r15: where to */
		0x48, 0xcf,			/* iretq */
	};
	uint16_t *shared = mmap(NULL, 4096, PROT_READ | PROT_WRITE,
				MAP_SHARED | MAP_ANONYMOUS | MAP_32BIT, -1, 0);
	unsigned char *code = mmap(NULL, 8192, PROT_READ | PROT_WRITE | PROT_EXEC,
				   MAP_PRIVATE | MAP_ANONYMOUS | MAP_32BIT, -1, 0);
	int status, mapped = 0;

	if (shared == MAP_FAILED || code == MAP_FAILED)
		return fail("no memory for the test", errno);
	*shared = 0xffff;
	for (size_t i = 0; i < ENTRIES; i++) {
		unsigned long low = entries[i] & 0xffffffff;
		if (!low)
			continue;
		unsigned char *page = mmap((void *)(low & ~0xffful), 8192,
					   PROT_READ | PROT_WRITE | PROT_EXEC,
					   MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
		if (page == MAP_FAILED)
			continue;
		mapped++;
		memset(page, 0x90, 8192);
		memcpy(page + 8192 - 64, payload, sizeof payload);
		uint64_t where = (uint64_t)shared;
		memcpy(page + 8192 - 64 + 5, &where, 8);
	}
	put_program(code, 0x0f, opcode1);
	unsigned long stack = (unsigned long)code + 8192 - 256;
	fflush(stdout);
	pid_t pid = fork();
	if (pid == 0) {
		signal(SIGSEGV, SIG_DFL);
		signal(SIGILL, SIG_DFL);
		asm volatile(RUN_PROGRAM
			: : [stack] "D"(stack), [code] "S"((unsigned long)code), [back] "i"(BACK)
			: "rax", "rcx", "rdx", "r8", "r9", "r10", "r11", "r12", "r13", "r14",
			  "r15", "memory", "cc");
		_exit(0);
	}
	waitpid(pid, &status, 0);
	if (*shared != 0xffff && !(*shared & 3))
		fail("kernel mode at a user address", *shared);
	else
		printf("syscall-entry: alias of the entry by 0f %02x (%d mapped): never in kernel mode\n",
		       opcode1, mapped);
}

static void check_compat(const char *name, void (*body)(void))
{
	int status = in_child(body);

	if (WIFEXITED(status) && WEXITSTATUS(status))
		fail(name, WEXITSTATUS(status));
	else
		printf("syscall-entry: %s: %s\n", name, WIFSIGNALED(status) ? "killed" : "nothing gained");
}

/* Bit 7 of the taint flags: the kernel has oopsed. */
static int oopsed(void)
{
	FILE *f = fopen("/proc/sys/kernel/tainted", "re");
	unsigned long taint = 0;

	if (!f || fscanf(f, "%lu", &taint) != 1)
		taint = 0;
	if (f)
		fclose(f);
	return taint >> 7 & 1;
}

int main(int argc, char **argv)
{
	static char alternate[65536];
	stack_t stack = { .ss_sp = alternate, .ss_size = sizeof alternate };
	struct sigaction action = { .sa_handler = on_fault, .sa_flags = SA_ONSTACK | SA_NODEFER };
	int status;

	read_entries();
	if (argc > 1)
		entries[0] = strtoul(argv[1], NULL, 16);
	entry = entries[0];
	if (!entry) {
		printf("syscall-entry: no address of entry_SYSCALL_64: run as root or give it\n");
		return 2;
	}
	printf("syscall-entry: entry at 0x%lx\n", entry);
	sigaltstack(&stack, NULL);
	sigaction(SIGSEGV, &action, NULL);
	sigaction(SIGBUS, &action, NULL);
	sigaction(SIGILL, &action, NULL);
	sigaction(SIGTRAP, &action, NULL);
	if (io_allowed()) {
		printf("syscall-entry: port access is allowed from the start: nothing to learn\n");
		return 2;
	}

	int before = oopsed();
	hostile_flags();
	hostile_return();
	other_addresses();
	status = in_child(strict_then_jump);
	if (WIFSIGNALED(status))
		printf("syscall-entry: seccomp: killed by signal %d\n", WTERMSIG(status));
	else
		fail("a system call past seccomp", status);
	check_compat("32-bit SYSCALL", compat_syscall);
	check_compat("32-bit SYSENTER", compat_sysenter);
	check_compat("32-bit INT 0x80", compat_int80);
	alias(0x05);
	alias(0x34);
	if (oopsed() && !before)
		fail("an oops: kernel mode was entered where it must not be", 0);
	if (syscall(SYS_getpid) != getpid())
		fail("a broken kernel", 0);
	printf("syscall-entry: %s\n", failures ? "FAILED" : "passed");
	return failures ? 1 : 0;
}
