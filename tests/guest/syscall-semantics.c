// SPDX-License-Identifier: Apache-2.0
/*
 * System calls mean what they should, with the kernel's entry patched or not:
 * registers kept, errors, restart after signals, ptrace, seccomp, single steps.
 *
 *   syscall-semantics
 *
 * Exit status 0 if every case holds.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

static int failures;

static void check(int holds, const char *what)
{
	printf("syscall-semantics: %s: %s\n", what, holds ? "ok" : "WRONG");
	failures += !holds;
}

/* All registers but RAX, RCX and R11 come back as they were, and R11 = flags. */
static void registers_kept(void)
{
	unsigned long in[13], out[13], rcx, r11, flags, after;
	long result = SYS_getppid;

	for (int i = 0; i < 13; i++)
		in[i] = 0x1111111111111111ul * (i + 1) ^ 0xabcdef;
	asm volatile(
		"pushq %%rbp\n\tpushq %%rbx\n\t"
		"subq $256, %%rsp\n\t"
		"movq %[in], 0(%%rsp)\n\tmovq %[out], 8(%%rsp)\n\tmovq %%rax, 16(%%rsp)\n\t"
		"movq %[in], %%rax\n\t"
		"movq 0(%%rax), %%rbx\n\tmovq 8(%%rax), %%rbp\n\t"
		"movq 16(%%rax), %%rdi\n\tmovq 24(%%rax), %%rsi\n\tmovq 32(%%rax), %%rdx\n\t"
		"movq 40(%%rax), %%r8\n\tmovq 48(%%rax), %%r9\n\tmovq 56(%%rax), %%r10\n\t"
		"movq 64(%%rax), %%r12\n\tmovq 72(%%rax), %%r13\n\tmovq 80(%%rax), %%r14\n\t"
		"movq 88(%%rax), %%r15\n\t"
		"movq 16(%%rsp), %%rax\n\t"
		"stc\n\t"
		"pushfq\n\tpopq 40(%%rsp)\n\t" /* popq with RSP base: address after the pop */
		"syscall\n"
		"9:\tpushfq\n\tpopq 48(%%rsp)\n\t"
		"movq %%rax, 16(%%rsp)\n\tmovq %%rcx, 24(%%rsp)\n\tmovq %%r11, 32(%%rsp)\n\t"
		"movq 8(%%rsp), %%rax\n\t"
		"movq %%rbx, 0(%%rax)\n\tmovq %%rbp, 8(%%rax)\n\t"
		"movq %%rdi, 16(%%rax)\n\tmovq %%rsi, 24(%%rax)\n\tmovq %%rdx, 32(%%rax)\n\t"
		"movq %%r8, 40(%%rax)\n\tmovq %%r9, 48(%%rax)\n\tmovq %%r10, 56(%%rax)\n\t"
		"movq %%r12, 64(%%rax)\n\tmovq %%r13, 72(%%rax)\n\tmovq %%r14, 80(%%rax)\n\t"
		"movq %%r15, 88(%%rax)\n\t"
		"leaq 9b(%%rip), %%rdx\n\t"
		"subq 24(%%rsp), %%rdx\n\tmovq %%rdx, 96(%%rax)\n\t"
		"movq 16(%%rsp), %%rax\n\tmovq 32(%%rsp), %%rcx\n\t"
		"movq 40(%%rsp), %%rsi\n\tmovq 48(%%rsp), %%rdi\n\t"
		"addq $256, %%rsp\n\tpopq %%rbx\n\tpopq %%rbp\n\t"
		: "+a"(result), "=c"(r11), "=S"(flags), "=D"(after)
		: [in] "S"(in), [out] "D"(out)
		: "rdx", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "memory", "cc");
	rcx = out[12];
	check(!memcmp(in, out, 12 * sizeof *in), "registers kept");
	check(result == getppid(), "result");
	check(rcx == 0, "RCX is the return address");
	check((flags & 0xcd5) == (after & 0xcd5) && (r11 & 0xcd5) == (flags & 0xcd5), "flags kept");
}

static volatile int alarms;

static void on_alarm(int number)
{
	(void)number;
	alarms++;
}

static void restart(void)
{
	struct sigaction action = { .sa_handler = on_alarm, .sa_flags = SA_RESTART };
	struct itimerval once = { .it_value = { 0, 100000 } };
	int pipe_ends[2];
	char byte = 0;

	check(syscall(100000) == -1 && errno == ENOSYS, "unknown call is ENOSYS");
	check(syscall(-1) == -1 && errno == ENOSYS, "call -1 is ENOSYS");
	check(close(-1) == -1 && errno == EBADF, "error number");

	if (pipe(pipe_ends) < 0)
		return check(0, "pipe");
	sigaction(SIGALRM, &action, NULL);
	pid_t pid = fork();
	if (pid == 0) {
		poll(NULL, 0, 600);
		_exit(write(pipe_ends[1], "x", 1) != 1);
	}
	setitimer(ITIMER_REAL, &once, NULL);
	ssize_t n = read(pipe_ends[0], &byte, 1);
	check(n == 1 && byte == 'x' && alarms == 1, "read restarted after a signal");
	waitpid(pid, NULL, 0);

	action.sa_flags = 0;
	sigaction(SIGALRM, &action, NULL);
	setitimer(ITIMER_REAL, &once, NULL);
	n = read(pipe_ends[0], &byte, 1);
	check(n == -1 && errno == EINTR && alarms == 2, "read interrupted without SA_RESTART");

	/* restart_syscall: a stopped nanosleep goes on for the rest of its time */
	pid = fork();
	if (pid == 0) {
		struct timespec time = { .tv_nsec = 700000000 };
		_exit(nanosleep(&time, NULL) != 0);
	}
	poll(NULL, 0, 200);
	kill(pid, SIGSTOP);
	poll(NULL, 0, 100);
	kill(pid, SIGCONT);
	int status;
	waitpid(pid, &status, 0);
	check(WIFEXITED(status) && WEXITSTATUS(status) == 0, "nanosleep restarted after a stop");
	close(pipe_ends[0]);
	close(pipe_ends[1]);
}

static void traced(void)
{
	struct user_regs_struct regs;
	int status, entries = 0, right = 0;
	pid_t pid = fork();

	if (pid == 0) {
		ptrace(PTRACE_TRACEME, 0, 0, 0);
		raise(SIGSTOP);
		long a = syscall(SYS_getppid);     /* made into getpid by the tracer */
		long b = syscall(SYS_getuid);      /* result made 77 */
		long c = syscall(SYS_getgid);      /* skipped: number made -1, result 88 */
		_exit(a == getpid() && b == 77 && c == 88 ? 0 : 1);
	}
	waitpid(pid, &status, 0);
	ptrace(PTRACE_SETOPTIONS, pid, 0, PTRACE_O_TRACESYSGOOD);
	for (int inside = 0;;) {
		static long number;
		ptrace(PTRACE_SYSCALL, pid, 0, 0);
		waitpid(pid, &status, 0);
		if (!WIFSTOPPED(status))
			break;
		if (WSTOPSIG(status) != (SIGTRAP | 0x80))
			continue;
		ptrace(PTRACE_GETREGS, pid, 0, &regs);
		if (!inside) {
			number = regs.orig_rax;
			entries++;
			right += (long)regs.rax == -ENOSYS && regs.cs == 0x33 && regs.ss == 0x2b;
			if (number == SYS_getppid)
				regs.orig_rax = SYS_getpid;
			if (number == SYS_getgid)
				regs.orig_rax = -1;
			ptrace(PTRACE_SETREGS, pid, 0, &regs);
		} else {
			if (number == SYS_getuid)
				regs.rax = 77;
			if (number == SYS_getgid)
				regs.rax = 88;
			ptrace(PTRACE_SETREGS, pid, 0, &regs);
		}
		inside = !inside;
	}
	check(entries >= 4 && entries == right, "ptrace sees each call as it is");
	check(WIFEXITED(status) && WEXITSTATUS(status) == 0, "ptrace changes number and result");
}

static void stepped(void)
{
	struct user_regs_struct regs;
	int status, steps = 0;
	pid_t pid = fork();

	if (pid == 0) {
		ptrace(PTRACE_TRACEME, 0, 0, 0);
		raise(SIGSTOP);
		for (int i = 0; i < 3; i++)
			syscall(SYS_getppid);
		_exit(7);
	}
	waitpid(pid, &status, 0);
	for (; steps < 2000; steps++) {
		ptrace(PTRACE_SINGLESTEP, pid, 0, 0);
		waitpid(pid, &status, 0);
		if (!WIFSTOPPED(status))
			break;
		ptrace(PTRACE_GETREGS, pid, 0, &regs);
		if (regs.rip >= 0x800000000000ul)
			check(0, "single step stays out of the kernel");
	}
	check(WIFEXITED(status) && WEXITSTATUS(status) == 7 && steps > 10, "single steps through calls");
}

static volatile long seen_call;

static void on_sys(int number, siginfo_t *info, void *context)
{
	ucontext_t *c = context;

	(void)number;
	seen_call = info->si_syscall;
	c->uc_mcontext.gregs[REG_RAX] = 99;
}

static void filtered(void)
{
	struct sock_filter program[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_getuid, 0, 1),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | 123),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_getgid, 0, 1),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_TRAP),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
	};
	struct sock_fprog prog = { sizeof program / sizeof *program, program };
	struct sigaction action = { .sa_sigaction = on_sys, .sa_flags = SA_SIGINFO };
	int status;
	pid_t pid = fork();

	if (pid == 0) {
		sigaction(SIGSYS, &action, NULL);
		prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
		if (prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &prog))
			_exit(1);
		errno = 0;
		if (syscall(SYS_getuid) != -1 || errno != 123)
			_exit(2);
		if (syscall(SYS_getgid) != 99 || seen_call != SYS_getgid)
			_exit(3);
		_exit(syscall(SYS_getppid) > 0 ? 0 : 4);
	}
	waitpid(pid, &status, 0);
	check(WIFEXITED(status) && WEXITSTATUS(status) == 0, "seccomp errno, trap and allow");
}

int main(void)
{
	registers_kept();
	restart();
	traced();
	stepped();
	filtered();
	printf("syscall-semantics: %s\n", failures ? "FAILED" : "passed");
	return failures ? 1 : 0;
}
