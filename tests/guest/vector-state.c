// SPDX-License-Identifier: Apache-2.0
/*
 * Do all vector registers survive what the kernel does between two instructions?
 *
 *   vector-state [SECONDS]
 *
 * Two processes fill every vector register that the processor and XCR0 offer
 * (xmm, ymm or zmm, k, MXCSR, x87) with values of their own, then yield to each
 * other, or spin until they are preempted, or are hit by a signal whose handler
 * fills the registers with something else, and compare. Exit status 0 only if
 * nothing was ever lost and yields, preemptions and signals all took place.
 */
#include <cpuid.h>
#include <errno.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum level { SSE, AVX, AVX512 };
static const char *const level_names[] = { "xmm", "ymm", "zmm" };

struct registers {
	uint8_t vector[32][64];
	uint64_t mask[8];
	uint8_t x87[8][16];
	uint32_t mxcsr;
	uint16_t control;
} __attribute__((aligned(64)));

#define EACH16(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11) X(12) X(13) X(14) X(15)
#define EACH_HIGH(X) X(16) X(17) X(18) X(19) X(20) X(21) X(22) X(23) X(24) X(25) X(26) X(27) X(28) X(29) X(30) X(31)
#define EACH8(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7)

#define LOAD_XMM(n) "movups " #n "*64(%[in]), %%xmm" #n "\n\t"
#define LOAD_YMM(n) "vmovups " #n "*64(%[in]), %%ymm" #n "\n\t"
#define LOAD_ZMM(n) "vmovups " #n "*64(%[in]), %%zmm" #n "\n\t"
#define LOAD_K(n) "kmovq 2048+" #n "*8(%[in]), %%k" #n "\n\t"
#define LOAD_X87(n) "fldt 2112+(7-" #n ")*16(%[in])\n\t"
#define STORE_XMM(n) "movups %%xmm" #n ", " #n "*64(%[out])\n\t"
#define STORE_YMM(n) "vmovups %%ymm" #n ", " #n "*64(%[out])\n\t"
#define STORE_ZMM(n) "vmovups %%zmm" #n ", " #n "*64(%[out])\n\t"
#define STORE_K(n) "kmovq %%k" #n ", 2048+" #n "*8(%[out])\n\t"
#define STORE_X87(n) "fstpt 2112+" #n "*16(%[out])\n\t"

/* SPINS 0 yields once; nothing but the kernel runs between load and store. */
#define HOLD(loads, stores)                                                             \
	asm volatile(                                                                   \
		"fninit\n\t"                                                            \
		"fldcw 2244(%[in])\n\t"                                                 \
		"ldmxcsr 2240(%[in])\n\t" EACH8(LOAD_X87) loads                         \
		"test %[spins], %[spins]\n\t"                                           \
		"jz 2f\n"                                                               \
		"1:\tdec %[spins]\n\t"                                                  \
		"jnz 1b\n\t"                                                            \
		"jmp 3f\n"                                                              \
		"2:\tmov $24, %%eax\n\t" /* sched_yield */                              \
		"syscall\n"                                                             \
		"3:\n\t" stores EACH8(STORE_X87)                                        \
		"stmxcsr 2240(%[out])\n\t"                                              \
		"fnstcw 2244(%[out])\n\t"                                               \
		"fninit\n\t"                                                            \
		"ldmxcsr %[normal]\n\t"                                                 \
		: [spins] "+r"(spins)                                                   \
		: [in] "r"(in), [out] "r"(out), [normal] "m"(normal_mxcsr)              \
		: "rax", "rcx", "r11", "memory", "cc", "xmm0", "xmm1", "xmm2", "xmm3",  \
		  "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11",     \
		  "xmm12", "xmm13", "xmm14", "xmm15", "st", "st(1)", "st(2)", "st(3)",  \
		  "st(4)", "st(5)", "st(6)", "st(7)")

_Static_assert(offsetof(struct registers, mask) == 2048, "offsets in the assembly");
_Static_assert(offsetof(struct registers, x87) == 2112, "offsets in the assembly");
_Static_assert(offsetof(struct registers, mxcsr) == 2240, "offsets in the assembly");
_Static_assert(offsetof(struct registers, control) == 2244, "offsets in the assembly");

static uint32_t normal_mxcsr = 0x1f80;
static enum level level;
static volatile sig_atomic_t signals;

static void hold(const struct registers *in, struct registers *out, unsigned long spins)
{
	switch (level) {
	case SSE:
		HOLD(EACH16(LOAD_XMM), EACH16(STORE_XMM));
		break;
	case AVX:
		HOLD(EACH16(LOAD_YMM), EACH16(STORE_YMM) "vzeroupper\n\t");
		break;
	case AVX512:
		HOLD(EACH16(LOAD_ZMM) EACH_HIGH(LOAD_ZMM) EACH8(LOAD_K),
		     EACH16(STORE_ZMM) EACH_HIGH(STORE_ZMM) EACH8(STORE_K) "vzeroupper\n\t");
		break;
	}
}

static enum level offered(void)
{
	unsigned a, b, c, d;
	uint32_t low, high;

	__cpuid(1, a, b, c, d);
	if (!(c & 1 << 27)) /* OSXSAVE */
		return SSE;
	asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
	if ((low & 6) != 6 || !(c & 1 << 28))
		return SSE;
	__cpuid_count(7, 0, a, b, c, d);
	if ((low & 0xe6) == 0xe6 && (b & 1 << 16) && (b & 1 << 30))
		return AVX512;
	return AVX;
}

static void fill(struct registers *r, uint64_t seed)
{
	uint8_t *bytes = (uint8_t *)r;
	uint64_t x = seed * 2 + 1;

	for (size_t i = 0; i < sizeof *r; i++) {
		x ^= x << 13;
		x ^= x >> 7;
		x ^= x << 17;
		bytes[i] = x >> 24;
	}
	for (int i = 0; i < 8; i++) { /* normal numbers, so that they load and store as they are */
		r->x87[i][7] |= 0x80;
		r->x87[i][9] = 0x3f + (i & 1);
		r->x87[i][8] = 0xf0 | i;
	}
	static const uint32_t rounding[] = { 0, 0x2000, 0x4000, 0x6000 };
	r->mxcsr = 0x1f80 | rounding[seed & 3] | (seed & 4 ? 0x8000 : 0);
	r->control = 0x037f | (seed & 3) << 10;
}

static int differ(const struct registers *in, const struct registers *out)
{
	static const int vectors[] = { 16, 16, 32 }, width[] = { 16, 32, 64 };
	int bad = 0;

	for (int i = 0; i < vectors[level]; i++)
		bad |= memcmp(in->vector[i], out->vector[i], width[level]) != 0;
	if (level == AVX512)
		bad |= (memcmp(in->mask, out->mask, sizeof in->mask) != 0) << 1;
	for (int i = 0; i < 8; i++)
		bad |= (memcmp(in->x87[i], out->x87[i], 10) != 0) << 2;
	bad |= (in->mxcsr != (out->mxcsr & ~0x3fu)) << 3; /* sticky status bits aside */
	bad |= (in->control != out->control) << 4;
	return bad;
}

static void on_alarm(int number)
{
	static struct registers in, out;

	(void)number;
	fill(&in, 0x5eed + signals);
	hold(&in, &out, 1);
	signals++;
}

static double now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec + t.tv_nsec / 1e9;
}

static int run(int who, double seconds)
{
	static struct registers in, out;
	struct sigaction action = { .sa_handler = on_alarm, .sa_flags = SA_RESTART };
	struct itimerval every = { { 0, 20000 }, { 0, 20000 } };
	unsigned long yields = 0, spins = 0, bad = 0;
	double end = now() + seconds;
	struct rusage usage;

	sigaction(SIGALRM, &action, NULL);
	setitimer(ITIMER_REAL, &every, NULL);
	for (uint64_t round = 1; now() < end; round++) {
		int spin = round % 8 == 0;

		fill(&in, round * 2 + who);
		memset(&out, 0, sizeof out);
		hold(&in, &out, spin ? 20000000 : 0);
		*(spin ? &spins : &yields) += 1;
		int what = differ(&in, &out);
		if (what && bad++ < 5)
			printf("vector-state: process %d lost%s%s%s%s%s after a %s\n", who,
			       what & 1 ? " vector" : "", what & 2 ? " mask" : "",
			       what & 4 ? " x87" : "", what & 8 ? " MXCSR" : "",
			       what & 16 ? " x87 control" : "", spin ? "spin" : "yield");
	}
	getrusage(RUSAGE_SELF, &usage);
	printf("vector-state: process %d: %s, %lu yields, %lu spins, %d signals, "
	       "%ld+%ld switches, %lu lost\n", who, level_names[level], yields, spins,
	       (int)signals, usage.ru_nvcsw, usage.ru_nivcsw, bad);
	fflush(stdout);
	if (bad)
		return 1;
	if (!yields || !spins || !signals || usage.ru_nvcsw + usage.ru_nivcsw == 0) {
		printf("vector-state: process %d: too little happened to tell\n", who);
		return 2;
	}
	return 0;
}

int main(int argc, char **argv)
{
	double seconds = argc > 1 ? atof(argv[1]) : 10;
	int result = 0;

	level = offered();
	for (int who = 0; who < 2; who++) {
		pid_t pid = fork();
		if (pid < 0) {
			perror("vector-state: fork");
			return 2;
		}
		if (pid == 0)
			_exit(run(who, seconds));
	}
	for (int i = 0; i < 2; i++) {
		int status = 0;
		if (wait(&status) < 0 || !WIFEXITED(status))
			result = 3;
		else if (WEXITSTATUS(status))
			result = WEXITSTATUS(status);
	}
	printf("vector-state: %s\n", result ? "FAILED" : "passed");
	return result;
}
